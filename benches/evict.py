#!/usr/bin/env python3
"""Takes files out of the page cache, so that the next read of them is a cold one.

    evict.py PATH...      files, or directories with all that is below

Unlike /proc/sys/vm/drop_caches it leaves alone whatever else the machine is doing. Dirty pages
are written out first, as they could not be dropped.
"""

import os
import stat
import sys


def evict(path):
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # gone meanwhile, or a socket
        return
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


for root in sys.argv[1:]:
    evict(root)
    for directory, _, names in os.walk(root):
        for name in names:
            evict(os.path.join(directory, name))
