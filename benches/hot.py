#!/usr/bin/env python3
"""Names that the kernel may know already: asked for again and again.

    hot.py DIR [--seconds S]     DIR holds some hundred files, as trees.py --make makes them

The loops are python's, which costs about a microsecond a call on every target: a ratio below 1
is kinder than a compiled program would see.
"""

import os

from jobs import jobs_of, parser


def all_stat(paths, stat=os.stat):
    for path in paths:
        stat(path)


def all_open(paths, open=os.open, close=os.close, flags=os.O_RDONLY):
    for path in paths:
        close(open(path, flags))


def scan(directory):
    with os.scandir(directory) as entries:
        for entry in entries:
            entry.stat(follow_symlinks=False)


arguments = parser(__doc__)
arguments.add_argument("directory")
args = arguments.parse_args()
jobs = jobs_of(args)
every = [os.path.join(args.directory, name) for name in sorted(os.listdir(args.directory))]
few = every[:300]


def warm(work, count):
    work()
    work()
    return jobs.passes(work, count)


jobs.run("stat, hot", "op/s", lambda: warm(lambda: all_stat(few), len(few)))
jobs.run("open+close, hot", "op/s", lambda: warm(lambda: all_open(few), len(few)))
jobs.run("readdir+stat, hot", "entries/s", lambda: warm(lambda: scan(args.directory), len(every)))
