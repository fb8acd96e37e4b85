"""Bytes that a model keeps resident, and the most that a forward pass has alive at once.

On a CPU the peak is counted, not sampled: a dispatch mode sees every tensor that an operation
returns and every storage that dies, so that the number is the same in every run. Workspaces that a
kernel allocates and frees inside itself are not seen. On CUDA, the allocator's own peak is read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pytest_qlab.errors import MetricError
from pytest_qlab.estimate import Estimate


def storage_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of the storages behind tensors: each once, and whole even if a view shows a part."""
    seen: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device.type != "meta":
            seen[storage._cdata] = storage.nbytes()
    return sum(seen.values())


def resident_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared and tied ones once.

    A module that keeps more where no buffer shows it says how much in `opaque_bytes`.
    """

    def tensors() -> Iterator[Tensor]:
        yield from model.parameters()
        yield from model.buffers()

    opaque = sum(int(getattr(module, "opaque_bytes", 0)) for module in model.modules())
    return storage_bytes(tensors()) + opaque


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of CPU storages that operations create while it is active.

    Views and in-place results share a storage that is known already, and add nothing. Tensors that
    existed before are known from the arguments of the first operation that reads them.

    Attributes:
        live: bytes alive now; peak: the most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        # Bytes by the address of the storage object, which is its own while the object lives.
        self._created: dict[int, int] = {}
        self._known: dict[int, weakref.finalize[Any, Any]] = {}
        self._depth = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation, then take note of what it read and returned."""
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, created=False)
        with self:
            # The parts of a composed operation allocate, too; inference mode sends it whole.
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors((args, kwargs)):
            self._resized(tensor)
        for tensor in _tensors(result):
            self._note(tensor, created=True)
        self.peak = max(self.peak, self.live)
        return result

    def _note(self, tensor: Tensor, *, created: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        if created:
            self._created[key] = storage.nbytes()
            self.live += storage.nbytes()
        self._known[key] = weakref.finalize(storage, self._died, key)

    def _resized(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        before = self._created.get(storage._cdata)
        if before is not None and before != storage.nbytes():
            self._created[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes() - before

    def _died(self, key: int) -> None:
        self.live -= self._created.pop(key, 0)
        self._known.pop(key, None)

    def __enter__(self) -> Self:
        """Count; entered again inside, for the parts of a composed operation."""
        self._depth += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop counting, and in the end let go of every storage that is still alive."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._depth -= 1
        if self._depth == 0:
            for finalizer in list(self._known.values()):
                finalizer.detach()
            self._known.clear()


def _tensors(tree: Any) -> list[Tensor]:
    return [
        leaf
        for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.device.type != "meta"
    ]


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of a model's weights, and what its forward passes add to them at their peak.

    `temporary` is of a pass over many tokens, described by `convention`; `decode_temporary` of one
    over a token after others, the key-value cache of those included. `dtype` is what the model
    computes in, such as `bfloat16`; empty if another runtime runs it.
    """

    resident: int
    temporary: int
    kv_bytes_per_token: int | None = None
    convention: str = ""
    decode_temporary: int | None = None
    decode_convention: str = ""
    dtype: str = ""

    @property
    def peak(self) -> int:
        """Weights and temporaries together."""
        return self.resident + self.temporary

    def estimates(self, candidate: str = "", *, simulated: bool = False) -> dict[str, Estimate]:
        """memory.resident and .peak, and .decode_peak and .kv_per_token where known; bytes."""
        fields: dict[str, Any] = {"candidate": candidate, "convention": self.convention}
        weights = f"weights {self.resident:,} bytes"
        counted: dict[str, tuple[float | None, str]] = {
            "memory.resident": (self.resident, "bytes"),
            "memory.kv_per_token": (self.kv_bytes_per_token, "bytes"),
        }
        detail = f"{weights}, a forward pass adds {self.temporary:,}"
        peak = {"memory.peak": (self.peak, "bytes")}
        found = {
            **Estimate.exactly(counted, detail=detail, **fields),
            **Estimate.exactly(peak, simulated=simulated, detail=detail, **fields),
        }
        if self.decode_temporary is not None:
            fields["convention"] = self.decode_convention
            detail = f"{weights}, the cache and a step add {self.decode_temporary:,}"
            step = {"memory.decode_peak": (self.resident + self.decode_temporary, "bytes")}
            found |= Estimate.exactly(step, simulated=simulated, detail=detail, **fields)
        return found


def peak_temporary_bytes(
    run: Callable[[], object],
    *,
    device: str = "cpu",
    prepare: Callable[[], object] = lambda: None,
) -> int:
    """The most bytes that `run` has alive at once, beyond what existed before, results included.

    What `prepare` makes and leaves behind counts; how much it needs meanwhile does not.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        prepared = prepare()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = run()
        torch.cuda.synchronize(device)
        peak: int = torch.cuda.max_memory_allocated(device) - before
        del kept, prepared
        return peak
    with torch.no_grad(), StorageTracker() as tracker:
        prepared = prepare()
        tracker.peak = tracker.live
        kept = run()
    del kept, prepared
    return tracker.peak


def kv_bytes_per_token(config: Any, itemsize: int) -> int:
    """Bytes of keys and values that one token adds to the cache: 2 * layers * heads * width * size.

    A cache that forgets, such as a sliding window's, still adds this much for a new token.

    Args:
        config: of a transformers model. itemsize: bytes of an element of the cache.

    Raises:
        MetricError: the configuration does not give layers, heads and widths.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = _first(text, "num_hidden_layers", "n_layer", "num_layers")
    heads = _first(text, "num_attention_heads", "n_head", "num_heads")
    hidden = _first(text, "hidden_size", "n_embd", "d_model")
    if layers is None or heads is None or hidden is None:
        raise MetricError(
            f"The size of the key-value cache cannot be read from a {type(config).__name__}: it "
            "names no number of layers, attention heads or hidden size."
        )
    kv_heads = _first(text, "num_key_value_heads", "num_kv_heads") or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kv_heads = 1  # Falcon 7B and StarCoder say so, and may give the number of query heads
    width = _first(text, "head_dim") or hidden // heads
    total: int = 2 * layers * kv_heads * width * itemsize
    return total


def _first(config: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None
