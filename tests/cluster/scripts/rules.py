"""What POSIX and Linux say about files, asked of the file system of one directory.

    rules.py DIR    prints {rule: answers} as JSON

Each rule does its operations in an empty directory, in a process of its own, and returns what it saw: values and errno names.
Whoever runs it compares the answers of two file systems, so a rule says nothing about which answer is right.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import resource
import shutil
import stat
import struct
import subprocess
import sys
import time

A, B, OTHER = 60001, 60002, 60099
RULES = []
libc = ctypes.CDLL(None, use_errno=True)


def rule(function):
    RULES.append(function)
    return function


def attempt(function, *args, **kwargs):
    """The value, or the name of the errno."""
    try:
        value = function(*args, **kwargs)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    return value.decode("latin-1") if isinstance(value, bytes) else value


def in_child(function):
    """Runs it in a process of its own and returns what it returned."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            answer = function()
        except BaseException as error:  # the parent must hear of everything
            answer = f"raised {error!r}"
        with os.fdopen(write, "w") as out:
            json.dump(answer, out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        answer = json.load(said)
    os.waitpid(child, 0)
    return answer


def as_user(uid, function, groups=(), gid=None):
    def drop():
        os.setgroups(list(groups))
        os.setgid(uid if gid is None else gid)
        os.setuid(uid)
        return function()

    return in_child(drop)


def make(path, mode=0o644, owner=0, group=None, content=b"content\n"):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, content)
    os.close(fd)
    os.chown(path, owner, owner if group is None else group)
    os.chmod(path, mode)
    return path


def make_dir(path, mode=0o755, owner=0, group=None):
    os.mkdir(path)
    os.chown(path, owner, owner if group is None else group)
    os.chmod(path, mode)
    return path


def opened(path, flags=os.O_RDONLY, mode=0o666):
    """Opens and closes."""
    os.close(os.open(path, flags, mode))
    return "ok"


def done(function, *args, **kwargs):
    function(*args, **kwargs)
    return "ok"


def mode_of(path):
    return oct(os.lstat(path).st_mode)


def who(path):
    found = os.lstat(path)
    return [found.st_uid, found.st_gid, oct(found.st_mode)]


def write_at(path, data=b"x", offset=0, flags=0):
    fd = os.open(path, os.O_WRONLY | flags)
    try:
        return os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def fallocate(path, mode, offset, length):
    fd = os.open(path, os.O_RDWR)
    try:
        if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)) != 0:
            raise OSError(ctypes.get_errno(), "fallocate")
    finally:
        os.close(fd)
    return "ok"


def renameat2(old, new, flags):
    if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")
    return "ok"


def copy_range(source, target):
    read, write = os.open(source, os.O_RDONLY), os.open(target, os.O_WRONLY)
    try:
        return os.copy_file_range(read, write, 4)
    finally:
        os.close(read)
        os.close(write)


def map_store(path):
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, 4) as pages:
        pages[0] = 65
        pages.flush()
    os.close(fd)
    return "ok"


# The ways to change a file that concern setuid, setgid and capabilities.
CHANGES = {
    "write": lambda path: write_at(path),
    "write nothing": lambda path: write_at(path, b""),
    "append": lambda path: write_at(path, flags=os.O_APPEND),
    "truncate": lambda path: done(os.truncate, path, 2),
    "truncate to the same size": lambda path: done(os.truncate, path, os.stat(path).st_size),
    "open with O_TRUNC": lambda path: opened(path, os.O_WRONLY | os.O_TRUNC),
    "allocate": lambda path: fallocate(path, 0, 0, 100),
    "punch": lambda path: fallocate(path, 3, 0, 4),
    "copy_file_range": lambda path: copy_range("source", path),
    "mmap": map_store,
    "chmod": lambda path: done(os.chmod, path, 0o6711),
    "chown nobody": lambda path: done(os.chown, path, -1, -1),
    "chgrp own": lambda path: done(os.chown, path, -1, os.stat(path).st_gid),
    "link": lambda path: done(os.link, path, path + "-link"),
    "utime": lambda path: done(os.utime, path),
    "setxattr": lambda path: done(os.setxattr, path, "user.x", b"1"),
    "direct write": lambda path: write_direct(path),
}


def write_direct(path):
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 4096)
    try:
        return os.pwritev(fd, [buffer], 0)
    finally:
        os.close(fd)


def change_each(modes, user):
    seen = {}
    make("source", 0o644)
    for what, change in CHANGES.items():
        for mode in modes:
            path = make(f"{what} {mode:o}", mode, A)
            answer = attempt(change, path) if user is None else as_user(user, lambda: attempt(change, path))
            seen[path] = [answer, mode_of(path)]
    return seen


@rule
def setuid_and_setgid_go_when_the_owner_changes_the_file():
    return change_each([0o6777, 0o4755, 0o2755, 0o2745, 0o6644], A)


@rule
def setuid_and_setgid_go_when_somebody_else_changes_the_file():
    return change_each([0o6777, 0o2767], B)


@rule
def setuid_and_setgid_when_root_changes_the_file():
    seen = change_each([0o6777, 0o2745], None)
    for mode in [0o6777, 0o2745, 0o4711]:
        path = make(f"chown {mode:o}", mode, A)
        os.chown(path, B, B)
        directory = make_dir(f"chown dir {mode:o}", mode, A)
        os.chown(directory, B, B)
        seen[path] = [mode_of(path), mode_of(directory)]
    return seen


CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)


@rule
def a_capability_goes_when_the_file_changes():
    seen = {}
    make("source", 0o644)
    changes = CHANGES | {"chown": lambda path: done(os.chown, path, B, B)}
    for what, change in changes.items():
        for user in [None, A]:
            path = make(f"{what} by {user}", 0o755, A)
            os.setxattr(path, "security.capability", CAPABILITY)
            answer = attempt(change, path) if user is None else as_user(user, lambda: attempt(change, path))
            seen[path] = [answer, "security.capability" in os.listxattr(path)]
    path = make("by-user", 0o755, A)
    seen["set by a user"] = as_user(A, lambda: attempt(os.setxattr, path, "security.capability", CAPABILITY))
    return seen


@rule
def chown_and_chmod_ask_who_you_are():
    seen = {}
    cases = {
        "give away": lambda path: done(os.chown, path, B, -1),
        "to a group of mine": lambda path: done(os.chown, path, -1, OTHER),
        "to a group not mine": lambda path: done(os.chown, path, -1, B),
        "chmod": lambda path: done(os.chmod, path, 0o600),
        "chmod g+s of a group not mine": lambda path: done(os.chmod, path, 0o2755),
        "utime now": lambda path: done(os.utime, path),
        "utime then": lambda path: done(os.utime, path, (1, 1)),
    }
    for what, change in cases.items():
        for owner, group, mode in [(A, A, 0o644), (A, B, 0o644), (B, B, 0o666), (B, B, 0o644)]:
            path = make(f"{what} {owner} {group} {mode:o}", mode, owner, group)
            seen[path] = [as_user(A, lambda: attempt(change, path), groups=[OTHER]), who(path)]
    return seen


@rule
def a_setgid_directory_hands_its_group_down():
    seen = {}
    for mode in [0o2777, 0o777]:
        top = make_dir(f"d{mode:o}", mode, 0, B)
        for user, groups in [(A, []), (A, [B]), (0, [])]:
            def fill():
                os.umask(0)
                prefix = f"{top}/{user}-{len(groups)}-"
                os.mkdir(prefix + "dir", 0o2755)
                os.close(os.open(prefix + "file", os.O_CREAT | os.O_WRONLY, 0o2775))
                os.close(os.open(prefix + "plain", os.O_CREAT | os.O_WRONLY, 0o2765))
                os.symlink("x", prefix + "symlink")
                os.mkfifo(prefix + "fifo", 0o2775)
                return "ok"
            as_user(user, fill, groups)
        for name in sorted(os.listdir(top)):
            seen[f"{top}/{name}"] = who(f"{top}/{name}")
    return seen


def acl(*entries):
    """(tag, permissions, id): 1 owner, 2 user, 4 group of the file, 8 group, 16 mask, 32 others."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", t, p, i) for t, p, i in entries)


NONE = 0xFFFFFFFF
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def acl_of(path, name=ACCESS):
    value = attempt(os.getxattr, path, name)
    return value if len(value) < 12 else value.encode("latin-1").hex()


@rule
def an_acl_decides_who_may():
    seen = {}
    value = acl((1, 6, NONE), (2, 6, A), (4, 0, NONE), (8, 4, OTHER), (16, 7, NONE), (32, 0, NONE))
    for mask in [7, 6, 4, 2, 0]:
        path = make(f"f{mask}", 0o600, 0)
        seen[f"set {mask}"] = attempt(os.setxattr, path, ACCESS, value[:-16] + struct.pack("<HHI", 16, mask, NONE) + value[-8:])
        for user, groups in [(A, []), (B, []), (B, [OTHER]), (A, [OTHER])]:
            for flags in [os.O_RDONLY, os.O_WRONLY, os.O_RDWR]:
                key = f"mask {mask} user {user} groups {groups} flags {flags}"
                seen[key] = as_user(user, lambda: attempt(opened, path, flags), groups)
        seen[f"mode {mask}"] = mode_of(path)
    return seen


@rule
def chmod_and_the_mask_are_one():
    seen = {}
    value = acl((1, 7, NONE), (2, 6, A), (4, 5, NONE), (16, 7, NONE), (32, 1, NONE))
    for mode in [0o777, 0o750, 0o700, 0o604, 0o2775]:
        path = make(f"f{mode:o}", 0o644)
        os.setxattr(path, ACCESS, value)
        before = mode_of(path)
        os.chmod(path, mode)
        seen[path] = [before, mode_of(path), acl_of(path)]
        os.removexattr(path, ACCESS)
        seen[path + " removed"] = [mode_of(path), acl_of(path)]
    # Without named entries it is no ACL, only a mode.
    path = make("minimal", 0o600)
    os.setxattr(path, ACCESS, acl((1, 6, NONE), (4, 4, NONE), (32, 4, NONE)))
    seen["minimal"] = [mode_of(path), acl_of(path)]
    return seen


@rule
def a_default_acl_is_inherited_and_the_umask_is_not():
    seen = {}
    top = make_dir("top", 0o777)
    os.setxattr(top, DEFAULT, acl((1, 7, NONE), (2, 7, A), (4, 5, NONE), (16, 7, NONE), (32, 5, NONE)))
    plain = make_dir("plain", 0o777)
    os.setxattr(plain, DEFAULT, acl((1, 7, NONE), (4, 5, NONE), (32, 0, NONE)))
    os.umask(0o077)
    for parent in [top, plain]:
        os.mkdir(f"{parent}/dir", 0o775)
        os.close(os.open(f"{parent}/file", os.O_CREAT | os.O_WRONLY, 0o664))
        os.mknod(f"{parent}/node", stat.S_IFREG | 0o666)
        os.mkfifo(f"{parent}/fifo", 0o640)
        os.symlink("x", f"{parent}/symlink")
        os.mkdir(f"{parent}/dir/below", 0o777)
        for name in ["dir", "file", "node", "fifo", "dir/below"]:
            path = f"{parent}/{name}"
            seen[path] = [mode_of(path), acl_of(path), acl_of(path, DEFAULT)]
    os.mkdir("no default", 0o777)
    seen["umask"] = mode_of("no default")
    return seen


@rule
def what_is_no_acl_is_refused():
    path, directory = make("f", 0o644, A, B), make_dir("d", 0o755, A)
    good = acl((1, 7, NONE), (2, 6, A), (4, 5, NONE), (16, 7, NONE), (32, 1, NONE))
    seen = {
        "default of a file": attempt(os.setxattr, path, DEFAULT, good),
        "no mask": attempt(os.setxattr, path, ACCESS, acl((1, 7, NONE), (2, 6, A), (4, 5, NONE), (32, 1, NONE))),
        "no owner": attempt(os.setxattr, path, ACCESS, acl((4, 5, NONE), (32, 1, NONE))),
        "twice": attempt(os.setxattr, path, ACCESS, good + good[4:]),
        "version": attempt(os.setxattr, path, ACCESS, b"\1" + good[1:]),
        "cut": attempt(os.setxattr, path, ACCESS, good[:-3]),
        "permissions": attempt(os.setxattr, path, ACCESS, acl((1, 15, NONE), (4, 5, NONE), (32, 1, NONE))),
        "not the owner": as_user(B, lambda: attempt(os.setxattr, path, ACCESS, good)),
        "default not the owner": as_user(B, lambda: attempt(os.setxattr, directory, DEFAULT, good)),
        "remove what is not there": [attempt(lambda: done(os.removexattr, p, name)) for p in [path, directory] for name in [ACCESS, DEFAULT]],
    }
    os.chmod(path, 0o2755)
    seen["sets it without the group"] = [as_user(A, lambda: attempt(os.setxattr, path, ACCESS, good)), mode_of(path)]
    return seen


@rule
def in_a_sticky_directory_only_owners_delete():
    seen = {}
    for mode, owner in [(0o1777, 0), (0o1777, A), (0o777, 0)]:
        top = make_dir(f"d{mode:o}-{owner}", mode, owner)
        for what in ["unlink", "rmdir", "rename away", "rename over", "rename within"]:
            for user in [A, B, 0]:
                path = f"{top}/{what}-{user}"
                make_dir(path, 0o777, A) if what == "rmdir" else make(path, 0o666, A)
                away = make_dir(path.replace("/", "-") + "-away", 0o777)
                other = make(path + "-other", 0o666, user)
                change = {
                    "unlink": lambda: os.unlink(path),
                    "rmdir": lambda: os.rmdir(path),
                    "rename away": lambda: os.rename(path, away + "/x"),
                    "rename over": lambda: os.rename(other, path),
                    "rename within": lambda: os.rename(path, path + "-new"),
                }[what]
                seen[path] = as_user(user, lambda: attempt(lambda: done(change)))
    return seen


@rule
def supplementary_groups_count():
    seen = {}
    for mode in [0o060, 0o040, 0o010, 0o606, 0o006]:
        path = make(f"f{mode:o}", mode, 0, OTHER)
        directory = make_dir(f"d{mode:o}", mode | (0o10 if mode & 0o60 else 0), 0, OTHER)
        for groups in [[], [OTHER], [B, OTHER], list(range(61000, 61040)) + [OTHER]]:
            seen[f"{path} {len(groups)}"] = as_user(A, lambda: [
                attempt(opened, path, os.O_RDONLY), attempt(opened, path, os.O_WRONLY), os.access(path, os.R_OK),
                attempt(lambda: sorted(os.listdir(directory))), attempt(opened, f"{directory}/x", os.O_CREAT | os.O_WRONLY),
            ], groups)
            if os.path.exists(f"{directory}/x"):
                os.unlink(f"{directory}/x")
    return seen


@rule
def directories_ask_for_search_and_write():
    seen = {}
    for mode in range(8):
        top = make_dir(f"d{mode}", 0o777)
        make(f"{top}/file", 0o666, A)
        os.chmod(top, mode)
        seen[top] = as_user(A, lambda: [
            attempt(lambda: sorted(os.listdir(top))), attempt(lambda: mode_of(f"{top}/file")), attempt(opened, f"{top}/file"),
            attempt(opened, f"{top}/new", os.O_CREAT | os.O_WRONLY), attempt(opened, f"{top}/file", os.O_CREAT | os.O_WRONLY),
            attempt(opened, f"{top}/none"), attempt(lambda: done(os.unlink, f"{top}/file")), attempt(lambda: done(os.chdir, top)),
        ])
    return seen


@rule
def root_may_all_but_run_what_nobody_may_run():
    seen = {}
    for mode in [0o000, 0o644, 0o100, 0o001]:
        path = make(f"f{mode:o}", mode, A, content=b"#!/bin/sh\nexit 7\n")
        seen[path] = [attempt(opened, path, os.O_RDWR), os.access(path, os.X_OK), attempt(lambda: subprocess.call([os.path.abspath(path)]))]
    return seen


def times_moved(path, change):
    """Which of mtime and ctime a change moves, and the answer."""
    before = os.lstat(path)
    # A step of the clock that stamps files: nobody is waited for.
    time.sleep(0.012)
    answer = attempt(change)
    after = os.lstat(path)
    return [answer, after.st_mtime_ns > before.st_mtime_ns, after.st_ctime_ns > before.st_ctime_ns, after.st_nlink]


@rule
def changes_in_a_directory_move_its_times():
    make("other-file")
    make_dir("other")
    make("other/file")
    make_dir("top")
    make("top/f")
    make_dir("top/full")
    make("top/full/x")
    steps = [
        ("create", lambda: opened("top/a", os.O_CREAT | os.O_WRONLY)),
        ("open what is there with O_CREAT", lambda: opened("top/a", os.O_CREAT | os.O_WRONLY)),
        ("create what is there", lambda: opened("top/a", os.O_CREAT | os.O_EXCL)),
        ("write below", lambda: write_at("top/a")),
        ("chmod below", lambda: done(os.chmod, "top/a", 0o600)),
        ("mkdir", lambda: done(os.mkdir, "top/d")),
        ("mkdir again", lambda: done(os.mkdir, "top/d")),
        ("symlink", lambda: done(os.symlink, "x", "top/s")),
        ("link", lambda: done(os.link, "top/a", "top/b")),
        ("mkfifo", lambda: done(os.mkfifo, "top/p")),
        ("rename within", lambda: done(os.rename, "top/a", "top/c")),
        ("rename to the same file", lambda: done(os.rename, "top/c", "top/b")),
        ("rename over", lambda: done(os.rename, "top/f", "top/s")),
        ("rename in", lambda: done(os.rename, "other-file", "top/in")),
        ("rename out", lambda: done(os.rename, "top/in", "out")),
        ("directory in", lambda: done(os.rename, "other", "top/other")),
        ("directory out", lambda: done(os.rename, "top/other", "other")),
        ("exchange with a directory", lambda: renameat2("top/b", "other", 2)),
        ("refuse to replace", lambda: renameat2("top/c", "top/d", 1)),
        ("rmdir of a full one", lambda: done(os.rmdir, "top/full")),
        ("rmdir", lambda: done(os.rmdir, "top/d")),
        ("unlink", lambda: done(os.unlink, "top/c")),
        ("unlink nothing", lambda: done(os.unlink, "top/c")),
        ("list", lambda: sorted(os.listdir("top"))),
        ("setxattr", lambda: done(os.setxattr, "top", "user.x", b"1")),
    ]
    return {what: times_moved("top", change) for what, change in steps}


@rule
def a_moved_directory_has_its_times_moved_or_not():
    for name in ["a", "b", "a/child"]:
        make_dir(name)
    seen = {}
    before = os.lstat("a/child")
    for what, path in [("source", "a"), ("target", "b")]:
        os.path.exists("b/child") and os.rename("b/child", "a/child")
        seen[what] = times_moved(path, lambda: done(os.rename, "a/child", "b/child"))
    seen["mtime of the child"] = os.lstat("b/child").st_mtime_ns == before.st_mtime_ns
    return seen


@rule
def changes_of_a_file_move_its_times():
    path = make("f", 0o644)
    fd = os.open(path, os.O_RDWR)
    steps = [
        ("read", lambda: os.pread(fd, 10, 0)),
        ("write", lambda: os.pwrite(fd, b"x", 0)),
        ("write nothing", lambda: os.pwrite(fd, b"", 0)),
        ("ftruncate", lambda: done(os.ftruncate, fd, 3)),
        ("ftruncate to the same size", lambda: done(os.ftruncate, fd, 3)),
        ("truncate to the same size", lambda: done(os.truncate, path, 3)),
        ("truncate longer", lambda: done(os.truncate, path, 30)),
        ("open with O_TRUNC", lambda: opened(path, os.O_WRONLY | os.O_TRUNC)),
        ("open with O_TRUNC again", lambda: opened(path, os.O_WRONLY | os.O_TRUNC)),
        ("chmod", lambda: done(os.chmod, path, 0o600)),
        ("chmod to the same", lambda: done(os.chmod, path, 0o600)),
        ("chown to the same", lambda: done(os.chown, path, 0, 0)),
        ("chown nobody", lambda: done(os.chown, path, -1, -1)),
        ("link", lambda: done(os.link, path, "g")),
        ("unlink", lambda: done(os.unlink, "g")),
        ("rename", lambda: done(os.rename, path, "h")),
        ("rename back", lambda: done(os.rename, "h", path)),
        ("setxattr", lambda: done(os.setxattr, path, "user.x", b"1")),
        ("removexattr", lambda: done(os.removexattr, path, "user.x")),
        ("utime", lambda: done(os.utime, path, ns=(5, 5))),
        ("allocate longer", lambda: fallocate(path, 0, 0, 100)),
        ("allocate within", lambda: fallocate(path, 0, 0, 10)),
        ("allocate beyond", lambda: fallocate(path, 1, 1000, 10)),
        ("punch", lambda: fallocate(path, 3, 0, 10)),
        ("fsync", lambda: done(os.fsync, fd)),
    ]
    seen = {}
    for what, change in steps:
        at = "h" if os.path.exists("h") else path
        if what.startswith("rename"):
            # The name changes under the question.
            before = os.fstat(fd)
            time.sleep(0.012)
            change()
            after = os.fstat(fd)
            seen[what] = [after.st_mtime_ns > before.st_mtime_ns, after.st_ctime_ns > before.st_ctime_ns]
        else:
            seen[what] = times_moved(at, change)
    return seen


@rule
def times_are_exact():
    seen = {}
    path = make("f")
    os.symlink("f", "s")
    second = 10**9
    for then in [0, 1, -1, -second, -second - 1, -(2**31 - 1) * second, (2**31 - 1) * second + 999999999, 2**31 * second, (2**32 + 5) * second + 7, 15000000000 * second]:
        os.utime(path, ns=(then, then + 3))
        os.utime("s", ns=(then + 1, then + 2), follow_symlinks=False)
        found, link = os.stat(path), os.lstat("s")
        seen[then] = [found.st_atime_ns, found.st_mtime_ns, link.st_atime_ns, link.st_mtime_ns]
    return seen


@rule
def opening_follows_what_it_should():
    make("file")
    make_dir("dir")
    os.symlink("file", "to-file")
    os.symlink("dir", "to-dir")
    os.symlink("nothing", "dangling")
    os.symlink("loop-b", "loop-a")
    os.symlink("loop-a", "loop-b")
    os.symlink("itself", "itself")
    os.mkfifo("fifo")
    os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod("no-device", stat.S_IFCHR | 0o666, os.makedev(250, 250))
    os.mknod("socket", stat.S_IFSOCK | 0o666)
    for n in range(45):
        os.symlink(f"chain{n - 1}" if n else "file", f"chain{n}")
    names = ["file", "dir", "to-file", "to-dir", "dangling", "loop-a", "itself", "fifo", "null", "no-device", "socket", "none",
             "chain39", "chain40", "file/", "to-file/", "dir/", "to-dir/", "file/below", "dangling/below", "loop-a/x", "none/", "dir/."]
    nonblocking = os.O_NONBLOCK
    flags = {
        "read": os.O_RDONLY, "write": os.O_WRONLY, "nofollow": os.O_NOFOLLOW, "directory": os.O_DIRECTORY,
        "directory nofollow": os.O_DIRECTORY | os.O_NOFOLLOW, "create exclusively": os.O_CREAT | os.O_EXCL | os.O_RDWR,
        "path": os.O_PATH, "path nofollow": os.O_PATH | os.O_NOFOLLOW, "append and truncate": os.O_RDWR | os.O_APPEND | os.O_TRUNC,
        "create a directory": os.O_CREAT | os.O_DIRECTORY, "direct": os.O_DIRECT, "noatime": os.O_NOATIME,
        "write a directory": os.O_DIRECTORY | os.O_WRONLY,
    }
    seen = {}
    for name in names:
        for what, flag in flags.items():
            seen[f"{what} {name}"] = attempt(opened, name, flag | nonblocking)
        seen[f"calls {name}"] = [
            attempt(lambda: mode_of(name)), attempt(lambda: oct(os.stat(name).st_mode)), attempt(os.readlink, name),
            attempt(lambda: done(os.truncate, name, 1)), attempt(lambda: done(os.chdir, name) and done(os.fchdir, top)),
        ]
        os.fchdir(top)
    seen["create through a link"] = [attempt(opened, "dangling", os.O_CREAT | os.O_WRONLY), os.path.exists("nothing")]
    seen["noatime of somebody else's"] = as_user(A, lambda: attempt(opened, "file", os.O_NOATIME))
    return seen


@rule
def names_are_at_most_255_bytes():
    seen = {}
    make("file")
    make_dir("dir")
    for what, name in [("255", b"n" * 255), ("256", b"n" * 256), ("255 of two", "é".encode() * 127 + b"x"), ("256 of two", "é".encode() * 128), ("path", b"d/" * 2040 + b"x" * 14), ("long path", b"d/" * 2047 + b"xx")]:
        seen[what] = [
            attempt(lambda: mode_of(name)), attempt(opened, name, os.O_CREAT | os.O_WRONLY), attempt(lambda: done(os.unlink, name)),
            attempt(lambda: done(os.mkdir, name)), attempt(lambda: done(os.rmdir, name)), attempt(lambda: done(os.symlink, "x", name)),
            attempt(os.readlink, name), attempt(lambda: done(os.unlink, name)), attempt(lambda: done(os.link, "file", name)),
            attempt(lambda: done(os.rename, name, b"back")), attempt(lambda: done(os.rename, "back", name)),
            attempt(lambda: done(os.mkfifo, name)), attempt(lambda: done(os.unlink, name)), attempt(opened, name),
        ]
    for length in [1, 1000, 4000, 4095, 4096]:
        seen[f"symlink {length}"] = [attempt(lambda: done(os.symlink, "t" * length, f"s{length}")), attempt(lambda: len(os.readlink(f"s{length}"))), attempt(lambda: os.lstat(f"s{length}").st_size)]
    seen["empty"] = [attempt(lambda: done(os.symlink, "", "e")), attempt(lambda: done(os.mkdir, "")), attempt(lambda: mode_of(""))]
    return seen


@rule
def names_are_any_bytes():
    wanted = set()
    for byte in range(1, 256):
        for name in [bytes([byte]), b"a" + bytes([byte]) + b"b"]:
            if b"/" in name or name in (b".", b".."):
                continue
            wanted.add(name)
    for name in wanted:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    seen = {"list": set(os.listdir(b".")) == wanted, "count": len(wanted)}
    seen["stat"] = all(stat.S_ISREG(os.lstat(name).st_mode) for name in wanted)
    # Names that other file systems hold for the same.
    for name in ["Name", "name", "NAME", "é", "e\u0301", "ſ", "s"]:
        make("u-" + name, content=name.encode())
    seen["each its own"] = [open("u-" + name, "rb").read().decode() == name for name in ["Name", "name", "NAME", "é", "e\u0301", "ſ", "s"]]
    for name in wanted:
        os.unlink(name)
    seen["left"] = len(os.listdir(b"."))
    return seen


@rule
def a_running_program_is_not_written():
    program = os.path.abspath("program")
    shutil.copy("/bin/cat", program)
    running = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    running.stdin.write(b"x")
    running.stdin.flush()
    running.stdout.read(1)
    seen = {
        "write": attempt(opened, program, os.O_WRONLY),
        "truncate": attempt(lambda: done(os.truncate, program, 1)),
        "open with O_TRUNC": attempt(opened, program, os.O_WRONLY | os.O_TRUNC),
        "read": attempt(opened, program),
        "chmod": attempt(lambda: done(os.chmod, program, 0o700)),
        "rename": attempt(lambda: done(os.rename, program, program + "2")),
        "unlink": attempt(lambda: done(os.unlink, program + "2")),
    }
    running.stdin.close()
    seen["ends"] = running.wait()
    shutil.copy("/bin/true", program)
    seen["run"] = attempt(lambda: subprocess.call([program]))
    fd = os.open(program, os.O_WRONLY)
    seen["run while open for writing"] = attempt(lambda: subprocess.call([program]))
    os.close(fd)
    seen["run again"] = attempt(lambda: subprocess.call([program]))
    return seen


@rule
def a_file_has_an_end():
    path = make("f")
    fd = os.open(path, os.O_RDWR)
    seen = {
        "write past the largest": attempt(os.pwrite, fd, b"x", 2**44),
        "write at the end of numbers": attempt(os.pwrite, fd, b"x", 2**63 - 1),
        "grow too much": attempt(lambda: done(os.ftruncate, fd, 2**61)),
        "allocate too much": attempt(lambda: fallocate(path, 0, 2**61, 10)),
        "negative": attempt(lambda: done(os.ftruncate, fd, -1)),
        "seek before the start": attempt(os.lseek, fd, -1, os.SEEK_SET),
        "seek data past the end": attempt(os.lseek, fd, 100, os.SEEK_DATA),
        "seek a hole past the end": attempt(os.lseek, fd, 100, os.SEEK_HOLE),
        "read past the end": attempt(os.pread, fd, 10, 2**40),
        "size": os.fstat(fd).st_size,
    }

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return [
            attempt(os.pwrite, fd, b"x" * 100, 950), attempt(os.pwrite, fd, b"x", 1000), attempt(lambda: done(os.ftruncate, fd, 1001)),
            attempt(lambda: done(os.ftruncate, fd, 1000)), attempt(lambda: fallocate(path, 0, 0, 2000)), os.fstat(fd).st_size,
        ]

    seen["limit"] = in_child(limited)
    return seen


@rule
def renaming_links_and_removing_say_why_not():
    def tree():
        for name in ["d1", "full"]:
            make_dir(name)
        for name in ["f1", "full/x"]:
            make(name, content=name.encode())
        os.link("f1", "f1-link")
        os.symlink("f1", "s")

    names = ["d1", "full", "f1", "f1-link", "s", "none", "full/x", "d1/new", "full/new", "f1/x", "none/x", ".", "full/.."]
    seen, rounds = {}, 0
    os.mkdir("0")
    os.chdir("0")
    tree()
    for old in names:
        for new in names:
            for flags in [0, 1, 2]:
                answer = attempt(renameat2, old, new, flags)
                seen[f"rename {old} {new} {flags}"] = answer
                if answer == "ok":
                    found = sorted(os.path.relpath(os.path.join(p, n), ".") for p, d, f in os.walk(".") for n in d + f)
                    seen[f"rename {old} {new} {flags}"] = " ".join(found)
                    rounds += 1
                    os.chdir("..")
                    os.mkdir(str(rounds))
                    os.chdir(str(rounds))
                    tree()
    seen["flags"] = [attempt(renameat2, "f1", "s", 3), attempt(renameat2, "f1", "s", 64)]
    for name in names:
        seen[f"rmdir {name}"] = attempt(lambda: done(os.rmdir, name))
        seen[f"unlink {name}"] = attempt(lambda: done(os.unlink, name)) if name != "f1" else "not tried"
        seen[f"link {name}"] = attempt(lambda: done(os.link, name, "new", follow_symlinks=False))
        seen[f"link f1 {name}"] = attempt(lambda: done(os.link, "f1", name))
        seen[f"mkdir {name}"] = attempt(lambda: done(os.mkdir, name))
    return seen


@rule
def descriptors_keep_what_they_were_opened_for():
    path = make("f", content=b"0123456789")
    read, write, append = os.open(path, os.O_RDONLY), os.open(path, os.O_WRONLY), os.open(path, os.O_RDWR | os.O_APPEND)
    directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    seen = {
        "write for reading": attempt(os.write, read, b"x"),
        "read for writing": attempt(os.read, write, 1),
        "truncate for reading": attempt(lambda: done(os.ftruncate, read, 1)),
        "read a directory": attempt(os.read, directory, 1),
        "sync for reading": attempt(lambda: done(os.fsync, read)),
        "sync a directory": attempt(lambda: done(os.fsync, directory)),
        "pwrite of an appender": [attempt(os.pwrite, append, b"AB", 0), open(path, "rb").read().decode()],
        "write of an appender": [os.lseek(append, 0, os.SEEK_SET), attempt(os.write, append, b"C"), os.lseek(append, 0, os.SEEK_CUR)],
    }
    os.chmod(path, 0)
    os.unlink(path)
    seen["after it is gone"] = [attempt(os.pread, read, 20, 0), attempt(os.pwrite, write, b"z", 1), attempt(os.pread, read, 3, 0), os.fstat(read).st_nlink]
    seen["named again"] = attempt(lambda: done(os.link, f"/proc/self/fd/{read}", "again"))
    make_dir("gone")
    gone = os.open("gone", os.O_RDONLY)
    os.rmdir("gone")
    seen["in a directory that is gone"] = [
        attempt(lambda: os.listdir(gone)), attempt(lambda: done(os.mkdir, "x", dir_fd=gone)),
        attempt(lambda: os.close(os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=gone))), os.fstat(gone).st_nlink,
        attempt(lambda: mode_of(f"/proc/self/fd/{gone}/..")),
    ]
    return seen


@rule
def extended_attributes_say_why_not():
    make("f", 0o644, A)
    make_dir("d", 0o1777)
    os.symlink("f", "s")
    os.mkfifo("p")
    seen = {}
    for name in ["f", "d", "s", "p"]:
        for attribute in ["user.x", "trusted.x", "security.x", "system.x", "unknown.x", "x", "user.", "user." + "n" * 250, "user." + "n" * 251]:
            for user in [0, A, B]:
                seen[f"{name} {attribute[:20]} {len(attribute)} {user}"] = as_user(user, lambda: [
                    attempt(os.getxattr, name, attribute, follow_symlinks=False),
                    attempt(lambda: done(os.setxattr, name, attribute, b"v", os.XATTR_REPLACE, follow_symlinks=False)),
                    attempt(lambda: done(os.setxattr, name, attribute, b"v", os.XATTR_CREATE, follow_symlinks=False)),
                    attempt(lambda: done(os.setxattr, name, attribute, b"w", os.XATTR_CREATE, follow_symlinks=False)),
                    attempt(lambda: done(os.setxattr, name, attribute, b"", follow_symlinks=False)),
                    attempt(os.getxattr, name, attribute, follow_symlinks=False),
                    sorted(n for n in os.listxattr(name, follow_symlinks=False) if not n.startswith("security.selinux")),
                    attempt(lambda: done(os.removexattr, name, attribute, follow_symlinks=False)),
                    attempt(lambda: done(os.removexattr, name, attribute, follow_symlinks=False)),
                ])
    return seen


@rule
def only_root_makes_devices():
    return {
        str(user): as_user(user, lambda: [
            attempt(lambda: done(os.mknod, f"c{user}", stat.S_IFCHR | 0o600, os.makedev(1, 3))),
            attempt(lambda: done(os.mknod, f"b{user}", stat.S_IFBLK | 0o600, os.makedev(7, 99))),
            attempt(lambda: done(os.mknod, f"p{user}", stat.S_IFIFO | 0o600)),
            attempt(lambda: done(os.mknod, f"s{user}", stat.S_IFSOCK | 0o600)),
            attempt(lambda: done(os.mknod, f"f{user}", stat.S_IFREG | 0o6777)),
            attempt(lambda: done(os.mknod, f"d{user}", stat.S_IFDIR | 0o777)),
            sorted([name, mode_of(name), os.lstat(name).st_rdev] for name in os.listdir(".") if name.endswith(str(user))),
        ])
        for user in [0, A]
    }


@rule
def locks_of_one_machine_exclude():
    path = make("f", 0o666)
    fd = os.open(path, os.O_RDWR)

    def probe():
        other = os.open(path, os.O_RDWR)
        return [
            attempt(lambda: done(fcntl.lockf, other, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0)),
            attempt(lambda: done(fcntl.lockf, other, fcntl.LOCK_SH | fcntl.LOCK_NB, 10, 0)),
            attempt(lambda: done(fcntl.lockf, other, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 10)),
        ]

    fcntl.lockf(fd, fcntl.LOCK_EX, 10, 0)
    exclusive = in_child(probe)
    fcntl.lockf(fd, fcntl.LOCK_SH, 5, 0)
    shared = in_child(probe)
    os.close(os.open(path, os.O_RDONLY))
    closed = in_child(probe)
    read = os.open(path, os.O_RDONLY)
    write = os.open(path, os.O_WRONLY)
    return {
        "exclusive": exclusive, "shared": shared, "another descriptor closed": closed,
        "exclusive on one for reading": attempt(lambda: done(fcntl.lockf, read, fcntl.LOCK_EX | fcntl.LOCK_NB)),
        "shared on one for writing": attempt(lambda: done(fcntl.lockf, write, fcntl.LOCK_SH | fcntl.LOCK_NB)),
    }


base = sys.argv[1]
os.makedirs(base, exist_ok=True)
os.chmod(base, 0o777)
os.umask(0o022)
answers = {}
for function in RULES:
    place = os.path.join(base, function.__name__)
    os.mkdir(place)
    os.chmod(place, 0o777)

    def run():
        global top
        os.chdir(place)
        top = os.open(".", os.O_RDONLY)
        return function()

    answers[function.__name__] = in_child(run)
json.dump(answers, sys.stdout, sort_keys=True)
