"""The row kernel on the CPU: csrc/policy.cpp on PyTorch tensors."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from stable_rlhf.ops.backends import cpu_isa, extension
from stable_rlhf.ops.policy.formula import RowState, Terms
from stable_rlhf.ops.policy.types import KL_ESTIMATORS, LOGITS_TYPES, OBJECTIVES, PolicyLossConfig

_STATISTICS, _POLICY, _GIVEN = 0, 1, 2  # RowsMode of csrc/policy.h


def address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


def _call(
    mode: int, logits: Tensor, gradient: Tensor | None, state: RowState, softcap: float | None, **more: Any
) -> int:
    module = extension()
    assert module is not None
    for matrix in (logits, logits if gradient is None else gradient):
        assert matrix.stride(1) == 1 or matrix.shape[1] == 1  # one column may have any stride
    return int(
        module.rows(
            mode=mode, type=LOGITS_TYPES[logits.dtype], logits=logits.data_ptr(), gradient=address(gradient),
            gradient_type=LOGITS_TYPES[(logits if gradient is None else gradient).dtype],
            logits_stride=logits.stride(0), gradient_stride=0 if gradient is None else gradient.stride(0),
            count=state.target.numel(), vocabulary=logits.shape[1], softcap=softcap or 0.0,
            num_threads=torch.get_num_threads(), isa=cpu_isa(),
            **{field.name: address(getattr(state, field.name)) for field in fields(state)}, **more,
        )
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def constants(config: PolicyLossConfig) -> dict[str, Any]:
    """The fields of csrc/policy.h's PolicyTerms that are a config's. Not to be written to."""
    return {
        "clip_low": config.clip_low, "clip_high": config.clip_high, "dual_clip": config.dual_clip or 0.0,
        "kl_coef": config.kl_coef, "kl_clamp": config.kl_clamp or 0.0, "kl_ratio_max": config.kl_ratio_max or 0.0,
        "kl_estimator": KL_ESTIMATORS.index(config.kl_base) + 1, "kl_apart": config.kl_apart,
        "kl_unbiased": config.kl_unbiased, "objective": OBJECTIVES.index(config.objective),
        "entropy_coef": config.entropy_coef, "log_ratio_clamp": config.log_ratio_clamp,
    }  # fmt: skip


def term_fields(terms: Terms, config: PolicyLossConfig) -> dict[str, Any]:
    """The fields of PolicyTerms but kind and rehearsal_scale; their arrays are those of `terms`, which must be float32
    and contiguous."""
    return {
        **constants(config),
        "old_logprob": address(terms.old_logprob), "advantage": address(terms.advantage),
        "ref_logprob": address(terms.ref_logprob), "row_weight": address(terms.row_weight),
        "entropy_scale": 0.0 if terms.entropy_denominator is None else 1.0 / float(terms.entropy_denominator),
        "policy_scale": 1.0 / float(terms.policy_denominator),
    }  # fmt: skip


def statistics(
    logits: Tensor,
    state: RowState,
    softcap: float | None,
    *,
    row: Tensor | None = None,
    weighted: Tensor | None = None,
    target_logit: Tensor | None = None,
) -> None:
    """Fills logprob, entropy, max and log_sum; of a slice of the vocabulary also the mean of z - max under the softmax
    (`weighted`) and z - max of the target (`target_logit`, 0 where it lies elsewhere)."""
    _call(
        _STATISTICS, logits, None, state, softcap,
        row=address(row), weighted=address(weighted), target_logit=address(target_logit),
    )  # fmt: skip


def policy(
    logits: Tensor,
    gradient: Tensor,
    state: RowState,
    kind: Tensor,
    terms: Terms,
    config: PolicyLossConfig,
    *,
    row: Tensor | None = None,
    compact: bool = True,
) -> Tensor | None:
    """Statistics, coefficients and gradient of a chunk. The gradient may be the memory of `logits`, and in a type
    of 16 bits beside float32 logits.

    Args:
        row: which row of logits and gradient each active row is; None: in order.
        compact: leave out rows whose gradient is exactly zero.

    Returns:
        which of the rows each gradient row belongs to, or None: all of them in order.
    """
    count = state.target.numel()
    kept = torch.empty(count, dtype=torch.int64, device="cpu") if compact else None
    terms, kind = terms.contiguous(), kind.contiguous()
    number = _call(
        _POLICY, logits, gradient, state, config.softcap,
        row=address(row), kept=address(kept), kind=kind.data_ptr(), **term_fields(terms, config),
        rehearsal_scale=config.rehearsal_coef / float(terms.rehearsal_denominator),
    )  # fmt: skip
    return None if kept is None or number == count else kept[:number]


def given(
    logits: Tensor, gradient: Tensor, state: RowState, softcap: float | None, *, row: Tensor | None = None
) -> None:
    """The gradient for the coefficients, max, log_sum and entropy in `state`."""
    _call(_GIVEN, logits, gradient, state, softcap, row=address(row))
