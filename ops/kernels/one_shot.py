"""One-shot: every rank pushes its rows to every other rank, and every rank reduces everything itself.

One store-to-visible latency and ``(W - 1) * B`` bytes out of each rank, where ``B`` is the size of ``x``: best while the
latency dominates. On one H200 shared by all ranks see the table in ``docs/measuring.md``; over NVLink4 the model of
``ops/select.py`` puts the crossing to two-shot at 370 KB for W = 4 and 106 KB for W = 8, and never for W = 2.
"""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import EPOCHS, MAX_PROGRAMS, RECORD, accept, finish, lane_elements, prefetch
from .memory import clear, load16, marked, poll, push
from .words import plus, plus_scalar, rounded, unpack


@triton.jit
def sum_over_ranks(words, C: tl.constexpr, S: tl.constexpr):
    """fp32 sum in rank order from +0.0, rounded once to the dtype; a zero is +0.0 even if rounding made it -0.0."""
    WORLD: tl.constexpr = S.world
    total = plus_scalar(unpack((words[0], words[1], words[2], words[3]), C.dtype), 0.0)
    for r in tl.static_range(1, WORLD):
        total = plus(total, unpack((words[4 * r], words[4 * r + 1], words[4 * r + 2], words[4 * r + 3]), C.dtype))
    return plus_scalar(rounded(total, C.dtype, S.ptx), 0.0)


@triton.jit
def own_words(x, row, part, allowed, C: tl.constexpr, S: tl.constexpr):
    """What this rank pushes of its part of a row: marked words, one tuple a step. All loads are in flight before any push."""
    STEPS: tl.constexpr = S.steps
    held = ()
    for i in tl.static_range(STEPS):
        element, active = lane_elements(part, i, C, S)
        source = x.to(tl.int64) + (row.to(tl.int64) * C.hidden + element) * C.item_bytes
        held = held + (load16(source, active & allowed, S.ptx),)
    words = ()
    for i in tl.static_range(STEPS):
        words = words + (marked(held[i], C.zero_mark),)
    return words


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
def give_up_limit(state, limit):
    """The watchdog's limit: 0 once a poll has given up, so that the calls queued behind it end at once."""
    return tl.where(tl.load(state + RECORD) != 0, 0, limit.to(tl.int64))


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
    # The table of planes never changes: the only thing that may be read before the previous kernel has ended.
    bases = ()
    for r in tl.static_range(WORLD):
        bases = bases + (tl.load(peers + r),)
    own_base = tl.load(peers + rank)
    host_record = tl.load(peers + S.world)
    wait_for_previous_kernel(PDL)
    phase = begin(state)
    limit = give_up_limit(state, limit)
    own_plane = own_base + phase.to(tl.int64) * phase_bytes
    io = (residual, weight, bias, normed, residual_out)
    watch = ((state + RECORD).to(tl.int64), host_record, limit)
    items = rows * S.split
    # All pushes first: the later ones travel while the first rows are being reduced.
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        row = item // S.split
        words = own_words(x, row, item % S.split, 1, C, S)
        for i in tl.static_range(STEPS):
            element, active = lane_elements(item % S.split, i, C, S)
            slot = (row.to(tl.int64) * S.world + rank) * C.row_bytes + element * C.item_bytes
            for r in tl.static_range(WORLD):
                peer = bases[r] + phase.to(tl.int64) * phase_bytes
                push(peer + slot, words[i], active & (r != rank).to(tl.int32), S.ptx)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
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
            )
            for r in tl.static_range(WORLD):
                clear(slots + r * C.row_bytes, active & (r != rank).to(tl.int32), S.ptx)
            reduced = sum_over_ranks(words, C, S)
            held = held + (accept(reduced, row, part, i, io, scale, load, C, S),)
        finish(held, row, part, io, state, phase, watch, eps, loads, C, S)
    end(state, phase)
    let_next_kernel_start(PDL)
