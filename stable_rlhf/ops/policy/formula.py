"""The policy losses in plain PyTorch, the truth that every other backend is tested against: which rows of a call are
active, what their loss is made of, the loss from their log-probs and entropies, and these from logits.

Statistics in float32 (float64 for float64 input), one chunk of rows at a time, each chunk recomputed in the backward
pass so that logits [T, V] never exist whole. Gradients by autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stable_rlhf.ops.backends import transformed
from stable_rlhf.ops.checks import (
    INTEGERS,
    check_finite,
    check_positive,
    check_tensor,
    check_values,
    first_true,
    statistics_dtype,
)
from stable_rlhf.ops.policy.chunks import WORKSPACE_BYTES
from stable_rlhf.ops.policy.denominators import denominators
from stable_rlhf.ops.policy.types import (
    IGNORE,
    Kind,
    PolicyCall,
    PolicyLossConfig,
    PolicyLossOutput,
    warn_k1,
)
from stable_rlhf.ops.sequence import log_ratio_kl


@dataclass(frozen=True)
class Rows:
    """The active rows of a call: everything below `index` holds those rows only, A of them."""

    shape: torch.Size
    index: Tensor | None  # [A] into the flattened rows; None: all of them
    target: Tensor  # [A] int64
    kind: Tensor  # [A] int8, Kind.POLICY or Kind.REHEARSAL; also Kind.IGNORED where only the device knows the counts
    policy_count: int | None  # None: only the device knows
    rehearsal_count: int | None
    temperature: float | Tensor  # [A] when per row
    counts: Tensor | None = None  # the same on a GPU, as `kernels.policy_call` left them there

    def take(self, name: str, value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The active rows of an argument of target's shape."""
        if value is None:
            return None
        check_tensor(name, value, shape=tuple(self.shape), device=self.target.device)
        flat = value.detach().reshape(-1)
        return (flat if self.index is None else flat[self.index]).to(dtype)

    def taking_part(self) -> Tensor | None:
        """[A] bool, where only the device knows how many of them are active; else None, for all of them are."""
        if self.policy_count is not None:
            return None
        if self.index is None:
            return self.kind != Kind.IGNORED
        assert self.counts is not None  # behind the active rows there is room
        return torch.arange(len(self.target), device=self.target.device, dtype=torch.int64) < self.counts[0]

    def gather(self, value: Tensor) -> Tensor:
        """The active rows of [..., n] as [A, n]."""
        flat = value.reshape(-1, value.shape[-1])
        return flat if self.index is None else flat.index_select(0, self.index)

    def scatter(self, value: Tensor) -> Tensor:
        """[A] back to target's shape, 0 where ignored."""
        if self.index is None:
            return value.reshape(self.shape)
        return value.new_zeros(self.shape.numel()).index_copy(0, self.index, value).reshape(self.shape)

    def inverse_temperature(self) -> Tensor:
        """[A] float32."""
        if isinstance(self.temperature, Tensor):
            return self.temperature.double().reciprocal().float()
        return torch.full(self.target.shape, 1.0 / self.temperature, dtype=torch.float32, device=self.target.device)


def select_rows(call: PolicyCall, vocabulary: int) -> Rows:
    """Checks the values of target, kind and temperature and finds the active rows: one synchronisation.

    A row is active when its kind is not 0 and its target not -100.
    """
    target, kind, device = call.target, call.kind, call.source.device
    flat = target.reshape(-1)
    active = flat != IGNORE
    unknown = torch.zeros_like(active)
    if kind is not None:
        check_tensor("kind", kind, shape=tuple(target.shape), device=device, dtypes=INTEGERS)
        kind = kind.reshape(-1)
        unknown = (kind < 0) | (kind > Kind.REHEARSAL)
        active = active & (kind != 0)
    outside = active & ((flat < 0) | (flat >= vocabulary))
    policy = active if kind is None else active & (kind == Kind.POLICY)
    flags = torch.stack([active.sum(), policy.sum(), unknown.any().long(), outside.any().long()])
    count, policy_count, any_unknown, any_outside = flags.tolist()
    if any_unknown and kind is not None:
        at = first_true(unknown)
        raise ValueError(f"kind: {int(kind[at])} at row {at}; expected 0 (ignored), 1 (policy) or 2 (rehearsal)")
    if any_outside:
        at = first_true(outside)
        raise ValueError(f"target: {int(flat[at])} at row {at} is outside [0, {vocabulary}) and not {IGNORE}")
    # A stable sort puts the active rows first and in order, and knows its length without asking the device.
    index = None if count == flat.numel() else torch.argsort(~active, stable=True)[:count]
    if kind is None:
        kinds = torch.full((count,), Kind.POLICY, dtype=torch.int8, device=device)
    else:
        kinds = (kind if index is None else kind[index]).to(torch.int8)
    chosen = flat if index is None else flat[index]
    rows = Rows(target.shape, index, chosen, kinds, policy_count, count - policy_count, 1.0)
    if call.active_rows not in (None, count):
        raise ValueError(f"active_rows: {call.active_rows}, and {count} rows are active")
    return replace(rows, temperature=row_temperature(call.temperature, rows))


def row_temperature(temperature: float | Tensor, rows: Rows) -> float | Tensor:
    if isinstance(temperature, Tensor) and temperature.ndim == 0:
        temperature = float(temperature)
    if not isinstance(temperature, Tensor):
        return check_positive("temperature", temperature)
    values = rows.take("temperature", temperature, temperature.dtype)
    assert values is not None
    if check_values(values.device):
        wide, part = values.double(), rows.taking_part()  # in 16 bits 1e-30 is 0
        holds = (wide >= 1e-30) & (wide <= 1e30)
        if bool((holds if part is None else holds | ~part).all()):
            return values
        raise ValueError("temperature: has values that are not positive numbers from 1e-30 to 1e30")
    return values


@dataclass
class RowState:
    """What the row kernels read and write about the active rows, each [A] and contiguous."""

    target: Tensor  # int64
    inverse_temperature: Tensor  # float32, like all below
    logprob: Tensor
    entropy: Tensor
    max: Tensor  # of the row's z
    log_sum: Tensor  # log of the sum of exp(z - max)
    coefficient: Tensor  # d loss / d logprob
    entropy_coefficient: Tensor  # d loss / d entropy

    @classmethod
    def of(cls, rows: Rows) -> RowState:
        inverse_temperature = rows.inverse_temperature()
        results = (torch.empty_like(inverse_temperature) for _ in range(6))  # one memory each: some are returned
        return cls(rows.target.contiguous(), inverse_temperature, *results)

    def cut(self, part: slice) -> RowState:
        if part.stop - part.start == self.target.numel():
            return self
        return RowState(*(getattr(self, field.name)[part] for field in fields(self)))


@dataclass(frozen=True)
class Terms:
    """What the loss of the active rows is made of, besides their log-probs. Rows that are not policy rows hold 0."""

    old_logprob: Tensor | None  # [A]; None: on policy, the log-probs themselves
    advantage: Tensor  # [A]
    ref_logprob: Tensor | None  # [A]; None when kl_coef is 0
    row_weight: Tensor | None  # [A]
    policy_denominator: Tensor  # 0-d
    rehearsal_denominator: Tensor  # 0-d
    entropy_denominator: Tensor | None = None  # 0-d; None: the policy rows' own, and their weights

    def contiguous(self) -> Terms:
        """The same in float32 and without strides, as the kernels read them."""
        names = ("old_logprob", "advantage", "ref_logprob", "row_weight")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if all(value.dtype == torch.float32 and value.is_contiguous() for value in given.values()):
            return self
        return replace(self, **{name: value.float().contiguous() for name, value in given.items()})

    def cut(self, part: slice) -> Terms:
        """The terms of some rows, with the same denominators."""
        if part.stop - part.start == self.advantage.numel():
            return self
        old, ref, weight = self.old_logprob, self.ref_logprob, self.row_weight
        return replace(
            self,
            old_logprob=None if old is None else old[part],
            advantage=self.advantage[part],
            ref_logprob=None if ref is None else ref[part],
            row_weight=None if weight is None else weight[part],
        )


def gather_terms(rows: Rows, call: PolicyCall, dtype: torch.dtype) -> Terms:
    """The active rows of the per-row arguments, checked; `dtype` is that of the statistics."""
    config = call.config
    if config.kl_coef != 0.0 and config.kl_estimator == "k1" and not config.kl_unbiased:
        warn_k1()
    terms: dict[str, Tensor] = {}
    policy = rows.kind == Kind.POLICY
    for name in ("old_logprob", "advantage", "ref_logprob"):
        values = rows.take(name, getattr(call, name), dtype)
        if (name == "ref_logprob" and config.kl_coef == 0.0) or (name == "old_logprob" and values is None):
            continue
        if values is None and rows.policy_count is None:
            raise ValueError(f"{name}: required, since only the device knows whether there are policy rows")
        if values is None and rows.policy_count:
            raise ValueError(f"{name}: required, there are {rows.policy_count} policy rows")
        if values is None:
            values = torch.zeros(rows.target.shape, dtype=dtype, device=rows.target.device)
        terms[name] = torch.where(policy, values, 0.0)
        if check_values(values.device):
            check_finite(name, terms[name])
    weight = rows.take("row_weight", call.row_weight, dtype)
    if weight is not None and check_values(weight.device):
        part = rows.taking_part()
        check_finite("row_weight", weight if part is None else torch.where(part, weight, 0.0))
    return Terms(
        terms.get("old_logprob"),
        terms["advantage"],
        terms.get("ref_logprob"),
        weight,
        *denominators_of(rows, call, dtype),
    )


def denominators_of(rows: Rows, call: PolicyCall, dtype: torch.dtype) -> list[Tensor]:
    return denominators(call, (rows.policy_count, rows.rehearsal_count), rows.counts, dtype, rows.target.device)


@dataclass(frozen=True)
class Sequences:
    """Which sequence each active row belongs to, for ratios of whole sequences."""

    of_row: Tensor  # [A]
    count: int

    def mean(self, values: Tensor, chosen: Tensor) -> Tensor:
        """Of each row [A]: the mean of `values` over the chosen rows of its sequence."""
        wide = torch.where(chosen, values, 0.0).double()
        if wide.is_cuda:
            # Atomic additions come in any order. Multiples of 2^-30 sum exactly in float64, so it does not show.
            wide = wide + ((wide * 2.0**30).round() / 2.0**30 - wide).detach()
        sums, counts = (
            wide.new_zeros(self.count).index_add(0, self.of_row, x) for x in (wide, chosen.to(torch.float64))
        )
        return (sums / counts.clamp(min=1.0)).to(values.dtype)[self.of_row]


def sequences_of(call: PolicyCall, rows: Rows) -> Sequences | None:
    """The sequences of a call whose ratios are those of sequences."""
    if call.config.importance_level == "token":
        return None
    bounds, shape, device = call.cu_seqlens, rows.shape, rows.target.device
    places = rows.index
    if places is None:
        places = torch.arange(shape.numel(), device=device, dtype=torch.int64)
    if bounds is None:
        return Sequences(torch.div(places, max(shape[-1], 1), rounding_mode="floor"), shape[0])
    bounds = bounds.to(torch.int64)
    if check_values(device):
        ends = bounds.tolist()
        if ends[0] != 0 or ends[-1] != shape.numel() or any(b < a for a, b in pairwise(ends)):
            raise ValueError(f"cu_seqlens: does not rise from 0 to the number of rows, {shape.numel()}")
    # A limit that is wrong on a GPU, where nobody has looked, must not write beyond the sums.
    of_row = torch.searchsorted(bounds[1:].contiguous(), places, right=True).clamp(max=max(bounds.numel() - 2, 0))
    return Sequences(of_row, bounds.numel() - 1)


@dataclass(frozen=True)
class RowLosses:
    """Per row [A]; a row's terms have its weight in them."""

    policy: Tensor  # 0 for rows of the other kind, as is the next
    rehearsal: Tensor
    log_ratio: Tensor  # of the token, clamped
    ratio: Tensor  # that the objective takes
    kl: Tensor  # estimate towards the reference policy
    clipped: Tensor
    below: Tensor  # the ratio is below the clip's range, and is held there
    above: Tensor


def row_losses(
    kind: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    terms: Terms,
    config: PolicyLossConfig,
    sequences: Sequences | None = None,
) -> RowLosses:
    clamp, advantage = config.log_ratio_clamp, terms.advantage
    policy = kind == Kind.POLICY
    nll = torch.where(kind == Kind.REHEARSAL, -logprob, 0.0)
    # What is not the policy's is 0 from here on: what it grew to, a gradient of 0 would multiply.
    logprob = torch.where(policy, logprob, 0.0)
    log_ratio = logprob - (logprob.detach() if terms.old_logprob is None else terms.old_logprob)
    of_token = log_ratio.clamp(-clamp, clamp)
    ratio = (of_token if sequences is None else sequences.mean(log_ratio, policy).clamp(-clamp, clamp)).exp()
    low, high = 1.0 - config.clip_low, 1.0 + config.clip_high
    below, above = policy & (ratio < low), policy & (ratio > high)
    if config.objective == "ppo":
        unclipped = ratio * advantage
        surrogate = torch.minimum(unclipped, ratio.clamp(low, high) * advantage)
        if config.dual_clip is not None:
            surrogate = torch.where(advantage < 0, torch.maximum(surrogate, config.dual_clip * advantage), surrogate)
        below, above, clipped = below & (advantage < 0), above & (advantage > 0), policy & (surrogate != unclipped)
    elif config.objective == "cispo":
        surrogate = ratio.clamp(low, high).detach() * advantage * logprob
        clipped = below | above
    else:
        surrogate = advantage * logprob
        below = above = clipped = torch.zeros_like(policy)
    term, kl = -surrogate, torch.zeros_like(logprob)
    if config.kl_coef != 0.0:
        assert terms.ref_logprob is not None
        apart = (logprob - terms.ref_logprob).clamp(-clamp, clamp)
        kl = estimate = _kl_estimate(apart, config)
        if config.kl_apart:
            by = _kl_ratio(ratio, config) * log_ratio_kl(apart, "k2")
            estimate = kl.detach() + (by - by.detach())
        elif config.kl_unbiased:
            estimate = kl * ratio
        term = term + config.kl_coef * estimate
    if config.entropy_coef != 0.0 and terms.entropy_denominator is None:
        term = term - config.entropy_coef * entropy
    term = torch.where(policy, term, 0.0)
    if terms.row_weight is not None:
        term, nll = term * terms.row_weight, nll * terms.row_weight
    if terms.entropy_denominator is not None:  # over which every row counts alike
        share = config.entropy_coef * terms.policy_denominator / terms.entropy_denominator
        term = term - torch.where(policy, share * entropy, 0.0)
    return RowLosses(term, nll, of_token, ratio, kl, clipped, below, above)


def _kl_estimate(apart: Tensor, config: PolicyLossConfig) -> Tensor:
    estimate = log_ratio_kl(apart, config.kl_base)
    return estimate if config.kl_clamp is None else estimate.clamp(-config.kl_clamp, config.kl_clamp)


def _kl_ratio(ratio: Tensor, config: PolicyLossConfig) -> Tensor | float:
    """What multiplies the gradient of a KL whose value is another estimator's."""
    if not config.kl_unbiased:
        return 1.0
    return ratio.detach() if config.kl_ratio_max is None else ratio.detach().clamp(max=config.kl_ratio_max)


def coefficients(kind: Tensor, logprob: Tensor, terms: Terms, config: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    """d loss / d logprob and d loss / d entropy of each row [A]: the derivatives of `row_losses` over the denominators,
    for code that runs below autograd. Ratios are those of tokens."""
    clamp = config.log_ratio_clamp
    log_ratio = torch.zeros_like(logprob) if terms.old_logprob is None else logprob - terms.old_logprob
    ratio, advantage = log_ratio.clamp(-clamp, clamp).exp(), terms.advantage
    low, high, inside = 1.0 - config.clip_low, 1.0 + config.clip_high, log_ratio.abs() <= clamp
    if config.objective == "ppo":
        held = ~inside | ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
        if config.dual_clip is not None:
            held |= (advantage < 0) & (ratio > config.dual_clip)
        slope = torch.where(held, 0.0, -advantage * ratio)
    elif config.objective == "cispo":
        slope = -advantage * ratio.clamp(low, high)
    else:
        slope = -advantage
    if config.kl_coef != 0.0:
        assert terms.ref_logprob is not None
        slope = slope + config.kl_coef * _kl_slope(logprob - terms.ref_logprob, ratio, inside, config)
    policy = kind == Kind.POLICY
    by_logprob = torch.where(
        policy, slope / terms.policy_denominator, -config.rehearsal_coef / terms.rehearsal_denominator
    )
    by_entropy = torch.where(policy, -config.entropy_coef / (
        terms.policy_denominator if terms.entropy_denominator is None else terms.entropy_denominator
    ), 0.0)  # fmt: skip
    if terms.row_weight is not None:
        by_logprob = by_logprob * terms.row_weight
        by_entropy = by_entropy * terms.row_weight if terms.entropy_denominator is None else by_entropy
    return by_logprob, by_entropy


def _kl_slope(apart: Tensor, ratio: Tensor, inside: Tensor, config: PolicyLossConfig) -> Tensor:
    """d / d logprob of the KL term, for a ratio whose log-ratio is `inside` its clamp or held there."""
    clamp = config.log_ratio_clamp
    held = apart.abs() > clamp
    apart = apart.clamp(-clamp, clamp)
    if config.kl_apart:
        return torch.where(held, 0.0, apart * _kl_ratio(ratio, config))
    steep = {"k1": torch.ones_like(apart), "k2": apart, "k3": -torch.expm1(-apart), "abs": apart.sign()}[config.kl_base]
    if config.kl_clamp is not None:
        held = held | (log_ratio_kl(apart, config.kl_base).abs() > config.kl_clamp)
    steep = torch.where(held, 0.0, steep)
    if not config.kl_unbiased:
        return steep
    return ratio * (steep + torch.where(inside, _kl_estimate(apart, config), 0.0))


def _number(known: int | None, counts: Tensor | None, place: int, device: torch.device) -> Tensor:
    """How many rows of a kind there are, as a tensor of its own."""
    if known is None:
        assert counts is not None
        return counts[place].clone()
    return torch.full((), known, device=device, dtype=torch.int64)


def total_loss(
    rows: Rows,
    logprob: Tensor,
    entropy: Tensor,
    terms: Terms,
    config: PolicyLossConfig,
    sequences: Sequences | None = None,
) -> PolicyLossOutput:
    """The loss and its metrics from the active rows' statistics [A]; differentiable in both of them."""
    each = row_losses(rows.kind, logprob, entropy, terms, config, sequences)
    policy_mean = each.policy.sum() / terms.policy_denominator
    rehearsal_mean = each.rehearsal.sum() / terms.rehearsal_denominator
    with torch.no_grad():
        policy, device = rows.kind == Kind.POLICY, logprob.device
        policies = _number(rows.policy_count, rows.counts, 1, device)
        rehearsals = _number(rows.rehearsal_count, rows.counts, 2, device)
        count = policies.clamp(min=1)
        ratio = torch.where(policy, each.ratio, 0.0)

        def mean(values: Tensor) -> Tensor:
            return torch.where(policy, values, 0.0).sum() / count

        metrics = {
            "policy_loss": policy_mean.detach(),
            "rehearsal_loss": rehearsal_mean.detach(),
            "clip_fraction": mean(each.clipped.to(logprob.dtype)),
            "clip_fraction_low": mean(each.below.to(logprob.dtype)),
            "clip_fraction_high": mean(each.above.to(logprob.dtype)),
            "approx_kl": mean(log_ratio_kl(-each.log_ratio, "k3")),
            "ref_kl": mean(each.kl),
            "max_ratio": torch.cat([ratio.new_zeros(1), ratio]).max(),
            "entropy": mean(entropy),
            "policy_tokens": policies,
            "rehearsal_tokens": rehearsals,
        }
    loss = policy_mean + config.rehearsal_coef * rehearsal_mean
    return PolicyLossOutput(loss, rows.scatter(logprob.detach()), rows.scatter(entropy.detach()), metrics)


def check_statistics(logprob: Tensor, entropy: Tensor, rows: Rows, source: str) -> None:
    """A non-finite logit anywhere in a row makes that row's log-prob or entropy non-finite: look there."""
    if not check_values(logprob.device):
        return
    bad = ~(torch.isfinite(logprob.detach()) & torch.isfinite(entropy.detach()))
    if bool(bad.any()):
        position = first_true(bad)
        row = position if rows.index is None else int(rows.index[position])
        raise ValueError(f"{source}: non-finite logits at row {row}")


# -- statistics of logits ----------------------------------------------------------------------------------------------


def row_statistics(
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


def statistics_of(call: PolicyCall, rows: Rows, entropy_grad: bool) -> tuple[Tensor, Tensor]:
    """`row_statistics` of the active rows, differentiable in source, weight and bias."""
    if call.weight is None:
        statistics = row_statistics(
            rows.gather(call.source), rows.target, rows.temperature, call.config.softcap, entropy_grad
        )
    else:
        statistics = _linear_statistics(call, call.weight, rows, entropy_grad)
    check_statistics(*statistics, rows, call.origin)
    return statistics


def _linear_statistics(call: PolicyCall, weight: Tensor, rows: Rows, entropy_grad: bool) -> tuple[Tensor, Tensor]:
    """Chunk by chunk."""
    hidden, bias, logits_dtype = rows.gather(call.source), call.bias, call.logits_dtype
    wide = logits_dtype not in (None, hidden.dtype)
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    statistics_bytes = statistics_dtype(hidden.dtype).itemsize
    # At the peak a chunk holds about five arrays of statistics beside its logits.
    row_bytes = weight.shape[0] * (5 * statistics_bytes + hidden.element_size())
    chunk = max(1, (call.workspace_bytes or WORKSPACE_BYTES) // row_bytes)
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
        return row_statistics(logits, target, temperature, call.config.softcap, entropy_grad)

    step: Callable[..., tuple[Tensor, Tensor]] = statistics
    if needs_grad and count > chunk and not transformed():  # which take no checkpoints: every chunk is kept
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


def loss_of(call: PolicyCall) -> PolicyLossOutput:
    """The loss of a call, differentiable in source, weight and bias."""
    rows = select_rows(call, call.width)
    terms = gather_terms(rows, call, statistics_dtype(call.source.dtype))
    logprob, entropy = statistics_of(call, rows, call.config.entropy_coef != 0.0)
    return total_loss(rows, logprob, entropy, terms, call.config, sequences_of(call, rows))


def loss_of_logprobs(call: PolicyCall, entropy: Tensor | None) -> PolicyLossOutput:
    """The loss of log-probs, the call's `source` [...]; differentiable in them and in entropies [...]."""
    rows = select_rows(call, 1)
    dtype = statistics_dtype(call.source.dtype)
    logprob, entropies = (
        x.reshape(-1) if rows.index is None else x.reshape(-1)[rows.index]
        for x in (call.source, torch.zeros_like(call.source) if entropy is None else entropy)
    )
    logprob, entropies = logprob.to(dtype), entropies.to(dtype)
    if check_values(logprob.device):
        check_finite("logprob", logprob.detach())
        check_finite("entropy", entropies.detach())
    terms = gather_terms(rows, call, dtype)
    return total_loss(rows, logprob, entropies, terms, call.config, sequences_of(call, rows))
