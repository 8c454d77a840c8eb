"""Checks of arguments shared by the operations. Each failure is one ValueError that starts with the argument's name.

Shapes, types, devices and plain numbers are always checked. Checks of values on a CUDA tensor cost a synchronisation:
the operations make them where they synchronise anyway, and everywhere when `STABLE_RLHF_CHECK=1`. What kernels find in
between, `ops.flags` keeps for the next such point.

What is masked is not read: a value that belongs to an ignored row, to a row of a kind that has no use for it, or that
lies under a mask may be anything, NaN included.
"""

from __future__ import annotations

import math
import os
from numbers import Integral, Real

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
    if value.is_nested:  # with a dense layout too, and its shape cannot be asked for
        raise ValueError(f"{name}: a nested tensor instead of a dense one; pad it")
    if value.layout is not torch.strided:
        kind = str(value.layout).removeprefix("torch.")
        raise ValueError(f"{name}: layout {kind} instead of a dense tensor; call to_dense() or pad it")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(value.shape)} instead of {shape}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: on device {value.device}, the other tensors are on {device}")
    if value.is_meta:
        raise ValueError(f"{name}: on device meta, where tensors have no values")
    if type(value) is not Tensor and hasattr(value, "full_tensor"):  # no import of all that DTensor is
        raise ValueError(
            f"{name}: a DTensor, of which this rank has a part; call inside the forward of the module that owns it"
            f" (ops.PolicyHead is one), or give {name}.full_tensor()"
        )
    if torch.compiler.is_compiling():
        return value
    if value.is_neg():  # its memory holds the values with the other sign
        raise ValueError(f"{name}: a lazily negated view; call resolve_neg()")
    if torch._C._are_functorch_transforms_active() and _is_mapped(value):
        raise ValueError(f"{name}: inside torch.vmap, which the operations do not take; give all rows in one call")
    return value


def _is_mapped(value: Tensor) -> bool:
    functions = torch._C._functorch
    while functions.is_functorch_wrapped_tensor(value):
        if functions.is_batchedtensor(value):
            return True
        value = functions.get_unwrapped(value)
    return False


def check_constant(name: str, value: object) -> None:
    """An argument that no gradient flows to must not ask for one."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires a gradient, and none flows to it; give {name}.detach()")


def check_number(name: str, value: object) -> float:
    """`value` as a Python number, NaN and infinities included; a tensor of one element counts as one."""
    if type(value) is float or type(value) is int:
        return value
    if isinstance(value, Tensor):
        check_constant(name, value)
        check_tensor(name, value, dtypes=(value.dtype,))
        if value.numel() != 1 or value.dtype not in FLOATS + INTEGERS:
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: a tensor of shape {tuple(value.shape)} and type {kind} instead of a number")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def check_positive(name: str, value: object) -> float:
    """1 / value has to be a float32 too."""
    number = check_number(name, value)
    if not 1e-30 <= number <= 1e30:
        raise ValueError(f"{name}: {number} is not a positive number from 1e-30 to 1e30")
    return number


def check_not_negative(name: str, value: object) -> float:
    number = check_number(name, value)
    if number < 0:
        raise ValueError(f"{name}: {number} is negative")
    if not number <= 1e30:
        raise ValueError(f"{name}: {number} is not a number from 0 to 1e30")
    return number


def check_bounded(name: str, value: object) -> float:
    """Of either sign, within what float32 holds with room for sums and products."""
    number = check_number(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name}: non-finite value {number}")
    if not abs(number) <= 1e30:
        raise ValueError(f"{name}: {number} is not a number from -1e30 to 1e30")
    return number


def check_share(name: str, value: object) -> float:
    number = check_number(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name}: {number} is outside [0, 1]")
    return number


def check_integer(name: str, value: object, low: int = 0, high: int = 2**63 - 1) -> int:
    """`value` as an integer of `low`, 0 or 1, or more that C++ can take."""
    if type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{name}: expected an integer, got {type(value).__name__} {value!r:.60}")
        value = int(value)
    if value < low:
        raise ValueError(f"{name}: {value} is {'not positive' if low == 1 else 'negative'}")
    if value > high:
        raise ValueError(f"{name}: {value} is more than {high}")
    return value


def check_flag(name: str, value: object) -> bool:
    if value is not True and value is not False:
        raise ValueError(f"{name}: expected True or False, got {type(value).__name__}")
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
    bounds = check_tensor("cu_seqlens", cu_seqlens, device=device, dtypes=INTEGERS)
    if bounds.dtype != torch.int64:
        bounds = bounds.to(torch.int64)
    if bounds.ndim != 1 or bounds.numel() < 1:
        raise ValueError(f"cu_seqlens: shape {tuple(bounds.shape)} instead of [number of sequences + 1]")
    if bounds.numel() == 1 and total > 0:
        raise ValueError(f"cu_seqlens: no sequence for the {total} tokens given")
    if check_values(device) if read is None else read:
        if int(bounds[0]) != 0 or int(bounds[-1]) != total:
            raise ValueError(
                f"cu_seqlens: runs from {int(bounds[0])} to {int(bounds[-1])} instead of 0 to the {total} tokens given"
            )
        if bool((bounds.diff() < 0).any()):
            raise ValueError(f"cu_seqlens: decreases after entry {first_true(bounds.diff() < 0)}")
    return bounds


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, choices))}")
