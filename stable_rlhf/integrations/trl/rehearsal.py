"""Rehearsal rows for a TRL trainer: TRL's data formats to token ids, and which rows come when."""

from __future__ import annotations

import json
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """A tokenised example, from which token on it is learnt, and which tokens are, where that is not all of them."""

    ids: list[int]
    first: int
    mask: list[int] | None = None


class RehearsalRows:
    """A data set in a random order, anew in each epoch, cut into batches that depend on their number alone: so a run
    that is resumed goes on where it was.

    Examples are in TRL's formats: ``prompt`` and ``completion`` (which is learnt), or ``messages`` or ``text`` (all of
    which is); strings or conversations; or ``input_ids`` with ``completion_mask``.
    """

    def __init__(self, dataset: Any, processing_class: Any, seed: int) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and len(dataset)):
            raise ValueError(
                f"rehearsal_dataset: takes a data set with a length and rows, got {type(dataset).__name__}"
                f"{' of no row' if hasattr(dataset, '__len__') and not len(dataset) else ''}"
            )
        self._dataset, self._seed = dataset, seed
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64, device="cpu")
        encode(dataset[0], self._tokenizer)  # an unknown format is told before the first step

    def batch(self, number: int, size: int) -> list[Row]:
        """Batch ``number`` of batches of ``size`` rows."""
        return [self._row(i) for i in range(number * size, (number + 1) * size)]

    def _row(self, i: int) -> Row:
        epoch, place = divmod(i, len(self._dataset))
        if epoch != self._epoch:
            generator = torch.Generator(device="cpu").manual_seed(self._seed + epoch)
            count = len(self._dataset)
            self._epoch = epoch
            self._order = torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")
        return encode(self._dataset[int(self._order[place])], self._tokenizer)


def encode(example: dict[str, Any], tokenizer: Any) -> Row:
    """
    Raises:
        ValueError: the example has none of the known formats, or nothing to learn.
    """
    from trl.data_utils import apply_chat_template, is_conversational

    if "input_ids" in example:
        ids, mask = (_listed(example[name]) if example.get(name) is not None else None for name in _TOKENS)
        assert ids is not None
        first = 0 if mask is None else mask.index(1) if 1 in mask else len(ids)
        return _checked(Row(ids, first, mask), example)
    talk = is_conversational(example)
    if talk:
        tools = example.get("tools")
        example = apply_chat_template(
            {k: v for k, v in example.items() if k in _FIELDS}, tokenizer,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
        )  # fmt: skip
    if not {"text"} <= {*example} and not {"prompt", "completion"} <= {*example}:
        raise ValueError(
            "rehearsal_dataset: rows hold prompt and completion, messages, text, or input_ids; these hold "
            + ", ".join(example)
        )
    before, after = (example["prompt"], example["completion"]) if "prompt" in example else ("", example["text"])
    end = "" if talk or after.endswith(tokenizer.eos_token or "") else tokenizer.eos_token
    ids = tokenizer(text=before + after + end, add_special_tokens=not talk)["input_ids"]
    alone = tokenizer(text=before, add_special_tokens=not talk)["input_ids"] if before else []
    same = takewhile(lambda pair: pair[0] == pair[1], zip(alone, ids, strict=False))  # tokens may join over the border
    return _checked(Row(ids, sum(1 for _ in same)), example)


def _listed(values: Any) -> list[int]:
    """Of a data set in any format, numpy's and torch's too."""
    return list(values.tolist() if hasattr(values, "tolist") else values)


_TOKENS = ("input_ids", "completion_mask")
_FIELDS = ("prompt", "completion", "messages", "chat_template_kwargs")


def _checked(row: Row, example: dict[str, Any]) -> Row:
    if row.mask is not None and len(row.mask) != len(row.ids):
        raise ValueError(f"rehearsal_dataset: {len(row.ids)} input_ids have {len(row.mask)} of completion_mask")
    if max(row.first, 1) >= len(row.ids) or (row.mask is not None and not any(row.mask[1:])):
        raise ValueError(f"rehearsal_dataset: a row has nothing to learn: {str(example)[:80]}")
    return row


def padded(rows: list[Row], pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and targets [R, L], padded on the right; targets are shifted, -100 where nothing is
    learnt."""
    ids = torch.full((len(rows), max(len(row.ids) for row in rows)), pad, dtype=torch.int64, device="cpu")
    mask, target = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row.ids, dtype=torch.int64, device="cpu")
        learnt = slice(max(row.first, 1) - 1, len(row.ids) - 1)
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        target[i, learnt] = tokens[1:][learnt]
        if row.mask is not None:
            kept = torch.tensor(row.mask[1:], dtype=torch.bool, device="cpu")
            target[i, : len(kept)].masked_fill_(~kept, -100)
    return ids.to(device), mask.to(device), target.to(device)
