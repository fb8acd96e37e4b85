"""A transformers model as a server: its continuous batching, driven request by request."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pytest_qlab.engines.server import Reply, Request
from pytest_qlab.errors import EngineError

PAGE = 64
"""Tokens in a page of the cache."""
_LOOK_EVERY = 1.0


class ContinuousBatchingServer:
    """transformers' continuous batching of one model, with its paged attention.

    Token times are those at which the batch's thread takes the tokens over, on `time.perf_counter`.
    A request ends after exactly as many tokens as it asks for; no end-of-sequence token ends it.
    Prompts share no cache, so that each is computed in full.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._open: dict[str, tuple[Request, float]] = {}

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def send(self, request: Request) -> None:
        """Put a request into the batch's queue; its prompt is token ids."""
        name = str(request.number)
        self._open[name] = request, self.now()
        self._manager.add_request(
            list(request.prompt),
            request_id=name,
            max_new_tokens=request.tokens,
            record_timestamps=True,
            eos_token_id=-1,
        )

    def wait(self, until: float) -> Reply | None:
        """The next reply, or None at that time.

        Raises:
            EngineError: the batch's thread has ended.
        """
        while True:
            left = until - self.now()
            found = self._manager.get_result(timeout=max(0.0, min(left, _LOOK_EVERY)))
            if found is not None:
                return self._reply(found)
            if not self._manager.is_running():
                raise EngineError(
                    "transformers' continuous batching ended while requests were in flight. Its "
                    "log says why; often the cache does not fit, or the model has layers that its "
                    "paged attention cannot run."
                )
            if left <= 0:
                return None

    def _reply(self, found: Any) -> Reply:
        request, sent = self._open.pop(found.request_id)
        tokens = len(found.generated_tokens)
        if found.error is not None or tokens != request.tokens:
            reason = found.error or f"{tokens} tokens came and {request.tokens} were asked for"
            return Reply(request.number, sent, error=f"continuous batching: {reason}")
        return Reply(
            request.number,
            sent,
            times=tuple(found.timestamps[:tokens]),
            counts=(1,) * tokens,
            prompt_tokens=len(request.prompt),
        )


@contextmanager
def continuous_batching(
    model: Any, *, requests: int, prompt: int, tokens: int
) -> Iterator[ContinuousBatchingServer]:
    """Serve a model while the block runs.

    Args:
        model: a transformers causal language model.
        requests: the most that are in one batch; others wait.
        prompt, tokens: the longest prompt, and how many tokens a request generates at most; the
            cache is made to hold that for each request in the batch.

    Raises:
        EngineError: the installed transformers has no continuous batching, or it refuses the model.
    """
    try:
        from transformers import ContinuousBatchingConfig, GenerationConfig
    except ImportError as error:
        raise EngineError(
            "The installed transformers has no continuous batching that can be driven from "
            "outside. Upgrade it (5.23 is known to work), or put load on a server with "
            "qlab serve-bench."
        ) from error
    pages = -(-(prompt + tokens) // PAGE) + 1
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=requests * pages + 1,
        max_batch_tokens=max(256, requests * prompt),
        max_requests_per_batch=requests,
        allow_block_sharing=False,
        auto_switch_to_flash=False,
    )
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    with _quiet():
        try:
            manager = model.init_continuous_batching(
                generation_config=generation, continuous_batching_config=config
            )
            manager.start()
        except Exception as error:  # whatever it makes of an architecture it does not know
            raise EngineError(
                f"transformers' continuous batching refuses this model: {error} Measure "
                "quantized.throughput instead, which takes one request at a time."
            ) from error
        try:
            yield ContinuousBatchingServer(manager)
        finally:
            manager.stop(block=True, timeout=10, hard_stop=True)
            manager.destroy()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes on memory that continuous batching writes to its log."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
