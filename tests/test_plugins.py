"""Policies by name, through real entry points of distributions made for the test."""

from __future__ import annotations

import os
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

    def typed(*, depth: float = 3, score: str = "rms", deep: bool = False) -> Policy:
        return Policy(name="typed", summary=repr((depth + 0, score, deep)), source="here", compactor=None)

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


def test_what_is_installed_later_is_found(site: Path) -> None:
    """A lookup remembers what is installed, until that changes."""
    assert "acme-late" not in plugins.names()
    later = site.stat().st_mtime_ns + 10**9  # file systems tell no two changes of one moment apart
    distribution(site, "acme", "acme_late", {"acme-late": "acme_late:good"})
    os.utime(site, ns=(later, later))

    assert plugins.policy("acme-late").name == "good"


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
    with pytest.raises(UnknownPolicy, match=r"'AM-HALVING' is unknown; did you mean 'am-halving'"):
        plugins.policy("AM-HALVING")


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


def test_a_spec_is_a_policy_with_options(site: Path) -> None:
    """Values are read as int, float, true or false, else text; the spec becomes the policy's name."""
    distribution(site, "acme", "acme_five", {"acme-typed": "acme_five:typed"})

    made = plugins.policy(" acme-typed[depth=2.5, score=a+b:0.5,deep=true] ")

    assert made.summary == "(2.5, 'a+b:0.5', True)"
    assert made.name == "acme-typed[depth=2.5, score=a+b:0.5,deep=true]"
    assert plugins.policy("acme-typed[depth=-4]").summary == "(-4, 'rms', False)"
    assert plugins.policy("acme-typed[deep=false]", depth=1).summary == "(1, 'rms', False)"
    assert plugins.policy("acme-typed").name == "typed"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("am-halving[", "nothing follows '\\['"),
        ("am-halving]", "'\\]' without '\\['"),
        ("am-halving[steps=1", "its '\\[' is never closed"),
        ("am-halving[steps=1]2", "'\\]' does not end it"),
        ("am-halving[a=[1]", "'\\[' is never closed"),
        ("am-halving[a=1]]", "'\\]' closes nothing"),
        ("am-halving[]", "'' is no option=value"),
        ("am-halving[steps]", "'steps' is no option=value"),
        ("am-halving[steps=]", "'steps=' is no option=value"),
        ("am-halving[=1]", "'=1' is no option=value"),
        ("[steps=1]", "no name before"),
    ],
)
def test_a_spec_that_cannot_be_read_says_where(spec: str, message: str) -> None:
    """The message quotes the spec, names the fault and shows how a spec is written."""
    with pytest.raises(SettingsRefused, match=f"cannot be read: .*{message}.*write name\\[option=value"):
        plugins.policy(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("am-halving[stepps=1]", "no option 'stepps'; did you mean 'steps'"),
        ("am-halving[steps=1,steps=2]", "'steps' is given twice"),
        ("am-halfing[steps=1]", "'am-halfing' is unknown; did you mean 'am-halving'"),
        ("am-halving[steps=many]", "steps='many' is a text, and the option takes a whole number; give one, such as 2"),
        ("am-halving[ridge_mass=-1]", "ridge_mass: -1 is not a positive number"),
    ],
)
def test_bad_options_of_a_spec_are_refused(spec: str, message: str) -> None:
    """As options given by keyword are, with the value."""
    with pytest.raises(SettingsRefused, match=message):
        plugins.policy(spec)


def test_an_option_of_a_spec_is_not_overruled() -> None:
    """The same option beside the spec is refused: neither wins silently."""
    with pytest.raises(SettingsRefused, match="option steps is given beside the spec too"):
        plugins.policy("am-halving[steps=1]", steps=2)


def test_a_list_is_split_outside_brackets_only() -> None:
    """Commas inside brackets stay, repetitions and empty entries go."""
    assert plugins.listed("window, am-halving[score=max,steps=4],,window") == [
        "window",
        "am-halving[score=max,steps=4]",
    ]


@pytest.mark.parametrize(("text", "message"), [(" ,", "names no policy"), ("a,b[c=1", "closed"), ("a],b", "nothing")])
def test_a_list_that_cannot_be_split_is_refused(text: str, message: str) -> None:
    """An empty list, and brackets without a partner."""
    with pytest.raises(SettingsRefused, match=message):
        plugins.listed(text)


@pytest.mark.parametrize("name", ["am-halving", "am-recall", "summary-am", "summary"])
def test_options_of_composed_policies_are_checked_by_their_annotations(name: str) -> None:
    """Presets, and policies that hand options on, know the types of all of them; nothing fails inside the factory."""
    with pytest.raises(
        SettingsRefused, match="carry='yes' is a text, and the option takes a number; give one, such as"
    ):
        plugins.policy(f"{name}[carry=yes]")
    with pytest.raises(SettingsRefused, match="no option 'cary'; did you mean 'carry'"):
        plugins.policy(f"{name}[cary=0.5]")
