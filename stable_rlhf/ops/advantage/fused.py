"""The Advantage Model's loss and score by C++ or Triton: one call makes value and gradient, autograd gets both.

Under torch.compile, and for tensors that only stand for others, the call is a registered operator
(`stable_rlhf::advantage_loss`, `stable_rlhf::advantage_score`). Otherwise the kernel is called at once: an operator
with so many arguments costs more than the kernel on a few thousand pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stable_rlhf.ops.advantage import reference
from stable_rlhf.ops.advantage.reference import Arguments
from stable_rlhf.ops.backends import (
    autograd_inside,
    cpu_isa,
    extension,
    needs_operator,
    refuse_second_derivative,
    register,
)
from stable_rlhf.ops.checks import check_values

# loss 0-d; score [R]; statistics [7]; gradient [R] of the reward (of the score, where no loss is wanted) and [P] of
# expected, empty where there is none
Made = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def loss(call: Arguments, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, differentiable in reward and expected; score [R]; statistics [7]), the last two detached."""
    if needs_operator(call.reward):
        value, score, statistics, *_ = advantage_loss(*_flat(call), *_flat_pairs(call), backend)
        return value, score.detach(), statistics.detach()
    made = _make(call, backend, True)
    if _wants_gradient(call):
        return _AttachLoss.apply(call.reward, call.expected, made), made[1], made[2]
    return made[:3]


def score(call: Arguments, backend: str) -> Tensor:
    """[R] a(x, y), differentiable in reward and expected."""
    if needs_operator(call.reward):
        return advantage_score(*_flat(call), backend)[0]
    made = _make(call, backend, False)
    if _wants_gradient(call):
        share = (call.num_policies - call.num_alternates) / call.num_policies
        return _AttachScore.apply(call.reward, call.expected, made, call.prompt, share)
    return made[1]


def _wants_gradient(call: Arguments) -> bool:
    return torch.is_grad_enabled() and (
        call.reward.requires_grad or (call.expected is not None and call.expected.requires_grad)
    )


class _AttachLoss(torch.autograd.Function):
    """Gives a loss the gradients that were made with it."""

    @staticmethod
    def forward(ctx: Any, reward: Tensor, expected: Tensor | None, made: Made) -> Tensor:
        ctx.save_for_backward(made[3], None if expected is None else made[4])
        return made[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("advantage_loss")
        reward, expected = ctx.saved_tensors
        return reward * upstream, None if expected is None else expected * upstream, None


class _AttachScore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, reward: Tensor, expected: Tensor | None, made: Made, prompt: Tensor | None, share: float
    ) -> Tensor:
        ctx.save_for_backward(made[3], prompt)
        ctx.share, ctx.prompts = share, None if expected is None else expected.shape[0]
        return made[1]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        slope, prompt = ctx.saved_tensors  # the slope is a constant: second derivatives are right
        return (*_score_gradients(upstream, slope, prompt, ctx.share, ctx.prompts), None, None, None)


def _score_gradients(
    upstream: Tensor, slope: Tensor, prompt: Tensor | None, share: float, prompts: int | None
) -> tuple[Tensor, Tensor | None]:
    expected = None
    if prompts is not None:
        scaled = -share * upstream
        expected = scaled if prompt is None else scaled.new_zeros(prompts).index_add(0, prompt, scaled)
    return slope * upstream, expected


# -- kernels -----------------------------------------------------------------------------------------------------------


def _make(call: Arguments, backend: str, pairs: bool) -> Made:
    if backend == "triton":
        from stable_rlhf.kernels.advantage import advantage

        if check_values(call.reward.device):
            reference.check(call)
        return advantage(call, pairs)
    made = None if backend == "torch" else _launch_cpp(call, pairs)
    return _by_reference(call, pairs) if made is None else made


def _launch_cpp(call: Arguments, pairs: bool) -> Made | None:
    """None when some value is out of range or not finite: the reference knows how to say which."""
    module = extension()
    assert module is not None
    dtype, responses = call.reward.dtype, call.reward.shape[0]
    prompts = 0 if call.expected is None else call.expected.shape[0]
    kept: list[Tensor] = []  # temporary tensors, until the kernel is done

    def address(value: Tensor | None, of: torch.dtype = dtype) -> int:
        if value is None:
            return 0
        if value.dtype != of or not value.is_contiguous():
            value = value.to(of).contiguous()
            kept.append(value)
        return value.data_ptr()

    def per_item(value: float | Tensor | None) -> tuple[int, float]:
        return (address(value), 0.0) if isinstance(value, Tensor) else (0, value or 0.0)

    value, score = torch.empty((), dtype=dtype, device="cpu"), torch.empty(responses, dtype=dtype, device="cpu")
    statistics, gradient = torch.empty(7, dtype=dtype, device="cpu"), torch.empty(responses, dtype=dtype, device="cpu")
    expected_gradient = torch.empty(prompts, dtype=dtype, device="cpu")
    kernel = module.advantage_f32 if dtype == torch.float32 else module.advantage_f64
    fine = kernel(
        responses, prompts, call.pair_count if pairs else -1, call.num_policies, call.num_alternates,
        0 if call.logprob is None else call.logprob.shape[0], address(call.reward), address(call.expected),
        call.prompt_rule, address(call.prompt, torch.int64), address(call.pairs, torch.int64), call.margin is not None,
        *per_item(call.margin), *per_item(call.rank_margin), *per_item(call.label_smoothing),
        *per_item(call.pair_weight), address(call.logprob), address(call.alt_logprob),
        address(call.cu_seqlens, torch.int64), call.length_normalized,
        math.inf if call.max_weight is None else math.log(call.max_weight), value.data_ptr(), score.data_ptr(),
        gradient.data_ptr(), expected_gradient.data_ptr(), statistics.data_ptr(), torch.get_num_threads(),
        cpu_isa(),
    )  # fmt: skip
    return (value, score, statistics, gradient, expected_gradient) if fine else None


def _by_reference(call: Arguments, pairs: bool) -> Made:
    """What a kernel makes; raises the error that names a wrong value."""
    reference.check(call)
    leaves = [call.reward.detach().requires_grad_()]
    if call.expected is not None:
        leaves.append(call.expected.detach().requires_grad_())
    call = call._replace(reward=leaves[0], expected=leaves[1] if call.expected is not None else None)
    with autograd_inside(call.reward.device):
        if not pairs:
            score = reference.score(call)
            (slope,) = torch.autograd.grad(score.sum(), leaves[:1])
            return score.new_zeros(()), score.detach().clone(), score.new_zeros(7), slope, score.new_empty(0)
        value, score, statistics = reference.loss(call)
        gradients = torch.autograd.grad(value, leaves)
    expected_gradient = gradients[1] if call.expected is not None else score.new_empty(0)
    return (
        value.detach(),
        score.clone(),
        statistics,
        gradients[0],
        expected_gradient,
    )  # a score may be the reward itself


# -- registered operators ----------------------------------------------------------------------------------------------


def _flat(call: Arguments) -> tuple[Any, ...]:
    return (
        call.reward, call.expected, call.prompt, call.prompt_rule, call.num_policies, call.num_alternates, call.logprob,
        call.alt_logprob, call.cu_seqlens, call.length_normalized, call.max_weight,
    )  # fmt: skip


def _flat_pairs(call: Arguments) -> tuple[Any, ...]:
    given = (call.margin, call.rank_margin, call.label_smoothing, call.pair_weight)
    tensors = [value if isinstance(value, Tensor) else None for value in given]
    numbers = [0.0 if value is None or isinstance(value, Tensor) else value for value in given]
    return call.pairs, *tensors, call.margin is not None, numbers


@torch.library.custom_op("stable_rlhf::advantage_loss", mutates_args=())
def advantage_loss(
    reward: Tensor,
    expected: Tensor | None,
    prompt: Tensor | None,
    prompt_rule: int,
    num_policies: int,
    num_alternates: int,
    logprob: Tensor | None,
    alt_logprob: Tensor | None,
    cu_seqlens: Tensor | None,
    length_normalized: bool,
    max_weight: float | None,
    pairs: Tensor | None,
    margin: Tensor | None,
    rank_margin: Tensor | None,
    label_smoothing: Tensor | None,
    pair_weight: Tensor | None,
    bounds: bool,
    numbers: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    by_pair = [
        number if tensor is None else tensor
        for number, tensor in zip(numbers, (margin, rank_margin, label_smoothing, pair_weight), strict=True)
    ]
    call = Arguments(
        reward, expected, prompt, prompt_rule, num_policies, num_alternates, logprob, alt_logprob, cu_seqlens,
        length_normalized, max_weight, pairs, by_pair[0] if bounds else None, *by_pair[1:],
    )  # fmt: skip
    return _make(call, backend, True)


@advantage_loss.register_fake
def _(reward, expected, *rest):
    like = torch.empty_like(reward, memory_format=torch.contiguous_format)
    prompts = 0 if expected is None else expected.shape[0]
    return reward.new_empty(()), like, reward.new_empty(7), torch.empty_like(like), reward.new_empty(prompts)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.has_expected, ctx.arguments = inputs[1] is not None, len(inputs)
    ctx.save_for_backward(output[3], output[4])


def _hand_over(ctx: Any, upstream: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("advantage_loss")
    if upstream is None:
        return (None,) * ctx.arguments
    reward, expected = ctx.saved_tensors
    return reward * upstream, expected * upstream if ctx.has_expected else None, *[None] * (ctx.arguments - 2)


advantage_loss.register_autograd(_hand_over, setup_context=_keep_gradient)


@torch.library.custom_op("stable_rlhf::advantage_score", mutates_args=())
def advantage_score(
    reward: Tensor,
    expected: Tensor | None,
    prompt: Tensor | None,
    prompt_rule: int,
    num_policies: int,
    num_alternates: int,
    logprob: Tensor | None,
    alt_logprob: Tensor | None,
    cu_seqlens: Tensor | None,
    length_normalized: bool,
    max_weight: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    call = Arguments(
        reward, expected, prompt, prompt_rule, num_policies, num_alternates, logprob, alt_logprob, cu_seqlens,
        length_normalized, max_weight,
    )  # fmt: skip
    _, score, _, slope, _ = _make(call, backend, False)
    return score, slope


@advantage_score.register_fake
def _(reward, *rest):
    like = torch.empty_like(reward, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like)


def _keep_slope(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    _, expected, prompt, _, policies, alternates, *_ = inputs
    ctx.share, ctx.prompts = (policies - alternates) / policies, None if expected is None else expected.shape[0]
    ctx.save_for_backward(output[1], prompt)


def _spread(ctx: Any, upstream: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 12
    slope, prompt = ctx.saved_tensors
    return (*_score_gradients(upstream, slope, prompt, ctx.share, ctx.prompts), *[None] * 10)


advantage_score.register_autograd(_spread, setup_context=_keep_slope)

register("advantage_loss", {"triton": loss, "cpu": loss, "torch": reference.loss})
register("advantage_score", {"triton": score, "cpu": score, "torch": reference.score})
