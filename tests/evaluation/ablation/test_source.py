"""Configurations in YAML: what is read, and refusals that name line and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmem.errors import SettingsRefused
from agentmem.evaluation.ablation import cells, read_config
from agentmem.evaluation.ablation.source import parse

ROOT = Path(__file__).parents[3]
GOOD = """\
policies: [window, 'am-halving[steps=4]']
slots: [64, 128]
caps: 24MiB
seeds: [0, 1]
texts:
  - pages
  - {path: book.txt, offset: 40}
instruments:
  fidelity: {}
  recall: {tokens: 500}
"""


def test_a_configuration_is_read_with_its_defaults() -> None:
    """One value stands for a list of one, byte texts become bytes, and the first policy is the baseline."""
    found = parse(GOOD, "a.yaml")

    assert found.caps == (24 << 20,)
    assert (found.keep_first, found.keep_recent, found.models) == ((16,), (96,), ("default",))
    assert [text.label for text in found.texts] == ["pages", "book.txt@40"]
    assert found.compared_with == "window"


def test_the_grid_has_every_combination_once() -> None:
    """Three limits, two policies, two texts, two seeds; recall also has full memory once per text and seed."""
    found = cells(parse(GOOD, "a.yaml"))

    fidelity = [cell for cell in found if cell.instrument == "fidelity"]
    recall = [cell for cell in found if cell.instrument == "recall"]
    assert len(fidelity) == len(set(fidelity)) == 3 * 2 * 2 * 2
    assert len(recall) == len(fidelity) + 2 * 2
    assert sum(cell.policy == "full" for cell in recall) == 4


@pytest.mark.parametrize(
    ("before", "after", "parts"),
    [
        ("window, ", "windo, ", ("a.yaml:1: policies[0]: ", "windo", "window")),
        ("steps=4", "stepps=4", ("a.yaml:1: policies[1]: ", "stepps")),
        ("window, ", "full, ", ("a.yaml:1: policies[0]: ", "leave it out")),
        ("[64, 128]", "[64, 0]", ("a.yaml:2: slots[1]: ", "greater than or equal to 1", "got 0")),
        ("[64, 128]", "[64, 64]", ("a.yaml:2: slots: ", "twice")),
        ("24MiB", "24 bananas", ("a.yaml:3: caps: ", "24 bananas")),
        ("offset: 40", "ofset: 40", ("a.yaml:7: texts[1].ofset: ", "not permitted")),
        ("tokens: 500", "tokens: many", ("a.yaml:10: instruments.recall.tokens: ", "'many'")),
        ("tokens: 500", "depths: [0.9, 0.1]", ("a.yaml:10: instruments.recall", "must ascend")),
        ("  recall:", "  fidelity:", ("a.yaml:10: fidelity: ", "twice")),
        ("slots: [64, 128]\ncaps: 24MiB\n", "", ("a.yaml:1: ", "neither caps nor slots")),
        ("policies: [window, 'am-halving[steps=4]']\n", "", ("a.yaml:1: policies: Field required",)),
        ("seeds: [0, 1]", "seeds: [0, 1", ("a.yaml:5: no YAML: ",)),
        ("seeds: [0, 1]", "seeds: &a [*a]", ("a.yaml:4: no YAML: an anchor holds itself",)),
        ("seeds: [0, 1]", "baseline: tova", ("a.yaml:1: ", "baseline: 'tova' is none of the policies")),
    ],
)  # fmt: skip
def test_a_refusal_names_line_and_field(before: str, after: str, parts: tuple[str, ...]) -> None:
    """Wherever a value cannot work, the message begins with file and line, and says field and value."""
    assert before in GOOD

    with pytest.raises(SettingsRefused) as refused:
        parse(GOOD.replace(before, after, 1), "a.yaml")

    assert "Traceback" not in str(refused.value)
    for part in parts:
        assert part in str(refused.value)


def test_many_faults_are_bounded() -> None:
    """A long list of wrong entries is quoted in part, with how many more there are."""
    with pytest.raises(SettingsRefused, match="and 92 more") as refused:
        parse(GOOD.replace("[64, 128]", f"[{', '.join(['no'] * 100)}]"), "a.yaml")

    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("text", ["", "- window", "42", "\x00"])
def test_what_is_no_mapping_is_refused(text: str) -> None:
    """An empty file, a list, a number and control characters are no configuration."""
    with pytest.raises(SettingsRefused, match=r"^a\.yaml"):
        parse(text, "a.yaml")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """The path and the reason are named."""
    with pytest.raises(SettingsRefused, match="No such file"):
        read_config(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("name", "instruments"),
    [("demos/evidence.yaml", {"many_shot"}), ("benchmarks/ablation.yaml", {"fidelity", "recall", "many_shot"})],
)
def test_the_configurations_of_this_project_are_read(name: str, instruments: set[str]) -> None:
    """That of ``make demo`` and the example measure full memory beside each policy at each cap."""
    asked = read_config(ROOT / name)
    found = cells(asked)

    assert {cell.instrument for cell in found} == instruments
    assert {"full", *asked.policies} == {cell.policy for cell in found if cell.instrument == "many_shot"}
