"""Two-shot: row ``t`` belongs to rank ``t mod W``; its owner reduces it and pushes the sum to every rank.

Two store-to-visible latencies, but only about ``2 * B`` bytes out of each rank whatever the world size: best from medium
sizes up. Every program reduces only rows that it also finishes, so programs of one rank never wait for one another.
"""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import RECORD, accept, finish, lane_elements, prefetch
from .memory import clear, load16, marked, poll, push
from .one_shot import (
    begin,
    end,
    give_up_limit,
    let_next_kernel_start,
    sum_over_ranks,
    wait_for_previous_kernel,
)
from .words import pack, plus_scalar, unpack


@triton.jit
def item_of(turn, SPLIT: tl.constexpr):
    """The item that this program handles in its ``turn``-th turn.

    Rotated by one program a turn: with a grid that is a multiple of W a program would otherwise meet only rows of one
    owner, and a W-th of the programs would do all of the reducing.
    """
    programs = tl.num_programs(0)
    if SPLIT > 1:
        return turn * programs + tl.program_id(0)
    else:
        return turn * programs + (tl.program_id(0) + turn) % programs


@triton.jit(do_not_specialize=["rank", "rows", "phase_bytes", "limit"])
def two_shot_kernel(
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
    phase_bytes,
    limit,
    eps,
    scale,
    C: tl.constexpr,
    W: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLIT: tl.constexpr,
    WAIT: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Arguments as in ``one_shot_kernel``.

    A phase holds two areas: scatter, where the slot of (row, rank) at the row's owner is
    ``((row // W) * W + rank) * row_bytes``, and behind its ``ceil(rows / W) * W`` rows gather, where row ``t`` is at
    ``t * row_bytes``.
    """
    own_base = tl.load(peers + rank)
    host_record = tl.load(peers + W)
    wait_for_previous_kernel(PDL)
    phase = begin(state)
    limit = give_up_limit(state, limit)
    offset = phase.to(tl.int64) * phase_bytes
    own_plane = own_base + offset
    io = (residual, weight, bias, normed, residual_out)
    watch = ((state + RECORD).to(tl.int64), host_record, limit)
    gather = ((rows + W - 1) // W * W).to(tl.int64) * C.row_bytes
    items = rows * SPLIT
    turns = (items + tl.num_programs(0) - 1) // tl.num_programs(0)

    for turn in range(0, turns):
        item = item_of(turn, SPLIT)
        row = item // SPLIT
        owner = row % W
        inside = ((item < items) & (owner != rank)).to(tl.int32)
        slot = ((row // W * W + rank).to(tl.int64)) * C.row_bytes
        target = tl.load(peers + owner) + offset
        for i in tl.static_range(GROUPS):
            element, active = lane_elements(item % SPLIT, i, C, GROUPS)
            source = x.to(tl.int64) + (row.to(tl.int64) * C.hidden + element) * C.item_bytes
            words = marked(load16(source, active & inside, PTX), C.zero_mark)
            push(target + slot + element * C.item_bytes, words, active & inside, PTX)

    for turn in range(0, turns):
        item = item_of(turn, SPLIT)
        row = item // SPLIT
        if (item < items) & (row % W == rank):
            for i in tl.static_range(GROUPS):
                element, active = lane_elements(item % SPLIT, i, C, GROUPS)
                source = x.to(tl.int64) + (row.to(tl.int64) * C.hidden + element) * C.item_bytes
                slots = own_plane + (row // W * W).to(tl.int64) * C.row_bytes + element * C.item_bytes
                words = poll(
                    slots,
                    source,
                    rank,
                    active,
                    row,
                    phase,
                    watch,
                    SLOTS=W,
                    STRIDE=C.row_bytes,
                    WORDS=4 * W,
                    WAIT=WAIT,
                    PTX=PTX,
                )
                for r in tl.static_range(W):
                    clear(slots + r * C.row_bytes, active & (r != rank).to(tl.int32), PTX)
                total = marked(pack(sum_over_ranks(words, C, W, PTX), C.dtype, PTX), C.zero_mark)
                place = gather + row.to(tl.int64) * C.row_bytes + element * C.item_bytes
                for r in tl.static_range(W):
                    push(tl.load(peers + r) + offset + place, total, active, PTX)

    for turn in range(0, turns):
        item = item_of(turn, SPLIT)
        if item < items:
            row = item // SPLIT
            part = item % SPLIT
            loads = ()
            held = ()
            if GROUPS <= 2:
                for i in tl.static_range(GROUPS):
                    loads = loads + (prefetch(row, part, i, io, C, GROUPS, PTX),)
            for i in tl.static_range(GROUPS):
                element, active = lane_elements(part, i, C, GROUPS)
                place = own_plane + gather + row.to(tl.int64) * C.row_bytes + element * C.item_bytes
                if GROUPS > 2:
                    load = prefetch(row, part, i, io, C, GROUPS, PTX)
                else:
                    load = loads[i]
                words = poll(
                    place,
                    place,
                    -1,
                    active,
                    row,
                    phase + 4,
                    watch,
                    SLOTS=1,
                    STRIDE=16,
                    WORDS=4,
                    WAIT=WAIT,
                    PTX=PTX,
                )
                clear(place, active, PTX)
                # + 0.0 takes the mark's sign away again.
                reduced = plus_scalar(unpack(words, C.dtype), 0.0)
                held = held + (accept(reduced, row, part, i, io, scale, load, C, GROUPS, PTX),)
            finish(held, row, part, io, state, phase, watch, eps, loads, C, GROUPS, SPLIT, WAIT, PTX)
    end(state, phase)
    let_next_kernel_start(PDL)
