"""One mixed batch, one forward, one loss: PPO rows, rehearsal rows and the critic (Eq. 2 and 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stable_rlhf.data.encoding import Encoded
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.models.views import response_span, view
from stable_rlhf.ops import PolicyLossConfig
from stable_rlhf.ops.policy.types import Kind
from stable_rlhf.policy.experience import Experience

IGNORED, POLICY, REHEARSAL = map(int, Kind)


@dataclass
class MixedBatch:
    """Rollouts and rehearsal sequences in one padded batch; every per-token tensor is [B, L], aligned with the target
    it speaks of (position t predicts token t+1)."""

    inputs: dict[str, Tensor]
    target: Tensor
    kind: Tensor
    old_logprob: Tensor
    advantage: Tensor
    value: Tensor
    returns: Tensor
    ref_logprob: Tensor
    lengths: Tensor  # [B, 1] tokens of a rollout's response; 1 for rehearsal
    unread: list[tuple[int, Experience]]  # the rows on policy, whose log-probs the forward is to give
    squares: Tensor | None = None  # [2] see watch

    def fill(self, logprob: Tensor) -> None:
        """Give the rollouts on policy the log-probs [B, L] that the forward before their one update found."""
        known = logprob.detach()
        for i, e in self.unread:
            e.old_logprob.copy_(known[i, response_span(e.encoded)])

    def watch(self, gradient: Tensor) -> None:
        """Keep Σ ‖∂loss/∂hidden‖² over the policy's rows and over those of rehearsal: what each term pulls with, at
        next to no cost, since a row belongs to one of them. (By the weights it would take a backward pass a term.)"""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        norms = torch.linalg.vector_norm(gradient, dim=-1, dtype=wide)
        self.squares = torch.stack(
            [torch.where(self.kind == kind, norms, 0.0).square().sum() for kind in (POLICY, REHEARSAL)]
        )


def mix(
    policy: PolicyModel, experiences: Sequence[Experience], rehearsal: Sequence[Encoded], cache: FeatureCache
) -> MixedBatch:
    """Lay out one micro-batch: the rollouts first, then the rehearsal sequences."""
    examples = [e.encoded for e in experiences] + list(rehearsal)
    features = None
    if policy.trunk.lower is not None:
        features = [e.features for e in experiences if e.features is not None]
        features += cache.get(policy.trunk, [e.ids for e in rehearsal]) or []
    inputs, target = view(policy.trunk, examples, features)
    kind = torch.where(target >= 0, POLICY, IGNORED)
    kind[len(experiences) :][target[len(experiences) :] >= 0] = REHEARSAL
    rows = torch.zeros(5, *target.shape, dtype=torch.float32, device="cpu")
    for i, e in enumerate(experiences):
        assert e.advantage is not None and e.returns is not None
        rows[:, i, response_span(e.encoded)] = torch.stack(
            [e.old_logprob, e.advantage, e.value, e.returns, e.ref_logprob]
        )
    lengths = [[len(e.encoded.response)] for e in experiences] + [[1]] * len(rehearsal)
    old_logprob, advantage, value, returns, ref_logprob = rows.to(target.device)
    counts = torch.tensor(lengths, dtype=torch.float32, device=target.device)
    unread = [(i, e) for i, e in enumerate(experiences) if e.on_policy]
    assert len(unread) in (0, len(experiences)), "a micro-batch is on policy, or it is not"
    return MixedBatch(inputs, target, kind, old_logprob, advantage, value, returns, ref_logprob, counts, unread)


def clipped_value_loss(value: Tensor, old_value: Tensor, returns: Tensor, cliprange_value: float) -> Tensor:
    """½ · max((V − R)², (clip(V, V_old ± ε) − R)²), element-wise (Schulman et al., as in PPO's reference code)."""
    clipped = old_value + (value - old_value).clamp(-cliprange_value, cliprange_value)
    return 0.5 * torch.maximum((value - returns) ** 2, (clipped - returns) ** 2)


def mixed_loss(
    engine: Any,
    batch: MixedBatch,
    config: PolicyLossConfig,
    *,
    temperature: float,
    cliprange_value: float,
    vf_coef: float,
    policy_denominator: float,
    rehearsal_denominator: float,
    tokens: float | None = None,
    sequence_means: bool = False,
    grad_scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_PPO + γ · NLL + vf_coef · L_value of one micro-batch, each sum divided by its own global count; L_value is 0
    without a critic.

    ``policy_denominator`` divides L_PPO, a sum over tokens or, with ``sequence_means``, over responses of the mean over
    their tokens. ``tokens``: the mini-batch's policy tokens on all ranks, over which L_value and the metrics are means
    (unset: policy_denominator is their number).

    Summed over micro-steps and ranks, the losses and metrics do not depend on how the batch was cut; ``max_log_ratio``,
    the largest |log π − log π_old|, is a maximum instead. ``grad_scale``: see :func:`linear_policy_loss`. A backward
    pass leaves ``batch.squares``."""
    # Rehearsal text was not sampled at this temperature: its NLL is the model's own.
    temperatures = torch.where(batch.kind == REHEARSAL, 1.0, temperature)
    tokens = policy_denominator if tokens is None else tokens
    arguments: dict[str, Any] = {
        "kind": batch.kind, "old_logprob": None if batch.unread else batch.old_logprob,
        "advantage": batch.advantage, "config": config,
        "policy_denominator": policy_denominator, "rehearsal_denominator": rehearsal_denominator,
        "grad_scale": grad_scale,
    }  # fmt: skip
    if config.kl_coef:
        arguments["ref_logprob"] = batch.ref_logprob
    if sequence_means:
        arguments["row_weight"] = 1 / batch.lengths
    watch = batch.watch if config.rehearsal_coef else None
    result = engine(batch.inputs, batch.target, temperature=temperatures, loss=arguments, watch=watch)
    output = result["output"]
    batch.fill(output.logprob)
    ours = batch.kind == POLICY
    value_loss = torch.zeros((), device=ours.device, dtype=torch.float32)
    if "value" in result:
        error = clipped_value_loss(result["value"], batch.value, batch.returns, cliprange_value)
        value_loss = torch.where(ours, error, 0.0).sum() / tokens
    loss = output.loss + vf_coef * value_loss
    apart = torch.zeros_like(output.logprob) if batch.unread else output.logprob - batch.old_logprob
    share = ours.sum().float() / tokens  # this micro-batch's weight in means over policy tokens
    metrics = {
        "loss": loss.detach(),
        "policy_loss": output.metrics["policy_loss"],
        "rehearsal_loss": output.metrics["rehearsal_loss"],
        "value_loss": value_loss.detach(),
        "clip_fraction": output.metrics["clip_fraction"] * share,
        "approx_kl": output.metrics["approx_kl"] * share,
        "entropy": output.metrics["entropy"] * share,
        "max_log_ratio": torch.where(ours, apart, 0.0).abs().max(),
    }
    return loss, metrics
