#!/usr/bin/env python3
"""Two programs on two servers: when one sees what the other did, and locks between them.

    two_servers.py HERE THERE [--seconds S]     one directory, as two servers have it mounted

On a target that is no CTFS, HERE and THERE are the same path, and only the locks are tried.
"""

import fcntl
import os
import signal
import statistics
import struct
import time

from jobs import jobs_of, parser

PATIENCE = 10  # seconds until a change that is not seen is a failure


class Other:
    """A process on the other server, which calls `work(read, write)` with pipes of 8 byte numbers."""

    def __init__(self, work, bound):
        to_child, to_parent = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(to_child[1])
                os.close(to_parent[0])
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(int(bound))
                work(lambda: take(to_child[0]), lambda number: give(to_parent[1], number))
                status = 0
            except EOFError:  # this side is done
                status = 0
            finally:
                os._exit(status)
        os.close(to_child[0])
        os.close(to_parent[1])
        self.ends = (to_parent[0], to_child[1])

    def take(self):
        return take(self.ends[0])

    def give(self, number):
        give(self.ends[1], number)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for end in self.ends:
            os.close(end)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def take(fd):
    got = os.read(fd, 8)
    if len(got) < 8:
        raise EOFError("the other process is gone")
    return struct.unpack("q", got)[0]


def give(fd, number):
    os.write(fd, struct.pack("q", number))


def seen_after(jobs, change, sees):
    """Milliseconds from the end of `change(i)` here until `sees(i)` there, all of them; and how many
    questions asked there after that end got the old answer."""

    def watch(read, write):
        while True:
            i = read()
            if sees(i):
                raise RuntimeError("seen before it happened")
            write(0)
            until = time.monotonic() + PATIENCE
            asked = [0]
            while True:
                start = time.monotonic_ns()
                if sees(i):
                    break
                asked.append(start)
                if time.monotonic() > until:
                    raise TimeoutError("not seen")
            seen = time.monotonic_ns()
            done = read()
            write(seen)
            write(sum(start > done for start in asked))

    waits, old, end = [], 0, time.monotonic() + jobs.seconds
    with Other(watch, jobs.seconds + 2 * PATIENCE) as other:
        while time.monotonic() < end:
            other.give(len(waits))
            other.take()
            change(len(waits))
            done = time.monotonic_ns()
            other.give(done)
            # It may be seen before the program that did it goes on.
            waits.append(max(0, other.take() - done) / 1e6)
            old += other.take()
    return waits, old


def exists(path):
    try:
        os.stat(path)
        return True
    except FileNotFoundError:
        return False


def put(path, content):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(fd, content)
    os.close(fd)


def content(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 100)
    finally:
        os.close(fd)


def changes(jobs, here, there):
    def watched(what, change, sees):
        waits, old = [], None

        def work():
            nonlocal waits, old
            waits, old = seen_after(jobs, change, sees)
            return len(waits) / jobs.seconds

        jobs.run(what, "changes/s", work)
        jobs.row(f"{what}, median", "ms", statistics.median(waits) if waits else None)
        jobs.row(f"{what}, longest", "ms", max(waits) if waits else None)
        jobs.row(f"{what}: old answers after it was done", "answers", old)

    watched("new name seen on another server", lambda i: put(f"{here}/n{i}", b""), lambda i: exists(f"{there}/n{i}"))
    put(f"{here}/content", b"%020d" % -1)
    watched(
        "new content seen on another server",
        lambda i: put(f"{here}/content", b"%020d" % i),
        lambda i: content(f"{there}/content") == b"%020d" % i,
    )


def count_up(path, lock, seconds):
    """Locks, reads, adds one, writes, unlocks, until time is up. How many times."""
    fd = os.open(path, os.O_RDWR)
    done, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        lock(fd, fcntl.LOCK_EX)
        number = int(os.pread(fd, 20, 0))
        os.pwrite(fd, b"%020d" % (number + 1), 0)
        lock(fd, fcntl.LOCK_UN)
        done += 1
    os.close(fd)
    return done


def locks(jobs, here, there):
    for name, lock in (("flock", fcntl.flock), ("fcntl", fcntl.lockf)):
        lost = None

        def both():
            nonlocal lost
            mine, yours = f"{here}/{name}", f"{there}/{name}"
            put(mine, b"%020d" % 0)

            def work(read, write):
                write(0)
                read()
                write(count_up(yours, lock, jobs.seconds))

            with Other(work, jobs.seconds + 20) as other:
                other.take()
                start = time.monotonic()
                other.give(0)
                total = count_up(mine, lock, jobs.seconds) + other.take()
                took = time.monotonic() - start
            lost = total - int(content(there + "/" + name))
            return total / took

        jobs.run(f"{name}, read, add one, write", "op/s", both)
        if here != there or lost:
            jobs.row(f"increments lost under {name}" + ("" if here != there else f", {jobs.target}"), "of all", lost, must=0)


arguments = parser(__doc__)
arguments.add_argument("here")
arguments.add_argument("there")
args = arguments.parse_args()
jobs = jobs_of(args)
if args.here != args.there:
    changes(jobs, args.here, args.there)
locks(jobs, args.here, args.there)
