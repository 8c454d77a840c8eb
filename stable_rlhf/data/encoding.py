"""From text to token ids to padded batches.

Masks and positions are built from lengths, never from token ids, so a padding token that equals EOS is harmless and a
result does not depend on the padding side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from stable_rlhf.data.records import DataError, Prompt, RowError, as_messages
from stable_rlhf.data.templates import render
from stable_rlhf.data.turns import end_of_turn
from stable_rlhf.show.progress import say

IGNORE = -100
_CHARACTERS = 16  # a token: four times what English has, and soon encoded
_LONGEST_WORD = 128  # in characters: longer ones are a single unknown token to WordPiece, while their start is many


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and a response; the response ends with what ends a turn, unless it was cut off."""

    ids: tuple[int, ...]
    prompt_length: int

    @property
    def response(self) -> tuple[int, ...]:
        return self.ids[self.prompt_length :]

    def __len__(self) -> int:
        return len(self.ids)


def encode_prompt(tokenizer: Any, prompt: Prompt, *, source: str = "") -> list[int]:
    """Token ids of a prompt, through the tokenizer's chat template when it has one.

    A string is one user turn. Without a template, the text is taken as it is (messages: contents, joined by newlines;
    that their roles are lost is said once). ``source``: the file and line of the row, for what has to be said of it.

    Raises:
        RowError: the template refuses the prompt, it has no tokens, or one that the model has no embedding of.
    """
    where = f"{source}: " if source else ""
    if tokenizer.chat_template:
        return _embedded(tokenizer, render(tokenizer, as_messages(prompt), source), where)
    if not isinstance(prompt, str) and (len(prompt) > 1 or prompt[0]["role"] != "user"):
        _say_that_roles_are_lost(tokenizer, where)
    text = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt) + "\n"
    ids = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # some tokenizers close every text; the prompt goes on
    if not ids:
        raise RowError(f"{where}the prompt {text!r} has no tokens")
    return _embedded(tokenizer, ids, where)


_told_of_roles: WeakSet[Any] = WeakSet()


def _say_that_roles_are_lost(tokenizer: Any, where: str) -> None:
    if tokenizer in _told_of_roles:
        return
    _told_of_roles.add(tokenizer)
    name = getattr(tokenizer, "name_or_path", "")
    say(
        f"  warning: {where}the tokenizer{f' of {name!r}' if name else ''} has no chat template, so the messages of a "
        "chat are joined by newlines and who says what is lost; give it a chat template if that matters"
    )


def _embedded(tokenizer: Any, ids: list[int], where: str) -> list[int]:
    """The ids, where the model that the tokenizer was loaded for has an embedding of each."""
    rows = getattr(tokenizer, "embedding_rows", None)
    if rows is not None and ids and max(ids) >= rows:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise RowError(f"{where}the token {token!r} (id {max(ids)}) is beyond the {rows} rows of the model's embedding")
    return ids


def encode(tokenizer: Any, prompt: Prompt, response: str, *, finished: bool = True, source: str = "") -> Encoded:
    """Prompt and response with :func:`end_of_turn` at the end, so that even an empty one has a token to be judged at.

    A response that is not ``finished``, cut off at a greatest length, has no end. An empty one then has no token: there
    is nothing to learn or to judge, and whoever asks for unfinished responses has to leave it out. ``source`` and
    errors are as in :func:`encode_prompt`."""
    prompt_ids = encode_prompt(tokenizer, prompt, source=source)
    response_ids = list(tokenizer(response, add_special_tokens=False)["input_ids"]) if response else []
    _embedded(tokenizer, response_ids, f"{source}: " if source else "")
    if finished:
        response_ids.append(end_of_turn(tokenizer))
    return Encoded((*prompt_ids, *response_ids), len(prompt_ids))


def surely_longer(tokenizer: Any, prompt: Prompt, limit: int) -> bool:
    """Whether a text, or a turn of a prompt, has more than ``limit`` tokens by far: a quick no to texts of megabytes, a
    minute of tokenising each. False where only the whole encoding tells.

    Parts from its start that grow are looked at. A part with more than twice the limit, and some for the word that it
    cuts, settles it: what comes after adds tokens, and changes only those near the cut. A part that has fewer, as a run
    of spaces that is one token, settles nothing, however long it is."""
    if isinstance(prompt, list):  # of earlier answers a template may leave parts out
        return any(surely_longer(tokenizer, m["content"], limit) for m in prompt if m["role"] != "assistant")
    text = prompt.strip()  # as some templates do
    size = _CHARACTERS * (limit + _LONGEST_WORD)
    while len(text) > size:
        if len(tokenizer(text[:size], add_special_tokens=False)["input_ids"]) > 2 * limit + _LONGEST_WORD:
            return True
        size *= 8
    return False


def surely_too_long(
    tokenizer: Any, prompt: Prompt, responses: Sequence[str], max_length: int, max_prompt_length: int
) -> bool:
    """:func:`surely_longer` for a prompt or one of its responses, before they are encoded."""
    return surely_longer(tokenizer, prompt, max_prompt_length) or any(
        surely_longer(tokenizer, response, max_length) for response in responses
    )


def fit(examples: Sequence[Encoded], max_length: int, max_prompt_length: int) -> bool:
    """Whether the responses to one prompt, encoded, all have so many tokens at most with it."""
    return examples[0].prompt_length <= max_prompt_length and max(map(len, examples)) <= max_length


Row = TypeVar("Row")
Made = TypeVar("Made")


def encode_rows(
    what: str, rows: Sequence[Row], encode_row: Callable[[Row], Made], on_bad_row: str = "error"
) -> list[tuple[Row, Made]]:
    """Rows with what ``encode_row`` makes of each. One that raises a :class:`RowError` ends it or, with
    ``on_bad_row="skip"``, is left out, and told.

    Raises:
        DataError: no row is left.
    """
    pairs: list[tuple[Row, Made]] = []
    bad: list[RowError] = []
    for row in rows:
        try:
            pairs.append((row, encode_row(row)))
        except RowError as error:
            if on_bad_row != "skip":
                raise
            bad.append(error)
    if bad and not pairs:
        raise DataError(f"{what}: no row is left, all {len(bad)} are bad; the first: {bad[0]}")
    if bad:
        say(f"  {what}: {len(bad)} bad rows left out, the first: {bad[0]}")
    return pairs


@dataclass(frozen=True)
class PaddedBatch:
    """``input_ids``, ``attention_mask``, ``position_ids``: [B, L] int64; padding has mask 0."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor

    def as_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "position_ids": self.position_ids}


def pad_sequences(
    sequences: Sequence[Sequence[int]], *, side: str = "right", pad_token_id: int = 0, device: Any = None
) -> PaddedBatch:
    """Pad token ids to one rectangle. ``side`` is ``"right"`` (training) or ``"left"`` (generation)."""
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    if not sequences or min(len(s) for s in sequences) == 0:
        raise ValueError("sequences: at least one, each with at least one token")
    longest = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), longest), pad_token_id, dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        where = slice(0, len(sequence)) if side == "right" else slice(longest - len(sequence), longest)
        ids[i, where] = torch.tensor(sequence, dtype=torch.int64, device="cpu")
        mask[i, where] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return PaddedBatch(ids.to(device), mask.to(device), positions.to(device))


def last_positions(attention_mask: Tensor, lengths: Sequence[int] | Tensor) -> Tensor:
    """Column of each row's token number ``lengths[i] - 1``, whatever side the padding is on: [B] int64."""
    lengths = torch.as_tensor(lengths, device=attention_mask.device, dtype=torch.int64)
    first = attention_mask.argmax(1)  # the first real column
    return first + lengths - 1


def response_targets(examples: Sequence[Encoded], length: int, device: Any = None) -> Tensor:
    """Next-token targets [B, length] of right-padded rows: position t holds token t+1 where that is a response token,
    and ``IGNORE`` elsewhere."""
    target = torch.full((len(examples), length), IGNORE, dtype=torch.int64, device="cpu")
    for i, example in enumerate(examples):
        start = example.prompt_length - 1
        target[i, start : start + len(example.response)] = torch.tensor(
            example.response, dtype=torch.int64, device="cpu"
        )
    return target.to(device)
