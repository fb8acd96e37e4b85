"""Every method on the stand-in for a CUDA device: the CPU's bits, and everything on the device.

Methods that take whole models (`gguf`) are in `tests.lab.test_on_a_device`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pytest_qlab.calibration.statistics import Accumulator
from pytest_qlab.errors import MethodError
from pytest_qlab.methods.base import Method, QuantizedLayer
from pytest_qlab.testing import MethodConformance, gaussian_weight, toy_problem
from pytest_qlab.testing.conformance import NAME, _reloaded, _statistics, methods_of, quantize
from tests.methods import test_conformance

pytestmark = pytest.mark.usefixtures("cuda")

SUITES = [
    each
    for each in vars(test_conformance).values()
    if isinstance(each, type) and issubclass(each, MethodConformance) and each.specs
]
METHODS = [method for suite in SUITES for method in methods_of(suite)]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.id)
one_of_each = pytest.mark.parametrize(
    "method", [methods_of(suite)[0] for suite in SUITES], ids=lambda method: method.id
)


def assert_same(found: QuantizedLayer, expected: QuantizedLayer) -> None:
    assert found.weight.metadata() == expected.weight.metadata()
    tensors = found.weight.tensors()
    for key, tensor in expected.weight.tensors().items():
        assert tensors[key].is_cuda, key
        there, here = (x.contiguous().view(torch.uint8) for x in (tensors[key].cpu(), tensor))
        assert torch.equal(there, here), key
    assert found.weight.nbytes == expected.weight.nbytes
    weight = found.weight.dequantize()
    assert weight.is_cuda
    assert torch.equal(weight.cpu(), expected.weight.dequantize())


@every_method
def test_quantized_packed_and_unpacked(method: Method, tmp_path: Path) -> None:
    """Bits, what they stand for, rows of them, what a file holds, and rounded inputs."""
    weight, inputs = toy_problem(10, 48)
    expected = quantize(method, weight, inputs)
    found = quantize(method, weight.cuda(), inputs)
    assert_same(found, expected)
    index = torch.tensor([3, 0, 9, 3])
    rows = found.weight.take_rows(index.cuda()).dequantize()
    assert torch.equal(rows.cpu(), expected.weight.dequantize()[index])
    again = _reloaded(found.weight, tmp_path / "weight.safetensors")
    assert torch.equal(again.dequantize(), expected.weight.dequantize())
    if expected.activation is not None:
        assert found.activation is not None
        rounded = found.activation(inputs.cuda())
        assert rounded.is_cuda
        assert torch.equal(rounded.cpu(), expected.activation(inputs))


@one_of_each
def test_hard_weights(method: Method) -> None:
    """Groups cut off, rows of zeros and of one value, NaN, layers that no token reached."""
    weight, inputs = toy_problem(5, 41)
    weight[1], weight[3] = 0, 0.75
    assert_same(quantize(method, weight.cuda(), inputs), quantize(method, weight, inputs))
    if method.wanted_statistics:
        unreached = _statistics(method, weight, inputs[:0])
        there = unreached.to(torch.device("cuda:0"))
        found = method.quantize(weight.cuda(), there, name=NAME)
        assert_same(found, method.quantize(weight, unreached, name=NAME))
    weight[2, 2] = torch.nan
    with pytest.raises(MethodError, match=NAME):
        quantize(method, weight.cuda(), inputs)


@one_of_each
def test_layers_with_one_input(method: Method) -> None:
    one, inputs = toy_problem(6, 48)
    two = toy_problem(3, 48, seed=9)[0]
    known = _statistics(method, one, inputs)
    if known.fisher is not None:  # Of one layer's weights only, never shared.
        return
    found = method.quantize_shared(
        {"a": one.cuda(), "b": two.cuda()}, known.to(torch.device("cuda:0"))
    )
    for each, expected in zip(
        found, method.quantize_shared({"a": one, "b": two}, known), strict=True
    ):
        assert_same(each, expected)


@pytest.mark.parametrize(("gram", "channels"), [(False, True), (True, True), (True, False)])
def test_statistics_are_collected_on_the_device(gram: bool, channels: bool) -> None:
    """In parts that are merged, as threads do it; and they stay there, where methods need them."""

    def collected(parts: list[Tensor]) -> Accumulator:
        total = Accumulator(24, gram=gram, channels=channels)
        for part in parts:
            each = Accumulator(24, gram=gram, channels=channels)
            each.add(part)
            total.merge(each)
        return total

    parts = [gaussian_weight(tokens, 24, seed=tokens) for tokens in (5, 1, 9)]
    expected = collected(parts).result()
    found = collected([part.cuda() for part in parts]).result()
    there, here = found.tensors(), expected.tensors()
    assert there.keys() == here.keys() >= {"tokens", "square_sum"}
    for name, value in here.items():
        assert name == "tokens" or there[name].is_cuda, name
        assert torch.equal(there[name].cpu(), value), name
