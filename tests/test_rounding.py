"""Adding or multiplying 16-bit values directly, and in fp32 with a second rounding, give the same bits.

The kernels do the first (``plus_words`` and ``times_words`` with PTX), references and the portable bodies the second. The GPU's
instructions round once by definition, so this compares exact rational arithmetic, rounded once, with torch's fp32.
"""

from __future__ import annotations

from fractions import Fraction

import numpy
import pytest
import torch

# Bits of precision, exponent of the least subnormal, first value that rounds to infinity.
FORMATS = {
    torch.bfloat16: (8, -133, Fraction(2) ** 128 - Fraction(2) ** 119),
    torch.float16: (11, -24, Fraction(65520)),
}


def rounded_once(value: Fraction, dtype: torch.dtype) -> float:
    """``value`` to the nearest value of ``dtype``, ties to even; zeros without a sign."""
    precision, least, overflow = FORMATS[dtype]
    size = abs(value)
    if size >= overflow:
        return float("inf") if value > 0 else float("-inf")
    if size == 0:
        return 0.0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    step = Fraction(2) ** max(exponent - precision + 1, least)
    # Python rounds fractions to even.
    return float(round(value / step) * step)


@pytest.mark.parametrize("operation", ("plus", "times"))
@pytest.mark.parametrize("dtype", tuple(FORMATS))
def test_one_rounding_and_two_give_the_same_bits(dtype: torch.dtype, operation: str) -> None:
    generator = numpy.random.default_rng()
    bits = torch.from_numpy(generator.integers(0, 1 << 16, (2, 6000), dtype=numpy.uint16).view(numpy.int16))
    # Half of the pairs are near each other in size: sums that cancel, and ties.
    bits[1, ::2] = bits[0, ::2] ^ torch.from_numpy(generator.integers(0, 1 << 10, 3000).astype(numpy.int16))
    # A quarter of the products end among the subnormal values.
    small = torch.from_numpy(generator.uniform(0.25, 8.0, 1500)) * 2.0 ** FORMATS[dtype][1]
    a, b = bits.view(dtype)
    a, b = a.clone(), b.clone()
    if operation == "times":
        b[::4] = 1.0 + torch.rand(1500).to(dtype)
        a[::4] = small.to(dtype)
        a[1::4] = (2.0 ** (FORMATS[dtype][1] // 2) * (1 + torch.rand(1500))).to(dtype)
        b[1::4] = (2.0 ** (FORMATS[dtype][1] // 2) * (1 + torch.rand(1500))).to(dtype)
    finite = torch.isfinite(a) & torch.isfinite(b)
    a, b = a[finite], b[finite]
    assert len(a) > 3000
    twice = (a.float() + b.float() if operation == "plus" else a.float() * b.float()).to(dtype)
    for x, y, got in zip(a.tolist(), b.tolist(), twice.tolist(), strict=True):
        exact = Fraction(x) + Fraction(y) if operation == "plus" else Fraction(x) * Fraction(y)
        assert got == rounded_once(exact, dtype), (x, y)
