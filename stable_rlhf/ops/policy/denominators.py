"""What the sums of a loss are divided by."""

from __future__ import annotations

import torch
from torch import Tensor

from stable_rlhf.ops.checks import FLOATS, INTEGERS, check_values
from stable_rlhf.ops.policy.types import PolicyCall


def denominators(
    call: PolicyCall,
    counts: tuple[int | None, int | None],
    on_device: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    """Of the policy and of the rehearsal rows, and where it is another one of the entropies; 0-d.

    counts: how many rows of each kind there are; None: only the device knows, where `on_device` has them behind the
        number of all.
    """
    policy, rehearsal = (None, None) if on_device is None else (on_device[1], on_device[2])
    return [
        _denominator(name, value, count, there, dtype, device)
        for (name, value, count), there in zip(
            wanted_denominators(call, *counts), (policy, rehearsal, policy), strict=False
        )
    ]


def wanted_denominators(
    call: PolicyCall, policy_count: int | None, rehearsal_count: int | None
) -> list[tuple[str, float | Tensor | None, int | None]]:
    """The names, values and numbers of rows of those that a call reads."""
    wanted = [
        ("policy_denominator", call.policy_denominator, policy_count),
        ("rehearsal_denominator", call.rehearsal_denominator, rehearsal_count),
    ]
    if call.entropy_denominator is not None and call.config.entropy_coef != 0.0:
        wanted.append(("entropy_denominator", call.entropy_denominator, policy_count))
    return wanted


def check_denominator(name: str, value: float | None, count: int | None) -> None:
    if value is not None and count and not value >= 1e-30:
        raise ValueError(f"{name}: {value} is not positive, and there are {count} such rows")


def _denominator(
    name: str,
    value: float | Tensor | None,
    count: int | None,
    on_device: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The denominator as a 0-d tensor; 1 where there is no row of this kind, whose sum is 0 whatever it is over."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype not in FLOATS + INTEGERS or value.is_meta:
            raise ValueError(f"{name}: shape {tuple(value.shape)} instead of a single number")
        if count == 0:
            return torch.ones((), dtype=dtype, device=device)
        value = value.detach().to(device=device, dtype=dtype).reshape(())
    if count is None:
        assert on_device is not None
        wanted = on_device if value is None else value
        if not isinstance(wanted, Tensor):  # by itself `where` would take the caller's default type
            wanted = torch.full((), wanted, dtype=dtype, device=device)
        return torch.where(on_device > 0, wanted, 1).to(dtype)
    if isinstance(value, Tensor):
        if check_values(device):
            check_denominator(name, float(value), count)
        return value
    check_denominator(name, value, count)
    return torch.full((), float(count if value is None else value) if count else 1.0, dtype=dtype, device=device)
