"""Every public operation with small inputs of fixed bits: for tests of what all of them have to keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import stable_rlhf.ops as ops
from stable_rlhf.ops import PolicyLossConfig


@dataclass(frozen=True)
class Case:
    """`call(*leaves)` gives outputs, of which the first `losses` are differentiable in every leaf."""

    op: str
    leaves: tuple[Tensor, ...]
    call: Callable[..., tuple[Tensor, ...]]
    losses: int = 1


def run(case: Case, function: Callable[..., tuple[Tensor, ...]] | None = None) -> list[Tensor]:
    """The outputs, and the gradients by the leaves of the differentiable ones with fixed upstream gradients."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in case.leaves]
    made = (function or case.call)(*leaves)
    if case.losses:
        torch.autograd.backward([2.0 * x.sum() for x in made[: case.losses]])
    return [x.detach() for x in made] + [leaf.grad for leaf in leaves if case.losses]


def cases() -> dict[str, Case]:
    g = torch.Generator(device="cpu").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float32, device="cpu").to(dtype)

    def whole(*values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device="cpu")

    target, kind = whole(0, 16, -100, 3, 5, 9, 4, 1), whole(1, 2, 1, 0, 1, 2, 1, 1)
    hidden, weight, bias, logits = normal(8, 5), normal(17, 5), normal(17), normal(8, 17)
    old, advantage, reference = normal(8) - 2.8, normal(8), normal(8) - 2.8
    row_weight, temperature = normal(8).abs(), normal(8).abs() + 0.5
    config = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.01, softcap=4.0, dual_clip=3.0)
    per_row: dict[str, Any] = {
        "old_logprob": old, "advantage": advantage, "ref_logprob": reference, "row_weight": row_weight,
        "temperature": temperature, "config": config,
    }  # fmt: skip

    def policy(out: ops.PolicyLossOutput) -> tuple[Tensor, ...]:
        return out.loss, out.logprob, out.entropy, *out.metrics.values()

    def linear(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return policy(ops.linear_policy_loss(h, w, target, kind, bias=b, workspace_bytes=300, **per_row))

    def plain(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        given = {"old_logprob": old, "advantage": advantage, "grad_tolerance": 0.1, "grad_scale": 4.0}
        return policy(ops.linear_policy_loss(h, w, target, **given))

    def by_sequence(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        config = PolicyLossConfig(kl_coef=0.1, kl_unbiased=True, entropy_coef=0.01, importance_level="sequence")
        options = {**per_row, "config": config, "cu_seqlens": whole(0, 3, 8), "entropy_denominator": 3.0}
        return policy(ops.linear_policy_loss(h, w, target, kind, workspace_bytes=300, **options))

    def from_logprobs(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        config = PolicyLossConfig(kl_coef=0.1, kl_estimator="k3+", entropy_coef=0.01, objective="cispo")
        options = {name: per_row[name] for name in ("old_logprob", "advantage", "ref_logprob", "row_weight")}
        return policy(ops.logprob_policy_loss(x, kind, entropy=y, config=config, **options))

    def from_logits(z: Tensor) -> tuple[Tensor, ...]:
        return policy(ops.policy_loss(z, target, kind, **per_row))

    def logprob(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        made = ops.linear_logprob(h, w, target, entropy=True, temperature=0.7, softcap=3.0, workspace_bytes=300)
        assert made[1] is not None
        return made[0], made[1]

    reward, expected, responses = normal(6), normal(3), whole(0, 3, 4, 5, 9, 11, 15)
    ours, theirs = -normal(15).abs(), -normal(2, 15).abs()
    packed: dict[str, Any] = {"logprob": ours, "alt_logprob": theirs, "cu_seqlens": responses}

    def halves(r: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.advantage_loss(r, margin=None))

    def am(r: Tensor, e: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            ops.advantage_loss(
                r, e, pairs=whole([0, 1], [2, 1], [5, 4]), prompt=whole(0, 0, 0, 1, 2, 2), label_smoothing=0.1, **packed
            )
        )

    def score(r: Tensor, e: Tensor) -> tuple[Tensor, ...]:
        return (ops.advantage_score(r, e, prompt=whole(0, 0, 0, 1, 2, 2), **packed),)

    a, b, prototypes = normal(7, 4), normal(7, 4), normal(5, 4)
    value, bounds = normal(15), whole(0, 4, 4, 15)
    cluster = whole(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2)
    return {
        "linear_policy_loss": Case("linear_policy_loss", (hidden, weight, bias), linear),
        "linear_policy_loss by columns": Case("linear_policy_loss", (hidden, weight), plain),
        "linear_policy_loss in 16 bits": Case("linear_policy_loss", (hidden.bfloat16(), weight.bfloat16()), plain),
        "linear_policy_loss by sequence": Case("linear_policy_loss", (hidden, weight), by_sequence),
        "policy_loss": Case("policy_loss", (logits,), from_logits),
        "logprob_policy_loss": Case("logprob_policy_loss", (-normal(8).abs(), normal(8).abs()), from_logprobs),
        "linear_logprob": Case("linear_logprob", (hidden, weight), logprob, 2),
        "linear_logprob in float64": Case("linear_logprob", (hidden.double(), weight.double()), logprob, 2),
        "advantage_loss": Case("advantage_loss", (reward, expected), am),
        "advantage_loss of halves": Case("advantage_loss", (reward,), halves),
        "advantage_score": Case("advantage_score", (reward, expected), score),
        "info_nce": Case("info_nce", (a, b), lambda x, y: (ops.info_nce(x, y),)),
        "swav_loss": Case("swav_loss", (a, b, prototypes), lambda x, y, p: (ops.swav_loss(x, y, p),)),
        "gae": Case("gae", (ours, value), lambda r, v: ops.gae(r, v, bounds, gamma=0.9), 0),
        "masked_whiten": Case("masked_whiten", (value,), lambda x: (ops.masked_whiten(x, cluster),), 0),
        "token_rewards": Case(
            "token_rewards",
            (ours, theirs[0]),
            lambda x, y: (ops.token_rewards(x, y, reward, whole(0, 1, 4, 5, 9, 11, 15),
                                            kl_coef=0.1, kl_estimator="k3"),),
            0,
        ),
        "topk_by_cluster": Case("topk_by_cluster", (value,), lambda s: (ops.topk_by_cluster(s, cluster, 3, 2),), 0),
    }  # fmt: skip


CASES = cases()
