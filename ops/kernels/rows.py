"""A program's part of a row: which elements its lanes hold, and how they are loaded and stored."""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from . import state as at
from .memory import clear, load16, poll, store16
from .packing import pack, unpack

RECORD_BYTES: tl.constexpr = tl.constexpr(at.RECORD_BYTES)


@triton.jit
def lane_elements(part, i: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """First element of each lane in step ``i`` of this program, and whether it lies within the row."""
    element = ((part * S.steps + i) * S.lanes + tl.arange(0, S.lanes)) * C.values
    return element, (element < C.hidden).to(tl.int32)


@triton.jit
def load_words(pointer, element, active, DTYPE: tl.constexpr, VALUES: tl.constexpr, PTX: tl.constexpr):
    """The words of ``VALUES`` consecutive values a lane from ``element`` (an int64 offset in values): four, or eight."""
    if tl.float32 == DTYPE:
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
def held_values(held, C: tl.constexpr):
    """The fp32 values of what a program holds of a row between add and norm: words, or the values that were not rounded."""
    if C.unrounded:
        return held
    else:
        return unpack(held, C.dtype)


@triton.jit
def words_of(values, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The words of fp32 values rounded to ``DTYPE``: four, or eight for eight fp32 values."""
    words = pack(values, DTYPE, PTX)
    if tl.float32 == DTYPE and len(values) == 8:
        words = words + pack((values[4], values[5], values[6], values[7]), DTYPE, PTX)
    return words


@triton.jit
def store_words(pointer, element, words, active, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Store what :func:`words_of` returned from ``element`` on."""
    if tl.float32 == DTYPE:
        address = pointer.to(tl.int64) + element * 4
        store16(address, (words[0], words[1], words[2], words[3]), active, PTX)
        if len(words) == 8:
            store16(address + 16, (words[4], words[5], words[6], words[7]), active, PTX)
    else:
        store16(pointer.to(tl.int64) + element * 2, words, active, PTX)


@triton.jit
def own_words(x, row, element, C: tl.constexpr, HALF: tl.constexpr = 0):
    """Address of this rank's words of a row of ``x`` from ``element`` on; of a wide sum those of one half of a lane's values."""
    if C.wide_sum:
        return x.to(tl.int64) + (row.to(tl.int64) * C.hidden + element) * 4 + 16 * HALF
    else:
        return x.to(tl.int64) + (row.to(tl.int64) * C.hidden + element) * C.item_bytes


@triton.jit
def own_part(x, item, allowed, C: tl.constexpr, S: tl.constexpr, HALF: tl.constexpr = 0):
    """This rank's words of an item, one tuple a step. All loads are in flight before any push.

    ``HALF``: see :func:`own_words`.
    """
    STEPS: tl.constexpr = S.steps
    row = item // S.split
    held = ()
    for i in tl.static_range(STEPS):
        element, active = lane_elements(item % S.split, i, C, S)
        source = own_words(x, row, element, C, HALF)
        held = held + (load16(source, active & allowed, S.ptx),)
    return held


@triton.jit
def poll_ranks(slots, source, rank, active, row, phase, watch, C: tl.constexpr, S: tl.constexpr):
    """Wait for the words of all ranks of one step of a row; its own are at ``source``. Returns what :func:`poll` does.

    Args:
        slots: address of rank 0's, in this rank's plane.
    """
    return poll(
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


@triton.jit
def poll_ranks_of_two(slots, source, second, rank, active, row, phase, watch, C: tl.constexpr, S: tl.constexpr):
    """:func:`poll_ranks` for two sums at once, the slots of the second behind those of the first: one round trip.

    Returns what :func:`poll` does for each of the two.
    """
    WORLD: tl.constexpr = S.world
    words = poll(
        slots,
        source,
        rank,
        active,
        row,
        phase,
        watch,
        SLOTS=2 * S.world,
        STRIDE=C.row_bytes,
        WORDS=8 * S.world,
        WAIT=S.wait,
        PTX=S.ptx,
        RECORD_AT=RECORD_BYTES,
        HOST_AT=8 * S.world,
        own_second=second,
        SUMS=2,
    )
    of_first = ()
    of_second = ()
    for i in tl.static_range(4 * WORLD):
        of_first = of_first + (words[i],)
        of_second = of_second + (words[4 * WORLD + i],)
    full = (words[8 * WORLD],)
    return (of_first + full, of_second + full)


@triton.jit
def clear_ranks(slots, rank, active, C: tl.constexpr, S: tl.constexpr):
    """Restore the zeros of what :func:`poll_ranks` polled."""
    WORLD: tl.constexpr = S.world
    for r in tl.static_range(WORLD):
        clear(slots + r * C.row_bytes, active & (r != rank).to(tl.int32), S.ptx)
