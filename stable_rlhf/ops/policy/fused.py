"""The fused policy losses as PyTorch operators: `torch.compile` traces through them, autograd finds their gradients.

Each forward makes the gradients along with the loss, because a token's gradient depends on its log-prob alone; the
backward only scales them. Without any gradient asked for, only the statistics are made. The backend "torch" is the
reference, whose sizes are data: as an operator it is there for `torch.compile`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stable_rlhf.ops.backends import autograd_inside, refuse_second_derivative
from stable_rlhf.ops.checks import statistics_dtype
from stable_rlhf.ops.policy import driver
from stable_rlhf.ops.policy.formula import (
    Rows,
    RowState,
    Terms,
    check_statistics,
    gather_terms,
    linear_statistics,
    row_statistics,
    select_rows,
    total_loss,
)
from stable_rlhf.ops.policy.products import HeadProducts
from stable_rlhf.ops.policy.types import PolicyLossConfig, PolicyLossOutput

METRICS = ("policy_loss", "rehearsal_loss", "clip_fraction", "approx_kl", "max_ratio", "entropy")
COUNTS = ("policy_tokens", "rehearsal_tokens")


def pack_config(c: PolicyLossConfig) -> list[float]:
    """A configuration as the numbers that an operator can take."""
    return [
        c.clip_low, c.clip_high, c.dual_clip or 0.0, c.kl_coef, float(c.kl_estimator[1]), c.entropy_coef,
        c.rehearsal_coef, c.softcap or 0.0, c.log_ratio_clamp,
    ]  # fmt: skip


def _unpack_config(numbers: list[float]) -> PolicyLossConfig:
    low, high, dual, kl, estimator, entropy, rehearsal, softcap, clamp = numbers
    return PolicyLossConfig(
        low, high, dual or None, kl, f"k{int(estimator)}", entropy, rehearsal, softcap or None, clamp
    )


def _terms(
    rows: Rows,
    config: PolicyLossConfig,
    per_row: list[Tensor | None],
    denominators: list[Tensor | None],
    numbers: list[float],
    dtype: torch.dtype = torch.float32,
) -> Terms:
    old_logprob, advantage, ref_logprob, row_weight = per_row
    given = [t if t is not None else None if n < 0.0 else n for t, n in zip(denominators, numbers, strict=True)]
    return gather_terms(
        rows, config, dtype, old_logprob=old_logprob, advantage=advantage, ref_logprob=ref_logprob,
        row_weight=row_weight, policy_denominator=given[0], rehearsal_denominator=given[1],
    )  # fmt: skip


def _outputs(
    rows: Rows, state: RowState, terms: Terms, config: PolicyLossConfig, source: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_statistics(state.logprob, state.entropy, rows, source)
    return _flat(total_loss(rows, state.logprob, state.entropy, terms, config))


def _flat(out: PolicyLossOutput) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        out.loss,
        out.logprob,
        out.entropy,
        torch.stack([out.metrics[name] for name in METRICS]),
        torch.stack([out.metrics[name] for name in COUNTS]),
    )


def _leaves(needs: list[bool], *inputs: Tensor | None) -> list[Tensor | None]:
    """The inputs as leaves of a graph of their own."""
    return [None if x is None else x.detach().requires_grad_(n) for x, n in zip(inputs, needs, strict=True)]


def _gradients(
    outputs: list[Tensor], upstream: list[Tensor] | None, leaves: list[Tensor | None], needs: list[bool]
) -> list[Tensor]:
    """The gradient of each leaf, contiguous however the leaf lies; an empty tensor where none is asked for."""
    asked = [leaf for leaf, need in zip(leaves, needs, strict=True) if need and leaf is not None]
    made = iter(torch.autograd.grad(outputs, asked, upstream) if asked else ())
    first = next(x for x in leaves if x is not None)
    return [next(made).contiguous() if need else (first if x is None else x).new_empty(0)
            for x, need in zip(leaves, needs, strict=True)]  # fmt: skip


def _spread(rows: Rows, gradient: Tensor | None, like: Tensor) -> Tensor:
    """[A, n] back to the shape of `like`, 0 where ignored; an empty tensor where no gradient was asked for."""
    if gradient is None:
        return like.new_empty(0)
    if rows.index is None:
        return gradient.reshape(like.shape)
    whole = torch.zeros_like(like, memory_format=torch.contiguous_format)
    whole.view(-1, like.shape[-1]).index_copy_(0, rows.index, gradient)
    return whole


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient


def _temperature(value: float, per_row: Tensor | None) -> float | Tensor:
    return value if per_row is None else per_row


def keep(ctx: Any, gradients: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # zeros for the gradients' own gradients would be as large as they are
    ctx.save_for_backward(*gradients)


def hand_over(ctx: Any, needs: list[bool], upstream: Tensor) -> list[Tensor | None]:
    """The kept gradients times the upstream gradient: in place where nobody can ask for them again, so that autograd
    takes them as they are and no copy is made."""
    kept = ctx.saved_tensors  # once: checkpointing without re-entry hands each of them out a single time
    found: list[Tensor | None] = [g if need else None for g, need in zip(kept, needs, strict=True)]
    traced = torch.compiler.is_compiling() or any(type(g) is not Tensor for g in (*kept, upstream))
    mapped = torch._C._are_functorch_transforms_active()  # by vmap: many upstream gradients at once
    if traced or mapped or torch._C._autograd._get_current_graph_task_keep_graph():
        return [None if g is None else g * upstream for g in found]
    if upstream.device.type == "cuda":
        from stable_rlhf.kernels.policy import scale_

        return [None if g is None else scale_(g, upstream) for g in found]
    if float(upstream) == 1.0:
        return found
    return [None if g is None else g.mul_(upstream) for g in found]


# -- linear_policy_loss ------------------------------------------------------------------------------------------------


@torch.library.custom_op("stable_rlhf::linear_policy_loss", mutates_args=())
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    kind: Tensor | None,
    old_logprob: Tensor | None,
    advantage: Tensor | None,
    ref_logprob: Tensor | None,
    row_weight: Tensor | None,
    row_temperature: Tensor | None,
    policy_denominator: Tensor | None,
    rehearsal_denominator: Tensor | None,
    temperature: float,
    denominators: list[float],
    config: list[float],
    logits_dtype: torch.dtype | None,
    workspace_bytes: int,
    grad_tolerance: float,
    backend: str,
    group: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    settings = _unpack_config(config)
    if backend == "torch":
        return _linear_reference(
            hidden, weight, bias, target, kind, [old_logprob, advantage, ref_logprob, row_weight],
            _temperature(temperature, row_temperature), [policy_denominator, rehearsal_denominator], denominators,
            settings, logits_dtype, workspace_bytes, needs,
        )  # fmt: skip
    kernels, vocabulary = driver.row_kernels(backend, group, weight.shape[0], hidden.device)
    rows = select_rows(target, kind, _temperature(temperature, row_temperature), vocabulary, hidden.device)
    terms = _terms(
        rows, settings, [old_logprob, advantage, ref_logprob, row_weight],
        [policy_denominator, rehearsal_denominator], denominators,
    )  # fmt: skip
    products = HeadProducts(rows.gather(hidden), weight, bias, logits_dtype, (needs[0], needs[1], needs[2]))
    if any(needs):
        state, made = driver.policy(kernels, products, rows, terms, settings, workspace_bytes, grad_tolerance)
    else:
        state = driver.statistics(kernels, products, rows, settings.softcap, workspace_bytes)
        made = (None, None, None)
    return (
        *_outputs(rows, state, terms, settings, "hidden, weight or bias"),
        _spread(rows, made[0], hidden),
        _or_empty(made[1], weight),
        _or_empty(made[2], weight),
    )


def _linear_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    kind: Tensor | None,
    per_row: list[Tensor | None],
    temperature: float | Tensor,
    denominators: list[Tensor | None],
    numbers: list[float],
    config: PolicyLossConfig,
    logits_dtype: torch.dtype | None,
    workspace_bytes: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = select_rows(target, kind, temperature, weight.shape[0], hidden.device)
    terms = _terms(rows, config, per_row, denominators, numbers, statistics_dtype(hidden.dtype))
    with autograd_inside(hidden.device):
        h, w, b = _leaves(needs, hidden, weight, bias)
        assert h is not None and w is not None
        logprob, entropy = linear_statistics(
            rows.gather(h), w, b, rows, config.softcap, config.entropy_coef != 0.0, logits_dtype, workspace_bytes
        )
        check_statistics(logprob, entropy, rows, "hidden, weight or bias")
        out = total_loss(rows, logprob, entropy, terms, config)
        gradients = _gradients([out.loss], None, [h, w, b], needs)
    flat = _flat(out)
    return flat[0].detach(), *flat[1:], gradients[0], gradients[1], gradients[2]


@linear_policy_loss.register_fake
def _(hidden, weight, bias, target, *rest):
    needs = rest[-1]
    per_row = target.new_empty(target.shape, dtype=statistics_dtype(hidden.dtype))
    return (
        per_row.new_empty(()),
        per_row,
        torch.empty_like(per_row),
        per_row.new_empty(len(METRICS)),
        target.new_empty(len(COUNTS)),
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else weight.new_empty(0),
        torch.empty_like(bias) if needs[2] else weight.new_empty(0),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.needs = inputs[-1]
    keep(ctx, output[-3:])


def _linear_policy_backward(ctx: Any, upstream: Tensor, *_unused: Any) -> tuple[Any, ...]:
    refuse_second_derivative("linear_policy_loss")
    return (*hand_over(ctx, ctx.needs, upstream), *[None] * 18)


linear_policy_loss.register_autograd(_linear_policy_backward, setup_context=_keep_gradients)


# -- policy_loss -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("stable_rlhf::policy_loss", mutates_args=())
def policy_loss(
    logits: Tensor,
    target: Tensor,
    kind: Tensor | None,
    old_logprob: Tensor | None,
    advantage: Tensor | None,
    ref_logprob: Tensor | None,
    row_weight: Tensor | None,
    row_temperature: Tensor | None,
    policy_denominator: Tensor | None,
    rehearsal_denominator: Tensor | None,
    temperature: float,
    denominators: list[float],
    config: list[float],
    backend: str,
    group: str,
    needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    settings = _unpack_config(config)
    kernels, vocabulary = None, logits.shape[-1]
    if backend != "torch":
        kernels, vocabulary = driver.row_kernels(backend, group, vocabulary, logits.device)
    rows = select_rows(target, kind, _temperature(temperature, row_temperature), vocabulary, logits.device)
    terms = _terms(
        rows, settings, [old_logprob, advantage, ref_logprob, row_weight],
        [policy_denominator, rehearsal_denominator], denominators, statistics_dtype(logits.dtype),
    )  # fmt: skip
    if kernels is None:
        with autograd_inside(logits.device):
            leaf = logits.detach().requires_grad_(needs)
            entropic = settings.entropy_coef != 0.0
            logprob, entropy = row_statistics(
                rows.gather(leaf), rows.target, rows.temperature, settings.softcap, entropic
            )
            check_statistics(logprob, entropy, rows, "logits")
            out = total_loss(rows, logprob, entropy, terms, settings)
            (gradient,) = _gradients([out.loss], None, [leaf], [needs])
        flat_out = _flat(out)
        return flat_out[0].detach(), *flat_out[1:], gradient
    flat = logits.contiguous().view(-1, logits.shape[-1])
    state = RowState.of(rows)
    gradient = logits.new_empty(0)
    if needs:
        new = torch.empty_like if rows.index is None else torch.zeros_like
        gradient = new(logits, memory_format=torch.contiguous_format)
        kernels.policy(
            flat, gradient.view(flat.shape), state, rows.kind, terms, settings, row=rows.index, compact=False
        )
    else:
        kernels.statistics(flat, state, settings.softcap, row=rows.index)
    return (*_outputs(rows, state, terms, settings, "logits"), gradient)


@policy_loss.register_fake
def _(logits, target, *rest):
    per_row = target.new_empty(target.shape, dtype=statistics_dtype(logits.dtype))
    return (
        per_row.new_empty(()),
        per_row,
        torch.empty_like(per_row),
        per_row.new_empty(len(METRICS)),
        target.new_empty(len(COUNTS)),
        torch.empty_like(logits, memory_format=torch.contiguous_format) if rest[-1] else logits.new_empty(0),
    )


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    keep(ctx, output[-1:])


def _policy_backward(ctx: Any, upstream: Tensor, *_unused: Any) -> tuple[Any, ...]:
    refuse_second_derivative("policy_loss")
    return (*hand_over(ctx, [True], upstream), *[None] * 15)


policy_loss.register_autograd(_policy_backward, setup_context=_keep_gradient)


# -- linear_logprob ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("stable_rlhf::linear_logprob", mutates_args=())
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    logits_dtype: torch.dtype | None,
    workspace_bytes: int,
    backend: str,
    group: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "torch":
        rows = select_rows(target, None, _temperature(temperature, row_temperature), weight.shape[0], hidden.device)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            logprob, row_entropy = linear_statistics(
                rows.gather(hidden), weight, bias, rows, softcap, True, logits_dtype, workspace_bytes
            )
        check_statistics(logprob, row_entropy, rows, "hidden, weight or bias")
        given = (rows.scatter(x) for x in (logprob, row_entropy))
        nothing = (logprob.new_zeros(target.shape) for _ in range(2))
        return (*given, *nothing)  # type: ignore[return-value]
    kernels, vocabulary = driver.row_kernels(backend, group, weight.shape[0], hidden.device)
    rows = select_rows(target, None, _temperature(temperature, row_temperature), vocabulary, hidden.device)
    products = HeadProducts(rows.gather(hidden), weight, bias, logits_dtype)
    state = driver.statistics(kernels, products, rows, softcap, workspace_bytes)
    check_statistics(state.logprob, state.entropy, rows, "hidden, weight or bias")
    return (
        rows.scatter(state.logprob), rows.scatter(state.entropy), rows.scatter(state.max), rows.scatter(state.log_sum)
    )  # fmt: skip


@linear_logprob.register_fake
def _(hidden, weight, bias, target, *rest):
    return tuple(target.new_empty(target.shape, dtype=statistics_dtype(hidden.dtype)) for _ in range(4))


@torch.library.custom_op("stable_rlhf::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    logprob_grad: Tensor,
    entropy_grad: Tensor,
    entropy: Tensor,
    max: Tensor,
    log_sum: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    logits_dtype: torch.dtype | None,
    workspace_bytes: int,
    backend: str,
    group: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "torch":
        rows = select_rows(target, None, _temperature(temperature, row_temperature), weight.shape[0], hidden.device)
        upstream = [rows.take("upstream", g, logprob_grad.dtype) for g in (logprob_grad, entropy_grad)]
        with autograd_inside(hidden.device):
            h, w, b = _leaves(needs, hidden, weight, bias)
            assert h is not None and w is not None
            made = linear_statistics(rows.gather(h), w, b, rows, softcap, True, logits_dtype, workspace_bytes)
            gradients = _gradients(list(made), [g for g in upstream if g is not None], [h, w, b], needs)
        return gradients[0], gradients[1], gradients[2]
    kernels, vocabulary = driver.row_kernels(backend, group, weight.shape[0], hidden.device)
    rows = select_rows(target, None, _temperature(temperature, row_temperature), vocabulary, hidden.device)
    products = HeadProducts(rows.gather(hidden), weight, bias, logits_dtype, (needs[0], needs[1], needs[2]))
    state = RowState.of(rows)
    known = {
        "entropy": entropy, "max": max, "log_sum": log_sum, "coefficient": logprob_grad,
        "entropy_coefficient": entropy_grad,
    }  # fmt: skip
    for name, value in known.items():
        taken = rows.take(name, value, torch.float32)
        assert taken is not None
        getattr(state, name).copy_(taken)
    found = driver.given(kernels, products, state, softcap, workspace_bytes)
    return _spread(rows, found[0], hidden), _or_empty(found[1], weight), _or_empty(found[2], weight)


@linear_logprob_backward.register_fake
def _(a, b, c, d, e, hidden, weight, bias, *rest):
    needs = rest[-1]
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else weight.new_empty(0),
        torch.empty_like(bias) if needs[2] else weight.new_empty(0),
    )


def _keep_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hidden, weight, bias, target, row_temperature, *ctx.constants = inputs
    _logprob, entropy, max, log_sum = output
    ctx.save_for_backward(entropy, max, log_sum, hidden, weight, bias, target, row_temperature)


def _linear_logprob_backward(
    ctx: Any, logprob_grad: Tensor, entropy_grad: Tensor, *_unused: Any
) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_logprob")
    needs = ctx.constants[-1]
    made = linear_logprob_backward(logprob_grad, entropy_grad, *ctx.saved_tensors, *ctx.constants)
    return (*(g if need else None for g, need in zip(made, needs, strict=True)), *[None] * 9)


linear_logprob.register_autograd(_linear_logprob_backward, setup_context=_keep_statistics)
