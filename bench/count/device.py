"""A CUDA device without hardware: tensors that say they are on it, with data where they are small, without where they
are large, and a ledger of what is done with them.

A tensor of the device is a plain tensor, of the CPU where it has data and of "meta" where it has none: its storage is
known here, and everybody who asks for its device is told `cuda:0`. Two modes of PyTorch see all that happens: one the
functions that Python calls, for devices and synchronisations, the other the operations that reach a device.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from bench.count.operations import ALLOCATIONS, CREATIONS, NOTHING, OVERWRITES, PRODUCTS, stops_host, work_of
from bench.count.work import Entry, Ledger, Record, Sort, Stop, Wait, Work

MIB = 1 << 20
CUDA = torch.device("cuda", 0)
_BLOCK = 512  # bytes, of PyTorch's allocator
_FIRST_ADDRESS = 1 << 48  # beyond all addresses of a process
_GAP = 1 << 32  # a tensor without data begins at a multiple: what runs over its end meets nothing


# By the identity of their storages, of all devices of the process: the package keeps some tensors from call to call,
# and those that it made on one device it finds again on the next.
_memories: dict[int, Memory] = {}
_addresses = {"next": _FIRST_ADDRESS}


def _room(size: int) -> int:
    """An address with nothing behind it for as many bytes, and a gap after them."""
    address = _addresses["next"]
    _addresses["next"] += (size // _GAP + 1) * _GAP
    return address


class CountError(RuntimeError):
    """What was asked for cannot be counted: it depends on values that are not there."""


@dataclass
class Memory:
    """One storage of the device."""

    address: int
    bytes: int
    real: bool  # has data
    partial: bool = False  # some of them are those of before a launch of which only some programs ran


@dataclass
class Described:
    """What `torch.cuda.get_device_properties` says of the device."""

    name: str = "NVIDIA H200 (counted, not there)"
    major: int = 9
    minor: int = 0
    total_memory: int = 141 * 10**9
    multi_processor_count: int = 132
    L2_cache_size: int = 50 * 10**6
    warp_size: int = 32
    max_threads_per_multi_processor: int = 2048
    regs_per_multiprocessor: int = 65536
    shared_memory_per_block_optin: int = 232_448
    shared_memory_per_multiprocessor: int = 233_472


class Device:
    """The device, its memory and the ledger under way.

    Args:
        limit: bytes up to which a new tensor has data.
        capturing: whether a graph is being captured, as far as those who ask are told.
    """

    def __init__(self, limit: int = 4 * MIB, capturing: bool = False) -> None:
        self.limit, self.capturing = limit, capturing
        self.described = Described()
        self.entries: list[Entry] = []
        self.live = self.peak = 0
        self.events = 0
        self._pinned: set[int] = set()
        self._unread: dict[int, int] = {}  # pinned storages that a copy is under way to, by the number of its entry
        self._functions, self._operations = _Functions(self), _Operations(self)

    # -- memory --------------------------------------------------------------------------------------------------------

    def memory(self, x: Tensor) -> Memory | None:
        """Where x lies on the device; None for a tensor of the host."""
        with torch._C.DisableTorchFunction():
            return _memories.get(x.untyped_storage()._cdata)

    def adopt(self, x: Tensor) -> Tensor:
        """x, which is on the device from now on."""
        with torch._C.DisableTorchFunction():
            storage = x.untyped_storage()
            key = storage._cdata
            if key in _memories:
                return x
            real, size = not x.is_meta, storage.nbytes()
            address = storage.data_ptr()
            if not real:
                address = _room(size)
            _memories[key] = Memory(address, size, real)
            weakref.finalize(storage, self._gone, key).atexit = False
        self.live += -(-size // _BLOCK) * _BLOCK
        self.peak = max(self.peak, self.live)
        return x

    def _gone(self, key: int) -> None:
        memory = _memories.pop(key)
        self.live -= -(-memory.bytes // _BLOCK) * _BLOCK

    def address(self, x: Tensor) -> int:
        memory = self.memory(x)
        assert memory is not None
        with torch._C.DisableTorchFunction():
            return memory.address + int(x.storage_offset()) * x.element_size()

    def is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self._pinned

    def pin(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata).atexit = False
        return x

    # -- the ledger ----------------------------------------------------------------------------------------------------

    def stop(self, why: str) -> None:
        self.entries.append(Stop(why))
        self._unread.clear()

    def record(self) -> int:
        self.events += 1
        self.entries.append(Record(self.events))
        return self.events

    def wait(self, event: int) -> None:
        self.entries.append(Wait(event))
        recorded = next((i for i, entry in enumerate(self.entries) if entry == Record(event)), -1)
        self._unread = {key: at for key, at in self._unread.items() if at > recorded}

    def read_on_host(self, x: Tensor) -> None:
        """The host looks at values of x, a tensor of its own."""
        if x.untyped_storage()._cdata in self._unread:
            raise CountError("a pinned tensor is read before anything waited for the copy to it")

    @contextlib.contextmanager
    def counting(self) -> Iterator[Ledger]:
        """A fresh ledger of what is called inside the block."""
        ledger = Ledger()
        self.entries, before = ledger.entries, self.live
        self.peak = before
        yield ledger
        ledger.peak_bytes, self.entries = self.peak - before, []

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """The device is there inside the block."""
        with contextlib.ExitStack() as stack:
            for target, name, value in _doors(self):
                stack.enter_context(mock.patch.object(target, name, value))
            stack.enter_context(self._operations)
            stack.enter_context(self._functions)
            yield

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        with self._operations, self._functions:
            yield

    # -- operations ----------------------------------------------------------------------------------------------------

    def transfer(self, destination: Tensor, source: Tensor, non_blocking: bool) -> None:
        """A copy between the host's memory and the device's, made at once; `source` has data."""
        with torch._C.DisableTorchFunction():
            host, away = (source, destination) if self.memory(source) is None else (destination, source)
            if away.is_meta and host is destination:
                raise CountError("values without data are copied to the host")
            moved = float(source.numel() * source.element_size())
            self.entries.append(Work("copy from the host" if host is source else "copy to the host",
                                     Sort.OPERATION, moved))  # fmt: skip
            if non_blocking and self.is_pinned(host):
                if host is destination:
                    self._unread[host.untyped_storage()._cdata] = len(self.entries) - 1
            else:
                self.stop("a copy between the host's and the device's memory")
            if not away.is_meta:
                with _disable_current_modes():  # which would write this copy down once more
                    destination.detach().copy_(source.detach())

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], creating: bool) -> Any:
        """One operation, carried out as far as there are data, and written down."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in given if self.memory(x) is not None]
        if not ours and not creating:
            if func._schema.name == "aten::_local_scalar_dense":
                self.read_on_host(given[0])
            return func(*args, **kwargs)
        name = func._schema.name
        if name == "aten::copy_" and (self.memory(args[0]) is None) != (self.memory(args[1]) is None):
            self.transfer(args[0], args[1], bool(args[2]) if len(args) > 2 else kwargs.get("non_blocking", False))
            return args[0]
        if name == "aten::copy_" and _same_place(args[0], args[1]):
            return args[0]  # as PyTorch itself does, for `x[rows] += y` assigns its result once more
        if not name.startswith("aten::"):
            return self._through_body(name, args, kwargs)
        if stops_host(name, args):
            self.stop(name.removeprefix("aten::"))
        result = self._carry_out(func, name, args, kwargs, ours)
        # Results in the order of the schema; an operation in place returns what it changed.
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        changed = _changed(func, args, kwargs)
        known = {x.untyped_storage()._cdata for x in given}
        fresh = [x for x in outputs if x.untyped_storage()._cdata not in known]
        for x in fresh:
            self.adopt(x)
        for x in changed:
            if (memory := self.memory(x)) is not None:
                memory.partial = False
        written = [*changed, *fresh]
        if written and name not in NOTHING and any(x.numel() for x in written):
            out = {id(x) for x in tree_leaves({k: v for k, v in kwargs.items() if k.startswith("out")})}
            inputs = {id(x) for x in tree_leaves(args) if isinstance(x, Tensor)}
            read = [x for x in given if id(x) not in out or id(x) in inputs]
            if name in OVERWRITES:
                read = [x for x in read if x is not args[0]]
            self.entries += work_of(name, args, kwargs, _once(read), written)
        return result

    def _carry_out(self, func: Any, name: str, args: Any, kwargs: Any, ours: list[Tensor]) -> Any:
        wide = name in PRODUCTS and func._overloadname.startswith("dtype")
        if name in CREATIONS:
            return self._create(func, args, kwargs)
        if not any(x.is_meta for x in ours):
            return _wide_product(name, args, kwargs) if wide else func(*args, **kwargs)
        if name == "aten::_local_scalar_dense":
            raise CountError("the host asks for a value that has no data")
        originals: dict[int, Tensor] = {}

        def without_data(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.is_meta:
                return x
            copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            originals[id(copy)] = x
            return copy

        args, kwargs = tree_map(without_data, (args, kwargs))
        kwargs = {k: (torch.device("meta") if k == "device" and v is not None else v) for k, v in kwargs.items()}
        result = _wide_product(name, args, kwargs) if wide else func(*args, **kwargs)
        return tree_map(lambda x: originals.get(id(x), x) if isinstance(x, Tensor) else x, result)

    def _create(self, func: Any, args: Any, kwargs: Any) -> Any:
        def on(device: str) -> Any:
            def there(x: Any) -> Any:
                if not isinstance(x, Tensor):
                    return x
                return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

            return func(*tree_map(there, args), **options, device=device)

        options = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        shape = on("meta")
        if shape.untyped_storage().nbytes() > self.limit:
            return shape
        # What nobody has filled is the same each time.
        return on("cpu").zero_() if func._schema.name in ALLOCATIONS else on("cpu")

    def _through_body(self, name: str, args: Any, kwargs: Any) -> Any:
        """A registered operator's own code, operation by operation."""
        definition = torch._library.custom_ops.OPDEFS.get(name)
        if definition is None:
            raise CountError(f"{name}: an operator whose code is not known")
        with self.modes():
            return definition._init_fn(*args, **kwargs)


def _once(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(x): x for x in tensors}.values())


def _same_place(a: Tensor, b: Tensor) -> bool:
    def place(x: Tensor) -> Any:
        return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype

    return place(a) == place(b)


def _changed(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation writes to."""
    tensors = []
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.kwarg_only or at >= len(args) else args[at]
            tensors += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return tensors


def _wide_product(name: str, args: Any, kwargs: Any) -> Tensor:
    """`mm`, `bmm` or `addmm` of 16-bit matrices with a float32 result, which PyTorch has on CUDA alone."""
    out, dtype = kwargs.get("out"), next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype))
    tensors = [x for x in args if isinstance(x, Tensor)]
    a, b = tensors[-2:]
    result = torch.matmul(a.to(dtype), b.to(dtype))
    if len(tensors) == 3:
        result = kwargs.get("beta", 1) * tensors[0].to(dtype) + kwargs.get("alpha", 1) * result
    return result if out is None else out.copy_(result)


class _Operations(TorchDispatchMode):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device, self.creating = device, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self.device.run(func, args, kwargs or {}, self.creating)


class _Functions(TorchFunctionMode):
    """Answers for the device, and leads what is made on it to memory that there is."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        tensor = torch.Tensor
        self.answers: dict[Any, Callable[..., Any]] = {
            tensor.device.__get__: lambda x: CUDA,
            tensor.is_cuda.__get__: lambda x: True,  # type: ignore[attr-defined]
            tensor.is_cpu.__get__: lambda x: False,  # type: ignore[attr-defined]
            tensor.is_meta.__get__: lambda x: False,  # type: ignore[attr-defined]
            tensor.get_device: lambda x: 0,
            tensor.data_ptr: device.address,
            tensor.record_stream: lambda x, stream: None,
            tensor.is_pinned: lambda x, *_: False,
            tensor.tolist: self._tolist,
            tensor.numpy: self._numpy,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], Tensor) else None
        ours = first is not None and self.device.memory(first) is not None
        if ours and func in self.answers:
            return self.answers[func](*args, **kwargs)
        if first is not None and not ours:
            if func in (torch.Tensor.tolist, torch.Tensor.numpy):
                self.device.read_on_host(first)
            elif func == torch.Tensor.is_pinned:
                return self.device.is_pinned(first)
            elif func == torch.Tensor.pin_memory:
                return self.device.pin(first.clone())
        if first is not None and func in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu):
            return self._to(func, ours, *args, **kwargs)
        if kwargs.pop("pin_memory", False):
            return self.device.pin(func(*args, **kwargs))
        wanted = kwargs.get("device")
        if wanted is None or torch.device(wanted).type != "cuda":
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor):
            return self._to(torch.Tensor.to, False, func(*args, **{**kwargs, "device": "cpu"}), CUDA)
        operations = self.device._operations
        operations.creating = True
        try:
            return func(*args, **{**kwargs, "device": "cpu"})
        finally:
            operations.creating = False

    def _tolist(self, x: Tensor) -> Any:
        if x.is_meta:
            raise CountError("the host asks for values that have no data")
        self.device.stop("tolist")
        return x.tolist()

    def _numpy(self, x: Tensor, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def _to(self, func: Any, ours: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`to`, `cuda` and `cpu`; between host and device a copy."""
        if func == torch.Tensor.cpu:
            args, kwargs = (torch.device("cpu"),), {}
        elif func == torch.Tensor.cuda:
            args, kwargs = (CUDA,), {"non_blocking": kwargs.get("non_blocking", False)}
        if args and isinstance(args[0], Tensor):
            other = args[0]
            place = CUDA if self.device.memory(other) is not None else torch.device("cpu")
            args, kwargs = (place, other.dtype, *args[1:]), kwargs
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        options: dict[str, Any] = {} if layout is None else {"memory_format": layout}
        if kwargs.get("copy"):
            options["copy"] = True
        if device is None or (device.type == "cuda") == ours:
            return x if dtype is None and not options else x.to(dtype or x.dtype, **options)
        # Converted where it is, then moved.
        x = x if dtype is None else x.to(dtype)
        with _disable_current_modes():  # it may be the host's, though x is the device's
            moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta" if x.is_meta else "cpu")
        if device.type == "cuda":
            self.device.adopt(moved)
        self.device.transfer(moved, x, non_blocking)
        return moved


# -- torch.cuda --------------------------------------------------------------------------------------------------------


def _doors(device: Device) -> list[tuple[Any, str, Any]]:
    """What of torch.cuda, and of PyTorch's record of modes, answers otherwise while the device is there."""

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.number = 0

        def record(self, stream: Any = None) -> None:
            self.number = device.record()

        def synchronize(self) -> None:
            device.wait(self.number)

        def query(self) -> bool:
            return True

        def wait(self, stream: Any = None) -> None:
            """Streams are one queue here."""

        def elapsed_time(self, other: Any) -> float:
            raise CountError("nothing has a duration here")

    class Stream:
        cuda_stream = stream_id = 1
        device_index = 0

        def __init__(self, *_: Any, **__: Any) -> None:
            self.device = CUDA

        def synchronize(self) -> None:
            device.stop("a stream is waited for")

        def query(self) -> bool:
            return True

        def record_event(self, event: Any = None) -> Any:
            event = event or Event()
            event.record()
            return event

        def wait_event(self, event: Any) -> None:
            """Streams are one queue here."""

        wait_stream = wait_event

    stream = Stream()

    def nothing(*_: Any, **__: Any) -> Any:
        return contextlib.nullcontext()

    total = device.described.total_memory
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "device": nothing,
        "device_of": nothing,
        "stream": nothing,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "synchronize": lambda *_: device.stop("torch.cuda.synchronize"),
        "is_current_stream_capturing": lambda: device.capturing,
        "get_device_properties": lambda *_: device.described,
        "get_device_capability": lambda *_: (device.described.major, device.described.minor),
        "get_device_name": lambda *_: device.described.name,
        "mem_get_info": lambda *_: (total - device.live, total),
        "memory_allocated": lambda *_: device.live,
        "memory_reserved": lambda *_: device.live,
        "Event": Event,
        "Stream": Stream,
    }
    doors = [(torch.cuda, name, value) for name, value in answers.items()]
    # The operations ask whether some mode traces them, which would lead them to registered operators.
    doors.append((torch._C, "_len_torch_dispatch_stack", lambda: 0))
    engine = torch.autograd._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with device._functions:  # which PyTorch has put aside for the call that led here
            return engine(*args, **kwargs)

    doors.append((torch.autograd, "_engine_run_backward", backward))
    return doors
