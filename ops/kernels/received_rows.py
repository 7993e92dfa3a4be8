"""One-shot with destinations: every rank pushes each row only to the ranks that receive it.

The rows of ``x`` are ``S.blocks`` blocks of equal size, and so are the ranks of the group: the first ranks receive the first
block. With as many blocks as ranks that is a reduce-scatter, with fewer each block goes to the ranks of one replica. Out of
each rank go ``(W - 1) / blocks`` times the bytes of ``x``, where an all-reduce sends ``W - 1`` times.

A rank receives whole blocks, and finishes the first ``kept`` rows of its own: rows that fill a block up are polled and zeroed
like all others, so that every word of a call is consumed within the call, and so that a rank that keeps no row still ends a
call only when every rank has started it. On both rests that two phases are enough (:mod:`tpfuse.ops.plane`).
"""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from .call import begin, end, failed, let_next_kernel_start, poison, wait_for_previous_kernel
from .epilogue import accept, finish, prefetch
from .memory import marked, push
from .reduction import sum_over_ranks
from .rows import clear_ranks, lane_elements, own_part, poll_ranks


@triton.jit
def parts_of_blocks(
    x, item, stride, allowed, FIRST: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr, S: tl.constexpr
):
    """This rank's words of one row of ``COUNT`` blocks, one after another. All loads are in flight before any push."""
    held = ()
    for n in tl.static_range(COUNT):
        held = held + own_part(x, item + (FIRST + n) * stride * S.split, allowed, C, S)
    return held


@triton.jit
def push_to_receivers(
    held, item, allowed, bases, offset, rank, FIRST: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr, S: tl.constexpr
):
    """Push what :func:`parts_of_blocks` returned to the ranks of each block."""
    STEPS: tl.constexpr = S.steps
    RECEIVERS: tl.constexpr = S.world // S.blocks
    row = item // S.split
    for n in tl.static_range(COUNT):
        for i in tl.static_range(STEPS):
            words = marked(held[n * STEPS + i], C.zero_mark)
            element, active = lane_elements(item % S.split, i, C, S)
            slot = offset + (row.to(tl.int64) * S.world + rank) * C.row_bytes + element * C.item_bytes
            for k in tl.static_range(RECEIVERS):
                other = (rank != (FIRST + n) * RECEIVERS + k).to(tl.int32)
                push(bases[(FIRST + n) * RECEIVERS + k] + slot, words, active & allowed & other, S.ptx)


@triton.jit
def receive(x, row, source_row, part, i: tl.constexpr, own_plane, rank, phase, watch, C: tl.constexpr, S: tl.constexpr):
    """The words of all ranks of one step of a row of the own block; their slots are zeros again."""
    element, active = lane_elements(part, i, C, S)
    source = x.to(tl.int64) + (source_row.to(tl.int64) * C.hidden + element) * C.item_bytes
    slots = own_plane + row.to(tl.int64) * (S.world * C.row_bytes) + element * C.item_bytes
    words = poll_ranks(slots, source, rank, active, row, phase, watch, C, S)
    clear_ranks(slots, rank, active, C, S)
    return words


@triton.jit
def push_blocks(x, to_push, items, stride, bases, offset, rank, C: tl.constexpr, S: tl.constexpr):
    """Push this program's rows of every block to the block's receivers.

    Args:
        to_push: what :func:`parts_of_blocks` returned for the first blocks of the first row.
    """
    BLOCKS: tl.constexpr = S.blocks
    # The words of so many blocks at once fit into registers.
    AT_ONCE: tl.constexpr = S.blocks_at_once
    first = tl.program_id(0)
    is_there = (first < items).to(tl.int32)
    push_to_receivers(to_push, first, is_there, bases, offset, rank, 0, AT_ONCE, C, S)
    for b in tl.static_range(AT_ONCE, BLOCKS, AT_ONCE):
        more = parts_of_blocks(x, first, stride, is_there, b, AT_ONCE, C, S)
        push_to_receivers(more, first, is_there, bases, offset, rank, b, AT_ONCE, C, S)
    for item in range(first + tl.num_programs(0), items, tl.num_programs(0)):
        for b in tl.static_range(0, BLOCKS, AT_ONCE):
            more = parts_of_blocks(x, item, stride, 1, b, AT_ONCE, C, S)
            push_to_receivers(more, item, 1, bases, offset, rank, b, AT_ONCE, C, S)


@triton.jit
def received_rows(
    x, io, peers, state, rank, rows, kept, stride, phase_bytes, limit, eps, scale, C: tl.constexpr, S: tl.constexpr
):
    """A call. ``io``: see :func:`.epilogue.finish`; the rest as in :func:`received_rows_kernel`."""
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
    own_block = rank // (S.world // S.blocks)
    # Before the phase is asked for: both are on their way together.
    to_push = parts_of_blocks(x, first, stride, (first < items).to(tl.int32), 0, AT_ONCE, C, S)
    phase = begin(state)
    items = tl.where(failed(state), 0, items)  # no push and no poll on a failed plane; see one_shot_kernel
    offset = phase.to(tl.int64) * phase_bytes
    own_plane = own_base + offset
    watch = (state.to(tl.int64), peers.to(tl.int64), limit.to(tl.int64))
    # All pushes first: the later ones travel while the first rows are being reduced.
    push_blocks(x, to_push, items, stride, bases, offset, rank, C, S)
    for item in range(first, items, tl.num_programs(0)):
        row = item // S.split
        part = item % S.split
        source = own_block * stride + row
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
                receive(x, row, source, part, i, own_plane, rank, phase, watch, C, S)
    end(state, phase)
    if items == 0:
        poison(kept, io, C, S)
    let_next_kernel_start(PDL)


@triton.jit(do_not_specialize=["rank", "rows", "kept", "stride", "phase_bytes", "limit"])
def received_rows_kernel(
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
    """Slot of (row of the own block, rank) in a phase: ``(row * W + rank) * row_bytes``.

    Args:
        x: the first row of the launch in the first block; the other blocks follow ``stride`` rows apart.
        residual, weight, bias, normed, residual_out: as in ``one_shot_kernel``, of the rows that this rank keeps.
        rows: rows of each block in this launch.
        kept: how many of them this rank finishes.
        peers, state, phase_bytes, limit: as in ``one_shot_kernel``.
    """
    io = (residual, weight, bias, normed, residual_out)
    received_rows(x, io, peers, state, rank, rows, kept, stride, phase_bytes, limit, eps, scale, C, S)


@triton.jit(do_not_specialize=["rank", "rows", "kept", "stride", "phase_bytes", "limit"])
def received_rows_layer_norm_kernel(
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
    """:func:`received_rows_kernel` with a LayerNorm; ``shift``, ``(H,)``, is added behind the weight.

    ``addend``, of the rows that this rank keeps, is added behind the bias. Unused ones are any pointer.
    """
    io = (residual, weight, bias, normed, residual_out, shift, addend)
    received_rows(x, io, peers, state, rank, rows, kept, stride, phase_bytes, limit, eps, scale, C, S)
