"""Between 32-bit words and fp32 values: what dtypes, rounding and packing mean to the kernels.

A lane holds four words: eight bf16 or fp16 values, or four fp32 values, kept as separate tensors over lanes, so that
the order of additions within a lane is written in the code.
"""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005, SIM300, PLR0124
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack(words, DTYPE: tl.constexpr):
    """The fp32 values of four words, in memory order."""
    values = ()
    for i in tl.static_range(4):
        w = words[i]
        if DTYPE == tl.float32:
            values = values + (w.to(tl.float32, bitcast=True),)
        elif DTYPE == tl.bfloat16:
            # The low half is the first value: little endian. bf16 is the upper half of an fp32.
            values = values + ((w << 16).to(tl.float32, bitcast=True), (w & -65536).to(tl.float32, bitcast=True))
        else:
            low = (w & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            high = ((w >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            values = values + (low, high)
    return values


@triton.jit
def half_bits(value, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The 16 bits of ``value`` rounded to nearest even, as the low half of an int32 whose upper half is zero."""
    if DTYPE == tl.bfloat16 and not PTX:
        # Written out: the interpreter rounds fp32 to bf16 half away from zero.
        bits = value.to(tl.int32, bitcast=True)
        bits = tl.where(value != value, 0x7FFF0000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16) & 0xFFFF
    else:
        return value.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def pack(values, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Round fp32 values to ``DTYPE`` (nearest even) and pack them into four words."""
    words = ()
    for i in tl.static_range(4):
        if DTYPE == tl.float32:
            words = words + (values[i].to(tl.int32, bitcast=True),)
        else:
            low = half_bits(values[2 * i], DTYPE, PTX)
            high = half_bits(values[2 * i + 1], DTYPE, PTX)
            words = words + (low | (high << 16),)
    return words


@triton.jit
def rounded(values, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """fp32 values after rounding to ``DTYPE``."""
    if DTYPE == tl.float32:
        return values
    else:
        return unpack(pack(values, DTYPE, PTX), DTYPE)


@triton.jit
def plus(a, b):
    """Elementwise ``a + b`` of two tuples."""
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def times(a, b):
    """Elementwise ``a * b`` of two tuples."""
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (a[i] * b[i],)
    return out


@triton.jit
def plus_scalar(a, s):
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (a[i] + s,)
    return out


@triton.jit
def times_scalar(a, s):
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (a[i] * s,)
    return out


@triton.jit
def over_scalar(a, s):
    """IEEE division: Triton's ``/`` is approximate on GPUs."""
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (tl.math.div_rn(a[i], s),)
    return out


@triton.jit
def sums_of_squares(values, GROUPS: tl.constexpr):
    """Sums of squares of ``GROUPS`` groups of 128 lanes, each in a fixed order: pairs within a lane, then one tree over the
    lanes. A scalar for one group."""
    s = times(values, values)
    if len(s) == 8:
        lane = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))
    else:
        lane = (s[0] + s[1]) + (s[2] + s[3])
    if GROUPS == 1:
        return tl.sum(lane, axis=0)
    else:
        return tl.sum(tl.reshape(lane, (GROUPS, 128)), axis=1)
