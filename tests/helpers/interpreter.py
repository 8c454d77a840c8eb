"""Triton's interpreter, in the process that `helpers.forks.run_interpreted` starts: who runs what, and watching it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from stable_rlhf.ops.backends import extension

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="is that process")
cpp = pytest.mark.skipif(extension() is None or INTERPRETED, reason="needs the C++ module; the other process does it")
plain = pytest.mark.skipif(INTERPRETED, reason="the other process does it")
ISAS = extension().isa_names() if extension() is not None else []  # that the C++ module has kernels for
BACKENDS = [
    pytest.param("torch", marks=plain), pytest.param("cpu", marks=cpp), pytest.param("triton", marks=interpreted)
]  # fmt: skip


@contextmanager
def accesses_checked() -> Iterator[list[str]]:
    """The names of kernels launched in the block; an error where one of their programs reads or writes an address that
    lies in none of the launch's tensors, or where a launch would go to whatever CUDA device is the current one."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    launched: list[str] = []
    devices: list[torch.device] = []
    ranges: list[tuple[int, int]] = []

    @contextmanager
    def device_of(tensor):
        devices.append(tensor.device)
        yield
        devices.pop()

    def arguments(self, args, kwargs):
        launched.append(self.fn.__name__)
        assert devices, f"{launched[-1]} is launched outside torch.cuda.device_of"
        hosted = prepare(self, args, kwargs)
        given = [getattr(x, "base", x) for x in (*hosted[0], *hosted[1].values())]  # of a descriptor its tensor
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        assert all(x.is_contiguous() for x in tensors)
        ranges[:] = [(x.data_ptr(), x.data_ptr() + x.numel() * x.itemsize) for x in tensors]
        return hosted

    def check(pointers, mask):
        addresses = pointers.data[mask.data.astype(bool)].astype(np.int64)
        mine = np.zeros(addresses.shape, bool)
        for low, high in ranges:
            mine |= (low <= addresses) & (addresses < high)
        assert mine.all(), f"{launched[-1]} touches memory of nobody"

    def load(self, pointers, mask, *rest, **named):  # a descriptor's loads name the rest
        check(pointers, mask)
        return load_of(self, pointers, mask, *rest, **named)

    def store(self, pointers, value, mask, *rest):
        check(pointers, mask)
        return store_of(self, pointers, value, mask, *rest)

    def atomic(self, operation, pointers, value, mask, *rest):
        check(pointers, mask)
        return atomic_of(self, operation, pointers, value, mask, *rest)

    prepare = GridExecutor._init_args_hst
    load_of, store_of = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic_of = InterpreterBuilder.create_atomic_rmw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_of", device_of)
        patch.setattr(GridExecutor, "_init_args_hst", arguments)
        patch.setattr(InterpreterBuilder, "create_masked_load", load)
        patch.setattr(InterpreterBuilder, "create_masked_store", store)
        patch.setattr(InterpreterBuilder, "create_atomic_rmw", atomic)
        yield launched


@contextmanager
def bfloat16_of_a_gpu() -> Iterator[None]:
    """The interpreter cuts float32 to bfloat16 off, where GPUs round to nearest, and multiplies matrices of bfloat16 as
    if their bits were whole numbers."""
    import triton.language as tl
    from triton.runtime import interpreter

    other, product = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert(data, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.tensor(data).bfloat16().view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return (np.asarray(data).astype(np.uint32) << 16).view(np.float32)
        return other(data, source, target, mode)

    def dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            wide = (convert(x.data, tl.bfloat16, tl.float32, None) for x in (a, b))
            a, b = (interpreter.TensorHandle(x, tl.float32) for x in wide)
        return product(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):  # infinity less infinity is meant
        patch.setattr(interpreter, "_convert_float", convert)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield


@contextmanager
def interrupted(kernel: str, work: Callable[[], object]) -> Iterator[None]:
    """Does `work` once, when half of the programs of a launch of `kernel` in the block have run: what two streams, or a
    graph beside eager calls, may do."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    names: list[str] = []
    done = []

    def arguments(self, args, kwargs):
        names.append(self.fn.__name__)
        return prepare(self, args, kwargs)

    def begin(self, x, y, z):
        if not done and names[-1] == kernel and 0 < self.grid_dim[0] // 2 == x:
            done.append(True)
            dimensions = self.grid_dim
            work()
            self.set_grid_dim(*dimensions)
        begin_of(self, x, y, z)

    prepare, begin_of = GridExecutor._init_args_hst, InterpreterBuilder.set_grid_idx
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "_init_args_hst", arguments)
        patch.setattr(InterpreterBuilder, "set_grid_idx", begin)
        yield
    assert done, f"no launch of {kernel} with several programs"


class Synchronised(AssertionError):
    """A value of a tensor was asked for on the host."""


@contextmanager
def no_synchronisation(allowed: int = 0) -> Iterator[None]:
    """An error where the block reads a tensor's value on the host, what stops a CUDA device and graph capture; but for
    as many reads as are `allowed`, which have to come."""
    reads = []

    def refused(owner, name):
        original = getattr(owner, name)

        def refuse(*arguments, **options):
            reads.append(name)
            if len(reads) > allowed:
                raise Synchronised(name)
            with pytest.MonkeyPatch.context() as inside:  # one read, whatever it is made of
                for other, own in originals.items():
                    inside.setattr(*other, own)
                return original(*arguments, **options)

        return refuse

    methods = (
        "item",
        "tolist",
        "numpy",
        "cpu",
        "nonzero",
        "masked_select",
        "unique",
        "equal",
        "allclose",
        "is_nonzero",
    )
    special = ("__bool__", "__int__", "__float__", "__index__", "__contains__")
    functions = ("nonzero", "masked_select", "unique", "equal", "allclose", "is_nonzero", "bincount")
    owned = [*((torch.Tensor, name) for name in (*methods, *special)), *((torch, name) for name in functions)]
    originals = {(owner, name): getattr(owner, name) for owner, name in owned}
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in owned:
            patch.setattr(owner, name, refused(owner, name))
        yield
    assert len(reads) == allowed, reads
