"""One token after others whose keys and values are in the cache."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from pytest_qlab.errors import MetricError

if TYPE_CHECKING:
    from torch import Tensor


class Decoding:
    """A model with a filled cache; each `step` is to come after a `restore`.

    Args:
        model: a transformers causal language model.
        ids: (1, n) with n of at least 2: the first n - 1 fill the cache, the last is the step's.
        options: of every forward.

    Raises:
        MetricError: the model keeps no cache, or `ids` are too few.
    """

    def __init__(self, model: Any, ids: Tensor, **options: Any) -> None:
        if ids.shape[1] < 2:
            raise MetricError(
                "One token of text is not enough to time a token after others. Evaluate on more "
                "text (--qlab-eval)."
            )
        self._model = model
        self._options = options
        self._ids = ids
        self._filled = self._fill()
        self._cache: Any = None
        self.restore()

    def _fill(self) -> Any:
        with torch.inference_mode():
            output = self._model(input_ids=self._ids[:, :-1], use_cache=True, **self._options)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise MetricError(
                f"A {type(self._model).__name__} returns no key-value cache, so it has no decoding "
                "apart from prefill. Hold latency.p50 and memory.peak."
            )
        return cache

    def restore(self) -> None:
        """Make the cache as it was before the step."""
        self._cache = untouched(self._filled)

    def step(self) -> object:
        """Run the last token, up to its logits."""
        with torch.inference_mode():
            output = self._model(
                input_ids=self._ids[:, -1:],
                past_key_values=self._cache,
                use_cache=True,
                **self._options,
            )
            if self._ids.device.type == "cuda":
                torch.cuda.synchronize(self._ids.device)
        return output

    def last_step(self) -> object:
        """A step that may grow the filled cache itself; no other can follow."""
        self._cache, self._filled = self._filled, None
        return self.step()


def untouched(cache: Any) -> Any:
    """A cache of the same content that a forward does not change in `cache`.

    The usual layers of a cache put new tensors in the place of old ones when they grow, so that
    those can be shared; of other kinds everything is copied.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if type(cache) is not DynamicCache or not all(
        isinstance(layer, DynamicLayer) for layer in cache.layers
    ):
        return copy.deepcopy(cache)
    fresh = copy.copy(cache)
    fresh.layers = [copy.copy(layer) for layer in cache.layers]
    return fresh
