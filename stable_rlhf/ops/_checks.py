"""Checks of arguments shared by the operations. Each failure is one ValueError that starts with the argument's name.

Shapes, types and devices are always checked. Checks of values on a CUDA tensor cost a synchronisation: the operations
make them where they synchronise anyway, and everywhere when `STABLE_RLHF_CHECK=1`.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_values(device: torch.device) -> bool:
    """Whether values on `device` may be read on the host for a check that nothing else needs."""
    return device.type == "cpu" or os.environ.get("STABLE_RLHF_CHECK") == "1"


def statistics_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 when any input is float64, else float32: no statistic is ever kept in 16 bits."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_tensor(
    name: str,
    value: object,
    *,
    shape: tuple[int, ...] | None = None,
    device: torch.device | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> Tensor:
    """`value` itself when it is a tensor of the shape, device and one of the types asked for."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}: type {str(value.dtype).removeprefix('torch.')} is not one of {wanted}")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(value.shape)} instead of {shape}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: on device {value.device}, the other tensors are on {device}")
    return value


def first_true(bad: Tensor) -> int:
    """Index of the first True of a 1-D bool tensor that has one."""
    return int(torch.nonzero(bad)[0])


def check_finite(name: str, value: Tensor) -> None:
    """Reads the device: call it where a synchronisation is due anyway."""
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        index = first_true(bad.reshape(-1))
        raise ValueError(f"{name}: non-finite value {float(value.reshape(-1)[index])} at position {index}")


def check_cu_seqlens(cu_seqlens: object, total: int, device: torch.device, *, read: bool | None = None) -> Tensor:
    """`cu_seqlens` [S + 1] as int64: sequence s is [cu_seqlens[s], cu_seqlens[s + 1]) of `total` packed tokens.

    Args:
        read: whether to check the values too; by default where that costs no synchronisation.
    """
    bounds = check_tensor("cu_seqlens", cu_seqlens, device=device, dtypes=INTEGERS).to(torch.int64)
    if bounds.ndim != 1 or bounds.numel() < 1:
        raise ValueError(f"cu_seqlens: shape {tuple(bounds.shape)} instead of [number of sequences + 1]")
    if check_values(device) if read is None else read:
        if int(bounds[0]) != 0 or int(bounds[-1]) != total:
            raise ValueError(
                f"cu_seqlens: runs from {int(bounds[0])} to {int(bounds[-1])} instead of 0 to the {total} tokens given"
            )
        if bool((bounds.diff() < 0).any()):
            raise ValueError(f"cu_seqlens: decreases after entry {first_true(bounds.diff() < 0)}")
    return bounds


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, choices))}")
