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
from stable_rlhf.ops.advantage.reference import AdvantageCall
from stable_rlhf.ops.backends import cpu_isa, extension, register
from stable_rlhf.ops.checks import check_values
from stable_rlhf.ops.operators import (
    Form,
    autograd_inside,
    needs_operator,
    refuse_second_derivative,
    register_operator,
)

# loss 0-d; score [R]; statistics [7]; gradient [R] of the reward (of the score, where no loss is wanted) and [P] of
# expected, empty where there is none
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def loss(call: AdvantageCall) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, differentiable in reward and expected; score [R]; statistics [7]), the last two detached."""
    if needs_operator(call.reward):
        value, score, statistics, *_ = advantage_loss(*_FORM.flat(call))
        return value, score.detach(), statistics.detach()
    results = _make(call, True)
    if _wants_gradient(call):
        return _AttachLoss.apply(call.reward, call.expected, results), results[1], results[2]
    return results[:3]


def score(call: AdvantageCall) -> Tensor:
    """[R] a(x, y), differentiable in reward and expected."""
    if needs_operator(call.reward):
        return advantage_score(*_FORM.flat(call))[0]
    results = _make(call, False)
    if _wants_gradient(call):
        share = (call.num_policies - call.num_alternates) / call.num_policies
        return _AttachScore.apply(call.reward, call.expected, results, call.prompt, share)
    return results[1]


def _wants_gradient(call: AdvantageCall) -> bool:
    return torch.is_grad_enabled() and (
        call.reward.requires_grad or (call.expected is not None and call.expected.requires_grad)
    )


class _AttachLoss(torch.autograd.Function):
    """Gives a loss the gradients that were made with it."""

    @staticmethod
    def forward(ctx: Any, reward: Tensor, expected: Tensor | None, results: Results) -> Tensor:
        ctx.save_for_backward(results[3], None if expected is None else results[4])
        return results[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("advantage_loss")
        reward, expected = ctx.saved_tensors
        return reward * upstream, None if expected is None else expected * upstream, None


class _AttachScore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, reward: Tensor, expected: Tensor | None, results: Results, prompt: Tensor | None, share: float
    ) -> Tensor:
        ctx.save_for_backward(results[3], prompt)
        ctx.share, ctx.prompts = share, None if expected is None else expected.shape[0]
        return results[1]

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


def _make(call: AdvantageCall, pairs: bool) -> Results:
    if call.backend == "triton":
        from stable_rlhf.kernels.advantage import advantage

        if check_values(call.reward.device):
            reference.check(call)
        return advantage(call, pairs)
    results = None if call.backend == "torch" else _launch_cpp(call, pairs)
    return _by_reference(call, pairs) if results is None else results


def _launch_cpp(call: AdvantageCall, pairs: bool) -> Results | None:
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

    def per_item(value: float | Tensor | None) -> float:
        return address(value) if isinstance(value, Tensor) else value or 0.0

    new = call.reward.new_empty  # a third faster than torch.empty with a type and a device
    value, score, statistics, gradient, expected_gradient = (
        new(()), new(responses), new(7), new(responses), new(prompts)
    )  # fmt: skip
    kernel = module.advantage_f32 if dtype == torch.float32 else module.advantage_f64
    fine = kernel(
        responses=responses, prompts=prompts, pairs=call.pair_count if pairs else -1, policies=call.num_policies,
        alternates=call.num_alternates, reward=address(call.reward), expected=address(call.expected),
        prompt_rule=call.prompt_rule, prompt=address(call.prompt, torch.int64), pair=address(call.pairs, torch.int64),
        bounds=call.margin is not None, margin=per_item(call.margin), rank_margin=per_item(call.rank_margin),
        label_smoothing=per_item(call.label_smoothing), pair_weight=per_item(call.pair_weight),
        tokens=0 if call.logprob is None else call.logprob.shape[0], logprob=address(call.logprob),
        alt_logprob=address(call.alt_logprob), cu_seqlens=address(call.cu_seqlens, torch.int64),
        length_normalized=call.length_normalized,
        max_log_weight=math.inf if call.max_weight is None else math.log(call.max_weight), loss=value.data_ptr(),
        score=score.data_ptr(), gradient=gradient.data_ptr(), expected_gradient=expected_gradient.data_ptr(),
        statistics=statistics.data_ptr(), num_threads=torch.get_num_threads(), isa=cpu_isa(),
    )  # fmt: skip
    return (value, score, statistics, gradient, expected_gradient) if fine else None


def _by_reference(call: AdvantageCall, pairs: bool) -> Results:
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


_FORM = Form(AdvantageCall)


def _loss_shapes(call: AdvantageCall) -> Results:
    like = torch.empty_like(call.reward, memory_format=torch.contiguous_format)
    prompts = 0 if call.expected is None else call.expected.shape[0]
    new = call.reward.new_empty
    return new(()), like, new(7), torch.empty_like(like), new(prompts)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.has_expected = _FORM.restored(inputs).expected is not None
    ctx.save_for_backward(output[3], output[4])


def _hand_over(ctx: Any, upstream: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("advantage_loss")
    if upstream is None:
        return tuple(_FORM.gradients({}))
    reward, expected = (gradient * upstream for gradient in ctx.saved_tensors)
    return tuple(_FORM.gradients({"reward": reward, "expected": expected if ctx.has_expected else None}))


advantage_loss = register_operator("advantage_loss", _FORM, 5, lambda call: _make(call, True), _loss_shapes)
advantage_loss.register_autograd(_hand_over, setup_context=_keep_gradient)


def _score_and_slope(call: AdvantageCall) -> tuple[Tensor, Tensor]:
    _, score, _, slope, _ = _make(call, False)
    return score, slope


def _keep_slope(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    call = _FORM.restored(inputs)
    ctx.share = (call.num_policies - call.num_alternates) / call.num_policies
    ctx.prompts = None if call.expected is None else call.expected.shape[0]
    ctx.save_for_backward(output[1], call.prompt)


def _spread(ctx: Any, upstream: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return tuple(_FORM.gradients({}))
    slope, prompt = ctx.saved_tensors
    reward, expected = _score_gradients(upstream, slope, prompt, ctx.share, ctx.prompts)
    return tuple(_FORM.gradients({"reward": reward, "expected": expected}))


advantage_score = register_operator(
    "advantage_score", _FORM, 2, _score_and_slope, lambda call: (_loss_shapes(call)[1], _loss_shapes(call)[3])
)
advantage_score.register_autograd(_spread, setup_context=_keep_slope)

register("advantage_loss", {"triton": loss, "cpu": loss, "torch": reference.loss})
register("advantage_score", {"triton": score, "cpu": score, "torch": reference.score})
