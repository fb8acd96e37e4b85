"""The coordinate search of make_q3_quants and make_qp_quants in ggml-quants.c.

It maximizes along^2 / energy with along = sum w x l and energy = sum w l^2 over the codes l of a
group. C walks over the elements of the group and changes codes as it goes, and does so again, up to
`PASSES` times, until a walk changes nothing. Few groups have any code to change. So here all
elements of all groups are tried at once, the first one behind the last change is changed, and only
groups that were changed are tried again: the same changes in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytest_qlab.solvers.ggml.arrays import Floats
from pytest_qlab.solvers.ggml.rounding import read_as_bytes, rounded_by_bits

PASSES = 5


class Problem(NamedTuple):
    """Groups of weights `x` with importance `weights`, and `weighted`, their product: (n, groups).

    Codes are at most `high` and at least `low`. Without `low` it is the variant of make_qp_quants:
    it asks for a positive energy without the element, not with its new code, and stores codes in
    unsigned bytes.
    """

    x: Floats
    weights: Floats
    weighted: Floats
    low: int | None
    high: int

    def take(self, groups: NDArray[np.intp]) -> Problem:
        """The problem of some of the groups."""
        x, weights, weighted = (each.take(groups, 1) for each in self[:3])
        return Problem(x, weights, weighted, self.low, self.high)


class _Trials(NamedTuple):
    """For each element (n, groups): its best code, sums with that, and whether to change it."""

    codes: Floats
    along: Floats
    energy: Floats
    better: NDArray[np.bool_]


def refine(problem: Problem, codes: Floats, along: Floats, energy: Floats) -> None:
    """Change codes (n, groups), whole numbers, and their sums (groups,) in place."""
    count, groups = codes.shape
    elements = np.arange(count)[:, None]
    behind, passes = np.zeros(groups, np.intp), np.zeros(groups, np.intp)
    tried, trials = np.arange(groups), _try_all(problem, codes, along, energy)
    while True:
        (found,) = np.logical_or.reduce(trials.better, axis=0).nonzero()
        if len(found) == 0:
            return
        tried, better = tried[found], trials.better.take(found, 1)
        ahead = better & (elements >= behind[tried])
        same_pass = ahead.any(0)
        passes[tried] += ~same_pass
        element = np.where(same_pass, ahead.argmax(0), better.argmax(0))

        going = passes[tried] < PASSES
        tried, found, element = tried[going], found[going], element[going]
        code = trials.codes[element, found]
        codes[element, tried] = read_as_bytes(code) if problem.low is None else code
        along[tried], energy[tried] = trials.along[element, found], trials.energy[element, found]
        behind[tried] = element + 1
        trials = _try_all(problem.take(tried), codes.take(tried, 1), along[tried], energy[tried])


def _try_all(problem: Problem, codes: Floats, along: Floats, energy: Floats) -> _Trials:
    """The best code for each element by itself, all others of its group as they are."""
    x, weights, weighted, low, high = problem
    product = weighted * codes
    rest = along - product
    better = rest > 0
    np.multiply(weights, codes, out=product)
    product *= codes
    rest_energy = energy - product
    if low is None:
        better &= rest_energy > 0
    code = x * rest_energy
    code /= rest
    rounded_by_bits(code, low, high)
    better &= code != codes

    rest += np.multiply(weighted, code, out=product)
    np.multiply(weights, code, out=product)
    product *= code
    rest_energy += product
    if low is not None:
        better &= rest_energy > 0
    np.multiply(rest, rest, out=product)
    product *= energy
    better &= product > along * along * rest_energy
    return _Trials(code, rest, rest_energy, better)
