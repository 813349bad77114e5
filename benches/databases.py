#!/usr/bin/env python3
"""Programs that wait for each commit: a page and its fsync, SQLite, PostgreSQL.

    databases.py DIR [--seconds S]            a page with fsync, SQLite with both journals; DIR is empty
    databases.py DIR --pgbench-prepare        makes a filled PostgreSQL in DIR, which must not exist
    databases.py DIR --pgbench FROM           copies that one to DIR and runs pgbench with four clients
"""

import glob
import os
import pwd
import re
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time

from jobs import jobs_of, parser


def page_commits(jobs, directory):
    path = os.path.join(directory, "pages")
    size = 4 << 20
    page = os.urandom(4096)
    with open(path, "wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
    fd = os.open(path, os.O_RDWR)
    at = 0

    def commit():
        nonlocal at
        at = (at + 7 * 4096) % size
        os.pwrite(fd, page, at)
        os.fsync(fd)

    try:
        return jobs.median_ms(commit)
    finally:
        os.close(fd)
        os.unlink(path)


def inserts(jobs, directory, journal):
    path = os.path.join(directory, f"{journal}.db")
    base = sqlite3.connect(path, isolation_level=None, timeout=10)
    try:
        got = base.execute(f"pragma journal_mode={journal}").fetchone()[0]
        if got.lower() != journal:
            raise RuntimeError(f"journal mode is {got}")
        base.execute("pragma synchronous=full")
        base.execute("create table t (id integer primary key, text)")
        insert = base.execute
        return jobs.passes(lambda: insert("insert into t (text) values ('a hundred bytes or so, as a row has them')"), 1)
    finally:
        base.close()
        for left in glob.glob(path + "*"):
            os.unlink(left)


class Postgres:
    """One server on a data directory, as a user of its own; sockets only, no port."""

    def __init__(self, data):
        self.data, self.server = data, None
        self.bin = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda path: int(path.split("/")[4]))[-1]
        self.scratch = tempfile.mkdtemp(prefix="ctfs-bench-")
        user = pwd.getpwnam("postgres")
        os.chown(self.scratch, user.pw_uid, user.pw_gid)
        self.how = {
            "user": user.pw_uid, "group": user.pw_gid, "extra_groups": [], "cwd": self.scratch,
            "env": {"HOME": self.scratch, "PGHOST": self.scratch, "PATH": f"{self.bin}:{os.environ['PATH']}"},
        }
        self.log = open(os.path.join(self.scratch, "log"), "w+")

    def run(self, *command, bound):
        return subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=self.log, text=True, timeout=bound, **self.how
        ).stdout

    def start(self, bound):
        options = ["-c", "listen_addresses=", "-c", "shared_buffers=32MB", "-k", self.scratch]
        self.server = subprocess.Popen(["postgres", "-D", self.data, *options], stdout=self.log, stderr=self.log, **self.how)
        end = time.monotonic() + bound
        while subprocess.run(["pg_isready", "-q"], **self.how).returncode != 0:
            if self.server.poll() is not None or time.monotonic() > end:
                raise RuntimeError("PostgreSQL does not start")
            time.sleep(0.1)

    def stop(self):
        if self.server and self.server.poll() is None:
            self.server.send_signal(signal.SIGINT)  # a fast shutdown
            try:
                self.server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.server.kill()
                self.server.wait(timeout=10)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            self.stop()
        finally:
            if kind:
                self.log.seek(0)
                print("".join(self.log.readlines()[-20:]), end="")
            shutil.rmtree(self.scratch, ignore_errors=True)


def prepare_postgres(data):
    with Postgres(data) as postgres:
        os.mkdir(data, 0o700)
        shutil.chown(data, "postgres", "postgres")
        postgres.run("initdb", "-D", data, "--auth=trust", "--no-sync", bound=60)
        postgres.start(30)
        postgres.run("pgbench", "-i", "-q", "-s", "4", "postgres", bound=60)


def pgbench(jobs, data, source, bound):
    subprocess.run(["cp", "-a", source, data], check=True, timeout=bound)
    with Postgres(data) as postgres:
        postgres.start(60)
        out = postgres.run("pgbench", "-n", "-c", "4", "-T", str(max(1, int(jobs.seconds))), "postgres", bound=jobs.seconds + 60)
    return float(re.search(r"^tps = ([0-9.]+)", out, re.M)[1])


arguments = parser(__doc__)
arguments.add_argument("directory")
arguments.add_argument("--pgbench-prepare", action="store_true")
arguments.add_argument("--pgbench", metavar="FROM")
arguments.add_argument("--bound", type=float, default=60, help="time to copy PostgreSQL's files")
args = arguments.parse_args()
jobs = jobs_of(args)
if args.pgbench_prepare:
    prepare_postgres(args.directory)
elif args.pgbench:
    bound = args.bound + args.seconds + 60
    jobs.run("pgbench, 4 clients", "tps", lambda: pgbench(jobs, args.directory, args.pgbench, args.bound), bound)
else:
    jobs.run("write 4 KiB + fsync, median", "ms", lambda: page_commits(jobs, args.directory))
    jobs.run("SQLite inserts, rollback journal", "op/s", lambda: inserts(jobs, args.directory, "delete"))
    jobs.run("SQLite inserts, WAL", "op/s", lambda: inserts(jobs, args.directory, "wal"))
