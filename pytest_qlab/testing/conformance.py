"""What every layer-wise method owes its users, as tests that a method's own test class inherits.

from pytest_qlab.testing import MethodConformance

class TestClipRtn(MethodConformance):
    specs = "clip_rtn", "clip_rtn:bits=4:group_size=-1"
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pytest_qlab.calibration.statistics import LayerStatistics
from pytest_qlab.errors import MethodError, SpecError
from pytest_qlab.formats.activations import load_activation
from pytest_qlab.formats.base import PackedWeight, load_packed
from pytest_qlab.methods.base import Method, QuantizedLayer
from pytest_qlab.methods.configured import follows_channels
from pytest_qlab.specs import parse_specs
from pytest_qlab.testing.fakes import tiny_lab
from pytest_qlab.testing.problems import gaussian_weight, statistics_of, toy_problem

NAME = "model.layers.3.mlp.up_proj"
SHAPES = ((24, 64), (16, 256), (33, 130), (3, 41), (1, 9), (5, 1), (1, 1))
# Above so many bits a weight, what float32 itself rounds away is more than the method does.
MEANINGFUL_BITS = 16


class MethodConformance:
    """Inherit from it, and say which methods in `specs`.

    Attributes:
        specs: specifications as on the command line (`gptq:bits=3`), or `Method` objects; one or
            several. Every test runs once for each.
    """

    specs: ClassVar[str | Method | Iterable[str | Method]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give each test the methods of `specs`."""
        if "method" in metafunc.fixturenames:
            methods = methods_of(type(self))
            metafunc.parametrize("method", methods, ids=[method.id for method in methods])

    # --- what it is ------------------------------------------------------------------------

    def test_it_is_found_by_its_name(self, method: Method) -> None:
        """Its class is registered, so that the command line and configurations know it."""
        found = parse_specs([method.name])[0].method
        assert type(found) is type(method)
        assert found.name == method.name

    def test_equal_options_make_equal_methods(self, method: Method) -> None:
        """Methods are keys: of tests, of rows, of stored artefacts."""
        again = method.model_copy(deep=True)
        assert again == method
        assert hash(again) == hash(method)
        assert again.id == method.id
        assert json.loads(json.dumps(method.identity())) == method.identity()
        with pytest.raises(ValidationError):
            type(method).model_validate({**method.model_dump(), "no_such_option": 1})

    # --- the bits --------------------------------------------------------------------------

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_odd_shapes(self, method: Method, shape: tuple[int, int]) -> None:
        """Any matrix keeps its shape; its bits are closer to it than zeros are."""
        weight, inputs = toy_problem(*shape)
        given = weight.clone()
        layer = quantize(method, weight, inputs)
        found = layer.weight.dequantize()
        assert layer.weight.shape == tuple(found.shape) == shape
        assert found.dtype == torch.float32
        assert _error(method, weight, found, inputs) < 1
        assert torch.equal(weight, given), "the method has changed the weight that it was given"

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_round_trip_through_disk(
        self, method: Method, shape: tuple[int, int], tmp_path: Path
    ) -> None:
        """Written, read and dequantized, it is the same to the bit, inputs' quantizer too."""
        layer = quantize(method, *toy_problem(*shape))
        again = _reloaded(layer.weight, tmp_path / "weight.safetensors")
        assert torch.equal(again.dequantize(), layer.weight.dequantize())
        assert again.nbytes == layer.weight.nbytes
        if layer.activation is not None:
            x = gaussian_weight(7, shape[1], seed=5)
            meta = json.loads(json.dumps(layer.activation.metadata()))
            loaded = load_activation(meta, layer.activation.tensors())
            assert torch.equal(loaded(x), layer.activation(x))
            assert layer.activation(x).shape == x.shape

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_size_is_what_is_written(
        self, method: Method, shape: tuple[int, int], tmp_path: Path
    ) -> None:
        """`nbytes` and `bits_per_weight` count every byte of the file but its header."""
        packed = quantize(method, *toy_problem(*shape)).weight
        file = tmp_path / "weight.safetensors"
        save_file({key: value.contiguous() for key, value in packed.tensors().items()}, file)
        (header,) = struct.unpack("<Q", file.read_bytes()[:8])
        assert packed.nbytes == file.stat().st_size - 8 - header
        assert packed.bits_per_weight == 8 * packed.nbytes / (shape[0] * shape[1])
        hidden = len(json.dumps(packed.metadata()))
        assert hidden < 2000, "metadata is for how to read tensors, not for data"

    def test_rows_can_be_taken(self, method: Method) -> None:
        """Rows in any order and number are those of the whole."""
        packed = quantize(method, *toy_problem(24, 64)).weight
        index = torch.tensor([5, 0, 23, 5])
        assert torch.equal(packed.take_rows(index).dequantize(), packed.dequantize()[index])

    def test_no_better_than_rate_distortion_theory(self, method: Method) -> None:
        """No code can describe Gaussian numbers with less squared error than 4**-bits.

        A method that does has bits that it does not count (Shannon 1959; Cover and Thomas, Elements
        of Information Theory, section 10.3).
        """
        weight = gaussian_weight(256, 512)
        packed = quantize(method, weight, gaussian_weight(1024, 512, seed=1)).weight
        if packed.bits_per_weight < MEANINGFUL_BITS:
            error = _relative_error(weight, packed.dequantize())
            # The sample's own scatter is 4 sqrt(2 / 131072) of its variance.
            assert error >= 4**-packed.bits_per_weight * 0.98

    def test_more_bits_cost_less_error(self, method: Method) -> None:
        """Where there is an option `bits`: on the layer's output, if the method sees inputs."""
        if "bits" not in type(method).model_fields:
            return
        weight, inputs = toy_problem(32, 256)
        errors = []
        for bits in (2, 3, 4, 8):
            try:
                other = type(method).model_validate({**method.model_dump(), "bits": bits})
            except ValidationError:
                continue
            found = quantize(other, weight, inputs).weight.dequantize()
            errors.append(_output_error(weight, found, inputs))
        assert errors == sorted(errors, reverse=True)

    # --- always the same -------------------------------------------------------------------

    def test_it_is_deterministic(self, method: Method) -> None:
        """Whatever torch's global seed is, which it leaves alone, and on several threads."""
        problem = toy_problem(24, 64)
        first = quantize(method, *problem).weight
        state = torch.random.get_rng_state()
        try:
            torch.manual_seed(12345)
            before = torch.random.get_rng_state()
            other = quantize(method, *problem).weight
            assert torch.equal(torch.random.get_rng_state(), before), "it draws from torch's seed"
        finally:
            torch.random.set_rng_state(state)
        with ThreadPoolExecutor(4) as pool:
            several = list(pool.map(lambda _: quantize(method, *problem).weight, range(4)))
        for again in (other, *several):
            assert again.metadata() == first.metadata()
            for key, tensor in first.tensors().items():
                assert torch.equal(_bytes(again.tensors()[key]), _bytes(tensor)), key

    # --- weights that are hard -------------------------------------------------------------

    def test_zeros_stay_zeros(self, method: Method) -> None:
        """A matrix of zeros is stored as one."""
        _, inputs = toy_problem(8, 64)
        found = quantize(method, torch.zeros(8, 64), inputs).weight.dequantize()
        assert torch.equal(found, torch.zeros(8, 64))

    def test_rows_of_zeros_and_of_one_value(self, method: Method) -> None:
        """They are no special case: no NaN, no more error than other rows have, or than zeros."""
        weight, inputs = toy_problem(16, 64)
        weight[3] = 0
        weight[5] = 0.75
        weight[7] = -1e-3
        found = quantize(method, weight, inputs).weight.dequantize()
        assert bool(found.isfinite().all())
        errors = _row_sums(method, weight - found, inputs)
        sizes = _row_sums(method, weight, inputs)
        for row in (3, 5, 7):
            assert float(errors[row]) <= max(float(errors[8:].max()), float(sizes[row]))
        assert float(errors.sum()) < float(sizes.sum())

    @pytest.mark.parametrize("exponent", [-8, 8])
    def test_scales_do_not_matter(self, method: Method, exponent: int) -> None:
        """The relative error of a matrix times a power of two is what it was."""
        weight, inputs = toy_problem(16, 128)
        scaled = weight * 2.0**exponent
        plain, found = (
            _error(method, each, quantize(method, each, inputs).weight.dequantize(), inputs)
            for each in (weight, scaled)
        )
        assert found == pytest.approx(plain, rel=0.15, abs=1e-9)

    @pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
    def test_extreme_scales(self, method: Method, scale: float) -> None:
        """They are quantized as others are, or refused by name; never NaN, never nonsense."""
        weight, inputs = toy_problem(8, 64)
        try:
            found = quantize(method, weight * scale, inputs).weight.dequantize()
        except MethodError as refused:
            if NAME in str(refused):
                return
            raise
        assert bool(found.isfinite().all())
        assert _error(method, weight, found / scale, inputs) <= 1

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
    def test_weights_that_are_not_finite_are_refused(self, method: Method, poison: float) -> None:
        """By an error that names the layer."""
        weight, inputs = toy_problem(8, 64)
        weight[3, 5] = poison
        with pytest.raises(MethodError, match=NAME):
            quantize(method, weight, inputs)

    # --- calibration -----------------------------------------------------------------------

    def test_statistics_that_are_missing_or_wrong_are_refused(self, method: Method) -> None:
        """By an error that names the layer: none at all, those of another layer, NaN in them.

        Not by methods whose bits do not depend on them, such as those that change the model first.
        """
        if not method.wanted_statistics:
            return
        weight, inputs = toy_problem(8, 64)
        _, narrow = toy_problem(8, 32)
        broken = _statistics(method, weight, inputs).rescaled(torch.full((64,), math.nan))
        usual = quantize(method, weight, inputs).weight.dequantize()
        for given in (None, _statistics(method, weight[:, :32], narrow), broken):
            try:
                found = method.quantize(weight, given, name=NAME).weight.dequantize()
            except MethodError as refused:
                if NAME not in str(refused):
                    raise
            else:
                assert torch.equal(found, usual), "it used statistics that it should refuse"

    def test_a_layer_that_no_token_reached(self, method: Method) -> None:
        """An idle expert is quantized all the same."""
        if not method.wanted_statistics:
            return
        weight, inputs = toy_problem(8, 64)
        unreached = _statistics(method, weight, inputs[:0])
        found = method.quantize(weight, unreached, name=NAME).weight.dequantize()
        assert _relative_error(weight, found) < 1

    def test_layers_with_one_input_are_solved_together(self, method: Method) -> None:
        """`quantize_shared` gives each layer what `quantize` does, but for rounding."""
        one, inputs = toy_problem(8, 64)
        other, _ = toy_problem(5, 64, seed=9)
        shared = _statistics(method, one, inputs)
        if shared.fisher is not None:  # Of one layer's weights only, never shared.
            return
        weights = {f"{NAME}.a": one, f"{NAME}.b": other}
        together = method.quantize_shared(weights, shared)
        assert [each.weight.shape for each in together] == [(8, 64), (5, 64)]
        for layer, (name, weight) in zip(together, weights.items(), strict=True):
            alone = method.quantize(weight, shared, name=name).weight.dequantize()
            errors = [_output_error(weight, w, inputs) for w in (alone, layer.weight.dequantize())]
            assert errors[1] == pytest.approx(errors[0], rel=0.2, abs=1e-9)

    # --- where it runs ---------------------------------------------------------------------

    def test_in_a_model(self, method: Method, tmp_path: Path) -> None:
        """A whole comparison: quantized, measured, stored, and not computed a second time."""
        lab = tiny_lab(tmp_path / "store")
        candidate = lab.candidate(method)
        assert math.isfinite(candidate.perplexity)
        assert candidate.kl.mean >= 0
        assert candidate.size > 0
        row = candidate.fragment()
        assert {"kl.mean", "perplexity", "bits_per_weight"} <= row.measures.keys()
        again = tiny_lab(tmp_path / "store")
        assert again.candidate(method).kl.mean == candidate.kl.mean
        assert again.store.built == {}

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    def test_cuda_agrees_with_the_cpu(self, method: Method) -> None:
        """The same bits but for ties, and the same error."""
        weight, inputs = toy_problem(32, 256)
        here = quantize(method, weight, inputs).weight.dequantize()
        there = quantize(method, weight.cuda(), inputs).weight.dequantize()
        assert there.is_cuda
        errors = [_output_error(weight, found, inputs) for found in (here, there.cpu())]
        assert errors[1] == pytest.approx(errors[0], rel=0.05)
        assert float((here == there.cpu()).float().mean()) > 0.9


def methods_of(cls: type[MethodConformance]) -> list[Method]:
    given = [cls.specs] if isinstance(cls.specs, str | Method) else list(cls.specs)
    methods: list[Method] = []
    for each in given:
        try:
            methods += (
                [each] if isinstance(each, Method) else [s.method for s in parse_specs([each])]
            )
        except SpecError as error:
            raise pytest.UsageError(f"{cls.__name__}.specs: {error}") from error
    if not methods:
        raise pytest.UsageError(
            f"{cls.__name__} names no method: set `specs`, such as specs = 'gptq:bits=3'."
        )
    for method in methods:
        kind = type(method)
        if kind.quantize is Method.quantize and kind.quantize_shared is Method.quantize_shared:
            raise pytest.UsageError(
                f"{method.id} does not quantize layer by layer, so the conformance suite has "
                "nothing to call."
            )
    return methods


def quantize(method: Method, weight: Tensor, inputs: Tensor) -> QuantizedLayer:
    """What a method makes of a weight (m, n), given inputs (tokens, n) if it wants statistics."""
    known = _statistics(method, weight, inputs) if method.wanted_statistics else None
    return method.quantize(weight, known, name=NAME)


def _statistics(method: Method, weight: Tensor, inputs: Tensor) -> LayerStatistics:
    """Of inputs; gradients, where they are wanted, are those of outputs that should be noise."""
    wanted = method.wanted_statistics
    known = statistics_of(inputs, gram="gram" in wanted, channels=follows_channels(wanted))
    known = known.to(weight.device)
    if "fisher" not in wanted:
        return known
    noise = gaussian_weight(len(inputs), len(weight), seed=3)
    total = torch.zeros(len(weight), inputs.shape[1])
    for start in range(0, len(inputs), 32):
        total += (noise[start : start + 32].T @ inputs[start : start + 32]).square()
    return replace(known, fisher=total.to(weight.device))


def _reloaded(packed: PackedWeight, file: Path) -> PackedWeight:
    save_file({key: value.contiguous() for key, value in packed.tensors().items()}, file)
    meta: dict[str, Any] = json.loads(json.dumps(packed.metadata()))
    return load_packed(meta, load_file(file))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _error(method: Method, weight: Tensor, found: Tensor, inputs: Tensor) -> float:
    """Relative squared error: of the outputs for methods that know all of the inputs.

    They may move weights further than rounding would, to make good for one another.
    """
    if "gram" in method.wanted_statistics:
        return _output_error(weight, found, inputs)
    return _relative_error(weight, found)


def _row_sums(method: Method, weight: Tensor, inputs: Tensor) -> Tensor:
    """Sum of squares for each row, in the same terms as `_error`."""
    if "gram" in method.wanted_statistics:
        return (inputs.double() @ weight.double().T).square().sum(0)
    return weight.double().square().sum(1)


def _relative_error(weight: Tensor, found: Tensor) -> float:
    before, after = weight.double().cpu(), found.double().cpu()
    return float((before - after).square().sum() / before.square().sum())


def _output_error(weight: Tensor, found: Tensor, inputs: Tensor) -> float:
    x = inputs.double()
    delta = x @ (weight.double() - found.double()).T
    return float(delta.square().sum() / (x @ weight.double().T).square().sum())
