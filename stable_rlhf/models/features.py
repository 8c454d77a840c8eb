"""Hidden states of frozen lower blocks, computed once a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stable_rlhf.models.checked import read_tensors
from stable_rlhf.models.trunk import Trunk, length_batches


class FeatureCache:
    """Remembers the lower blocks' hidden states by token ids, so that epochs and models that share frozen lower blocks
    pay for them once. Without a split backbone it holds nothing and costs nothing."""

    def __init__(self) -> None:
        self._store: dict[tuple[int, ...], Tensor] = {}
        self._batches: dict[tuple[tuple[int, ...], ...], list[Tensor]] = {}  # as they were computed, of all stages

    def for_stage(self) -> FeatureCache:
        """An empty cache for a stage of its own, which takes whole batches from this one and adds its own to it.

        How a sequence's hidden states are rounded depends on the batch that they were computed in. So a stage has those
        that it would have if it ran alone, in a run that goes on after the stages before it."""
        cache = FeatureCache()
        cache._batches = self._batches
        return cache

    def fill(self, trunk: Trunk, sequences: Sequence[Sequence[int]], *, description: str = "features") -> None:
        """Compute what is missing, with a progress bar."""
        if trunk.lower is None:
            return
        missing = [s for s in {tuple(s): None for s in sequences} if s not in self._store]
        if not missing:
            return
        from stable_rlhf.show.progress import progress

        batches = length_batches([len(s) for s in missing], trunk.batch_tokens)
        with progress(description, total=sum(len(s) for s in missing), unit="tokens") as bar:
            for rows in batches:
                chunk = tuple(missing[i] for i in rows)
                if chunk not in self._batches:
                    self._batches[chunk] = trunk.features(chunk)
                self._store |= zip(chunk, self._batches[chunk], strict=True)
                bar.advance(sum(len(s) for s in chunk))

    def get(self, trunk: Trunk, sequences: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """The hidden states of these sequences, in the type of the trunk's lower blocks, whoever filled them in; what
        is missing is computed."""
        if trunk.lower is None:
            return None
        self.fill(trunk, sequences)
        dtype = next(trunk.lower.parameters()).dtype
        return [self._store[tuple(s)].to(dtype) for s in sequences]

    def save(self, path: Path) -> None:
        """Write all hidden states to a safetensors file."""
        from safetensors.torch import save_file

        ids = torch.tensor([i for sequence in self._store for i in sequence], dtype=torch.int32, device="cpu")
        lengths = torch.tensor([len(sequence) for sequence in self._store], dtype=torch.int64, device="cpu")
        save_file({"ids": ids, "lengths": lengths, "hidden": torch.cat(list(self._store.values()))}, path)

    def load(self, path: Path, device: str | torch.device = "cpu") -> None:
        """Take up what :meth:`save` wrote, of the same model split at the same block."""
        tensors = read_tensors(path, device)
        lengths = tensors["lengths"].tolist()
        sequences = tensors["ids"].split(lengths)
        hidden = tensors["hidden"].split(lengths)
        self._store |= {tuple(s.tolist()): h for s, h in zip(sequences, hidden, strict=True)}


def share_lower(first: Trunk, second: Trunk) -> bool:
    """True when both trunks stand on equal frozen lower blocks (compared weight by weight): features can be shared."""
    if first.lower is None or second.lower is None or first.num_trainable_layers != second.num_trainable_layers:
        return False
    if first.lower is second.lower:
        return True
    weights, others = first.lower.state_dict(), second.lower.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[k], others[k]) for k in weights)
