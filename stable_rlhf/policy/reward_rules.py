"""Rewards that need no model: the last number of an answer, a regular expression, and length."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from stable_rlhf.settings.stages import EXACT_NUMBER, LENGTH, REGEX, RewardArguments

# A sign counts where it is no minus between two numbers, and groups of three digits are one number.
_NUMBER = re.compile(
    r"(?:(?<![\w).,])([-+−]))?[$€£]?([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
)
_MARK = "####"  # GSM8K's answers end with it and the number


def last_number(text: str) -> Decimal | None:
    """The number after the last ``####``, without one the last of the text; None: there is none. ``1,000.0`` is 1000,
    and signs of currency are passed over."""
    _, mark, marked = text.rpartition(_MARK)
    found = (_NUMBER.findall(marked)[:1] if mark else []) or _NUMBER.findall(text)[-1:]
    if not found:
        return None
    sign, digits = found[0]
    value = Decimal(digits.replace(",", ""))
    return -value if sign in ("-", "−") else value


def built_in(name: str, arguments: RewardArguments, max_new_tokens: int) -> Callable[..., Any] | None:
    """The built-in reward of a name, as a function like a user's; None: there is no such one."""
    make = {EXACT_NUMBER: _exact_number, REGEX: _regex, LENGTH: _length}.get(name)
    return None if make is None else make(arguments, max_new_tokens)


def _exact_number(arguments: RewardArguments, max_new_tokens: int) -> Callable[..., Any]:
    column = arguments.answer

    def exact_number(responses: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """1 where the response's last number is the answer's, else 0; a row without a number in its answer: None."""
        answers = columns.get(column, [None] * len(responses))
        wanted = [None if answer is None else last_number(str(answer)) for answer in answers]
        return [
            None if want is None else float(last_number(response) == want)
            for response, want in zip(responses, wanted, strict=True)
        ]

    return exact_number


def _regex(arguments: RewardArguments, max_new_tokens: int) -> Callable[..., Any]:
    pattern = re.compile(arguments.pattern or "")

    def regex(responses: Sequence[str]) -> list[float]:
        """1 where the pattern is found in the response, else 0."""
        return [float(pattern.search(response) is not None) for response in responses]

    return regex


def _length(arguments: RewardArguments, max_new_tokens: int) -> Callable[..., Any]:
    def length(completion_ids: Sequence[Sequence[int]]) -> list[float]:
        """The response's tokens as a share of the most it may have; a weight below 0 makes responses short."""
        return [len(ids) / max_new_tokens for ids in completion_ids]

    return length
