#!/usr/bin/env python3
"""The tables and the JSON document of a run of scripts/bench. The tables are Markdown.

    report.py RESULTS --meta KEY=VALUE... [--json FILE]

RESULTS holds one JSON object a line, null as a value for a failure:

    {"job", "unit", "target", "value"}    done on "plain", "bare" and "ctfs", and maybe on "one": an
                                          idle CTFS server of its own; with "begin" before it starts
    {"row", "unit", "value"}              what only CTFS has; with "must", any other value is a failure
    {"resource", "unit", "value"}         what it uses
    {"failed"}                            a program that came to no end

Exit status 1 when something failed.
"""

import argparse
import json
import statistics

TARGETS = ("plain", "bare", "ctfs", "one")

PAGE_IN_PARTS = "write 4 KiB + fsync, in times of two of plain and one round trip to the pair"

# What CTFS aims at. docs/benchmarks.md says why.
GOALS = {
    "stat, hot": "0.8 of plain",
    "open+close, hot": "1 of bare",
    "readdir+stat, hot": "1 of bare",
    "hot-rand-read-4k": "0.9 of plain",
    "hot-seq-read": "0.9 of plain",
    "hot-mmap-read": "0.9 of plain",
    "seq-read": "0.9 of plain",
    "seq-write": "0.5 of plain",
    "rand-read-4k": "0.9 of plain",
    "rand-write-4k": "bare",
    "mixed-70-30": "bare",
    "mmap-rand-read": "0.9 of plain",
    "many-small-files": "bare",
    "create": "0.8 of bare",
    "create+fsync": "0.5 of plain",
    "open+read": "bare",
    "chmod": "0.8 of bare",
    "setxattr": "0.8 of bare",
    "rename": "0.8 of bare",
    "unlink": "0.8 of bare",
    "tar x": "0.77 of bare",
    "find": "bare",
    "rm -rf": "0.77 of bare",
    "git clone": "0.77 of bare",
    "first find": "at most 1.5 times one idle server",
    "first du": "at most 1.5 times one idle server",
    "fsync-4k": "0.5 of plain",
    "write 4 KiB + fsync, median": "two of plain and one round trip",
    PAGE_IN_PARTS: "at most 1",
    "SQLite inserts, rollback journal": "0.6 of bare",
    "SQLite inserts, WAL": "0.6 of bare",
    "pgbench, 4 clients": "0.6 of bare",
    "new name seen on another server, median": "a round trip",
    "new name seen on another server, longest": "50 ms",
    "new content seen on another server, median": "a round trip",
    "new content seen on another server, longest": "50 ms",
    "flock, read, add one, write": "2 round trips each",
    "fcntl, read, add one, write": "2 round trips each",
    "new name seen on another server: old answers after it was done": "0",
    "new content seen on another server: old answers after it was done": "0",
    "increments lost under flock": "0",
    "increments lost under fcntl": "0",
}


# The same, for rows of which there is one for each server.
GOALS_BY_START = {
    ("find,", "no distance"): "at most 1.5",
    ("tar x,", "no distance"): "at most 2",
    ("write 4 KiB + fsync", "class pair, a commit"): "1",
    ("SQLite inserts, WAL", "class pair, a commit"): "1",
    ("SQLite inserts, rollback", "class pair, a commit"): "1 for each fsync",
    ("", "class local, a commit"): "0",
}


def goal_of(name):
    by_start = (goal for (start, end), goal in GOALS_BY_START.items() if name.startswith(start) and name.endswith(end))
    return GOALS.get(name) or next(by_start, "at most 1.5" if "idle server" in name else "")


def number(value):
    if value is None:
        return "failed"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(unit):
    return unit in ("ms", "s")


def table(head, left, rows):
    """Columns whose name is in `left` hold text."""
    if not rows:
        return
    widths = [max(len(row[i]) for row in [head] + rows) for i in range(len(head))]

    def line(cells):
        return "| " + " | ".join(
            cell.ljust(width) if name in left else cell.rjust(width) for name, cell, width in zip(head, cells, widths)
        ) + " |"

    print(line(head))
    print("|" + "|".join("-" * (width + 2) if name in left else "-" * (width + 1) + ":" for name, width in zip(head, widths)) + "|")
    for row in rows:
        print(line(row))
    print()


def spread(values):
    """Largest over smallest: what the machine did meanwhile."""
    return max(values) / min(values) if len(values) > 1 and min(values) > 0 else None


def ratio(ctfs, other, unit):
    """How much CTFS does in the time of the other: for durations, the other's divided by its."""
    if not ctfs or not other:
        return None
    return other / ctfs if duration(unit) else ctfs / other


def short(value, form=".3g"):
    return "-" if value is None else f"{value:{form}}"


def summed(job):
    """Adds to a job what its values say."""
    for target in TARGETS:
        values, begun = job[target], job["begun"][target]
        good = [value for value in values if value is not None]
        job[f"{target}_median"] = statistics.median(good) if good else None
        job[f"{target}_spread"] = spread(good)
        job[f"{target}_failed"] = max(begun, len(values)) - len(good)
    for other in ("plain", "bare", "one"):
        job[f"ratio_{other}"] = ratio(job["ctfs_median"], job[f"{other}_median"], job["unit"])
    del job["begun"]


def job_row(job):
    def value(target):
        failed, median = job[f"{target}_failed"], job[f"{target}_median"]
        if median is None:
            return "failed" if failed else "-"
        return number(median) + (f" ({failed} failed)" if failed else "")

    return [
        job["job"],
        job["unit"],
        *(value(target) for target in TARGETS[:3]),
        short(job["ratio_plain"]),
        short(job["ratio_bare"]),
        " / ".join(short(job[f"{target}_spread"], ".1f") for target in TARGETS[:3]),
        GOALS.get(job["job"], ""),
    ]


arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("results")
arguments.add_argument("--meta", nargs="*", default=[])
arguments.add_argument("--json")
args = arguments.parse_args()

jobs, rows, resources, failures = {}, {}, [], []
with open(args.results) as lines:
    for line in map(json.loads, lines):
        if "resource" in line:
            resources.append(line)
        elif "row" in line:
            row = rows.setdefault(line["row"], {"row": line["row"], "unit": line["unit"], "values": []})
            row["values"].append(line["value"])
            row["must"] = line.get("must")
        elif "failed" in line:
            failures.append(line["failed"])
        else:
            empty = {target: [] for target in TARGETS}
            job = jobs.setdefault(
                line["job"], {"job": line["job"], "unit": line["unit"], **empty, "begun": dict.fromkeys(TARGETS, 0)}
            )
            if line.get("begin"):
                job["begun"][line["target"]] += 1
            else:
                job[line["target"]].append(line["value"])

for job in jobs.values():
    summed(job)
    failures += [f"{job['job']} on {target}" for target in TARGETS if job[f"{target}_failed"]]
    if job["one_median"] and job["ctfs_median"]:
        name = f"{job['job']} on another server, in times of one idle server"
        rows[name] = {"row": name, "unit": "times, less is better", "values": [job["ctfs_median"] / job["one_median"]]}

page, trips = jobs.get("write 4 KiB + fsync, median"), rows.get("round trip to the pair", {}).get("values")
if page and page["ctfs_median"] and page["plain_median"] and trips and None not in trips:
    allowed = 2 * page["plain_median"] + statistics.median(trips)
    rows[PAGE_IN_PARTS] = {"row": PAGE_IN_PARTS, "unit": "times, less is better", "values": [page["ctfs_median"] / allowed]}

across = []
for row in rows.values():
    good = [value for value in row["values"] if value is not None]
    wrong = row.get("must") is not None and any(value != row["must"] for value in good)
    if wrong or len(good) < len(row["values"]):
        failures.append(row["row"])
    goal = goal_of(row["row"])
    # What should be 0 shows its worst, a longest time the longest.
    worst = goal == "0" or row["row"].endswith("longest")
    row["value"] = (max(good) if worst else statistics.median(good)) if good else None
    across.append([row["row"], number(row["value"]), row["unit"], short(spread(good), ".1f"), goal])
failures += [line["resource"] for line in resources if line["value"] is None]

head = ["job", "unit", "plain", "bare", "CTFS", "CTFS/plain", "CTFS/bare", "spread plain / bare / CTFS", "goal"]
table(head, ("job", "unit", "goal"), [job_row(job) for job in jobs.values()])
if any(duration(job["unit"]) for job in jobs.values()):
    print("Units ms and s: less is better, and the ratios are turned round, so that more is better in every row.\n")
table(["across servers", "value", "unit", "spread", "goal"], ("across servers", "unit", "goal"), across)
table(["what it uses", "value", "unit"], ("what it uses", "unit"), [[r["resource"], number(r["value"]), r["unit"]] for r in resources])
for failure in failures:
    print(f"failed: {failure}")
if args.json:
    meta = dict(pair.split("=", 1) for pair in args.meta)
    document = {
        "schema": 2, **meta, "jobs": list(jobs.values()), "rows": list(rows.values()), "resources": resources, "failures": failures,
    }
    with open(args.json, "w") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
raise SystemExit(1 if failures else 0)
