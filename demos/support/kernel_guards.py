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
_ALL = 0xFFFFFFFF
_CLONE3 = 435
_CLONE_THREAD = 0x10000
_AF_UNIX = _SOCK_STREAM = 1

# Calls refused whatever their arguments; by number on x86_64 and aarch64, None where there is no such call.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # network: a stream socketpair has no address, so what is left of sockets reaches nobody
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "io_uring_setup": (425, 425),
    # processes: none is started, none is traced, none is reached
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "unshare": (272, 97), "setns": (308, 268),
    # memory that no limit counts, or that outlives the process
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # modes, owners, times and attributes of files: Landlock does not guard them
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "truncate": (76, 45),
    # the kernel itself, and this process's own limits
    "setrlimit": (160, 164), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
}  # fmt: skip


def filter_program(machine: str, pid: int) -> list[Instruction] | None:
    """The BPF program that refuses calls with EPERM, for the process ``pid``; None for an unknown machine.

    A call through another architecture's door kills the process: its numbers mean other calls.
    """
    if machine not in _ARCHITECTURES:
        return None
    audit, column = _ARCHITECTURES[machine]
    program: list[Instruction] = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL)]
    program += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    for numbers in _REFUSED.values():
        if (number := numbers[column]) is not None:
            program += _block(number, [(_RETURN, 0, 0, _REFUSE | errno.EPERM)])
    program += _block(_CLONE3, [(_RETURN, 0, 0, _REFUSE | errno.ENOSYS)])  # its flags are out of sight: use clone
    own = (0, _ALL, pid)
    program += _block((56, 220)[column], _only((0, _CLONE_THREAD, _CLONE_THREAD)))  # clone: threads, no processes
    program += _block((62, 129)[column], _only(own))  # kill
    program += _block((234, 131)[column], _only(own))  # tgkill
    program += _block((53, 199)[column], _only((0, _ALL, _AF_UNIX), (1, 0xF, _SOCK_STREAM)))  # socketpair: asyncio's
    program += _block((302, 261)[column], _only((0, _ALL, 0), (2, _ALL, 0), (2.5, _ALL, 0)))  # prlimit64: reads its own
    return [*program, (_RETURN, 0, 0, _ALLOW)]


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
    return [*body, (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE | errno.EPERM)]
