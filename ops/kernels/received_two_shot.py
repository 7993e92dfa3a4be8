"""Two-shot with destinations: of the ranks that receive a block, one owns each row, reduces it and pushes the sum to the others.

For blocks that several ranks receive. With ``R`` of ``W`` ranks a block, one-shot sends ``R (W - 1) / W`` of the bytes of ``x``
out of each rank, this kernel ``(W + R - 2) / W``: as much for a block a rank, half of it or less for large calls over eight
ranks. The price is a second round. Row ``t`` of a block belongs to receiver ``t mod R``.

As in :mod:`.received_rows` whole blocks are received and the first ``kept`` rows of the own one are finished; the others are
polled and zeroed as well, and their owners reduce them, for every rank must hear of every other in each call: a rank that polled
a row's sum has heard of its owner, which has heard of all.
"""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from . import state as at
from .call import begin, end, failed, let_next_kernel_start, poison, wait_for_previous_kernel
from .epilogue import accept, finish, prefetch
from .memory import clear, marked, poll, push
from .packing import positive_zeros
from .received_rows import parts_of_blocks
from .reduction import sum_over_ranks
from .rows import clear_ranks, lane_elements, poll_ranks
from .two_shot import item_of

RECORD_BYTES: tl.constexpr = tl.constexpr(at.RECORD_BYTES)


@triton.jit
def push_to_owners(
    held, item, allowed, peers, offset, rank, FIRST: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr, S: tl.constexpr
):
    """Push what :func:`parts_of_blocks` returned to the owner of each block's row."""
    STEPS: tl.constexpr = S.steps
    RECEIVERS: tl.constexpr = S.world // S.blocks
    row = item // S.split
    slot = offset + (row // RECEIVERS * S.world + rank).to(tl.int64) * C.row_bytes
    for n in tl.static_range(COUNT):
        owner = (FIRST + n) * RECEIVERS + row % RECEIVERS
        target = tl.load(peers + owner) + slot
        for i in tl.static_range(STEPS):
            element, active = lane_elements(item % S.split, i, C, S)
            other = active & allowed & (owner != rank).to(tl.int32)
            push(target + element * C.item_bytes, marked(held[n * STEPS + i], C.zero_mark), other, S.ptx)


@triton.jit
def receive_sum(row, part, i: tl.constexpr, gather, owner, phase, watch, C: tl.constexpr, S: tl.constexpr):
    """The words of one step of a row's sum, which rank ``owner`` pushed; their slots are zeros again."""
    element, active = lane_elements(part, i, C, S)
    slot = gather + row.to(tl.int64) * C.row_bytes + element * C.item_bytes
    words = poll(
        slot,
        slot,
        -1,
        active,
        owner,  # in place of the row: what a reader of the record cannot work out
        phase + 6,
        watch,
        SLOTS=1,
        STRIDE=16,
        WORDS=4,
        WAIT=S.wait,
        PTX=S.ptx,
        RECORD_AT=RECORD_BYTES,
        HOST_AT=8 * S.world,
    )
    clear(slot, active, S.ptx)
    # + 0.0 takes the mark's sign away again.
    return positive_zeros((words[0], words[1], words[2], words[3]), C.dtype, S.ptx)


@triton.jit
def received_two_shot(
    x, io, peers, state, rank, rows, kept, stride, phase_bytes, limit, eps, scale, C: tl.constexpr, S: tl.constexpr
):
    """A call. ``io``: see :func:`.epilogue.finish`; the rest as in :func:`received_two_shot_kernel`."""
    WORLD: tl.constexpr = S.world
    PDL: tl.constexpr = S.pdl  # Triton 3.6 passes no plain string on
    STEPS: tl.constexpr = S.steps
    BLOCKS: tl.constexpr = S.blocks
    RECEIVERS: tl.constexpr = S.world // S.blocks
    AT_ONCE: tl.constexpr = S.blocks_at_once
    own_base = tl.load(peers + rank)
    wait_for_previous_kernel(PDL)
    items = rows * S.split
    first = item_of(0, S)
    own_block = rank // RECEIVERS
    place = rank % RECEIVERS
    # Before the phase is asked for: both are on their way together.
    to_push = parts_of_blocks(x, first, stride, (first < items).to(tl.int32), 0, AT_ONCE, C, S)
    phase = begin(state)
    items = tl.where(failed(state), 0, items)  # no push and no poll on a failed plane; see one_shot_kernel
    turns = (items + tl.num_programs(0) - 1) // tl.num_programs(0)
    offset = phase.to(tl.int64) * phase_bytes
    own_plane = own_base + offset
    watch = (state.to(tl.int64), peers.to(tl.int64), limit.to(tl.int64))
    gather = ((rows + RECEIVERS - 1) // RECEIVERS * WORLD).to(tl.int64) * C.row_bytes

    is_there = (first < items).to(tl.int32)
    push_to_owners(to_push, first, is_there, peers, offset, rank, 0, AT_ONCE, C, S)
    for b in tl.static_range(AT_ONCE, BLOCKS, AT_ONCE):
        more = parts_of_blocks(x, first, stride, is_there, b, AT_ONCE, C, S)
        push_to_owners(more, first, is_there, peers, offset, rank, b, AT_ONCE, C, S)
    for turn in range(1, turns):
        item = item_of(turn, S)
        inside = (item < items).to(tl.int32)
        for b in tl.static_range(0, BLOCKS, AT_ONCE):
            more = parts_of_blocks(x, item, stride, inside, b, AT_ONCE, C, S)
            push_to_owners(more, item, inside, peers, offset, rank, b, AT_ONCE, C, S)

    for turn in range(0, turns):
        item = item_of(turn, S)
        row = item // S.split
        if (item < items) & (row % RECEIVERS == place):
            for i in tl.static_range(STEPS):
                element, active = lane_elements(item % S.split, i, C, S)
                source = (own_block * stride + row).to(tl.int64) * C.hidden + element
                slots = own_plane + (row // RECEIVERS * WORLD).to(tl.int64) * C.row_bytes + element * C.item_bytes
                words = poll_ranks(slots, x.to(tl.int64) + source * C.item_bytes, rank, active, row, phase, watch, C, S)
                clear_ranks(slots, rank, active, C, S)
                total = marked(sum_over_ranks(words, C, S), C.zero_mark)
                where = offset + gather + row.to(tl.int64) * C.row_bytes + element * C.item_bytes
                for k in tl.static_range(RECEIVERS):
                    # What a poll gave up is pushed to nobody: see memory.py.
                    push(tl.load(peers + own_block * RECEIVERS + k) + where, total, active & words[4 * WORLD], S.ptx)

    for turn in range(0, turns):
        item = item_of(turn, S)
        if item < items:
            row = item // S.split
            part = item % S.split
            owner = own_block * RECEIVERS + row % RECEIVERS
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
                    reduced = receive_sum(row, part, i, own_plane + gather, owner, phase, watch, C, S)
                    held = held + (accept(reduced, row, part, i, io, scale, load, C, S),)
                finish(held, row, part, io, state, phase, watch, eps, loads, C, S)
            else:
                for i in tl.static_range(STEPS):
                    receive_sum(row, part, i, own_plane + gather, owner, phase, watch, C, S)
    end(state, phase)
    if items == 0:
        poison(kept, io, C, S)
    let_next_kernel_start(PDL)


@triton.jit(do_not_specialize=["rank", "rows", "kept", "stride", "phase_bytes", "limit"])
def received_two_shot_kernel(
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
    """Arguments as in ``received_rows_kernel``.

    A phase holds two areas: scatter, where the slot of (row of a block, rank) at the row's owner is
    ``((row // R) * W + rank) * row_bytes``, and behind its ``ceil(rows / R) * W`` rows gather, where row ``t`` of the own block
    is at ``t * row_bytes``.
    """
    io = (residual, weight, bias, normed, residual_out)
    received_two_shot(x, io, peers, state, rank, rows, kept, stride, phase_bytes, limit, eps, scale, C, S)


@triton.jit(do_not_specialize=["rank", "rows", "kept", "stride", "phase_bytes", "limit"])
def received_two_shot_layer_norm_kernel(
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
    """:func:`received_two_shot_kernel` with a LayerNorm; ``shift``, ``(H,)``, is added behind the weight.

    ``addend``, of the rows that this rank keeps, is added behind the bias. Unused ones are any pointer.
    """
    io = (residual, weight, bias, normed, residual_out, shift, addend)
    received_two_shot(x, io, peers, state, rank, rows, kept, stride, phase_bytes, limit, eps, scale, C, S)
