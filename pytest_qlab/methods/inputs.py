"""What layer-wise methods check before they start: options, weights, statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from pytest_qlab.errors import MethodError
from pytest_qlab.finite import is_finite

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_qlab.calibration.statistics import LayerStatistics

SMALLEST_GROUP = 8
LARGEST_WEIGHT = 1e36
"""A little less than float32 holds: sums and steps of such weights are to be numbers, too."""


def _group_size(value: int) -> int:
    if value != -1 and value < SMALLEST_GROUP:
        raise ValueError(
            f"a group has at least {SMALLEST_GROUP} columns, usually 32, 64 or 128; "
            "-1 makes the whole row one group"
        )
    return value


GroupSize = Annotated[int, AfterValidator(_group_size)]
"""Columns that share a scale; -1 for the whole row. A row's last group may be shorter."""


def check_weight(weight: Tensor, name: str) -> None:
    """Refuse a weight that is no matrix of finite numbers.

    Raises:
        MethodError: it is empty, not two-dimensional, holds NaN or infinity, or a number beyond
            `LARGEST_WEIGHT`.
    """
    if weight.dim() != 2 or not weight.numel():
        raise MethodError(
            f"The weight of {name or 'a layer'} has the shape {tuple(weight.shape)}; a linear "
            "layer's weight has the shape (out_features, in_features), both at least 1."
        )
    if not is_finite(weight):
        raise MethodError(
            f"The weight of {name or 'a layer'} contains NaN or infinite values, so it cannot be "
            "quantized. Check the checkpoint: it may be damaged, or its training has diverged."
        )
    largest = float(weight.abs().max())
    if largest > LARGEST_WEIGHT:
        raise MethodError(
            f"The weight of {name or 'a layer'} reaches {largest:.3g}, more than float32 can be "
            f"quantized with ({LARGEST_WEIGHT:g}). Check the checkpoint: it may be damaged."
        )


@contextmanager
def solving(method: str, names: Iterable[str], tokens: int) -> Iterator[None]:
    """Turn a Gram matrix that cannot be factored into an error that names the layers.

    Args:
        method: as messages call it.
        names: of the layers that read the inputs.
        tokens: of calibration, of which the Gram matrix is.

    Raises:
        MethodError: it cannot be factored, however it is damped.
    """
    from pytest_qlab.solvers.gptq import NotPositiveDefiniteError

    try:
        yield
    except NotPositiveDefiniteError as error:
        raise MethodError(
            f"{method} cannot solve {' and '.join(names) or 'a layer'}: the Gram matrix of "
            f"{tokens} calibration inputs is not positive definite, however it is damped. "
            "Calibrate on more text, or leave the layer to another method."
        ) from error


def check_statistics(
    statistics: LayerStatistics | None,
    weight: Tensor,
    name: str,
    method: str,
    *,
    gram: bool,
    channels: bool = False,
    fisher: bool = False,
) -> LayerStatistics:
    """The calibration statistics, which must be there, fit the weight and be finite.

    Raises:
        MethodError: they are missing, of another size, or hold NaN or infinity.
    """
    layer = name or "a layer"
    if (
        statistics is None
        or (gram and statistics.gram is None)
        or (channels and statistics.channels is None)
        or (fisher and statistics.fisher is None)
    ):
        missing = gram and (statistics is None or statistics.gram is None)
        what = "the Gram matrix of the inputs" if missing else "the range of the inputs"
        what = "the squared gradients of the loss" if fisher else what
        raise MethodError(
            f"The method {method!r} needs {what} of {layer}, which calibration did not collect. "
            "Run it through a Lab with calibration text."
        )
    columns = weight.shape[1]
    needed = [statistics.square_sum]
    if statistics.channels is not None:
        needed += vars(statistics.channels).values()
    if gram and statistics.gram is not None:
        needed.append(statistics.gram)
    if fisher and statistics.fisher is not None:
        if statistics.fisher.shape != weight.shape:
            raise MethodError(
                f"The squared gradients of {layer} have the shape {tuple(statistics.fisher.shape)},"
                f" its weight has {tuple(weight.shape)}. They belong to another layer or model."
            )
        needed.append(statistics.fisher)
    if any(tensor.shape[-1] != columns for tensor in needed):
        raise MethodError(
            f"The calibration statistics of {layer} are for {needed[0].shape[-1]} input channels, "
            f"its weight has {columns}. They belong to another layer or model."
        )
    if not all(map(is_finite, needed)):
        raise MethodError(
            f"The calibration inputs of {layer} contain NaN or infinite values, which "
            f"{method!r} cannot use. Run the model in float32 (--qlab-dtype=float32) and see that "
            "its own outputs are finite."
        )
    return statistics
