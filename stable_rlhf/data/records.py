"""The rows that the trainers work on: comparisons, demonstrations and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, str]
"""One chat turn: ``{"role": "system" | "user" | "assistant", "content": text}``."""

Prompt: TypeAlias = str | list[Message]
"""A prompt as plain text, or as a chat that ends with a user turn."""

LogProbs: TypeAlias = tuple[float, ...]
"""Log-probabilities of one response's tokens in nats, [tokens]."""


class DataError(ValueError):
    """A data file or one of its rows cannot be used; the message names the file, the line and the reason."""


class RowError(DataError):
    """One row cannot be written as tokens; ``on_bad_row: skip`` leaves it out."""


@dataclass(frozen=True)
class PairStrength:
    """What several scorers together think of one pair's label.

    Attributes:
        mean: mean over the scorers of r(x, better) - r(x, worse); below 0 where they would turn the label round.
        std: population standard deviation of the same.
    """

    mean: float
    std: float


@dataclass(frozen=True)
class Comparison:
    """Two or more responses to one prompt, and which of them is better than which.

    Attributes:
        prompt: text, or chat messages that end with a user turn.
        responses: the n >= 2 responses. A response may be the empty string: policies do end at once.
        pairs: (better, worse) indices into ``responses``; responses of equal rank give no pair.
        task: name of the task or skill, if the row has one.
        margin: the bound m(x) > 0 of the advantage loss for this prompt; None means the configured one.
        logprobs: [n][tokens], log-probabilities of the responses' tokens under the policy to be tuned.
        alt_logprobs: [n][K][tokens], the same under K >= 1 other policies. All rows read together have the same K,
            and the K lists of a response have equal lengths, that of ``logprobs`` where it is given.
        strength: of every pair, where it has been measured (scorer/strength.py).
        label_smoothing: of every pair, None for the configured one; rank_margin: of every pair, in units of the score.
            Both are set by scorer/denoise.py, never read from a file.
        source: "file:line" the row was read from.
        meta: the row's other columns, as they were.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    task: str | None = None
    margin: float | None = None
    logprobs: tuple[LogProbs, ...] | None = None
    alt_logprobs: tuple[tuple[LogProbs, ...], ...] | None = None
    strength: tuple[PairStrength, ...] | None = None
    label_smoothing: tuple[float | None, ...] | None = None
    rank_margin: tuple[float, ...] | None = None
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Demonstration:
    """A prompt with a response to imitate (supervised fine-tuning, rehearsal); fields as in `Comparison`."""

    prompt: Prompt
    response: str
    task: str | None = None
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ResponseSet:
    """k >= 2 responses to one prompt, none of them labelled; fields as in `Comparison`."""

    prompt: Prompt
    responses: tuple[str, ...]
    task: str | None = None
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptRow:
    """A prompt to sample responses for; fields as in `Comparison`."""

    prompt: Prompt
    task: str | None = None
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


def as_messages(prompt: Prompt) -> list[Message]:
    """The prompt as chat messages: a plain text becomes one user turn, a chat is returned as it is."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def as_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """The prompt to read: a plain text as it is, a chat as one "role: content" line a message."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
