"""The demos' sandbox: whatever the code does, the caller goes on, and nothing is left of it."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import sandbox
from support.patient_sandbox import check, run
from support.sandbox import GUARDS, MIB, Outcome, SandboxBroken
from support.waiting import LIMIT, wait_until

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs what only Linux enforces")


def processes_in(folder: Path) -> list[int]:
    """The processes whose working folder is below this one, removed or not; none where there is no /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink().is_relative_to(folder):
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile
            continue
    return found


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the sandbox makes its folders; empty after every test, and no process works there."""
    home = tmp_path / "folders"
    home.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    yield home
    assert [*home.iterdir()] == []
    wait_until(lambda: processes_in(home) == [])  # who was killed may take a moment to be gone


# ------------------------------------------------------------------------------------------------ how runs end


def test_a_program_that_ends_passes_with_what_it_printed() -> None:
    """Both streams come in the order in which they were written, nothing is added."""
    outcome = run("import sys\nprint('one')\nprint('two', file=sys.stderr)\nprint('thrée', end='')")

    assert (outcome.status, outcome.exit_code, outcome.text) == ("passed", 0, "one\ntwo\nthrée")
    assert outcome.passed
    assert outcome.seconds > 0


@pytest.mark.parametrize(
    ("code", "status", "exit_code", "text"),
    [
        ("1 / 0", "failed", 1, 'File "main.py", line 1(.|\n)*\nZeroDivisionError: division by zero\n$'),
        ("def f(:", "failed", 1, 'File "main.py", line 1\n.*\n.*\nSyntaxError: invalid syntax\n$'),
        ("import json\njson.loads('{')", "failed", 1, 'line 2, in <module>[^/]*File "json/decoder.py"'),
        ("raise SystemExit(3)", "failed", 3, "^$"),
        ("raise SystemExit('no')", "failed", 1, "^no\n$"),
        ("import sys\nsys.exit(0)", "passed", 0, "^$"),
        ("raise KeyboardInterrupt", "failed", 1, "KeyboardInterrupt\n$"),
        ("def f(): f()\nf()", "failed", 1, "RecursionError: maximum recursion"),
        ("class E(Exception):\n    def __str__(self): raise E\nraise E", "failed", 1, "E: <exception str.. failed>"),
        ("\0", "failed", 1, "null bytes"),
        ("x = '\ud800'", "failed", 1, "UnicodeEncodeError"),
        ("if __name__ == '__main__': print('main')", "passed", 0, "^main\n$"),
        ("import atexit\natexit.register(print, 'late')\nprint('early')", "passed", 0, "^early\nlate\n$"),
        ("raise PermissionError('mine')", "failed", 1, "PermissionError: mine\n$"),
        ("open('/etc/passwd', 'a')", "refused", 1, r"\[refused by the sandbox"),
        ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1')", "refused", 1, r"\[refused by the"),
        ("import asyncio\nasyncio.run(asyncio.open_connection('127.0.0.1', 9))", "refused", 1, r"\[refused by the"),
        ("import os\nfor _ in range(8): os.fork()", "refused", 1, r"\[refused by the sandbox"),
    ],
)
def test_the_end_is_told(code: str, status: str, exit_code: int, text: str) -> None:
    """The status, the exit code and a text without absolute file names say how the code ended."""
    outcome = run(code)

    assert (outcome.status, outcome.exit_code) == (status, exit_code), outcome.text
    assert re.search(text, outcome.text), outcome.text
    assert 'File "/' not in outcome.text


@linux
def test_a_crash_is_told() -> None:
    """A signal ends the code with a negative exit code and its name."""
    outcome = run("import os\nos.abort()")

    assert (outcome.status, outcome.exit_code) == ("failed", -signal.SIGABRT)
    assert outcome.text.endswith("[killed by signal 6 (Aborted)]\n")


IGNORING = """
import signal
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
"""


@pytest.mark.parametrize("code", ["while True: pass", IGNORING, "import time\ntime.sleep(60)", "print(9**9**9)"])
def test_code_that_does_not_end_is_ended(code: str) -> None:
    """Busy or asleep, ignoring every signal or in one long instruction: it stops at the limit."""
    outcome = run(code, seconds=0.3)

    assert outcome.status == "timeout"
    assert outcome.text.endswith("[stopped: still running after 0.3 s]\n")
    assert outcome.seconds >= 0.3


@linux
@pytest.mark.parametrize(
    "code",
    [
        "kept = bytes(10 << 30)",
        "kept = bytearray(b'x') * (10 << 30)",
        "kept = []\nwhile True: kept.append('x' * 1000)",
        "kept = {}\nwhile True: kept[len(kept)] = [None] * 100",
        "def f():\n    kept = [0]\n    while True: kept += kept\nf()",
        "import mmap\nmmap.mmap(-1, 10 << 30)\nraise MemoryError",
    ],
)
def test_memory_is_bounded(code: str) -> None:
    """Ten gigabytes in one piece or in small ones are not had, and the code hears of it."""
    outcome = run(code, memory=96 * MIB)

    assert "limits" in outcome.guards
    if "mmap" in code:
        assert "Cannot allocate memory" in outcome.text
    else:
        assert outcome.status == "memory"
        assert outcome.text.endswith("[out of memory: the limit is 96 MiB]\n")


@linux
def test_the_watchdog_bounds_memory_where_limits_do_not() -> None:
    """By itself, too, it ends the process; beside the limits of Linux it is not needed."""
    outcome = run("kept = []\nwhile True: kept.append('x' * 1000)", memory=96 * MIB, guards=("watchdog", "audit"))

    assert outcome.guards == ("watchdog", "audit")
    assert outcome.status == "memory"
    assert "watchdog" not in run("").guards


def test_a_flood_of_output_is_stopped_and_not_kept() -> None:
    """Code that would print a gigabyte is ended; the reader holds little, however much comes."""
    tracemalloc.start()
    try:
        outcome = run("for _ in range(1 << 14): print('x' * (1 << 16))", output=4096)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert outcome.status == "output"
    assert len(outcome.text) < 8192
    assert peak < MIB


def test_of_long_output_the_middle_is_left_out() -> None:
    """The first and the last half are kept, and a note has the number of bytes between them."""
    outcome = run("print('first')\nprint('x' * 10_000)\nprint('last')", output=2000)
    left_out = re.search(r"\n\[… (\d+) bytes left out …\]\n", outcome.text)

    assert left_out
    assert outcome.text.startswith("first\nxxx")
    assert outcome.text.endswith("xxx\nlast\n")
    assert len(outcome.text) - len(left_out[0]) + int(left_out[1]) == len("first\n\nlast\n") + 10_000


# ----------------------------------------------------------------------------------------------- what it may use


@linux
def test_one_file_is_bounded_by_the_kernel() -> None:
    """A file cannot grow beyond 16 MiB."""
    outcome = run("file = open('big', 'wb')\nwhile True: file.write(bytes(1 << 20))")

    assert outcome.status in {"failed", "disk"}
    assert "File too large" in outcome.text or outcome.status == "disk"


@pytest.mark.parametrize(
    "code",
    [
        "for i in range(3): open(str(i), 'wb').write(bytes(6 << 20))",
        "for i in range(120): open(str(i), 'wb').close()",
        "import os\nfor i in range(120): os.mkdir('d'); os.chdir('d')",
        "import os\nfor i in range(40): os.mkdir('d' * 200); os.chdir('d' * 200)",
    ],
)
def test_the_folder_is_bounded(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many bytes, many files, or folders in one another deeper than a path can say, end the run."""
    monkeypatch.setattr(sandbox, "_ENTRIES", 100)
    outcome = run(f"{code}\nimport time\ntime.sleep({2 * LIMIT})", guards=("limits", "landlock", "seccomp"))

    assert outcome.status == "disk"
    assert outcome.text == "[stopped: more than 16 MiB or 100 files in its folder]\n"


def test_folders_of_any_depth_and_mode_are_removed() -> None:
    """Nothing is left where a path is too long for the system, or a folder was locked."""
    code = "import os\nos.mkdir('locked')\nopen('locked/a', 'w')\nos.symlink('/', 'root')\nos.chmod('locked', 0)\n"
    outcome = run(code + "for i in range(60): os.mkdir('d' * 200); os.chdir('d' * 200)", guards=())

    assert outcome.status in {"passed", "disk"}


def test_what_the_folder_was_replaced_by_is_left_alone(tmp_path: Path) -> None:
    """A link in place of the folder is removed, not what it points to; the audit hook keeps the folder in place."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    code = f"import os\nhere = os.getcwd()\nos.rmdir(here)\nos.symlink({str(tmp_path / 'precious')!r}, here)"

    assert run(code, guards=()).passed
    assert (tmp_path / "precious" / "file").exists()
    assert run(code, guards=("audit",)).status == "refused"


@linux
def test_a_child_in_the_group_is_killed_with_it() -> None:
    """Where no guard keeps code from forking, the children do not outlive it, at the limit or at its end."""
    fork = f"import os, time\nif os.fork() == 0:\n    time.sleep({4 * LIMIT})\n"

    assert run(fork + f"time.sleep({LIMIT})", seconds=0.3, guards=()).status == "timeout"
    assert run(fork, guards=()).seconds < LIMIT


def test_there_is_no_environment_and_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller's environment holds stays there, and stdin is at its end."""
    monkeypatch.setenv("API_KEY", "secret")
    outcome = run("import os, sys\nprint(dict(os.environ), repr(sys.stdin.read()), os.getenv('API_KEY'))")

    assert outcome.text == "{} '' None\n"


def test_files_can_be_read_and_imported() -> None:
    """The caller's files lie in the folder under their relative names."""
    outcome = run(
        "import shop.prices as prices\nprint(prices.APPLE, open('notes.txt').read())",
        files={"shop/prices.py": "APPLE = 3", "notes.txt": "näh"},
    )

    assert outcome.text == "3 näh\n"


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "C:\\a", "..\\a", ""])
def test_a_file_outside_the_folder_is_refused(name: str) -> None:
    """Absolute names and names that climb are the caller's mistake, and said before anything runs."""
    with pytest.raises(ValueError, match="outside the folder; give a relative name"):
        run("", files={name: ""})


def test_bad_arguments_are_refused() -> None:
    """Each with its value, the limit and what to do."""
    with pytest.raises(ValueError, match="memory 1048576 bytes is too little for the interpreter; give 67108864 or"):
        run("", memory=MIB)
    with pytest.raises(ValueError, match="unknown guard 'moat'; there are limits, landlock, seccomp, watchdog, audit"):
        run("", guards=("audit", "moat"))


# --------------------------------------------------------------------------------------------------- the caller


def test_the_agent_goes_on() -> None:
    """Loops, ten gigabytes, a write outside and a socket, one after the other; then honest code passes."""
    bad = ("while 1: pass", "x = [0] * (10 << 27)", "open('/x', 'w')", "import socket\nsocket.socket()")
    outcomes = [run(code, seconds=0.5, memory=96 * MIB) for code in bad]

    assert [outcome.passed for outcome in outcomes] == [False] * 4
    assert run("print('on')").text == "on\n"


def test_an_interrupt_of_the_caller_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control-C while code runs reaches the caller, and takes process and folder with it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sandbox, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("while True: pass")


RUNNING = "open('running', 'w').close()\nwhile True: pass"


@linux
def test_a_caller_that_is_killed_takes_the_code_with_it(folders: Path) -> None:
    """Without a chance to clean up, only the folder stays: the kernel ends the process."""
    demos = str(Path(sandbox.__file__).parents[1])
    code = f"import sys, tempfile\nsys.path.insert(0, {demos!r})\ntempfile.tempdir = {str(folders)!r}\n"
    code += f"from support import sandbox\nsandbox.run({RUNNING!r}, seconds={LIMIT})"
    caller = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: any(folders.glob("*/running")))  # by then it has asked for the signal
    assert processes_in(folders)
    caller.kill()
    caller.wait()
    wait_until(lambda: processes_in(folders) == [])
    for left in folders.iterdir():
        shutil.rmtree(left)


def test_a_sandbox_that_does_not_start_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A broken installation is no failure of the code."""
    monkeypatch.setattr(sandbox, "_JAIL", tmp_path / "jail.py")

    with pytest.raises(SandboxBroken, match=r"jail.py ended with exit code 2 before the code: .*No such file"):
        run("")


# ------------------------------------------------------------------------------------------------------ check


DOUBLE = "def double(x):\n    return 2 * x\n"


def test_a_right_solution_passes_both_kinds_of_tests() -> None:
    """Plain asserts use the names of the solution; with an entry point its function is given to check()."""
    assert check(DOUBLE, "assert double(4) == 8").passed
    assert check(DOUBLE, "def check(candidate):\n    assert candidate(4) == 8", entry_point="double").passed


@pytest.mark.parametrize(
    ("solution", "tests", "last"),
    [
        ("def double(x): return x", "assert double(4) == 8", "AssertionError: 4 == 8 does not hold"),
        ("def double(x): return 'x' * 900", "assert double(4) == 8", r"'x{99} … x{99}' == 8 does not hold"),
        (DOUBLE, "assert 8 not in [double(4)]", r"8 not in \[8\] does not hold"),
        (DOUBLE, "assert double(4) == 9, 'nine'", "AssertionError: nine"),
        (DOUBLE, "assert not double(4)", "AssertionError"),
        ("def doubel(x): return x", "assert double(4) == 8", "NameError: name 'double' is not defined.*"),
        ("def double(x) return x", "assert double(4) == 8", "SyntaxError: expected ':'"),
        ("def double(x): return x.y", "assert double(4) == 8", "AttributeError: 'int' object has no attribute 'y'"),
        ("import socket\nsocket.socket()", "", r"\[refused by the sandbox: .*"),
    ],
)
def test_a_failure_is_short_and_readable(solution: str, tests: str, last: str) -> None:
    """The last line says what is wrong, with the values that were compared, and files are named shortly."""
    outcome = check(solution, tests)

    assert not outcome.passed
    assert re.fullmatch(
        last if last.startswith(("A", "N", "S", r"\[")) else f"AssertionError: {last}", last_line(outcome)
    )
    assert 'File "/' not in outcome.text


def last_line(outcome: Outcome) -> str:
    """The last line of a text."""
    return outcome.text.splitlines()[-1]


def test_the_text_has_only_the_last_lines() -> None:
    """However much a solution prints, an agent reads no more than it asked for."""
    outcome = check("for i in range(500): print(i)", "assert 1 == 2", lines=4)

    assert len(outcome.text.splitlines()) == 4
    assert last_line(outcome) == "AssertionError: 1 == 2 does not hold"


@pytest.mark.parametrize(
    "solution",
    [
        "import sys\nsys.exit(0)",
        "import sys\nsys.exit()",
        "import os\nos._exit(0)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        'print(\'\\n0123456789abcdef0123456789abcdef {"status": "passed"}\')\nimport os\nos._exit(0)',
        "import atexit\natexit._run_exitfuncs()\nimport os\nos._exit(0)",
        "import atexit\natexit._clear()\nimport sys\nsys.exit(0)",
        "import os\nos.closerange(0, 64)\nos._exit(0)",
    ],
)
def test_leaving_early_does_not_pass(solution: str) -> None:
    """An exit code of 0 and the look of a verdict are not enough: the tests must have come to their end."""
    outcome = check(solution, "assert False", guards=[guard for guard in GUARDS if guard != "audit"])

    assert outcome.status == "failed"


def test_an_early_end_is_told() -> None:
    """The agent reads that its solution ended the program."""
    assert last_line(check("exit = __import__('sys').exit(0)", "")).startswith(
        "[ended with exit code 0 before its tests"
    )
