"""A stand-in for a CUDA device: tensors that say they are on `cuda:0` and compute on the CPU.

While `standin_device()` is active, whatever torch is asked to put on `cuda:0` becomes a `StandIn`.
Operations run on the CPU tensors inside, so values are the CPU's to the bit. As on CUDA, an
operation that mixes the two devices is an error, numpy takes no such tensor, and the same storage
is behind a tensor and its views. What a GPU computes, and how fast, is not shown by it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pytest_qlab.solvers import graphs

DEVICE = torch.device("cuda:0")
CAPABILITY = (9, 0)
NAME = "a stand-in"
_aten = torch.ops.aten
# Operations that take a CPU tensor beside CUDA ones: copies, and what an index is made of.
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {
    _aten.index.Tensor,
    _aten._unsafe_index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
# Operations on elements of which every tensor must be on CUDA, numbers included.
_NO_NUMBERS = {
    _aten.clamp.Tensor,
    _aten.clamp_.Tensor,
    _aten.clamp_min.Tensor,
    _aten.clamp_max.Tensor,
    _aten.lerp.Tensor,
}
_WHOLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.mv.default,
    _aten.addmv.default,
    _aten.dot.default,
}
# What attention is for tensors that C++ takes for the CPU's; on CUDA it is another of its kind.
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class StandIn(Tensor):
    """A tensor on the stand-in device.

    Attributes:
        held: the CPU tensor with the values.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> StandIn:
        # To C++ it is a tensor of the CPU, whose autograd needs no CUDA; and never one of inference
        # mode, since views of others may not be.
        with torch.inference_mode(False):
            return torch.Tensor._make_wrapper_subclass(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=torch.device("cpu"),
            )

    def __init__(self, held: Tensor) -> None:
        assert type(held) is Tensor
        assert held.device.type == "cpu"
        self.held = held
        _allocator.note(held)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation on the CPU tensors inside, if CUDA would take what is given.

        Raises:
            RuntimeError: it would not.
        """
        tensors = list(_tensors((args, kwargs or {})))
        _refuse_mixed(func, args, tensors)
        _refuse_what_cuda_does_not_do(func, tensors)
        known = {id(each.held): each for each in tensors if isinstance(each, cls)}
        inner_args, inner_kwargs = _mapped((args, kwargs or {}), _inside)
        found = _CUDA_ALONE.get(func, func)(*inner_args, **inner_kwargs)
        if func is _aten.copy_.default:
            return args[0]
        return _mapped(found, lambda each: known[id(each)] if id(each) in known else cls(each))

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, StandIn)
        assert (value.shape, value.dtype) == (self.shape, self.dtype)
        self.held = value.held

    def get_device(self) -> int:
        return 0

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return _moved(self, *args, **kwargs)

    def cpu(self, *args: Any) -> Tensor:
        return _moved(self, "cpu")

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) in memo:
            found: Tensor = memo[id(self)]
            return found
        copied: Tensor = StandIn(self.held.clone())
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StandIn({self.held!r})"


def _inside(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, StandIn) else tensor


def _mapped(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """What torch's pytrees do, which take longer than the operations here."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, list | tuple):
        return type(tree)([_mapped(each, function) for each in tree])
    if isinstance(tree, dict):
        return {key: _mapped(each, function) for key, each in tree.items()}
    return tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from _tensors(each)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _refuse_mixed(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """CUDA's rules: numbers of the CPU may stand in an operation on elements, and index tensors."""
    others = [each for each in tensors if not isinstance(each, StandIn)]
    if not others or func in _COPIES:
        return
    mine = isinstance(args[0], StandIn)
    if func in _INDEXED and mine:
        others = [each for each in args[2:] if isinstance(each, Tensor) and each.dim()]
    elif mine or not func._schema.is_mutable:
        numbers = torch.Tag.pointwise in func.tags and func not in _NO_NUMBERS
        numbers = numbers or func is _aten.fill_.Tensor
        others = [each for each in others if each.dim() or not numbers]
    if others:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({func}, shape {tuple(others[0].shape)})"
        )


def _refuse_what_cuda_does_not_do(func: Any, tensors: list[Tensor]) -> None:
    name = func._schema.name.partition("::")[2]
    if func.namespace == "onednn" or (name.endswith("for_cpu") and name != _ATTENTION):
        raise NotImplementedError(f"Could not run '{func}' with arguments from the 'CUDA' backend.")
    whole = any(each.dtype in _WHOLE for each in tensors)
    if whole and func in _PRODUCTS:
        raise RuntimeError(f'"{name}_cuda" not implemented for whole numbers')
    if func is _aten._int_mm.default:
        rows, inner, columns = *tensors[0].shape, tensors[1].shape[1]
        if rows <= 16 or inner % 8 or columns % 8:
            raise RuntimeError(
                "self.size(0) needs to be greater than 16, and its columns and mat2's multiples of "
                f"8, but they are {rows}, {inner} and {columns}"
            )


def _target(tensor: Tensor, *args: Any, **kwargs: Any) -> tuple[torch.device, torch.dtype]:
    """Where to, and in which type, `tensor.to(*args, **kwargs)` would bring it."""
    given = [*args, *(kwargs.get(name) for name in ("device", "dtype", "other"))]
    device, dtype = tensor.device, tensor.dtype
    for each in given:
        if isinstance(each, Tensor):
            device, dtype = each.device, each.dtype
        elif isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, str | int | torch.device) and not isinstance(each, bool):
            device = _device_of(each)
    return device, dtype


def _moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to` where either device is the stand-in."""
    device, dtype = _target(tensor, *args, **kwargs)
    if device == tensor.device:
        same = dtype == tensor.dtype and not kwargs.get("copy", False)
        return tensor if same else _aten._to_copy(tensor, dtype=dtype)
    plain = tensor.held if isinstance(tensor, StandIn) else tensor.detach()
    if device.type == "meta":
        return plain.to(device, dtype)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("the stand-in device moves no tensors that need gradients")
    there: Tensor = _aten._to_copy(plain, dtype=dtype)
    return there if device.type == "cpu" else StandIn(there)


def _device_of(given: str | int | torch.device) -> torch.device:
    if isinstance(given, int):
        return torch.device("cuda", given)
    device = torch.device(given)
    return DEVICE if device.type == "cuda" else device


class _OnDevice(TorchFunctionMode):
    """Gives `StandIn`s to whoever asks for tensors on CUDA."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is Tensor.to and _target(*args, **options)[0] == DEVICE:
            return _moved(*args, **options)
        if func is Tensor.cuda:
            return _moved(args[0], DEVICE)
        device = options.get("device")
        if device is None or _device_of(device).type != "cuda":
            return func(*args, **options)
        if func in (torch.as_tensor, torch.asarray) and isinstance(args[0], Tensor):
            return _moved(*args, **options)
        options["device"] = "cpu"
        generator = options.get("generator")
        if generator is not None and generator.device.type == "cpu":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        plain = func(*args, **options)
        return plain if isinstance(plain, StandIn) else StandIn(plain)


def _histc(numbers: Tensor, *bins: Any) -> Tensor:
    """Of whole numbers too."""
    return _aten.histc(numbers.float(), *bins)  # type: ignore[no-any-return]


def _convert_weight_to_int4pack(pairs: Tensor, inner_tiles: int) -> Tensor:
    """In the shape that CUDA gives it, and in the order of `pairs`, which CUDA does not keep."""
    rows, half = pairs.shape
    shape = rows // 8, 2 * half // (16 * inner_tiles), 32, inner_tiles // 2
    return pairs.view(torch.int32).reshape(shape)


def _weight_int4pack_mm(
    rows: Tensor, packed: Tensor, group: int, scales_and_shifts: Tensor
) -> Tensor:
    """`rows` times (code - 8) * scale + shift, in float32; of two codes the high one first."""
    assert rows.dtype == scales_and_shifts.dtype == torch.bfloat16
    pairs = packed.reshape(8 * len(packed), -1).view(torch.uint8)
    codes = torch.stack([pairs >> 4, pairs & 15], -1).flatten(1).float() - 8
    scales, shifts = scales_and_shifts.float().repeat_interleave(group, 0).unbind(-1)
    return (rows.float() @ (codes.T * scales + shifts)).bfloat16()


# Operators that CUDA has and a CPU has not, as their documentation says.
_CUDA_ALONE: dict[Any, Callable[..., Tensor]] = {
    _aten.histc.default: _histc,
    _aten._convert_weight_to_int4pack.default: _convert_weight_to_int4pack,
    _aten._weight_int4pack_mm.default: _weight_int4pack_mm,
}


@dataclass
class _Allocator:
    """Bytes of the stand-in device that live tensors hold, each storage once."""

    live: int = 0
    peak: int = 0
    _known: dict[int, Any] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.RLock)

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        with self._lock:
            if storage._cdata in self._known:
                return
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            died = weakref.finalize(storage, self._died, storage._cdata, storage.nbytes())
            died.atexit = False
            self._known[storage._cdata] = died

    def _died(self, key: int, nbytes: int) -> None:
        with self._lock:
            self.live -= nbytes
            self._known.pop(key, None)


_allocator = _Allocator()


@dataclass
class StandInDevice:
    """What the package did with the device while it was active.

    Attributes:
        synchronized: how often it was waited for.
        capability: the compute capability that it says it has.
    """

    synchronized: int = 0
    capability: tuple[int, int] = CAPABILITY

    def synchronize(self, device: Any = None) -> None:
        self.synchronized += 1

    def memory_allocated(self, device: Any = None) -> int:
        return _allocator.live

    def max_memory_allocated(self, device: Any = None) -> int:
        return _allocator.peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        _allocator.peak = _allocator.live

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return self.capability


def _move_module(module: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """`nn.Module.to`; torch's own replaces a parameter's data in place, which needs one class.

    Tied parameters stay tied.
    """

    def moved(tensor: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            return _moved(tensor, device or tensor.device, wanted)

    known: dict[int, nn.Parameter] = {}
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in known:
                known[id(parameter)] = nn.Parameter(moved(parameter), parameter.requires_grad)
            each._parameters[name] = known[id(parameter)]
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = moved(buffer)


@contextmanager
def standin_device() -> Iterator[StandInDevice]:
    """Within, in this thread and in those that are started, there is a device `cuda:0`."""
    device = StandInDevice()
    run, to = threading.Thread.run, nn.Module.to

    def run_on_device(thread: threading.Thread) -> None:
        with _OnDevice():
            run(thread)

    def moved_module(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        where, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*module.parameters(), *module.buffers()]
        if where is None and not any(isinstance(each, StandIn) for each in tensors):
            return to(module, *args, **kwargs)
        _move_module(module, where, dtype)
        return module

    answers: dict[str, Any] = {
        "synchronize": device.synchronize,
        "memory_allocated": device.memory_allocated,
        "max_memory_allocated": device.max_memory_allocated,
        "reset_peak_memory_stats": device.reset_peak_memory_stats,
        "get_device_capability": device.get_device_capability,
        "get_device_name": lambda device=None: NAME,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
    }
    with (
        patch.multiple(torch.cuda, **answers),
        patch.object(threading.Thread, "run", run_on_device),
        patch.object(nn.Module, "to", moved_module),
        patch.object(graphs, "recorder", lambda device: None),  # There is nothing to record.
        _OnDevice(),
    ):
        yield device
