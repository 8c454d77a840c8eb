"""Choice of the implementation of an operation: `triton` (CUDA), `cpu` (C++) or `torch` (the plain reference).

By default the device decides: CUDA tensors go to Triton and CPU tensors to C++, where the operation has such an
implementation and it can run; everything else goes to PyTorch. `backend(name)` forces one for a block of code.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd import forward_ad

# Loaded here and not at its first call: it can tell a forked child, whose threads are gone, if it was there before.
with suppress(ImportError):
    importlib.import_module("stable_rlhf._C")

BACKENDS = ("triton", "cpu", "torch")
_forced: ContextVar[str | None] = ContextVar("stable_rlhf_ops_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces the implementation of every operation called inside the block, in this thread.

    Enter it outside the compiled function: torch.compile does not trace the block itself.

    Args:
        name: "triton" (CUDA tensors, or any tensors where `TRITON_INTERPRET=1`), "cpu" (C++) or "torch".

    Raises:
        ValueError: `name` is none of the three.
        RuntimeError: raised by the operation itself when it lacks this backend or the backend cannot run here.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: unknown name {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def extension() -> Any | None:
    """The C++ module `stable_rlhf._C`, or None where it was not built or does not load."""
    try:
        return importlib.import_module("stable_rlhf._C")
    except ImportError as error:
        _tell_of_the_slow_path(str(error))
        return None


def _tell_of_the_slow_path(reason: str) -> None:
    """Once a process, since `extension` asks once: pip shows nothing of a build that went without a compiler."""
    warnings.warn(
        f"stable_rlhf runs on the CPU without its C++ module, by PyTorch and more slowly ({reason}); for the fast path "
        "install a C++17 compiler and reinstall: pip install --force-reinstall --no-deps --no-cache-dir stable-rlhf",
        RuntimeWarning,
        stacklevel=2,
    )


def cpu_isa() -> str:
    """The instruction set whose kernels the C++ module is to run: $STABLE_RLHF_CPU_ISA, or "" for the processor's best.

    Raises:
        RuntimeError: this processor or this build has no kernels for it.
    """
    named = os.environ.get("STABLE_RLHF_CPU_ISA", "")
    if named:
        module = extension()
        known = module.isa_names() if module is not None else []
        if named not in known:
            raise RuntimeError(f"STABLE_RLHF_CPU_ISA: no kernels for {named!r} here, only for {', '.join(known)}")
    return named


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _obstacle(name: str, device: torch.device) -> str | None:
    """Why backend `name` cannot work on tensors of `device`; None when it can."""
    if name != "torch" and transformed():
        return "it has no forward-mode derivatives and takes no torch.func transforms; the default here is 'torch'"
    if name == "cpu":
        if device.type != "cpu":
            return f"it needs CPU tensors, not {device.type}"
        if extension() is None:
            return "the C++ module stable_rlhf._C is not installed (no compiler at install time?)"
    if name == "triton":
        if not _has_triton():
            return "triton is not installed"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it needs CUDA tensors, not {device.type} (or TRITON_INTERPRET=1 set before the first use)"
    return None


_implementations: dict[str, dict[str, Callable[..., Any]]] = {}


def register(op: str, implementations: dict[str, Callable[..., Any]]) -> None:
    """Declares the implementations of `op` by backend name; "torch", the reference, is always among them."""
    _implementations[op] = implementations


def selected(op: str, device: torch.device) -> str:
    """The backend of `op` for tensors of `device`: the forced one, else the device's own, else PyTorch."""
    implementations = _implementations[op]
    forced = _forced.get()
    if forced is not None:
        if forced not in implementations:
            raise RuntimeError(f"{op} has no backend {forced!r}; it has {', '.join(map(repr, implementations))}")
        obstacle = _obstacle(forced, device)
        if obstacle is not None:
            raise RuntimeError(f"{op}: backend {forced!r} cannot run: {obstacle}")
        return forced
    preferred = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "torch")
    return preferred if preferred in implementations and _obstacle(preferred, device) is None else "torch"


def _traced_choice(op: str, device: str) -> str:
    return selected(op, torch.device(device))


# What torch.compiler.assume_constant_result does to a function. Itself it would import torch's compiler, which takes
# several times as long as all of this package, for callers that never compile.
_traced_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choice(op: str, device: torch.device) -> str:
    """`selected`; where torch.compile traces through it, a constant of the compiled code."""
    return _traced_choice(op, device.type) if torch.compiler.is_compiling() else selected(op, device)


def implementation(op: str, name: str) -> Callable[..., Any]:
    """Backend `name` of `op`."""
    return _implementations[op][name]


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is at work. They see PyTorch's own operations
    alone, so the references run under them. (Under torch.compile operators stand for the operations.)"""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def backend_report(device: torch.device | str | None = None) -> dict[str, str]:
    """The backend that each operation takes by default for tensors of `device`.

    Args:
        device: None for CUDA where there is a GPU, else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    token = _forced.set(None)
    try:
        return {op: selected(op, torch.device(device)) for op in sorted(_implementations)}
    finally:
        _forced.reset(token)
