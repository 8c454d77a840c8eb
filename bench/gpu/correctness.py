"""Fixed cases against plain PyTorch in float64, on the card itself: results and gradients.

An error counts as too large beyond half as much again as that of plain PyTorch at the same type (few rows: the tests
hold more of them to a quarter), or beyond what rounding of the result alone can explain, whichever is more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import stable_rlhf.ops as ops
from bench.gpu.plan import Plan, Row
from bench.ops.accuracy import relative_error
from stable_rlhf.ops import PolicyLossConfig

FLOORS = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
CUT_OFF = 2  # times, where Triton's interpreter cuts a float32 off to bfloat16 instead of rounding it
SMALLER = 16  # times, where every operation is run slowly
BF16, FP32 = torch.bfloat16, torch.float32


class Inputs(NamedTuple):
    """`call(*leaves)` gives outputs, of which the first `losses` have gradients in every leaf."""

    leaves: tuple[Tensor, ...]
    call: Callable[..., tuple[Tensor, ...]]
    losses: int = 1


Make = Callable[[torch.device, int], Inputs]  # of a device, and a number that sizes are divided by


def _normal(device: torch.device, seed: int) -> Callable[..., Tensor]:
    g = torch.Generator(device="cpu").manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g, device="cpu").to(device)


def _linear(dtype: torch.dtype, vocabulary: int, chunks: int, everything: bool = False, **more: Any) -> Make:
    def make(device: torch.device, smaller: int) -> Inputs:
        normal, rows, width = _normal(device, vocabulary), 320 // smaller, 64
        v = vocabulary // smaller | (vocabulary & 1)  # odd stays odd
        hidden, weight = normal(rows, width).to(dtype), (normal(v, width) * 0.4).to(dtype)
        target = (normal(rows).abs() * 1e4).long() % v
        kind = torch.arange(rows, device=device) * 7 % 4 % 3  # two rows of no kind, then one of each
        given: dict[str, Any] = {"old_logprob": normal(rows) * 0.3 - 6.0, "advantage": normal(rows)}
        if everything:
            config = PolicyLossConfig(kl_coef=0.1, kl_estimator="k3", entropy_coef=0.01, softcap=9.0, dual_clip=3.0)
            given |= {"ref_logprob": normal(rows) * 0.3 - 6.0, "row_weight": normal(rows).abs(), "config": config,
                      "temperature": normal(rows).abs() + 0.5}  # fmt: skip
        room = -(-rows // chunks) * (v + 8) * 4

        def call(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            wide = {} if h.dtype == torch.float64 else more
            out = ops.linear_policy_loss(h, w, target, kind, workspace_bytes=room, **given, **wide)
            return out.loss, out.logprob, out.entropy

        return Inputs((hidden, weight), call)

    return make


def _logits(device: torch.device, smaller: int) -> Inputs:
    normal, rows, v = _normal(device, 5), 320 // smaller, 9001 // smaller
    target, old, advantage = (normal(rows).abs() * 1e4).long() % v, normal(rows) - 6.0, normal(rows)

    def call(z: Tensor) -> tuple[Tensor, ...]:
        out = ops.policy_loss(z, target, old_logprob=old, advantage=advantage)
        return out.loss, out.logprob

    return Inputs(((2.0 * normal(rows, v)).to(BF16),), call)


def _logprob(device: torch.device, smaller: int) -> Inputs:
    normal, rows, v = _normal(device, 6), 320 // smaller, 5003 // smaller
    target = (normal(rows).abs() * 1e4).long() % v

    def call(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        logprob, entropy = ops.linear_logprob(h, w, target, entropy=True, temperature=0.7, workspace_bytes=64 * v * 4)
        assert entropy is not None
        return logprob, entropy

    return Inputs((normal(rows, 64), normal(v, 64) * 0.4), call, 2)


def _contrastive(device: torch.device, smaller: int) -> Inputs:
    normal, rows = _normal(device, 7), 256 // smaller

    def call(a: Tensor, b: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
        return ops.info_nce(a, b), ops.swav_loss(a, b, prototypes)

    return Inputs((normal(rows, 64), normal(rows, 64), normal(50, 64)), call, 2)


def _packed(device: torch.device, smaller: int, seed: int) -> tuple[Any, int, Tensor]:
    """A generator, the number of tokens, and bounds of 32 sequences of 2, 3, ... times as many tokens."""
    bounds = ((torch.arange(33, device=device) + 1) * 16 // smaller).cumsum(0)
    bounds -= bounds[0].clone()
    return _normal(device, seed), int(bounds[-1]), bounds


def _advantage(device: torch.device, smaller: int) -> Inputs:
    normal, tokens, bounds = _packed(device, smaller, 8)
    logprob = -normal(tokens).abs()
    packed = {"logprob": logprob, "alt_logprob": logprob + 0.2 * normal(4, tokens), "cu_seqlens": bounds}

    def call(reward: Tensor, expected: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.advantage_loss(reward, expected, **packed))

    return Inputs((normal(32), normal(16)), call)


def _sequences(device: torch.device, smaller: int) -> Inputs:
    normal, tokens, bounds = _packed(device, smaller, 9)
    score, mask = normal(32), normal(tokens) < 0.8
    emptied = bounds.clone()
    emptied[5] = emptied[4]  # which `gae` allows; a score needs a token

    def call(reward: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        rewards = ops.token_rewards(reward, value, score, bounds, kl_coef=0.1, kl_estimator="k3")
        return *ops.gae(reward, value, emptied, gamma=0.99, lam=0.95), rewards, ops.masked_whiten(value, mask)

    return Inputs((normal(tokens), normal(tokens)), call, 0)


def _topk(device: torch.device, smaller: int) -> Inputs:
    normal, rows = _normal(device, 10), 100_000 // smaller
    score, cluster = (normal(rows) * 100).round(), (normal(rows).abs() * 1e4).long() % 50  # many ties
    return Inputs((score,), lambda x: (ops.topk_by_cluster(x, cluster, 50, 20),), 0)


CASES: dict[str, Make] = {
    "linear_policy_loss, float32, every option": _linear(FP32, 5003, 4, everything=True),
    "linear_policy_loss, several chunks": _linear(BF16, 5000, 5),
    "linear_policy_loss, one chunk": _linear(BF16, 33_000, 1),
    "linear_policy_loss, odd vocabulary": _linear(BF16, 9001, 3, everything=True),
    "linear_policy_loss, float32 logits": _linear(BF16, 5000, 3, logits_dtype=torch.float32),
    "policy_loss from logits": _logits,
    "linear_logprob with entropy": _logprob,
    "info_nce and swav_loss": _contrastive,
    "advantage_loss, four alternates": _advantage,
    "gae, token_rewards, masked_whiten": _sequences,
    "topk_by_cluster, ties": _topk,
}


def results(inputs: Inputs, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs and gradients; the leaves first turned into `dtype`."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_(inputs.losses > 0) for x in inputs.leaves]
    out = inputs.call(*leaves)
    if inputs.losses:
        torch.autograd.backward([x.sum() for x in out[: inputs.losses]])
    return [x.detach() for x in out] + [x.grad for x in leaves if x.grad is not None]


def error_of(got: Tensor, want: Tensor) -> float:
    """Relative; of a single number, which terms of both signs may have cancelled in, relative to 1 at least."""
    if want.dim():
        return relative_error(got, want)
    return abs(float(got) - float(want)) / max(1.0, abs(float(want)))


def compared(make: Make, device: torch.device, backend: str, smaller: int) -> Row:
    inputs = make(device, smaller)
    with ops.backend(backend):
        got = results(inputs)
    with ops.backend("torch"):
        plain, want = results(inputs), results(inputs, torch.float64)
    error, allowed, worst = 0.0, 0.0, True
    floor = FLOORS[inputs.leaves[0].dtype] * (1 if device.type == "cuda" else CUT_OFF)
    for x, y, z in zip(got, plain, want, strict=True):
        if not x.is_floating_point():
            error, allowed, right = float((x != z).sum()) if x.shape == z.shape else 1.0, 0.0, torch.equal(x, z)
        else:
            here, there = error_of(x, z), error_of(y, z)
            limit = max(floor, 1.5 * there)
            right = here <= limit  # NaN is wrong too
            if not right or here / limit > error / max(allowed, 1e-30):
                error, allowed = here, limit
        worst = worst and right
        if not right:
            break
    return {"error": error, "allowed": allowed, "right": worst}


def work(plan: Plan) -> Iterator[Row]:
    wrong = []
    for name, make in CASES.items():
        result = compared(make, plan.device, plan.backend, SMALLER if plan.dry else 1)
        if not result["right"]:
            wrong.append(name)
        yield {"case": name, **result}
    if wrong:
        raise AssertionError(f"wrong: {', '.join(wrong)}")
