"""Read the configuration of an ablation from YAML; errors name the line and the field."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from agentmem.errors import SettingsRefused
from agentmem.evaluation.ablation.config import Ablation
from agentmem.evaluation.passage import read_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_MAX_BYTES = 1 << 20
_MAX_FAULTS = 8
_SHOWN = 80


def read_config(path: Path) -> Ablation:
    """Read the configuration of an ablation from a YAML file.

    Raises:
        SettingsRefused: the file cannot be read, is no YAML, or has an invalid field; the message names line and field.

    """
    text = read_text(path)
    if len(text) > _MAX_BYTES:
        raise SettingsRefused(f"{path.name}: {len(text)} characters are no configuration; {_MAX_BYTES} are allowed")
    return parse(text, path.name)


def parse(text: str, name: str) -> Ablation:
    """Read the configuration of an ablation from YAML; ``name`` is the file name for error messages.

    Raises:
        SettingsRefused: see :func:`read_config`.

    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise SettingsRefused(f"{name}:1: the configuration is no mapping; begin with `policies: […]`")
        _refuse_twins(root, name)
        values = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise SettingsRefused(f"{name}:{line}: no YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).partition("\n")[0] or "it is nested too deep"
        raise SettingsRefused(f"{name}: no YAML: {reason[:_SHOWN]}") from None
    finally:
        if loader is not None:
            loader.dispose()
    try:
        return Ablation.model_validate(values)
    except ValidationError as error:
        raise SettingsRefused(_faults(error, root, name)) from None


def _faults(error: ValidationError, root: yaml.Node, name: str) -> str:
    found: dict[tuple[int, str], str] = {}
    for item in error.errors(include_url=False):
        line, field = _place(root, item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        value = "" if item["type"] in {"missing", "value_error"} else f" (got {_short(item['input'])})"
        # A union has one error per member: the first message of a field is enough.
        found.setdefault((line, field), f"{name}:{line}: {field or 'configuration'}: {message}{value}")
    lines = [found[key] for key in sorted(found)]
    more = [f"and {len(lines) - _MAX_FAULTS} more"] if len(lines) > _MAX_FAULTS else []
    return "; ".join([*lines[:_MAX_FAULTS], *more])


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _place(root: yaml.Node, location: Sequence[int | str]) -> tuple[int, str]:
    """Return where a validation error is: the line of the YAML text, counted from 1, and the name of the field.

    ``location`` is pydantic's location of the error. If the error is a missing field, the line is where the mapping
    that lacks the field begins.
    """
    node, line, field = root, root.start_mark.line + 1, ""
    for step in location:
        if isinstance(step, int) and isinstance(node, yaml.SequenceNode) and step < len(node.value):
            node, field = node.value[step], f"{field}[{step}]"
            line = node.start_mark.line + 1
        elif isinstance(step, str) and isinstance(node, yaml.MappingNode):
            found = {key.value: (key, value) for key, value in node.value}
            field = f"{field}.{step}" if field else step
            if step not in found:  # a missing field: the line is that of its mapping
                break
            key, node = found[step]
            line = key.start_mark.line + 1
    return line, field


def _refuse_twins(node: yaml.Node, name: str, seen: frozenset[int] = frozenset()) -> None:
    """Check that no mapping in the YAML text has the same key twice; YAML would silently drop the first value.

    Raises:
        SettingsRefused: a mapping has a key twice, or a YAML anchor contains itself.

    """
    if id(node) in seen:
        raise SettingsRefused(f"{name}:{node.start_mark.line + 1}: no YAML: an anchor holds itself")
    keys: set[str] = set()
    for key in _keys(node):
        if key.value in keys:
            raise SettingsRefused(f"{name}:{key.start_mark.line + 1}: {key.value}: stands there twice; give it once")
        keys.add(key.value)
    for child in _children(node):
        _refuse_twins(child, name, seen | {id(node)})


def _keys(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        yield from (key for key, _ in node.value if isinstance(key, yaml.ScalarNode))


def _children(node: yaml.Node) -> Iterator[Any]:
    if isinstance(node, yaml.MappingNode):
        yield from (value for _, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value
