"""Orthogonal transforms that a seed makes: Hadamard matrices of most orders, and random ones.

A Hadamard matrix H has entries of +-1 and H H^T = n I; divided by sqrt(n) it is orthogonal and
spreads every coordinate evenly over all others. Orders that are powers of two are Sylvester's.
Orders q + 1 (q = 3 mod 4) and 2 (q + 1) (q = 1 mod 4) are Paley's, for any prime power q (R. E. A.
C. Paley, On orthogonal matrices, 1933); their Kronecker products with Sylvester's give the widths
of real models, such as 768 = 12 * 64 and 11008 = 344 * 32. Where there is none, a random orthogonal
matrix takes its place.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor


def hadamard_matrix(order: int) -> Tensor | None:
    """A Hadamard matrix of that order, entries +-1, float64; None where no construction here fits.

    Of all factorizations into Paley's and Sylvester's, that with the smallest Paley matrix.
    """
    core, doublings = _factors(order)
    if core is None:
        return None
    matrix = torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley(core)
    assert matrix is not None
    for _ in range(doublings):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@cache
def _factors(order: int) -> tuple[int | None, int]:
    """The order of the Paley matrix, 1 for none, and how often it is doubled."""
    odd, doublings = order, 0
    while odd % 2 == 0 and odd:
        odd, doublings = odd // 2, doublings + 1
    if odd == 1:
        return 1, doublings
    for used in range(2, doublings + 1):
        if _paley(odd * 2**used) is not None:
            return odd * 2**used, doublings - used
    return None, 0


def has_hadamard(order: int) -> bool:
    """Whether `hadamard_matrix` has one of that order."""
    return _factors(order)[0] is not None


def rotate(x: Tensor) -> Tensor:
    """x (..., n) times H^T / sqrt(n) for the Hadamard matrix H of order n; type preserved.

    It takes n log n operations where n is a power of two, and few more elsewhere.

    Raises:
        ValueError: there is no Hadamard matrix of order n.
    """
    return _transform(x, transpose=False)


def rotate_back(x: Tensor) -> Tensor:
    """The inverse of `rotate`."""
    return _transform(x, transpose=True)


def _transform(x: Tensor, *, transpose: bool) -> Tensor:
    order = x.shape[-1]
    core, doublings = _factors(order)
    if core is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    values = x.reshape(-1, 2**doublings, core)
    half = 1
    while half < 2**doublings:
        # Sylvester's matrix is its own transpose.
        pairs = values.reshape(len(values), 2**doublings // (2 * half), 2, half, core)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        values = torch.stack([low + high, low - high], 2)
        half *= 2
    values = values.reshape(-1, 2**doublings, core)
    if core > 1:
        matrix = _paley(core)
        assert matrix is not None
        matrix = matrix.to(x.device, x.dtype)
        values = values @ (matrix if transpose else matrix.T)
    rotated: Tensor = (values / order**0.5).reshape(x.shape)
    return rotated


def random_signs(count: int, seed: int) -> Tensor:
    """`count` values of +-1, float64, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count,), generator=generator).double() * 2 - 1


def random_orthogonal(order: int, seed: int) -> Tensor:
    """A matrix drawn evenly from all orthogonal ones (Haar), float64, the same for the same seed.

    The QR decomposition of a Gaussian matrix with the signs of R's diagonal moved into Q
    (F. Mezzadri, How to generate random matrices from the classical compact groups, 2007).
    """
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(order, order, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    orthogonal: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return orthogonal


@cache
def _paley(order: int) -> Tensor | None:
    """Paley's matrix of that order, of his first or second construction; None if there is none."""
    if order % 4:
        return None
    squares = _character(order - 1) if (order - 1) % 4 == 3 else None
    if squares is not None:
        skew = _bordered(squares, -1)
        return skew + torch.eye(order, dtype=torch.float64)
    squares = _character(order // 2 - 1) if (order // 2 - 1) % 4 == 1 else None
    if squares is None:
        return None
    conference = _bordered(squares, 1)
    ones = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(conference, ones) + torch.kron(
        torch.eye(order // 2, dtype=torch.float64), diagonal
    )


def _bordered(character: Tensor, left: int) -> Tensor:
    """The Jacobsthal matrix of a field with a row of ones above it and a column beside it."""
    order = len(character) + 1
    matrix = torch.zeros(order, order, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1, left, character
    return matrix


def _character(q: int) -> Tensor | None:
    """chi(a - b) for all elements a, b of the field of q elements; None if q is no prime power.

    chi is 1 for squares, -1 for others, 0 for 0.
    """
    prime = next((p for p in range(2, q + 1) if q % p == 0), 0)
    degree = 0
    rest = q
    while prime and rest % prime == 0:
        rest, degree = rest // prime, degree + 1
    if rest != 1 or not degree:
        return None
    elements = list(product(range(prime), repeat=degree))
    modulus = _irreducible(prime, degree)
    squares = {_multiply(each, each, modulus, prime) for each in elements}
    zero = (0,) * degree
    chi = {each: 0 if each == zero else (1 if each in squares else -1) for each in elements}
    rows = [
        [chi[tuple((x - y) % prime for x, y in zip(one, other, strict=True))] for other in elements]
        for one in elements
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _multiply(
    one: tuple[int, ...], other: tuple[int, ...], modulus: tuple[int, ...], prime: int
) -> tuple[int, ...]:
    """The product of two polynomials, lowest power first, modulo a monic one of their length."""
    degree = len(one)
    product_ = [0] * (2 * degree - 1)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            product_[i + j] += a * b
    for power in range(2 * degree - 2, degree - 1, -1):
        for i in range(degree):
            product_[power - degree + i] -= product_[power] * modulus[i]
    return tuple(each % prime for each in product_[:degree])


@cache
def _irreducible(prime: int, degree: int) -> tuple[int, ...]:
    """The lower coefficients of a monic polynomial that is no product of smaller ones.

    Found by trial: the polynomials modulo it are a field if no product of two that are not 0 is 0,
    for which it is enough that every element's powers come back to it after prime**degree.
    """
    if degree == 1:
        return (0,)
    for candidate in product(range(prime), repeat=degree):
        if _is_field(candidate, prime):
            return candidate
    raise AssertionError("every finite field has such a polynomial")


def _is_field(modulus: tuple[int, ...], prime: int) -> bool:
    """Whether x generates all q - 1 elements that are not 0: then the modulus is irreducible."""
    degree = len(modulus)
    x = tuple(int(i == 1) for i in range(degree))
    one = tuple(int(i == 0) for i in range(degree))
    power, order = x, 1
    while power != one:
        if not any(power) or order > prime**degree:
            return False
        power, order = _multiply(power, x, modulus, prime), order + 1
    return bool(order + 1 == prime**degree)
