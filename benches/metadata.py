#!/usr/bin/env python3
"""Changes of metadata in one directory by one process, one after the other.

    metadata.py DIR [--seconds S] [--most N]     DIR exists and is empty, and is left empty
    metadata.py DIR --fill N                     only makes N files of 4 KiB, 1,000 a directory
"""

import itertools
import os
import time

from jobs import jobs_of, parser, write

BLOCK = 4096


def read(path):
    with open(path, "rb", buffering=0) as file:
        assert len(file.read()) == BLOCK, path


def make(jobs, directory, prefix, most, each):
    """Makes files until time is up, `most` of them at most. Their paths, and how many a second."""
    made, start = [], time.monotonic()
    while len(made) < most and time.monotonic() < start + jobs.seconds:
        path = os.path.join(directory, f"{prefix}{len(made)}")
        each(path)
        made.append(path)
    return made, len(made) / (time.monotonic() - start)


def run(jobs, directory, most):
    everything = []

    def create(prefix, most, each):
        made, rate = make(jobs, directory, prefix, most, each)
        everything.extend(made)
        return rate

    def durable(path):
        write(path, os.urandom(BLOCK), sync=True)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(fd)
        os.close(fd)

    jobs.run("create", "op/s", lambda: create("f", most, lambda path: write(path, os.urandom(BLOCK))))
    jobs.run("create+fsync", "op/s", lambda: create("d", most, durable))

    # Each pass over the files changes every one of them again.
    def again(change):
        names, turns = itertools.cycle(list(everything)), itertools.count()

        def some():
            for path in itertools.islice(names, 10):
                change(path, next(turns) // len(everything) % 2)

        return jobs.passes(some, 10)

    def rename(path, turn):
        os.rename(*((path + ".new", path) if turn else (path, path + ".new")))

    def unlink():
        start, count = time.monotonic(), 0
        with os.scandir(directory) as entries:
            names = [entry.path for entry in entries]
        for path in names:
            os.unlink(path)
            count += 1
        return count / (time.monotonic() - start)

    jobs.run("open+read", "op/s", lambda: again(lambda path, _: read(path)))
    jobs.run("chmod", "op/s", lambda: again(lambda path, turn: os.chmod(path, 0o644 if turn else 0o600)))
    jobs.run("setxattr", "op/s", lambda: again(lambda path, turn: os.setxattr(path, "user.bench", b"%d" % turn)))
    jobs.run("rename", "op/s", lambda: again(rename))
    jobs.run("unlink", "op/s", unlink)


def fill(directory, files):
    for i in range(files):
        if i % 1000 == 0:
            below = os.path.join(directory, f"fill{i // 1000}")
            os.mkdir(below)
        write(os.path.join(below, f"f{i}"), os.urandom(BLOCK))


arguments = parser(__doc__)
arguments.add_argument("directory")
arguments.add_argument("--most", type=int, default=2000)
arguments.add_argument("--fill", type=int, metavar="N")
args = arguments.parse_args()
if args.fill is not None:
    fill(args.directory, args.fill)
else:
    run(jobs_of(args), args.directory, args.most)
