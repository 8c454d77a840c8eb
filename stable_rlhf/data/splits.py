"""Splits of a data set that never put one prompt on both sides."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Protocol, TypeVar

from stable_rlhf.data.records import Prompt, as_messages


class HasPrompt(Protocol):
    @property
    def prompt(self) -> Prompt: ...


Row = TypeVar("Row", bound=HasPrompt)


def prompt_key(prompt: Prompt) -> str:
    """A string equal for equal prompts; a plain text equals the chat with this text as its only user turn."""
    return json.dumps([[message["role"], message["content"]] for message in as_messages(prompt)])


def split_rows(rows: Sequence[Row], sizes: Sequence[float] | Sequence[int], seed: int) -> list[list[Row]]:
    """Split rows into disjoint lists, with all rows of a prompt in the same list.

    Prompts are put in the order of a hash of (seed, prompt), and each goes with all its rows to the first split that
    has room for them, or to the one with the most room where none has. Which split a prompt falls into thus depends
    on the seed and the set of rows alone, never on their order. Sizes are met exactly when every prompt has one row,
    and to within one prompt's rows otherwise. Inside a split, rows keep the order they came in.

    Args:
        rows: records with a ``prompt``.
        sizes: one size per split, larger than 0: all integers are numbers of rows; otherwise fractions of the rows,
            with a sum of at most 1. Rows beyond the sum are in no split.
        seed: any integer; another seed gives another split.

    Returns:
        One list per size.

    Raises:
        ValueError: sizes are empty, not positive, or ask for more than there is; or a split would stay empty.
    """
    counts = _as_counts(sizes, len(rows))
    # What is in no split is a split too, so that its share of the prompts is drawn in the same way.
    room = [*counts, len(rows) - sum(counts)]
    keys = [prompt_key(row.prompt) for row in rows]
    split_of: dict[str, int] = {}
    for key, size in sorted(Counter(keys).items(), key=lambda item: _seeded_hash(item[0], seed)):
        fitting = (index for index, left in enumerate(room) if left >= size)
        split = next(fitting, max(range(len(room)), key=room.__getitem__))
        room[split] -= size
        split_of[key] = split
    splits: list[list[Row]] = [[] for _ in room]
    for key, row in zip(keys, rows, strict=True):
        splits[split_of[key]].append(row)
    for index, split_list in enumerate(splits[:-1]):
        if not split_list:
            raise ValueError(
                f"split_rows: split {index} of sizes {list(sizes)} would be empty "
                f"({len(rows)} rows, {len(split_of)} different prompts)"
            )
    return splits[:-1]


def _as_counts(sizes: Sequence[float] | Sequence[int], total: int) -> list[int]:
    if not sizes:
        raise ValueError("split_rows: sizes is empty")
    if not all(size > 0 for size in sizes):  # also refuses NaN
        raise ValueError(f"split_rows: sizes must be larger than 0, got {list(sizes)}")
    if all(isinstance(size, int) for size in sizes):
        counts = [int(size) for size in sizes]
        if sum(counts) > total:
            raise ValueError(f"split_rows: sizes {counts} ask for {sum(counts)} rows, there are {total}")
        return counts
    if sum(sizes) > 1 + 1e-9:
        raise ValueError(f"split_rows: fractions {list(sizes)} sum to {sum(sizes):g}, more than 1")
    # Rounding the running sum keeps the total right, which rounding each share does not.
    edges = [0, *(round(edge * total) for edge in accumulate(sizes))]
    return [end - start for start, end in pairwise(edges)]


def _seeded_hash(key: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\n{key}".encode(), digest_size=16).digest()
