"""What a setting may be, said beside it as ``Annotated`` types, and the one function that checks it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """The finite numbers that a setting takes, both ends included.

    Args:
        low: The smallest.
        high: The largest.
        without_low: ``low`` itself is too small.
        without_high: ``high`` itself is too large.
        or_zero: 0 is taken as well, which then has a meaning of its own.
    """

    low: float
    high: float
    without_low: bool = False
    without_high: bool = False
    or_zero: bool = False

    def __post_init__(self) -> None:
        if not -math.inf < self.low <= self.high < math.inf:
            raise ValueError(f"a range has two finite ends, the lower one first, not {self.low} and {self.high}")

    def refuses(self, value: float) -> str:
        """What is wrong with ``value``, in words, or nothing."""
        if (
            self.low < value < self.high
            or (value == self.low and not self.without_low)
            or (value == self.high and not self.without_high)
            or (self.or_zero and value == 0)
        ):
            return ""
        low, high = (f"{end:g}" if abs(end) < 1e5 else _short(end) for end in (self.low, self.high))
        if self.or_zero:
            return f"must be 0, or between {low} and {high}"
        if (self.low, self.high) == (0, 1):
            past = f"above {low}" if self.without_low else f"below {high}" if self.without_high else ""
            return f"must be between {low} and {high}" + (f", and {past}" if past else "")
        if value <= self.low:
            return f"must be {'above' if self.without_low else 'at least'} {low}"
        return f"must be {'below' if self.without_high else 'at most'} {high}"


class UserPath:
    """Marks the name of a file or folder: a leading ``~`` is the user's home."""


# One name a kind of number. The upper ends are far above what anybody needs, and below what overflows, hangs or takes
# all memory before the first step.
Count = Annotated[int, Range(1, 10**9)]
CountOrNone = Annotated[int, Range(0, 10**9)]  # 0: none, all, or never
Rows = Annotated[int, Range(1, 10**6)]  # that are in memory at the same time
Tokens = Annotated[int, Range(1, 10**7)]
Width = Annotated[int, Range(1, 10**5)]  # of a layer, or how many layers
WidthOrNone = Annotated[int, Range(0, 10**5)]
Workers = Annotated[int, Range(1, 10**4)]
Device = Annotated[int, Range(0, 10**4)]
Port = Annotated[int, Range(1, 65535)]
Mebibytes = Annotated[int, Range(1, 10**7)]
Seed = Annotated[int, Range(0, 10**12)]  # seeds made of it stay below 2^63
Epochs = Annotated[float, Range(0, 10**5, without_low=True)]
LearningRate = Annotated[float, Range(0, 1000)]
Coefficient = Annotated[float, Range(0, 10**6)]
Grace = Annotated[float, Range(0, 10**6)]  # seconds
Minutes = Annotated[float, Range(0, 10**6)]
Positive = Annotated[float, Range(0, 10**6, without_low=True)]
Timeout = Annotated[float, Range(0, 24 * 3600, without_low=True)]  # seconds
Number = Annotated[float, Range(-(10**6), 10**6)]
Threshold = Annotated[float, Range(-1e12, 1e12)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, without_high=True)]
PositiveShare = Annotated[float, Range(0, 1, without_low=True)]
InnerShare = Annotated[float, Range(0.01, 0.99)]  # of two parts, neither of which is all
# Logits are divided by it: by much less than this they are infinite.
Temperature = Annotated[float, Range(1e-4, 10**4)]
TemperatureOrGreedy = Annotated[float, Range(1e-4, 10**4, or_zero=True)]
# Of a folder, or the name of a model on a hub.
PathName = Annotated[str, UserPath()]


def expand_paths(settings: Any) -> None:
    """For ``__post_init__`` of a settings class: in what is marked as a path, a leading ``~`` is the user's home."""
    kind: Any = type(settings)
    for name, hint in hints(kind).items():
        setattr(settings, name, _expanded(hint, getattr(settings, name)))


@cache
def hints(settings: Any) -> dict[str, Any]:
    """The types of a settings class by field, with their ranges and marks."""
    types = get_type_hints(settings, include_extras=True)
    return {field.name: types[field.name] for field in fields(settings)}


def leaves(settings: Any, within: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting's dotted name and type, those of sections of settings included."""
    for name, hint in hints(settings).items():
        if is_dataclass(hint):
            yield from leaves(hint, f"{within}{name}.")
        else:
            yield f"{within}{name}", hint


def check_settings(settings: Any, within: str = "") -> None:
    """Refuse a setting of another type, a number outside its range or that is not finite, and text that no file can
    hold.

    Raises:
        ValueError: names the setting, what it takes and what it got.
    """
    kind: Any = type(settings)
    for name, hint in hints(kind).items():
        value = getattr(settings, name)
        if is_dataclass(hint):
            check_settings(value, f"{within}{name}.")
        elif wrong := _wrong(hint, value, f"{within}{name}"):
            raise ValueError(wrong)


def expand_user(path: str) -> str:
    """The path with the user's home for a leading ``~``, as a shell would write it."""
    return os.path.expanduser(path)


def is_text(hint: Any) -> bool:
    """Whether a type is text, or text and nothing."""
    if get_origin(hint) is Annotated:
        return is_text(get_args(hint)[0])
    return hint is str or (get_origin(hint) in (Union, UnionType) and any(map(is_text, get_args(hint))))


def paths_in(hint: Any) -> bool:
    """Whether a type is a path or a list of them."""
    return _mark(hint, UserPath) is not None or any(paths_in(part) for part in get_args(hint))


def _mark(hint: Any, kind: type) -> Any:
    marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, kind)), None)


def _expanded(hint: Any, value: Any) -> Any:
    if not paths_in(hint):
        return value
    if isinstance(value, str):
        return expand_user(value)
    return [_expanded(get_args(hint)[0], item) for item in value] if isinstance(value, list) else value


def _wrong(hint: Any, value: Any, name: str) -> str:
    """What is wrong with one setting's value, in one line, or nothing."""
    if get_origin(hint) is Annotated:
        plain = get_args(hint)[0]
        if wrong := _wrong(plain, value, name):
            return wrong
        if (limits := _mark(hint, Range)) and (words := limits.refuses(value)):
            return f"{name} {words}, got {_short(value)}"
        if _mark(hint, UserPath):
            if not value or "\0" in value:
                return f"{name}: {value!r} is not the name of a file or folder"
            if value.startswith("~"):
                return f"{name}: {value!r}: there is no such user (a name that begins with ~ is written ./~)"
        return ""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    fitting = [option for option in options if _is_a(option, value)]
    if not fitting:
        words = " or ".join(dict.fromkeys(_in_words(option) for option in options))
        return f"{name}: expected {words}, got {_short(value)}"
    if get_origin(hint) in (Union, UnionType):
        return _wrong(fitting[0], value, name)
    if get_origin(hint) is list:
        return _first(_wrong(get_args(hint)[0], item, name) for item in value)
    if get_origin(hint) is dict:
        of_keys, of_values = get_args(hint)
        keys = _first(_wrong(of_keys, key, name) for key in value)
        return keys or _first(_wrong(of_values, item, f"{name}.{key}") for key, item in value.items())
    return unwritable(value, name)


def unwritable(value: Any, name: str) -> str:
    """What in a value of any type could not be written as JSON in UTF-8, or nothing."""
    if isinstance(value, str):
        if not any("\ud800" <= letter <= "\udfff" for letter in value):
            return ""
        try:  # of a command line whose locale cannot read it
            text = value.encode("ascii", "surrogateescape").decode("utf-8")
        except UnicodeError:
            return f"{name}: not UTF-8: {value!r}"
        return f"{name}: {text!r} cannot be read in this locale; set LC_ALL=C.UTF-8, or PYTHONUTF8=1"
    if isinstance(value, int | NoneType):
        return ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else f"{name} must be a finite number, got {value}"
    if isinstance(value, list | tuple):
        return _first(unwritable(item, name) for item in value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return _first(unwritable(key, name) or unwritable(item, f"{name}.{key}") for key, item in value.items())
    return f"{name}: expected numbers, text, lists and mappings by name, got {_short(value)}"


def _first(problems: Iterator[str]) -> str:
    return next(filter(None, problems), "")


def _is_a(hint: Any, value: Any) -> bool:
    origin = get_origin(hint)
    if origin is Annotated:
        return _is_a(get_args(hint)[0], value)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(hint))
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or isinstance(value, origin or hint)


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null",
          list: "a list", dict: "a mapping"}  # fmt: skip


def _in_words(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Annotated:
        return _in_words(get_args(hint)[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    return _WORDS.get(origin or hint, str(hint))


def _short(value: Any) -> str:
    """A value as Python writes it, a long one cut."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} characters)"
