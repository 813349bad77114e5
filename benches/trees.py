#!/usr/bin/env python3
"""Trees of thousands of small files: unpacked, removed, cloned, walked for the first time.

    trees.py DIR --prepare                     makes DIR/tree.tar and DIR/tree.git, 5,000 files each
    trees.py DIR --from PREPARED [--bound S]   tar x, find, rm -rf and git clone in DIR, which is empty
    trees.py DIR --unpack PREPARED [--bound S] only tar x
    trees.py DIR --make N [--a-directory M]    only makes N small files, by eight processes; stops
                                               after --bound S; prints how many there are then
    trees.py DIR --walk find|du                how long it takes

A program that is not done after the bound is ended, and what it got done counts.
"""

import io
import os
import subprocess
import tarfile
import time

from jobs import jobs_of, parser, write

FILES, A_DIRECTORY = 5000, 20


def sources():
    """Names and sizes as a source tree has them: 1 to 15 KiB."""
    for i in range(FILES):
        yield f"tree/dir{i // A_DIRECTORY}/file{i}.txt", 1024 + i * 7919 % 14336


def prepare(directory):
    repository = os.path.join(directory, "tree.git")
    subprocess.run(["git", "init", "--quiet", "--bare", repository], check=True)
    fast_import = subprocess.Popen(["git", "-C", repository, "fast-import", "--quiet"], stdin=subprocess.PIPE)
    say = fast_import.stdin.write
    say(b"commit refs/heads/main\ncommitter bench <bench@localhost> 0 +0000\ndata 4\ntree\n")
    with tarfile.open(os.path.join(directory, "tree.tar"), "w") as archive:
        for path, size in sources():
            content = os.urandom(size)
            info = tarfile.TarInfo(path)
            info.size = size
            archive.addfile(info, io.BytesIO(content))
            say(b"M 100644 inline %s\ndata %d\n%s\n" % (path.encode(), size, content))
    fast_import.stdin.close()
    if fast_import.wait() != 0:
        raise SystemExit("git fast-import failed")
    subprocess.run(["git", "-C", repository, "symbolic-ref", "HEAD", "refs/heads/main"], check=True)


def count(directory):
    return sum(len(files) for at, below, files in os.walk(directory) if ".git" not in at.split("/"))


def rate(command, bound, done):
    """Files a second of a program that works on FILES of them, or on `done()` if it is cut short."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        status = process.wait(timeout=bound)
        took = time.monotonic() - start
    except subprocess.TimeoutExpired:
        process.terminate()
        took = time.monotonic() - start
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        # None at all in that time is a failure rather than a rate.
        return done() / took or None
    finally:
        if process.poll() is None:
            process.kill()
    if status != 0:
        raise RuntimeError(f"{command[0]}: exit status {status}")
    return done() / took


def run(jobs, directory, prepared, bound, only=False):
    tree, clone = os.path.join(directory, "tree"), os.path.join(directory, "clone")
    at_most = 2 * bound + 60
    unpacked = 0

    def unpack():
        value = rate(["tar", "-x", "-f", f"{prepared}/tree.tar", "-C", directory], bound, lambda: count(tree))
        nonlocal unpacked
        unpacked = count(tree)
        return value

    jobs.run("tar x", "files/s", unpack, at_most)
    if only:
        return
    jobs.run("find", "files/s", lambda: rate(["find", tree, "-type", "f", "-size", "+0"], bound, lambda: unpacked), at_most)
    jobs.run("rm -rf", "files/s", lambda: rate(["rm", "-rf", tree], bound, lambda: unpacked - count(tree)), at_most)
    cloned = ["git", "clone", "--quiet", "--no-hardlinks", f"{prepared}/tree.git", clone]
    # git removes what it made when it is told to end, so that what it got done is counted before.
    jobs.run("git clone", "files/s", lambda: clone_rate(cloned, clone, bound), at_most)


def clone_rate(command, clone, bound):
    start = time.monotonic()
    process = subprocess.Popen(command)
    try:
        if process.wait(timeout=bound) != 0:
            raise RuntimeError(f"git clone: exit status {process.returncode}")
        return FILES / (time.monotonic() - start)
    except subprocess.TimeoutExpired:
        took = time.monotonic() - start
        return count(clone) / took or None
    finally:
        process.kill()
        process.wait(timeout=20)


def make(directory, files, a_directory, bound):
    """Files 0 to `files`, by eight processes, so that they share what a commit costs."""
    until = time.monotonic() + bound
    if a_directory < files:
        for d in range((files + a_directory - 1) // a_directory):
            os.mkdir(os.path.join(directory, f"d{d}"))
    children = []
    for k in range(8):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for i in range(k, files, 8):
                    if time.monotonic() > until:
                        break
                    below = f"d{i // a_directory}/" if a_directory < files else ""
                    write(f"{directory}/{below}f{i}", b"%01000d" % i)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1] != 0]
    print(count(directory))
    raise SystemExit(1 if failed else 0)


def walk(program, directory):
    command = {"find": ["find", directory, "-type", "f"], "du": ["du", "-s", directory]}[program]
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


arguments = parser(__doc__)
arguments.add_argument("directory")
arguments.add_argument("--prepare", action="store_true")
arguments.add_argument("--from", dest="prepared")
arguments.add_argument("--unpack", metavar="PREPARED")
arguments.add_argument("--bound", type=float, default=60)
arguments.add_argument("--make", type=int)
arguments.add_argument("--a-directory", type=int, default=100)
arguments.add_argument("--walk", choices=["find", "du"])
args = arguments.parse_args()
if args.prepare:
    prepare(args.directory)
elif args.make is not None:
    make(args.directory, args.make, args.a_directory, args.bound)
elif args.walk:
    jobs_of(args).run(f"first {args.walk}", "s", lambda: walk(args.walk, args.directory), args.bound)
elif args.unpack:
    run(jobs_of(args), args.directory, args.unpack, args.bound, only=True)
elif args.prepared:
    run(jobs_of(args), args.directory, args.prepared, args.bound)
else:
    arguments.error("what shall it do?")
