"""Per-token rewards, generalised advantage estimation and whitening: from scores to the advantages of PPO.

Packed layout everywhere: the tokens of S sequences lie behind one another, sequence s in
[cu_seqlens[s], cu_seqlens[s + 1]), without padding. All results are data, not differentiable.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from stable_rlhf.ops.backends import choice, cpu_isa, extension, implementation, register
from stable_rlhf.ops.checks import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_cu_seqlens,
    check_finite,
    check_flag,
    check_not_negative,
    check_number,
    check_share,
    check_tensor,
    check_values,
    first_true,
    statistics_dtype,
)
from stable_rlhf.ops.groups import group_name, resolve_group, stack_ranks
from stable_rlhf.ops.memory import fresh
from stable_rlhf.ops.operators import needs_operator

_FINE = 0  # SequenceStatus of csrc/sequence.h


def log_ratio_kl(log_ratio: Tensor, estimator: str) -> Tensor:
    """Schulman's estimators of KL(p || q) per sample from log_ratio = log p - log q, the sample drawn from p.

    k1 = log_ratio; k2 = log_ratio^2 / 2; k3 = exp(-log_ratio) - 1 + log_ratio; abs = |log_ratio|. The caller clamps
    log_ratio.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "abs":
        return log_ratio.abs()
    if estimator == "k2":
        return 0.5 * log_ratio * log_ratio
    return torch.expm1(-log_ratio) + log_ratio


def gae(
    reward: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation on packed sequences (arXiv 1506.02438, eq. 16).

    delta_t = reward_t + gamma value_{t+1} - value_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + value_t.
    After the last token of a sequence the value is 0, or `bootstrap_value` of that sequence (a cut-off episode).

    Args:
        reward, value: [T] floating point.
        cu_seqlens: [S + 1] integer, 0 first and T last; empty sequences are allowed.
        gamma, lam: discount and trace decay, both in [0, 1].
        bootstrap_value: [S] or None.

    Returns:
        advantage, return: [T] float32 (float64 for float64 input), without gradient.

    Raises:
        ValueError: names the argument whose shape, type, device or value is wrong.
    """
    check_tensor("reward", reward)
    if reward.ndim != 1:
        raise ValueError(f"reward: shape {tuple(reward.shape)} instead of [T]")
    check_tensor("value", value, shape=tuple(reward.shape), device=reward.device)
    bounds = check_cu_seqlens(cu_seqlens, reward.numel(), reward.device, read=False)
    gamma, lam = check_share("gamma", gamma), check_share("lam", lam)
    if bootstrap_value is not None:
        check_tensor("bootstrap_value", bootstrap_value, shape=(bounds.numel() - 1,), device=reward.device)
    backend = choice("gae", reward.device)
    if needs_operator(
        reward, backend
    ):  # not inside no_grad: compiled code would not switch gradients on again after an error
        last = None if bootstrap_value is None else bootstrap_value.detach()
        return _gae_operator(reward.detach(), value.detach(), bounds, gamma, lam, last, backend)
    with torch.no_grad():
        results: tuple[Tensor, Tensor] = implementation("gae", backend)(
            reward, value, bounds, gamma, lam, bootstrap_value
        )
    return results


@torch.library.custom_op("stable_rlhf::gae", mutates_args=())
def _gae_operator(
    reward: Tensor,
    value: Tensor,
    bounds: Tensor,
    gamma: float,
    lam: float,
    bootstrap_value: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    results: tuple[Tensor, Tensor] = implementation("gae", backend)(reward, value, bounds, gamma, lam, bootstrap_value)
    return results


@_gae_operator.register_fake
def _(reward, value, *rest):
    advantage = reward.new_empty(reward.shape, dtype=statistics_dtype(reward.dtype, value.dtype))
    return advantage, torch.empty_like(advantage)


def _gae_inputs(
    reward: Tensor, value: Tensor, bounds: Tensor, bootstrap_value: Tensor | None, *, check: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The inputs contiguous and in the type of the results, their values checked before where asked for."""
    if check:
        check_cu_seqlens(bounds, reward.numel(), reward.device, read=True)
        for name, values in (("reward", reward), ("value", value), ("bootstrap_value", bootstrap_value)):
            if values is not None:
                check_finite(name, values)
    dtype = statistics_dtype(reward.dtype, value.dtype)
    last = None if bootstrap_value is None else bootstrap_value.to(dtype).contiguous()
    return reward.to(dtype).contiguous(), value.to(dtype).contiguous(), bounds.contiguous(), last


def _gae_torch(
    reward: Tensor, value: Tensor, bounds: Tensor, gamma: float, lam: float, bootstrap_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    reward, value, bounds, bootstrap_value = _gae_inputs(
        reward.detach(), value.detach(), bounds, bootstrap_value, check=check_values(reward.device)
    )
    lengths = bounds.diff()
    advantage = torch.zeros_like(reward)
    longest = int(lengths.max()) if lengths.numel() else 0
    running = reward.new_zeros(lengths.numel())
    next_value = running.clone() if bootstrap_value is None else bootstrap_value.detach().clone()
    for back in range(1, longest + 1):
        rows = torch.nonzero(lengths >= back).squeeze(1)  # the sequences that have a back-th token from the end
        at = bounds[rows + 1] - back
        delta = (reward[at] + gamma * next_value[rows]) - value[at]
        running[rows] = delta + (gamma * lam) * running[rows]
        next_value[rows] = value[at]
        advantage[at] = running[rows]
    return advantage, advantage + value


def _gae_cpu(
    reward: Tensor, value: Tensor, bounds: Tensor, gamma: float, lam: float, bootstrap_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    module = extension()
    assert module is not None
    rewards, values, limits, last = _gae_inputs(reward, value, bounds, bootstrap_value, check=False)
    kernel = module.gae_f64 if rewards.dtype == torch.float64 else module.gae_f32
    advantage, returns = fresh(torch.empty_like(rewards)), fresh(torch.empty_like(rewards))
    status = kernel(
        reward=rewards.data_ptr(), value=values.data_ptr(), cu_seqlens=limits.data_ptr(),
        bootstrap_value=0 if last is None else last.data_ptr(), num_sequences=limits.numel() - 1,
        tokens=rewards.numel(), gamma=gamma, decay=gamma * lam, num_threads=torch.get_num_threads(),
        advantage=advantage.data_ptr(), returns=returns.data_ptr(),
    )  # fmt: skip
    if status != _FINE:  # find what to name; sound inputs whose sums overflow keep their infinities
        _gae_inputs(reward, value, bounds, bootstrap_value, check=True)
    return advantage, returns


def _gae_triton(
    reward: Tensor, value: Tensor, bounds: Tensor, gamma: float, lam: float, bootstrap_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    from stable_rlhf.kernels.sequence import gae as kernel

    reward, value, bounds, bootstrap_value = _gae_inputs(
        reward, value, bounds, bootstrap_value, check=check_values(reward.device)
    )
    return kernel(reward, value, bounds, gamma, lam, bootstrap_value)


register("gae", {"torch": _gae_torch, "cpu": _gae_cpu, "triton": _gae_triton})


def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the valid tokens, of every rank of `group` when one is given.

    The variance is the population's (divided by the count), in float64 and from distances to the mean, so one token
    gives 0 and a constant gives 0. Every rank of the group must call this, also one without a valid token: they
    exchange count, mean and squared distances once and merge them in the order of their ranks (Chan, Golub and LeVeque
    1979), so that all use the same numbers.

    Args:
        x: any shape, floating point.
        mask: x's shape, bool or numbers that are 0 where a token does not count; None: all count. What lies under the
            mask may be anything, NaN included.
        group: process group; `torch.distributed.group.WORLD` for all ranks, None for this process alone.
        shift_mean: False keeps the mean: only the spread is normalised.
        eps: added to the variance.

    Returns:
        x's shape, float32 (float64 for float64 input), exactly 0 where the mask is 0.

    Raises:
        ValueError: names the argument whose shape, type, device or value is wrong. A non-finite value on one rank is an
            error on all of them.
    """
    check_tensor("x", x)
    if mask is not None:
        mask = check_tensor(
            "mask",
            mask,
            shape=tuple(x.shape),
            device=x.device,
            dtypes=(torch.bool, *INTEGERS, *FLOATS),
        )
        if mask.is_floating_point() and not needs_operator(mask) and check_values(mask.device):
            check_finite("mask", mask)
    if group is not None and not hasattr(group, "group_name"):
        raise ValueError(f"group: expected a torch.distributed process group, got {type(group).__name__}")
    check_flag("shift_mean", shift_mean)
    eps = max(check_not_negative("eps", eps), 1e-300)  # a constant's 0 times this one's root is 0
    backend = choice("masked_whiten", x.device)
    if needs_operator(x, backend):
        return _whiten_operator(x.detach(), mask, group_name(group), shift_mean, eps, backend)
    with torch.no_grad():
        whitened: Tensor = implementation("masked_whiten", backend)(x, mask, group, shift_mean, eps)
    return whitened


@torch.library.custom_op("stable_rlhf::masked_whiten", mutates_args=())
def _whiten_operator(x: Tensor, mask: Tensor | None, group: str, shift_mean: bool, eps: float, backend: str) -> Tensor:
    whitened: Tensor = implementation("masked_whiten", backend)(x, mask, resolve_group(group), shift_mean, eps)
    return whitened


@_whiten_operator.register_fake
def _(x, *rest):
    return x.new_empty(x.shape, dtype=statistics_dtype(x.dtype))


def _merged(moments: Tensor) -> Tensor:
    """Count, mean and sum of squared distances of the union of parts, [3], from [parts, 3]."""
    count, mean, square = moments.unbind(1)
    # From the mean of the largest part: parts of one constant give this constant, to the bit.
    origin = mean.take(count.argmax())
    total = count.sum()
    middle = origin + (count * (mean - origin)).sum() / total.clamp(min=1.0)
    return torch.stack([total, middle, (square + count * (mean - middle) ** 2).sum()])


def _check_whiten(x: Tensor, mask: Tensor | None, means: Tensor) -> None:
    """Names the value that made a mean not finite, or the rank that has it; finite values whose sum overflowed pass."""
    if bool(means.isfinite().all()):
        return
    check_finite("x", x if mask is None else torch.where(mask != 0, x, 0.0))
    for rank, mean in enumerate(means.tolist()):
        if not math.isfinite(mean) and means.numel() > 1:
            raise ValueError(f"x: a valid value of rank {rank} of the group is not finite")


def _whiten_torch(
    x: Tensor, mask: Tensor | None, group: dist.ProcessGroup | None, shift_mean: bool, eps: float
) -> Tensor:
    x = x.detach()
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    zero = torch.zeros((), dtype=torch.float64, device=x.device)
    # `where`, not a product: what lies under the mask may be NaN.
    wide = torch.where(valid, x.double(), zero)
    count = valid.sum().double()
    mean = wide.sum() / count.clamp(min=1.0)
    square = torch.where(valid, wide - mean, zero).square().sum()
    moments = torch.stack([count, mean, square])
    parts = moments[None] if group is None else stack_ranks(moments, group)
    if check_values(x.device):
        _check_whiten(x, mask, parts[:, 1])
    count, mean, square = _merged(parts)
    scaled = torch.where(valid, wide - mean, zero) * torch.rsqrt(square / count.clamp(min=1.0) + eps)
    if not shift_mean:
        scaled = torch.where(valid, scaled + mean, zero)
    return scaled.to(statistics_dtype(x.dtype))


def _whiten_inputs(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Contiguous, x in the type of the result and the mask in bytes."""
    if mask is not None and mask.dtype.itemsize > 1:
        mask = mask != 0
    return (
        x.to(statistics_dtype(x.dtype)).contiguous(),
        None if mask is None else mask.contiguous().view(torch.uint8),
    )


def _whiten_cpu(
    x: Tensor, mask: Tensor | None, group: dist.ProcessGroup | None, shift_mean: bool, eps: float
) -> Tensor:
    module = extension()
    assert module is not None
    suffix = "f64" if x.dtype == torch.float64 else "f32"
    values, valid = _whiten_inputs(x, mask)
    arguments = values.data_ptr(), 0 if valid is None else valid.data_ptr(), values.numel()
    threads = torch.get_num_threads()
    count, mean, square = getattr(module, f"masked_moments_{suffix}")(*arguments, threads, cpu_isa())
    if group is not None:
        parts = stack_ranks(torch.tensor([count, mean, square], dtype=torch.float64, device="cpu"), group)
        _check_whiten(x, mask, parts[:, 1])
        count, mean, square = _merged(parts).tolist()
    elif not math.isfinite(mean):
        _check_whiten(x, mask, torch.tensor([mean], dtype=torch.float64, device="cpu"))
    out = fresh(torch.empty_like(values))
    variance = square / max(count, 1.0) + eps
    getattr(module, f"masked_scale_{suffix}")(
        *arguments, mean, variance, shift_mean, threads, cpu_isa(), out.data_ptr()
    )
    return out


def _whiten_triton(
    x: Tensor, mask: Tensor | None, group: dist.ProcessGroup | None, shift_mean: bool, eps: float
) -> Tensor:
    from stable_rlhf.kernels import sequence as kernels

    values, valid = _whiten_inputs(x, mask)
    parts = kernels.masked_moments(values, valid)
    if group is not None:
        parts = stack_ranks(_merged(parts), group)
    if check_values(x.device):
        _check_whiten(x, mask, parts[:, 1] if group is not None else parts[:, 1].sum()[None])
    return kernels.masked_scale(values, valid, parts, shift_mean, eps)


register("masked_whiten", {"torch": _whiten_torch, "cpu": _whiten_cpu, "triton": _whiten_triton})


def token_rewards(
    logprob: Tensor,
    ref_logprob: Tensor,
    score: Tensor,
    cu_seqlens: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    clamp: float = 20.0,
) -> Tensor:
    """The reward of every response token (arXiv 2309.10202, eq. 2).

    reward_t = -kl_coef kl(d_t), d_t = log pi(y_t) - log pi_init(y_t), plus the sequence's score on its last token.
    k1: kl = d; k2: kl = d^2 / 2; k3: kl = exp(-d) - 1 + d, of which the kernels keep the digits near d = 0.

    Args:
        logprob, ref_logprob: [T] packed response tokens under the sampling policy and the initial one.
        score: [S], one score for each sequence.
        cu_seqlens: [S + 1]; every sequence has at least one token, for its score needs a place.
        kl_coef: beta, at least 0.
        kl_estimator: "k1" (the paper), "k2" or "k3".
        clamp: bound on the absolute log-ratio.

    Returns:
        [T] float32 (float64 for float64 input).

    Raises:
        ValueError: names the argument; an empty sequence is one.
    """
    check_tensor("logprob", logprob)
    if logprob.ndim != 1:
        raise ValueError(f"logprob: shape {tuple(logprob.shape)} instead of [T]")
    device = logprob.device
    check_tensor("ref_logprob", ref_logprob, shape=tuple(logprob.shape), device=device)
    bounds = check_cu_seqlens(cu_seqlens, logprob.numel(), device, read=False)
    check_tensor("score", score, shape=(bounds.numel() - 1,), device=device)
    check_choice("kl_estimator", kl_estimator, ("k1", "k2", "k3"))
    kl_coef, clamp = check_not_negative("kl_coef", kl_coef), check_number("clamp", clamp)
    if not clamp > 0:
        raise ValueError(f"clamp: {clamp} is not positive")
    clamp = min(clamp, 1e30)  # what float32 holds; the same as no bound
    settings = bounds, kl_coef, kl_estimator, clamp
    backend = choice("token_rewards", device)
    if needs_operator(logprob, backend):
        return _rewards_operator(logprob.detach(), ref_logprob.detach(), score.detach(), *settings, backend)
    with torch.no_grad():
        reward: Tensor = implementation("token_rewards", backend)(logprob, ref_logprob, score, *settings)
    return reward


@torch.library.custom_op("stable_rlhf::token_rewards", mutates_args=())
def _rewards_operator(
    logprob: Tensor,
    ref_logprob: Tensor,
    score: Tensor,
    bounds: Tensor,
    kl_coef: float,
    kl_estimator: str,
    clamp: float,
    backend: str,
) -> Tensor:
    reward: Tensor = implementation("token_rewards", backend)(
        logprob, ref_logprob, score, bounds, kl_coef, kl_estimator, clamp
    )
    return reward


@_rewards_operator.register_fake
def _(logprob, ref_logprob, score, *rest):
    return logprob.new_empty(logprob.shape, dtype=statistics_dtype(logprob.dtype, ref_logprob.dtype, score.dtype))


def _rewards_inputs(
    logprob: Tensor, ref_logprob: Tensor, score: Tensor, bounds: Tensor, *, check: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inputs contiguous and in the type of the results, their values checked before where asked for."""
    if check:
        check_cu_seqlens(bounds, logprob.numel(), logprob.device, read=True)
        empty = bounds.diff() == 0
        if bool(empty.any()):
            raise ValueError(f"cu_seqlens: sequence {first_true(empty)} is empty, there is no token to carry its score")
        for name, values in (("logprob", logprob), ("ref_logprob", ref_logprob), ("score", score)):
            check_finite(name, values)
    dtype = statistics_dtype(logprob.dtype, ref_logprob.dtype, score.dtype)
    first, second, third = (x.to(dtype).contiguous() for x in (logprob, ref_logprob, score))
    return first, second, third, bounds.contiguous()


def _rewards_torch(
    logprob: Tensor, ref_logprob: Tensor, score: Tensor, bounds: Tensor, kl_coef: float, estimator: str, clamp: float
) -> Tensor:
    logprob, ref_logprob, score, bounds = _rewards_inputs(
        logprob.detach(), ref_logprob.detach(), score.detach(), bounds, check=check_values(logprob.device)
    )
    reward = log_ratio_kl((logprob - ref_logprob).clamp(-clamp, clamp), estimator) * -kl_coef
    if logprob.numel():
        # An unread empty sequence must not put its score on the token before it.
        reward.index_add_(0, (bounds[1:] - 1).clamp(min=0), score.masked_fill(bounds.diff() == 0, 0.0))
    return reward


def _rewards_cpu(
    logprob: Tensor, ref_logprob: Tensor, score: Tensor, bounds: Tensor, kl_coef: float, estimator: str, clamp: float
) -> Tensor:
    module = extension()
    assert module is not None
    policy, initial, scores, limits = _rewards_inputs(logprob, ref_logprob, score, bounds, check=False)
    kernel = module.token_rewards_f64 if policy.dtype == torch.float64 else module.token_rewards_f32
    reward = fresh(torch.empty_like(policy))
    status = kernel(
        logprob=policy.data_ptr(), ref_logprob=initial.data_ptr(), score=scores.data_ptr(),
        cu_seqlens=limits.data_ptr(), num_sequences=limits.numel() - 1, tokens=policy.numel(), kl_coef=kl_coef,
        kl_estimator=int(estimator[1]), clamp=clamp, num_threads=torch.get_num_threads(), reward=reward.data_ptr(),
        isa=cpu_isa(),
    )  # fmt: skip
    if status != _FINE:  # find what to name; finite inputs whose difference overflows were clamped as they should be
        _rewards_inputs(logprob, ref_logprob, score, bounds, check=True)
    return reward


def _rewards_triton(
    logprob: Tensor, ref_logprob: Tensor, score: Tensor, bounds: Tensor, kl_coef: float, estimator: str, clamp: float
) -> Tensor:
    from stable_rlhf.kernels.sequence import token_rewards as kernel

    inputs = _rewards_inputs(logprob, ref_logprob, score, bounds, check=check_values(logprob.device))
    return kernel(*inputs, kl_coef, estimator, clamp)


register("token_rewards", {"torch": _rewards_torch, "cpu": _rewards_cpu, "triton": _rewards_triton})
