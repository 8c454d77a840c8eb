"""The small operations: GAE, whitening, token rewards, selection, beside loops and libraries.

The floor of a case is the time of its bytes (inputs read, outputs written, once each) at the rate of a copy: nothing
that reads its inputs from memory can be faster. Cases that fit the caches can be, and then are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import stable_rlhf.ops as ops
from bench.case import OURS, Case, Contender, Prepared, Settings, copy_floor, on_reference, with_backends
from bench.common import Step, describe
from bench.ops import verl_peer
from bench.ops.accuracy import relative_error


@dataclass
class Work:
    """Ours and its peers, each a step that makes its result from nothing; the same in float64, for the errors."""

    ours: Step
    truth: Step
    peers: list[Contender]
    moved: float
    flops: float
    tolerance: float = 1e-5


def _packed(shape: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two tensors [T], scores [S] and cu_seqlens of equal sequences, so that padded peers lose nothing to padding."""
    g = torch.Generator().manual_seed(0)
    sequences, length = shape["sequences"], shape["length"]
    tokens = sequences * length
    tensors = [torch.randn(count, generator=g) for count in (tokens, tokens, sequences)]
    first, second, scores = (x.to(device) for x in tensors)
    return first, second, scores, torch.arange(0, tokens + 1, length, device=device)


def _loop_over_tokens(reward: Tensor, value: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The usual loop on padded [S, L]."""
    advantage = torch.empty_like(reward)
    running = next_value = torch.zeros_like(reward[:, 0])
    for t in range(reward.shape[1] - 1, -1, -1):
        delta = reward[:, t] + gamma * next_value - value[:, t]
        running = delta + gamma * lam * running
        advantage[:, t], next_value = running, value[:, t]
    return advantage, advantage + value


def _ready(name: str, step: Step) -> Contender:
    return Contender(name, lambda: step)


def gae_work(shape: Mapping[str, Any], device: torch.device) -> Work:
    reward, value, _, limits = _packed(shape, device)
    size, gamma, lam = (shape["sequences"], shape["length"]), 0.99, 0.95
    wide = reward.view(size), value.view(size)

    def flat(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(x.reshape(-1) for x in pair)

    def verl() -> Step:
        advantages = verl_peer.gae()
        return lambda: flat(advantages(*wide, gamma, lam))

    return Work(
        ours=lambda: ops.gae(reward, value, limits, gamma=gamma, lam=lam),
        truth=lambda: flat(_loop_over_tokens(wide[0].double(), wide[1].double(), gamma, lam)),
        peers=[
            _ready("loop over tokens", lambda: flat(_loop_over_tokens(*wide, gamma, lam))),
            Contender("verl GAE", verl, note=f"{verl_peer.GAE}; it whitens besides"),
        ],
        moved=4.0 * reward.nbytes,
        flops=6.0 * reward.numel(),
    )


def rewards_work(shape: Mapping[str, Any], device: torch.device) -> Work:
    logprob, apart, score, limits = _packed(shape, device)
    ref_logprob, estimator = logprob - 0.3 * apart, shape["estimator"]

    def plain(logprob: Tensor, ref_logprob: Tensor, score: Tensor) -> Tensor:
        d = (logprob - ref_logprob).clamp(-20.0, 20.0)
        kl = {"k1": lambda: d, "k2": lambda: d * d / 2, "k3": lambda: torch.expm1(-d) + d}[estimator]()
        reward = -0.1 * kl
        reward[limits[1:] - 1] += score
        return reward

    return Work(
        ours=lambda: ops.token_rewards(logprob, ref_logprob, score, limits, kl_coef=0.1, kl_estimator=estimator),
        truth=lambda: plain(logprob.double(), ref_logprob.double(), score.double()),
        peers=[_ready("plain PyTorch", lambda: plain(logprob, ref_logprob, score))],
        moved=3.0 * logprob.nbytes,
        flops=4.0 * logprob.numel(),
    )


def whiten_work(shape: Mapping[str, Any], device: torch.device) -> Work:
    x, choice, _, _ = _packed(shape, device)
    mask = choice < 0.8

    def plain(x: Tensor) -> Tensor:
        weight = mask.to(x.dtype)
        count = weight.sum()
        mean = (x * weight).sum() / count
        variance = ((x - mean).square() * weight).sum() / count
        return (x - mean) * torch.rsqrt(variance + 1e-8) * weight

    return Work(
        ours=lambda: ops.masked_whiten(x, mask),
        truth=lambda: plain(x.double()),
        peers=[_ready("plain PyTorch", lambda: plain(x))],
        moved=2.0 * x.nbytes + mask.nbytes,
        flops=6.0 * x.numel(),
        tolerance=1e-4,  # plain PyTorch's float32 sums
    )


def topk_work(shape: Mapping[str, Any], device: torch.device) -> Work:
    import numpy as np

    g = torch.Generator().manual_seed(0)
    n, clusters, k = shape["rows"], shape["clusters"], shape["keep"]
    score = torch.randn(n, generator=g).to(device)
    cluster = torch.randint(0, clusters, (n,), generator=g).to(device)
    scores, labels = score.cpu().numpy(), cluster.cpu().numpy()

    def lexsort() -> Any:
        order = np.lexsort((-scores, labels))  # stable: ties by index
        sizes = np.bincount(labels, minlength=clusters)
        starts = np.cumsum(sizes) - sizes
        return np.sort(order[np.arange(n) - np.repeat(starts, sizes) < k])

    def groupby() -> Step:
        import pandas as pd

        frame = pd.DataFrame({"score": scores, "cluster": labels})
        return lambda: np.sort(frame.groupby("cluster")["score"].nlargest(k).index.get_level_values(1).to_numpy())

    return Work(
        ours=lambda: ops.topk_by_cluster(score, cluster, clusters, k),
        truth=lexsort,
        peers=[_ready("numpy lexsort", lexsort), Contender("pandas groupby-nlargest", groupby)],
        moved=float(score.nbytes + cluster.nbytes),
        flops=float(n),
        tolerance=0.0,
    )


WORKS: dict[str, Callable[[Mapping[str, Any], torch.device], Work]] = {
    "gae": gae_work,
    "token_rewards": rewards_work,
    "masked_whiten": whiten_work,
    "topk": topk_work,
}


def errors_of(step: Step, want: list[Tensor], tolerance: float) -> dict[str, Any]:
    got = _outputs(step)
    for x, y in zip(got, want, strict=True):
        if x.shape != y.shape:
            return {"failure": f"{x.numel():,} results instead of {y.numel():,}"}
    errors = {f"output {i}": relative_error(x, y) for i, (x, y) in enumerate(zip(got, want, strict=True))}
    return {"errors": errors, "verdict": "right" if max(errors.values()) <= tolerance else "WRONG"}


def _outputs(step: Step) -> list[Tensor]:
    outputs = step()
    return [torch.as_tensor(x).cpu().double() for x in (outputs if isinstance(outputs, tuple) else (outputs,))]


def prepare(case: Case, settings: Settings) -> Prepared:
    device = torch.device(settings.device)
    work = WORKS[case.op](case.shape, device)
    own = Contender(OURS, lambda: work.ours, "ours")
    contenders = [*with_backends(own, settings), on_reference(own), *work.peers]

    def checked(wanted: list[Contender]) -> dict[str, Any]:
        want, report = _outputs(work.truth), {}
        for contender in wanted:
            if contender.role == "floor":
                continue
            try:
                report[contender.name] = errors_of(contender.make(), want, work.tolerance)
            except Exception as error:
                report[contender.name] = {"failure": describe(error)}
        return report

    floor = copy_floor(work.moved, device)
    return Prepared([*contenders, floor], checked, work.flops, work.moved)
