"""Reading a recipe: YAML that says one thing only, and errors that name the file and the line."""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from stable_rlhf.settings.recipe import suggestion

_LARGEST = 2**20  # bytes; recipes have a few thousand
_MOST_NODES = 100_000  # with every alias written out
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}
_LONGEST_NUMBER = 40  # characters: more than any setting takes


class _Problem(Exception):
    """What is wrong, and with which node."""

    def __init__(self, words: str, node: yaml.Node) -> None:
        super().__init__(words)
        self.line: int = node.start_mark.line + 1


class _Loader(yaml.SafeLoader):
    """Dates are text, as they are where the recipe is read for its values."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_recipe(path: str, known: Sequence[str]) -> dict[str, int]:
    """Refuse what is not a recipe; returns the line of each setting. The parser reads the values and checks them.

    Raises:
        ValueError: names the file, and the line or the setting.
    """
    text = _read(path)
    try:
        node = yaml.compose(text, _Loader)
        content = check_node(node) if node is not None else None
    except yaml.YAMLError as error:
        mark, position = getattr(error, "problem_mark", None), getattr(error, "position", None)
        line = mark.line + 1 if mark else text.count("\n", 0, position) + 1 if position is not None else None
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise ValueError(f"recipe {path!r}{_at(line)}: not YAML: {problem}") from None
    except _Problem as problem:
        raise ValueError(f"recipe {path!r}{_at(problem.line)}: {problem}") from None
    except RecursionError:
        raise ValueError(f"recipe {path!r}: nested too deeply") from None
    if node is None or content is None:
        raise ValueError(f"recipe {path!r}: the file is empty")
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path!r}: expected settings as `name: value`, found {type(content).__name__}")
    lines = _lines(node)
    known = [name for name in known if name not in ("help", "config", "print_config")]
    settings, sections = set(known), {k.split(".")[0] for k in known if "." in k}
    line_of: dict[str, int] = {}
    for name, value in content.items():
        at = f"recipe {path!r}{_at(lines.get((str(name), '')))}"
        if name in sections and name not in settings - sections:
            if not isinstance(value, dict):
                words = f"{name!r} is a section of settings (`{name}:` and indented lines), got {value!r}"
                raise ValueError(f"{at}: {words}")
            names = {f"{name}.{key}": (str(name), str(key)) for key in value}
        else:
            names = {str(name): (str(name), "")}
        for each, place in names.items():
            line = lines.get(place)
            at = f"recipe {path!r}{_at(line)}"
            if each not in settings:
                raise ValueError(f"{at}: unknown setting {each!r}{suggestion([each], known)}")
            if each in line_of:
                raise ValueError(f"{at}: {each!r} is given twice (first in line {line_of[each]})")
            line_of[each] = line or 0
    return line_of


def check_value(flag: str, value: str) -> None:
    """Refuse in a value of the command line what a recipe may not hold either; text that is no YAML stays text.

    Raises:
        ValueError: names the flag.
    """
    try:
        node = yaml.compose(value, _Loader)
        if node is not None:
            check_node(node)
    except yaml.YAMLError:
        return
    except _Problem as problem:
        raise ValueError(f"{flag}: {problem}") from None
    except RecursionError:
        raise ValueError(f"{flag}: nested too deeply") from None


def check_node(node: yaml.Node) -> Any:
    """The content of a YAML node that means one thing only.

    Raises:
        _Problem: names given twice, an alias inside of what it stands for, aliases that make far more of the text than
            it holds, objects of Python, numbers that are written as nobody would.
    """
    _size(node, {}, set())
    return yaml.SafeLoader("").construct_document(node)


def _read(path: str) -> str:
    try:
        kind = Path(path).stat()
        if stat.S_ISDIR(kind.st_mode):
            raise ValueError(f"recipe {path!r}: is a folder")
        if not stat.S_ISREG(kind.st_mode):  # a pipe would be waited for, a device read for ever
            raise ValueError(f"recipe {path!r}: is not a file (it is read more than once: no pipe, no device)")
        if kind.st_size > _LARGEST:
            raise ValueError(f"recipe {path!r}: {kind.st_size} bytes are too many for a recipe")
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"recipe {path!r}: no such file") from None
    except OSError as error:
        raise ValueError(f"recipe {path!r}: cannot be read: {error.strerror or error}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"recipe {path!r}{_at(line)}: not YAML: not UTF-8") from None


def _at(line: int | None) -> str:
    return f", line {line}" if line else ""


def _lines(node: yaml.Node) -> dict[tuple[str, str], int]:
    """The line of every section and of every setting in it."""
    lines: dict[tuple[str, str], int] = {}
    for key, value in _items(node):
        lines[str(key.value), ""] = key.start_mark.line + 1
        for inner, _ in _items(value):
            lines[str(key.value), str(inner.value)] = inner.start_mark.line + 1
    return lines


def _items(node: yaml.Node) -> list[tuple[yaml.Node, yaml.Node]]:
    return list(node.value) if isinstance(node, yaml.MappingNode) else []


def _size(node: yaml.Node, sizes: dict[int, int], open_nodes: set[int]) -> int:
    """How many nodes this one is with every alias written out; refuses what makes no sense on the way."""
    if id(node) in open_nodes:
        raise _Problem("an alias stands inside of what it stands for", node)
    if id(node) in sizes:
        return sizes[id(node)]
    if node.tag not in _TAGS:
        raise _Problem(f"not YAML of settings: tag {node.tag.replace('tag:yaml.org,2002:', '!!')!r}", node)
    open_nodes.add(id(node))
    total = 1
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_size(item, sizes, open_nodes) for item in node.value)
    else:
        first: dict[str, int] = {}
        for key, value in _items(node):
            if not isinstance(key, yaml.ScalarNode):
                raise _Problem("not YAML of settings: a name must be text", key)
            if key.value in first:
                raise _Problem(f"{key.value!r} is given twice (first in line {first[key.value]})", key)
            first[key.value] = key.start_mark.line + 1
            total += _size(key, sizes, open_nodes) + _size(value, sizes, open_nodes)
    open_nodes.discard(id(node))
    if total > _MOST_NODES:
        raise _Problem(f"its aliases stand for more than {_MOST_NODES} values", node)
    sizes[id(node)] = total
    return total


def _check_scalar(node: yaml.ScalarNode) -> None:
    text = node.value
    kind = node.tag.rsplit(":", 1)[-1]
    if kind == "merge":
        return
    if re.search("[\ud800-\udfff]", text):
        raise _Problem(f"not UTF-8: {text[:40]!r}", node)
    if kind in ("int", "float"):
        if len(text) > _LONGEST_NUMBER:
            raise _Problem(f"a number of {len(text)} characters", node)
        if ":" in text or re.fullmatch(r"[+-]?0[0-7_]+", text):
            meant = yaml.SafeLoader("").construct_object(node)
            raise _Problem(f"{text} is {meant} in YAML: write that, or quotes around it", node)
    try:
        yaml.SafeLoader("").construct_object(node)
    except (ValueError, OverflowError, yaml.YAMLError):
        raise _Problem(f"not YAML: {text[:40]!r} is no {kind}", node) from None
