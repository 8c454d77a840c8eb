"""Triton launches over tensors of which some have no data: a sample of the programs runs in Triton's interpreter, with
every load and store recorded; where all tensors have data, all programs run."""

from __future__ import annotations

import bisect
import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.count.device import _FIRST_ADDRESS, CountError, Device
from bench.count.tiles import Tile, tiles_of
from bench.count.trace import IrregularLoop, Sectors, Trace, summed
from bench.count.work import Programs, Sort, Work

_TYPES = {
    torch.bool: tl.int1, torch.uint8: tl.uint8, torch.int8: tl.int8, torch.int16: tl.int16, torch.int32: tl.int32,
    torch.int64: tl.int64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32,
    torch.float64: tl.float64,
}  # fmt: skip
_SAMPLE = 8  # programs of a launch that is run whole
_MORE = 64  # further programs that may be run until every kind of row has been met
_EXACT = 0.005  # of a launch's bytes: how well has to be known which programs have more
_CONTROL_BYTES = 64  # of a tensor that holds counts and the like: a launch with others is another launch

builder = interpreter.interpreter_builder
_EVICT_FIRST = object()  # a load or store after which its memory may leave the cache before all other
_UNKNOWN = object()  # the result of rows that are alike in what is given, and not in what they get
Table = dict[tuple[Any, ...], dict[str, Any]]  # what a row of each kind gets in each result


class _Scope:
    """The language patched in one module, until it is closed."""

    def __init__(self, changed: Any) -> None:
        self.changed = changed
        self.close = changed.restore


class Launches:
    """Puts itself in the place of the interpreter's grid while the device is there.

    Args:
        cache_bytes: what of the second-level cache counts as usable.
    """

    def __init__(self, device: Device, cache_bytes: float) -> None:
        self.device, self.cache_bytes = device, cache_bytes
        self._known: dict[Any, tuple[Programs, Table, list[Tensor]]] = {}
        self._trace: Trace | None = None
        self._touched: set[tuple[bool, int]] = set()  # of tensors with data: (whether written, address)
        self._ends: list[tuple[int, int]] = []  # of the tensors under way, ascending
        self._sampling = self._regular = False
        self._patched: set[int] = set()  # modules, by their globals
        self._scopes = contextlib.ExitStack()

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Launches inside the block come here."""
        if not isinstance(triton.jit(lambda: None), interpreter.InterpretedFunction):
            raise RuntimeError("TRITON_INTERPRET=1 has to be set before triton is imported")

        def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            if not warmup:
                with torch._C.DisableTorchFunction(), _disable_current_modes():
                    self.launch(function, args, grid, kwargs)

        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            self._patch(function.fn)
            return function.rewrite()(*args, **kwargs)

        function = interpreter.InterpretedFunction
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(function, "run", run))
            stack.enter_context(mock.patch.object(function, "__call__", call))
            for name, value in self._hooks().items():
                stack.enter_context(mock.patch.object(builder, name, value))
            stack.enter_context(mock.patch.object(interpreter.ReduceScanOpInterface, "apply", _stamped_apply()))
            yield

    # -- a launch ------------------------------------------------------------------------------------------------------

    def launch(self, function: Any, args: Any, grid: Any, kwargs: dict[str, Any]) -> None:
        code = function.rewrite()
        spec = inspect.getfullargspec(function.fn)
        named = {k: v for k, v in kwargs.items() if k in (*spec.args, *spec.kwonlyargs)}
        given = inspect.getcallargs(code, *args, **named)
        shape = (*(grid(given) if callable(grid) else grid), 1, 1)
        programs, warps = math.prod(shape[:3]), int(kwargs.get("num_warps", 4))
        if programs == 0:
            return
        described = {name: x.base for name, x in given.items() if isinstance(x, TensorDescriptor)}
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)} | described
        for name, x in tensors.items():
            if self.device.memory(x) is None:
                raise CountError(f"{function.fn.__name__}: {name} is a tensor of the host")
        if described:
            self._multiply(function, code, given, tensors, shape, f"{function.fn.__name__}, {warps} warps")
            return
        whole = all(not x.is_meta for x in tensors.values())
        registers = int(kwargs.get("maxnreg") or 0)
        key = None if whole else (self._key(function, given, shape, warps), registers)
        entry = None if whole else self._known.get(key)
        label = f"{function.fn.__name__}, {warps} warps"
        if entry is not None and self._fill(entry[1], tensors):
            _Counters(tensors, programs).leave(entry[2])
            self._write_down(label, entry[0])
            return
        run = self._prepared(function, code, given, tensors, shape)
        self._touched = set()
        with run() as one:
            if whole:
                traces = self._all(one, programs)
                table: Table = {}
                self._refuse_partial(tensors)
            else:
                self._sampling = self._regular = True
                counters = _Counters(tensors, programs)
                sampled = self._in_turn(one, counters)
                try:
                    traces = self._some(sampled, programs)
                    table = self._kinds(sampled, traces, programs, tensors)
                finally:
                    self._sampling = False
                counters.leave(counters.after_all)
        ranges = {(m.address, m.bytes) for x in tensors.values() if (m := self.device.memory(x)) is not None}
        moved = summed(traces, programs, warps, registers, sorted(ranges), self.cache_bytes)
        if key is not None:
            self._known[key] = moved, table, counters.after_all
        self._write_down(label, moved)

    def _multiply(
        self, function: Any, code: Any, given: dict[str, Any], tensors: dict[str, Tensor], shape: tuple[int, ...],
        label: str,
    ) -> None:  # fmt: skip
        """A launch that multiplies matrices. As of a library's product, each of them is moved once by count. One tile
        is looked at; all are made where the matrices and what is made of them have data. Products of matrices without
        data are 0, as whatever is read of them is."""
        operands = {id(x.base): x.base for x in given.values() if isinstance(x, TensorDescriptor)}
        programs = math.prod(shape[:3])
        made = [x for x in tensors.values() if not x.is_meta and x.ndim > 1 and id(x) not in operands]
        with self._prepared(function, code, given, tensors, shape)() as one:
            tiles = tiles_of(one, programs)  # first: it multiplies nothing, and its tile is made anew below
            if made and all(not x.is_meta for x in operands.values()):
                for program in range(programs):
                    one(program, False)
            elif made:
                for x in made:
                    x.zero_()
        storages = {(m.address, m.bytes) for x in tensors.values() if (m := self.device.memory(x)) is not None}
        moved = float(sum(size for _address, size in storages))
        self.device.entries.append(Work(label, Sort.KERNEL, moved, tiles=tiles))

    def _write_down(self, name: str, programs: Programs) -> None:
        self.device.entries.append(Work(name, Sort.KERNEL, programs.read + programs.written, programs=programs))

    def _key(self, function: Any, given: dict[str, Any], shape: tuple[int, ...], warps: int) -> Any:
        def part(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return repr(x)
            control = not x.is_meta and x.nbytes <= _CONTROL_BYTES and not x.is_floating_point()
            values = tuple(x.flatten().tolist()) if control else None
            kinds = len(x.unique()) if _tells_kinds(x) else 0  # a mixture is another launch than rows of one kind
            return x.dtype, tuple(x.shape), x.stride(), x.is_meta, values, kinds

        storages: dict[int, int] = {}
        same = [
            storages.setdefault(x.untyped_storage()._cdata, len(storages))
            for x in given.values() if isinstance(x, Tensor)
        ]  # fmt: skip
        return function.fn, shape, warps, tuple(same), tuple((name, part(x)) for name, x in given.items())

    def _patch(self, code: Any) -> None:
        """Puts the interpreter's language in the place of Triton's in the module of a function, once a launch; the
        interpreter itself does so at every call, which takes longer than the call."""
        if id(code.__globals__) in self._patched:
            return
        self._patched.add(id(code.__globals__))
        scope = self._scopes.enter_context(contextlib.closing(_Scope(interpreter._patch_lang(code))))

        def looked_at(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def reading(x: Any) -> Any:
                if self._trace is not None and (stamp := _stamp(x.handle)):
                    self._trace.fence(stamp)
                return read(x)

            return reading

        for name in ("__bool__", "__index__"):
            scope.changed.set_attr(tl.tensor, name, looked_at(getattr(tl.tensor, name)))

        def turns(*args: Any, **_options: Any) -> Iterable[int]:
            numbers = range(*args)
            return numbers if self._trace is None else self._trace.turns(numbers)

        scope.changed.set_attr(tl, "range", turns)
        if not code.__module__.startswith("triton."):
            known = code.__globals__.get("range", range)
            code.__globals__["range"] = turns
            self._scopes.callback(code.__globals__.__setitem__, "range", known)

    @contextlib.contextmanager
    def _language(self, code: Any) -> Iterator[None]:
        self._patched = set()
        with contextlib.ExitStack() as self._scopes, np.errstate(all="ignore"):
            self._patch(code)
            yield

    def _prepared(
        self, function: Any, code: Any, given: dict[str, Any], tensors: dict[str, Tensor], shape: tuple[int, ...]
    ) -> Callable[[], contextlib.AbstractContextManager[Callable[[int, bool | Tile], Trace | None]]]:
        constants = {
            name for name, kind in inspect.get_annotations(function.fn).items()
            if kind is tl.constexpr or "constexpr" in str(kind)
        }  # fmt: skip
        arguments = {name: x if name in constants else self._argument(x) for name, x in given.items()}
        memories = [self.device.memory(x) for x in tensors.values()]
        self._ends = sorted({(m.address, m.address + m.bytes) for m in memories if m is not None})
        grid = shape[:3]

        def alike() -> bool:
            kinds, _results = self._of_rows(tensors)
            return all(bool((x == x[0]).all()) for x in kinds.values())

        def _run_program(number: int, traced: bool | Tile) -> Trace | None:
            trace: Trace | None = traced if isinstance(traced, Tile) else None
            if traced and trace is None:
                trace = Trace(continues=self._sampling and self._regular, alike=alike)
            self._trace = trace
            x, rest = divmod(number, grid[1] * grid[2])
            builder.set_grid_idx(x, *divmod(rest, grid[2]))
            try:
                code(**arguments)
            finally:
                self._trace = None
            if trace is not None:
                trace.finish()
            return trace

        @contextlib.contextmanager
        def ready() -> Iterator[Callable[[int, bool | Tile], Trace | None]]:
            builder.set_grid_dim(*grid)
            with self._language(code):
                yield _run_program

        return ready

    def _argument(self, x: Any) -> Any:
        if isinstance(x, TensorDescriptor):
            return interpreter.interpreter_semantic.make_tensor_descriptor(
                base=self._argument(x.base), shape=[interpreter._implicit_cvt(n) for n in x.shape],
                strides=[*(interpreter._implicit_cvt(n) for n in x.strides[:-1]), tl.constexpr(1)],
                block_shape=[tl.constexpr(n) for n in x.block_shape],
            )  # fmt: skip
        if not isinstance(x, Tensor):
            return interpreter._implicit_cvt(x)
        kind = tl.pointer_type(_TYPES[x.dtype])
        handle = interpreter.TensorHandle(np.array([self.device.address(x)], dtype=np.uint64), kind)
        return tl.tensor(handle, kind)

    # -- which programs ------------------------------------------------------------------------------------------------

    def _all(self, one: Callable[[int, bool], Trace | None], programs: int) -> dict[int, Trace]:
        """Every program, in order, for what it writes; some of them traced."""
        sample = {round(i * (programs - 1) / (_SAMPLE - 1)) for i in range(_SAMPLE)}
        traces = {}
        for program in range(programs):
            trace = one(program, program in sample)
            if trace is not None:
                traces[program] = trace
        return traces

    def _in_turn(self, one: Callable[[int, bool], Trace | None], counters: _Counters) -> Callable[[int], Trace]:
        """One program of a sample: it finds the counters as they are when its turn comes, and where a loop does not go
        on as it began it runs all of it."""

        def run(program: int) -> Trace:
            try:
                with counters.before(program):
                    trace = one(program, True)
            except IrregularLoop:
                self._regular = False
                with counters.before(program):
                    trace = one(program, True)
            assert trace is not None
            return trace

        return run

    def _some(self, one: Callable[[int], Trace], programs: int) -> dict[int, Trace]:
        """The first, the middle and the last program. Where the first ones have more to do, as in a grid that goes over
        its rows in turns, where that ends too."""
        traces: dict[int, Trace] = {}

        def weight(program: int) -> int:
            if program not in traces:
                traces[program] = one(program)
            return traces[program].bytes

        low, high = 0, programs - 1
        if weight(low) != weight(high):
            apart = abs(weight(low) - weight(high)) / max(weight(low), weight(high))
            while high - low > max(1.0, _EXACT * programs / apart):
                middle = (low + high) // 2
                low, high = (middle, high) if weight(middle) == weight(0) else (low, middle)
        weight(programs // 2)
        return traces

    # -- results with data of a launch that was sampled ----------------------------------------------------------------

    def _kinds(
        self, one: Callable[[int], Trace], traces: dict[int, Trace], programs: int, tensors: dict[str, Tensor]
    ) -> Table:
        """What each kind of row gets. Where logits have no data they are all alike, so rows that are alike in what is
        given for each row get the same results: those of a row that ran stand for all of its kind."""
        table: Table = {}
        self._learn(table, tensors)
        rest = (p for p in range(programs) if p not in traces)
        for program in itertools.islice(rest, _MORE):
            if self._fill(table, tensors):
                break
            one(program)
            self._learn(table, tensors)
        self._fill(table, tensors)
        return table

    def _refuse_partial(self, tensors: dict[str, Tensor]) -> None:
        read = sorted(a for is_write, a in self._touched if not is_write)
        for name, x in tensors.items():
            memory = self.device.memory(x)
            at = bisect.bisect_left(read, x.data_ptr())
            if memory is not None and memory.partial and at < len(read) and read[at] < memory.address + memory.bytes:
                raise CountError(f"{name}: read, and only some of the programs that write it could run")

    def _of_rows(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of the tensors with data and a value a row, those that decide the kind of a row, and the results."""
        written = sorted(a for is_write, a in self._touched if is_write)
        read = sorted(a for is_write, a in self._touched if not is_write)

        def inside(x: Tensor, addresses: list[int]) -> bool:
            at = bisect.bisect_left(addresses, x.data_ptr())
            return at < len(addresses) and addresses[at] < x.data_ptr() + x.numel() * x.element_size()

        here = {n: x for n, x in tensors.items() if not x.is_meta and x.ndim == 1 and x.numel() > 1}
        results = {n: x for n, x in here.items() if inside(x, written)}
        kinds = {
            n: x for n, x in here.items()
            if n not in results and inside(x, read) and _tells_kinds(x)
        }  # fmt: skip
        return kinds, results

    def _learn(self, table: Table, tensors: dict[str, Tensor]) -> None:
        kinds, results = self._of_rows(tensors)
        written = sorted(a for is_write, a in self._touched if is_write)
        for name, x in results.items():
            begin, size = x.data_ptr(), x.element_size()
            low, high = (bisect.bisect_left(written, a) for a in (begin, begin + x.numel() * size))
            rows = [(a - begin) // size for a in written[low:high]]
            fields = tuple(sorted(n for n, other in kinds.items() if other.numel() == x.numel()))
            values = x.tolist()
            columns = [kinds[n].tolist() for n in fields]
            for row in rows:
                kind = (fields, *(column[row] for column in columns))
                known = table.setdefault(kind, {}).setdefault(name, values[row])
                if known != values[row] and known == known:
                    table[kind][name] = _UNKNOWN

    def _fill(self, table: Table, tensors: dict[str, Tensor]) -> bool:
        """Writes the results of every row; whether every kind of row is known. Of results that are not, nothing is
        written, and who reads them later is told."""
        complete = True
        for name in sorted({name for results in table.values() for name in results} & set(tensors)):
            x = tensors[name]
            fields = next(kind[0] for kind, results in table.items() if name in results)
            columns = [tensors[n].tolist() for n in fields]
            rows = list(zip(*columns, strict=True)) if columns else [()] * x.numel()
            values = [table.get((fields, *row), {}).get(name) for row in rows]
            unknown = any(value is _UNKNOWN for value in values)
            complete = complete and (unknown or None not in values)
            memory = self.device.memory(x)
            assert memory is not None
            memory.partial = unknown or None in values
            if not memory.partial:
                x.copy_(torch.tensor(values, dtype=x.dtype))
        return complete

    # -- memory operations ---------------------------------------------------------------------------------------------

    def _hooks(self) -> dict[str, Callable[..., Any]]:
        """The builder's operations: those of memory are recorded and kept from addresses without memory, all others
        hand on which round of loads their arguments come from."""
        hooks: dict[str, Callable[..., Any]] = {}
        for name in dir(type(builder)):
            if name.startswith("create_"):
                hooks[name] = self._stamping(getattr(builder, name))
        load, store = builder.create_masked_load, builder.create_masked_store
        swap, change, barrier = builder.create_atomic_cas, builder.create_atomic_rmw, builder.create_barrier

        def masked_load(pointers: Any, mask: Any, other: Any, cache_policy: Any, is_volatile: Any) -> Any:
            known = self._record(pointers, mask)
            kind = pointers.get_element_ty()
            if _without_data(pointers):
                shape, dtype = pointers.data.shape, interpreter._get_np_dtype(kind)
                data = np.zeros(shape, dtype)
                if other is not None:
                    data = np.where(mask.data, data, other.data).astype(dtype)
                value = interpreter.TensorHandle(data, kind)
            else:
                value = load(pointers, mask, other, cache_policy, is_volatile)
            if self._trace is not None and known is not None:
                value.stamp = self._trace.load(*known, _stamp(pointers, mask), cache_policy is not _EVICT_FIRST)
            return value

        def masked_store(pointers: Any, value: Any, mask: Any, policy: Any) -> Any:
            known = self._record(pointers, mask, written=True)
            if self._trace is not None and known is not None:
                self._trace.store(*known, policy is not _EVICT_FIRST)
            return None if _without_data(pointers) else store(pointers, value, mask, policy)

        def atomic(pointers: Any, mask: Any, others: tuple[Any, ...], act: Callable[[], Any]) -> Any:
            known = self._record(pointers, mask, written=True)
            if self._sampling and not _without_data(pointers) and not self._counts(pointers):
                raise CountError("an atomic operation on data in a launch of which only some programs can run")
            if _without_data(pointers):
                kind = pointers.get_element_ty()
                value = interpreter.TensorHandle(np.zeros(pointers.data.shape, interpreter._get_np_dtype(kind)), kind)
            else:
                value = act()
            if self._trace is not None and known is not None:
                value.stamp = self._trace.atomic(*known, _stamp(pointers, *others))
            return value

        def atomic_rmw(operation: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
            return atomic(pointers, mask, (value, mask), lambda: change(operation, pointers, value, mask, *more))

        def atomic_cas(pointers: Any, expected: Any, value: Any, *more: Any) -> Any:
            return atomic(pointers, None, (expected, value), lambda: swap(pointers, expected, value, *more))

        def dot(a: Any, b: Any, total: Any, *_more: Any) -> Any:
            if self._trace is None:
                return interpreter.TensorHandle(_wide(a) @ _wide(b) + total.data, total.dtype.scalar)
            if not isinstance(self._trace, Tile):
                raise CountError("a product in a launch without descriptors of its matrices")
            rows, inner = a.data.shape
            self._trace.multiply(rows, inner, b.data.shape[1])
            return total

        def cache_policy(modifier: Any, eviction: Any) -> Any:
            """What the interpreter hands on to loads and stores, and does not look at."""
            return _EVICT_FIRST if str(eviction).lower().endswith("evict_first") else None

        def fence() -> Any:
            if self._trace is not None:
                self._trace.fence()
            return barrier()

        # These come down to the above: their own results need no stamp.
        for name in ("create_load", "create_store", "create_descriptor_load", "create_descriptor_store"):
            hooks.pop(name, None)
        hooks |= {
            "create_masked_load": masked_load, "create_masked_store": masked_store, "create_atomic_rmw": atomic_rmw,
            "create_atomic_cas": atomic_cas, "create_barrier": fence, "create_dot": dot,
            "get_cache_policy": cache_policy,
        }  # fmt: skip
        return hooks

    def _stamping(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def stamped(*args: Any, **kwargs: Any) -> Any:
            result = operation(*args, **kwargs)
            if self._trace is not None and isinstance(result, interpreter.TensorHandle):
                stamp = _stamp(*args)
                if stamp > getattr(result, "stamp", 0):
                    result.stamp = stamp
            return result

        return stamped

    def _record(self, pointers: Any, mask: Any, written: bool = False) -> tuple[Sectors, int] | None:
        """The sectors that an operation touches and its first address; None where nothing is recorded."""
        trace = self._trace
        if trace is None:
            return None
        addresses = pointers.data if mask is None else np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if addresses.size:
            self._check(int(addresses.min()), int(addresses.max()) + itemsize)
            if not _without_data(pointers) and addresses.size <= 4096:
                self._touched.update((written, int(a)) for a in np.unique(addresses))
        return trace.sectors(addresses, itemsize), int(addresses.flat[0]) if addresses.size else 0

    def _counts(self, pointers: Any) -> bool:
        """Whether they point into a tensor that holds counts and no data of rows."""
        address = int(pointers.data.flat[0])
        return any(low <= address < high and high - low <= _CONTROL_BYTES for low, high in self._ends)

    def _check(self, low: int, high: int) -> None:
        at = bisect.bisect_right(self._ends, (low, 1 << 63)) - 1
        while at >= 0 and high > self._ends[at][1]:  # storages of the host may lie close to one another
            at -= 1
        if at < 0 or low < self._ends[at][0]:
            raise CountError(f"addresses {low:#x} to {high:#x} lie outside the arguments")


def _wide(x: Any) -> np.ndarray[Any, Any]:
    """A block in float32; of bfloat16 the interpreter holds the bits."""
    if x.dtype.scalar == tl.bfloat16:
        bits: np.ndarray[Any, Any] = x.data.astype(np.uint32) << 16
        return bits.view(np.float32)
    return np.asarray(x.data, dtype=np.float32)


def _tells_kinds(x: Tensor) -> bool:
    """Whether the tensor has data, a value a row, and these are no indices."""
    return not x.is_meta and x.ndim == 1 and x.numel() > 1 and (x.is_floating_point() or x.element_size() == 1)


class _Counters:
    """Small tensors of whole numbers, such as tickets: a program of a sample finds there what those before it would
    have left, each of them what the first one did."""

    def __init__(self, tensors: dict[str, Tensor], programs: int) -> None:
        self.programs = programs
        self.tensors = [
            x for x in tensors.values() if not x.is_meta and x.nbytes <= _CONTROL_BYTES and not x.is_floating_point()
        ]
        self.before_all = [x.clone() for x in self.tensors]
        self.step: list[Tensor] | None = None
        self.after_all = self.before_all

    @contextlib.contextmanager
    def before(self, program: int) -> Iterator[None]:
        if self.step is not None:
            for x, first, step in zip(self.tensors, self.before_all, self.step, strict=True):
                x.copy_(first + program * step)
        yield
        if program == 0:
            self.step = [x - first for x, first in zip(self.tensors, self.before_all, strict=True)]
        if program == self.programs - 1:
            self.after_all = [x.clone() for x in self.tensors]

    def leave(self, after_all: list[Tensor]) -> None:
        """As the last program leaves them."""
        for x, last in zip(self.tensors, after_all, strict=True):
            x.copy_(last)


def _without_data(pointers: Any) -> bool:
    return pointers.data.size > 0 and int(pointers.data.flat[0]) >= _FIRST_ADDRESS


def _stamp(*handles: Any) -> int:
    return max((getattr(h, "stamp", 0) for h in handles), default=0)


def _stamped_apply() -> Callable[..., Any]:
    apply = interpreter.ReduceScanOpInterface.apply

    def stamped(self: Any, input: Any) -> Any:
        result = apply(self, input)
        handles = [x.handle for x in (input if isinstance(input, tuple) else (input,))]
        for x in result if isinstance(result, tuple) else (result,):
            x.handle.stamp = max(_stamp(*handles), _stamp(x.handle))
        return result

    return stamped
