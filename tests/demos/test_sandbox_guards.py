"""Each guard of the demos' sandbox by itself: which attack it stops, and that the attack is one without it."""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support import kernel_guards
from support.patient_sandbox import run
from support.sandbox import GUARDS, Outcome

ALONE = ("landlock", "seccomp", "audit")
CLONE_THREAD = 0x10000
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS


@dataclass(frozen=True)
class Attack:
    """Code that raises nothing when it gets through, and which guards stop it alone: name → first version that does."""

    name: str
    code: str
    stopped_by: dict[str, int] = field(default_factory=lambda: {"landlock": 1, "audit": 0})


EVERY = {"landlock": 1, "seccomp": 0, "audit": 0}
CALLS = {"seccomp": 0, "audit": 0}
SECCOMP = {"seccomp": 0}
LIBC = "import ctypes\nlibc = ctypes.CDLL(None)\n"
FORK = "pid = os.fork()\nif pid == 0:\n    os._exit(0)\nos.waitpid(pid, 0)"
# The grandchild leaves by itself soon, for the run that lets it through.
GRANDCHILD = """
pid = os.fork()
if pid == 0:
    os.setsid()
    if os.fork() == 0:
        import time
        time.sleep(0.1)
    os._exit(0)
os.waitpid(pid, 0)
"""
UP = """
os.makedirs("far/down")
start = os.open("far/down", os.O_RDONLY)
os.chdir("far")
os.remove("../" * 20 + outside + "/kept", dir_fd=start)
"""
CONNECT = """
import socket
end = socket.socket()
try:
    end.connect(("127.0.0.1", 9))
except ConnectionRefusedError:
    pass
"""
ATTACKS = (
    Attack("open", "open(outside + '/new', 'w').write('x')"),
    Attack("os.open", "os.open(outside + '/new', os.O_CREAT | os.O_WRONLY)"),
    Attack("append", "open(outside + '/kept', 'ab').write(b'x')"),
    Attack("pathlib", "import pathlib\npathlib.Path(outside, 'new').write_text('x')"),
    Attack("dotted", "open(os.path.relpath(outside) + '/new', 'w').write('x')"),
    Attack("bytes name", "open(os.fsencode(outside) + b'/new', 'w').write('x')"),
    Attack("link to a folder", "os.symlink(outside, 'a')\nopen('a/new', 'w').write('x')"),
    Attack("link to a file", "os.symlink(outside + '/kept', 'b')\nopen('b', 'w').write('x')"),
    Attack("shutil", "import shutil\nopen('c', 'w').close()\nshutil.copyfile('c', outside + '/new')"),
    Attack("rename", "open('d', 'w').close()\nos.rename('d', outside + '/new')"),
    Attack("rename away", "os.rename(outside + '/kept', 'e')"),
    Attack("hard link", "open('f', 'w').close()\nos.link('f', outside + '/new')"),
    Attack("hard link in", "os.link(outside + '/kept', 'g')"),
    Attack("chdir first", "os.chdir(outside)\nopen('new', 'w').write('x')"),
    Attack("descriptor", "fd = os.open(outside, os.O_RDONLY)\nos.open('new', os.O_CREAT | os.O_WRONLY, dir_fd=fd)"),
    Attack("mkdir", "os.mkdir(outside + '/new')"),
    Attack("remove through a descriptor", "os.remove('kept', dir_fd=os.open(outside, os.O_RDONLY))"),
    Attack("remove up from a descriptor", UP),
    Attack("remove", "os.remove(outside + '/kept')"),
    Attack("truncate", "os.truncate(outside + '/kept', 0)", {"landlock": 3, "seccomp": 0, "audit": 0}),
    Attack("chmod", "os.chmod(outside + '/kept', 0o777)", CALLS),
    Attack("utime", "os.utime(outside + '/kept', (0, 0))", CALLS),
    Attack("sqlite", "import sqlite3\nsqlite3.connect(outside + '/new').execute('create table t (a)')"),
    Attack("read", "open(outside + '/kept').read()"),
    Attack("list", "os.listdir(outside)"),
    Attack("libc open", LIBC + "assert libc.open(os.fsencode(outside) + b'/new', 0o101, 0o600) >= 0"),
    Attack("environment", "open(f'/proc/{os.getppid()}/environ', 'rb').read()"),
    Attack("socket", "import socket\nsocket.socket()", CALLS),
    Attack("bind", "import socket\nsocket.socket().bind(('127.0.0.1', 0))", {"landlock": 4, "seccomp": 0, "audit": 0}),
    Attack("connect", CONNECT, {"landlock": 4, "seccomp": 0, "audit": 0}),
    Attack("datagram", "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))", CALLS),
    Attack("unix socket", "import socket\nsocket.socket(socket.AF_UNIX).bind('h')", CALLS),
    Attack("datagram pair", "import socket\nsocket.socketpair(type=socket.SOCK_DGRAM)", {"seccomp": 0}),
    Attack("libc socket", LIBC + "assert libc.socket(2, 1, 0) >= 0", CALLS),
    Attack("fork", FORK, CALLS),
    Attack("grandchild", GRANDCHILD, CALLS),
    Attack("libc fork", LIBC + "pid = libc.fork()\nif pid == 0:\n    libc._exit(0)\nassert pid > 0", CALLS),
    Attack("subprocess", "import subprocess\nsubprocess.run([sys.executable, '-V'], check=True)", EVERY),
    Attack("shell", "assert os.system('true') == 0", EVERY),
    Attack("spawn", "os.waitpid(os.posix_spawn(sys.executable, [sys.executable, '-V'], {}), 0)", EVERY),
    Attack("kill the parent", "os.kill(os.getppid(), 0)", {"landlock": 6, "seccomp": 0, "audit": 0}),
    Attack("kill all", "os.kill(-1, 0)", CALLS),
    Attack("limits", "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))", CALLS),
    Attack("shared memory", LIBC + "i = libc.shmget(0, 4096, 0o1600)\nassert i >= 0\nlibc.shmctl(i, 0, None)", CALLS),
    Attack("cores of the parent", "os.sched_setaffinity(os.getppid(), os.sched_getaffinity(os.getppid()))", SECCOMP),
    Attack("priority of the parent", "os.setpriority(os.PRIO_PROCESS, os.getppid(), 0)", SECCOMP),
    Attack("priority of the user", "os.setpriority(os.PRIO_USER, os.getuid(), 0)", SECCOMP),
    Attack("scheduler", "os.sched_setscheduler(os.getppid(), os.SCHED_OTHER, os.sched_param(0))", SECCOMP),
    Attack("limits of the parent", "import resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CORE)", CALLS),
    Attack("signals by a descriptor", "import fcntl\nfcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())", SECCOMP),
    Attack("outlive the parent", LIBC + "assert libc.prctl(1, 0) == 0", CALLS),
    Attack("space beyond the end", LIBC + "assert libc.fallocate(os.open('i', 0o102), 1, 0, 4096) == 0", CALLS),
    Attack("hidden file", "os.memfd_create('x')", SECCOMP),
)
PROGRAM = """
import json, os, sys
home, told = os.getcwd(), {}
for name, code in ATTACKS.items():
    os.chdir(home)
    try:
        exec(code, {"os": os, "sys": sys, "outside": OUTSIDE + "/" + name})
        told[name] = "through"
    except Exception as error:
        told[name] = f"{type(error).__name__}: {error}"
print("told", json.dumps(told))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the attacks use Linux's /proc and libc")


@dataclass(frozen=True)
class Raid:
    """What became of every attack under some guards, and of the files that it was to leave alone."""

    outcome: Outcome
    told: dict[str, str]
    outside: Path

    def stopped(self, attack: Attack) -> bool:
        """Whether it was told so, and its part of the outside is as it was."""
        folder = self.outside / attack.name
        kept = folder / "kept"
        if self.told[attack.name] == "through" or [*folder.iterdir()] != [kept]:
            return False
        status = kept.stat()
        return kept.read_text() == "kept" and status.st_mode & 0o777 == 0o640 and status.st_mtime > 1


@pytest.fixture(scope="module")
def raids(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Raid]:
    """All attacks, one after the other in one process, under no guard, each alone and all together."""
    made = {}
    for guards in ((), *((guard,) for guard in ALONE), GUARDS):
        outside = tmp_path_factory.mktemp("outside")
        for attack in ATTACKS:
            (outside / attack.name).mkdir()
            (outside / attack.name / "kept").write_text("kept")
            (outside / attack.name / "kept").chmod(0o640)
        codes = {attack.name: attack.code for attack in ATTACKS}
        outcome = run(f"ATTACKS, OUTSIDE = {codes!r}, {str(outside)!r}\n{PROGRAM}", guards=guards)
        last = next(line for line in outcome.text.splitlines() if line.startswith("told "))
        made[guards] = Raid(outcome, json.loads(last.removeprefix("told ")), outside)
    return made


def stops(attack: Attack, guard: str) -> bool:
    """Whether this guard alone is to stop the attack, with the Landlock of this kernel."""
    return guard in attack.stopped_by and (
        guard != "landlock" or kernel_guards.landlock_abi() >= attack.stopped_by[guard]
    )


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_without_a_guard_the_attack_gets_through(raids: dict[tuple[str, ...], Raid], attack: Attack) -> None:
    """Every attack is one: with nothing in its way it does what it is to do."""
    assert raids[()].outcome.guards == ()
    assert raids[()].told[attack.name] == "through"


@pytest.mark.parametrize("guard", ALONE)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_each_guard_stops_its_attacks_alone(raids: dict[tuple[str, ...], Raid], guard: str, attack: Attack) -> None:
    """A guard stops what the table says, and nothing else: the table is what it does."""
    raid = raids[guard,]
    if raid.outcome.guards != (guard,):
        pytest.skip(f"{guard} is not available here")
    if guard == "landlock" and guard in attack.stopped_by and not stops(attack, guard):
        pytest.skip(f"Landlock {kernel_guards.landlock_abi()} does not know this; {attack.stopped_by[guard]} does")

    assert raid.stopped(attack) is stops(attack, guard), raid.told[attack.name]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_all_guards_stop_every_attack_they_can(raids: dict[tuple[str, ...], Raid], attack: Attack) -> None:
    """Under the guards that this machine has, every attack is stopped that one of them stops; the code goes on."""
    raid = raids[GUARDS]
    if not any(stops(attack, guard) for guard in raid.outcome.guards if guard in ALONE):
        pytest.skip(f"{raid.outcome.guards} do not stop this")

    assert raid.outcome.passed
    assert raid.stopped(attack), raid.told[attack.name]


def test_a_limit_cannot_be_raised_again() -> None:
    """Whoever runs it, root too, the hard limits hold."""
    code = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)"
    outcome = run(code, guards=("limits",))

    assert outcome.guards == ("limits",)
    assert not outcome.passed
    assert "exceed maximum limit" in outcome.text or "not allowed" in outcome.text


def test_what_honest_code_needs_is_left(tmp_path: Path) -> None:
    """Threads, an event loop, its own folder, temporary files, a signal to itself and the library all work."""
    code = """
import asyncio, os, pathlib, random, shutil, signal, sqlite3, ssl, tempfile, threading, zoneinfo
asyncio.run(asyncio.sleep(0))
thread = threading.Thread(target=pathlib.Path("a").write_text, args=("x",))
thread.start()
thread.join()
os.makedirs("b/c")
shutil.copyfile("a", "b/c/d")
os.rename("b/c/d", "e")
shutil.rmtree("b")
with tempfile.TemporaryDirectory() as folder, open(folder + "/f", "w") as file:
    assert folder.startswith(os.getcwd())
sqlite3.connect("g").execute("create table t (a)")
signal.signal(signal.SIGUSR1, lambda *_: print("signalled"))
signal.raise_signal(signal.SIGUSR1)
print(sorted(os.listdir()), file=open(os.devnull, "w"))
print(sorted(os.listdir()), random.SystemRandom().random() < 1)
"""
    outcome = run(code)

    assert outcome.text == "signalled\n['a', 'e', 'g'] True\n"
    assert outcome.passed


# ------------------------------------------------------------------------------------------ the seccomp program


def verdict(program: list[tuple[int, int, int, int]], audit: int, number: int, *arguments: int) -> int:
    """What the kernel makes of a call: the few instructions of BPF that the program uses, one by one."""
    data = {0: number, 4: audit}
    for index in range(6):
        value = arguments[index] if index < len(arguments) else 0
        data |= {16 + 8 * index: value & 0xFFFFFFFF, 20 + 8 * index: value >> 32 & 0xFFFFFFFF}
    at, accumulator = 0, 0
    while True:
        code, if_true, if_false, constant = program[at]
        at += 1
        if code == 0x06:
            return constant
        if code == 0x20:
            accumulator = data[constant]
        elif code == 0x54:
            accumulator &= constant
        elif code == 0x15:
            at += if_true if accumulator == constant else if_false
        elif code == 0x35:
            at += if_true if accumulator >= constant else if_false
        else:
            pytest.fail(f"unknown instruction {code:#x}")


MACHINES = {  # socket, clone, clone3, kill, tgkill, socketpair, prlimit64, read, execve
    "x86_64": (0xC000003E, (41, 56, 435, 62, 234, 53, 302, 0, 59)),
    "aarch64": (0xC00000B7, (198, 220, 435, 129, 131, 199, 261, 63, 221)),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_says_what_it_is_to_say(machine: str) -> None:
    """On either architecture: nothing of another one, no sockets, no processes, signals to itself only."""
    audit, (socket, clone, clone3, kill, tgkill, pair, prlimit, read, execve) = MACHINES[machine]
    program = kernel_guards.filter_program(machine, pid=77)
    assert program is not None
    calls = [
        (ALLOW, read, ()),
        (EPERM, socket, (2, 1, 0)),
        (EPERM, execve, ()),
        (ENOSYS, clone3, ()),
        (ALLOW, clone, (CLONE_THREAD | 0x3D0F00,)),
        (EPERM, clone, (17,)),
        (ALLOW, kill, (77, 9)),
        (EPERM, kill, (1, 9)),
        (EPERM, kill, (0xFFFFFFFFFFFFFFFF, 9)),
        (ALLOW, tgkill, (77, 78, 6)),
        (EPERM, tgkill, (76, 78, 6)),
        (ALLOW, pair, (1, 1 | 0o2000000)),
        (EPERM, pair, (1, 2)),
        (EPERM, pair, (2, 1)),
        (ALLOW, prlimit, (0, 7, 0, 1)),
        (EPERM, prlimit, (0, 7, 8)),
        (EPERM, prlimit, (0, 7, 1 << 32)),
        (EPERM, prlimit, (5, 7, 0)),
        (KILL, read | 0x40000000, ()),
    ]
    for expected, number, arguments in calls:
        assert verdict(program, audit, number, *arguments) == expected, (number, arguments)
    assert verdict(program, 0x40000003, read) == KILL  # a 32-bit call


REACHING = {  # x86_64, aarch64: calls that reach other processes, or what no limit counts
    "sched_setaffinity": (203, 122), "setpriority": (141, 140), "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274), "sched_setparam": (142, 118), "ioprio_set": (251, 30), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    "pidfd_send_signal": (424, 424), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "tkill": (200, 130), "move_pages": (279, 239), "migrate_pages": (256, 238), "perf_event_open": (298, 241),
    "bpf": (321, 280), "keyctl": (250, 219), "add_key": (248, 217), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "sendmsg": (46, 211), "get_robust_list": (274, 100),
    "setns": (308, 268), "unshare": (272, 97), "memfd_create": (319, 279), "setpgid": (109, 154),
}  # fmt: skip


@pytest.mark.parametrize("column", range(2))
def test_no_call_that_reaches_others_is_allowed(column: int) -> None:
    """Scheduling, tracing and memory of other processes are refused for every argument; newer calls are not there."""
    machine = tuple(MACHINES)[column]
    program, audit = kernel_guards.filter_program(machine, pid=77), MACHINES[machine][0]
    assert program is not None
    told = {name: verdict(program, audit, numbers[column], 0, 77) for name, numbers in REACHING.items()}

    assert told == dict.fromkeys(REACHING, EPERM)
    assert verdict(program, audit, 999) == ENOSYS


@pytest.mark.parametrize(
    ("call", "index", "allowed", "refused"),
    [
        ((72, 25), 1, (1, 2, 4, 6, 1030), (8, 10, 15, 1026)),  # fcntl: not F_SETOWN, F_SETSIG, F_SETOWN_EX, F_NOTIFY
        ((16, 29), 1, (0x5401, 0x5413, 0x5421), (0x5412, 0x5452, 0x8901, 0x40086602)),  # ioctl: not TIOCSTI, FIOASYNC
        ((157, 167), 0, (15, 0x53564D41), (1, 4, 22)),  # prctl: not PR_SET_PDEATHSIG, PR_SET_DUMPABLE
        ((285, 47), 1, (0,), (1, 3)),  # fallocate: not FALLOC_FL_KEEP_SIZE
    ],
    ids=["fcntl", "ioctl", "prctl", "fallocate"],
)
def test_calls_of_many_uses_are_allowed_for_some(
    call: tuple[int, int], index: int, allowed: tuple[int, ...], refused: tuple[int, ...]
) -> None:
    """Of fcntl, ioctl, prctl and fallocate only what Python and its library need is allowed."""
    for number, (machine, (audit, _)) in zip(call, MACHINES.items(), strict=True):
        program = kernel_guards.filter_program(machine, pid=77)
        assert program is not None
        for value in (*allowed, *refused):
            told = verdict(program, audit, number, *[0] * index, value)
            assert told == (ALLOW if value in allowed else EPERM), (machine, value)


def test_an_unknown_machine_has_no_filter() -> None:
    """Where the numbers of the calls are not known, seccomp is not in force, and says so."""
    assert kernel_guards.filter_program("riscv64", 1) is None


def test_this_machine_has_what_its_kernel_offers() -> None:
    """With Landlock in the kernel and a known architecture, both walls stand in a plain run."""
    guards = run("").guards

    assert ("landlock" in guards) is (kernel_guards.landlock_abi() > 0)
    assert ("seccomp" in guards) is (os.uname().machine in MACHINES)
    assert "limits" in guards
    assert "audit" in guards
