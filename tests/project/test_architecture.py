"""Who may import what: the one table of it. docs/architecture.md has the folders that it speaks of."""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 500
VAGUE = {"utils", "util", "helpers", "helper", "common", "base", "misc"}

ABOVE = "above"  # every room of an earlier row


@dataclass(frozen=True)
class Room:
    """One row: the modules below ``name`` may import these rooms and these outside packages."""

    name: str
    rooms: str | frozenset[str] = frozenset()
    outside: frozenset[str] = frozenset()


def room(name: str, rooms: str = "", outside: str = "") -> Room:
    """One row of the table; rooms are named without their leading ``agentmem.``."""
    allowed = rooms if rooms == ABOVE else frozenset(f"agentmem.{other}" for other in rooms.split())
    return Room(name, allowed, frozenset(outside.split()))


# The order is the direction of data: a row never imports a later one, for type checkers neither.
TABLE = (
    room("agentmem.untrusted", outside="pydantic"),
    room("agentmem.errors", rooms="untrusted"),
    room("agentmem.specs", rooms="untrusted"),
    room("agentmem.queries", rooms="specs untrusted", outside="torch regex"),
    room("agentmem.contracts", rooms="queries", outside="torch"),
    room("agentmem.language"),
    room("agentmem.models.files", rooms="errors"),
    room("agentmem.settings", rooms="errors untrusted", outside="pydantic"),
    room("agentmem.reporting.report", outside="pydantic"),
    room("agentmem.reporting.log_events", rooms="reporting.report", outside="structlog"),
    room("agentmem.attention.quantised", rooms="settings", outside="torch"),
    room("agentmem.planning.model_shape", rooms="errors settings attention.quantised"),
    room("agentmem.planning.rebasing", rooms="attention.quantised planning.model_shape"),
    room("agentmem.attention._chunk"),
    room("agentmem.attention._decode"),
    room(
        "agentmem.attention.decode", rooms="attention._decode attention.quantised planning.model_shape", outside="torch"
    ),
    room("agentmem.attention.runs", rooms="attention.quantised planning.model_shape", outside="torch"),
    room("agentmem.attention.parts", rooms="planning.model_shape"),
    room("agentmem.attention.triton_kernel", rooms="attention.parts attention.runs contracts", outside="torch triton"),
    room("agentmem.attention.explicit", rooms="attention.runs contracts planning.model_shape", outside="torch"),
    room(
        "agentmem.attention.ragged",
        rooms="attention._chunk attention.decode attention.explicit attention.parts attention.quantised "
        "attention.runs attention.triton_kernel contracts planning.model_shape",
        outside="torch",
    ),
    room("agentmem.memory.ledger", rooms="errors settings"),
    room("agentmem.reference_queries.stored", rooms="queries memory.ledger planning.model_shape", outside="torch"),
    room("agentmem.reference_queries.patterns", rooms="errors", outside="regex"),
    room("agentmem.reference_queries.probe", rooms="queries", outside="torch"),
    room(
        "agentmem.planning.pricing",
        rooms="queries contracts settings planning.model_shape planning.rebasing attention.explicit "
        "attention.quantised attention.ragged reference_queries.stored",
    ),
    room("agentmem.planning.capacity", rooms="contracts errors settings planning.pricing planning.model_shape"),
    room("agentmem.memory.torch_state", outside="torch"),
    room("agentmem.memory.owner", rooms="errors"),
    room("agentmem.memory.pins"),
    room("agentmem.memory.rotation", rooms="planning.rebasing", outside="torch"),
    room(
        "agentmem.memory.slot_spec",
        rooms="contracts planning.model_shape memory.rotation attention.quantised",
        outside="torch",
    ),
    room("agentmem.memory.encoded", rooms="contracts memory.slot_spec attention.quantised", outside="torch"),
    room(
        "agentmem.memory.store",
        rooms="contracts memory.encoded memory.ledger memory.pins memory.slot_spec attention.decode "
        "attention.quantised attention.runs",
        outside="torch",
    ),
    room("agentmem.memory.jobs", rooms="contracts planning.pricing memory.store"),
    room(
        "agentmem.memory.sequence",
        rooms="memory.jobs memory.pins memory.store reference_queries.patterns reference_queries.stored "
        "reporting.report",
        outside="torch",
    ),
    room("agentmem.memory.reports", rooms="memory.sequence reporting.report"),
    room("agentmem.memory.memory", rooms=ABOVE, outside="torch"),
    room(
        "agentmem.memory.pinning",
        rooms="errors planning.pricing memory.memory memory.pins memory.sequence memory.store",
        outside="torch",
    ),
    room(
        "agentmem.memory.forwards",
        rooms="attention.decode attention.ragged attention.runs memory.jobs memory.memory memory.sequence "
        "memory.slot_spec memory.store planning.pricing reference_queries.stored reporting.log_events",
        outside="torch",
    ),
    room("agentmem.memory.positions", rooms=ABOVE, outside="torch"),
    room(
        "agentmem.memory.state",
        rooms="contracts memory.memory memory.reports memory.slot_spec memory.store memory.pins memory.pinning "
        "memory.sequence reporting.report reference_queries.stored",
        outside="torch pydantic",
    ),
    room("agentmem.compaction.request", rooms="contracts planning.pricing memory.jobs memory.sequence"),
    room("agentmem.compaction.writing", rooms="memory.forwards memory.memory memory.sequence"),
    room(
        "agentmem.compaction.references",
        rooms="contracts queries compaction.writing memory.forwards memory.jobs memory.memory memory.sequence "
        "reference_queries.probe",
        outside="torch",
    ),
    room(
        "agentmem.compaction.held_out",
        rooms="attention.ragged planning.pricing contracts reporting.report",
        outside="torch",
    ),
    room(
        "agentmem.compaction.budgets",
        rooms="contracts errors planning.pricing memory.jobs memory.ledger compaction.held_out compaction.references",
    ),
    room("agentmem.compaction.checks", rooms="contracts errors", outside="torch"),
    room("agentmem.compaction.summary", rooms=ABOVE, outside="torch"),
    room("agentmem.compaction.run", rooms=ABOVE, outside="torch"),
    room("agentmem.engine.engine", rooms=ABOVE, outside="torch"),
    room("agentmem.engine.feeding", rooms="engine.engine memory.forwards memory.torch_state", outside="torch"),
    room("agentmem.engine.scheduler", rooms="engine.feeding"),
    room("agentmem.engine", rooms="engine.engine engine.feeding engine.scheduler"),
    room("agentmem.plugins", rooms="contracts errors specs untrusted"),
    room("agentmem.hf.support", rooms="errors planning.model_shape", outside="torch transformers"),
    room("agentmem.hf.rope", rooms="errors memory.rotation", outside="torch transformers"),
    room(
        "agentmem.hf.forward_context",
        rooms="engine errors memory.memory memory.owner memory.torch_state",
        outside="torch transformers",
    ),
    room("agentmem.hf.capture", rooms="errors hf.forward_context", outside="torch transformers"),
    room("agentmem.hf.fork_lock"),
    room("agentmem.hf.fingerprint", outside="torch transformers"),
    room("agentmem.hf.model_identity", rooms="errors hf.fingerprint", outside="torch transformers"),
    room("agentmem.hf.cache", rooms=ABOVE, outside="torch transformers"),
    room("agentmem.hf.generate_checks", rooms="errors settings hf.cache", outside="torch transformers"),
    room("agentmem.hf.forwards", rooms=ABOVE, outside="torch transformers"),
    room("agentmem.hf.wrapper", rooms="errors hf.cache hf.forward_context", outside="torch transformers"),
    room("agentmem.hf.attach", rooms=ABOVE, outside="torch transformers"),
    room("agentmem.hf.check_models", rooms="errors", outside="torch transformers"),
    room(
        "agentmem.hf.rebase_check",
        rooms="errors hf.capture hf.check_models hf.rope hf.support memory.rotation planning.model_shape",
        outside="torch",
    ),
    room("agentmem.hf.self_check", rooms=ABOVE, outside="torch transformers"),
    room("agentmem.hf.decoding", rooms="errors hf.cache hf.forward_context hf.support", outside="torch transformers"),
    room("agentmem.hf", rooms=ABOVE),
    room("agentmem.api", rooms=ABOVE, outside="torch"),
    room("agentmem.sessions", rooms=ABOVE, outside="torch pydantic jinja2 fsspec filelock regex"),
    room("agentmem.models.download", rooms="errors"),
    room(
        "agentmem.models",
        rooms="errors settings untrusted models.download",
        outside="torch transformers tokenizers safetensors filelock",
    ),
    room("agentmem.testing", rooms=ABOVE, outside="torch transformers"),
    room("agentmem.reporting.trace", rooms="errors untrusted reporting.report", outside="pydantic"),
    room("agentmem.reporting.plots", rooms="errors settings reporting.report reporting.trace", outside="matplotlib"),
    room("agentmem.evaluation", rooms=ABOVE, outside="torch transformers pydantic numpy matplotlib filelock"),
    room("agentmem.calibration", rooms=ABOVE, outside="torch transformers accelerate"),
    room(
        "agentmem.evaluation.tasks",
        rooms=ABOVE,
        outside="torch transformers pydantic inspect_ai math_verify",
    ),
    room(
        "agentmem.evaluation.ablation",
        rooms=ABOVE,
        outside="torch transformers pydantic numpy matplotlib filelock scipy yaml jinja2",
    ),
    room("agentmem", rooms=ABOVE),
    room(
        "agentmem.serving",
        rooms=ABOVE,
        outside="torch structlog pydantic fastapi starlette uvicorn prometheus_client cryptography jsonschema "
        "referencing regex filelock llguidance",
    ),
    room("agentmem.serving.ray_app", rooms="errors serving", outside="fastapi ray"),
    room("agentmem.cli", rooms=ABOVE, outside="torch transformers typer rich pydantic structlog"),
    room("agentmem.policies.solvers", outside="torch"),
    room("agentmem.policies", rooms="contracts specs untrusted policies.solvers", outside="torch"),
)


def modules(root: Path) -> dict[str, Path]:
    """Every module that the distribution installs, by its import name."""
    found = {}
    for folder, package in (("agentmem", "agentmem"), ("policies", "agentmem.policies")):
        files = (path for path in (root / folder).rglob("*") if path.suffix in {".py", ".pyi"})  # .pyi: a compiled one
        for path in sorted(files):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The full names of the modules that one module imports, wherever in the file, for type checkers only too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            climb = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*climb, *([node.module] if node.module else [])])
            # `from agentmem import models` imports agentmem.models; of agentmem itself it wants nothing.
            members = {f"{source}.{alias.name}" for alias in node.names}
            found |= {member if member in known else source for member in members}
    return found


def home(name: str, table: tuple[Room, ...]) -> Room | None:
    """The row that a module falls under: the longest name that is the module or a package around it."""
    fitting = [row for row in table if name == row.name or (name.startswith(f"{row.name}.") and row.name != "agentmem")]
    return max(fitting, key=lambda row: len(row.name), default=None)


def allows(mine: Room, wanted: str, table: tuple[Room, ...]) -> bool:
    """Whether the row ``mine`` may import the module ``wanted``."""
    top = wanted.partition(".")[0]
    if top != "agentmem":
        return top in sys.stdlib_module_names or top in mine.outside
    theirs = home(wanted, table)
    if theirs is None:
        return False
    if mine.rooms == ABOVE and not theirs.name.startswith("agentmem.policies"):
        return table.index(theirs) <= table.index(mine)
    return theirs == mine or theirs.name in mine.rooms


def faults(root: Path, table: tuple[Room, ...] = TABLE) -> list[str]:
    """Every import below ``root`` that the table does not allow, and every module that it does not name."""
    known, found = modules(root), []
    for name, path in known.items():
        mine = home(name, table)
        if mine is None and path.name == "__init__.py" and not imports(name, path, known):
            continue  # a package that only says what is in it
        if mine is None:
            found.append(f"{name} has no row in the table")
            continue
        wanted = sorted(imports(name, path, known))
        found += [f"{name} imports {other}" for other in wanted if not allows(mine, other, table)]
    return found


def test_every_import_is_in_the_table() -> None:
    """No module imports a room or an outside package that its row does not name."""
    assert faults(ROOT) == []


def test_the_import_graph_is_acyclic() -> None:
    """No module imports itself through others, in functions and for type checkers included."""
    known = modules(ROOT)
    graph = {name: imports(name, path, known) & known.keys() - {name} for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


def test_the_documented_folders_are_the_packages_on_disk() -> None:
    """The folder list that docs/architecture.md opens with has a line for every package, and for no other."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^    (\S+)/ ", text.split("```text")[1].split("```")[0], flags=re.MULTILINE)
    on_disk = {
        path.parent.relative_to(ROOT).as_posix()
        for folder in ("agentmem", "policies")
        for path in (ROOT / folder).rglob("__init__.py")
    }

    assert sorted(listed) == sorted(on_disk - {"agentmem", "policies"})


FLAT = {
    "__init__",
    "api",
    "contracts",
    "errors",
    "language",
    "plugins",
    "queries",
    "settings",
    "specs",
    "testing",
}


def test_no_other_module_lies_flat_in_the_package() -> None:
    """What is neither a way in nor an interface for policy authors lies in the package of its subject."""
    assert {path.stem for path in (ROOT / "agentmem").glob("*.py")} <= FLAT


FILES = [
    path
    for folder in ("agentmem", "policies", "tests", "demos", "benchmarks")
    for path in ROOT.glob(f"{folder}/**/*.py")
]


def test_files_stay_short_and_have_a_subject() -> None:
    """No file has more than 500 lines, and none has a name that says nothing."""
    lines = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}

    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}
    assert [path for path in lines if path.stem in VAGUE] == []


@pytest.mark.parametrize(
    ("file", "code", "fault"),
    [
        ("agentmem/errors.py", "import torch", "agentmem.errors imports torch"),
        (
            "agentmem/memory/memory.py",
            "from transformers import cache_utils",
            "agentmem.memory.memory imports transformers",
        ),
        (
            "agentmem/memory/memory.py",
            "def f():\n    import transformers",
            "agentmem.memory.memory imports transformers",
        ),
        ("agentmem/memory/memory.py", "from agentmem import api", "agentmem.memory.memory imports agentmem.api"),
        ("agentmem/memory/memory.py", "from ..api import view", "agentmem.memory.memory imports agentmem.api"),
        ("agentmem/hf/cache.py", "import agentmem.policies.full", "agentmem.hf.cache imports agentmem.policies.full"),
        (
            "agentmem/cli/app.py",
            "from agentmem.policies import full",
            "agentmem.cli.app imports agentmem.policies.full",
        ),
        (
            "policies/full.py",
            "from agentmem.memory import memory",
            "agentmem.policies.full imports agentmem.memory.memory",
        ),
        (
            "policies/solvers/fit.py",
            "import agentmem.contracts",
            "agentmem.policies.solvers.fit imports agentmem.contracts",
        ),
        ("agentmem/novelty.py", "", "agentmem.novelty has no row in the table"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, code: str, fault: str) -> None:
    """The check names a forbidden import wherever it stands in a file, absolute or relative."""
    for name in ("agentmem/contracts.py", "agentmem/memory/memory.py", "agentmem/api.py", "policies/full.py", file):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert faults(tmp_path) == [fault] * (not code)

    (tmp_path / file).write_text(code, encoding="utf-8")

    assert faults(tmp_path) == [fault]


def test_an_import_for_type_checkers_counts(tmp_path: Path) -> None:
    """A forbidden name under ``if TYPE_CHECKING`` is found, too: it hides a circle as well as any other."""
    (tmp_path / "agentmem" / "memory").mkdir(parents=True)
    code = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers\n"
    (tmp_path / "agentmem" / "memory" / "memory.py").write_text(code, encoding="utf-8")

    assert faults(tmp_path) == ["agentmem.memory.memory imports transformers"]
