"""A head whose vocabulary is split over the ranks of a process group: each holds consecutive rows of the weight.

The ranks combine three numbers a row (largest logit, sum of exponentials, its first moment) and the target's logit;
each then makes the gradient of its own slice, and the hidden gradient is summed over the ranks.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from stable_rlhf.ops.groups import resolve_group
from stable_rlhf.ops.policy.formula import RowState, Terms, coefficients
from stable_rlhf.ops.policy.types import PolicyLossConfig


class SplitVocabulary:
    """The row kernels of one rank, with statistics over the whole vocabulary.

    Stands in for a module of row kernels (`ops.policy.cpu`, `kernels.policy`). Every rank calls with the same rows and
    chunks.
    """

    def __init__(self, kernels: ModuleType, name: str, width: int, device: torch.device) -> None:
        self.kernels = kernels
        self.group = resolve_group(name)
        widths = torch.zeros(dist.get_world_size(self.group), dtype=torch.int64, device=device)
        widths[dist.get_rank(self.group)] = width
        dist.all_reduce(widths, group=self.group)
        self.offset = int(widths[: dist.get_rank(self.group)].sum())
        self.vocabulary = int(widths.sum())
        self.widest = int(widths.max())  # every rank cuts chunks for this one, so that they meet in every collective

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        dist.all_reduce(value, group=self.group)
        return value

    def _local(self, state: RowState) -> RowState:
        """The state with the target's place in this rank's slice; a place outside of it stands for elsewhere."""
        fields = dict(vars(state))
        fields["target"] = state.target - self.offset
        return RowState(**fields)

    def statistics(self, logits: Tensor, state: RowState, softcap: float | None, *, row: Tensor | None = None) -> None:
        weighted, target_logit = torch.zeros_like(state.max), torch.zeros_like(state.max)
        local = self._local(state)
        self.kernels.statistics(logits, local, softcap, row=row, weighted=weighted, target_logit=target_logit)
        here = (local.target >= 0) & (local.target < logits.shape[1])
        largest = state.max.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        below = state.max - largest
        mass = torch.exp(state.log_sum + below)
        sums = torch.stack([mass, mass * (weighted + below), torch.where(here, target_logit + below, 0.0)])
        dist.all_reduce(sums, group=self.group)
        log_sum = sums[0].log()
        state.max.copy_(largest)
        state.log_sum.copy_(log_sum)
        state.entropy.copy_(log_sum - sums[1] / sums[0])
        state.logprob.copy_(sums[2] - log_sum)

    def policy(
        self,
        logits: Tensor,
        gradient: Tensor,
        state: RowState,
        kind: Tensor,
        terms: Terms,
        config: PolicyLossConfig,
        *,
        row: Tensor | None = None,
        compact: bool = True,
    ) -> None:
        self.statistics(logits, state, config.softcap, row=row)
        by_logprob, by_entropy = coefficients(kind, state.logprob, terms, config)
        state.coefficient.copy_(by_logprob)
        state.entropy_coefficient.copy_(by_entropy)
        self.given(logits, gradient, state, config.softcap, row=row)

    def given(
        self, logits: Tensor, gradient: Tensor, state: RowState, softcap: float | None, *, row: Tensor | None = None
    ) -> None:
        self.kernels.given(logits, gradient, self._local(state), softcap, row=row)
