"""A stand-in for a CUDA device: tensors whose device is "cuda" and whose memory is the host's.

``install()`` enters a dispatch mode for the whole process. Tensors made on "cuda" are :class:`DeviceTensor`, which hold an
ordinary CPU tensor. Operators of PyTorch compute on those; operators of nvae_fast run what is registered for CUDA, so their
Triton kernels are launched through the stand-in driver, with pointers to memory that counts as the device's. Plain CPU
tensors stay the host's: every copy between the two, and every wait of the host for the device, is seen and known by the line
that asked for it. Streams, events and graphs of ``torch.cuda`` are stand-ins too: a capture runs the code once and counts.
"""

from __future__ import annotations

import bisect
import contextlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

ROOT = str(Path(__file__).resolve().parents[2])
CUDA = torch.device("cuda", 0)
# Operators that wait for the device, or whose result has a shape that depends on values there.
WAITING = (
    "aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten.masked_select",
    "aten._unique2", "aten.unique_consecutive", "aten.unique_dim", "aten.bincount", "aten.repeat_interleave.Tensor",
    "aten.allclose",
)  # fmt: skip
INDEXING = (
    "aten.index.",
    "aten.index_put",
    "aten._index_put_impl_",
    "aten._unsafe_index",
    "aten._unsafe_index_put",
)


class DeviceTensor(torch.Tensor):
    """A tensor on the stand-in device; ``memory`` is the CPU tensor that holds its elements."""

    memory: torch.Tensor

    @staticmethod
    def __new__(cls, memory: torch.Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, memory.shape, strides=memory.stride(), storage_offset=memory.storage_offset(), dtype=memory.dtype,
            device=CUDA, requires_grad=False,
        )  # fmt: skip
        made.memory = memory
        return made

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def record_stream(self, stream: Any) -> None: ...

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        # PyTorch copies the storage, which it would allocate with the CUDA runtime.
        if id(self) not in memo:
            copied = self.detach().clone()
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _device is not None
        return _device.run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


@dataclass
class Capture:
    """What one capture saw."""

    events: list[str] = field(default_factory=list)  # waits and copies, each with its line
    operators: int = 0
    # Storages from before the capture that it used: they must live as long as the graph.
    outside: dict[int, tuple[Any, str]] = field(default_factory=dict)
    inside: set[int] = field(default_factory=set)
    kept: list[torch.Tensor] = field(
        default_factory=list
    )  # the graph's pool: nothing in it is used by others


def where() -> str:
    """The innermost line of nvae_fast or of a test that led here."""
    for frame in reversed(traceback.extract_stack()):
        inside = frame.filename.startswith(ROOT) and "gpu_standin/d" not in frame.filename
        if inside and "site-packages" not in frame.filename:
            return f"{frame.filename.removeprefix(ROOT + '/')}:{frame.lineno} {frame.line}"
    return "outside the package"


class Device(TorchDispatchMode):
    """The mode; ``kernels``: what nvae_fast registered for CUDA, by name."""

    def __init__(self, kernels: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.kernels = kernels
        self.capture: Capture | None = None
        self.events: list[str] = []  # outside of captures
        self._bases: list[int] = []
        self._storages: dict[int, tuple[Any, int]] = {}  # address to (weak storage, bytes)

    # Memory.

    def own(self, memory: torch.Tensor) -> DeviceTensor:
        """``memory`` as memory of the device."""
        storage = memory.untyped_storage()
        base, size = storage.data_ptr(), storage.nbytes()
        known = self._storages.get(base)
        if base and (known is None or known[1] != size or known[0].expired()):
            # What was in this place before is gone.
            first, last = (
                bisect.bisect_left(self._bases, base),
                bisect.bisect_left(self._bases, base + max(size, 1)),
            )
            for gone in self._bases[first:last]:
                del self._storages[gone]
            self._bases[first:last] = [base]
            self._storages[base] = (torch.multiprocessing.reductions.StorageWeakRef(storage), size)
            if capturing():
                self.capture.inside.add(base)
            elif self.capture is not None:
                self.note("an allocation outside of the graph's pool while capturing")
        if capturing():
            self.capture.kept.append(memory)
        return DeviceTensor(memory)

    def allocation(self, address: int) -> int | None:
        """The base of the living allocation that holds ``address``."""
        at = bisect.bisect_right(self._bases, address) - 1
        if at < 0:
            return None
        base = self._bases[at]
        weak, size = self._storages[base]
        return base if address < base + max(size, 1) and not weak.expired() else None

    def use(self, address: int) -> bool:
        """Note that a capture touches ``address``; whether it is memory of the device."""
        base = self.allocation(address)
        if base is not None and self.capture is not None and base not in self.capture.inside:
            self.capture.outside.setdefault(base, (self._storages[base][0], where()))
        return base is not None

    def note(self, what: str) -> None:
        events = self.events if self.capture is None else self.capture.events
        events.append(f"{what} at {where()}")

    # Operators.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        ours = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
        target = kwargs.get("device")
        target = torch.device(target) if target is not None else None
        to_host = target is not None and target.type == "cpu"
        name = str(func)
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        if not ours and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)
        if func.namespace == "nvae_fast" and func._opname in self.kernels:
            with self:
                return self.kernels[func._opname](*args, **kwargs)
        if func._can_decompose():  # seen whole below autograd; its parts are what the device is asked for
            with self:
                return func.decompose(*args, **kwargs)
        self.look(name, ours, leaves, args, to_host)
        for tensor in ours:
            self.use(tensor.data_ptr())
        if self.capture is None:
            self.look_at_pools(func, args, kwargs)
        plain_args, plain_kwargs = pytree.tree_map_only(DeviceTensor, lambda t: t.memory, (args, kwargs))
        if "device" in plain_kwargs:
            plain_kwargs["device"] = torch.device("cpu")
        if name == "aten._to_copy.default" and not ours:
            plain_kwargs.pop("non_blocking", None)
        if name == "aten.is_pinned.default":
            return False
        real = to_host or name.startswith(WAITING) or not ours
        result = func(*plain_args, **plain_kwargs) if real else _idle(func, plain_args, plain_kwargs)
        if self.capture is not None:
            self.capture.operators += 1
        if to_host:
            return result
        result = pytree.tree_map_only(torch.Tensor, self._wrapper(ours), result)
        return return_and_correct_aliasing(func, args, kwargs, result) if ours else result

    def _wrapper(self, ours: list[DeviceTensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        same = {id(tensor.memory): tensor for tensor in ours}
        return lambda memory: same.get(id(memory)) if id(memory) in same else self.own(memory)

    def look_at_pools(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Note a write, outside of a capture, into a graph's pool: earlier in the graph the memory may be another tensor's."""
        pools = [graph.capture.inside for graph in Graph.made]
        for i, argument in enumerate(func._schema.arguments if pools else ()):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = kwargs.get(argument.name, args[i] if i < len(args) else None)
            for tensor in pytree.tree_leaves(value):
                base = tensor.memory.untyped_storage().data_ptr() if isinstance(tensor, DeviceTensor) else 0
                if any(base in pool for pool in pools):
                    self.note(f"{func} writes into the pool of a graph")

    def look(self, name: str, ours: list[Any], leaves: list[Any], args: Any, to_host: bool) -> None:
        """Note waits of the host for the device, and copies between the two."""
        if name.startswith(WAITING):
            self.note(f"{name} waits for the device")
        if to_host:
            self.note(f"{name} copies to the host")
        host = [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, DeviceTensor)]
        if name.startswith(INDEXING):
            indices = [t for t in args[1] if t is not None]
            if any(t.dtype in (torch.bool, torch.uint8) for t in indices):
                self.note(f"{name} with a mask waits for the device")
            if any(not isinstance(t, DeviceTensor) for t in indices):
                self.note(f"{name} copies its indices from the host")
        elif name.startswith(("aten.copy_", "aten._foreach_copy_", "aten._to_copy", "aten.set_")) and host:
            into = args[0] if not name.startswith("aten._foreach") else args[0][0]
            self.note(
                f"{name} copies {'from' if isinstance(into, DeviceTensor) or not ours else 'to'} the host"
            )
        elif any(t.dim() for t in host):
            raise RuntimeError(f"{name}: tensors of the host and of the device at {where()}")


def _idle(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What ``func`` returns, with nothing computed: fresh memory holds anything, since no Triton kernel has written any."""
    results = [r.alias_info for r in func._schema.returns]
    written = [
        kwargs[a.name] if a.name in kwargs else args[i]
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    if any(alias is not None and not alias.is_write for alias in results) or "set_" in str(func):
        return func(*args, **kwargs)  # a view, or one that changes what a tensor is
    if written and all(results):
        return written[0] if len(results) == 1 else tuple(written) if results else None

    def meta(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    plain = {**kwargs, "device": torch.device("meta")} if "device" in kwargs else kwargs
    plain_args, plain = pytree.tree_map_only(torch.Tensor, meta, (args, plain))
    try:
        found = func(*plain_args, **plain)
    except NotImplementedError:
        # PyTorch raises it for an operator that has no kernel for the meta device, which only computes shapes. The operator
        # is then run on the data itself; any other error is the caller's.
        return func(*args, **kwargs)
    return pytree.tree_map_only(
        torch.Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype), found
    )


_device: Device | None = None


class Stream:
    """Of the stand-in; the number is what Triton and caches know it by."""

    _next = 1

    def __init__(self, device: Any = None, number: int | None = None) -> None:
        self.device = CUDA
        if number is None:
            number = Stream._next
            Stream._next += 1
        self.cuda_stream = number

    def wait_stream(self, other: Stream) -> None: ...
    def wait_event(self, event: Event) -> None: ...
    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        _noted("Stream.synchronize waits for the device")


class Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None:
        _noted("Event.synchronize waits for the device")

    def query(self) -> bool:
        _noted("Event.query asks the device")
        return True


def _noted(what: str) -> None:
    assert _device is not None
    _device.note(what)


class Graph:
    """What a capture saw; a replay launches what it holds and runs nothing."""

    made: list[Graph] = []  # noqa: RUF012  of the process

    def __init__(self, *_: Any, **__: Any) -> None:
        self.capture = Capture()
        self.replays = 0
        Graph.made.append(self)

    def replay(self) -> None:
        assert _device is not None
        assert _device.capture is None
        lost = [line for weak, line in self.capture.outside.values() if weak.expired()]
        if lost:
            raise RuntimeError(f"a graph reads memory that is free again, first used at {lost[0]}")
        self.replays += 1

    def reset(self) -> None:
        self.capture = Capture()

    def pool(self) -> tuple[int, int]:
        return (0, 0)


DEFAULT = Stream(number=0)
_image_seeds = [DEFAULT]  # not of a thread: autograd's thread runs on the stream of the forward pass


@contextlib.contextmanager
def _on_stream(stream: Stream | None) -> Iterator[None]:
    _image_seeds.append(stream or _image_seeds[-1])
    try:
        yield
    finally:
        _image_seeds.pop()


_capture_stream: Stream | None = None


def capturing() -> bool:
    return _capture_stream is not None and _image_seeds[-1] is _capture_stream


def install(driver: Any, kernels: dict[str, Callable[..., Any]]) -> Device:
    """Make the stand-in device the process's "cuda"; ``driver``: of driver.py, or None without Triton."""
    global _device
    cuda = torch.cuda

    @contextlib.contextmanager
    def graph(made: Graph, stream: Stream | None = None, **_: Any) -> Iterator[None]:
        global _capture_stream
        assert _device is not None
        assert _device.capture is None, "captures do not nest"
        _capture_stream = stream or Stream()
        _device.capture = made.capture
        if driver is not None:
            driver.capture(True)
        try:
            with _on_stream(_capture_stream):
                yield
        finally:
            _device.capture, _capture_stream = None, None
            if driver is not None:
                driver.capture(False)

    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "manual_seed_all": lambda seed: None,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: _noted("torch.cuda.synchronize waits for the device"),
        "empty_cache": lambda: None,
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_capability": lambda device=None: (9, 0),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "stream": _on_stream,
        "current_stream": lambda device=None: _image_seeds[-1],
        "default_stream": lambda device=None: DEFAULT,
        "is_current_stream_capturing": capturing,
    }.items():
        setattr(cuda, name, value)
    torch.Tensor.pin_memory = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `.data` cannot change a tensor's class
    torch._C._ensureCUDADeviceGuardSet()
    driver.library.standin_appear()
    torch._C._set_only_lift_cpu_tensors(True)
    _device = Device(kernels)
    _device.__enter__()
    return _device
