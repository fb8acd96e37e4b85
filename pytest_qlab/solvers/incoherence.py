"""QuIP: a weight is made incoherent by rotations, rounded against its rotated Gram matrix.

Chee, Cai, Kuleshov, De Sa: QuIP, NeurIPS 2023 (arXiv 2307.13304), Algorithms 1 to 3, as the
reference code Cornell-RelaxML/QuIP has them: columns are rescaled so that weights and inputs are of
even size, both sides are multiplied by random orthogonal matrices, one grid for the whole matrix
ends at 2.4 times its root mean square, LDLQ chooses the codes. Damping comes last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_qlab.formats.incoherent import Incoherent
from pytest_qlab.formats.transforms import Kind, Transform
from pytest_qlab.solvers.gptq import NotPositiveDefiniteError
from pytest_qlab.solvers.ldlq import ldlq

GRID_END = 2.4  # in root mean squares of the rotated weight
REGULARIZATION = 0.01  # of the Gram matrix, whose mean diagonal is then 1
SMALLEST_SHARE = 1e-8  # of the largest input or weight that a column's are taken to have


@dataclass(frozen=True)
class Rotated:
    """A layer's problem after incoherence processing.

    Attributes:
        weight: U W diag(d) V^T, float64 (m, n).
        gram: V diag(1/d) H diag(1/d) V^T of mean diagonal 1, regularized, float64 (n, n); None
            where there was none.
        column_scales: d, float16 (n,), or None where columns were not rescaled.
        row_transform: U.
        column_transform: V.
    """

    weight: Tensor
    gram: Tensor | None
    column_scales: Tensor | None
    row_transform: Transform
    column_transform: Transform


def make_incoherent(
    weight: Tensor, gram: Tensor | None, *, transform: Kind, rescale: bool, seed: int
) -> Rotated:
    """Rescale and rotate a weight (m, n) and the Gram matrix (n, n) of its inputs.

    Scales d = (diag(H) / diag(W^T W))^(1/4) are those that make tr(H) times the squared norm of W
    the least. They are rounded to float16 first, and only needed up to a factor, so that sizes
    below a share of 1e-8 of the largest are taken to be that.

    Raises:
        NotPositiveDefiniteError: an input has a negative square.
    """
    rows, columns = weight.shape
    # A square matrix must not be rotated by the same one on both sides.
    u, v = Transform.of(transform, rows, 2 * seed + 1), Transform.of(transform, columns, 2 * seed)
    w, scales = weight.to(torch.float64), None
    h = None if gram is None else gram.to(torch.float64)
    if h is not None:
        if bool((h.diagonal() < 0).any()):
            raise NotPositiveDefiniteError("the Gram matrix is not positive definite")
        h = h / h.abs().amax().clamp(min=torch.finfo(torch.float64).tiny)
        if rescale:
            ratio = _shares(h.diagonal()) / _shares(w.square().sum(0))
            scales = ratio.sqrt().sqrt().to(torch.float16)
            w = w * scales
            h = h / scales / scales[:, None]
        trace = h.trace()  # 0 where no input was ever used
        h = h * torch.where(trace > 0, columns / trace, 0)
        h.diagonal().add_(REGULARIZATION)
        h = v.apply(v.apply(h).T.contiguous())
    return Rotated(u.apply(v.apply(w).T.contiguous()).T.contiguous(), h, scales, u, v)


def _shares(sizes: Tensor) -> Tensor:
    largest = sizes.amax()
    return torch.where(largest > 0, sizes / largest, torch.ones_like(sizes)).clamp(SMALLEST_SHARE)


@dataclass(frozen=True)
class EvenPoints:
    """2**bits points evenly over -1 to 1, for a rotated weight in units of the grid's end."""

    rotated: Rotated
    end: Tensor
    bits: int

    def nearest(self, values: Tensor, columns: Tensor) -> Tensor:
        """Codes, uint8, of the nearest points; halves go up, as in the reference."""
        top = 2**self.bits - 1
        codes: Tensor = ((values + 1) * (top / 2) + 0.5).floor_().clamp_(0, top)
        return codes.to(torch.uint8)

    def decode(self, codes: Tensor, columns: Tensor) -> Tensor:
        """The points of codes."""
        points: Tensor = codes.to(torch.float32) * (2 / (2**self.bits - 1)) - 1
        return points

    def pack(self, codes: Tensor) -> Incoherent:
        """Lay out the bits."""
        return Incoherent.pack(
            codes,
            self.end,
            self.rotated.column_scales,
            row_transform=self.rotated.row_transform,
            column_transform=self.rotated.column_transform,
            bits=self.bits,
        )


def quip_solve(
    weight: Tensor,
    gram: Tensor | None,
    *,
    bits: int,
    transform: Kind = "kronecker",
    rescale: bool = True,
    damp_percent: float = 0.01,
    seed: int = 0,
    greedy_passes: int = 0,
) -> Incoherent:
    """Quantize a weight (m, n) against its inputs' Gram matrix (n, n).

    Args:
        weight: float32 (m, n).
        gram: sum of x x^T in any scale; None to round the rotated weight to nearest.
        bits: width of a code.
        transform: of which kind the rotations are.
        rescale: make columns of weights and inputs even in size before.
        damp_percent: share of the mean diagonal that is added to the rotated Gram matrix's; raised
            in steps up to 1 where it cannot be factored.
        seed: of the rotations.
        greedy_passes: rounds of coordinate descent after LDLQ, which then takes columns in the
            order of falling diag(H) (the paper's LDLQ-RG).

    Raises:
        NotPositiveDefiniteError: H cannot be factored however it is damped.
    """
    rotated = make_incoherent(weight, gram, transform=transform, rescale=rescale, seed=seed)
    end = GRID_END * rotated.weight.square().mean().sqrt()
    end = end.clamp(max=torch.finfo(torch.float32).max).to(torch.float32)
    # As in the reference, what lies outside of the grid is clipped before it is rounded, so that
    # other columns do not have to make good for it. A weight of zeros has the grid 0.
    units = (rotated.weight / end.where(end > 0, 1)).clamp_(-1, 1).to(torch.float32)
    points = EvenPoints(rotated, end, bits)
    if rotated.gram is None:
        return points.pack(points.nearest(units, torch.arange(units.shape[1], device=units.device)))
    solution = ldlq(
        units,
        rotated.gram,
        points,
        order="active" if greedy_passes else "last",
        damp_percent=damp_percent,
        greedy_passes=greedy_passes,
    )
    return points.pack(solution.codes)
