"""What is installed: the entry points, the version, the type marker, and every package on disk."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import distribution, entry_points, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from agentmem.attention import decode
from agentmem.contracts import Policy
from support import forked

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_built_in_policies_enter_by_the_public_door() -> None:
    """Each entry point of the group loads and builds a policy of its own name."""
    built_in = {point.name: point for point in entry_points(group="agentmem.policies") if point.dist is not None}

    assert {"am-halving", "full", "heavy-hitters", "window"} <= built_in.keys()
    for name in ("am-halving", "full", "heavy-hitters", "window"):
        policy = built_in[name].load()()
        assert isinstance(policy, Policy)
        assert policy.name == name


def test_every_package_on_disk_is_installed() -> None:
    """No folder with an __init__.py is forgotten in pyproject.toml, and none is listed that does not exist."""
    on_disk = {
        ".".join((package, *path.parent.relative_to(ROOT / folder).parts))
        for folder, package in (("agentmem", "agentmem"), ("policies", "agentmem.policies"))
        for path in (ROOT / folder).rglob("__init__.py")
    }

    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_the_version_is_one() -> None:
    """The installed distribution and CITATION.cff have the version of pyproject.toml."""
    declared = PROJECT["project"]["version"]

    assert version("agentmem-runtime") == declared
    assert f"\nversion: {declared}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_types_are_shipped() -> None:
    """Type checkers read the annotations of an installed agentmem."""
    assert files("agentmem").joinpath("py.typed").is_file()


needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None or sys.platform != "linux", reason="compiled on Linux, where there is a C compiler"
)


@needs_compiler
def test_the_compiled_attention_is_installed() -> None:
    """An installation that could not build it goes on without, and would be slower in silence."""
    assert decode.COMPILED


@needs_compiler
@pytest.mark.parametrize("module", PROJECT["tool"]["setuptools"]["ext-modules"], ids=lambda module: module["name"])
def test_compiled_code_has_no_warnings(module: dict[str, Any]) -> None:
    """Those that need no optimiser; with the optimiser's, CI's installation ends, by the CFLAGS in AGENTS.md."""
    advice = ["-Wall", "-Wextra", "-Werror", f"-I{sysconfig.get_paths()['include']}", "-fsyntax-only"]
    command = ["cc", *module["extra-compile-args"], *advice, *module["sources"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    assert done.returncode == 0, done.stderr


def test_every_direct_dependency_is_pinned() -> None:
    """constraints.txt has an exact version for every requirement of the project and of its extras, itself excepted."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line and not line.startswith("#")}
    project = PROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]

    assert {re.split(r"[\[>]", requirement)[0] for requirement in wanted} - {project["name"]} <= pinned


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_command_line_names_the_extra_that_is_missing(missing: str) -> None:
    """Without the extra the console script exits with 1 and one line that says what to install."""
    code = f"""
import sys
for name in list(sys.modules):
    if name.startswith(("typer", "rich")):
        del sys.modules[name]
sys.modules[{missing!r}] = None
from agentmem.cli import main
sys.exit(main())
"""
    done = forked.run([sys.executable, "-c", code], text=True)

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pip install 'agentmem-runtime[cli]'" in done.stderr


def test_the_console_script_is_the_guarded_door() -> None:
    """The script that users type is agentmem.cli:main, which survives a missing extra."""
    scripts = {
        point.name: point.value
        for point in distribution("agentmem-runtime").entry_points.select(group="console_scripts")
    }

    assert scripts == {"agentmem": "agentmem.cli:main"}
