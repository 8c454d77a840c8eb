"""What a policy says of the tokens of responses: sequences laid out with their targets, and one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from stable_rlhf.data.encoding import Encoded, response_targets
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.trunk import Trunk

_Row = TypeVar("_Row")
Policy = Callable[..., dict[str, Any]]  # a PolicyModel, or an engine around one


class View(NamedTuple):
    """A padded batch as a policy's forward takes it: the trunk's inputs, and [B, L] the response token that each
    position predicts, -1 elsewhere."""

    inputs: dict[str, Tensor]
    target: Tensor


def view(trunk: Trunk, examples: Sequence[Encoded], features: list[Tensor] | None = None) -> View:
    """Lay ``examples`` out; ``features``: their lower blocks' hidden states, where they are known."""
    inputs = trunk.inputs([e.ids for e in examples], features=features)
    return View(inputs, response_targets(examples, inputs["attention_mask"].shape[1], trunk.device))


def response_span(example: Encoded) -> slice:
    """Where a view's row speaks of the response's tokens: one place before each."""
    return slice(example.prompt_length - 1, example.prompt_length - 1 + len(example.response))


def chunks(rows: Sequence[_Row], per_batch: int) -> Iterator[Sequence[_Row]]:
    """Batches in the order given, not sorted by length: under ZeRO-3 every rank runs the same number of forwards."""
    return (rows[start : start + per_batch] for start in range(0, len(rows), per_batch))


@torch.no_grad()
def response_logprobs(policy: PolicyModel, examples: Sequence[Encoded], *, temperature: float = 1.0) -> list[Tensor]:
    """Log-probs of each response's tokens under ``policy``: [n] of [tokens] float32 on the CPU."""
    logprob = policy(*view(policy.trunk, examples), temperature=temperature)["logprob"].cpu()
    return [row[response_span(e)] for row, e in zip(logprob, examples, strict=True)]


@torch.no_grad()
def mean_entropies(policy: PolicyModel, examples: Sequence[Encoded], per_batch: int = 16) -> list[float]:
    """Mean entropy (nats) of the policy over each response's tokens."""
    entropies: list[float] = []
    for chunk in chunks(examples, per_batch):
        inputs, target = view(policy.trunk, chunk)
        entropy = policy(inputs, target, entropy=True)["entropy"]
        entropies += (entropy.sum(1) / (target >= 0).sum(1)).tolist()
    return entropies


@torch.no_grad()
def summed_log_ratio(policy: Policy, reference: Policy, seen: View, by_reference: View | None = None,
                     *, temperature: float = 1.0) -> float:  # fmt: skip
    """Sum over a batch's response tokens of log π − log π_ref; ``by_reference``: the batch as the reference reads it,
    where that is another than ``seen``."""
    logprob = policy(*seen, temperature=temperature)["logprob"]
    return float((logprob - reference(*(by_reference or seen), temperature=temperature)["logprob"]).sum())
