"""PPO and rehearsal tokens in one loss, from logits or straight from hidden states; and token log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stable_rlhf.ops.backends import register
from stable_rlhf.ops.checks import FLOATS, check_flag, check_number, check_positive, check_tensor, statistics_dtype
from stable_rlhf.ops.operators import needs_operator, requires_grad
from stable_rlhf.ops.policy import fused
from stable_rlhf.ops.policy.arguments import check_linear, checked_loss, checked_rows, in_one_type, ready, tokens
from stable_rlhf.ops.policy.formula import loss_of, select_rows, statistics_of
from stable_rlhf.ops.policy.types import DEFAULT, PolicyCall, PolicyLossConfig, PolicyLossOutput, check_softcap


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    kind: Tensor | None = None,
    *,
    old_logprob: Tensor | None = None,
    advantage: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    config: PolicyLossConfig = DEFAULT,
    policy_denominator: float | Tensor | None = None,
    rehearsal_denominator: float | Tensor | None = None,
    entropy_denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    grad_tolerance: float = 0.0,
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    active_rows: int | None = None,
    process_group: object | None = None,
    grad_scale: float = 1.0,
    logit_scale: float = 1.0,
) -> PolicyLossOutput:
    """The loss of PPO with selective rehearsal from hidden states (arXiv 2309.10202, eqs. 2 and 9).

    With z = softcap(hidden weight^T + bias) / temperature, log pi = log_softmax(z)[target], lr = log pi - old_logprob
    and rho = exp(lr), log-ratios clamped to +-log_ratio_clamp:

        policy row     l = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)        (dual clip: at most -c A, A < 0)
                           + kl_coef kl(log pi - ref_logprob) - entropy_coef H(softmax(z))
        rehearsal row  l = -log pi        (eq. 9 as printed lacks the log and the sign of a loss)
        loss = sum_policy row_weight l / policy_denominator
             + rehearsal_coef sum_rehearsal row_weight l / rehearsal_denominator

    The config's `objective` puts other terms in the place of the clipped one, sg holding a factor constant:

        "cispo"        -sg(clip(rho, 1 - clip_low, 1 + clip_high)) A log pi             (arXiv 2506.13585)
        "reinforce"    -A log pi
        importance_level "sequence": lr is the mean of the sequence's lr, whatever the objective  (arXiv 2507.18071)
        kl_unbiased    kl_coef rho kl(...), with the gradient of both

    A sequence's ratio is known when all its rows are, so there the logits are made twice: four products in place of
    three, and `grad_tolerance` is exact.

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64; the leading dimensions are target's.
        weight: [V, H] of hidden's type (any float type under autocast), or float32 beside hidden states of 16 bits: the
            products are made in hidden's type, each gradient comes back in its own.
        target: [...] integer in [0, V), or -100 for a row to ignore. Already shifted by the caller.
        kind: [...] integer, 0 ignored, 1 policy token, 2 rehearsal token, or a mask of bool or float, which counts as 0
            and 1; None: 1 where target is not -100. A row is active when its kind is not 0 and its target not -100; no
            other row reaches a product.
        old_logprob: [...], read where there are policy rows only; None: on policy, where it is log pi itself, so that
            every ratio is 1 and its gradient that of log pi.
        advantage: [...], required when there are policy rows, and read there only.
        ref_logprob: [...], required when kl_coef is not 0 and there are policy rows, and read there only.
        bias: [V] or None.
        row_weight: [...] factor on each row's whole term; None: 1. This and advantage may be [B] or [B, 1] beside a
            target [B, L], and so may the denominators: one number for all tokens of a sequence.
        temperature: from 1e-30 to 1e30, a float or one for each row [...]; a constant, like row_weight and the
            denominators: tensors that require a gradient are refused. old_logprob, advantage and ref_logprob are
            constants too: they are detached, and get no gradient.
        policy_denominator, rehearsal_denominator: what the sum over each kind is divided by, a positive float or 0-d
            tensor; None: the number of such rows in this call.
        entropy_denominator: what the sum of the policy rows' entropies is divided by, in which all rows count alike;
            None: the bonus is a part of each row's term, under its row_weight and policy_denominator.
        cu_seqlens: [S + 1] integer, 0 first and the number of rows last: which of the flattened rows are a sequence,
            read where importance_level is "sequence" only; None: each row of a target [B, L] is one.
        grad_tolerance: tau; 0 is exact. Otherwise, chunk by chunk, vocabulary columns that hold next to nothing are
            left out of both backward products: a row's gradient by its logits is off by at most tau |c| / temperature
            in L1 norm (c = d loss / d log pi of the row), so its hidden gradient by at most that times the largest norm
            of a weight row. Weight rows that no chunk needed get an exactly zero gradient. On a GPU, where choosing
            columns takes longer than the products that it saves, and on the torch backend gradients are exact.
        logits_dtype: None or hidden's type: the product's own rounding; float32: logits of a float32 product.
        workspace_bytes: bound on the memory of one chunk of rows' logits and their statistics (one row at least). None:
            256 MiB on a CPU. On a GPU the larger of a float32 sum of the weight's gradient and 4 % of its memory (1 GiB
            where no weight's gradient is made), at most half of what is free; the last bits of the weight's gradient
            depend on how many chunks that makes.
        active_rows: how many rows are active, from a caller who knows: then nothing is read from a GPU before the
            products start. A wrong number is an error on a CPU; on a GPU the loss is NaN, and a later call tells why.
            Under graph capture nothing is read either, and every row goes through the products.
        process_group: the ranks over which the vocabulary is split: weight, bias (logits, in `policy_loss`) hold this
            rank's slice, in rank order; every rank gives the same rows, and results and hidden gradient are those of
            the whole vocabulary. None: this rank has it all.
        grad_scale: for training with a scaled loss, its scale. The gradients are made along with the loss, in float16
            mostly rounded to 0 before the backward pass multiplies them by the scale; this factor is in them from the
            start, and taken out of the upstream gradient. Nothing else changes: loss and metrics are as with 1.
        logit_scale: factor on the logits, before softcap and temperature.

    Raises:
        ValueError: names the argument whose shape, type, device or value is wrong, non-finite input included.
        NotImplementedError: `logits_dtype` for this type, or `process_group` on the backend "torch".
        RuntimeError: the backend forced by `backend(name)` does not exist or cannot run.
    """
    grad_scale = check_positive("grad_scale", grad_scale)
    grad_tolerance = check_number("grad_tolerance", grad_tolerance)
    if not 0.0 <= grad_tolerance < 1.0:
        raise ValueError(f"grad_tolerance: {grad_tolerance} is outside [0, 1)")
    target = check_linear(hidden, weight, bias, target, logits_dtype, workspace_bytes, active_rows)
    call = checked_loss("linear_policy_loss", PolicyCall(
        hidden, weight, bias, target, temperature, config, kind, old_logprob=old_logprob, advantage=advantage,
        ref_logprob=ref_logprob, row_weight=row_weight, policy_denominator=policy_denominator,
        rehearsal_denominator=rehearsal_denominator, entropy_denominator=entropy_denominator, cu_seqlens=cu_seqlens,
        logits_dtype=logits_dtype, workspace_bytes=workspace_bytes,
        active_rows=active_rows, grad_tolerance=grad_tolerance,
    ), process_group, logit_scale)  # fmt: skip
    if call.backend == "torch" and not needs_operator(hidden, call.backend):
        return loss_of(_with_one_head(call))
    if grad_scale != 1.0:  # a factor on every row's term, taken off again behind the operator
        unit = call.row_weight  # of each row by now, with denominators of each sequence in it
        if unit is None:
            unit = torch.ones(target.shape, device=target.device, dtype=torch.float32)
        unit = unit.to(statistics_dtype(unit.dtype))  # the scale may be beyond what 16 bits hold
        apart = call.entropy_denominator
        call = call._replace(
            row_weight=unit * grad_scale, entropy_denominator=None if apart is None else apart / grad_scale
        )
    loss, logprob, entropy, metrics, counts, *_ = fused.linear_policy_loss(in_one_type(call))
    if grad_scale != 1.0:
        loss = loss / grad_scale
        metrics = torch.cat([metrics[:2] / grad_scale, metrics[2:]])  # the two losses come first
    return _output(loss, logprob, entropy, metrics, counts)


def policy_loss(
    logits: Tensor,
    target: Tensor,
    kind: Tensor | None = None,
    *,
    old_logprob: Tensor | None = None,
    advantage: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    row_weight: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    config: PolicyLossConfig = DEFAULT,
    policy_denominator: float | Tensor | None = None,
    rehearsal_denominator: float | Tensor | None = None,
    entropy_denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    process_group: object | None = None,
    logit_scale: float = 1.0,
) -> PolicyLossOutput:
    """`linear_policy_loss` for logits [..., V] that exist already; softcap and temperature are applied here.

    The arguments, result and errors are those of `linear_policy_loss`.
    """
    check_tensor("logits", logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: shape {tuple(logits.shape)} instead of [..., V]")
    target = tokens(target, tuple(logits.shape[:-1]), logits.device)
    call = checked_loss("policy_loss", PolicyCall(
        logits, None, None, target, temperature, config, kind, old_logprob=old_logprob, advantage=advantage,
        ref_logprob=ref_logprob, row_weight=row_weight, policy_denominator=policy_denominator,
        rehearsal_denominator=rehearsal_denominator, entropy_denominator=entropy_denominator, cu_seqlens=cu_seqlens,
    ), process_group, logit_scale)  # fmt: skip
    if call.backend == "torch" and not needs_operator(logits, call.backend):
        return loss_of(call)
    loss, logprob, entropy, metrics, counts, *_ = fused.policy_loss(
        call._replace(needs=requires_grad(logits, None, None))
    )
    return _output(loss, logprob, entropy, metrics, counts)


def logprob_policy_loss(
    logprob: Tensor,
    kind: Tensor | None = None,
    *,
    entropy: Tensor | None = None,
    old_logprob: Tensor | None = None,
    advantage: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    row_weight: Tensor | None = None,
    config: PolicyLossConfig = DEFAULT,
    policy_denominator: float | Tensor | None = None,
    rehearsal_denominator: float | Tensor | None = None,
    entropy_denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> PolicyLossOutput:
    """The loss of `linear_policy_loss` from log-probs that exist already, in plain PyTorch on every device.

    For where a framework hands out log-probs. With hidden states at hand `linear_policy_loss` is cheaper: three
    products with the head, where log-probs and their gradient take four.

    Args:
        logprob: [...] log pi of each token, floating point; the loss is differentiable in it. What a row that is not
            active holds is not looked at.
        kind: [...] as in `linear_policy_loss`; None: every row is a policy token.
        entropy: [...] of the tokens' distributions, differentiable, required when entropy_coef is not 0.

    The other arguments, the result and the errors are those of `linear_policy_loss`.
    """
    check_tensor("logprob", logprob, dtypes=FLOATS)
    target = torch.zeros(logprob.shape, dtype=torch.int64, device=logprob.device)
    call = checked_rows(PolicyCall(
        logprob, None, None, target, 1.0, config, kind, old_logprob=old_logprob, advantage=advantage,
        ref_logprob=ref_logprob, row_weight=row_weight, policy_denominator=policy_denominator,
        rehearsal_denominator=rehearsal_denominator, entropy_denominator=entropy_denominator, cu_seqlens=cu_seqlens,
    ))  # fmt: skip
    if config.softcap is not None:
        raise ValueError(f"config: softcap={config.softcap} is for logits, and log-probs have it in them")
    if entropy is not None:
        check_tensor("entropy", entropy, shape=tuple(logprob.shape), device=logprob.device, dtypes=FLOATS)
    elif config.entropy_coef != 0.0:
        raise ValueError("entropy: required, entropy_coef is not 0")
    needs = (*requires_grad(logprob, entropy), False)
    apart = fused.LogprobLossCall(logprob, entropy, call._replace(source=target, needs=needs))
    if not needs_operator(logprob, "torch"):
        return apart.loss()
    loss, logprobs, entropies, metrics, counts, *_ = fused.logprob_policy_loss(apart)
    return _output(loss, logprobs, entropies, metrics, counts)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    active_rows: int | None = None,
    process_group: object | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(softcap(hidden weight^T + bias) / temperature)[target], and that distribution's entropy in nats.

    Both results have target's shape, are float32 (float64 for float64 input), 0 where target is -100, and are
    differentiable in hidden, weight and bias. The entropy is None unless asked for. Logits [T, V] are never whole in
    memory beyond `workspace_bytes`, with or without gradient.

    The arguments and errors are those of `linear_policy_loss`.
    """
    check_softcap(softcap)
    check_flag("entropy", entropy)
    target = check_linear(hidden, weight, bias, target, logits_dtype, workspace_bytes, active_rows)
    call = ready("linear_logprob", PolicyCall(
        hidden, weight, bias, target, temperature, DEFAULT if softcap is None else PolicyLossConfig(softcap=softcap),
        logits_dtype=logits_dtype, workspace_bytes=workspace_bytes, active_rows=active_rows,
    ), process_group, logit_scale)  # fmt: skip
    if call.backend == "torch" and not needs_operator(hidden, call.backend):
        rows = select_rows(call, call.width)
        logprob, row_entropy = statistics_of(_with_one_head(call), rows, entropy)
        return rows.scatter(logprob), rows.scatter(row_entropy) if entropy else None
    logprob, row_entropy, *_ = fused.linear_logprob(in_one_type(call))
    return logprob, row_entropy if entropy else None


class PolicyHead(nn.Module):
    """The head of a causal language model: hidden states in, loss or log-probs out, logits never whole.

    ZeRO-3 and FSDP gather a module's weights while its ``forward`` runs. A loss that takes ``lm_head.weight`` from
    outside finds an empty shard there; this module owns the same parameter (tied to the embedding or not) and uses it
    where it is whole.

        model.lm_head = PolicyHead.from_linear(model.lm_head)  # head(hidden) still is logits
        output = model.lm_head(hidden, target, kind, old_logprob=..., advantage=...)
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight  # [V, H]
        self.bias = bias  # [V]

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> PolicyHead:
        """The head over a linear layer's own parameters, which stay tied to whatever they are tied to."""
        return cls(linear.weight, linear.bias)

    def forward(
        self,
        hidden: Tensor,
        target: Tensor | None = None,
        kind: Tensor | None = None,
        *,
        loss: bool = True,
        **options: Any,
    ) -> Tensor | PolicyLossOutput | tuple[Tensor, Tensor | None]:
        """Logits [..., V] without ``target``; with it the output of :func:`linear_policy_loss`, or with ``loss=False``
        that of :func:`linear_logprob`. ``options`` are theirs."""
        if target is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        if loss:
            return linear_policy_loss(hidden, self.weight, target, kind, bias=self.bias, **options)
        if kind is not None:
            raise ValueError("kind: log-probs know no kinds; put -100 where target is to be ignored")
        return linear_logprob(hidden, self.weight, target, bias=self.bias, **options)


def _with_one_head(call: PolicyCall) -> PolicyCall:
    """For PyTorch's own operations, which autocast reaches without us."""
    return call if torch.is_autocast_enabled(call.source.device.type) else in_one_type(call)


_NAMES = fused.METRICS + fused.COUNTS


def _output(loss: Tensor, logprob: Tensor, entropy: Tensor, metrics: Tensor, counts: Tensor) -> PolicyLossOutput:
    named = dict(zip(_NAMES, (*metrics.unbind(), *counts.unbind()), strict=True))
    return PolicyLossOutput(loss, logprob, entropy, named)


for _name in ("linear_policy_loss", "policy_loss", "linear_logprob"):
    _fused = getattr(fused, _name)
    register(_name, {"triton": _fused, "cpu": _fused, "torch": statistics_of if _name == "linear_logprob" else loss_of})
