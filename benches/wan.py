#!/usr/bin/env python3
"""Rows of scripts/bench-wan: what was measured at a distance, in times of the same without.

    wan.py NEAR FAR --rtt 50ms      results of jobs.py without and with the distance
"""

import argparse
import json
import re
from statistics import median

# A commit's unit is a second's part; a walk is seconds, a rate is files or operations a second.
NAMES = {"first find": "find"}
COMMITS = ("write 4 KiB + fsync, median", "SQLite inserts, rollback journal", "SQLite inserts, WAL")


def seconds(unit, value):
    """How long one operation, or the whole walk, takes."""
    return {"s": value, "ms": value / 1000}.get(unit, 1 / value)


def results(path):
    """The median of each job on each server, in seconds."""
    found, failed = {}, []
    with open(path) as lines:
        for line in map(json.loads, lines):
            if "failed" in line:
                failed.append(line["failed"])
            elif not line.get("begin"):
                values = found.setdefault((line["job"], line["target"]), [])
                if line["value"]:
                    values.append(seconds(line["unit"], line["value"]))
    return {what: median(values) if values else None for what, values in found.items()}, failed


def milliseconds(text):
    number, unit = re.fullmatch(r"([0-9.]+)(ms|s)", text).groups()
    return float(number) * (1000 if unit == "s" else 1)


def row(name, unit, value):
    print(json.dumps({"row": name, "unit": unit, "value": value}))


arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("near")
arguments.add_argument("far")
arguments.add_argument("--rtt", required=True)
args = arguments.parse_args()
(near, failed_near), (far, failed_far) = results(args.near), results(args.far)
trip = milliseconds(args.rtt) / 1000
for job, server in sorted(near.keys() | far.keys()):
    at, away = near.get((job, server)), far.get((job, server))
    name = f"{NAMES.get(job, job)}, {server}"
    if job in COMMITS:
        row(f"{name}, a commit", "round trips", (away - at) / trip if at and away else None)
    else:
        row(f"{name}, in times of no distance", "times, less is better", away / at if at and away else None)
for failure in failed_near + failed_far:
    print(json.dumps({"failed": failure}))
