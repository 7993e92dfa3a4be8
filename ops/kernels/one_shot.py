"""One-shot: every rank pushes its rows to every other rank, and every rank reduces everything itself.

One store-to-visible latency and ``(W - 1) * B`` bytes out of each rank, where ``B`` is the size of ``x``: best while the
latency dominates. Between two GPUs it is the fastest at every size measured; where two-shot takes over for more ranks stands
in the table of ``ops/select.py``, with where each number comes from.
"""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102
from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import (
    EPOCHS,
    MAX_PROGRAMS,
    RECORD_BYTES,
    STAMPS,
    accept,
    failed,
    finish,
    lane_elements,
    poison,
    prefetch,
)
from .memory import clear, load16, marked, poll, push
from .words import pack, plus, plus_words, positive_zeros, unpack


@triton.jit
def sum_over_ranks(words, C: tl.constexpr, S: tl.constexpr):
    """Words of the fp32 sum in rank order, rounded once to the dtype; a zero is +0.0, whatever signs it was made of."""
    WORLD: tl.constexpr = S.world
    total = (words[0], words[1], words[2], words[3])
    if WORLD == 2:
        total = plus_words(total, (words[4], words[5], words[6], words[7]), C.dtype, S.ptx)
    else:
        values = unpack(total, C.dtype)
        for r in tl.static_range(1, WORLD):
            values = plus(values, unpack((words[4 * r], words[4 * r + 1], words[4 * r + 2], words[4 * r + 3]), C.dtype))
        total = pack(values, C.dtype, S.ptx)
    return positive_zeros(total, C.dtype, S.ptx)


@triton.jit
def own_part(x, item, allowed, C: tl.constexpr, S: tl.constexpr):
    """This rank's words of an item, one tuple a step. All loads are in flight before any push."""
    STEPS: tl.constexpr = S.steps
    row = item // S.split
    held = ()
    for i in tl.static_range(STEPS):
        element, active = lane_elements(item % S.split, i, C, S)
        source = x.to(tl.int64) + (row.to(tl.int64) * C.hidden + element) * C.item_bytes
        held = held + (load16(source, active & allowed, S.ptx),)
    return held


@triton.jit
def push_to_peers(held, item, allowed, bases, offset, rank, C: tl.constexpr, S: tl.constexpr):
    """Push what :func:`own_part` returned to every other rank."""
    STEPS: tl.constexpr = S.steps
    WORLD: tl.constexpr = S.world
    row = item // S.split
    for i in tl.static_range(STEPS):
        words = marked(held[i], C.zero_mark)
        element, active = lane_elements(item % S.split, i, C, S)
        slot = offset + (row.to(tl.int64) * S.world + rank) * C.row_bytes + element * C.item_bytes
        for r in tl.static_range(WORLD):
            push(bases[r] + slot, words, active & allowed & (r != rank).to(tl.int32), S.ptx)


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """With programmatic dependent launch: until the previous kernel in the stream has ended and its writes are visible.

    ``"early"`` lets the next kernel be launched at once. It waits here in its turn, so it reads nothing too soon; its
    programs only sit beside ours, for which ``dispatch.plan_of`` leaves room.
    """
    if PDL != "off":
        tl.extra.cuda.gdc_wait()
    if PDL == "early":
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def let_next_kernel_start(PDL: tl.constexpr):
    """After the last store: the next kernel may be launched while this one drains."""
    if PDL == "end":
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def begin(state):
    """This call's phase."""
    return tl.load(state + EPOCHS + tl.program_id(0))


@triton.jit
def end(state, phase):
    """Flip the phase for the next call. Program 0 also flips the words of programs that this grid does not have.

    A word a program instead of one for all: no program may flip a word that another has yet to read, and waiting for the
    last program would cost an atomic at the end of every call.
    """
    tl.store(state + EPOCHS + tl.program_id(0), phase ^ 1)
    if tl.program_id(0) == 0:
        others = tl.arange(0, MAX_PROGRAMS)
        tl.store(
            state + EPOCHS + others,
            tl.zeros((MAX_PROGRAMS,), tl.int32) + (phase ^ 1),
            mask=others >= tl.num_programs(0),
        )


@triton.jit
def now(S: tl.constexpr):
    """Nanoseconds of the GPU's clock, as the first warp sees it; 0 unless the variant keeps stamps."""
    if S.stamps:
        return tl.extra.cuda.globaltimer()
    else:
        return tl.full((), 0, tl.int64)


@triton.jit
def keep_stamps(state, phase, times, S: tl.constexpr):
    """Leave ``times``, see ``epilogue.STAMP_NAMES``, behind the state."""
    if S.stamps:
        place = state.to(tl.pointer_type(tl.int64)) + STAMPS + (phase * MAX_PROGRAMS + tl.program_id(0)) * 8
        for i in tl.static_range(len(times)):
            tl.store(place + i, times[i])


@triton.jit(do_not_specialize=["rank", "rows", "phase_bytes", "limit"])
def one_shot_kernel(
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
    """Slot of (row, rank) in a phase: ``(row * W + rank) * row_bytes``.

    Args:
        x, residual, weight, bias, normed, residual_out: contiguous, 16-byte aligned; unused ones are any pointer.
        peers: int64 ``(W + 1,)``: the address of each rank's plane, then the address of the host's failure record.
        state: the plane's local int32 state, see ``epilogue.py``.
        phase_bytes: size of one of the two phases.
        limit: watchdog in nanoseconds.
    """
    WORLD: tl.constexpr = S.world
    PDL: tl.constexpr = S.pdl  # Triton 3.6 passes no plain string on
    STEPS: tl.constexpr = S.steps
    launched = now(S)
    # The table of planes never changes: the only thing that may be read before the previous kernel has ended.
    bases = ()
    for r in tl.static_range(WORLD):
        bases = bases + (tl.load(peers + r),)
    own_base = tl.load(peers + rank)
    wait_for_previous_kernel(PDL)
    begun = now(S)
    first = tl.program_id(0)
    items = rows * S.split
    has_first = (first < items).to(tl.int32)
    # Before the phase is asked for: both are on their way together.
    held = own_part(x, first, has_first, C, S)
    phase = begin(state)
    io = (residual, weight, bias, normed, residual_out)
    if S.world > 4:  # the words of so many ranks leave no register for a second count
        if failed(state):
            poison(rows, io, C, S)
            return
    else:
        # Without items nothing is pushed and nothing polled. The way of a call that is well stays straight, with the stores of
        # NaN behind it: 2 to 3 % of the time of a few rows between two GPUs.
        items = tl.where(failed(state), 0, items)
    offset = phase.to(tl.int64) * phase_bytes
    own_plane = own_base + offset
    watch = (state.to(tl.int64), peers.to(tl.int64), limit.to(tl.int64))
    # All pushes first: the later ones travel while the first rows are being reduced.
    push_to_peers(held, first, (first < items).to(tl.int32), bases, offset, rank, C, S)
    for item in range(first + tl.num_programs(0), items, tl.num_programs(0)):
        push_to_peers(own_part(x, item, 1, C, S), item, 1, bases, offset, rank, C, S)
    pushed = now(S)
    received = pushed
    for item in range(first, items, tl.num_programs(0)):
        row = item // S.split
        part = item % S.split
        loads = ()
        held = ()
        if S.steps <= 2:
            for i in tl.static_range(STEPS):
                loads = loads + (prefetch(row, part, i, io, C, S),)
        for i in tl.static_range(STEPS):
            element, active = lane_elements(part, i, C, S)
            source = x.to(tl.int64) + (row.to(tl.int64) * C.hidden + element) * C.item_bytes
            slots = own_plane + row.to(tl.int64) * (S.world * C.row_bytes) + element * C.item_bytes
            if S.steps > 2:
                load = prefetch(row, part, i, io, C, S)
            else:
                load = loads[i]
            words = poll(
                slots,
                source,
                rank,
                active,
                row,
                phase,
                watch,
                SLOTS=S.world,
                STRIDE=C.row_bytes,
                WORDS=4 * S.world,
                WAIT=S.wait,
                PTX=S.ptx,
                RECORD_AT=RECORD_BYTES,
                HOST_AT=8 * S.world,
            )
            received = now(S)
            for r in tl.static_range(WORLD):
                clear(slots + r * C.row_bytes, active & (r != rank).to(tl.int32), S.ptx)
            reduced = sum_over_ranks(words, C, S)
            held = held + (accept(reduced, row, part, i, io, scale, load, C, S),)
        finish(held, row, part, io, state, phase, watch, eps, loads, C, S)
    end(state, phase)
    keep_stamps(state, phase, (launched, begun, pushed, pushed, received, now(S)), S)
    if S.world <= 4:
        if items == 0:
            poison(rows, io, C, S)
    let_next_kernel_start(PDL)
