"""The Advantage Model's loss, forward + backward.

With alternates (K > 0) the floor is the time of reading every log-probability once, at the rate of a copy; calls take
turns with copies of the inputs that no cache holds together, since a floor of memory says nothing about a cache.
Without, a few thousand numbers are a matter of overhead, and the floor is what an empty registered operation with one
tensor costs forward and backward.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import stable_rlhf.ops as ops
from bench.case import OURS, Case, Contender, Prepared, Settings, copy_floor, on_reference, with_backends
from bench.common import Step
from bench.ops.accuracy import check_outputs
from bench.ops.problem import with_gradients

MARGIN = 2.5
ROTATION = 128 << 20  # bytes of inputs that calls take turns with: several times the last cache


@functools.cache
def _empty_operation() -> Any:
    @torch.library.custom_op("stable_rlhf_bench::empty", mutates_args=())
    def empty(x: Tensor) -> Tensor:
        return x.new_empty(())

    empty.register_fake(lambda x: x.new_empty(()))
    empty.register_autograd(
        lambda ctx, grad: torch.empty_like(ctx.saved_tensors[0]),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    )
    return empty


def plain_loss(
    reward: Tensor, expected: Tensor | None, logprob: Tensor | None, alternates: Tensor | None, mask: Tensor | None
) -> Tensor:
    """The loss on padded rows [R, L] (alternates [K, R, L]), first half of the responses chosen against the second."""
    score, count = reward, 0
    if logprob is not None and alternates is not None and mask is not None:
        count = alternates.shape[0]
        log_weight = ((logprob - alternates) * mask).sum(-1) / mask.sum(-1)  # [K, R], length-normalised
        weight = log_weight.clamp(max=0.0).exp().detach()
        score = reward - (weight * reward).sum(0) / (count + 1)
    if expected is not None:
        score = score - expected.repeat(2) / (count + 1)
    chosen, rejected = score.chunk(2)
    terms = F.logsigmoid(chosen - rejected) + F.logsigmoid(MARGIN - chosen) + F.logsigmoid(MARGIN + rejected)
    return -terms.mean()


def prepare(case: Case, settings: Settings) -> Prepared:
    device, shape = torch.device(settings.device), case.shape
    pairs, count = shape["pairs"], shape.get("alternates", 0)
    g = torch.Generator().manual_seed(settings.seed)
    reward = torch.randn(2 * pairs, generator=g).to(device)
    expected = 0.3 * torch.randn(pairs, generator=g).to(device) if shape.get("expected") else None
    options: dict[str, Any] = {}
    turns: Iterator[tuple[Tensor, Tensor]] | None = None
    if count:
        # Sequences of equal length: padded rows then lose nothing to padding, and are a view of the packed ones.
        tokens = 2 * pairs * shape["length"]
        logprob = -2.0 * torch.rand(tokens, generator=g)
        alternates = logprob + 0.2 * torch.randn(count, tokens, generator=g)
        limits = torch.arange(0, tokens + 1, shape["length"], device=device)
        options = {"logprob": logprob.to(device), "alt_logprob": alternates.to(device), "cu_seqlens": limits}
        mask = torch.ones(2 * pairs, shape["length"], device=device)
        # Whoever is called takes the copy that was used the longest ago: its code may be warm, its data are not.
        number = math.ceil(ROTATION / (4.0 * (count + 1) * tokens)) if settings.device == "cpu" else 1
        turns = itertools.cycle([(options["logprob"].clone(), options["alt_logprob"].clone()) for _ in range(number)])

    def step_of(loss_of: Any, dtype: torch.dtype = torch.float32) -> Step:
        return with_gradients(loss_of, *(x.to(dtype) for x in (reward, expected) if x is not None))

    def on_padded_rows(loss_of: Any, dtype: torch.dtype = torch.float32) -> Step:
        if turns is None:
            return step_of(lambda r, e=None: loss_of(r, e, None, None, None), dtype)

        def call(reward: Tensor, expected: Tensor | None = None) -> Tensor:
            given = (x.to(dtype).view(*x.shape[:-1], 2 * pairs, -1) for x in next(turns))
            return loss_of(reward, expected, *given, mask.to(dtype))

        return step_of(call, dtype)

    def plain(dtype: torch.dtype) -> Step:
        return on_padded_rows(plain_loss, dtype)

    def compiled() -> Step:
        return on_padded_rows(torch.compile(plain_loss, dynamic=False))

    def own() -> Step:
        def call(reward: Tensor, expected: Tensor | None = None) -> Tensor:
            given = (
                options if turns is None else options | dict(zip(("logprob", "alt_logprob"), next(turns), strict=True))
            )
            return ops.advantage_loss(reward, expected, margin=MARGIN, **given).loss

        return step_of(call)

    contender = Contender(OURS, own, "ours")
    contenders = [
        *with_backends(contender, settings),
        on_reference(contender),
        Contender("plain PyTorch", lambda: plain(torch.float32), note="padded rows, no checks"),
        Contender("torch.compile", compiled, note="padded rows, no checks"),
    ]
    names = ("loss", "reward", "expected")[: 2 if expected is None else 3]

    def checked(wanted: list[Contender]) -> dict[str, dict[str, Any]]:
        makers = {c.name: c.make for c in wanted if c.role != "floor"}
        makers.setdefault("plain PyTorch", lambda: plain(torch.float32))
        return check_outputs(makers, plain(torch.float64), names, torch.float32)

    moved = 4.0 * (reward.numel() * 3 + sum(x.numel() for x in options.values() if x.dtype == torch.float32))
    if turns is None:
        note = "registered, forward + backward"
        bare = [Contender("empty operation", lambda: with_gradients(_empty_operation(), reward), "floor", note)]
    else:
        # A copy also writes, which goes beside its reads: who only reads gets less of the memory's rate.
        reading = Contender("torch.sum of the inputs", lambda: lambda: [x.sum() for x in next(turns)], "floor")
        bare = [copy_floor(moved, device), reading]
    return Prepared(
        [*contenders, *bare],
        checked,
        flops=2.0 * count * reward.numel() * shape.get("length", 0) + 40.0 * reward.numel(),
        moved=moved,
    )
