"""AWQ's searches against the reference's published numbers and against explicit inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pytest_qlab.solvers.awq import clip, output_error, search_clip, search_scale
from pytest_qlab.solvers.grid import GridRule, fake_quantize, grouped
from tests.methods.oracles import correlated
from tests.toy import relative_output_error, toy_gram, toy_inputs, toy_weight


def layer(rows: int = 12, columns: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    weight, inputs, gram = correlated(rows, columns, 200, seed)
    return weight.float(), inputs.float(), gram.float()


@pytest.mark.parametrize(
    ("bits", "group_size", "plain", "ratio", "first", "best", "scaled", "clipped", "share"),
    [
        (4, 128, 7.19919e-3, 0.15, 2.87408, 2.70098, 6.76559e-3, 6.16630e-3, 0.957422),
        (4, 64, 6.62280e-3, 0.20, 2.64398, 2.42265, 6.06840e-3, 5.37625e-3, 0.956641),
        (3, 64, 2.92302e-2, 0.25, 11.6694, 10.6918, 2.67816e-2, 2.18034e-2, 0.903320),
        (2, 64, 1.38124e-1, 0.25, 55.1421, 53.161, 1.33161e-1, 1.01198e-1, 0.809375),
    ],
)
def test_the_reference_implementation_finds_the_same(
    bits: int,
    group_size: int,
    plain: float,
    ratio: float,
    first: float,
    best: float,
    scaled: float,
    clipped: float,
    share: float,
) -> None:
    """Numbers of mit-han-lab/llm-awq on the toy problem, the loss taken on the linear itself."""
    weight, gram = toy_weight(64), toy_gram()
    rule = GridRule(bits, scale_dtype=torch.float32)
    outputs = len(toy_inputs()) * len(weight)
    found = search_scale([weight], [gram], toy_inputs().abs().mean(0), rule, group_size)
    scale = found.scale
    assert relative_output_error(weight, fake_quantize(weight, rule, group_size)) == pytest.approx(
        plain, rel=2e-5
    )
    assert found.ratio == pytest.approx(ratio)
    assert found.losses[0] / outputs == pytest.approx(first, rel=2e-5)
    assert min(found.losses) / outputs == pytest.approx(best, rel=2e-5)
    rounded = fake_quantize(weight * scale, rule, group_size) / scale
    assert relative_output_error(weight, rounded) == pytest.approx(scaled, rel=2e-5)

    # Where both ends of a group are clipped, its range is symmetric and the zero point lies exactly
    # between two codes, so that the last bit of the scale decides: the tolerance is for that.
    limits = search_clip(weight * scale, gram / scale / scale[:, None], rule, group_size)
    cut = fake_quantize(clip(weight * scale, limits, group_size), rule, group_size) / scale
    assert relative_output_error(weight, cut) == pytest.approx(clipped, rel=1e-2)
    widest = grouped(weight * scale, group_size).abs().amax(-1)
    assert float((limits / widest).mean()) == pytest.approx(share, abs=3e-3)


@pytest.mark.parametrize("columns", [1, 40, 512, 513, 1100])
def test_the_output_error_is_that_of_the_outputs(columns: int) -> None:
    weight, inputs, gram = correlated(3, columns, 30)
    expected = float((inputs @ weight.T).square().sum())
    assert output_error(weight, gram) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("duo_scaling", [True, False])
@pytest.mark.parametrize("columns", [64, 41])
def test_losses_agree_with_running_the_layers(duo_scaling: bool, columns: int) -> None:
    """Two linears on one input: every candidate's loss from the outputs themselves."""
    first, inputs, gram = layer(12, columns)
    second, _, _ = layer(5, columns, seed=1)
    mean_abs = inputs.abs().mean(0)
    rule = GridRule(3)
    found = search_scale([first, second], [gram, gram], mean_abs, rule, 16, duo_scaling=duo_scaling)
    losses, scales = [], []
    for step in range(20):
        scale = mean_abs ** (step / 20)
        if duo_scaling:
            magnitudes = []
            for row in torch.cat([first, second]):
                parts = [part.abs() / (part.abs().max() + 1e-6) for part in row.split(16)]
                magnitudes.append(torch.cat(parts))
            magnitude = torch.stack(magnitudes).mean(0)
            scale = scale / (magnitude ** (1 - step / 20) + 1e-4)
        scale = scale.clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        scales.append(scale)
        losses.append(
            sum(
                float((inputs @ (w - fake_quantize(w * scale, rule, 16) / scale).T).square().sum())
                for w in (first, second)
            )
        )
    assert found.losses == pytest.approx(losses, rel=1e-3)
    best = min(range(20), key=found.losses.__getitem__)
    assert found.ratio == best / 20
    assert torch.allclose(found.scale, scales[best], rtol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_scaling_is_a_candidate_so_the_choice_is_never_worse(bits: int, symmetric: bool) -> None:
    weight, inputs, gram = layer()
    rule = GridRule(bits, symmetric)
    found = search_scale([weight], [gram], inputs.abs().mean(0), rule, 16)
    plain = output_error(weight - fake_quantize(weight, rule, 16), gram)
    assert found.losses[0] == plain
    chosen = fake_quantize(weight * found.scale, rule, 16) / found.scale
    assert output_error(weight - chosen, gram) == min(found.losses) <= plain


def test_an_outlier_channel_is_scaled_up() -> None:
    weight, inputs, _ = layer(32, 64)
    inputs[:, 9] *= 100
    found = search_scale([weight], [inputs.T @ inputs], inputs.abs().mean(0), GridRule(4), 32)
    assert found.ratio > 0
    assert int(found.scale.argmax()) == 9


def test_scales_are_reciprocal_at_their_ends_and_dead_channels_are_clamped() -> None:
    weight, inputs, _ = layer()
    inputs[:, 3] = 0
    found = search_scale([weight], [inputs.T @ inputs], inputs.abs().mean(0), GridRule(3), 16)
    assert bool(found.scale.isfinite().all())
    assert bool((found.scale > 0).all())
    assert float(found.scale.max() * found.scale.min()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("group_size", [16, -1, 24])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_agrees_with_a_search_over_the_inputs(group_size: int, symmetric: bool) -> None:
    weight, inputs, gram = layer(6, 64)
    rule = GridRule(3, symmetric, scale_dtype=torch.float32)
    limits = search_clip(weight, gram, rule, group_size)
    length = 64 if group_size == -1 else group_size
    for i in range(6):
        for g, start in enumerate(range(0, 64, length)):
            group, x = weight[i : i + 1, start : start + length], inputs[:, start : start + length]
            widest = float(group.abs().max())
            errors = {}
            for step in range(10):
                limit = widest * (1 - step / 20)
                rounded = fake_quantize(group.clamp(-limit, limit), rule, -1)
                errors[limit] = float((x @ (group - rounded).T).square().sum())
            chosen = min(errors, key=lambda limit: abs(limit - float(limits[i, g])))
            assert chosen == pytest.approx(float(limits[i, g]), rel=1e-5)
            # Two limits may be equally good but for rounding.
            assert errors[chosen] <= min(errors.values()) * (1 + 1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [64, 41])
def test_clipping_never_increases_the_error_of_a_group(bits: int, columns: int) -> None:
    weight, _, gram = layer(8, columns)
    rule = GridRule(bits)
    limits = search_clip(weight, gram, rule, 16)
    cut = fake_quantize(clip(weight, limits, 16), rule, 16)
    plain = fake_quantize(weight, rule, 16)
    for start in range(0, columns, 16):
        at = slice(start, start + 16)
        before = ((weight - plain)[:, at] @ gram[at, at] * (weight - plain)[:, at]).sum(1)
        after = ((weight - cut)[:, at] @ gram[at, at] * (weight - cut)[:, at]).sum(1)
        assert bool((after <= before * (1 + 1e-4)).all())
    assert bool((limits <= grouped(weight, 16).abs().amax(-1)).all())


def test_without_shrinking_nothing_is_clipped() -> None:
    weight, _, gram = layer()
    limits = search_clip(weight, gram, GridRule(2), 16, max_shrink=0.0)
    assert torch.equal(clip(weight, limits, 16), weight)


def test_clipping_does_nothing_to_groups_of_zeros() -> None:
    weight, _, gram = layer()
    weight[:, :16] = 0
    limits = search_clip(weight, gram, GridRule(2), 16)
    assert not clip(weight, limits, 16)[:, :16].any()


def test_an_error_that_is_never_finite_is_refused() -> None:
    weight, inputs, gram = layer()
    with pytest.raises(ValueError, match="finite"):
        search_scale([weight * 1e30], [gram], inputs.abs().mean(0), GridRule(4), 16)
