"""Random operations with O_DIRECT, and through the page cache beside it, against a model in memory.

    direct.py FILE SEED OPERATIONS
"""

import ctypes
import mmap
import os
import random
import sys

path, seed, operations = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
BLOCK, BLOCKS = 4096, 160
libc = ctypes.CDLL(None, use_errno=True)
chance = random.Random(seed)
model = bytearray()
direct = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o666)
plain = os.open(path, os.O_RDWR)
# An anonymous mapping is aligned as O_DIRECT wants it.
memory = mmap.mmap(-1, BLOCK * BLOCKS)
log = []


def grow(size):
    if size > len(model):
        model.extend(bytes(size - len(model)))


def expect(found, start, length, what):
    wanted = bytes(model[start:start + length])
    if bytes(found) != wanted:
        at = next((n for n, (a, b) in enumerate(zip(found, wanted)) if a != b), min(len(found), len(wanted)))
        sys.exit(f"seed {seed}: {what} of {length} at {start}: {len(found)} bytes, {len(wanted)} wanted, other at {start + at}; last operations:\n" + "\n".join(log[-20:]))


for step in range(operations):
    kind = chance.choices(["direct write", "direct read", "write", "read", "truncate", "punch", "sync", "mapped read"], [30, 30, 15, 15, 4, 4, 1, 5])[0]
    first = chance.randrange(BLOCKS)
    blocks = min(chance.choice([1, 1, 2, 5, 32]), BLOCKS - first)
    start, length = first * BLOCK, blocks * BLOCK
    if not kind.startswith("direct"):
        start += chance.randrange(BLOCK)
        length = chance.randrange(1, length + 1)
    log.append(f"{step} {kind} {start} {length}")
    if kind.endswith("write"):
        bytes_ = chance.randbytes(length)
        if kind == "direct write":
            memory[:length] = bytes_
            written = os.pwritev(direct, [memoryview(memory)[:length]], start)
        else:
            written = os.pwrite(plain, bytes_, start)
        if written != length:
            sys.exit(f"seed {seed}: step {step}: {written} of {length} bytes written")
        grow(start + length)
        model[start:start + length] = bytes_
    elif kind == "direct read":
        read = os.preadv(direct, [memoryview(memory)[:length]], start)
        expect(memory[:read], start, length, kind)
    elif kind == "read":
        expect(os.pread(plain, length, start), start, length, kind)
    elif kind == "mapped read" and len(model) > 0:
        with mmap.mmap(plain, len(model), prot=mmap.PROT_READ) as pages:
            expect(pages[start:start + length], start, length, kind)
    elif kind == "truncate":
        os.ftruncate(plain, start)
        del model[start:]
        grow(start)
    elif kind == "punch":
        if libc.fallocate(plain, 3, ctypes.c_long(start), ctypes.c_long(length)) != 0:
            sys.exit(f"seed {seed}: step {step}: punch: {os.strerror(ctypes.get_errno())}")
        end = min(start + length, len(model))
        if start < end:
            model[start:end] = bytes(end - start)
    elif kind == "sync":
        os.fsync(direct)
    if os.fstat(direct).st_size != len(model):
        sys.exit(f"seed {seed}: step {step}: {os.fstat(direct).st_size} bytes long, {len(model)} wanted; last operations:\n" + "\n".join(log[-20:]))
os.close(direct)
os.close(plain)
with open(path, "rb") as file:
    expect(file.read(), 0, len(model), "last read")
