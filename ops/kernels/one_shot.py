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

from .call import begin, end, failed, let_next_kernel_start, poison, wait_for_previous_kernel
from .epilogue import accept, finish, loaded, of_row, prefetch, second_of, with_second
from .memory import marked, push
from .reduction import both_halves, sum_over_ranks
from .rows import clear_ranks, lane_elements, own_part, own_words, poll_ranks, poll_ranks_of_two
from .stamps import keep_stamps, now


@triton.constexpr_function
def polls_together(c, s):
    """Whether a thread waits for both rows of words at once: those of so few ranks fit its registers."""
    return c.sums == 2 and (s.world == 2 or (s.world <= 4 and s.steps == 1 and not c.centered))


@triton.jit
def push_to_peers(held, item, allowed, bases, offset, rank, C: tl.constexpr, S: tl.constexpr):
    """Push what :func:`own_part` returned to every other rank."""
    STEPS: tl.constexpr = S.steps
    WORLD: tl.constexpr = S.world
    row = item // S.split
    for i in tl.static_range(STEPS):
        words = marked(held[i], C.pushed_mark)
        element, active = lane_elements(item % S.split, i, C, S)
        slot = offset + (row.to(tl.int64) * (C.sums * S.world) + rank) * C.row_bytes + element * C.item_bytes
        for r in tl.static_range(WORLD):
            push(bases[r] + slot, words, active & allowed & (r != rank).to(tl.int32), S.ptx)


@triton.jit
def begin_one_shot(x, io, peers, state, rank, rows, C: tl.constexpr, S: tl.constexpr):
    """What comes before the first push: addresses of all planes, own plane, own first words, phase, two stamps.

    Behind them own first words of the second row of words, where there is one.
    """
    WORLD: tl.constexpr = S.world
    PDL: tl.constexpr = S.pdl  # Triton 3.6 passes no plain string on
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
    to_push = own_part(x, first, has_first, C, S)
    second = ()
    if C.sums == 2:
        second = own_part(second_of(x, io, C), first, has_first, C, S, 1)
    return (bases, own_base, to_push, begin(state), launched, begun, second)


@triton.jit
def one_shot(x, io, begun, peers, state, rank, rows, phase_bytes, limit, eps, scale, C: tl.constexpr, S: tl.constexpr):
    """The rest of a call.

    Args:
        io: see :func:`.epilogue.finish`.
        begun: what :func:`begin_one_shot` returned; the rest as in :func:`one_shot_kernel`.
    """
    PDL: tl.constexpr = S.pdl  # Triton 3.6 passes no plain string on
    STEPS: tl.constexpr = S.steps
    bases, own_base, to_push, phase = begun[0], begun[1], begun[2], begun[3]
    first = tl.program_id(0)
    items = rows * S.split
    scale = loaded(scale, C)
    if S.world <= 4:
        # Without items nothing is pushed and nothing polled. The way of a call that is well stays straight, with the stores of
        # NaN behind it: 2 to 3 % of the time of a few rows between two GPUs.
        items = tl.where(failed(state), 0, items)
    offset = phase.to(tl.int64) * phase_bytes
    own_plane = own_base + offset
    watch = (state.to(tl.int64), peers.to(tl.int64), limit.to(tl.int64))
    # All pushes first: the later ones travel while the first rows are being reduced.
    push_to_peers(to_push, first, (first < items).to(tl.int32), bases, offset, rank, C, S)
    BEHIND: tl.constexpr = S.world * C.row_bytes  # from the slots of a row to those of its second words
    if C.sums == 2:
        push_to_peers(begun[6], first, (first < items).to(tl.int32), bases, offset + BEHIND, rank, C, S)
    for item in range(first + tl.num_programs(0), items, tl.num_programs(0)):
        push_to_peers(own_part(x, item, 1, C, S), item, 1, bases, offset, rank, C, S)
        if C.sums == 2:
            more = own_part(second_of(x, io, C), item, 1, C, S, 1)
            push_to_peers(more, item, 1, bases, offset + BEHIND, rank, C, S)
    pushed = now(S)
    received = pushed
    for item in range(first, items, tl.num_programs(0)):
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
            source = own_words(x, row, element, C)
            slots = own_plane + row.to(tl.int64) * (C.sums * S.world * C.row_bytes) + element * C.item_bytes
            if S.steps > 2:
                load = prefetch(row, part, i, io, C, S)
            else:
                load = loads[i]
            if C.sums == 2:
                more = own_words(second_of(x, io, C), row, element, C, 1)
            if polls_together(C, S):
                both = poll_ranks_of_two(slots, source, more, rank, active, row, phase, watch, C, S)
                words = both[0]
            else:
                words = poll_ranks(slots, source, rank, active, row, phase, watch, C, S)
            received = now(S)
            clear_ranks(slots, rank, active, C, S)
            reduced = sum_over_ranks(words, C, S)
            if C.sums == 2:
                if polls_together(C, S):
                    words = both[1]
                else:
                    words = poll_ranks(slots + BEHIND, more, rank, active, row, phase, watch, C, S)
                    received = now(S)
                clear_ranks(slots + BEHIND, rank, active, C, S)
                if C.wide_sum:
                    reduced = both_halves(reduced, sum_over_ranks(words, C, S), C, S)
                else:
                    load = with_second(load, sum_over_ranks(words, C, S), C)
            held = held + (accept(reduced, row, part, i, io, factor, load, C, S),)
        finish(held, row, part, io, state, phase, watch, eps, loads, C, S)
    end(state, phase)
    keep_stamps(state, phase, (begun[4], begun[5], pushed, pushed, received, now(S)), S)
    if S.world <= 4:
        if items == 0:
            poison(rows, io, C, S)
    let_next_kernel_start(PDL)


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
    """Slot of (row, rank) in a phase: ``(row * W + rank) * row_bytes``; with two rows of words (two
    sums, or the halves of a wide one) ``((2 * row + which) * W + rank)``.

    Args:
        x, residual, weight, bias, normed, residual_out: contiguous, 16-byte aligned; unused ones are any pointer. With
            ``C.bias == "partial"`` the bias is this rank's part of a second sum.
        peers: int64 ``(W + 1,)``: the address of each rank's plane, then the address of the host's failure record.
        state: the plane's local int32 state, see ``epilogue.py``.
        phase_bytes: size of one of the two phases.
        limit: watchdog in nanoseconds.
        scale: a number, or with ``C.scale_loaded`` a pointer to one value of the dtype of ``x``, or to one for each row.
    """
    io = (residual, weight, bias, normed, residual_out)
    begun = begin_one_shot(x, io, peers, state, rank, rows, C, S)
    if S.world > 4:  # the words of so many ranks leave no register for a second count
        if failed(state):
            poison(rows, io, C, S)
            return
    one_shot(x, io, begun, peers, state, rank, rows, phase_bytes, limit, eps, scale, C, S)


@triton.jit(do_not_specialize=["scale_stride", "rank", "rows", "phase_bytes", "limit"])
def one_shot_quant_kernel(
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
    """:func:`one_shot_kernel` that quantizes; ``quantized`` to ``scale_stride`` as in :func:`.quantize.quantize_kernel`."""
    io = (residual, weight, bias, normed, residual_out, quantized, scales, static_scale, scale_stride)
    begun = begin_one_shot(x, io, peers, state, rank, rows, C, S)
    if S.world > 4:  # the words of so many ranks leave no register for a second count
        if failed(state):
            poison(rows, io, C, S)
            return
    one_shot(x, io, begun, peers, state, rank, rows, phase_bytes, limit, eps, scale, C, S)


@triton.jit(do_not_specialize=["rank", "rows", "phase_bytes", "limit"])
def one_shot_layer_norm_kernel(
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
    """:func:`one_shot_kernel` with a LayerNorm; ``shift``, ``(H,)``, is added behind the weight.

    ``addend``, rows as of ``x``, is added behind the bias. Unused ones are any pointer.
    """
    io = (residual, weight, bias, normed, residual_out, shift, addend)
    begun = begin_one_shot(x, io, peers, state, rank, rows, C, S)
    if S.world > 4:  # the words of so many ranks leave no register for a second count
        if failed(state):
            poison(rows, io, C, S)
            return
    one_shot(x, io, begun, peers, state, rank, rows, phase_bytes, limit, eps, scale, C, S)


@triton.jit(do_not_specialize=["rank", "rows", "phase_bytes", "limit"])
def one_shot_layer_norm_of_two_kernel(
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
    """:func:`one_shot_layer_norm_kernel` of two sums: ``addend`` is this rank's part of the second.

    ``addend_bias``, ``(H,)``, is added to its sum.
    """
    io = (residual, weight, bias, normed, residual_out, shift, addend, addend_bias)
    begun = begin_one_shot(x, io, peers, state, rank, rows, C, S)
    if S.world > 4:  # the words of so many ranks leave no register for a second count
        if failed(state):
            poison(rows, io, C, S)
            return
    one_shot(x, io, begun, peers, state, rank, rows, phase_bytes, limit, eps, scale, C, S)
