"""E2M1, the number of 4 bits, and the scales that a block of such numbers shares: E8M0 and E4M3.

E2M1 is the element of OCP's microscaling formats (MX v1.0, section 5.3.3): a sign, 2 bits of
exponent, 1 of mantissa. MXFP4 has blocks of 32 with powers of two, E8M0, as scales (section 6.3);
NVFP4 has blocks of 16 with scales in E4M3 and one more scale above them (NVIDIA, arXiv 2509.25149).
Weights and inputs are rounded by the same rules.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from pytest_qlab.formats.float8 import E4M3
from pytest_qlab.formats.float8 import LARGEST as LARGEST_E4M3

ScaleRule = Literal["floor", "ceil", "even"]
BITS = 4
MXFP4_BLOCK = 32
NVFP4_BLOCK = 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What codes 0 .. 7 stand for; 8 .. 15 are their negatives."""
LARGEST = E2M1[-1]
E8M0_BIAS = 127
LARGEST_E8M0 = 254
E8M0_NO_NUMBER = 255
SMALLEST_E4M3 = 2.0**-9


def e2m1_values(codes: Tensor) -> Tensor:
    """What codes 0 .. 15 stand for, float32."""
    return _table(codes.device)[codes.to(torch.int64)]


@cache
def _table(device: torch.device) -> Tensor:
    """Kept on each device, since copying it there makes a GPU wait."""
    with torch.inference_mode(False):
        return torch.tensor([*E2M1, *(-value for value in E2M1)], device=device)


def e2m1_codes(values: Tensor) -> Tensor:
    """Codes of the E2M1 numbers nearest to `values`, uint8; ties go to the even code.

    Beyond 6 they saturate. The sign is kept where a value is rounded to zero, as by a conversion.
    """
    size = values.abs().clamp_(max=LARGEST)
    # Spacing is 0.5 below 2, 1 below 4, then 2; `round` takes ties to even, which is the even code.
    steps = torch.where(size < 2, (2 * size).round(), size.round() + 2)
    steps = torch.where(size < 4, steps, (size / 2).round() + 4)
    return steps.to(torch.uint8) | values.signbit().to(torch.uint8) << 3


def e8m0_values(exponents: Tensor) -> Tensor:
    """2**(exponent - 127) of biased exponents 0 .. 254, uint8, to the bit: float32; NaN of 255."""
    bits = exponents.to(torch.int32) << 23
    # The least, 2**-127, has no exponent of its own in float32: it is subnormal.
    values = torch.where(bits == 0, 1 << 22, bits).view(torch.float32)
    return values.masked_fill(exponents == E8M0_NO_NUMBER, torch.nan)


def e8m0_scales(largest: Tensor, rule: ScaleRule) -> Tensor:
    """Biased exponents of the scales of blocks, uint8, from their largest magnitudes, float32.

    Args:
        largest: of any shape; where it is not finite, the scale is no number.
        rule: `floor`: the exponent of the largest magnitude less that of the largest element, so
            that what is beyond 6 times the scale saturates; `ceil`: the least power of two with
            which nothing does; `even`: the one with which the largest magnitude, rounded to two
            bits, does not.
    """
    fraction, exponent = torch.frexp(largest)  # the fraction is in [0.5, 1)
    exponent = exponent - 3
    if rule == "ceil":
        exponent = exponent + (fraction > LARGEST / 8).to(exponent.dtype)
    elif rule == "even":
        # From 7 times the scale on: 8 is as near as 6, and then the even one.
        exponent = exponent + (fraction >= 7 / 8).to(exponent.dtype)
    exponent = exponent.masked_fill(largest == 0, -E8M0_BIAS)
    stored = (exponent + E8M0_BIAS).clamp(0, LARGEST_E8M0).to(torch.uint8)
    return stored.masked_fill(~largest.isfinite(), E8M0_NO_NUMBER)


def e4m3_scales(wanted: Tensor) -> Tensor:
    """Scales rounded to float8_e4m3fn, ties to even; what is beyond 448 saturates.

    Never to 0, which would lose the block.
    """
    return wanted.to(torch.float32).clamp(SMALLEST_E4M3, LARGEST_E4M3).to(E4M3)


def scale_above(largest: Tensor, top: float = LARGEST_E4M3) -> Tensor:
    """The scale above E4M3 scales with which that of the largest magnitude is `top`: float32.

    Never subnormal, where little of it would be left.
    """
    tiny = torch.finfo(torch.float32).tiny
    return (largest / (top * LARGEST)).clamp(min=tiny).to(torch.float32)
