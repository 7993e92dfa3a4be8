"""Sums: over the lanes of a group, and over the ranks."""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .packing import pack, plus, plus_words, positive_zeros, times, unpack


@triton.jit
def lane_sums_of_squares(values):
    """Sum of squares of the values of each lane, in pairs."""
    s = times(values, values)
    if len(s) == 8:
        return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))
    else:
        return (s[0] + s[1]) + (s[2] + s[3])


@triton.constexpr_function
def bits_of(value):
    """A number between 0 and 1 as PTX writes an fp64 constant: exponent and fraction in hexadecimal."""
    fraction, exponent = value.hex()[4:].split("p")  # of 0x1.(fraction)p(exponent)
    return f"{int(exponent) + 1023:03x}{fraction}"


@triton.constexpr_function
def over_lanes_asm(steps, groups_a_step, whole, over):
    """PTX that sums ``steps`` values a thread over groups of 128 threads; ``whole``: and the groups in fp64.

    Every thread gets the sum over all groups, or, without ``whole``, thread ``t`` that of group ``t`` modulo
    :func:`over_lanes_period`. ``over``, where it is not 0, is H, by which the sum is divided in fp64: a mean, rounded once. One
    tree a warp, the sums of all warps through shared memory, four of them a group. Triton's own reduction goes through shared
    memory three times, with six barriers.
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
    if whole and (groups > 1 or over):
        lines += ["cvt.f64.f32 %d, %v;"]
        for distance in (8, 4, 2, 1):
            if distance < period:
                lines += ["mov.b64 {%lo, %hi}, %d;"]
                lines += [f"shfl.sync.bfly.b32 {half}, {half}, {distance}, 31, 0xffffffff;" for half in ("%lo", "%hi")]
                lines += ["mov.b64 %e, {%lo, %hi};", "add.rn.f64 %d, %d, %e;"]
        if over:
            lines += [f"mul.rn.f64 %d, %d, 0D{bits_of(1 / over)};"]
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
def over_lanes(values, GROUPS_A_STEP: tl.constexpr, WHOLE: tl.constexpr, OVER: tl.constexpr = 0):
    """See :func:`over_lanes_asm`: a tensor over lanes. ``values``: one fp32 tensor over lanes a step."""
    return tl.inline_asm_elementwise(
        over_lanes_asm(len(values), GROUPS_A_STEP, WHOLE, OVER),
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


@triton.jit
def sum_over_ranks(words, C: tl.constexpr, S: tl.constexpr):
    """Words of the fp32 sum in rank order, rounded once to the dtype; a zero is +0.0, whatever signs it was made of.

    Of a half of a wide one two words, whose zeros have signs still; see :func:`both_halves`.
    """
    WORLD: tl.constexpr = S.world
    total = (words[0], words[1], words[2], words[3])
    if C.wide_sum:
        values = unpack(total, tl.float32)
        for r in tl.static_range(1, WORLD):
            values = plus(
                values, unpack((words[4 * r], words[4 * r + 1], words[4 * r + 2], words[4 * r + 3]), tl.float32)
            )
        return pack(values, C.dtype, S.ptx)
    else:
        if WORLD == 2:
            total = plus_words(total, (words[4], words[5], words[6], words[7]), C.dtype, S.ptx)
        else:
            values = unpack(total, C.dtype)
            for r in tl.static_range(1, WORLD):
                values = plus(
                    values, unpack((words[4 * r], words[4 * r + 1], words[4 * r + 2], words[4 * r + 3]), C.dtype)
                )
            total = pack(values, C.dtype, S.ptx)
        return positive_zeros(total, C.dtype, S.ptx)


@triton.jit
def both_halves(first, other, C: tl.constexpr, S: tl.constexpr):
    """Words of a wide sum from those of the halves of each lane's values; a zero is +0.0."""
    return positive_zeros(first + other, C.dtype, S.ptx)
