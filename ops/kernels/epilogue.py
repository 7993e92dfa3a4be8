"""What happens to a reduced row: bias, scale, residual add, norm. Shared by every kernel of this folder.

A row is cut into *groups* of 128 lanes x 16 bytes (1024 bf16 values). A program holds consecutive groups of one row,
``S.steps`` times ``S.groups_a_step`` of them, and ``S.split`` programs hold the row. The sum of squares is defined by groups
alone: one fixed tree per group in fp32, then the groups in fp64, rounded once. The order of that second sum does not show:
at most 16 values of 24 bits add up in 53 bits exactly, as long as the largest is below 2**25 times the smallest. So the bits
of a row do not depend on how many programs share it, on their width, on the number of rows or on the algorithm.

``C`` is a :class:`.variant.Constants` and ``S`` a :class:`.variant.Variant`.
"""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: PLR1714, RUF005
from __future__ import annotations

import triton
import triton.language as tl

from .call import spoil
from .center import mean_of_values, normalized_around, variance_of
from .gather import gather_of, is_whole, push_to_all
from .memory import NAN_WORD, store16
from .packing import over_scalar, pack, plus, plus_scalar, plus_words, rounded, times, times_scalar, times_words, unpack
from .quantize import quantize_row, quantize_step
from .rows import held_values, lane_elements, load_words, store_words, values_of, words_of
from .split_rows import mean_of_squares, restore, restore_tops

_NAN: tl.constexpr = tl.constexpr(NAN_WORD)


@triton.constexpr_function
def gain_ahead(c, s):
    """Whether the weight, and the shift of a LayerNorm, are loaded before the poll: where registers are left."""
    return s.steps <= 2 and (s.affine_ahead or not c.centered) and not (c.sums == 2 and s.world > 4)


@triton.jit
def loaded(scale, C: tl.constexpr):
    """The scale of a call as a number, or where each row has its own: still a pointer, for :func:`of_row`.

    After the wait for the kernel before this one, which may have written it.
    """
    if C.scale_loaded and not C.scale_by_row:
        return tl.load(scale).to(tl.float32)
    else:
        return scale


@triton.jit
def of_row(scale, row, C: tl.constexpr):
    """The scale of a row, from what :func:`loaded` returned. Before the poll, so that the wait hides the load."""
    if C.scale_by_row:
        return tl.load(scale + row).to(tl.float32)
    else:
        return scale


@triton.jit
def affine(words, shift, addend, scale, C: tl.constexpr, PTX: tl.constexpr):
    """Words after bias (its words), addend and scale, in the order of the call, each rounded to the dtype as in eager mode."""
    if C.bias != "none" and not C.scale_first and (C.centered or not C.residual_first):
        words = plus_words(words, shift, C.dtype, PTX)
    if C.has_addend and not C.residual_first:
        words = plus_words(words, addend, C.dtype, PTX)
    if C.scaled:
        words = pack(times_scalar(unpack(words, C.dtype), scale), C.dtype, PTX)
    if C.scale_first:
        words = plus_words(words, shift, C.dtype, PTX)
    return words


@triton.jit
def gain_of(weight, C: tl.constexpr, PTX: tl.constexpr):
    """The gain of the norm in the flavour's gain dtype, from the words of the weight."""
    weight = values_of(weight, C.weight_dtype)
    if C.gain_dtype != C.weight_dtype:
        weight = rounded(weight, C.gain_dtype, PTX)
    if C.one_plus:
        weight = rounded(plus_scalar(weight, 1.0), C.gain_dtype, PTX)
    return weight


@triton.jit
def normalized(values, mean, weight, eps, C: tl.constexpr, PTX: tl.constexpr):
    """Words of the normed output of one group, in the flavour's rounding order."""
    v = mean + eps
    if C.root == "rsqrt" or C.root == "pow":
        out = times_scalar(values, tl.rsqrt(v))
    elif C.root == "div_sqrt":
        out = over_scalar(values, tl.math.sqrt_rn(v))
    else:
        out = times_scalar(values, tl.math.div_rn(1.0, tl.math.sqrt_rn(v)))
    if C.plain_gain:
        return times_words(pack(out, C.dtype, PTX), weight, C.dtype, PTX)
    else:
        if C.round_normed:
            out = rounded(out, C.dtype, PTX)
        if C.has_weight:
            out = times(out, gain_of(weight, C, PTX))
            if C.product_dtype != C.out_dtype:
                out = rounded(out, C.product_dtype, PTX)
        return words_of(out, C.out_dtype, PTX)


@triton.jit
def affine_of(out, weight, shift, C: tl.constexpr, PTX: tl.constexpr):
    """Words of a LayerNorm's output from the normalized values of one group: weight and shift, rounded as the flavour says."""
    if C.round_normed:
        out = rounded(out, C.dtype, PTX)
    if C.has_weight:
        out = rounded(times(out, gain_of(weight, C, PTX)), C.product_dtype, PTX)
    if C.has_shift:
        out = plus(out, values_of(shift, C.shift_dtype))
        if C.shifted_dtype != C.out_dtype:
            out = rounded(out, C.shifted_dtype, PTX)
    return words_of(out, C.out_dtype, PTX)


@triton.jit
def addends(row, element, active, io, C: tl.constexpr, S: tl.constexpr):
    """Words of bias, addend and the vector behind it of one step; none of what there is not, or is still to be reduced."""
    row_start = row.to(tl.int64) * C.hidden
    b = ()
    a = ()
    v = ()
    if C.bias == "row":
        b = load_words(io[2], element.to(tl.int64), active, C.dtype, C.values, S.ptx)
    if C.bias == "full":
        b = load_words(io[2], row_start + element, active, C.dtype, C.values, S.ptx)
    if C.has_addend and not C.partial_addend:
        a = load_words(io[6], row_start + element, active, C.dtype, C.values, S.ptx)
    if C.addend_bias:
        v = load_words(io[7], element.to(tl.int64), active, C.dtype, C.values, S.ptx)
    return (b, a, v)


@triton.jit
def second_of(x, io, C: tl.constexpr):
    """Where the second rows of words are: the other half of ``x``, or the second partial sum: the addend of a LayerNorm, else the
    bias."""
    if C.wide_sum:
        return x
    elif C.partial_addend:
        return io[6]
    else:
        return io[2]


@triton.jit
def with_second(loads, words, C: tl.constexpr):
    """What :func:`prefetch` returned, with the words of the second sum in their place."""
    if C.partial_addend:
        return (loads[0], loads[1], loads[2], loads[3], words, loads[5])
    else:
        return (loads[0], words, loads[2], loads[3], loads[4], loads[5])


@triton.jit
def prefetch(row, part, i: tl.constexpr, io, C: tl.constexpr, S: tl.constexpr):
    """Words of residual, bias and (for short programs) weight of one step, loaded before the poll so that the wait hides them.

    Words, not values: a value would have to be there before the poll begins, and takes twice the registers.
    """
    element, active = lane_elements(part, i, C, S)
    row_start = row.to(tl.int64) * C.hidden
    residual, weight = io[0], io[1]
    r = ()
    b = ()
    w = ()
    if C.has_residual and (S.steps <= 2 or not C.post_norm):
        r = load_words(residual, row_start + element, active, C.residual_in, C.values, S.ptx)
    a = ()
    v = ()
    if S.addends_ahead or not C.centered:
        added = addends(row, element, active, io, C, S)
        b = added[0]
        a = added[1]
        v = added[2]
    if C.has_weight and gain_ahead(C, S):
        w = load_words(weight, element.to(tl.int64), active, C.weight_dtype, C.values, S.ptx)
    s = ()
    if C.has_shift and gain_ahead(C, S):
        s = load_words(io[5], element.to(tl.int64), active, C.shift_dtype, C.values, S.ptx)
    return (r, b, w, s, a, v)


@triton.jit
def accept(
    reduced,
    row,
    part,
    i: tl.constexpr,
    io,
    scale,
    loads,
    C: tl.constexpr,
    S: tl.constexpr,
):
    """Bias, scale and residual add of one step; returns what will be normalized.

    That is the words of the residual sum, or, where the norm reads it before it is rounded, its fp32 values: twice the
    registers, for such a flavour only.

    Args:
        reduced: words of the sum over ranks.
        loads: what :func:`prefetch` returned for this step, with the second sum where there is one (:func:`with_second`).
    """
    element, active = lane_elements(part, i, C, S)
    added = (loads[1], loads[4], loads[5])
    if C.centered and not S.addends_ahead:
        added = addends(row, element, active, io, C, S)
    bias, addend = added[0], added[1]
    if C.partial_addend:
        addend = loads[4]
    if C.addend_bias:
        addend = plus_words(addend, added[2], C.dtype, S.ptx)
    words = affine(reduced, bias, addend, scale, C, S.ptx)
    if C.wide_residual:
        values = plus(values_of(loads[0], C.residual_in), unpack(words, C.dtype))
        start = row.to(tl.int64) * C.hidden + element
        store_words(io[4], start, words_of(values, C.residual_dtype, S.ptx), active, C.residual_dtype, S.ptx)
    elif C.unrounded:
        values = plus(unpack(loads[0], C.dtype), unpack(words, C.dtype))
        words = pack(values, C.dtype, S.ptx)
    elif C.has_residual and not C.post_norm:
        words = plus_words(loads[0], words, C.dtype, S.ptx)
        if C.residual_first:
            words = plus_words(words, addend if C.centered else bias, C.dtype, S.ptx)
    if not C.post_norm and not C.wide_residual:
        address = io[4].to(tl.int64) + (row.to(tl.int64) * C.hidden + element) * C.item_bytes
        store16(address, words, active, S.ptx)
    if C.unrounded:
        return values
    else:
        return words


@triton.jit
def finish(
    held,
    row,
    part,
    io,
    state,
    phase,
    watch,
    eps,
    loads,
    C: tl.constexpr,
    S: tl.constexpr,
):
    """Norm of the groups of one row that this program holds, their quantization where there is one, and the stores that are left.

    Args:
        held: for each step what :func:`accept` returned.
        io: the tensors of the call: residual, weight, bias, normed, residual_out; what :func:`quantize_step` adds to them, or
            the shift of a LayerNorm and its addend; where the normed rows are gathered, :func:`.gather.with_gather` made it.
        loads: for each step what :func:`prefetch` returned; looked at only by programs of one or two steps.
    """
    STEPS: tl.constexpr = S.steps
    residual, weight, normed, residual_out = io[0], io[1], io[3], io[4]
    row_start = row.to(tl.int64) * C.hidden
    if C.centered:
        middle = mean_of_values(held, part, row, state, phase, watch, C, S)
        mean = variance_of(held, middle, part, row, state, phase, watch, C, S)
    else:
        mean = mean_of_squares(held, part, row, state, phase, watch, C, S)
    if S.gathers:
        whole = is_whole(mean, state, S)
    outs = ()
    for i in tl.static_range(STEPS):
        element, active = lane_elements(part, i, C, S)
        gain = ()
        if C.has_weight:
            if gain_ahead(C, S):
                gain = loads[i][2]
            else:
                gain = load_words(weight, element.to(tl.int64), active, C.weight_dtype, C.values, S.ptx)
        if C.centered:
            shift = ()
            if C.has_shift:
                if gain_ahead(C, S):
                    shift = loads[i][3]
                else:
                    shift = load_words(io[5], element.to(tl.int64), active, C.shift_dtype, C.values, S.ptx)
            values = normalized_around(held_values(held[i], C), middle, mean, eps, C)
            out = affine_of(values, gain, shift, C, S.ptx)
        else:
            out = normalized(held_values(held[i], C), mean, gain, eps, C, S.ptx)
        if C.keeps_normed:
            store_words(normed, row_start + element, out, active, C.out_dtype, S.ptx)
        if S.gathers:
            push_to_all(out, row, element, active & whole, gather_of(io, C), C, S)
        if C.scale_a_row:
            outs = outs + (out,)
        elif C.quantized:
            quantize_step(out, row, part, i, io, C, S)
        if C.post_norm:
            r = ()
            if S.steps <= 2:
                r = loads[i][0]
            else:
                r = load_words(residual, row_start + element, active, C.dtype, C.values, S.ptx)
            if C.out_dtype == C.dtype:
                total = plus_words(r, out, C.dtype, S.ptx)
            else:
                total = words_of(plus(values_of(r, C.dtype), values_of(out, C.out_dtype)), C.residual_dtype, S.ptx)
            store_words(residual_out, row_start + element, total, active, C.residual_dtype, S.ptx)
        elif C.wide_residual:  # twice the bytes, and so twice the items of the dtype of the sum
            spoil(mean, state, residual_out, 2 * (row_start + element), active, C, S)
            spoil(mean, state, residual_out, 2 * (row_start + element) + C.values, active, C, S)
        else:
            spoil(mean, state, residual_out, row_start + element, active, C, S)
    if C.scale_a_row:
        quantize_row(outs, row, part, io, state, phase, watch, C, S)
    if S.split > 1:
        restore(state, S)
        if C.scale_a_row or C.centered:
            restore_tops(state, S)
