"""The arguments of the policy losses, checked, and in the shapes and types that the kernels take.

Trainers hold what they pass in many forms: masks of bool or float, one number a sequence, 32-bit tokens, a float32 head
over 16-bit hidden states. Each is brought into the one form here. Values are looked at where rows are chosen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stable_rlhf.ops.backends import choice
from stable_rlhf.ops.checks import (
    FLOATS,
    INTEGERS,
    check_constant,
    check_integer,
    check_not_negative,
    check_positive,
    check_tensor,
    check_values,
    first_true,
)
from stable_rlhf.ops.groups import group_name
from stable_rlhf.ops.operators import requires_grad
from stable_rlhf.ops.policy.types import IGNORE, Kind, PolicyCall, PolicyLossConfig

_HALF = (torch.bfloat16, torch.float16)


def checked_loss(op: str, call: PolicyCall, process_group: object | None, logit_scale: float = 1.0) -> PolicyCall:
    """The call of a loss with all checked but values of the per-row arguments."""
    return ready(op, checked_rows(call), process_group, logit_scale)


def checked_rows(call: PolicyCall) -> PolicyCall:
    """The same, for log-probs that exist already."""
    if not isinstance(call.config, PolicyLossConfig):
        raise ValueError(f"config: expected a PolicyLossConfig, got {type(call.config).__name__}")
    target = call.target
    values: dict[str, Any] = {"kind": _kinds(call.kind, target)}
    for name in ("old_logprob", "advantage", "ref_logprob", "row_weight"):
        values[name] = _per_row(name, getattr(call, name), target, by_sequence=name in ("advantage", "row_weight"))
    check_constant("row_weight", call.row_weight)
    denominators: dict[str, Any] = {}
    for name in ("policy_denominator", "rehearsal_denominator", "entropy_denominator"):
        value = getattr(call, name)
        check_constant(name, value)
        if isinstance(value, Tensor):
            check_tensor(name, value, dtypes=FLOATS + INTEGERS)
        given = value is None or isinstance(value, Tensor)
        denominators[name] = value if given else float(check_not_negative(name, value))
    check_sequences(call)
    return _divided_by_row(call._replace(**values, **denominators))


def check_sequences(call: PolicyCall) -> None:
    """Where the sequences of the rows are: needed for their ratios alone."""
    bounds, target = call.cu_seqlens, call.target
    if bounds is not None:
        check_tensor("cu_seqlens", bounds, device=target.device, dtypes=INTEGERS)
        if bounds.ndim != 1 or bounds.numel() < 1:
            raise ValueError(f"cu_seqlens: shape {tuple(bounds.shape)} instead of [S + 1]")
    elif call.config.importance_level == "sequence" and target.ndim != 2:
        raise ValueError(
            f"cu_seqlens: required for ratios of sequences, since target of shape {tuple(target.shape)} is not [B, L]"
        )


def ready(op: str, call: PolicyCall, process_group: object | None, logit_scale: float = 1.0) -> PolicyCall:
    """The call with its temperature checked, its backend and its process group; the fused backends keep statistics in
    float32, so float64 is PyTorch's."""
    temperature, config = call.temperature, call.config
    if not isinstance(temperature, Tensor):
        temperature = float(check_positive("temperature", temperature))
    else:
        check_constant("temperature", temperature)
        check_tensor("temperature", temperature)
        if temperature.ndim == 0:  # while compiling its value is not known
            compiling = torch.compiler.is_compiling()
            temperature = temperature.expand(call.target.shape) if compiling else float(temperature)
    scale = check_positive("logit_scale", logit_scale)
    if scale != 1.0:  # softcap tanh(s x / softcap) / T is (softcap / s) tanh(x / (softcap / s)) / (T / s)
        temperature = temperature / scale
        config = config if config.softcap is None else replace(config, softcap=config.softcap / scale)
    backend = "torch" if call.source.dtype == torch.float64 else choice(op, call.source.device)
    _check_process_group(process_group, backend)
    return call._replace(temperature=temperature, config=config, backend=backend, group=group_name(process_group))


def tokens(target: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Targets as int64."""
    check_tensor("target", target, shape=shape, device=device, dtypes=INTEGERS)
    return target if target.dtype == torch.int64 else target.to(torch.int64)


def _kinds(kind: Tensor | None, target: Tensor) -> Tensor | None:
    """Kinds as integers; a mask counts as 0 and 1."""
    if kind is None:
        return None
    check_tensor("kind", kind, shape=tuple(target.shape), device=target.device, dtypes=(*INTEGERS, torch.bool, *FLOATS))
    if kind.dtype in INTEGERS:
        return kind
    mask = kind != 0
    if kind.is_floating_point() and not torch.compiler.is_compiling() and check_values(kind.device):
        neither = (mask & (kind != 1)).reshape(-1)
        if bool(neither.any()):
            at = first_true(neither)
            raise ValueError(f"kind: {float(kind.reshape(-1)[at])} at row {at}; a mask of floats holds 0 and 1")
    return mask.to(torch.int8)


def _per_row(name: str, value: Tensor | None, target: Tensor, *, by_sequence: bool) -> Tensor | None:
    """A per-row argument in target's shape; one number a sequence, [B] or [B, 1] beside a target [B, L], counts for
    each of its rows."""
    if value is None:
        return None
    check_tensor(name, value, device=target.device)
    if by_sequence and _is_by_sequence(value, target):
        return value.reshape(-1, 1).expand(target.shape)
    return check_tensor(name, value, shape=tuple(target.shape))


def _is_by_sequence(value: Tensor, target: Tensor) -> bool:
    if target.ndim != 2 or value.shape == target.shape:
        return False
    return tuple(value.shape) in ((target.shape[0],), (target.shape[0], 1))


def _divided_by_row(call: PolicyCall) -> PolicyCall:
    """Denominators of one number a sequence go into the rows' weights."""
    target, divisors = call.target, {}
    for name, kind in (("policy_denominator", Kind.POLICY), ("rehearsal_denominator", Kind.REHEARSAL)):
        value = getattr(call, name)
        if not isinstance(value, Tensor) or value.numel() == 1 or target.ndim != 2:
            continue
        if tuple(value.shape) in ((target.shape[0],), (target.shape[0], 1)):
            check_tensor(name, value, device=target.device, dtypes=FLOATS + INTEGERS)
            divisors[name] = (kind, value.reshape(-1, 1).expand(target.shape))
    if not divisors:
        return call
    weight = torch.ones((), dtype=torch.float32, device=target.device) if call.row_weight is None else call.row_weight
    kinds = torch.full_like(target, Kind.POLICY) if call.kind is None else call.kind
    for name, (kind, value) in divisors.items():
        if not torch.compiler.is_compiling() and check_values(value.device):
            wrong = ((kinds == kind) & (target != IGNORE) & ~(value >= 1e-30)).reshape(-1)
            if bool(wrong.any()):
                at = first_true(wrong)
                raise ValueError(f"{name}: {float(value.reshape(-1)[at])} is not positive, and row {at} has it")
        weight = torch.where(kinds == kind, weight / value, weight)
    ones: dict[str, Any] = dict.fromkeys(divisors, 1.0)
    return call._replace(row_weight=weight.expand(target.shape), **ones)


def in_one_type(call: PolicyCall) -> PolicyCall:
    """The operands in the type that the products are made in: autocast's, as for any other product, or that of hidden
    states of 16 bits before a float32 head. The casts carry the gradients back, each in its own type."""
    source, weight, bias = call.source, call.weight, call.bias
    device = source.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else source.dtype
    source = source if source.dtype == dtype else source.to(dtype)
    weight, bias = (x if x is None or x.dtype == dtype else x.to(dtype) for x in (weight, bias))
    return call._replace(source=source, weight=weight, bias=bias, needs=requires_grad(source, weight, bias))


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    logits_dtype: torch.dtype | None,
    workspace_bytes: int | None,
    active_rows: int | None,
) -> Tensor:
    """Checks what is not per row; the targets."""
    check_tensor("hidden", hidden)
    if hidden.ndim < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden: shape {tuple(hidden.shape)} instead of [..., H] with H of 1 or more")
    device = hidden.device
    # Under autocast the product casts its operands itself.
    alike: tuple[torch.dtype, ...] = (hidden.dtype,)
    if torch.is_autocast_enabled(device.type):
        alike = FLOATS
    elif hidden.dtype in _HALF:
        alike = (hidden.dtype, torch.float32)
    check_tensor("weight", weight, device=device, dtypes=alike)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        raise ValueError(f"weight: shape {tuple(weight.shape)} instead of [V, {hidden.shape[-1]}]")
    if bias is not None:
        check_tensor("bias", bias, shape=(weight.shape[0],), device=device, dtypes=alike)
    target = tokens(target, tuple(hidden.shape[:-1]), device)
    if logits_dtype is not None and not isinstance(logits_dtype, torch.dtype):
        raise ValueError(f"logits_dtype: expected a torch.dtype, got {type(logits_dtype).__name__}")
    if logits_dtype not in (None, hidden.dtype) and (logits_dtype != torch.float32 or hidden.dtype not in _HALF):
        raise NotImplementedError(f"logits_dtype={logits_dtype}: not yet for hidden of {hidden.dtype}")
    if workspace_bytes is not None:
        check_integer("workspace_bytes", workspace_bytes, 1)
    if active_rows is not None:
        check_integer("active_rows", active_rows, 0, target.numel())
    return target


def _check_process_group(process_group: object | None, backend: str) -> None:
    if process_group is None:
        return
    if not hasattr(process_group, "group_name"):
        raise ValueError(
            f"process_group: expected a torch.distributed process group, got {type(process_group).__name__}"
        )
    if backend == "torch":
        raise NotImplementedError("process_group: not yet on the torch backend (float64, or no fused backend here)")
