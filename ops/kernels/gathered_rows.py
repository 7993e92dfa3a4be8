"""A reduce-scatter whose normed rows are gathered: the owner of a row reduces it, norms it and pushes the norm to all others.

The rows of ``x`` are a block for each rank, which owns it. Bytes go as in an all-reduce in two shots, ``2 (W - 1) / W`` of
``x``, but each row is normed once and its residual lies on its owner alone: what sequence parallelism does between two matrix
products. Two rounds, one launch.

An owner finishes the first ``kept`` rows of its block and pushes zeros for the others, so that every rank polls a word of
every other in each call: on that rests that two phases are enough (:mod:`tpfuse.ops.plane`).
"""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from .call import begin, end, failed, let_next_kernel_start, poison, wait_for_previous_kernel
from .epilogue import accept, finish, prefetch
from .gather import push_to_all, receive_normed, with_gather
from .memory import NAN_WORD
from .received_rows import parts_of_blocks, push_blocks, receive
from .reduction import sum_over_ranks
from .rows import lane_elements, store_words

_NAN: tl.constexpr = tl.constexpr(NAN_WORD)


@triton.jit
def fill(normed, row, part, i: tl.constexpr, word, C: tl.constexpr, S: tl.constexpr):
    """Store one word all over one step of a normed row; what was stored."""
    element, active = lane_elements(part, i, C, S)
    one = active * 0 + word
    words = (one, one, one, one)
    if C.values * C.normed_item_bytes == 32:
        words = words + words
    store_words(normed, row.to(tl.int64) * C.hidden + element, words, active, C.out_dtype, S.ptx)
    return words


@triton.jit
def poison_blocks(rows, stride, normed, C: tl.constexpr, S: tl.constexpr):
    """NaN in this program's rows of all blocks, as :func:`poison` does for the own one."""
    BLOCKS: tl.constexpr = S.blocks
    STEPS: tl.constexpr = S.steps
    for item in range(tl.program_id(0), rows * S.split, tl.num_programs(0)):
        for r in tl.static_range(BLOCKS):
            for i in tl.static_range(STEPS):
                fill(normed, r * stride + item // S.split, item % S.split, i, _NAN, C, S)


@triton.jit
def gathered_rows(
    x, io, peers, state, rank, rows, kept, stride, phase_bytes, limit, eps, scale, C: tl.constexpr, S: tl.constexpr
):
    """A call; arguments as in :func:`gathered_rows_kernel`.

    Args:
        io: see :func:`.epilogue.finish`; ``normed`` among them has the rows of all blocks.
    """
    WORLD: tl.constexpr = S.world
    PDL: tl.constexpr = S.pdl  # Triton 3.6 passes no plain string on
    STEPS: tl.constexpr = S.steps
    AT_ONCE: tl.constexpr = S.blocks_at_once
    bases = ()
    for r in tl.static_range(WORLD):
        bases = bases + (tl.load(peers + r),)
    own_base = tl.load(peers + rank)
    wait_for_previous_kernel(PDL)
    first = tl.program_id(0)
    items = rows * S.split
    # Before the phase is asked for: both are on their way together.
    to_push = parts_of_blocks(x, first, stride, (first < items).to(tl.int32), 0, AT_ONCE, C, S)
    phase = begin(state)
    items = tl.where(failed(state), 0, items)  # no push and no poll on a failed plane; see one_shot_kernel
    offset = phase.to(tl.int64) * phase_bytes
    own_plane = own_base + offset
    watch = (state.to(tl.int64), peers.to(tl.int64), limit.to(tl.int64))
    gather = (rows * WORLD).to(tl.int64) * C.row_bytes
    to = (peers, offset + gather, rank, 0)
    normed = io[3]
    mine = normed + (rank * stride).to(tl.int64) * C.hidden
    io = with_gather(io, mine, to, C)

    push_blocks(x, to_push, items, stride, bases, offset, rank, C, S)

    ok = tl.arange(0, S.lanes) * 0 + 1
    for item in range(first, items, tl.num_programs(0)):
        row = item // S.split
        part = item % S.split
        source = rank * stride + row
        if row < kept:
            loads = ()
            held = ()
            if S.steps <= 2:
                for i in tl.static_range(STEPS):
                    loads = loads + (prefetch(row, part, i, io, C, S),)
            for i in tl.static_range(STEPS):
                if S.steps > 2:
                    load = prefetch(row, part, i, io, C, S)
                else:
                    load = loads[i]
                words = receive(x, row, source, part, i, own_plane, rank, phase, watch, C, S)
                held = held + (accept(sum_over_ranks(words, C, S), row, part, i, io, scale, load, C, S),)
            finish(held, row, part, io, state, phase, watch, eps, loads, C, S)
        else:
            for i in tl.static_range(STEPS):
                full = receive(x, row, source, part, i, own_plane, rank, phase, watch, C, S)[4 * WORLD]
                element, active = lane_elements(part, i, C, S)
                push_to_all(fill(mine, row, part, i, 0, C, S), row, element, active & full, to, C, S)
                ok = ok & full

    for item in range(first, items, tl.num_programs(0)):
        row = item // S.split
        for i in tl.static_range(STEPS):
            found = receive_normed(row, item % S.split, i, own_plane + gather, normed, stride, rank, phase, watch, C, S)
            ok = ok & found
    end(state, phase)
    # A lane that got its words has stored them: no row may be left with some of them.
    if (items == 0) | (tl.min(ok, axis=0) == 0):
        poison(kept, io, C, S)
        poison_blocks(rows, stride, normed, C, S)
    let_next_kernel_start(PDL)


@triton.jit(do_not_specialize=["rank", "rows", "kept", "stride", "phase_bytes", "limit"])
def gathered_rows_kernel(
    x,
    residual,
    weight,
    bias,
    normed,
    residual_out,
    peers,
    state,
    rank,
    rows,
    kept,
    stride,
    phase_bytes,
    limit,
    eps,
    scale,
    C: tl.constexpr,
    S: tl.constexpr,
):
    """Arguments as in ``received_rows_kernel``, but for ``normed``: the rows of all blocks, ``stride`` apart as in ``x``.

    A phase holds two areas: scatter, where the slot of (row of the own block, rank) is ``(row * W + rank) * row_bytes``, and
    behind its ``rows * W`` rows gather, where that of (row, owner) is ``(row * W + owner) * normed_row_bytes``.
    """
    io = (residual, weight, bias, normed, residual_out)
    gathered_rows(x, io, peers, state, rank, rows, kept, stride, phase_bytes, limit, eps, scale, C, S)


@triton.jit(do_not_specialize=["rank", "rows", "kept", "stride", "phase_bytes", "limit"])
def gathered_rows_layer_norm_kernel(
    x,
    residual,
    weight,
    bias,
    normed,
    residual_out,
    shift,
    addend,
    peers,
    state,
    rank,
    rows,
    kept,
    stride,
    phase_bytes,
    limit,
    eps,
    scale,
    C: tl.constexpr,
    S: tl.constexpr,
):
    """:func:`gathered_rows_kernel` with a LayerNorm; ``shift``, ``(H,)``, is added behind the weight.

    ``addend``, of the rows that this rank keeps, is added behind the bias. Unused ones are any pointer.
    """
    io = (residual, weight, bias, normed, residual_out, shift, addend)
    gathered_rows(x, io, peers, state, rank, rows, kept, stride, phase_bytes, limit, eps, scale, C, S)
