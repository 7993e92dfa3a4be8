"""Kernels that measure links between GPUs with the primitives of the op's own kernels; see :mod:`tpfuse.measure.links`."""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from tpfuse.ops.kernels.memory import load16, poll, push

LANES: tl.constexpr = tl.constexpr(128)  # one element a thread of four warps
SLOT_BYTES = 16  # of a ping-pong round: one push
CHUNK_GROUPS: tl.constexpr = tl.constexpr(4)
CHUNK_BYTES = 8192  # of a bulk push: four groups of 128 lanes x 16 bytes


@triton.jit
def empty_kernel(anything):
    """Nothing: what a launch costs."""


@triton.jit(do_not_specialize=["rank", "peer", "rounds", "limit"])
def ping_pong_kernel(peers, record, rank, peer, rounds, limit, PTX: tl.constexpr):
    """``rounds`` round trips between ``rank`` and ``peer``; the lower one begins.

    Every round has a slot of its own, which is zero beforehand and full afterwards, so nothing is ever cleared. One warp: its
    32 threads make each access together, as one.

    Args:
        peers: int64, the address of each rank's slots.
        record: int32 (4,), zeros; a poll that gave up leaves (1, 0, round, 0) there, and no round after it is played.
        limit: nanoseconds that one poll waits.
    """
    own = tl.load(peers + rank)
    other = tl.load(peers + peer)
    first = (rank < peer).to(tl.int32)
    alive = first * 0 + 1
    for number in range(rounds):
        i = first * 0 + number  # in the interpreter the counter of a loop is no tensor
        slot = i.to(tl.int64) * 16
        words = (i + 1, i + 1, i + 1, i + 1)
        push(other + slot, words, alive * first, PTX)
        seen = poll(
            own + slot,
            own + slot,
            -1,
            alive,
            i,
            0,
            (record.to(tl.int64), record.to(tl.int64), limit.to(tl.int64)),
            SLOTS=1,
            STRIDE=16,
            WORDS=4,
            WAIT=True,
            PTX=PTX,
        )
        alive = tl.where(seen[0] == i + 1, alive, 0)
        push(other + slot, words, alive * (1 - first), PTX)


@triton.jit(do_not_specialize=["rank", "chunks", "offset"])
def bulk_push_kernel(source, peers, rank, chunks, offset, W: tl.constexpr, PTX: tl.constexpr):
    """Push ``chunks`` chunks of 8 KiB, each to one of the other ranks in turn, to the same place that they come from.

    Args:
        source: int32, ``chunks * 2048`` words.
        peers: int64, the address of each rank's memory.
        offset: bytes into that memory at which this rank's chunks go.
    """
    lanes = tl.arange(0, LANES)
    for number in range(tl.program_id(0), chunks, tl.num_programs(0)):
        chunk = tl.program_id(0) * 0 + number  # in the interpreter the counter of a loop is no tensor
        peer = (rank + 1 + chunk % (W - 1)) % W
        start = chunk.to(tl.int64) * (CHUNK_GROUPS * LANES * 16)
        from_ = source.to(tl.int64) + start
        to = tl.load(peers + peer) + offset.to(tl.int64) + start
        active = (lanes >= 0).to(tl.int32)
        held = ()
        for i in tl.static_range(CHUNK_GROUPS):
            held = held + (load16(from_ + (lanes + i * LANES).to(tl.int64) * 16, active, PTX),)
        for i in tl.static_range(CHUNK_GROUPS):
            push(to + (lanes + i * LANES).to(tl.int64) * 16, held[i], active, PTX)
