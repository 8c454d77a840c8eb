"""What a call of the policy losses does once on the CPU: csrc/policy_call.cpp on PyTorch tensors.

The twins of `formula.select_rows`, `gather_terms` and `total_loss`. What is wrong with a value is found here and told
by these, which name it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stable_rlhf.ops.backends import extension
from stable_rlhf.ops.checks import INTEGERS, check_tensor
from stable_rlhf.ops.policy.cpu import address, term_fields
from stable_rlhf.ops.policy.formula import (
    Rows,
    RowState,
    Terms,
    check_statistics,
    denominators_of,
    gather_terms,
    row_temperature,
    select_rows,
)
from stable_rlhf.ops.policy.types import PolicyCall, warn_k1

PER_ROW = ("old_logprob", "advantage", "ref_logprob", "row_weight")  # in the order of csrc/policy_call.h
METRICS = 9  # in the order of `fused.METRICS`


def select(call: PolicyCall, vocabulary: int) -> Rows:
    """`formula.select_rows` in one pass."""
    module, kind = extension(), call.kind
    assert module is not None
    target = call.target.reshape(-1).contiguous()
    if kind is not None:
        check_tensor("kind", kind, shape=tuple(call.target.shape), device=target.device, dtypes=INTEGERS)
        kind = kind.reshape(-1).to(torch.int64).contiguous()
    count = target.numel()
    index, chosen = torch.empty_like(target), torch.empty_like(target)
    kinds = torch.empty_like(target, dtype=torch.int8)
    active, policy, sound = module.choose_rows(
        target=target.data_ptr(), kind=0 if kind is None else kind.data_ptr(), count=count, vocabulary=vocabulary,
        index=index.data_ptr(), chosen=chosen.data_ptr(), kinds=kinds.data_ptr(),
    )  # fmt: skip
    if not sound or call.active_rows not in (None, active):
        return select_rows(call, vocabulary)
    whole = active == count
    rows = Rows(
        call.target.shape, None if whole else index[:active], target if whole else chosen[:active],
        kinds if whole else kinds[:active], policy, active - policy, 1.0,
    )  # fmt: skip
    return replace(rows, temperature=row_temperature(call.temperature, rows))


def gather(rows: Rows, call: PolicyCall, dtype: torch.dtype) -> Terms:
    """`formula.gather_terms` in one pass; `dtype` is float32."""
    module, config = extension(), call.config
    assert module is not None and dtype == torch.float32
    given = {name: getattr(call, name) for name in PER_ROW}
    if config.kl_coef == 0.0:
        given["ref_logprob"] = None
    if given["advantage"] is None or (config.kl_coef != 0.0 and given["ref_logprob"] is None):
        return gather_terms(rows, call, dtype)
    if config.kl_coef != 0.0 and config.kl_estimator == "k1" and not config.kl_unbiased:
        warn_k1()
    sources = {
        name: value.detach().reshape(-1).to(dtype).contiguous() for name, value in given.items() if value is not None
    }
    assert all(value.numel() == call.target.numel() for value in sources.values())
    out = torch.empty(len(PER_ROW), rows.target.numel(), dtype=dtype, device="cpu")
    sound = module.gather_rows(
        kind=rows.kind.data_ptr(), index=address(rows.index), count=rows.target.numel(), out=out.data_ptr(),
        **{name: value.data_ptr() for name, value in sources.items()},
    )  # fmt: skip
    if not sound:
        return gather_terms(rows, call, dtype)
    old, advantage, ref, weight = (
        row if name in sources else None for name, row in zip(PER_ROW, out.unbind(), strict=True)
    )
    assert advantage is not None
    return Terms(old, advantage, ref, weight, *denominators_of(rows, call, dtype))


def totals(
    call: PolicyCall, rows: Rows, state: RowState, terms: Terms
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`formula.total_loss` in one pass: loss, log-probs and entropies in target's shape, the metrics in the order of
    `fused.METRICS`, and the two counts.

    Raises:
        ValueError: statistics are not finite, which non-finite logits make them.
    """
    module, config = extension(), call.config
    assert module is not None
    logprob, entropy = state.logprob, state.entropy
    if rows.index is not None:
        logprob, entropy = (logprob.new_empty(rows.shape.numel()) for _ in range(2))
    loss, metrics = state.logprob.new_empty(()), state.logprob.new_empty(METRICS)
    counts = torch.empty(2, dtype=torch.int64, device="cpu")
    terms, kind = terms.contiguous(), rows.kind.contiguous()
    sound = module.policy_totals(
        logprob=state.logprob.data_ptr(), entropy=state.entropy.data_ptr(), index=address(rows.index),
        count=kind.numel(), places=logprob.numel(), logprobs=0 if rows.index is None else logprob.data_ptr(),
        entropies=0 if rows.index is None else entropy.data_ptr(), loss=loss.data_ptr(), metrics=metrics.data_ptr(),
        counts=counts.data_ptr(), kind=kind.data_ptr(), **term_fields(terms, config),
        rehearsal_scale=1.0 / float(terms.rehearsal_denominator), rehearsal_coef=config.rehearsal_coef,
    )  # fmt: skip
    if not sound:
        check_statistics(state.logprob, state.entropy, rows, call.origin)
    return loss, logprob.reshape(rows.shape), entropy.reshape(rows.shape), metrics, counts
