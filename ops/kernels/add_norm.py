"""Add and norm after somebody else's all-reduce: the second half of the library path, in one kernel.

Reads the reduced rows and the residual once and writes both outputs once: 4 * B bytes of traffic instead of the 6 * B of
separate add and norm kernels.
"""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import accept, finish, loaded, of_row, prefetch
from .rows import lane_elements, load_words, values_of, words_of


@triton.jit
def add_norm(reduced_rows, io, rows, eps, scale, C: tl.constexpr, S: tl.constexpr):
    """All rows of a call, one program a row. ``io``: see :func:`.epilogue.finish`."""
    STEPS: tl.constexpr = S.steps
    scale = loaded(scale, C)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        factor = of_row(scale, row, C)
        loads = ()
        held = ()
        for i in tl.static_range(STEPS):
            element, active = lane_elements(0, i, C, S)
            start = row.to(tl.int64) * C.hidden + element
            load = prefetch(row, 0, i, io, C, S)
            words = load_words(reduced_rows, start, active, C.x_in, C.values, S.ptx)
            if C.wide_sum:
                words = words_of(values_of(words, C.x_in), C.dtype, S.ptx)
            loads = loads + (load,)
            held = held + (accept(words, row, 0, i, io, factor, load, C, S),)
        # One program a row exchanges nothing: no state, no phase, nothing to watch.
        finish(held, row, 0, io, reduced_rows, 0, (0, 0, 0), eps, loads, C, S)


@triton.jit(do_not_specialize=["rows"])
def add_norm_kernel(
    reduced_rows,
    residual,
    weight,
    bias,
    normed,
    residual_out,
    rows,
    eps,
    scale,
    C: tl.constexpr,
    S: tl.constexpr,
):
    """Arguments as in ``one_shot_kernel``; ``reduced_rows`` is the all-reduced ``x``, rounded here where it is wide."""
    add_norm(reduced_rows, (residual, weight, bias, normed, residual_out), rows, eps, scale, C, S)


@triton.jit(do_not_specialize=["scale_stride", "rows"])
def add_norm_quant_kernel(
    reduced_rows,
    residual,
    weight,
    bias,
    normed,
    residual_out,
    quantized,
    scales,
    static_scale,
    scale_stride,
    rows,
    eps,
    scale,
    C: tl.constexpr,
    S: tl.constexpr,
):
    """:func:`add_norm_kernel` that quantizes; ``quantized`` to ``scale_stride`` as in :func:`.quantize.quantize_kernel`."""
    io = (residual, weight, bias, normed, residual_out, quantized, scales, static_scale, scale_stride)
    add_norm(reduced_rows, io, rows, eps, scale, C, S)


@triton.jit(do_not_specialize=["rows"])
def add_norm_layer_norm_kernel(
    reduced_rows,
    residual,
    weight,
    bias,
    normed,
    residual_out,
    shift,
    addend,
    rows,
    eps,
    scale,
    C: tl.constexpr,
    S: tl.constexpr,
):
    """:func:`add_norm_kernel` with a LayerNorm; ``shift`` and ``addend`` as in :func:`.one_shot.one_shot_layer_norm_kernel`."""
    io = (residual, weight, bias, normed, residual_out, shift, addend)
    add_norm(reduced_rows, io, rows, eps, scale, C, S)
