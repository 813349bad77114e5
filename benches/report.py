#!/usr/bin/env python3
"""The table and the JSON document of a run of scripts/bench.

    report.py RESULTS --meta KEY=VALUE... [--json FILE]

RESULTS holds one JSON object a line: {"job", "unit", "target": "plain"|"ctfs", "value"} for
what is compared, with a null value for a failure, and {"resource", "unit", "value"} for the rest.
Exit status 1 when something failed.
"""

import argparse
import json
import statistics


def number(value):
    if value is None:
        return "failed"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows, head):
    rows = [head] + rows
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        first, *rest = zip(row, widths)
        print("  " + first[0].ljust(first[1]) + "".join("  " + cell.rjust(width) for cell, width in rest))


def spread(values):
    """Largest over smallest: what the machine did meanwhile."""
    return max(values) / min(values) if values and min(values) > 0 else None


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("results")
parser.add_argument("--meta", nargs="*", default=[])
parser.add_argument("--json")
args = parser.parse_args()

jobs, resources = {}, []
with open(args.results) as lines:
    for line in map(json.loads, lines):
        if "resource" in line:
            resources.append(line)
        else:
            job = jobs.setdefault(line["job"], {"job": line["job"], "unit": line["unit"], "plain": [], "ctfs": []})
            job[line["target"]].append(line["value"])

failed = any(line["value"] is None for line in resources)
rows = []
for job in jobs.values():
    for target in ("plain", "ctfs"):
        good = [value for value in job[target] if value is not None]
        failed |= len(good) < len(job[target])
        job[f"{target}_median"] = statistics.median(good) if good else None
        job[f"{target}_spread"] = spread(good)
        job[f"{target}_failed"] = len(job[target]) - len(good)
    plain, ctfs = job["plain_median"], job["ctfs_median"]
    job["ratio"] = ctfs / plain if plain and ctfs is not None else None
    spreads = " / ".join("-" if s is None else f"{s:.1f}" for s in (job["plain_spread"], job["ctfs_spread"]))
    note = f"  ({job['ctfs_failed']} failed)" if job["ctfs_failed"] and ctfs is not None else ""
    ratio = "-" if job["ratio"] is None else f"{job['ratio']:.3g}"
    rows.append([job["job"], job["unit"], number(plain), number(ctfs) + note, ratio, spreads])

table(rows, ["job", "unit", "plain", "ctfs", "ratio", "spread"])
print()
table([[r["resource"], number(r["value"]), r["unit"]] for r in resources], ["resource", "value", "unit"])
if args.json:
    document = {"schema": 1, **dict(pair.split("=", 1) for pair in args.meta), "jobs": list(jobs.values()), "resources": resources}
    with open(args.json, "w") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
raise SystemExit(1 if failed else 0)
