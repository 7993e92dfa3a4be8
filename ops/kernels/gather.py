"""The gather behind a norm: the owner of a row pushes its normed words to the ranks of other blocks, which poll and store them.

Words travel as all words of a plane do, data and flag in one (:mod:`.memory`), but the mark differs. A sum may lose the sign of
a zero, a gather may not: an empty word stands for no value, and a word of zeros is pushed as all ones, two NaN with a payload
that no arithmetic gives. A word that is all ones all the same, NaN that came from outside, becomes another NaN.
"""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005, PLR0124
from __future__ import annotations

import triton
import triton.language as tl

from . import state as at
from .memory import NAN_WORD, clear, poll, push, store16
from .rows import lane_elements

_NAN: tl.constexpr = tl.constexpr(NAN_WORD)
_ZERO: tl.constexpr = tl.constexpr(-1)  # what a word of zeros is pushed as
RECORD: tl.constexpr = tl.constexpr(at.RECORD)
RECORD_BYTES: tl.constexpr = tl.constexpr(at.RECORD_BYTES)


@triton.jit
def sealed(words):
    """Four words for a slot: none is zero, and :func:`opened` gives them back."""
    out = ()
    for i in tl.static_range(4):
        out = out + (tl.where(words[i] == 0, _ZERO, tl.where(words[i] == _ZERO, _NAN, words[i])),)
    return out


@triton.jit
def opened(word):
    return tl.where(word == _ZERO, 0, word)


@triton.jit
def is_whole(mean, state, S: tl.constexpr):
    """1 in each lane, or 0 where the row lacks words of a peer; see :func:`.call.spoil` for what ``mean`` and the record tell."""
    lanes = tl.arange(0, S.lanes) * 0 + 1
    if S.ptx:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .pred %p;
            .reg .b32 %r, %w;
            mov.u32 %w, $3;
            setp.nan.f32 %p, $1, $1;
            @!%p bra DONE;
            fence.acq_rel.gpu;
            ld.relaxed.gpu.global.u32 %r, [$2+4096];
            setp.ne.u32 %p, %r, 0;
            @%p mov.u32 %w, 0;
            DONE:
            mov.u32 $0, %w;
            }
            """,
            "=r,f,l,r",
            [mean, state.to(tl.int64), lanes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        lacks = (mean != mean) & (tl.load(state + RECORD, volatile=True) != 0)
        return lanes * (1 - lacks.to(tl.int32))


@triton.jit
def with_gather(io, mine, to, C: tl.constexpr):
    """The tensors of a call as the epilogue takes them: the own rows of the norm, and behind all others what :func:`push_to_all`
    takes as ``to``."""
    if C.centered:
        return (io[0], io[1], io[2], mine, io[4], io[5], io[6], to)
    else:
        return (io[0], io[1], io[2], mine, io[4], to)


@triton.jit
def gather_of(io, C: tl.constexpr):
    """``to`` of what :func:`with_gather` returned."""
    if C.centered:
        return io[7]
    else:
        return io[5]


@triton.jit
def push_to_all(words, row, element, active, to, C: tl.constexpr, S: tl.constexpr):
    """Push the normed words of ``C.values`` elements a lane of row ``row`` of the own block to every rank of another block.

    Of the R ranks of a block the one at place ``row mod R`` owns the row, and it alone pushes.

    Args:
        words: four, or eight of fp32.
        active: lanes with 0 push nothing: what a poll gave up is pushed to nobody, see memory.py.
        to: addresses of the peers' planes, offset of the area in them, own block, own place in it.
    """
    WORLD: tl.constexpr = S.world
    OF_A_BLOCK: tl.constexpr = S.world // S.blocks
    slot = to[1] + (row.to(tl.int64) * S.blocks + to[2]) * C.normed_row_bytes + element * C.normed_item_bytes
    active = active & (row % OF_A_BLOCK == to[3]).to(tl.int32)
    for r in tl.static_range(WORLD):
        other = active & (to[2] != r // OF_A_BLOCK).to(tl.int32)
        target = tl.load(to[0] + r) + slot
        push(target, sealed((words[0], words[1], words[2], words[3])), other, S.ptx)
        if len(words) == 8:
            push(target + 16, sealed((words[4], words[5], words[6], words[7])), other, S.ptx)


@triton.jit
def receive_normed(
    row, part, i: tl.constexpr, area, normed, stride, block, phase, watch, C: tl.constexpr, S: tl.constexpr
):
    """Store one step of row ``row`` of all other blocks than the own one, ``block``; their slots are zeros again.

    Args:
        area: address of the gather's slots in this rank's plane: of (row, block) at ``(row * blocks + block) * normed_row_bytes``
            behind it.
        normed: all blocks, ``stride`` rows apart.
    Returns:
        1 in each lane, or 0 where a poll gave up; there NaN was stored.
    """
    BLOCKS: tl.constexpr = S.blocks
    PIECES: tl.constexpr = C.values * C.normed_item_bytes // 16
    element, active = lane_elements(part, i, C, S)
    ok = active * 0 + 1
    for piece in tl.static_range(PIECES):
        at = element * C.normed_item_bytes + 16 * piece
        slots = area + row.to(tl.int64) * (BLOCKS * C.normed_row_bytes) + at
        words = poll(
            slots,
            slots,
            block,
            active,
            row,
            phase + 8,
            watch,
            SLOTS=BLOCKS,
            STRIDE=C.normed_row_bytes,
            WORDS=4 * BLOCKS,
            WAIT=S.wait,
            PTX=S.ptx,
            RECORD_AT=RECORD_BYTES,
            HOST_AT=8 * S.world,
        )
        full = words[4 * BLOCKS]
        ok = ok & full
        for r in tl.static_range(BLOCKS):
            other = active & (block != r).to(tl.int32)
            clear(slots + r * C.normed_row_bytes, other, S.ptx)
            found = ()
            for w in tl.static_range(4):
                found = found + (tl.where(full != 0, opened(words[4 * r + w]), _NAN),)
            target = normed.to(tl.int64) + (r * stride + row).to(tl.int64) * C.normed_row_bytes + at
            store16(target, found, other, S.ptx)
    return ok
