"""What happens to a reduced row: bias, scale, residual add, norm. Shared by every kernel of this folder.

A row is cut into *groups* of 128 lanes x 16 bytes (1024 bf16 values). A program holds consecutive groups of one row,
``S.steps`` times ``S.groups_a_step`` of them, and ``S.split`` programs hold the row. The sum of squares is defined by groups
alone: one fixed tree per group in fp32, then the groups in fp64, rounded once. The order of that second sum does not show:
at most 16 values of 24 bits add up in 53 bits exactly, as long as the largest is below 2**25 times the smallest. So the bits
of a row do not depend on how many programs share it, on their width, on the number of rows or on the algorithm.

``C`` is a :class:`.constants.Constants` and ``S`` a :class:`.constants.Variant`.
"""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005, SIM300, PLR0124, PLR1714
from __future__ import annotations

import triton
import triton.language as tl

from .memory import NAN_WORD, clear, load16, poll, store16
from .words import (
    lane_sums_of_squares,
    over_lanes,
    over_lanes_period,
    over_scalar,
    pack,
    plus,
    plus_scalar,
    plus_words,
    rounded,
    sums_over_lanes,
    times,
    times_scalar,
    times_words,
    unpack,
)

_NAN: tl.constexpr = tl.constexpr(NAN_WORD)
MAX_GROUPS: tl.constexpr = tl.constexpr(16)  # groups of a row: H <= 16384 for 16-bit dtypes, 8192 for fp32
# The state of a plane that only its own rank touches, as int32 words.
MAX_PROGRAMS: tl.constexpr = tl.constexpr(1024)
EPOCHS: tl.constexpr = tl.constexpr(0)  # one word a program: calls so far, modulo 2
RECORD: tl.constexpr = tl.constexpr(1024)  # what a poll that gave up was waiting for; word 0 is 0 while all is well
RECORD_BYTES: tl.constexpr = tl.constexpr(4 * 1024)  # also in the PTX of spoil
PARTIALS: tl.constexpr = tl.constexpr(1040)  # per program: MAX_GROUPS sums of squares, from the programs of its row
STATE_WORDS = 1040 + 1024 * 16
# Behind the state of a kernel with stamps, which has to be larger: for each phase and program eight int64, in nanoseconds.
STAMPS: tl.constexpr = tl.constexpr(STATE_WORDS // 2)
STAMP_NAMES = ("launched", "begun", "pushed", "reduced", "received", "finished")
STAMP_WORDS = 2 * 1024 * 8 * 2


@triton.jit
def load_words(pointer, element, active, DTYPE: tl.constexpr, VALUES: tl.constexpr, PTX: tl.constexpr):
    """The words of ``VALUES`` consecutive values a lane from ``element`` (an int64 offset in values): four, or eight."""
    if DTYPE == tl.float32:
        address = pointer.to(tl.int64) + element * 4
        words = load16(address, active, PTX)
        if VALUES == 8:
            words = words + load16(address + 16, active, PTX)
        return words
    else:
        return load16(pointer.to(tl.int64) + element * 2, active, PTX)


@triton.jit
def values_of(words, DTYPE: tl.constexpr):
    """The fp32 values of what :func:`load_words` returned."""
    values = unpack((words[0], words[1], words[2], words[3]), DTYPE)
    if len(words) == 8:
        values = values + unpack((words[4], words[5], words[6], words[7]), DTYPE)
    return values


@triton.jit
def words_of(values, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The words of fp32 values rounded to ``DTYPE``: four, or eight for eight fp32 values."""
    words = pack(values, DTYPE, PTX)
    if DTYPE == tl.float32 and len(values) == 8:
        words = words + pack((values[4], values[5], values[6], values[7]), DTYPE, PTX)
    return words


@triton.jit
def store_words(pointer, element, words, active, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Store what :func:`words_of` returned from ``element`` on."""
    if DTYPE == tl.float32:
        address = pointer.to(tl.int64) + element * 4
        store16(address, (words[0], words[1], words[2], words[3]), active, PTX)
        if len(words) == 8:
            store16(address + 16, (words[4], words[5], words[6], words[7]), active, PTX)
    else:
        store16(pointer.to(tl.int64) + element * 2, words, active, PTX)


@triton.jit
def affine(words, shift, scale, C: tl.constexpr, PTX: tl.constexpr):
    """Bias (its words), then scale, each rounded to the dtype as eager mode does; words in, words out."""
    if C.bias != "none":
        words = plus_words(words, shift, C.dtype, PTX)
    if C.scaled:
        words = pack(times_scalar(unpack(words, C.dtype), scale), C.dtype, PTX)
    return words


@triton.jit
def gain_of(weight, C: tl.constexpr, PTX: tl.constexpr):
    """The gain of the norm in the flavour's gain dtype, from the words of the weight."""
    weight = values_of(weight, C.weight_dtype)
    if C.gain_dtype != C.weight_dtype:
        weight = rounded(weight, C.gain_dtype, PTX)
    if C.one_plus:
        weight = rounded(plus_scalar(weight, 1.0), C.gain_dtype, PTX)
    return weight


@triton.jit
def normalised(values, mean, weight, eps, C: tl.constexpr, PTX: tl.constexpr):
    """Words of the normed output of one group, in the flavour's rounding order."""
    v = mean + eps
    if C.root == "rsqrt" or C.root == "pow":
        out = times_scalar(values, tl.rsqrt(v))
    elif C.root == "div_sqrt":
        out = over_scalar(values, tl.math.sqrt_rn(v))
    else:
        out = times_scalar(values, tl.math.div_rn(1.0, tl.math.sqrt_rn(v)))
    if C.plain_gain:
        return times_words(pack(out, C.dtype, PTX), weight, C.dtype, PTX)
    else:
        if C.round_normed:
            out = rounded(out, C.dtype, PTX)
        if C.has_weight:
            out = times(out, gain_of(weight, C, PTX))
            if C.product_dtype != C.out_dtype:
                out = rounded(out, C.product_dtype, PTX)
        return words_of(out, C.out_dtype, PTX)


@triton.jit
def announce(sums, part, state, S: tl.constexpr):
    """Write the sums of squares of this program's groups into the area of every program of its row.

    A sum is not negative, so its sign bit marks it as written: each word carries its own flag, as in a push. Relaxed stores
    of GPU scope, read by relaxed loads: both are strong, so they do not race, and a reader sees either zero or the word. Its
    value is all that the reader needs, so no order with other memory is asked for, which would make every announcement wait
    for the stores of ``residual_out``. Only a NaN may vouch for something else, the record of a sibling that gave up: a
    fence here and one in :func:`spoil` order that, on a path that finite rows never take.

    One element a thread: with fewer, inline PTX would store again from the replicas, perhaps after the reader restored its
    zeros.
    """
    GROUPS: tl.constexpr = S.groups_a_step
    first = tl.program_id(0) - part
    if S.ptx:
        PERIOD: tl.constexpr = over_lanes_period(S.steps, S.groups_a_step)
        word = over_lanes(sums, GROUPS, False).to(tl.int32, bitcast=True) | (-2147483648)
        lane = tl.arange(0, S.lanes)
        place = state + PARTIALS + (first + lane // PERIOD) * MAX_GROUPS + part * S.groups + lane % PERIOD
        active = ((lane // PERIOD < S.split) & (lane % PERIOD < S.groups)).to(tl.int32)
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred %p;
            setp.gt.u32 %p, $2, 0xFF800000;
            @%p fence.acq_rel.gpu;
            setp.ne.u32 %p, $3, 0;
            @%p st.relaxed.gpu.global.u32 [$1], $2;
            mov.u32 $0, 0;
            }
            """,
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
            word = sums_over_lanes(sums[i], GROUPS).to(tl.int32, bitcast=True) | (-2147483648)
            areas = state + PARTIALS + (first + readers) * MAX_GROUPS + (part * S.steps + i) * GROUPS
            if GROUPS == 1:
                words = tl.zeros((MAX_GROUPS,), tl.int32) + word
                tl.atomic_xchg(areas, words, mask=readers < S.split, sem="release", scope="gpu")
            else:
                places = areas[None, :] + tl.arange(0, GROUPS)[:, None]
                words = tl.zeros((GROUPS, MAX_GROUPS), tl.int32) + word[:, None]
                tl.atomic_xchg(places, words, mask=(readers < S.split)[None, :], sem="release", scope="gpu")


@triton.jit
def exchange(sums, part, row, state, phase, watch, C: tl.constexpr, S: tl.constexpr):
    """The sum of squares, fp32, of a row whose groups are held by ``S.split`` neighbouring programs, one item each.

    Push and poll again, within one GPU: every program announces its sums, polls its own area, and restores its zeros when
    it has nothing else to do (:func:`restore`). The kernel boundary orders them before the next call's writes: one phase
    is enough. It waits longer than the poll of a slot: a sibling that waits for a peer gives up first, announces NaN, and
    the record names the peer.
    """
    WORDS: tl.constexpr = S.split * S.groups
    announce(sums, part, state, S)
    mine = state + PARTIALS + tl.program_id(0) * MAX_GROUPS
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
    )
    totals = ()
    for i in tl.static_range(WORDS):
        totals = totals + ((words[i] & 0x7FFFFFFF).to(tl.float32, bitcast=True).to(tl.float64),)
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
def restore(state, S: tl.constexpr):
    """The zeros of what :func:`exchange` polled; strong stores, as those of :func:`announce` to the same words."""
    tl.debug_barrier()  # every warp polled the same words: none may restore them before all have seen them
    lane = tl.arange(0, S.lanes)
    place = (state + PARTIALS + tl.program_id(0) * MAX_GROUPS).to(tl.int64) + lane * 16
    clear(place, (lane < MAX_GROUPS // 4).to(tl.int32), S.ptx)


@triton.jit
def mean_of_squares(held, part, row, state, phase, watch, C: tl.constexpr, S: tl.constexpr):
    """Mean of squares of a row from the words of the groups that this program holds."""
    STEPS: tl.constexpr = S.steps
    GROUPS: tl.constexpr = S.groups_a_step
    sums = ()
    for i in tl.static_range(STEPS):
        sums = sums + (lane_sums_of_squares(unpack(held[i], C.dtype)),)
    if S.split > 1:
        total = exchange(sums, part, row, state, phase, watch, C, S)
    elif S.ptx:
        total = over_lanes(sums, GROUPS, True)
    else:
        groups = sums_over_lanes(sums[0], GROUPS).to(tl.float64)
        for i in tl.static_range(1, STEPS):
            groups += sums_over_lanes(sums[i], GROUPS).to(tl.float64)
        total = (tl.sum(groups, axis=0) if GROUPS > 1 else groups).to(tl.float32)
    if C.hidden & (C.hidden - 1) == 0:
        return total * (1.0 / C.hidden)  # the same bits as the division
    else:
        return tl.math.div_rn(total, C.hidden * 1.0)


@triton.jit
def lane_elements(part, i: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """First element of each lane in step ``i`` of this program, and whether it lies within the row."""
    element = ((part * S.steps + i) * S.lanes + tl.arange(0, S.lanes)) * C.values
    return element, (element < C.hidden).to(tl.int32)


@triton.jit
def prefetch(row, part, i: tl.constexpr, io, C: tl.constexpr, S: tl.constexpr):
    """Words of residual, bias and (for short programs) weight of one step, loaded before the poll so that the wait hides them.

    Words, not values: a value would have to be there before the poll begins, and takes twice the registers.
    """
    element, active = lane_elements(part, i, C, S)
    row_start = row.to(tl.int64) * C.hidden
    residual, weight, bias = io[0], io[1], io[2]
    r = ()
    b = ()
    w = ()
    if C.has_residual and (S.steps <= 2 or not C.post_norm):
        r = load_words(residual, row_start + element, active, C.dtype, C.values, S.ptx)
    if C.bias == "row":
        b = load_words(bias, element.to(tl.int64), active, C.dtype, C.values, S.ptx)
    if C.bias == "full":
        b = load_words(bias, row_start + element, active, C.dtype, C.values, S.ptx)
    if C.has_weight and S.steps <= 2:
        w = load_words(weight, element.to(tl.int64), active, C.weight_dtype, C.values, S.ptx)
    return (r, b, w)


@triton.jit
def accept(
    reduced,
    row,
    part,
    i: tl.constexpr,
    io,
    scale,
    loads,
    C: tl.constexpr,
    S: tl.constexpr,
):
    """Bias, scale and residual add of one step; returns the words of what will be normalised.

    Args:
        reduced: words of the sum over ranks.
        loads: what :func:`prefetch` returned for this step.
    """
    element, active = lane_elements(part, i, C, S)
    words = affine(reduced, loads[1], scale, C, S.ptx)
    if C.has_residual and not C.post_norm:
        words = plus_words(loads[0], words, C.dtype, S.ptx)
    if not C.post_norm:
        address = io[4].to(tl.int64) + (row.to(tl.int64) * C.hidden + element) * C.item_bytes
        store16(address, words, active, S.ptx)
    return words


@triton.jit
def failed(state):
    """Whether a poll on this plane has given up since it was built or reset."""
    return tl.load(state + RECORD) != 0


@triton.jit
def poison(rows, io, C: tl.constexpr, S: tl.constexpr):
    """NaN in both outputs of all rows: what a launch on a plane that has failed does, and all that it does."""
    STEPS: tl.constexpr = S.steps
    for item in range(tl.program_id(0), rows * S.split, tl.num_programs(0)):
        row = item // S.split
        for i in tl.static_range(STEPS):
            element, active = lane_elements(item % S.split, i, C, S)
            start = row.to(tl.int64) * C.hidden + element
            nan = active * 0 + _NAN
            words = (nan, nan, nan, nan)
            if C.values == 8:
                words = words + words  # as many as store_words takes of fp32
            store_words(io[3], start, words, active, C.out_dtype, S.ptx)
            store_words(io[4], start, words, active, C.residual_dtype, S.ptx)


@triton.jit
def spoil(mean, state, residual_out, start, active, C: tl.constexpr, S: tl.constexpr):
    """Overwrite with NaN what this program has stored of ``residual_out`` of a row that lacks words of a peer.

    Lanes and sibling programs that had their own words have stored good values; the mean tells them. It is also NaN for rows
    with such values in them, so the record decides. It was written before this program, or the sibling whose sum is NaN, met
    at the barrier behind its polls. The stores of :func:`accept` are this thread's own: program order.
    """
    if S.ptx:
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred %p;
            .reg .b32 %r;
            .reg .b64 %a;
            setp.ne.u32 %p, $5, 0;
            setp.nan.and.f32 %p, $3, $3, %p;
            @!%p bra DONE;
            fence.acq_rel.gpu;
            ld.relaxed.gpu.global.u32 %r, [$4+4096];
            setp.eq.u32 %p, %r, 0;
            @%p bra DONE;
            mov.u32 %r, 0x7FFF7FFF;
            add.u64 %a, $1, $2;
            st.global.v4.u32 [%a], {%r, %r, %r, %r};
            DONE:
            mov.u32 $0, 0;
            }
            """,
            "=r,l,l,f,l,r",
            # The sum of the first two, in registers, would be kept from accept on: that is why it is taken in there.
            [residual_out.to(tl.int64), start * C.item_bytes, mean, state.to(tl.int64), active],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    elif mean != mean:
        nan = active * 0 + _NAN
        hurt = (tl.load(state + RECORD, volatile=True) != 0).to(tl.int32)
        store16(residual_out.to(tl.int64) + start * C.item_bytes, (nan, nan, nan, nan), active & hurt, S.ptx)


@triton.jit
def finish(
    held,
    row,
    part,
    io,
    state,
    phase,
    watch,
    eps,
    loads,
    C: tl.constexpr,
    S: tl.constexpr,
):
    """Norm of the groups of one row that this program holds, and the stores that are left.

    Args:
        held: for each step what :func:`accept` returned.
        io: the tensors of the call: residual, weight, bias, normed, residual_out.
        loads: for each step what :func:`prefetch` returned; looked at only by programs of one or two steps.
    """
    STEPS: tl.constexpr = S.steps
    residual, weight, normed, residual_out = io[0], io[1], io[3], io[4]
    row_start = row.to(tl.int64) * C.hidden
    mean = mean_of_squares(held, part, row, state, phase, watch, C, S)
    for i in tl.static_range(STEPS):
        element, active = lane_elements(part, i, C, S)
        gain = ()
        if C.has_weight:
            if S.steps <= 2:
                gain = loads[i][2]
            else:
                gain = load_words(weight, element.to(tl.int64), active, C.weight_dtype, C.values, S.ptx)
        out = normalised(unpack(held[i], C.dtype), mean, gain, eps, C, S.ptx)
        store_words(normed, row_start + element, out, active, C.out_dtype, S.ptx)
        if C.post_norm:
            r = ()
            if S.steps <= 2:
                r = loads[i][0]
            else:
                r = load_words(residual, row_start + element, active, C.dtype, C.values, S.ptx)
            if C.out_dtype == C.dtype:
                total = plus_words(r, out, C.dtype, S.ptx)
            else:
                total = words_of(plus(values_of(r, C.dtype), values_of(out, C.out_dtype)), C.residual_dtype, S.ptx)
            store_words(residual_out, row_start + element, total, active, C.residual_dtype, S.ptx)
        else:
            spoil(mean, state, residual_out, row_start + element, active, C, S)
    if S.split > 1:
        restore(state, S)
