"""What the programs of a benchmark run share: arguments, time, and where results go.

A result is one line of JSON in the file that --results names: {"job", "unit", "target", "value"}
for what is done on several targets, {"row", "unit", "value"} for what only CTFS has. A line with
"begin" comes before each job, so that one whose program was killed is missed. A job that fails
has the value null, and the program goes on with the next.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import time


class Jobs:
    def __init__(self, results, target, seconds):
        self.results, self.target, self.seconds = results, target, seconds
        signal.signal(signal.SIGALRM, too_late)

    def put(self, **line):
        with open(self.results, "a") as file:
            file.write(json.dumps(line) + "\n")

    def run(self, job, unit, work, bound=None):
        """The value that `work` returns is the job's; it may take `bound` seconds."""
        same = {"job": job, "unit": unit, "target": self.target}
        self.put(**same, begin=True)
        signal.alarm(int(bound or self.seconds + 30))
        try:
            value = work()
        except Exception as error:  # whatever it is, the next job runs
            print(f"bench: {job} failed on {self.target}: {error!r}", file=sys.stderr)
            value = None
        finally:
            signal.alarm(0)
        self.put(**same, value=value)
        return value

    def row(self, name, unit, value, **more):
        self.put(row=name, unit=unit, value=value, **more)

    def passes(self, work, count):
        """Calls `work`, which does `count` operations, until time is up. Operations a second."""
        clock = time.monotonic
        done, start = 0, clock()
        end = start + self.seconds
        while (now := clock()) < end:
            work()
            done += count
        return done / (now - start)

    def median_ms(self, work):
        """Calls `work` until time is up. Median time of one call."""
        clock = time.perf_counter
        took, end = [], clock() + self.seconds
        while (start := clock()) < end:
            work()
            took.append(clock() - start)
        return statistics.median(took) * 1000


def too_late(*_):
    raise TimeoutError("it took too long")


def parser(doc):
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", default="/dev/stdout", help="file that gets the results")
    made.add_argument("--target", default="ctfs", help="name of what is measured")
    made.add_argument("--seconds", type=float, default=1, help="time for each job")
    return made


def jobs_of(args):
    return Jobs(args.results, args.target, args.seconds)


def write(path, content, sync=False):
    """Makes a new file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(fd, content)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)
