"""What the sandbox counts from outside cannot be hidden from it: files on the move, removed files, threads."""

from __future__ import annotations

import sys

import pytest

from support import sandbox
from support.patient_sandbox import run
from support.waiting import LIMIT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the count needs Linux's waitid and /proc")

MOVING = """
import os, threading, time
fds = []
for level in range(14):
    os.mkdir('d'); fds.append(os.open('.', os.O_RDONLY)); os.chdir('d')
def churn(fds):
    while True:
        for fd in fds: os.rename('d', 'e', src_dir_fd=fd, dst_dir_fd=fd)
        for fd in fds: os.rename('e', 'd', src_dir_fd=fd, dst_dir_fd=fd)
for k in range(3): threading.Thread(target=churn, args=(fds[k::3],), daemon=True).start()
for n in range(3):
    with open(str(n), 'wb') as file: file.write(bytes(8 << 20))
time.sleep(1000)
"""
OPEN = """
import os, time
kept = []
for n in range(3):
    kept.append(open(str(n), 'wb')); kept[-1].write(bytes(8 << 20)); kept[-1].flush(); os.unlink(str(n))
time.sleep(1000)
"""
MAPPED = """
import ctypes, os, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
for n in range(3):
    fd = os.open(str(n), os.O_RDWR | os.O_CREAT); os.write(fd, bytes(8 << 20))
    libc.mmap(None, 4096, 1, 2, fd, 0); os.close(fd); os.unlink(str(n))
time.sleep(1000)
"""
THREADS = """
import threading
threading.stack_size(32768)
lock = threading.Lock()
lock.acquire()
while True: threading.Thread(target=lock.acquire, daemon=True).start()
"""


SPAWNING = "import subprocess, sys\nwhile True: subprocess.run(['/bin/true'])"


def test_a_process_that_cannot_stop_does_not_hold_up_the_watch() -> None:
    """A process in the middle of a vfork waits for its child, which was stopped with it: the run still ends in time."""
    outcome = run(SPAWNING, seconds=1, guards=())

    assert outcome.status == "timeout"
    assert outcome.seconds < LIMIT


@pytest.mark.parametrize(
    ("code", "guards"),
    [(MOVING, sandbox.GUARDS), (OPEN, sandbox.GUARDS), (MAPPED, ("limits", "landlock", "seccomp"))],
    ids=["moving", "open", "mapped"],
)
def test_no_file_is_hidden_from_the_count(code: str, guards: tuple[str, ...]) -> None:
    """Folders that keep being renamed, and removed files that are open or mapped, count towards the bound."""
    outcome = run(code, guards=guards)

    assert outcome.status == "disk", outcome.text


def test_threads_are_bounded() -> None:
    """Code that goes on starting threads is stopped, long before its time is over."""
    outcome = run(THREADS)

    assert outcome.status == "threads", outcome.text
    assert outcome.text == "[stopped: more than 64 threads at a time]\n"


def test_a_pool_of_threads_is_left_alone() -> None:
    """As many threads as Python's own pools start pass."""
    code = "from concurrent.futures import ThreadPoolExecutor as Pool\nimport time\nwith Pool(32) as pool:\n"
    outcome = run(code + "    print(sum(pool.map(lambda n: time.sleep(0.2) or n, range(40))))")

    assert outcome.text == "780\n"
    assert outcome.passed


def test_space_on_disk_counts_where_it_is_more_than_the_length() -> None:
    """A file without a length whose blocks were reserved counts with them, where no seccomp refuses that."""
    code = """
import ctypes, os, time
libc = ctypes.CDLL(None)
for n in range(3): assert libc.fallocate(os.open(str(n), 0o102), 1, ctypes.c_long(0), ctypes.c_long(8 << 20)) == 0
time.sleep(1000)
"""
    outcome = run(code, guards=("limits", "landlock"))

    assert outcome.status in {"disk", "failed"}  # failed: this file system has no fallocate
