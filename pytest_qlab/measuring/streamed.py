"""Windows run through a model that is read block by block: all through one before the next is read.

Each forward is the model's own code with the blocks before the current one skipped, so masks,
positions and what follows the blocks are made as the architecture makes them. Hidden states between
two blocks lie in files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_qlab.calibration.spilled import StatesFile
from pytest_qlab.errors import ModelError, QlabError
from pytest_qlab.measuring.forward import predict
from pytest_qlab.measuring.parts import BaseParts
from pytest_qlab.measuring.resume import Resumable
from pytest_qlab.models.checks import check_causality, look_ahead_pair
from pytest_qlab.models.head import Head, head_of, probe_of
from pytest_qlab.parallel import ordered_map

if TYPE_CHECKING:
    from pytest_qlab.data.windows import Window
    from pytest_qlab.measuring.parts import Parts
    from pytest_qlab.models.lazy import LazyModel


class _Kept:
    """What a block put out for one sequence: its hidden state, in a file."""

    def __init__(self, output: Any, path: Path) -> None:
        alone = isinstance(output, Tensor)
        # Of what older architectures' blocks give besides, models use nothing here.
        self._besides = None if alone else len(output) - 1
        self._file = StatesFile(path)
        self._file.append(output if alone else output[0])

    def output(self) -> Any:
        """The same again, read anew."""
        hidden = next(iter(self._file))
        return hidden if self._besides is None else (hidden, *[None] * self._besides)

    def forget(self) -> None:
        """Delete it."""
        self._file.path.unlink()


@contextmanager
def through_blocks(
    parts: Parts,
    sequences: Sequence[Sequence[int]],
    directory: Path,
    *,
    threads: int,
    progress: Callable[[str], None],
) -> Iterator[Callable[[int, Callable[[], Any]], Any]]:
    """Run sequences of token ids up to the end of the last block.

    Within, what follows the blocks can be run: `finish(place, forward)` is `forward()`, which runs
    `parts.model` on the sequence at that place, continued from there.

    Args:
        parts: of this run only; its blocks are patched.
        directory: for hidden states; made, and removed in the end.
        threads: how many sequences run at the same time.
        progress: called with a line for each block.
    """
    model = parts.model
    resumable = Resumable(model, embeds_once=True)
    kept: list[_Kept | None] = [None] * len(sequences)

    def push(index: int, place: int) -> None:
        before = kept[place]
        ids = torch.tensor([list(sequences[place])], device=parts.device)
        output = resumable.boundary(
            lambda: model(input_ids=ids, use_cache=False),
            index,
            None if before is None else before.output(),
        )
        kept[place] = _Kept(output, directory / f"{index:04d}-{place:06d}.bin")
        if before is not None:
            before.forget()

    def finish(place: int, forward: Callable[[], Any]) -> Any:
        last = kept[place]
        assert last is not None
        return resumable.run(forward, parts.count, last.output())

    directory.mkdir()
    try:
        with parts.rest():
            for index in range(parts.count):
                progress(f"block {index + 1}/{parts.count}")
                with ExitStack() as stack:
                    if index == 0:
                        stack.enter_context(parts.embedding())
                    stack.enter_context(parts.block(index))
                    places = range(len(sequences))
                    for _ in ordered_map(partial(push, index), places, threads):
                        pass
            with parts.head():
                yield finish
    finally:
        shutil.rmtree(directory)


@dataclass(frozen=True)
class Predicting:
    """Windows that have passed the blocks.

    Attributes:
        head: of the model, as `head_of` finds it in a model in memory.
        predict: what `measuring.forward.predict` gives for the window at a place.
    """

    head: Head
    predict: Callable[[int], Tensor]


@contextmanager
def predicting(
    parts: Parts,
    windows: Sequence[Window],
    directory: Path,
    *,
    threads: int,
    progress: Callable[[str], None],
) -> Iterator[Predicting]:
    """Run windows through a model; arguments as of `through_blocks`."""
    probe = probe_of(parts.vocabulary)
    sequences = [*(window.ids for window in windows), probe]
    with through_blocks(parts, sequences, directory, threads=threads, progress=progress) as finish:
        head: Head = finish(len(windows), lambda: head_of(parts.model))
        yield Predicting(head, lambda place: finish(place, lambda: predict(head, windows[place])))


def prove(lazy: LazyModel, progress: Callable[[str], None]) -> dict[str, Any]:
    """Show on two short sequences that block by block a model gives the bits that it gives at once.

    It does if its blocks pass on nothing but their hidden state.

    Returns:
        The fields of the model's `Head` that are plain JSON types.

    Raises:
        ModelError: it does not, or the model looks ahead.
    """
    progress("base model: a few tokens at once and block by block")
    parts = BaseParts(lazy)
    short, changed = look_ahead_pair(parts.vocabulary)
    other = [*reversed(short)][:-1]
    sequences = [short, other, changed, probe_of(parts.vocabulary)]
    with TemporaryDirectory(prefix="qlab-") as place, torch.inference_mode():
        with lazy.forwards():
            whole = [_logits(lazy.model, lazy.device, ids) for ids in (short, other)]
        try:
            with through_blocks(
                parts, sequences, Path(place) / "states", threads=1, progress=lambda line: None
            ) as finish:
                head: Head = finish(3, lambda: head_of(parts.model))
                found = [
                    finish(number, partial(_logits, parts.model, parts.device, ids))
                    for number, ids in enumerate((short, other, changed))
                ]
        except QlabError:
            raise
        except Exception as error:  # Somebody's model code, which is run as it does not expect.
            raise _cannot(lazy, f"its code fails then ({error})") from error
        if not all(map(torch.equal, found[:2], whole)):
            raise _cannot(lazy, "its blocks pass on more than hidden states, or keep something")
        check_causality(found[0], found[2], lazy.loaded.name, type(lazy.model).__name__)
    return {
        "scale": head.scale,
        "soft_cap": head.soft_cap,
        "exact": head.exact,
        "backbone": head.backbone,
    }


def _logits(model: Any, device: torch.device, ids: Sequence[int]) -> Tensor:
    """(tokens, vocabulary)."""
    batch = torch.tensor([list(ids)], device=device)
    logits: Tensor = model(input_ids=batch, use_cache=False).logits
    return logits[0]


def _cannot(lazy: LazyModel, why: str) -> ModelError:
    return ModelError(
        f"The model {lazy.loaded.name!r} ({type(lazy.model).__name__}) cannot be measured block by "
        f"block: {why}. Give --qlab-stream=never on a machine with room for the whole model."
    )
