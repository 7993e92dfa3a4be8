"""Between 32-bit words and fp32 values: what dtypes, rounding and packing mean to the kernels.

A lane holds four words: eight bf16 or fp16 values, or four fp32 values, kept as separate tensors over lanes, so that
the order of additions within a lane is written in the code.
"""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005, PLR0124
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack(words, DTYPE: tl.constexpr):
    """The fp32 values of four words, in memory order."""
    values = ()
    for i in tl.static_range(4):
        w = words[i]
        if tl.float32 == DTYPE:
            values = values + (w.to(tl.float32, bitcast=True),)
        elif tl.bfloat16 == DTYPE:
            # The low half is the first value: little endian. bf16 is the upper half of an fp32.
            values = values + ((w << 16).to(tl.float32, bitcast=True), (w & -65536).to(tl.float32, bitcast=True))
        else:
            low = (w & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            high = ((w >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            values = values + (low, high)
    return values


@triton.jit
def half_bits(value, DTYPE: tl.constexpr):
    """The 16 bits of ``value`` rounded to nearest even, as the low half of an int32 whose upper half is zero."""
    if tl.bfloat16 == DTYPE:
        # Written out: the interpreter rounds fp32 to bf16 half away from zero.
        bits = value.to(tl.int32, bitcast=True)
        bits = tl.where(value != value, 0x7FFF0000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16) & 0xFFFF
    else:
        return value.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def pack(values, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Round fp32 values to ``DTYPE`` (nearest even) and pack them into four words; four values of 16 bits into two."""
    words = ()
    for i in tl.static_range(4 if tl.float32 == DTYPE else len(values) // 2):
        if tl.float32 == DTYPE:
            words = words + (values[i].to(tl.int32, bitcast=True),)
        elif PTX:
            # Left to itself LLVM converts most values one by one, at a quarter of the rate of pairs.
            words = words + (
                tl.inline_asm_elementwise(
                    "cvt.rn.bf16x2.f32 $0, $2, $1;" if tl.bfloat16 == DTYPE else "cvt.rn.f16x2.f32 $0, $2, $1;",
                    "=r,f,f",
                    [values[2 * i], values[2 * i + 1]],
                    dtype=tl.int32,
                    is_pure=True,
                    pack=1,
                ),
            )
        else:
            words = words + (half_bits(values[2 * i], DTYPE) | (half_bits(values[2 * i + 1], DTYPE) << 16),)
    return words


@triton.jit
def rounded(values, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """fp32 values after rounding to ``DTYPE``."""
    if tl.float32 == DTYPE:
        return values
    else:
        return unpack(pack(values, DTYPE, PTX), DTYPE)


@triton.constexpr_function
def pairwise_asm(operation, dtype):
    """PTX for two 16-bit values at once. bf16 by a fused multiply-add with 1 or -0: sm_80 has nothing else; same bits."""
    if dtype == tl.float16:
        return {"plus": "add.rn.f16x2 $0, $1, $2;", "times": "mul.rn.f16x2 $0, $1, $2;"}[operation]
    if operation == "plus":
        return "{ .reg .b32 %one; mov.b32 %one, 0x3F803F80; fma.rn.bf16x2 $0, $1, %one, $2; }"
    return "{ .reg .b32 %zero; mov.b32 %zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, %zero; }"


@triton.jit
def pairwise(a, b, OPERATION: tl.constexpr, DTYPE: tl.constexpr):
    """``a`` plus or times ``b``, tuples of words of a 16-bit dtype, in that dtype."""
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (
            tl.inline_asm_elementwise(
                pairwise_asm(OPERATION, DTYPE), "=r,r,r", [a[i], b[i]], dtype=tl.int32, is_pure=True, pack=1
            ),
        )
    return out


@triton.jit
def plus_words(a, b, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Words of ``a + b`` rounded to ``DTYPE``, from words.

    Pairs of 16-bit values are added as such, one instruction instead of seven a word. Adding in fp32 and rounding gives the
    same bits: rounding twice is harmless where the first format has at least two bits more than twice the precision of the second
    (Figueroa, "When is double rounding innocuous?", 1995), and fp32 has 24 where bf16 has 8 and fp16 has 11.
    """
    if PTX and tl.float32 != DTYPE:
        return pairwise(a, b, "plus", DTYPE)
    else:
        return pack(plus(unpack(a, DTYPE), unpack(b, DTYPE)), DTYPE, PTX)


@triton.jit
def times_words(a, b, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Words of ``a * b`` rounded to ``DTYPE``, from words; see :func:`plus_words`."""
    if PTX and tl.float32 != DTYPE:
        return pairwise(a, b, "times", DTYPE)
    else:
        return pack(times(unpack(a, DTYPE), unpack(b, DTYPE)), DTYPE, PTX)


@triton.jit
def positive_zeros(words, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """``words + 0.0``: no zero keeps a sign."""
    zero = words[0] * 0
    return plus_words(words, (zero, zero, zero, zero), DTYPE, PTX)


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
