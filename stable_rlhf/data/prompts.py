"""Prompts as token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stable_rlhf.data.encoding import encode_rows
from stable_rlhf.data.records import DataError, PromptRow
from stable_rlhf.show.progress import say


@dataclass(frozen=True)
class EncodedPrompt:
    row: PromptRow
    ids: list[int]


def encode_prompts(
    rows: Sequence[PromptRow], encode_one: Callable[[PromptRow], list[int] | None], max_prompt_length: int,
    on_bad_row: str = "error",
) -> list[EncodedPrompt]:  # fmt: skip
    """Encode prompts; those that are too long are left out and counted. ``encode_one`` may give None for them."""
    encoded = encode_rows("prompts", rows, encode_one, on_bad_row)
    kept = [EncodedPrompt(row, ids) for row, ids in encoded if ids is not None and len(ids) <= max_prompt_length]
    if not kept:
        raise DataError(f"none of {len(rows)} prompts fits max_prompt_length {max_prompt_length}")
    if len(kept) < len(encoded):
        say(f"  {len(encoded) - len(kept)} of {len(encoded)} prompts have over {max_prompt_length} tokens: left out")
    return kept
