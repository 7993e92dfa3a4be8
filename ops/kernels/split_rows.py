"""What the programs of a split row tell each other: sums of squares of their groups, sums of values, and largest values."""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from . import state as at
from .memory import clear, poll
from .reduction import lane_sums_of_squares, over_lanes, over_lanes_period, sums_over_lanes
from .rows import held_values

MAX_GROUPS: tl.constexpr = tl.constexpr(at.MAX_GROUPS)
PARTIALS: tl.constexpr = tl.constexpr(at.PARTIALS)
RECORD_BYTES: tl.constexpr = tl.constexpr(at.RECORD_BYTES)
TOPS: tl.constexpr = tl.constexpr(at.TOPS)


@triton.jit
def as_written(total, SIGNED: tl.constexpr):
    """The word of a sum by which a reader sees that it was written: never zero."""
    word = total.to(tl.int32, bitcast=True)
    if SIGNED:
        return tl.where(word == 0, -2147483648, word)
    else:
        return word | (-2147483648)


@triton.constexpr_function
def announce_asm(signed):
    """PTX that stores a word, behind a fence where it is a NaN."""
    nan = "setp.gt.u32 %p, $2, 0xFF800000;"
    if signed:  # of either sign
        nan = ".reg .b32 %a; and.b32 %a, $2, 0x7FFFFFFF; setp.gt.u32 %p, %a, 0x7F800000;"
    return f"""
            {{
            .reg .pred %p;
            {nan}
            @%p fence.acq_rel.gpu;
            setp.ne.u32 %p, $3, 0;
            @%p st.relaxed.gpu.global.u32 [$1], $2;
            mov.u32 $0, 0;
            }}
            """


@triton.jit
def announce(sums, part, state, S: tl.constexpr, SIGNED: tl.constexpr = False):
    """Write the sums of squares of this program's groups into the area of every program of its row.

    A sum is not negative, so its sign bit marks it as written: each word carries its own flag, as in a push. Relaxed stores
    of GPU scope, read by relaxed loads: both are strong, so they do not race, and a reader sees either zero or the word. Its
    value is all that the reader needs, so no order with other memory is asked for, which would make every announcement wait
    for the stores of ``residual_out``. Only a NaN may vouch for something else, the record of a sibling that gave up: a
    fence here and one in :func:`spoil` order that, on a path that finite rows never take.

    Sums of values (``SIGNED``) have an area of their own, since a sibling may announce its sums of squares before these have
    been read, and no bit to spare: a zero is announced as the negative one, as in a push.

    One element a thread: with fewer, inline PTX would store again from the replicas, perhaps after the reader restored its
    zeros.
    """
    GROUPS: tl.constexpr = S.groups_a_step
    AREA: tl.constexpr = TOPS if SIGNED else PARTIALS
    first = tl.program_id(0) - part
    if S.ptx:
        PERIOD: tl.constexpr = over_lanes_period(S.steps, S.groups_a_step)
        word = as_written(over_lanes(sums, GROUPS, False), SIGNED)
        lane = tl.arange(0, S.lanes)
        place = state + AREA + (first + lane // PERIOD) * MAX_GROUPS + part * S.groups + lane % PERIOD
        active = ((lane // PERIOD < S.split) & (lane % PERIOD < S.groups)).to(tl.int32)
        tl.inline_asm_elementwise(
            announce_asm(SIGNED),
            "=r,l,r,r",
            [place.to(tl.int64), word, active],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        STEPS: tl.constexpr = S.steps
        readers = tl.arange(0, MAX_GROUPS)
        for i in tl.static_range(STEPS):
            word = as_written(sums_over_lanes(sums[i], GROUPS), SIGNED)
            areas = state + AREA + (first + readers) * MAX_GROUPS + (part * S.steps + i) * GROUPS
            if GROUPS == 1:
                words = tl.zeros((MAX_GROUPS,), tl.int32) + word
                tl.atomic_xchg(areas, words, mask=readers < S.split, sem="release", scope="gpu")
            else:
                places = areas[None, :] + tl.arange(0, GROUPS)[:, None]
                words = tl.zeros((GROUPS, MAX_GROUPS), tl.int32) + word[:, None]
                tl.atomic_xchg(places, words, mask=(readers < S.split)[None, :], sem="release", scope="gpu")


@triton.jit
def folded(totals, HALF: tl.constexpr):
    """The upper half of up to ``2 * HALF`` values added to the lower one."""
    out = ()
    for i in tl.static_range(len(totals)):
        if i < HALF:
            if i + HALF < len(totals):
                out = out + (totals[i] + totals[i + HALF],)
            else:
                out = out + (totals[i],)
    return out


@triton.jit
def exchange(sums, part, row, state, phase, watch, C: tl.constexpr, S: tl.constexpr, SIGNED: tl.constexpr = False):
    """The sum of squares, fp32, of a row that ``S.split`` neighboring programs hold, one item each. ``SIGNED``: the mean.

    Push and poll again, within one GPU: every program announces its sums, polls its own area, and restores its zeros when
    it has nothing else to do (:func:`restore`). The kernel boundary orders them before the next call's writes: one phase
    is enough. It waits longer than the poll of a slot: a sibling that waits for a peer gives up first, announces NaN, and
    the record names the peer.
    """
    WORDS: tl.constexpr = S.split * S.groups
    AREA: tl.constexpr = TOPS if SIGNED else PARTIALS
    announce(sums, part, state, S, SIGNED)
    mine = state + AREA + tl.program_id(0) * MAX_GROUPS
    words = poll(
        mine.to(tl.int64),
        mine.to(tl.int64),
        -1,
        1,
        row,
        phase + 2,
        (watch[0], watch[1], watch[2] * 8),
        SLOTS=(WORDS + 3) // 4,
        STRIDE=16,
        WORDS=WORDS,
        WAIT=S.wait,
        PTX=S.ptx,
        HEED=False,
        RECORD_AT=RECORD_BYTES,
        HOST_AT=8 * S.world,
    )
    totals = ()
    for i in tl.static_range(WORDS):
        word = words[i] if SIGNED else words[i] & 0x7FFFFFFF
        totals = totals + (word.to(tl.float32, bitcast=True).to(tl.float64),)
    if SIGNED:
        # Values may cancel, so the order shows: halves upon halves, as in over_lanes_asm, where zeros fill up the upper half.
        return over_width(folded(folded(folded(folded(totals, 8), 4), 2), 1)[0], C).to(tl.float32)
    # In pairs: exact as any other order, and the fewest additions in a row.
    for _ in tl.static_range(4):
        pairs = ()
        for i in tl.static_range(len(totals) // 2):
            pairs = pairs + (totals[2 * i] + totals[2 * i + 1],)
        if len(totals) % 2 == 1:
            pairs = pairs + (totals[len(totals) - 1],)
        totals = pairs
    return totals[0].to(tl.float32)


@triton.jit
def exchange_tops(top, part, row, state, phase, watch, S: tl.constexpr):
    """The largest of a row from the largest of each of its programs: int32 bits of absolute values, the same in all lanes.

    As :func:`exchange`, in an area of its own: a sibling may announce this before the sums of squares have been read. A sibling
    that lacked the words of a peer has told so there, by NaN behind a fence: this one needs none.
    """
    first = tl.program_id(0) - part
    lane = tl.arange(0, S.lanes)
    place = state + TOPS + (first + lane) * MAX_GROUPS + part
    word = top | (-2147483648)
    if S.ptx:
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred %p;
            setp.ne.u32 %p, $3, 0;
            @%p st.relaxed.gpu.global.u32 [$1], $2;
            mov.u32 $0, 0;
            }
            """,
            "=r,l,r,r",
            [place.to(tl.int64), word, (lane < S.split).to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.atomic_xchg(place, word, mask=lane < S.split, sem="release", scope="gpu")
    SPLIT: tl.constexpr = S.split
    mine = (state + TOPS + tl.program_id(0) * MAX_GROUPS).to(tl.int64)
    words = poll(
        mine,
        mine,
        -1,
        1,
        row,
        phase + 2,
        (watch[0], watch[1], watch[2] * 8),
        SLOTS=(SPLIT + 3) // 4,
        STRIDE=16,
        WORDS=SPLIT,
        WAIT=S.wait,
        PTX=S.ptx,
        HEED=False,
        RECORD_AT=RECORD_BYTES,
        HOST_AT=8 * S.world,
    )
    top = top * 0
    for i in tl.static_range(SPLIT):
        top = tl.maximum(top, words[i] & 0x7FFFFFFF)
    return top


@triton.jit
def restore_tops(state, S: tl.constexpr):
    """:func:`restore` for what :func:`exchange_tops` polled."""
    tl.debug_barrier()
    lane = tl.arange(0, S.lanes)
    place = (state + TOPS + tl.program_id(0) * MAX_GROUPS).to(tl.int64) + lane * 16
    clear(place, (lane < MAX_GROUPS // 4).to(tl.int32), S.ptx)


@triton.jit
def restore(state, S: tl.constexpr):
    """The zeros of what :func:`exchange` polled; strong stores, as those of :func:`announce` to the same words."""
    tl.debug_barrier()  # every warp polled the same words: none may restore them before all have seen them
    lane = tl.arange(0, S.lanes)
    place = (state + PARTIALS + tl.program_id(0) * MAX_GROUPS).to(tl.int64) + lane * 16
    clear(place, (lane < MAX_GROUPS // 4).to(tl.int32), S.ptx)


@triton.jit
def mean_of_squares(held, part, row, state, phase, watch, C: tl.constexpr, S: tl.constexpr):
    """Mean of squares of a row from what this program holds of its groups."""
    STEPS: tl.constexpr = S.steps
    sums = ()
    for i in tl.static_range(STEPS):
        sums = sums + (lane_sums_of_squares(held_values(held[i], C)),)
    return mean_of(sums, part, row, state, phase, watch, C, S)


@triton.jit
def mean_of(sums, part, row, state, phase, watch, C: tl.constexpr, S: tl.constexpr, SIGNED: tl.constexpr = False):
    """The sums of the lanes of a row, one tensor over lanes a step, over H: of squares or, ``SIGNED``, of values."""
    STEPS: tl.constexpr = S.steps
    GROUPS: tl.constexpr = S.groups_a_step
    if S.split > 1:
        total = exchange(sums, part, row, state, phase, watch, C, S, SIGNED)
    elif S.ptx:
        total = over_lanes(sums, GROUPS, True, C.hidden if SIGNED else 0)
    else:
        groups = sums_over_lanes(sums[0], GROUPS).to(tl.float64)
        for i in tl.static_range(1, STEPS):
            groups += sums_over_lanes(sums[i], GROUPS).to(tl.float64)
        total = tl.sum(groups, axis=0) if GROUPS > 1 else groups
        if SIGNED:
            total = over_width(total, C)
        total = total.to(tl.float32)
    if SIGNED:
        return total
    elif C.hidden & (C.hidden - 1) == 0:
        return total * (1.0 / C.hidden)  # the same bits as the division
    else:
        return tl.math.div_rn(total, C.hidden * 1.0)


@triton.jit
def over_width(total, C: tl.constexpr):
    """A sum over H in fp64, as :func:`.reduction.over_lanes_asm` divides it: the mean of a row is rounded once, since all of
    its error is an error of every difference from it."""
    return total * tl.full((), 1.0 / C.hidden, tl.float64)
