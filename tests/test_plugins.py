"""Policies by name, through real entry points of distributions made for the test."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from agentmem import plugins
from agentmem.contracts import Policy
from agentmem.errors import SettingsRefused, UnknownPolicy

FACTORY = """
    from agentmem.contracts import Policy

    def good(*, depth: int = 3) -> Policy:
        if depth < 1:
            raise ValueError(f"depth: {depth} is too few; give at least 1")
        return Policy(name="good", summary=f"depth {depth}", source="here", compactor=None)

    def number():
        return 7

    def crash():
        raise RuntimeError("no luck")

    notcallable = 3
"""


def distribution(folder: Path, name: str, module: str, points: dict[str, str], code: str = FACTORY) -> None:
    """Put a distribution into ``folder`` as an installer would: its module and its metadata."""
    (folder / f"{module}.py").write_text(dedent(code), encoding="utf-8")
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n", encoding="utf-8")
    lines = [f"{point} = {value}" for point, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[agentmem.policies]", *lines]), encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_built_in_policies_come_in_by_the_same_door() -> None:
    """The four of the catalogue are entry points of this distribution and have a summary."""
    rows = {row.name: row for row in plugins.catalogue()}

    assert {"am-halving", "window", "heavy-hitters", "full"} <= set(plugins.names())
    assert rows["am-halving"].source == "arXiv:2602.16284"
    assert rows["window"].distribution.startswith("agentmem-runtime ")
    assert all(row.error is None and row.summary for row in rows.values())


def test_a_policy_is_made_with_its_options(site: Path) -> None:
    """A third party's factory is found by name and called with the options."""
    distribution(site, "acme", "acme_one", {"acme-good": "acme_one:good"})

    assert plugins.policy("acme-good", depth=5).summary == "depth 5"


def test_a_made_policy_is_handed_through() -> None:
    """A Policy is itself; options beside it are refused, since they would be lost."""
    made = Policy(name="mine", summary="-", source="-", compactor=None)

    assert plugins.policy(made) is made
    with pytest.raises(SettingsRefused, match="options depth would be lost"):
        plugins.policy(made, depth=1)


def test_an_unknown_name_gets_a_suggestion_and_the_list() -> None:
    """The message holds the nearest names and every installed one."""
    with pytest.raises(UnknownPolicy, match=r"'am-halfing' is unknown; did you mean 'am-halving'.*Installed: .*window"):
        plugins.policy("am-halfing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depht": 2}, "no option 'depht'; did you mean 'depth'\\? Its options: depth"),
        ({"zzz": 2}, "no option 'zzz'; Its options: depth"),
        ({"depth": 0}, "policy 'acme-good': depth: 0 is too few; give at least 1"),
    ],
)
def test_bad_options_are_refused(site: Path, options: dict[str, object], message: str) -> None:
    """Unknown options get a did-you-mean, bad values keep the factory's own words."""
    distribution(site, "acme", "acme_two", {"acme-good": "acme_two:good"})

    with pytest.raises(SettingsRefused, match=message):
        plugins.policy("acme-good", **options)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("acme_three:missing", "cannot be imported: AttributeError"),
        ("acme_nowhere:good", "cannot be imported: ModuleNotFoundError"),
        ("acme_three:number", "returned int; it must return an agentmem.contracts.Policy"),
        ("acme_three:crash", "failed: RuntimeError: no luck"),
        ("acme_three:notcallable", "is int; it must be a function"),
    ],
)
def test_a_broken_plugin_is_named_and_hides_no_other(site: Path, value: str, message: str) -> None:
    """The error names policy, factory and distribution; the catalogue still lists everything else."""
    distribution(site, "acme", "acme_three", {"acme-bad": value, "acme-good": "acme_three:good"})

    with pytest.raises(SettingsRefused, match=f"policy 'acme-bad', factory '{value}' of acme 1.2 {message}"):
        plugins.policy("acme-bad")
    rows = {row.name: row for row in plugins.catalogue()}
    assert message.split(":", maxsplit=1)[0] in str(rows["acme-bad"].error)
    assert rows["acme-bad"].distribution == "acme 1.2"
    assert rows["acme-good"].error is None
    assert rows["am-halving"].error is None


def test_a_name_offered_twice_is_refused(site: Path) -> None:
    """Neither wins silently: the message names both distributions."""
    distribution(site, "acme", "acme_four", {"acme-good": "acme_four:good"})
    distribution(site, "bolt", "bolt_four", {"acme-good": "bolt_four:good"})

    with pytest.raises(SettingsRefused, match=r"offered 2 times: .* and .*; uninstall all but one"):
        plugins.policy("acme-good")
    assert {row.name: row for row in plugins.catalogue()}["acme-good"].error is not None
