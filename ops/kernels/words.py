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
def half_bits(value, DTYPE: tl.constexpr):
    """The 16 bits of ``value`` rounded to nearest even, as the low half of an int32 whose upper half is zero."""
    if DTYPE == tl.bfloat16:
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
        elif PTX:
            # Left to itself LLVM converts most values one by one, at a quarter of the rate of pairs.
            words = words + (
                tl.inline_asm_elementwise(
                    "cvt.rn.bf16x2.f32 $0, $2, $1;" if DTYPE == tl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;",
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
    if DTYPE == tl.float32:
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
    if PTX and DTYPE != tl.float32:
        return pairwise(a, b, "plus", DTYPE)
    else:
        return pack(plus(unpack(a, DTYPE), unpack(b, DTYPE)), DTYPE, PTX)


@triton.jit
def times_words(a, b, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Words of ``a * b`` rounded to ``DTYPE``, from words; see :func:`plus_words`."""
    if PTX and DTYPE != tl.float32:
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


@triton.jit
def lane_sums_of_squares(values):
    """Sum of squares of the values of each lane, in pairs."""
    s = times(values, values)
    if len(s) == 8:
        return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))
    else:
        return (s[0] + s[1]) + (s[2] + s[3])


@triton.constexpr_function
def over_lanes_asm(steps, groups_a_step, whole):
    """PTX that sums ``steps`` values a thread over groups of 128 threads; ``whole``: and the groups in fp64.

    Every thread gets the sum over all groups, or, without ``whole``, thread ``t`` that of group ``t`` modulo
    :func:`over_lanes_period`. One tree a warp, the sums of all warps through shared memory, four of them a group. Triton's own
    reduction goes through shared memory three times, with six barriers.
    """
    groups, period = steps * groups_a_step, over_lanes_period(steps, groups_a_step)
    lines = ["{", f".shared .align 16 .b32 sums[{4 * groups}];", ".reg .pred %p;", ".reg .b64 %d, %e;"]
    lines += [".reg .b32 %v, %o, %a, %b, %c, %t, %s, %r, %lo, %hi;"]
    lines += [
        "mov.u32 %t, %tid.x;",
        "mov.u32 %s, sums;",
        "shr.u32 %r, %t, 5;",
        "shl.b32 %r, %r, 2;",
        "add.u32 %r, %r, %s;",
    ]
    lines += ["and.b32 %o, %t, 31;", "setp.eq.u32 %p, %o, 0;"]
    lines += ["bar.sync 0;"]  # all warps have read what a previous row left
    for step in range(steps):
        lines += [f"mov.b32 %v, ${step + 1};"]
        for distance in (16, 8, 4, 2, 1):
            lines += [f"shfl.sync.bfly.b32 %o, %v, {distance}, 31, 0xffffffff;", "add.rn.f32 %v, %v, %o;"]
        lines += [f"@%p st.shared.b32 [%r+{16 * groups_a_step * step}], %v;"]
    lines += ["bar.sync 0;", f"and.b32 %o, %t, {period - 1};", f"setp.lt.u32 %p, %o, {groups};"]
    lines += ["shl.b32 %o, %o, 4;", "add.u32 %s, %s, %o;"]
    lines += [f"mov.b32 {one}, 0;" for one in ("%v", "%a", "%b", "%c")]
    lines += ["@%p ld.shared.v4.b32 {%v, %a, %b, %c}, [%s];"]
    lines += ["add.rn.f32 %v, %v, %b;", "add.rn.f32 %a, %a, %c;", "add.rn.f32 %v, %v, %a;"]
    if whole and groups > 1:
        lines += ["cvt.f64.f32 %d, %v;"]
        for distance in (8, 4, 2, 1):
            if distance < period:
                lines += ["mov.b64 {%lo, %hi}, %d;"]
                lines += [f"shfl.sync.bfly.b32 {half}, {half}, {distance}, 31, 0xffffffff;" for half in ("%lo", "%hi")]
                lines += ["mov.b64 %e, {%lo, %hi};", "add.rn.f64 %d, %d, %e;"]
        lines += ["cvt.rn.f32.f64 %v, %d;"]
    return "\n".join([*lines, "mov.b32 $0, %v;", "}"])


@triton.constexpr_function
def over_lanes_period(steps, groups_a_step):
    """The power of two that is not below the number of groups."""
    return 1 << (steps * groups_a_step - 1).bit_length()


@triton.constexpr_function
def over_lanes_constraints(steps):
    return "=f" + ",f" * steps


@triton.jit
def over_lanes(values, GROUPS_A_STEP: tl.constexpr, WHOLE: tl.constexpr):
    """See :func:`over_lanes_asm`: a tensor over lanes. ``values``: one fp32 tensor over lanes a step."""
    return tl.inline_asm_elementwise(
        over_lanes_asm(len(values), GROUPS_A_STEP, WHOLE),
        over_lanes_constraints(len(values)),
        values,
        dtype=tl.float32,
        is_pure=False,  # all threads meet in it
        pack=1,
    )


@triton.jit
def sums_over_lanes(values, GROUPS: tl.constexpr):
    """The portable body for one step: the sums of ``GROUPS`` groups of 128 lanes, a scalar for one group."""
    if GROUPS == 1:
        return tl.sum(values, axis=0)
    else:
        return tl.sum(tl.reshape(values, (GROUPS, 128)), axis=1)
