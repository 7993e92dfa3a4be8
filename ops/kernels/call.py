"""Begin and end of a kernel's call: phase, dependent launch, and what a failed plane does."""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: PLR0124
from __future__ import annotations

import triton
import triton.language as tl

from . import state as at
from .memory import NAN_WORD, store16
from .quantize import poison_quantized
from .rows import lane_elements, store_words

_NAN: tl.constexpr = tl.constexpr(NAN_WORD)
EPOCHS: tl.constexpr = tl.constexpr(at.EPOCHS)
MAX_PROGRAMS: tl.constexpr = tl.constexpr(at.MAX_PROGRAMS)
RECORD: tl.constexpr = tl.constexpr(at.RECORD)


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """With programmatic dependent launch: until the previous kernel in the stream has ended and its writes are visible.

    ``"early"`` lets the next kernel be launched at once. It waits here in its turn, so it reads nothing too soon; its
    programs only sit beside ours, for which ``schedule.variant_of`` leaves room.
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
def failed(state):
    """Whether a poll on this plane has given up since it was built or reset."""
    return tl.load(state + RECORD) != 0


@triton.jit
def poison(rows, io, C: tl.constexpr, S: tl.constexpr):
    """NaN in all outputs of all rows: what a launch on a plane that has failed does, and all that it does."""
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
            if C.keeps_normed:
                store_words(io[3], start, words, active, C.out_dtype, S.ptx)
            store_words(io[4], start, words, active, C.residual_dtype, S.ptx)
        if C.quantized:
            poison_quantized(row, item % S.split, io, C, S)


@triton.jit
def spoil(mean, state, residual_out, start, active, C: tl.constexpr, S: tl.constexpr):
    """Overwrite with NaN what this program has stored of ``residual_out`` of a row that lacks words of a peer.

    Lanes and sibling programs that had their own words have stored good values; the mean tells them. It is also NaN for rows
    with such values in them, so the record decides. It was written before this program, or the sibling whose sum is NaN, met
    at the barrier behind its polls. The stores of :func:`accept` are this thread's own: program order.

    A kernel of one rank polls nothing and has no record: ``state`` is any pointer there.
    """
    if S.world == 1:
        pass
    elif S.ptx:
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
