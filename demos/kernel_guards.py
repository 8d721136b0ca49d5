"""What the operating system refuses a process for good, without root: resource limits, Landlock, seccomp.

Each function restricts the calling process and all that it starts, cannot be taken back, and returns whether the
whole of it is in force: every mechanism is optional. ``jail.py`` calls them before it runs foreign code. Numbers come
from the kernel's headers (linux/landlock.h, linux/seccomp.h, linux/filter.h, linux/audit.h, asm/unistd.h).
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import sys
from collections.abc import Iterable, Sequence
from typing import Any

if sys.platform != "win32":
    import resource

_DESCRIPTORS = 32  # open files; with the limit on one file it also bounds files that were deleted but are still open
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_M_ARENA_MAX = -8


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int, pointer: Any = None) -> bool:
    return bool(_libc().prctl(option, ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)) == 0)


# ---------------------------------------------------------------------------------------------------- limits


def limit(memory: int, seconds: int, file: int) -> bool:
    """Bound address space (bytes), CPU time, one file (bytes) and open files; no core dump, no root powers.

    On Linux all of it holds. macOS takes the numbers but does not enforce the address space: see ``jail.watch_memory``.
    """
    if sys.platform == "win32":
        return False
    wanted = {"AS": memory, "DATA": memory, "FSIZE": file, "NOFILE": _DESCRIPTORS, "CORE": 0, "MSGQUEUE": 0}
    held = [_lower(name, value, value) for name, value in wanted.items()]
    held.append(_lower("CPU", seconds, seconds + 1))  # SIGXCPU, then SIGKILL
    if sys.platform == "linux":
        held.append(_drop_privileges())
        _one_arena()
    return all(held)


def forbid_processes() -> None:
    """No process can be started: for where seccomp is missing. Root is exempt, and on Linux threads count too."""
    if sys.platform != "win32":
        _lower("NPROC", 0, 0)


def die_with_parent() -> None:
    """Be killed when the thread that started this process ends, however it ends (Linux)."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _lower(name: str, soft: int, hard: int) -> bool:
    """Lower one limit, unless it is lower already; a limit that this system does not have holds by default."""
    which = getattr(resource, f"RLIMIT_{name}", None)
    if which is None:
        return True
    most = resource.getrlimit(which)[1]
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    try:
        resource.setrlimit(which, (soft, hard))
    except (OSError, ValueError):
        return False
    return True


def _drop_privileges() -> bool:
    """Give up every capability: root could raise its limits again."""
    if not _prctl(_PR_SET_NO_NEW_PRIVS, 1):
        return False
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    return bool(_libc().capset(header, (ctypes.c_uint32 * 6)()) == 0)


def _one_arena() -> None:
    """Keep glibc from reserving 64 MiB of addresses for every thread, which the limit would count."""
    if hasattr(_libc(), "mallopt"):
        _libc().mallopt(_M_ARENA_MAX, 1)


# -------------------------------------------------------------------------------------------------- Landlock

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_FILE_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15}  # how many bits of access to files are known; 16 since 5
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_BLOCK, _TRUNCATE, _IOCTL_DEV = 1 << 6, 1 << 11, 1 << 14, 1 << 15
_TCP = 0b11  # bind and connect, since ABI 4
_SCOPES = 0b11  # abstract unix sockets and signals beyond this process, since ABI 6
_TRUNCATE_ABI, _TCP_ABI, _SCOPE_ABI = 3, 4, 6


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def landlock_abi() -> int:
    """The version of Landlock that this kernel has in force; 0 without it."""
    if sys.platform != "linux":
        return 0
    return max(0, int(_libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def landlock(folder: str, readable: Iterable[str]) -> bool:
    """Read below ``readable``, read and write below ``folder`` and in the null device, execute nothing, touch no more.

    What Landlock does not know, seccomp refuses: modes, owners, times and attributes of files, and sockets but TCP.
    """
    abi = landlock_abi()
    if not abi or not _prctl(_PR_SET_NO_NEW_PRIVS, 1):
        return False
    every = (1 << _FILE_RIGHTS_BY_ABI.get(abi, 16)) - 1
    rules = _Ruleset(every, _TCP if abi >= _TCP_ABI else 0, _SCOPES if abi >= _SCOPE_ABI else 0)
    size = 24 if abi >= _SCOPE_ABI else 16 if abi >= _TCP_ABI else 8
    libc = _libc()
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    folder_rights = every & ~(_EXECUTE | _MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV)
    null_rights = every & (_READ_FILE | _WRITE_FILE | _TRUNCATE)
    wanted = [(folder, folder_rights), (os.devnull, null_rights)]
    wanted += [(path, _READ_FILE | _READ_DIR) for path in readable]
    try:
        held = all(_allow(ruleset, path, rights) for path, rights in wanted)
        return held and libc.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)) == 0
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> bool:
    """Add one rule for a path and all below it; a path that is not there needs none."""
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        if not stat.S_ISDIR(os.fstat(parent).st_mode):
            rights &= ~_READ_DIR  # refused for what is no folder
        rule = _PathBeneath(rights, parent)
        return bool(_libc().syscall(_ADD_RULE, ruleset, 1, ctypes.byref(rule), ctypes.c_uint32(0)) == 0)
    finally:
        os.close(parent)


# --------------------------------------------------------------------------------------------------- seccomp

Instruction = tuple[int, int, int, int]  # opcode, jump if true, jump if false, constant

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_*, column of the table
_X32 = 0x40000000  # the third ABI of x86_64: the same calls by other numbers
_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000  # the latter + errno
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_DENIED, _ABSENT = (_RETURN, 0, 0, _REFUSE | errno.EPERM), (_RETURN, 0, 0, _REFUSE | errno.ENOSYS)
_ALL = 0xFFFFFFFF
_CLONE3 = 435
_CLONE_THREAD = 0x10000
_AF_UNIX = _SOCK_STREAM = 1

# Calls allowed whatever their arguments; by number on x86_64 and aarch64, None where there is no such call. All others
# are refused: what is not here cannot reach another process, the network, or memory that no limit counts, and neither
# can a call that a later kernel brings. Landlock says which files they reach.
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # files and folders, not their modes, owners, times and attributes: Landlock does not guard them
    "read": (0, 63), "write": (1, 64), "open": (2, None), "openat": (257, 56), "creat": (85, None), "close": (3, 57),
    "close_range": (436, 436), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79),
    "statx": (332, 291), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "lseek": (8, 62),
    "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "preadv": (295, 69),
    "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287), "sendfile": (40, 71),
    "copy_file_range": (326, 285), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None),
    "pipe2": (293, 59), "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83), "fadvise64": (221, 223),
    "ftruncate": (77, 46), "getdents": (78, None), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "link": (86, None), "linkat": (265, 37), "unlink": (87, None),
    "unlinkat": (263, 35), "symlink": (88, None), "symlinkat": (266, 36), "readlink": (89, None),
    "readlinkat": (267, 78), "umask": (95, 166), "statfs": (137, 43), "fstatfs": (138, 44), "getxattr": (191, 8),
    "lgetxattr": (192, 9), "fgetxattr": (193, 10), "listxattr": (194, 11), "llistxattr": (195, 12),
    "flistxattr": (196, 13),
    # memory and threads of this process
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "msync": (26, 227), "mincore": (27, 232), "madvise": (28, 233), "mseal": (462, 462), "futex": (202, 98),
    "set_tid_address": (218, 96), "set_robust_list": (273, 99), "rseq": (334, 293), "membarrier": (324, 283),
    "sched_yield": (24, 124), "arch_prctl": (158, None), "gettid": (186, 178), "getcpu": (309, 168), "exit": (60, 93),
    "exit_group": (231, 94), "restart_syscall": (219, 128),
    # its signals and its waiting
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "pause": (34, None),
    "wait4": (61, 260), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None),
    "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441), "eventfd": (284, None), "eventfd2": (290, 19),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "alarm": (37, None), "getitimer": (36, 102),
    "setitimer": (38, 103), "timerfd_create": (283, 85), "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87),
    # ends of a stream socketpair, which has no address; not sendmsg, which hides open files in transit
    "sendto": (44, 206), "recvfrom": (45, 207), "shutdown": (48, 210), "getsockname": (51, 204),
    "getpeername": (52, 205), "setsockopt": (54, 208), "getsockopt": (55, 209),
    # what it may know
    "getpid": (39, 172), "getppid": (110, 173), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156),
    "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "getpriority": (140, 141), "getrlimit": (97, 163),
    "getrusage": (98, 165), "sched_getaffinity": (204, 123), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126), "uname": (63, 160), "sysinfo": (99, 179), "times": (100, 153),
    "time": (201, None), "gettimeofday": (96, 169), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "getrandom": (318, 278),
}  # fmt: skip
_NEWEST = 470  # calls from here on are unknown to this table: ENOSYS makes the C library fall back on older ones

# Calls allowed for these values of one argument: name → numbers, index of the argument, values.
_CHOICES: dict[str, tuple[tuple[int, int], int, tuple[int, ...]]] = {
    # copies and flags of descriptors, locks; not F_SETOWN and F_SETSIG, which send signals to other processes
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIOCLEX, FIONCLEX, FIONBIO; not FIOASYNC, not the attributes of files
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5451, 0x5450, 0x5421)),
    # PR_SET_NAME, PR_GET_NAME, PR_SET_VMA; not PR_SET_PDEATHSIG, not PR_SET_DUMPABLE
    "prctl": ((157, 167), 0, (15, 16, 0x53564D41)),
    "fallocate": ((285, 47), 1, (0,)),  # FALLOC_FL_KEEP_SIZE passes the limit on the size of a file
}


def filter_program(machine: str, pid: int) -> list[Instruction] | None:
    """The BPF program that allows what Python needs, for the process ``pid``; None for an unknown machine.

    What it does not know is refused with EPERM, what is newer than it with ENOSYS.

    A call through another architecture's door kills the process: its numbers mean other calls.
    """
    if machine not in _ARCHITECTURES:
        return None
    audit, column = _ARCHITECTURES[machine]
    program: list[Instruction] = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL)]
    program += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    program += [(_AT_LEAST, 0, 1, _NEWEST), _ABSENT]
    for numbers in _ALLOWED.values():
        if (number := numbers[column]) is not None:
            program += _block(number, [(_RETURN, 0, 0, _ALLOW)])
    for pair, index, values in _CHOICES.values():
        program += _block(pair[column], _one_of(index, values))
    program += _block(_CLONE3, [_ABSENT])  # its flags are out of sight: use clone
    own = (0, _ALL, pid)
    program += _block((56, 220)[column], _only((0, _CLONE_THREAD, _CLONE_THREAD)))  # clone: threads, no processes
    program += _block((62, 129)[column], _only(own))  # kill
    program += _block((234, 131)[column], _only(own))  # tgkill
    program += _block((53, 199)[column], _only((0, _ALL, _AF_UNIX), (1, 0xF, _SOCK_STREAM)))  # socketpair: asyncio's
    program += _block((302, 261)[column], _only((0, _ALL, 0), (2, _ALL, 0), (2.5, _ALL, 0)))  # prlimit64: reads its own
    return [*program, _DENIED]


def seccomp() -> bool:
    """Put the filter on this process and its later threads; it must have one thread."""
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return False
    program = filter_program(os.uname().machine, os.getpid())
    if program is None or not _prctl(_PR_SET_NO_NEW_PRIVS, 1):
        return False
    instructions = (_Instruction * len(program))(*(_Instruction(*instruction) for instruction in program))
    return _prctl(_PR_SET_SECCOMP, 2, ctypes.byref(_Program(len(program), instructions)))  # 2: SECCOMP_MODE_FILTER


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def _block(number: int, body: Sequence[Instruction]) -> list[Instruction]:
    """``body``, which returns, when the call has this number; else what follows."""
    return [(_EQUAL, 0, len(body), number), *body]


def _only(*tests: tuple[float, int, int]) -> list[Instruction]:
    """Allow when every argument fits ``(index, mask, value)``, else EPERM. An index and a half is its upper word."""
    body: list[Instruction] = []
    for left, (index, mask, value) in zip(reversed(range(len(tests))), tests, strict=True):
        body += [(_LOAD, 0, 0, 16 + int(8 * index)), (_AND, 0, 0, mask), (_EQUAL, 0, 3 * left + 1, value)]
    return [*body, (_RETURN, 0, 0, _ALLOW), _DENIED]


def _one_of(index: int, values: Sequence[int]) -> list[Instruction]:
    """Allow when the lower word of an argument is one of these values, else EPERM."""
    tests = [(_EQUAL, len(values) - at, 0, value) for at, value in enumerate(values)]
    return [(_LOAD, 0, 0, 16 + 8 * index), *tests, _DENIED, (_RETURN, 0, 0, _ALLOW)]
