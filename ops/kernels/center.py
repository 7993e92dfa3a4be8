"""Mean, variance and the values around the mean: what a LayerNorm takes of a row.

Two passes over values in registers: first the mean, then the sum of squared differences from it. The error stays that of one
rounding for each difference, however large the mean is; the mean of squares less the square of the mean would lose all digits
that the two share. Both sums are defined by groups, as the sum of squares of :mod:`.epilogue`. Sums of values may cancel, so
that their fp64 sum need not be exact: all geometries add them in one order.
"""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: PLR1714, RUF005
from __future__ import annotations

import triton
import triton.language as tl

from .packing import over_scalar, times_scalar
from .reduction import lane_sums_of_squares
from .rows import held_values, lane_elements
from .split_rows import mean_of


@triton.jit
def lane_sums(s):
    """Sum of the values of each lane, in pairs."""
    if len(s) == 8:
        return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))
    else:
        return (s[0] + s[1]) + (s[2] + s[3])


@triton.jit
def around(values, middle):
    """Each value less the mean of its row."""
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (values[i] - middle,)
    return out


@triton.jit
def mean_of_values(held, part, row, state, phase, watch, C: tl.constexpr, S: tl.constexpr):
    """Mean of a row from what this program holds of its groups; elements beyond the row are zero."""
    STEPS: tl.constexpr = S.steps
    sums = ()
    for i in tl.static_range(STEPS):
        sums = sums + (lane_sums(held_values(held[i], C)),)
    return mean_of(sums, part, row, state, phase, watch, C, S, True)


@triton.jit
def variance_of(held, middle, part, row, state, phase, watch, C: tl.constexpr, S: tl.constexpr):
    """Mean of the squared differences from ``middle``, over H."""
    STEPS: tl.constexpr = S.steps
    sums = ()
    for i in tl.static_range(STEPS):
        squares = lane_sums_of_squares(around(held_values(held[i], C), middle))
        if S.split * S.steps * S.lanes * C.values != C.hidden:
            # Whole lanes lie within the row or beyond it, where the difference is not zero.
            squares = tl.where(lane_elements(part, i, C, S)[1] != 0, squares, 0.0)
        sums = sums + (squares,)
    return mean_of(sums, part, row, state, phase, watch, C, S)


@triton.jit
def normalized_around(values, middle, variance, eps, C: tl.constexpr):
    """fp32 values of one group around the mean of their row, over its standard deviation."""
    v = variance + eps
    values = around(values, middle)
    if C.root == "rsqrt" or C.root == "pow":
        return times_scalar(values, tl.rsqrt(v))
    elif C.root == "div_sqrt":
        return over_scalar(values, tl.math.sqrt_rn(v))
    else:
        return times_scalar(values, tl.math.div_rn(1.0, tl.math.sqrt_rn(v)))
