"""An all-reduce in each block of ranks, whose normed rows all blocks gather: attention replicas that bring their rows together.

The first ranks are the first block, and so on. ``x`` has the rows of the own block alone, and only its ranks have parts of their
sums: each pushes all of them to the others of the block, as in one-shot, and every rank of the block adds and norms. One of
them owns each row, row ``t`` is rank ``t mod R``'s, and pushes its norm to the ranks of all other blocks. Out of each rank go
``R - 1`` times the bytes of ``x``, and of the norm ``(W - R) / R`` times.

Blocks may have fewer rows than the largest, down to none. Rows that fill a block up are pushed, polled and gathered as zeros, so
that a rank ends a call only when every rank has started it: an owner has heard of all ranks of its block when it pushes.
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
from .gathered_rows import fill, poison_blocks
from .memory import marked, push
from .reduction import sum_over_ranks
from .rows import clear_ranks, lane_elements, own_part, poll_ranks


@triton.jit
def push_to_block(held, item, allowed, bases, offset, place, C: tl.constexpr, S: tl.constexpr):
    """Push what ``own_part`` returned to the others of the own block, whose planes are at ``bases``."""
    STEPS: tl.constexpr = S.steps
    RANKS: tl.constexpr = S.world
    row = item // S.split
    for i in tl.static_range(STEPS):
        element, active = lane_elements(item % S.split, i, C, S)
        words = marked(held[i], C.zero_mark)
        slot = offset + (row.to(tl.int64) * RANKS + place) * C.row_bytes + element * C.item_bytes
        for k in tl.static_range(RANKS):
            push(bases[k] + slot, words, active & allowed & (place != k).to(tl.int32), S.ptx)


@triton.jit
def receive_part(
    source, row, part, i: tl.constexpr, own_plane, place, first, phase, watch, C: tl.constexpr, S: tl.constexpr
):
    """The words of the ranks of the own block of one step of a row; their slots are zeros again.

    Args:
        source: address of this rank's words of the row's first element; 0 where it has none.
        first: the first rank of the block, for the record of a failure.
    """
    element, active = lane_elements(part, i, C, S)
    slots = own_plane + row.to(tl.int64) * (S.world * C.row_bytes) + element * C.item_bytes
    own = tl.where(source == 0, slots, source + element * C.item_bytes)
    words = poll_ranks(slots, own, place, active, first, phase + 10, watch, C, S)
    clear_ranks(slots, place, active, C, S)
    return words


@triton.jit
def gathered_blocks(
    x, io, peers, state, rank, rows, kept, stride, phase_bytes, limit, eps, scale, C: tl.constexpr, S: tl.constexpr
):
    """A call; arguments as in :func:`gathered_blocks_kernel`.

    Args:
        io: see :func:`.epilogue.finish`; ``normed`` among them has the rows of all blocks.
    """
    PDL: tl.constexpr = S.pdl  # Triton 3.6 passes no plain string on
    STEPS: tl.constexpr = S.steps
    RANKS: tl.constexpr = S.world // S.blocks
    OWN: tl.constexpr = S.of_a_block
    block = rank // RANKS
    place = rank % RANKS
    bases = ()
    for k in tl.static_range(RANKS):
        bases = bases + (tl.load(peers + block * RANKS + k),)
    own_base = tl.load(peers + rank)
    wait_for_previous_kernel(PDL)
    first = tl.program_id(0)
    items = rows * S.split
    # Before the phase is asked for: both are on their way together.
    to_push = own_part(x, first, (first < kept * S.split).to(tl.int32), C, S)
    phase = begin(state)
    items = tl.where(failed(state), 0, items)  # no push and no poll on a failed plane; see one_shot_kernel
    offset = phase.to(tl.int64) * phase_bytes
    own_plane = own_base + offset
    watch = (state.to(tl.int64), peers.to(tl.int64), limit.to(tl.int64))
    # Polls of the block's ranks look for the address of the host's record behind so many addresses.
    in_block = (watch[0], watch[1] + 8 * (S.world - RANKS), watch[2])
    gather = (rows * RANKS).to(tl.int64) * C.row_bytes
    to = (peers, offset + gather, block, place)
    normed = io[3]
    mine = normed + (block * stride).to(tl.int64) * C.hidden
    io = with_gather(io, mine, to, C)

    push_to_block(to_push, first, (first < items).to(tl.int32), bases, offset, place, C, OWN)
    for item in range(first + tl.num_programs(0), items, tl.num_programs(0)):
        more = own_part(x, item, (item < kept * S.split).to(tl.int32), C, S)
        push_to_block(more, item, 1, bases, offset, place, C, OWN)

    ok = tl.arange(0, S.lanes) * 0 + 1
    for item in range(first, items, tl.num_programs(0)):
        row = item // S.split
        part = item % S.split
        if row < kept:
            source = x.to(tl.int64) + row.to(tl.int64) * C.row_bytes
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
                words = receive_part(source, row, part, i, own_plane, place, block * RANKS, phase, in_block, C, OWN)
                held = held + (accept(sum_over_ranks(words, C, OWN), row, part, i, io, scale, load, C, S),)
            finish(held, row, part, io, state, phase, watch, eps, loads, C, S)
        else:
            nothing = row.to(tl.int64) * 0
            for i in tl.static_range(STEPS):
                full = receive_part(nothing, row, part, i, own_plane, place, block * RANKS, phase, in_block, C, OWN)[
                    4 * RANKS
                ]
                element, active = lane_elements(part, i, C, S)
                push_to_all(fill(mine, row, part, i, 0, C, S), row, element, active & full, to, C, S)
                ok = ok & full

    for item in range(first, items, tl.num_programs(0)):
        row = item // S.split
        for i in tl.static_range(STEPS):
            found = receive_normed(
                row, item % S.split, i, own_plane + gather, normed, stride, block, phase, watch, C, S
            )
            ok = ok & found
    end(state, phase)
    # A lane that got its words has stored them: no row may be left with some of them.
    if (items == 0) | (tl.min(ok, axis=0) == 0):
        poison(kept, io, C, S)
        poison_blocks(rows, stride, normed, C, S)
    let_next_kernel_start(PDL)


@triton.jit(do_not_specialize=["rank", "rows", "kept", "stride", "phase_bytes", "limit"])
def gathered_blocks_kernel(
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
    """Arguments as in ``gathered_rows_kernel``, but for ``x``: the rows of the own block in this launch, ``kept`` of them.

    A phase holds two areas: scatter, where the slot of (row of the own block, place in the block) is
    ``(row * R + place) * row_bytes``, and behind its ``rows * R`` rows gather, as there.
    """
    io = (residual, weight, bias, normed, residual_out)
    gathered_blocks(x, io, peers, state, rank, rows, kept, stride, phase_bytes, limit, eps, scale, C, S)


@triton.jit(do_not_specialize=["rank", "rows", "kept", "stride", "phase_bytes", "limit"])
def gathered_blocks_layer_norm_kernel(
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
    """:func:`gathered_blocks_kernel` with a LayerNorm; ``shift``, ``(H,)``, is added behind the weight.

    ``addend``, of the rows that this rank keeps, is added behind the bias. Unused ones are any pointer.
    """
    io = (residual, weight, bias, normed, residual_out, shift, addend)
    gathered_blocks(x, io, peers, state, rank, rows, kept, stride, phase_bytes, limit, eps, scale, C, S)
