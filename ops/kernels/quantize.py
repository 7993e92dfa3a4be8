"""The quantized epilogue: amax of a row or of 128 columns, the scale, fp8 bytes. It begins where the norm has been rounded.

``C.quant`` is a :class:`.quant_facts.Quant`. A largest value travels as the bits of its absolute value: as integers they are
ordered like the values, and NaN is above all, so it is never lost as in a maximum of floats.
"""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from .fp8 import pack_fp8, store_fp8
from .memory import NAN_WORD
from .packing import half_bits, over_scalar, rounded, times_scalar
from .rows import lane_elements, load_words, values_of
from .split_rows import exchange_tops

_NAN: tl.constexpr = tl.constexpr(NAN_WORD)


@triton.jit
def top_of(values, active):
    """The bits of the largest absolute value of each lane; 0 for lanes beyond the row."""
    top = values[0].to(tl.int32, bitcast=True) & 0x7FFFFFFF
    for i in tl.static_range(1, len(values)):
        top = tl.maximum(top, values[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.where(active != 0, top, 0)


@triton.constexpr_function
def over_neighbors_asm(lanes):
    """PTX: the maximum over so many neighboring threads of a warp, a power of two."""
    lines = ["{", ".reg .b32 %o;", "mov.b32 $0, $1;"]
    distance = lanes // 2
    while distance:
        lines += [f"shfl.sync.bfly.b32 %o, $0, {distance}, 31, 0xffffffff;", "max.u32 $0, $0, %o;"]
        distance //= 2
    return "\n".join([*lines, "}"])


@triton.constexpr_function
def over_all_asm(lanes):
    """PTX: the maximum over all threads of a program, one a lane: within each warp, then over what the warps left."""
    warps = lanes // 32
    lines = ["{", f".shared .align 16 .b32 tops[{warps}];", ".reg .pred %p;", ".reg .b32 %v, %t, %l, %s;"]
    lines += ["redux.sync.max.u32 %v, $1, 0xffffffff;", "mov.u32 %t, %tid.x;", "and.b32 %l, %t, 31;"]
    lines += ["mov.u32 %s, tops;", "shr.u32 %t, %t, 5;", "shl.b32 %t, %t, 2;", "add.u32 %t, %t, %s;"]
    lines += ["bar.sync 0;"]  # all warps have read what a previous row left
    lines += ["setp.eq.u32 %p, %l, 0;", "@%p st.shared.b32 [%t], %v;", "bar.sync 0;"]
    lines += [f"setp.lt.u32 %p, %l, {warps};", "shl.b32 %l, %l, 2;", "add.u32 %s, %s, %l;", "mov.u32 %v, 0;"]
    lines += ["@%p ld.shared.b32 %v, [%s];", "redux.sync.max.u32 $0, %v, 0xffffffff;", "}"]
    return "\n".join(lines)


@triton.jit
def over_columns(top, C: tl.constexpr, S: tl.constexpr):
    """The maximum over the lanes of each 128 columns, in all of them."""
    LANES: tl.constexpr = 128 // C.values
    if S.ptx:
        return tl.inline_asm_elementwise(
            over_neighbors_asm(LANES), "=&r,r", [top], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        ALL: tl.constexpr = S.lanes
        GROUPS: tl.constexpr = ALL // LANES
        groups = tl.max(tl.reshape(top, (GROUPS, LANES)), axis=1)
        return tl.reshape(tl.zeros((GROUPS, LANES), tl.int32) + groups[:, None], (ALL,))


@triton.jit
def over_row(top, part, row, state, phase, watch, C: tl.constexpr, S: tl.constexpr):
    """The maximum over the whole row, in every lane of every program that holds a part of it."""
    if S.ptx:
        top = tl.inline_asm_elementwise(over_all_asm(S.lanes), "=r,r", [top], dtype=tl.int32, is_pure=False, pack=1)
    else:
        top = top * 0 + tl.max(top, axis=0)
    if S.split > 1:
        top = exchange_tops(top, part, row, state, phase, watch, S)
    return top


@triton.jit
def rounded_alone(value, DTYPE: tl.constexpr):
    """An fp32 value after rounding to a dtype of 16 bits."""
    bits = half_bits(value, DTYPE)
    if tl.bfloat16 == DTYPE:
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def in_dtype_of_scale(value, C: tl.constexpr):
    Q: tl.constexpr = C.quant
    if Q.rounds:
        return rounded_alone(value, C.out_dtype)
    else:
        return value


@triton.jit
def next_power_of_two(scale, LOG2: tl.constexpr):
    """The power of two that is not below a scale.

    With ``LOG2`` it is ``exp2(ceil(log2(scale)))`` with a correctly rounded log2, which is ``k`` itself for a few scales just
    above ``2**k``: as many as half of the last place of ``k`` leaves room for.
    """
    bits = scale.to(tl.int32, bitcast=True)
    exponent = bits >> 23
    above = bits & 0x7FFFFF
    if LOG2:
        k = exponent - 127
        k = tl.where(k < 0, -1 - k, k)
        near = (k >= 4).to(tl.int32) + (k >= 8).to(tl.int32) + (k >= 16).to(tl.int32) * 3
        near += (k >= 32).to(tl.int32) * 6 + (k >= 64).to(tl.int32) * 11
        up = (exponent + (above > near).to(tl.int32)) << 23
    else:
        up = (exponent + (above != 0).to(tl.int32)) << 23
    return tl.where(exponent == 255, scale, up.to(tl.float32, bitcast=True))


@triton.jit
def at_least(value, FLOOR: tl.constexpr):
    """As torch clamps: NaN stays NaN."""
    return tl.where(value < FLOOR, FLOOR, value)


@triton.jit
def derive(top, C: tl.constexpr):
    """(what values are divided by or multiplied with, what is stored), from the bits of amax."""
    Q: tl.constexpr = C.quant
    amax = top.to(tl.float32, bitcast=True)
    if Q.floor > 0.0 and Q.floor_at == "amax":
        amax = at_least(amax, Q.floor)
    if Q.inverts:
        if Q.derive == "inverse":
            factor = in_dtype_of_scale(tl.math.div_rn(Q.largest, amax), C)
        else:
            factor = in_dtype_of_scale(in_dtype_of_scale(tl.math.div_rn(1.0, amax), C) * Q.largest, C)
        if Q.reciprocal:
            stored = factor
        else:
            stored = tl.math.div_rn(1.0, factor)
    else:
        if Q.derive == "div":
            scale = tl.math.div_rn(amax, Q.largest)
        else:
            scale = amax * Q.one_over_largest
        scale = in_dtype_of_scale(scale, C)
        if Q.floor > 0.0 and Q.floor_at == "scale":
            scale = at_least(scale, Q.floor)
        if Q.power_of_two != "none":
            scale = next_power_of_two(scale, Q.power_of_two == "log2")
        if Q.floor > 0.0 and Q.floor_at == "rounded":
            scale = at_least(scale, Q.floor)
        if Q.divides:
            factor = scale
        else:
            factor = tl.math.div_rn(1.0, scale)
        if Q.reciprocal:
            stored = tl.math.div_rn(1.0, scale)
        else:
            stored = scale
    return (factor, stored)


@triton.jit
def static_factor(static_scale, C: tl.constexpr):
    """What values are divided by or multiplied with, from a scale that was given."""
    Q: tl.constexpr = C.quant
    scale = tl.load(static_scale)
    if Q.divides or Q.given_inverse:
        return scale
    else:
        return tl.math.div_rn(1.0, scale)


@triton.jit
def over_scale(values, scale):
    """IEEE division of values of a 16-bit dtype by a scale, wherever the fp8 value can tell.

    A division proper has a branch for odd operands, which keeps the divisions of a thread from overlapping.
    Here one correctly rounded reciprocal serves all, and the remainder mends each quotient. That gives the bits of the division
    for every significand of 8 or 11 bits and every scale (Markstein's theorem asks for a second step in general; all pairs were
    tried). Powers of two keep remainders in range. Quotients of 2**17 and more stay as they are: in fp8 they are too large
    however they are rounded; so do those by 0, infinity and NaN.
    """
    magnitude = tl.abs(scale)
    power = tl.where(magnitude < 2.0**-60, 2.0**100, tl.where(magnitude > 2.0**100, 2.0**-100, 1.0))
    power = tl.where(scale < 0.0, power, power * -1.0)
    limit = tl.where(magnitude < float("inf"), 2.0**17, -1.0)
    # Everything is negated in such a way that a quotient of -0 keeps its sign; a minus in Triton 3.6 is 0 - x, which loses it.
    scale = scale * (power * -1.0)
    inverse = tl.math.div_rn(-1.0, scale)
    out = ()
    for i in tl.static_range(len(values)):
        value = values[i] * power
        quotient = value * inverse
        mended = tl.fma(tl.fma(quotient, scale, value), inverse, quotient)
        out = out + (tl.where(tl.abs(quotient) < limit, mended, quotient),)
    return out


@triton.jit
def store_rows(values, factor, row, element, active, quantized, C: tl.constexpr, S: tl.constexpr):
    """Scale, round and store the values of one step."""
    Q: tl.constexpr = C.quant
    if Q.divides and S.ptx and tl.float32 != C.out_dtype:
        values = over_scale(values, factor)
    elif Q.divides:
        values = over_scalar(values, factor)
    else:
        values = times_scalar(values, factor)
    if Q.rounds_values:
        values = rounded(values, C.out_dtype, S.ptx)
    store_fp8(quantized.to(tl.int64) + row.to(tl.int64) * C.hidden + element, pack_fp8(values, Q), active, S.ptx)


@triton.jit
def store_scales(scale, row, part, element, io, C: tl.constexpr, S: tl.constexpr):
    """Store the scale of a row, or those of the groups of one step. ``io`` as for :func:`quantize_step`."""
    Q: tl.constexpr = C.quant
    scales, stride = io[6], io[8].to(tl.int64)
    row = row.to(tl.int64)
    if Q.granularity == "token":
        lane = tl.arange(0, S.lanes)
        tl.store(scales + row + lane, scale, mask=lane + part == 0)
    else:
        group = element // 128
        first = element % 128 == 0
        if Q.layout == "row":
            tl.store(scales + row * Q.groups + group, scale, mask=first & (element < C.hidden))
        elif Q.layout == "column":
            tl.store(scales + group * stride + row, scale, mask=first & (element < C.hidden))
        else:
            # A byte a group; those that fill up a word are zero.
            exponent = tl.where(element < C.hidden, (scale.to(tl.int32, bitcast=True) >> 23) & 0xFF, 0)
            place = scales.to(tl.pointer_type(tl.int8)) + ((group // 4) * stride + row) * 4 + group % 4
            tl.store(place, exponent.to(tl.int8), mask=first & (group < (Q.groups + 3) // 4 * 4))


@triton.jit
def quantize_step(out, row, part, i: tl.constexpr, io, C: tl.constexpr, S: tl.constexpr):
    """Quantize one step of a row, where its scales ask for no other step.

    Args:
        out: words of the normed values.
        io: residual, weight, bias, normed, residual_out, quantized, scales, static_scale, scale_stride.
    """
    Q: tl.constexpr = C.quant
    element, active = lane_elements(part, i, C, S)
    values = values_of(out, C.out_dtype)
    if Q.granularity == "tensor":
        store_rows(values, static_factor(io[7], C), row, element, active, io[5], C, S)
    else:
        derived = derive(over_columns(top_of(values, active), C, S), C)
        store_scales(derived[1], row, part, element, io, C, S)
        store_rows(values, derived[0], row, element, active, io[5], C, S)


@triton.jit
def quantize_row(outs, row, part, io, state, phase, watch, C: tl.constexpr, S: tl.constexpr):
    """Quantize what a program holds of a row that has one scale. ``outs``: for each step as in :func:`quantize_step`."""
    STEPS: tl.constexpr = S.steps
    top = tl.arange(0, S.lanes) * 0
    for i in tl.static_range(STEPS):
        element, active = lane_elements(part, i, C, S)
        top = tl.maximum(top, top_of(values_of(outs[i], C.out_dtype), active))
    derived = derive(over_row(top, part, row, state, phase, watch, C, S), C)
    store_scales(derived[1], row, part, 0, io, C, S)
    for i in tl.static_range(STEPS):
        element, active = lane_elements(part, i, C, S)
        store_rows(values_of(outs[i], C.out_dtype), derived[0], row, element, active, io[5], C, S)


@triton.jit
def poison_quantized(row, part, io, C: tl.constexpr, S: tl.constexpr):
    """NaN in what :func:`quantize_step` stores of a row."""
    Q: tl.constexpr = C.quant
    STEPS: tl.constexpr = S.steps
    for i in tl.static_range(STEPS):
        element, active = lane_elements(part, i, C, S)
        nan = active * 0 + _NAN
        words = (nan,)
        if C.values == 8:
            words = words + words
        store_fp8(io[5].to(tl.int64) + row.to(tl.int64) * C.hidden + element, words, active, S.ptx)
        if Q.granularity != "tensor":
            store_scales((nan | 0x7F800000).to(tl.float32, bitcast=True), row, part, element, io, C, S)


@triton.jit(do_not_specialize=["rows", "scale_stride"])
def quantize_kernel(
    normed,
    quantized,
    scales,
    static_scale,
    scale_stride,
    rows,
    C: tl.constexpr,
    S: tl.constexpr,
):
    """Quantize rows that are in memory, one program a row. For more rows than the fused kernels take.

    Args:
        normed: ``(rows, H)`` in ``C.out_dtype``, contiguous, 16-byte aligned.
        quantized: ``(rows, H)`` fp8; scales: as :func:`tpfuse.ops.quant_reference.scales_like`; static_scale: one fp32 or any.
        scale_stride: values from one column of scales to the next.
    """
    STEPS: tl.constexpr = S.steps
    io = (normed, normed, normed, normed, normed, quantized, scales, static_scale, scale_stride)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        outs = ()
        for i in tl.static_range(STEPS):
            element, active = lane_elements(0, i, C, S)
            out = load_words(normed, row.to(tl.int64) * C.hidden + element, active, C.out_dtype, C.values, S.ptx)
            if C.scale_a_row:
                outs = outs + (out,)
            else:
                quantize_step(out, row, 0, i, io, C, S)
        if C.scale_a_row:
            # One program a row exchanges nothing: no state, no phase, nothing to watch.
            quantize_row(outs, row, 0, io, normed, 0, (0, 0, 0), C, S)
