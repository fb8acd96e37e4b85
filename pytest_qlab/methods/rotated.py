"""Rotate a decoder block so that it computes the same on rotated hidden states, and prove it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_qlab.errors import MethodError
from pytest_qlab.methods.blocks import BlockContext, LayerContext
from pytest_qlab.models.experts import every_expert_reached
from pytest_qlab.models.folds import norm_readers
from pytest_qlab.models.rotation import LayerRotation, Rotation
from pytest_qlab.models.structure import is_linear

if TYPE_CHECKING:
    from torch import nn

    from pytest_qlab.models.folds import Fold
    from pytest_qlab.models.structure import LinearSite

_ADVICE = "Take a method without quarot for this architecture."
# The share of what a block adds that may be lost in a rotation, and rounding noise; the second of
# both for types of 16 bits. Norms compute in float32 whatever the type.
_LEFT, _NOISE = (1e-3, 0.2), (1e-5, 2e-2)
# Of a layer's output, the least change by half of a rotation of heads that shows something.
_VISIBLE = 0.02
# Rotated routers may choose other experts for a token whose scores are almost equal.
_ROUTED = 0.9


def rotate_block(block: BlockContext, *, seed: int, heads: bool) -> None:
    """Rotate everything of a block that reads or writes the residual stream, in place.

    Norm weights g are fused into the layers that read them: W becomes W diag(g) Q there, Q^T W in
    the layers that write. All is computed in float64 and rounded once.

    Args:
        seed: of the rotation, which is the same in all blocks.
        heads: also rotate the values of each attention head, if that leaves the block's function.

    Raises:
        MethodError: the block does not compute the same afterwards, or cannot for a known reason.
    """
    module, run, hidden = block.module, block.run, block.hidden
    assert module is not None
    assert run is not None
    assert hidden is not None
    width = hidden.shape[-1]
    rotation = Rotation.of(width, seed)
    sites = [layer.site for layer in block.layers]
    found = norm_readers(module, lambda: run(hidden), sites, block.name)
    norms = [norm for norm in found if norm.channels == width]
    readers = {name: norm for norm in norms for name in norm.layers}
    _check_norms(block, norms, width, _behind(block, readers))
    writers = [
        layer
        for layer in block.layers
        if layer.name not in readers and layer.site.out_features == width
    ]
    with torch.no_grad(), every_expert_reached():
        before = run(hidden)
        inside = _rotatable_heads(block, list(readers), writers, seed) if heads else {}
        for layer in (*block.layers, *block.routers):
            mine = inside.get(layer.name)
            writes = layer in writers
            inputs = rotation if layer.name in readers else (mine if writes else None)
            outputs = rotation if writes else mine
            if inputs is not None or outputs is not None:
                _rotate_layer(layer, readers.get(layer.name), LayerRotation(inputs, outputs))
        for norm in norms:
            norm.neutralize()
            _check_commutes(block, norm, rotation)
        after = run(rotation.forward(hidden))
    _verify(block, rotation, before, after)
    block.rotation = rotation


def _rotate_layer(layer: LayerContext, norm: Fold | None, rotation: LayerRotation) -> None:
    weight = _exact(layer.site)
    if norm is not None:
        factor = norm.norm_factor().to(weight.device)
        weight = weight * factor
        known = layer.column_scale
        layer.column_scale = factor.float() if known is None else known * factor.float()
    _write(layer.site, weight, rotation)
    layer.rotation = rotation
    layer.statistics = None  # They describe inputs that are no longer there.


def _rotatable_heads(
    block: BlockContext, readers: Sequence[str], writers: Sequence[LayerContext], seed: int
) -> dict[str, Rotation]:
    """The rotation of the values' rows and of the output projection's columns, by layer name.

    Which layer makes the values is found by trying: rotating its rows and the columns must leave
    the projection's output as it is, and rotating the rows alone must not.
    """
    found: dict[str, Rotation] = {}
    for writer in writers:
        site = writer.site
        size = getattr(site.parent, "head_dim", None)
        if not isinstance(size, int) or size < 2 or site.in_features % size:
            continue
        rotation = Rotation.of(size, seed, signs=False)
        for layer in reversed(block.layers):
            beside = layer.name in readers and layer.site.parent is site.parent
            fits = beside and layer.site.out_features % size == 0
            if fits and _trial(block, layer.site, site, rotation):
                found[layer.name] = found[writer.name] = rotation
                break
    return found


def _trial(block: BlockContext, values: LinearSite, output: LinearSite, each: Rotation) -> bool:
    """Whether rotating the rows of one layer is made good by the columns of another."""
    before = _output_of(block, output)
    with _restored(values, output):
        _write(values, _exact(values), LayerRotation(outputs=each))
        half = _output_of(block, output)
        _write(output, _exact(output), LayerRotation(inputs=each))
        whole = _output_of(block, output)
    change, size = float((half - before).norm()), float(before.norm())
    left, noise = _tolerances(values.stored.dtype)
    if not change > _VISIBLE * size:  # Nothing would show whether it is right.
        return False
    return float((whole - before).norm()) <= left * change + noise * size


def _output_of(block: BlockContext, site: LinearSite) -> Tensor:
    """What a layer of the block puts out, float64 (tokens, m), without what it is added to."""
    assert block.run is not None
    assert block.hidden is not None
    seen: list[Tensor] = []
    handle = site.module.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.detach().double())
    )
    try:
        block.run(block.hidden)
    finally:
        handle.remove()
    return torch.cat([each.reshape(-1, each.shape[-1]) for each in seen])


def _exact(site: LinearSite) -> Tensor:
    """The weight (m, n) in float64."""
    stored = site.stored.detach().double()
    return stored.T if site.transposed else stored


def _write(site: LinearSite, weight: Tensor, rotation: LayerRotation) -> None:
    """Rotate a weight (m, n) into its place, and the bias that is there."""
    site.set_weight(rotation.weight(weight))
    if site.bias is not None and rotation.outputs is not None:
        site.bias.copy_(rotation.outputs.forward(site.bias.double()))


@contextmanager
def _restored(*sites: LinearSite) -> Iterator[None]:
    tensors = [each for site in sites for each in (site.stored, site.bias) if each is not None]
    saved = [each.detach().clone() for each in tensors]
    try:
        yield
    finally:
        for tensor, value in zip(tensors, saved, strict=True):
            tensor.data.copy_(value)


def _behind(block: BlockContext, readers: Collection[str]) -> set[int]:
    """The ids of modules whose input some layers put out, as norms of queries and keys.

    They are not on the residual stream, even where they are as wide.
    """
    module, run, hidden = block.module, block.run, block.hidden
    assert module is not None
    assert run is not None
    assert hidden is not None
    made: list[Tensor] = []
    behind: set[int] = set()

    def see(each: nn.Module, inputs: tuple[Any, ...]) -> None:
        given = {_memory(value) for value in inputs if isinstance(value, Tensor)}
        if any(_memory(output) in given for output in made):
            behind.add(id(each))

    sites = [layer.site for layer in block.layers if layer.name in readers]
    handles = [
        site.module.register_forward_hook(lambda _module, _inputs, output: made.append(output))
        for site in sites
    ] + [each.register_forward_pre_hook(see) for each in module.modules()]
    try:
        with torch.no_grad():
            run(hidden)
    finally:
        for handle in handles:
            handle.remove()
    return behind


def _memory(tensor: Tensor) -> int:
    """The same for all views of a tensor."""
    return tensor.untyped_storage().data_ptr()


def _check_norms(
    block: BlockContext, norms: Sequence[Fold], width: int, elsewhere: Collection[int]
) -> None:
    """Every norm of the residual stream must be read by linear layers alone.

    Args:
        elsewhere: ids of modules that are not on it.

    Raises:
        MethodError: there is none, one is not, or one adds a bias.
    """
    assert block.module is not None
    if not norms:
        raise MethodError(
            f"quarot cannot rotate block {block.index}: no norm in it is read by linear layers "
            f"alone, so there is nowhere to put a rotation. {_ADVICE}"
        )
    folded = {id(norm.norm) for norm in norms}
    for name, module in block.module.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or tuple(weight.shape) != (width,) or is_linear(module):
            continue
        if id(module) in elsewhere:
            continue
        if id(module) not in folded:
            raise MethodError(
                f"quarot cannot rotate block {block.index}: what its norm {name} puts out does not "
                "go into linear layers alone, as where a norm stands behind a sublayer, so its "
                f"weights cannot be fused. {_ADVICE}"
            )
        bias = module._parameters.get("bias")
        if bias is not None and bool(bias.any()):
            raise MethodError(
                f"quarot cannot rotate block {block.index}: its norm {name} adds a bias, as "
                f"LayerNorm does. Rotations need norms of RMSNorm's kind. {_ADVICE}"
            )


def _check_commutes(block: BlockContext, fold: Fold, rotation: Rotation) -> None:
    """A norm without weights must give the rotated output for rotated inputs, whatever their mean.

    Raises:
        MethodError: it does not.
    """
    norm = fold.norm
    like = norm.get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    probe = 1 + torch.randn(8, rotation.width, generator=generator, dtype=torch.float64)
    probe = probe.to(like)
    expected = rotation.forward(norm(probe))
    left, noise = _tolerances(like.dtype)
    if not (norm(rotation.forward(probe)) - expected).norm() <= (left + noise) * expected.norm():
        raise MethodError(
            f"quarot cannot rotate block {block.index}: its norm {fold.previous} does not "
            "commute with rotations. LayerNorm, which subtracts the mean, does not; RMSNorm does. "
            f"{_ADVICE}"
        )


def _verify(block: BlockContext, rotation: Rotation, before: Tensor, found: Tensor) -> None:
    """The rotated block must turn rotated hidden states into the rotated output.

    Raises:
        MethodError: it does not, for what it adds to the hidden states.
    """
    assert block.hidden is not None
    expected = rotation.forward(before).double()
    error = (found.double() - expected).flatten(0, -2).norm(dim=-1)
    added = (before - block.hidden).double().flatten(0, -2).norm(dim=-1)
    size = expected.flatten(0, -2).norm(dim=-1)
    left, noise = _tolerances(before.dtype)
    good = error <= left * added + noise * size  # False for NaN
    share = float(good.double().mean())
    if share < (_ROUTED if block.routers else 1.0):
        raise MethodError(
            f"quarot cannot rotate block {block.index}: on rotated hidden states it does not "
            f"compute what it did (off by {float((error / size).max()):.2g} of the output). Some "
            "operation other than its norms and linear layers works on the residual stream. "
            f"{_ADVICE}"
        )


def _tolerances(dtype: torch.dtype) -> tuple[float, float]:
    half = dtype.itemsize < torch.float32.itemsize
    return _LEFT[half], _NOISE[half]
