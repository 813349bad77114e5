#!/usr/bin/env python3
"""Metadata load in one directory: how many operations a second, one after the other.

    metadata.py DIR --files N [--tar FILE]     times every operation, prints one JSON object
    metadata.py --make-tar FILE                makes the tree of 1,000 files that --tar unpacks
    metadata.py DIR --fill N                   only makes N files of 4 KiB, 1,000 a directory

DIR must exist and be empty; it is left empty, except by --fill.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time


def timed(results, name, count, work):
    start = time.monotonic()
    work()
    results[name] = count / (time.monotonic() - start)


def write(path, content, sync=False):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(fd, content)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def read(path):
    with open(path, "rb", buffering=0) as file:
        assert len(file.read()) == 4096, path


def sync_directory(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def run(directory, files, tar):
    results = {}
    old = [os.path.join(directory, f"f{i}") for i in range(files)]
    new = [os.path.join(directory, f"g{i}") for i in range(files)]
    durable = [os.path.join(directory, f"d{i}") for i in range(files // 5)]

    def make_durable():
        for path in durable:
            write(path, os.urandom(4096), sync=True)
            sync_directory(directory)

    timed(results, "create", files, lambda: [write(path, os.urandom(4096)) for path in old])
    timed(results, "create+fsync", len(durable), make_durable)
    timed(results, "stat", files, lambda: [os.stat(path) for path in old])
    timed(results, "open+read", files, lambda: [read(path) for path in old])
    timed(results, "chmod", files, lambda: [os.chmod(path, 0o600) for path in old])
    timed(results, "rename", files, lambda: [os.rename(a, b) for a, b in zip(old, new)])
    timed(results, "unlink", files, lambda: [os.unlink(path) for path in new])
    if tar:
        with tarfile.open(tar) as archive:
            entries = len(archive.getnames())
        unpack = ["tar", "-x", "-f", tar, "-C", directory]
        timed(results, "tar x", entries, lambda: subprocess.run(unpack, check=True))
        find = ["find", directory, "-type", "f", "-size", "+0"]
        timed(results, "find", entries, lambda: subprocess.run(find, check=True, stdout=subprocess.DEVNULL))
        timed(results, "rm -r", entries, lambda: shutil.rmtree(os.path.join(directory, "tree")))
    for path in durable:
        os.unlink(path)
    return results


def make_tar(path):
    """50 directories of 20 files, 1 to 15 KiB, as a small source tree has."""
    with tarfile.open(path, "w") as archive:
        for d in range(50):
            for f in range(20):
                size = 1024 + (d * 20 + f) * 7919 % 14336
                info = tarfile.TarInfo(f"tree/dir{d}/file{f}.txt")
                info.size = size
                archive.addfile(info, io.BytesIO(os.urandom(size)))


def fill(directory, files):
    for i in range(files):
        if i % 1000 == 0:
            below = os.path.join(directory, f"fill{i // 1000}")
            os.mkdir(below)
        write(os.path.join(below, f"f{i}"), os.urandom(4096))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("directory", nargs="?")
parser.add_argument("--files", type=int, default=500)
parser.add_argument("--tar")
parser.add_argument("--make-tar", metavar="FILE")
parser.add_argument("--fill", type=int, metavar="N")
args = parser.parse_args()
if args.make_tar:
    make_tar(args.make_tar)
elif not args.directory:
    parser.error("which directory?")
elif args.fill:
    fill(args.directory, args.fill)
else:
    json.dump(run(args.directory, args.files, args.tar), sys.stdout)
