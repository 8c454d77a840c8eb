"""PPO and rehearsal tokens in one loss, from logits or straight from hidden states; and token log-probabilities.

This file is the plain PyTorch reference: statistics in float32 (float64 for float64 input), one chunk of rows at a
time, each chunk recomputed in the backward pass so that logits [T, V] never exist whole.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stable_rlhf.ops._backend import choose, register
from stable_rlhf.ops._checks import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_finite,
    check_tensor,
    first_true,
    statistics_dtype,
)
from stable_rlhf.ops._sequence_ops import log_ratio_kl

IGNORE = -100
POLICY, REHEARSAL = 1, 2


def _check_softcap(softcap: float | None) -> None:
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap: {softcap} is not positive")


@dataclass(frozen=True)
class PolicyLossConfig:
    """The constants of `linear_policy_loss` and `policy_loss`.

    Args:
        clip_low: the ratio is clipped below 1 - clip_low.
        clip_high: the ratio is clipped above 1 + clip_high.
        dual_clip: bound c > 1 on the loss of negative advantages, -c A at most (arXiv 1912.09729); None: off.
        kl_coef: coefficient of the KL towards `ref_logprob` in the loss.
        kl_estimator: "k1", "k2" or "k3"; k1's expected gradient on policy is 0, so it warns once.
        entropy_coef: coefficient of the entropy bonus of policy tokens.
        rehearsal_coef: gamma of arXiv 2309.10202 eq. 9.
        softcap: logits become softcap tanh(logits / softcap) before the temperature; None: off.
        log_ratio_clamp: bound on the absolute value of every log-ratio before it is used.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    rehearsal_coef: float = 0.01
    softcap: float | None = None
    log_ratio_clamp: float = 20.0

    def __post_init__(self) -> None:
        check_choice("kl_estimator", self.kl_estimator, ("k1", "k2", "k3"))
        if not 0.0 <= self.clip_low <= 1.0:
            raise ValueError(f"clip_low: {self.clip_low} is outside [0, 1]")
        if not self.clip_high >= 0.0:
            raise ValueError(f"clip_high: {self.clip_high} is negative")
        if self.dual_clip is not None and not self.dual_clip > 1.0:
            raise ValueError(f"dual_clip: {self.dual_clip} is not greater than 1")
        for name in ("kl_coef", "entropy_coef", "rehearsal_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: {getattr(self, name)} is not finite")
        _check_softcap(self.softcap)
        if not self.log_ratio_clamp > 0.0:
            raise ValueError(f"log_ratio_clamp: {self.log_ratio_clamp} is not positive")


class PolicyLossOutput(NamedTuple):
    """What the policy losses return.

    loss: 0-d, differentiable in hidden states (or logits), weight and bias.
    logprob, entropy: detached, target's shape, float32 (float64 for float64 input), 0 where ignored.
    metrics: detached 0-d tensors on the device. `policy_loss` and `rehearsal_loss` (each over its denominator, the
        latter before `rehearsal_coef`); over policy tokens `clip_fraction` (the clipped, dual clip included),
        `approx_kl` (k3 of the new against the old policy), `max_ratio`, `entropy` (mean); `policy_tokens` and
        `rehearsal_tokens` (counts). A mean over no token is 0.
    """

    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class _Rows:
    """The active rows of a call: everything below `index` holds those rows only."""

    shape: torch.Size
    index: Tensor | None  # [A] into the flattened rows; None: all of them
    target: Tensor  # [A]
    temperature: float | Tensor  # [A] when per row
    policy: Tensor  # [P] into the active rows
    rehearsal: Tensor  # [Q] into the active rows

    def take(self, name: str, value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The active rows of an argument of target's shape."""
        if value is None:
            return None
        check_tensor(name, value, shape=tuple(self.shape), device=self.target.device)
        flat = value.detach().reshape(-1)
        return (flat if self.index is None else flat[self.index]).to(dtype)

    def scatter(self, value: Tensor) -> Tensor:
        """[A] back to target's shape, 0 where ignored."""
        if self.index is None:
            return value.reshape(self.shape)
        return value.new_zeros(self.shape.numel()).index_copy(0, self.index, value).reshape(self.shape)


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
    config: PolicyLossConfig = PolicyLossConfig(),
    policy_denominator: float | Tensor | None = None,
    rehearsal_denominator: float | Tensor | None = None,
    grad_tolerance: float = 0.0,
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int = 256 << 20,
    process_group: object | None = None,
) -> PolicyLossOutput:
    """The loss of PPO with selective rehearsal from hidden states (arXiv 2309.10202, eqs. 2 and 9).

    With z = softcap(hidden weight^T + bias) / temperature, log pi = log_softmax(z)[target], lr = log pi - old_logprob
    and rho = exp(lr), log-ratios clamped to +-log_ratio_clamp:

        policy row     l = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)        (dual clip: at most -c A, A < 0)
                           + kl_coef kl(log pi - ref_logprob) - entropy_coef H(softmax(z))
        rehearsal row  l = -log pi        (eq. 9 as printed lacks the log and the sign of a loss)
        loss = sum_policy row_weight l / policy_denominator
             + rehearsal_coef sum_rehearsal row_weight l / rehearsal_denominator

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64; the leading dimensions are target's.
        weight: [V, H] of hidden's type (any float type under autocast).
        target: [...] int64 in [0, V), or -100 for a row to ignore. Already shifted by the caller.
        kind: [...] integer, 0 ignored, 1 policy token, 2 rehearsal token; None: 1 where target is not -100. A row is
            active when its kind is not 0 and its target not -100; no other row reaches a product.
        old_logprob, advantage: [...], required when there are policy rows, and read there only.
        ref_logprob: [...], required when kl_coef is not 0 and there are policy rows, and read there only.
        bias: [V] or None.
        row_weight: [...] factor on each row's whole term; None: 1.
        temperature: positive, a float or one for each row [...].
        policy_denominator, rehearsal_denominator: what the sum over each kind is divided by, a positive float or 0-d
            tensor; None: the number of such rows in this call.
        grad_tolerance: must be 0 (exact).
        logits_dtype: None or hidden's type: the product's own rounding; float32: logits of a float32 product.
        workspace_bytes: bound on the memory of one chunk of rows' logits and their statistics (one row at least).
        process_group: must be None.

    Raises:
        ValueError: names the argument whose shape, type, device or value is wrong, non-finite input included.
        NotImplementedError: an option this version does not have yet.
        RuntimeError: the backend forced by `backend(name)` does not exist or cannot run.
    """
    if grad_tolerance != 0.0:
        raise NotImplementedError(f"grad_tolerance={grad_tolerance}: not yet: only 0, the exact gradient")
    _check_linear(hidden, weight, bias, target, logits_dtype, workspace_bytes, process_group)
    rows = _select_rows(target, kind, temperature, weight.shape[0], hidden.device)
    run = choose("linear_policy_loss", hidden.device)
    logprob, entropy = run(
        _gather(hidden, rows),
        weight,
        bias,
        rows,
        config.softcap,
        config.entropy_coef != 0.0,
        logits_dtype,
        workspace_bytes,
    )
    return _loss(
        rows,
        logprob,
        entropy,
        config,
        old_logprob,
        advantage,
        ref_logprob,
        row_weight,
        policy_denominator,
        rehearsal_denominator,
    )


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
    config: PolicyLossConfig = PolicyLossConfig(),
    policy_denominator: float | Tensor | None = None,
    rehearsal_denominator: float | Tensor | None = None,
    process_group: object | None = None,
) -> PolicyLossOutput:
    """`linear_policy_loss` for logits [..., V] that exist already; softcap and temperature are applied here.

    The arguments, result and errors are those of `linear_policy_loss`.
    """
    _check_process_group(process_group)
    check_tensor("logits", logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: shape {tuple(logits.shape)} instead of [..., V]")
    check_tensor("target", target, shape=tuple(logits.shape[:-1]), device=logits.device, dtypes=(torch.int64,))
    rows = _select_rows(target, kind, temperature, logits.shape[-1], logits.device)
    run = choose("policy_loss", logits.device)
    logprob, entropy = run(
        _gather(logits, rows), rows.target, rows.temperature, config.softcap, config.entropy_coef != 0.0
    )
    return _loss(
        rows,
        logprob,
        entropy,
        config,
        old_logprob,
        advantage,
        ref_logprob,
        row_weight,
        policy_denominator,
        rehearsal_denominator,
        source="logits",
    )


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
    workspace_bytes: int = 256 << 20,
    process_group: object | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(softcap(hidden weight^T + bias) / temperature)[target], and that distribution's entropy in nats.

    Both results have target's shape, are float32 (float64 for float64 input), 0 where target is -100, and are
    differentiable in hidden, weight and bias. The entropy is None unless asked for. Logits [T, V] are never whole in
    memory beyond `workspace_bytes`, with or without gradient.

    The arguments and errors are those of `linear_policy_loss`.
    """
    _check_softcap(softcap)
    _check_linear(hidden, weight, bias, target, logits_dtype, workspace_bytes, process_group)
    rows = _select_rows(target, None, temperature, weight.shape[0], hidden.device)
    run = choose("linear_logprob", hidden.device)
    logprob, row_entropy = run(
        _gather(hidden, rows), weight, bias, rows, softcap, entropy, logits_dtype, workspace_bytes
    )
    _check_statistics(logprob, row_entropy, rows, "hidden, weight or bias")
    return rows.scatter(logprob), rows.scatter(row_entropy) if entropy else None


def _statistics(
    logits: Tensor, target: Tensor, temperature: float | Tensor, softcap: float | None, entropy_grad: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability of the target and entropy, both [n], of logits [n, V]."""
    z = logits.to(statistics_dtype(logits.dtype))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        z = z / temperature.to(z.dtype).unsqueeze(-1)
    elif temperature != 1.0:
        z = z / temperature
    # From log_softmax and not as z[target] - logsumexp(z): at logits of 1e4 that difference loses three digits.
    log_p = torch.log_softmax(z, dim=-1)
    logprob = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if not entropy_grad:
        log_p = log_p.detach()
    return logprob, -(log_p.exp() * log_p).sum(-1)


def _linear_statistics_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: _Rows,
    softcap: float | None,
    entropy_grad: bool,
    logits_dtype: torch.dtype | None,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """`_statistics` of the active rows' logits, chunk by chunk; hidden is [A, H]."""
    wide = logits_dtype not in (None, hidden.dtype)
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    statistics_bytes = statistics_dtype(hidden.dtype).itemsize
    # At the peak a chunk holds about five arrays of statistics beside its logits.
    chunk = max(1, workspace_bytes // (weight.shape[0] * (5 * statistics_bytes + hidden.element_size())))
    count = hidden.shape[0]

    # Gradients of several chunks add up where the chunks' graphs join. Joining at a float32 copy of a 16-bit weight
    # keeps that sum in float32: summed in bfloat16 it is off by 1.5 times as much.
    def join(x: Tensor | None) -> Tensor | None:
        widen = needs_grad and count > chunk and x is not None and x.requires_grad and x.element_size() == 2
        return x.float() if widen and x is not None else x

    def statistics(h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, temperature: float | Tensor):
        with torch.autocast(h.device.type, enabled=not wide and torch.is_autocast_enabled(h.device.type)):
            if wide:
                h, w, b = h.to(logits_dtype), w.to(logits_dtype), None if b is None else b.to(logits_dtype)
            else:
                w, b = w.to(weight.dtype), None if b is None or bias is None else b.to(bias.dtype)
            logits = F.linear(h, w, b)
        return _statistics(logits, target, temperature, softcap, entropy_grad)

    step: Callable[..., tuple[Tensor, Tensor]] = statistics
    if needs_grad and count > chunk:
        step = functools.partial(checkpoint, statistics, use_reentrant=False, preserve_rng_state=False)
    joined_weight, joined_bias = join(weight), join(bias)
    parts = []
    # No row at all still makes one (empty) chunk: its zero keeps the loss connected to hidden and weight.
    for begin in range(0, max(count, 1), chunk):
        part = slice(begin, min(begin + chunk, count))
        temperature = rows.temperature[part] if isinstance(rows.temperature, Tensor) else rows.temperature
        parts.append(step(hidden[part], joined_weight, joined_bias, rows.target[part], temperature))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _loss(
    rows: _Rows,
    logprob: Tensor,
    entropy: Tensor,
    config: PolicyLossConfig,
    old_logprob: Tensor | None,
    advantage: Tensor | None,
    ref_logprob: Tensor | None,
    row_weight: Tensor | None,
    policy_denominator: float | Tensor | None,
    rehearsal_denominator: float | Tensor | None,
    source: str = "hidden, weight or bias",
) -> PolicyLossOutput:
    """The loss and its metrics from the active rows' statistics [A]."""
    dtype = logprob.dtype
    _check_statistics(logprob, entropy, rows, source)
    weights = rows.take("row_weight", row_weight, dtype)
    if weights is not None:
        check_finite("row_weight", weights)
    given = {"old_logprob": old_logprob, "advantage": advantage, "ref_logprob": ref_logprob}
    taken = {name: rows.take(name, value, dtype) for name, value in given.items()}
    if config.kl_coef == 0.0:
        taken["ref_logprob"] = None
    required = ["old_logprob", "advantage"] + (["ref_logprob"] if config.kl_coef != 0.0 else [])
    policy = {}
    for name in required:
        value = taken[name]
        if value is None and rows.policy.numel():
            raise ValueError(f"{name}: required, there are {rows.policy.numel()} policy rows")
        policy[name] = logprob.new_zeros(0) if value is None else value[rows.policy]
        check_finite(name, policy[name])

    clamp = config.log_ratio_clamp
    new = logprob[rows.policy]
    adv = policy["advantage"]
    log_ratio = (new - policy["old_logprob"]).clamp(-clamp, clamp)
    ratio = log_ratio.exp()
    unclipped = ratio * adv
    surrogate = torch.minimum(unclipped, ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high) * adv)
    if config.dual_clip is not None:
        surrogate = torch.where(adv < 0, torch.maximum(surrogate, config.dual_clip * adv), surrogate)
    term = -surrogate
    if config.kl_coef != 0.0:
        if config.kl_estimator == "k1":
            _warn_k1()
        reference = (new - policy["ref_logprob"]).clamp(-clamp, clamp)
        term = term + config.kl_coef * log_ratio_kl(reference, config.kl_estimator)
    if config.entropy_coef != 0.0:
        term = term - config.entropy_coef * entropy[rows.policy]
    nll = -logprob[rows.rehearsal]
    if weights is not None:
        term, nll = term * weights[rows.policy], nll * weights[rows.rehearsal]
    policy_mean = _over("policy_denominator", term, policy_denominator)
    rehearsal_mean = _over("rehearsal_denominator", nll, rehearsal_denominator)

    with torch.no_grad():
        count = max(ratio.numel(), 1)
        metrics = {
            "policy_loss": policy_mean.detach(),
            "rehearsal_loss": rehearsal_mean.detach(),
            "clip_fraction": (surrogate != unclipped).sum().to(dtype) / count,
            "approx_kl": log_ratio_kl(-log_ratio, "k3").sum() / count,
            "max_ratio": torch.cat([ratio.new_zeros(1), ratio]).max(),
            "entropy": entropy[rows.policy].sum() / count,
            "policy_tokens": torch.tensor(rows.policy.numel(), device=ratio.device),
            "rehearsal_tokens": torch.tensor(rows.rehearsal.numel(), device=ratio.device),
        }
    loss = policy_mean + config.rehearsal_coef * rehearsal_mean
    return PolicyLossOutput(loss, rows.scatter(logprob.detach()), rows.scatter(entropy.detach()), metrics)


def _over(name: str, term: Tensor, denominator: float | Tensor | None) -> Tensor:
    """sum(term) / denominator; exactly 0, but connected to the graph, when there is no term."""
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"{name}: shape {tuple(denominator.shape)} instead of a single number")
        denominator = denominator.detach().to(device=term.device, dtype=term.dtype).reshape(())
    if term.numel() == 0:
        return term.sum()
    if denominator is None:
        return term.sum() / term.numel()
    if not bool(denominator > 0):
        raise ValueError(f"{name}: {float(denominator)} is not positive, and there are {term.numel()} such rows")
    return term.sum() / denominator


def _gather(value: Tensor, rows: _Rows) -> Tensor:
    flat = value.reshape(-1, value.shape[-1])
    return flat if rows.index is None else flat.index_select(0, rows.index)


def _select_rows(
    target: Tensor, kind: Tensor | None, temperature: float | Tensor, vocabulary: int, device: torch.device
) -> _Rows:
    """Checks the values of target, kind and temperature and finds the active rows (synchronises)."""
    flat = target.reshape(-1)
    active = flat != IGNORE
    outside = active & ((flat < 0) | (flat >= vocabulary))
    if kind is not None:
        check_tensor("kind", kind, shape=tuple(target.shape), device=device, dtypes=INTEGERS)
        kind = kind.reshape(-1)
        unknown = (kind < 0) | (kind > REHEARSAL)
        if bool(unknown.any()):
            position = first_true(unknown)
            raise ValueError(
                f"kind: {int(kind[position])} at row {position}; expected 0 (ignored), 1 (policy) or 2 (rehearsal)"
            )
        active = active & (kind != 0)
        outside = outside & (kind != 0)
    if bool(outside.any()):
        position = first_true(outside)
        raise ValueError(
            f"target: {int(flat[position])} at row {position} is outside [0, {vocabulary}) and not {IGNORE}"
        )
    index: Tensor | None = torch.nonzero(active).squeeze(1)
    if index is not None and index.numel() == flat.numel():
        index = None
    if index is not None:
        flat = flat[index]
        kind = None if kind is None else kind[index]
    if kind is None:
        policy = torch.arange(flat.numel(), device=device)
        rehearsal = policy[:0]
    else:
        policy, rehearsal = (torch.nonzero(kind == which).squeeze(1) for which in (POLICY, REHEARSAL))
    rows = _Rows(target.shape, index, flat, 1.0, policy, rehearsal)
    return _Rows(target.shape, index, flat, _row_temperature(temperature, rows), policy, rehearsal)


def _row_temperature(temperature: float | Tensor, rows: _Rows) -> float | Tensor:
    if isinstance(temperature, Tensor) and temperature.numel() == 1 and temperature.ndim == 0:
        temperature = float(temperature)
    if not isinstance(temperature, Tensor):
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature: {temperature} is not a positive number")
        return float(temperature)
    taken = rows.take("temperature", temperature, temperature.dtype)
    assert taken is not None
    if not bool(((taken > 0) & torch.isfinite(taken)).all()):
        raise ValueError("temperature: has values that are not positive numbers")
    return taken


def _check_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    logits_dtype: torch.dtype | None,
    workspace_bytes: int,
    process_group: object | None,
) -> None:
    _check_process_group(process_group)
    check_tensor("hidden", hidden)
    if hidden.ndim < 1:
        raise ValueError("hidden: a 0-d tensor instead of [..., H]")
    device = hidden.device
    # Under autocast the product casts its operands itself.
    alike = FLOATS if torch.is_autocast_enabled(device.type) else (hidden.dtype,)
    check_tensor("weight", weight, device=device, dtypes=alike)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        raise ValueError(f"weight: shape {tuple(weight.shape)} instead of [V, {hidden.shape[-1]}]")
    if bias is not None:
        check_tensor("bias", bias, shape=(weight.shape[0],), device=device, dtypes=alike)
    check_tensor("target", target, shape=tuple(hidden.shape[:-1]), device=device, dtypes=(torch.int64,))
    if logits_dtype not in (None, hidden.dtype) and (
        logits_dtype != torch.float32 or hidden.dtype not in (torch.bfloat16, torch.float16)
    ):
        raise NotImplementedError(f"logits_dtype={logits_dtype}: not yet for hidden of {hidden.dtype}")
    if workspace_bytes < 1:
        raise ValueError(f"workspace_bytes: {workspace_bytes} is not positive")


def _check_process_group(process_group: object | None) -> None:
    if process_group is not None:
        raise NotImplementedError("process_group: not yet: the weight must hold the whole vocabulary")


def _check_statistics(logprob: Tensor, entropy: Tensor, rows: _Rows, source: str) -> None:
    """A non-finite logit anywhere in a row makes that row's log-probability or entropy non-finite: look there."""
    bad = ~(torch.isfinite(logprob.detach()) & torch.isfinite(entropy.detach()))
    if bool(bad.any()):
        position = first_true(bad)
        row = position if rows.index is None else int(rows.index[position])
        raise ValueError(f"{source}: non-finite logits at row {row}")


@functools.cache
def _warn_k1() -> None:
    warnings.warn(
        "kl_estimator 'k1' in the loss: its expected gradient on policy is 0; "
        "use k2 or k3, or put the KL into the reward",
        stacklevel=4,
    )


register("linear_policy_loss", {"torch": _linear_statistics_torch})
register("policy_loss", {"torch": _statistics})
register("linear_logprob", {"torch": _linear_statistics_torch})
