"""Triton kernels for what a call of the policy losses does once: choose its rows, and sum their losses and metrics.

The twins of `formula.select_rows` and `formula.total_loss`, which take some fifty small kernels between them. Each is
one program: there are as many rows as tokens, a few values each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from stable_rlhf.kernels.sequence import _kl
from stable_rlhf.ops.checks import INTEGERS, check_tensor, check_values
from stable_rlhf.ops.flags import Fault, note, notes, tell
from stable_rlhf.ops.policy.formula import (
    Rows,
    RowState,
    Sequences,
    Terms,
    row_temperature,
    select_rows,
    total_loss,
)
from stable_rlhf.ops.policy.types import (
    IGNORE,
    KL_ESTIMATORS,
    OBJECTIVES,
    Kind,
    PolicyCall,
    PolicyLossConfig,
    PolicyLossOutput,
)

_POLICY, _REHEARSAL = tl.constexpr(int(Kind.POLICY)), tl.constexpr(int(Kind.REHEARSAL))
_IGNORE = tl.constexpr(IGNORE)
_LOGITS, _TARGET, _KIND, _ACTIVE_ROWS, _PER_ROW = (
    tl.constexpr(int(fault)) for fault in (Fault.LOGITS, Fault.TARGET, Fault.KIND, Fault.ACTIVE_ROWS, Fault.PER_ROW)
)
_FAULTS = len(Fault)
COUNTS = 5  # active, policy, rehearsal, of an unknown kind (or too many or few), with a target out of range
_BLOCK, _WARPS = 2048, 8
_KL_TERMS = 11  # of k3's series, in float32
_CISPO, _REINFORCE = (tl.constexpr(OBJECTIVES.index(name)) for name in ("cispo", "reinforce"))
_ABS = tl.constexpr(KL_ESTIMATORS.index("abs") + 1)


@triton.jit(do_not_specialize=["rows", "wanted"])
def _select_kernel(
    target_ptr, kind_ptr, index_ptr, chosen_target_ptr, chosen_kind_ptr, counts_ptr, notes_ptr, rows, wanted,
    vocabulary, HAS_KIND: tl.constexpr, COMPACT: tl.constexpr, WANTED: tl.constexpr, NOTE: tl.constexpr,
    FAULTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Target and kind of the active rows, in order and without gaps (COMPACT) or at their places, and their counts.

    WANTED: there is room for `wanted` rows. What is left of it, and a row in place that is not active, is of kind 0.
    """
    lanes = tl.arange(0, BLOCK)
    active_lane = tl.zeros((BLOCK,), tl.int64)
    policy_lane = tl.zeros((BLOCK,), tl.int64)
    unknown_lane = tl.zeros((BLOCK,), tl.int64)
    outside_lane = tl.zeros((BLOCK,), tl.int64)
    place = tl.zeros((), tl.int64)
    for begin in range(0, rows, BLOCK):
        at = begin + lanes
        inside = at < rows
        target = tl.load(target_ptr + at, mask=inside, other=_IGNORE)
        if HAS_KIND:
            kind = tl.load(kind_ptr + at, mask=inside, other=0).to(tl.int64)
        else:
            kind = tl.where(target == _IGNORE, 0, 1).to(tl.int64)
        active = inside & (target != _IGNORE) & (kind != 0)
        outside = active & ((target < 0) | (target >= vocabulary))
        unknown = inside & ((kind < 0) | (kind > _REHEARSAL))
        active_lane += active.to(tl.int64)
        policy_lane += (active & (kind == _POLICY)).to(tl.int64)
        unknown_lane += unknown.to(tl.int64)
        outside_lane += outside.to(tl.int64)
        kept = tl.where(active & (outside == 0) & (unknown == 0), kind, 0).to(tl.int8)
        if COMPACT:
            before = place + tl.cumsum(active.to(tl.int64), 0) - 1
            there = active
            if WANTED:
                there = active & (before < wanted)  # more than there is room for
            tl.store(index_ptr + before, at.to(tl.int64), mask=there)
            tl.store(chosen_target_ptr + before, target, mask=there)
            tl.store(chosen_kind_ptr + before, kept, mask=there)
            place += tl.sum(active.to(tl.int64), 0)
        else:
            tl.store(chosen_target_ptr + at, target, mask=inside)
            tl.store(chosen_kind_ptr + at, kept, mask=inside)
    active_count = tl.sum(active_lane, 0)
    policy_count = tl.sum(policy_lane, 0)
    unknown_count = tl.sum(unknown_lane, 0)
    outside_count = tl.sum(outside_lane, 0)
    if COMPACT and WANTED:
        for begin in range(0, wanted, BLOCK):
            at = begin + lanes
            empty = (at >= active_count) & (at < wanted)
            tl.store(index_ptr + at, tl.zeros((BLOCK,), tl.int64), mask=empty)
            tl.store(chosen_target_ptr + at, tl.zeros((BLOCK,), tl.int64), mask=empty)
            tl.store(chosen_kind_ptr + at, tl.zeros((BLOCK,), tl.int8), mask=empty)
    tl.store(counts_ptr, active_count)
    tl.store(counts_ptr + 1, policy_count)
    tl.store(counts_ptr + 2, active_count - policy_count)
    if WANTED:
        unknown_count += (active_count != wanted).to(tl.int64)
    tl.store(counts_ptr + 3, unknown_count)
    tl.store(counts_ptr + 4, outside_count)
    for fault in tl.static_range(FAULTS):
        tl.store(counts_ptr + 5 + fault, tl.load(notes_ptr + fault).to(tl.int64))
    if NOTE:
        one = tl.full((), 1, tl.int32)
        tl.store(notes_ptr + _TARGET, one, mask=outside_count > 0)
        tl.store(notes_ptr + _KIND, one, mask=tl.sum(unknown_lane, 0) > 0)
        if WANTED:
            tl.store(notes_ptr + _ACTIVE_ROWS, one, mask=active_count != wanted)


def capturing(tensor: Tensor) -> bool:
    """Whether the kernels launched now go into a graph, where the host can read nothing."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Chosen:
    """The active rows of a call as they are on the device; the host has read nothing."""

    index: Tensor  # [A or more] into the flattened rows; empty where every row stays at its place
    target: Tensor
    kind: Tensor
    counts: Tensor
    whole: Tensor  # the call's own targets
    late: bool  # wrong values are noted, for the host does not read the counts in this call
    compact: bool
    on_host: Tensor | None = None  # the counts, once they have arrived there
    arrived: torch.cuda.Event | None = None

    def unread(self, call: PolicyCall) -> Rows:
        """The rows, whose numbers the device alone knows."""
        index = self.index if self.compact else None
        rows = Rows(call.target.shape, index, self.target, self.kind, None, None, 1.0, self.counts)
        return replace(rows, temperature=row_temperature(call.temperature, rows))

    def read(self, call: PolicyCall, vocabulary: int) -> tuple[int, int, int]:
        """Active rows, those of the policy, and of rehearsal. Waits for the launch that counted them, and not for what
        was queued behind it, where their copy was.

        Raises:
            ValueError: as `formula.select_rows` does; or for what was noted in an earlier call.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        counts = self.counts if self.on_host is None else self.on_host
        active, policy, rehearsal, unknown, outside, *noted = counts.tolist()
        tell(self.counts.device, noted)
        if unknown or outside or call.active_rows not in (None, active):
            select_rows(call, vocabulary)  # which says what is wrong
        return active, policy, rehearsal


def choose(call: PolicyCall, vocabulary: int, *, index: bool | None = None) -> Chosen:
    """The active rows in one launch. `index`: whether there is one; it is then as long as there are rows, active or
    not, and 0 behind the active ones. By default there is one, but not under graph capture, where the number of active
    rows is not known when it is needed, and it ends with them.
    """
    target, kind, device = call.target.reshape(-1).contiguous(), call.kind, call.source.device
    count, in_graph, wanted = target.numel(), capturing(target), call.active_rows
    late = in_graph or (wanted is not None and not check_values(device))
    known = wanted is not None and late and not in_graph and index is None
    room = min(wanted, count) if known and wanted is not None else count
    compact = not (in_graph or (known and room == count)) if index is None else index
    if kind is not None:
        check_tensor("kind", kind, shape=tuple(call.target.shape), device=device, dtypes=INTEGERS)
        kind = kind.reshape(-1).contiguous()
    places = target.new_zeros(room) if index else target.new_empty(room if compact else 0)
    chosen = Chosen(
        places, target.new_empty(room), target.new_empty(room, dtype=torch.int8), target.new_empty(COUNTS + _FAULTS),
        target, late, compact,
    )  # fmt: skip
    with torch.cuda.device_of(target):
        _select_kernel[(1,)](
            target, target if kind is None else kind, places, chosen.target, chosen.kind, chosen.counts, notes(device),
            count, wanted or 0, vocabulary, HAS_KIND=kind is not None, COMPACT=compact, WANTED=known, NOTE=late,
            FAULTS=_FAULTS, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
        if index is None or late or not target.is_cuda:
            return chosen
        on_host = torch.empty(chosen.counts.shape, dtype=torch.int64, device="cpu", pin_memory=True)
        on_host.copy_(chosen.counts, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
    return replace(chosen, on_host=on_host, arrived=arrived)


def select(call: PolicyCall, vocabulary: int) -> Rows:
    """`formula.select_rows` in one launch, and one synchronisation.

    None under graph capture, where every row takes part and those that are not active are of kind 0; nor where
    `active_rows` says how many there are. Wrong values are noted on the device then (`ops.flags`), and the loss is NaN.
    """
    chosen = choose(call, vocabulary)
    if chosen.late:
        return chosen.unread(call)
    active, policy, rehearsal = chosen.read(call, vocabulary)
    whole = active == call.target.numel()
    rows = Rows(
        call.target.shape, None if whole else chosen.index[:active], chosen.whole if whole else chosen.target[:active],
        chosen.kind[:active], policy, rehearsal, 1.0, chosen.counts,
    )  # fmt: skip
    return replace(rows, temperature=row_temperature(call.temperature, rows))


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit(do_not_specialize=["rows"])
def _totals_kernel(
    kind_ptr, logprob_ptr, entropy_ptr, old_logprob_ptr, advantage_ptr, ref_logprob_ptr, row_weight_ptr,
    policy_denominator_ptr, rehearsal_denominator_ptr, entropy_denominator_ptr, counts_ptr, notes_ptr, loss_ptr,
    metrics_ptr, of_kind_ptr, rows, low, high, dual_clip, clamp, kl_coef, kl_clamp, entropy_coef, rehearsal_coef,
    HAS_OLD_LOGPROB: tl.constexpr, HAS_ROW_WEIGHT: tl.constexpr, HAS_ENTROPY_DENOMINATOR: tl.constexpr,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_TIMES_RATIO: tl.constexpr, DUAL: tl.constexpr, LATE: tl.constexpr,
    TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and metrics. LATE: rows of kind 0 are among them, whose log-prob and entropy become 0, and values that the
    host has not seen: the loss is NaN where `select` found one wrong."""
    lanes = tl.arange(0, BLOCK)
    policy_lane = tl.zeros((BLOCK,), tl.float64)
    rehearsal_lane = tl.zeros((BLOCK,), tl.float64)
    kl_lane = tl.zeros((BLOCK,), tl.float64)
    entropy_lane = tl.zeros((BLOCK,), tl.float64)
    clipped_lane = tl.zeros((BLOCK,), tl.int32)
    below_lane = tl.zeros((BLOCK,), tl.int32)
    above_lane = tl.zeros((BLOCK,), tl.int32)
    reference_lane = tl.zeros((BLOCK,), tl.float64)
    bonus_scale = entropy_coef
    if HAS_ENTROPY_DENOMINATOR:
        bonus_scale = entropy_coef * (tl.load(policy_denominator_ptr) / tl.load(entropy_denominator_ptr))
    largest_lane = tl.zeros((BLOCK,), tl.float32)
    logits_lane = tl.zeros((BLOCK,), tl.int32)  # rows whose statistics are not finite
    per_row_lane = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, rows, BLOCK):
        at = begin + lanes
        inside = at < rows
        kind = tl.load(kind_ptr + at, mask=inside, other=0)
        policy = kind == _POLICY
        taking_part = kind != 0
        logprob = tl.load(logprob_ptr + at, mask=taking_part, other=0.0)
        entropy = tl.load(entropy_ptr + at, mask=taking_part, other=0.0)
        if LATE:
            tl.store(logprob_ptr + at, logprob, mask=inside)
            tl.store(entropy_ptr + at, entropy, mask=inside)
        old = logprob
        if HAS_OLD_LOGPROB:
            old = tl.load(old_logprob_ptr + at, mask=policy, other=0.0)
        advantage = tl.load(advantage_ptr + at, mask=policy, other=0.0)
        weight = tl.full((BLOCK,), 1.0, tl.float32)
        if HAS_ROW_WEIGHT:
            weight = tl.load(row_weight_ptr + at, mask=taking_part, other=0.0)
        known = _is_finite(advantage) & _is_finite(weight)
        if HAS_OLD_LOGPROB:
            known = known & _is_finite(old)
        log_ratio = tl.minimum(tl.maximum(logprob - old, -clamp), clamp)
        ratio = tl.exp(log_ratio)
        below = ratio < low
        above = ratio > high
        if OBJECTIVE == _CISPO:
            surrogate = tl.minimum(tl.maximum(ratio, low), high) * advantage * logprob
            clipped = below | above
        elif OBJECTIVE == _REINFORCE:
            surrogate = advantage * logprob
            clipped = ratio != ratio
            below = clipped
            above = clipped
        else:
            unclipped = ratio * advantage
            surrogate = tl.minimum(unclipped, tl.minimum(tl.maximum(ratio, low), high) * advantage)
            if DUAL:
                surrogate = tl.where(advantage < 0.0, tl.maximum(surrogate, dual_clip * advantage), surrogate)
            clipped = surrogate != unclipped
            below = below & (advantage < 0.0)
            above = above & (advantage > 0.0)
        term = -surrogate
        if KL != 0:
            ref = tl.load(ref_logprob_ptr + at, mask=policy, other=0.0)
            known = known & _is_finite(ref)
            apart = tl.minimum(tl.maximum(logprob - ref, -clamp), clamp)
            if KL == _ABS:
                estimate = tl.abs(apart)
            else:
                estimate = _kl(apart, KL, TERMS)
            estimate = tl.minimum(tl.maximum(estimate, -kl_clamp), kl_clamp)
            reference_lane += tl.where(policy, estimate, 0.0).to(tl.float64)
            if KL_TIMES_RATIO:
                estimate = estimate * ratio
            term += kl_coef * estimate
        if HAS_ENTROPY_DENOMINATOR:
            term = term * weight - bonus_scale * entropy
        else:
            term = (term - bonus_scale * entropy) * weight
        policy_lane += tl.where(policy, term, 0.0).to(tl.float64)
        rehearsal_lane += tl.where(kind == _REHEARSAL, -logprob * weight, 0.0).to(tl.float64)
        kl_lane += tl.where(policy, _kl(-log_ratio, 3, TERMS), 0.0).to(tl.float64)
        entropy_lane += tl.where(policy, entropy, 0.0).to(tl.float64)
        clipped_lane += (policy & clipped).to(tl.int32)
        below_lane += (policy & below).to(tl.int32)
        above_lane += (policy & above).to(tl.int32)
        largest_lane = tl.maximum(largest_lane, tl.where(policy, ratio, 0.0))
        # Minimum and maximum lose NaN: what is not finite is looked for, and spoils the loss below.
        logits_lane += (taking_part & ((_is_finite(logprob) & _is_finite(entropy)) == 0)).to(tl.int32)
        per_row_lane += (taking_part & (known == 0)).to(tl.int32)
    bad_logits = tl.sum(logits_lane, 0) > 0
    bad_per_row = tl.sum(per_row_lane, 0) > 0
    bad = bad_logits | bad_per_row
    if LATE:
        bad = bad | (tl.load(counts_ptr + 3) > 0) | (tl.load(counts_ptr + 4) > 0)
    one = tl.full((), 1, tl.int32)
    tl.store(notes_ptr + _LOGITS, one, mask=bad_logits)
    tl.store(notes_ptr + _PER_ROW, one, mask=bad_per_row)
    poison = tl.where(bad, float("nan"), 0.0).to(tl.float64)
    policy_mean = tl.sum(policy_lane, 0) / tl.load(policy_denominator_ptr).to(tl.float64) + poison
    rehearsal_mean = tl.sum(rehearsal_lane, 0) / tl.load(rehearsal_denominator_ptr).to(tl.float64) + poison
    policies = tl.load(counts_ptr + 1)
    tl.store(of_kind_ptr, policies)
    tl.store(of_kind_ptr + 1, tl.load(counts_ptr + 2))
    count = tl.maximum(policies, 1).to(tl.float64)
    tl.store(loss_ptr, (policy_mean + rehearsal_coef * rehearsal_mean).to(tl.float32))
    tl.store(metrics_ptr, policy_mean.to(tl.float32))
    tl.store(metrics_ptr + 1, rehearsal_mean.to(tl.float32))
    tl.store(metrics_ptr + 2, (tl.sum(clipped_lane, 0) / count).to(tl.float32))
    tl.store(metrics_ptr + 3, (tl.sum(below_lane, 0) / count).to(tl.float32))
    tl.store(metrics_ptr + 4, (tl.sum(above_lane, 0) / count).to(tl.float32))
    tl.store(metrics_ptr + 5, (tl.sum(kl_lane, 0) / count).to(tl.float32))
    tl.store(metrics_ptr + 6, (tl.sum(reference_lane, 0) / count).to(tl.float32))
    tl.store(metrics_ptr + 7, tl.max(largest_lane, 0))
    tl.store(metrics_ptr + 8, (tl.sum(entropy_lane, 0) / count).to(tl.float32))


def totals(rows: Rows, state: RowState, terms: Terms, config: PolicyLossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """`formula.total_loss` in one launch: loss, the metrics in the order of `fused.METRICS`, and the two counts.
    Statistics and arguments that are not finite are noted on the device, and make the loss NaN."""
    assert rows.counts is not None
    loss, metrics = state.logprob.new_empty(()), state.logprob.new_empty(9)
    of_kind = rows.counts.new_empty(2)  # a tensor of its own: results of an operator share no memory
    late = rows.policy_count is None
    per_row = (terms.old_logprob, terms.advantage, terms.ref_logprob, terms.row_weight)
    own_denominator = terms.entropy_denominator
    with torch.cuda.device_of(loss):
        _totals_kernel[(1,)](
            rows.kind, state.logprob, state.entropy,
            *(state.logprob if x is None else x.contiguous() for x in per_row),
            terms.policy_denominator, terms.rehearsal_denominator,
            terms.policy_denominator if own_denominator is None else own_denominator, rows.counts, notes(loss.device),
            loss, metrics, of_kind, rows.kind.numel(), 1.0 - config.clip_low, 1.0 + config.clip_high,
            config.dual_clip or math.inf, config.log_ratio_clamp, float(config.kl_coef), config.kl_clamp or math.inf,
            float(config.entropy_coef), float(config.rehearsal_coef),
            HAS_OLD_LOGPROB=terms.old_logprob is not None, HAS_ROW_WEIGHT=terms.row_weight is not None,
            HAS_ENTROPY_DENOMINATOR=own_denominator is not None, OBJECTIVE=OBJECTIVES.index(config.objective),
            KL=kl_number(config), KL_TIMES_RATIO=config.kl_unbiased and not config.kl_apart,
            DUAL=config.dual_clip is not None, LATE=late,
            TERMS=_KL_TERMS, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return loss, metrics, of_kind


@triton.jit(do_not_specialize=["rows"])
def _note_kernel(logprob_ptr, entropy_ptr, notes_ptr, rows, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    wrong_lane = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, rows, BLOCK):
        at = begin + lanes
        logprob = tl.load(logprob_ptr + at, mask=at < rows, other=0.0)
        entropy = tl.load(entropy_ptr + at, mask=at < rows, other=0.0)
        wrong_lane += ((_is_finite(logprob) & _is_finite(entropy)) == 0).to(tl.int32)
    tl.store(notes_ptr + _LOGITS, tl.full((), 1, tl.int32), mask=tl.sum(wrong_lane, 0) > 0)


def note_statistics(state: RowState) -> None:
    """Notes it where a row's statistics are not finite; the totals of a loss do so by themselves."""
    device = state.logprob.device
    if state.logprob.numel() > 0:
        with torch.cuda.device_of(state.logprob):
            _note_kernel[(1,)](
                state.logprob, state.entropy, notes(device), state.logprob.numel(), BLOCK=_BLOCK, num_warps=_WARPS
            )


def noted_totals(
    rows: Rows, state: RowState, terms: Terms, config: PolicyLossConfig, sequences: Sequences
) -> PolicyLossOutput:
    """`formula.total_loss`, which takes ratios of whole sequences, with what is not finite noted as in `totals`."""
    part = rows.kind != Kind.IGNORED
    finite = state.logprob.isfinite() & state.entropy.isfinite()
    for values in (state.logprob, state.entropy):
        values.copy_(torch.where(part, values, 0.0))
    bad = (part & ~finite).any()
    note(Fault.LOGITS, bad)
    per_row = torch.zeros_like(bad)
    for value in (terms.old_logprob, terms.advantage, terms.ref_logprob, terms.row_weight):
        if value is not None:
            per_row = per_row | (part & ~value.isfinite()).any()
    note(Fault.PER_ROW, per_row)
    out = total_loss(rows, state.logprob, state.entropy, terms, config, sequences)
    bad = bad | per_row
    if rows.policy_count is None:
        assert rows.counts is not None
        bad = bad | (rows.counts[3:COUNTS] > 0).any()
    return out._replace(loss=torch.where(bad, math.nan, out.loss))


def kl_number(config: PolicyLossConfig) -> int:
    """The estimator of the KL's value as the kernels count them; 0: no KL."""
    return KL_ESTIMATORS.index(config.kl_base) + 1 if config.kl_coef != 0.0 else 0
