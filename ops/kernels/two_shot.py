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

from . import state as at
from .call import begin, end, failed, let_next_kernel_start, poison, wait_for_previous_kernel
from .epilogue import accept, finish, loaded, of_row, prefetch, second_of, with_second
from .memory import clear, marked, poll, push
from .packing import positive_zeros
from .reduction import both_halves, sum_over_ranks
from .rows import clear_ranks, lane_elements, own_part, own_words, poll_ranks
from .stamps import keep_stamps, now

RECORD_BYTES: tl.constexpr = tl.constexpr(at.RECORD_BYTES)


@triton.jit
def item_of(turn, S: tl.constexpr):
    """The item that this program handles in its ``turn``-th turn.

    Rotated by one program a turn: with a grid that is a multiple of W a program would otherwise meet only rows of one
    owner, and a W-th of the programs would do all of the reducing.
    """
    programs = tl.num_programs(0)
    if S.split > 1:
        return turn * programs + tl.program_id(0)
    else:
        return turn * programs + (tl.program_id(0) + turn) % programs


@triton.jit
def for_others(item, items, rank, S: tl.constexpr):
    """1 where the item exists and another rank owns its row."""
    return ((item < items) & (item // S.split % S.world != rank)).to(tl.int32)


@triton.jit
def push_to_owner(held, item, allowed, peers, offset, rank, C: tl.constexpr, S: tl.constexpr):
    """Push what ``own_part`` returned to the owner of its row."""
    STEPS: tl.constexpr = S.steps
    row = item // S.split
    slot = (row // S.world * S.world + rank).to(tl.int64) * C.row_bytes
    target = tl.load(peers + row % S.world) + offset + slot
    for i in tl.static_range(STEPS):
        element, active = lane_elements(item % S.split, i, C, S)
        push(target + element * C.item_bytes, marked(held[i], C.pushed_mark), active & allowed, S.ptx)


@triton.jit
def reduce_for_all(
    x, item, peers, rank, offset, own_plane, gather, behind, phase, watch, C: tl.constexpr, S: tl.constexpr
):
    """Reduce what the ranks pushed of an item whose row this rank owns, and push the sum to all of them.

    Args:
        x: this rank's own rows.
        gather: bytes from the start of an area to the sums of its rows.
        behind: bytes to the second rows of words of a wide sum.
    """
    WORLD: tl.constexpr = S.world
    STEPS: tl.constexpr = S.steps
    row = item // S.split
    for i in tl.static_range(STEPS):
        element, active = lane_elements(item % S.split, i, C, S)
        source = own_words(x, row, element, C)
        slots = own_plane + (row // S.world * S.world).to(tl.int64) * C.row_bytes + element * C.item_bytes
        words = poll_ranks(slots, source, rank, active, row, phase, watch, C, S)
        clear_ranks(slots, rank, active, C, S)
        total = sum_over_ranks(words, C, S)
        full = words[4 * WORLD]
        if C.wide_sum:
            words = poll_ranks(slots + behind, own_words(x, row, element, C, 1), rank, active, row, phase, watch, C, S)
            clear_ranks(slots + behind, rank, active, C, S)
            total = both_halves(total, sum_over_ranks(words, C, S), C, S)
            full = full & words[4 * WORLD]
        total = marked(total, C.zero_mark)
        place = gather + row.to(tl.int64) * C.row_bytes + element * C.item_bytes
        for r in tl.static_range(WORLD):
            # What a poll gave up is pushed to nobody: see memory.py.
            # Volatile, so that the addresses of all ranks are not kept in registers from one poll to the next.
            push(tl.load(peers + r, volatile=C.sums == 2) + offset + place, total, active & full, S.ptx)


@triton.jit
def poll_sum(place, active, row, phase, watch, C: tl.constexpr, S: tl.constexpr):
    """Wait for the words of a sum that its owner pushes."""
    return poll(
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
        WAIT=S.wait,
        PTX=S.ptx,
        RECORD_AT=RECORD_BYTES,
        HOST_AT=8 * S.world,
    )


@triton.jit
def received_sum(words, C: tl.constexpr, S: tl.constexpr):
    """The sum from what :func:`poll_sum` returned: + 0.0 takes the mark's sign away again."""
    return positive_zeros((words[0], words[1], words[2], words[3]), C.dtype, S.ptx)


@triton.jit
def two_shot(x, io, peers, state, rank, rows, phase_bytes, limit, eps, scale, C: tl.constexpr, S: tl.constexpr):
    """All of a call. ``io``: see :func:`.epilogue.finish`; the rest as in :func:`two_shot_kernel`."""
    PDL: tl.constexpr = S.pdl  # Triton 3.6 passes no plain string on
    STEPS: tl.constexpr = S.steps
    launched = now(S)
    own_base = tl.load(peers + rank)
    wait_for_previous_kernel(PDL)
    begun = now(S)
    scale = loaded(scale, C)
    items = rows * S.split
    first = item_of(0, S)
    # Before the phase is asked for: both are on their way together.
    to_push = own_part(x, first, for_others(first, items, rank, S), C, S)
    if C.sums == 2:
        second = own_part(second_of(x, io, C), first, for_others(first, items, rank, S), C, S, 1)
    phase = begin(state)
    items = tl.where(failed(state), 0, items)  # no push and no poll on a failed plane; see one_shot_kernel
    turns = (items + tl.num_programs(0) - 1) // tl.num_programs(0)
    offset = phase.to(tl.int64) * phase_bytes
    own_plane = own_base + offset
    watch = (state.to(tl.int64), peers.to(tl.int64), limit.to(tl.int64))
    gather = ((rows + S.world - 1) // S.world * S.world).to(tl.int64) * C.row_bytes

    push_to_owner(to_push, first, for_others(first, items, rank, S), peers, offset, rank, C, S)
    behind = 0
    if C.sums == 2:
        # Their two areas lie behind those of the first rows of words; a wide sum, which is one row, leaves the last one empty.
        behind = gather + rows.to(tl.int64) * C.row_bytes
        push_to_owner(second, first, for_others(first, items, rank, S), peers, offset + behind, rank, C, S)
    for turn in range(1, turns):
        item = item_of(turn, S)
        inside = for_others(item, items, rank, S)
        push_to_owner(own_part(x, item, inside, C, S), item, inside, peers, offset, rank, C, S)
        if C.sums == 2:
            more = own_part(second_of(x, io, C), item, inside, C, S, 1)
            push_to_owner(more, item, inside, peers, offset + behind, rank, C, S)

    pushed = now(S)
    for turn in range(0, turns):
        item = item_of(turn, S)
        row = item // S.split
        if (item < items) & (row % S.world == rank):
            reduce_for_all(x, item, peers, rank, offset, own_plane, gather, behind, phase, watch, C, S)
            if C.second:
                more, plane = second_of(x, io, C), own_plane + behind
                reduce_for_all(more, item, peers, rank, offset + behind, plane, gather, 0, phase, watch, C, S)

    reduced_all = now(S)
    received = reduced_all
    for turn in range(0, turns):
        item = item_of(turn, S)
        if item < items:
            row = item // S.split
            part = item % S.split
            factor = of_row(scale, row, C)
            loads = ()
            held = ()
            if S.steps <= 2:
                for i in tl.static_range(STEPS):
                    loads = loads + (prefetch(row, part, i, io, C, S),)
            for i in tl.static_range(STEPS):
                element, active = lane_elements(part, i, C, S)
                place = own_plane + gather + row.to(tl.int64) * C.row_bytes + element * C.item_bytes
                if S.steps > 2:
                    load = prefetch(row, part, i, io, C, S)
                else:
                    load = loads[i]
                words = poll_sum(place, active, row, phase, watch, C, S)
                received = now(S)
                clear(place, active, S.ptx)
                reduced = received_sum(words, C, S)
                if C.second:
                    words = poll_sum(place + behind, active, row, phase, watch, C, S)
                    received = now(S)
                    clear(place + behind, active, S.ptx)
                    load = with_second(load, received_sum(words, C, S), C)
                held = held + (accept(reduced, row, part, i, io, factor, load, C, S),)
            finish(held, row, part, io, state, phase, watch, eps, loads, C, S)
    end(state, phase)
    keep_stamps(state, phase, (launched, begun, pushed, reduced_all, received, now(S)), S)
    if items == 0:
        poison(rows, io, C, S)
    let_next_kernel_start(PDL)


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
    S: tl.constexpr,
):
    """Arguments as in ``one_shot_kernel``.

    A phase holds two areas: scatter, where the slot of (row, rank) at the row's owner is
    ``((row // W) * W + rank) * row_bytes``, and behind its ``ceil(rows / W) * W`` rows gather, where row ``t`` is at
    ``t * row_bytes``. Those of a second sum, or of the second half of a wide one's words, follow, laid out alike.
    """
    io = (residual, weight, bias, normed, residual_out)
    two_shot(x, io, peers, state, rank, rows, phase_bytes, limit, eps, scale, C, S)


@triton.jit(do_not_specialize=["scale_stride", "rank", "rows", "phase_bytes", "limit"])
def two_shot_quant_kernel(
    x,
    residual,
    weight,
    bias,
    normed,
    residual_out,
    quantized,
    scales,
    static_scale,
    scale_stride,
    peers,
    state,
    rank,
    rows,
    phase_bytes,
    limit,
    eps,
    scale,
    C: tl.constexpr,
    S: tl.constexpr,
):
    """:func:`two_shot_kernel` that quantizes; ``quantized`` to ``scale_stride`` as in :func:`.quantize.quantize_kernel`."""
    io = (residual, weight, bias, normed, residual_out, quantized, scales, static_scale, scale_stride)
    two_shot(x, io, peers, state, rank, rows, phase_bytes, limit, eps, scale, C, S)


@triton.jit(do_not_specialize=["rank", "rows", "phase_bytes", "limit"])
def two_shot_layer_norm_kernel(
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
    phase_bytes,
    limit,
    eps,
    scale,
    C: tl.constexpr,
    S: tl.constexpr,
):
    """:func:`two_shot_kernel` with a LayerNorm; ``shift``, ``(H,)``, is added behind the weight.

    ``addend``, rows as of ``x``, is added behind the bias. Unused ones are any pointer.
    """
    io = (residual, weight, bias, normed, residual_out, shift, addend)
    two_shot(x, io, peers, state, rank, rows, phase_bytes, limit, eps, scale, C, S)


@triton.jit(do_not_specialize=["rank", "rows", "phase_bytes", "limit"])
def two_shot_layer_norm_of_two_kernel(
    x,
    residual,
    weight,
    bias,
    normed,
    residual_out,
    shift,
    addend,
    addend_bias,
    peers,
    state,
    rank,
    rows,
    phase_bytes,
    limit,
    eps,
    scale,
    C: tl.constexpr,
    S: tl.constexpr,
):
    """:func:`two_shot_kernel` of two sums with a LayerNorm; see :func:`.one_shot.one_shot_layer_norm_of_two_kernel`."""
    io = (residual, weight, bias, normed, residual_out, shift, addend, addend_bias)
    two_shot(x, io, peers, state, rank, rows, phase_bytes, limit, eps, scale, C, S)
