"""Planes: the symmetric memory that a group's kernels talk through.

A plane belongs to one (group, device, stream class). It holds two *phases* of slots in symmetric memory, all zeros while
nothing travels, and a local state: a phase word for each program, partial sums of split rows, and a failure record.
The rendezvous is the group's own, never that of the default group. Nothing is allocated after the plane is built.

Why two phases are enough
-------------------------
Call n uses phase n mod 2. Take a rank A that starts call n + 1 and pushes into phase (n + 1) mod 2 of a peer B. That
phase was last used by call n - 1, and every word pushed then was zeroed again by the lane of B that polled it. So it
must be shown that B's kernel of call n - 1 has ended before A's call n + 1 begins:

1. A's call n has ended (stream order). It could end only because it consumed words that depend on every rank having
   started call n: in one-shot A polled a slot of every peer; in two-shot A polled a row's sum, which its owner pushed
   after polling a slot of every peer, or owns every row itself and polled all peers directly. That a rank receives some
   rows only (:mod:`.kernels.received_rows`, :mod:`.kernels.received_two_shot`) changes nothing: each gets a word of all.
2. B started call n, so B's kernel of call n - 1 had ended (stream order), with all its zeros written.

Hence a rank is never more than one call ahead of a peer, and its pushes meet zeros. The argument uses neither the shape
of a call nor its algorithm: *every word that a call pushes is polled and zeroed within the same call*, at whatever
address the layout of that call gives it, so a finished call leaves its phase all zeros for any other layout. Rows, H,
dtype and algorithm may change from call to call, as long as all ranks make the same sequence of calls. A call without
rows pushes nothing and takes part in nothing: all ranks skip it and no phase flips.

In memory order: B's zeros are followed by a kernel boundary, then by B's pushes of call n; A observed words that depend
on those pushes, then passed a kernel boundary before it pushed again. Each step orders what is before it with what is
after it at system scope. CUDA-graph replay keeps stream order, and phase words live on the device, so replays and eager
calls mix freely. With programmatic dependent launch the next kernel waits (``griddepcontrol.wait``) for the end of the
previous one before its first read: the same boundary.

Two streams may not use one plane at once. Where a call comes on another stream than the one before, :mod:`~tpfuse.ops.streams`
orders the two, or refuses; for calls that are to overlap use a :func:`stream_class` for each.

Why nothing waits for a program that is not running
---------------------------------------------------
Programs wait for peers' programs and, in a split row, for their neighbors. The grid is capped (``geometry.Room.fits``) so
that all programs of all ranks that share a GPU are resident together, and so that the ordinary kernels that a peer has in
its stream before its own call find multiprocessors on which nobody waits.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import compat

from . import select as selection
from . import streams
from .settings import Settings
from .vote import Verdict


@dataclass(frozen=True)
class Plane:
    """One plane. All tensors stay alive with it; captured graphs hold their addresses.

    Attributes:
        peers: int64 ``(W + 1,)`` on the device: each rank's plane, then the host's failure record.
        state: int32 local state, laid out in ``kernels/epilogue.py``.
        record: int32 ``(4,)`` in pinned host memory: (1, missing rank, row, phase) once a poll has given up.
        seen: numpy view of ``record``.
    """

    group_name: str
    rank: int
    world: int
    device: torch.device
    stream_class: str
    architecture: str
    sharers: int
    phase_bytes: int
    memory: Tensor = field(repr=False)
    peers: Tensor = field(repr=False)
    state: Tensor = field(repr=False)
    record: Tensor = field(repr=False)
    seen: np.ndarray = field(repr=False)
    handle: object = field(repr=False)
    ranks: tuple[int, ...] = ()
    streams: streams.Use = field(default_factory=streams.Use, repr=False, compare=False)

    def on_another_stream(self, stream: int) -> None:
        """Order a call with those before it: its stream is not that of the last call, or that one was captured.

        Raises ``RuntimeError`` with the remedy where the two cannot be ordered.
        """
        try:
            before = streams.turn(self.streams, stream, streams.capture_of)
        except streams.Unordered as error:
            raise RuntimeError(
                f"tpfuse: calls of group {self.group_name!r} (ranks {list(self.ranks)}) are {error}. They use one plane, so they "
                "have to run one after another: make them on one stream, or, where they are to overlap, put those of each stream "
                "into a class of its own: `with tpfuse.ops.stream_class(name):`, with a first call in each before the capture "
                "and TPFUSE_CONCURRENT_PLANES set to the number of classes"
            ) from None
        if before is not None:
            streams.wait_for(stream, before, self.device)

    def raise_if_failed(self) -> None:
        """Raise ``RuntimeError`` if a poll on this plane has given up."""
        if self.seen[0]:
            _, missing, row, phase = (int(v) for v in self.seen)
            # What was polled, as kernels add twice the number to the phase. The last one has the owner in place of the row.
            source, what = (
                (f"rank {self.ranks[missing]}", f"its rows, row {row}"),
                ("a sibling program", f"a program of the same rank (split row), row {row}"),
                (f"the owner, rank {self.ranks[row % self.world]}", f"the sum of a row from its owner, row {row}"),
                (f"the owner, rank {self.ranks[row % self.world]}", "the sum of a row from its owner"),
                (f"block {missing}", f"the norm of a row of its block, row {row}"),
                (f"rank {self.ranks[(row + missing) % self.world]}", "its part of the sums of the own block"),
            )[phase // 2]
            raise RuntimeError(
                f"tpfuse: rank {self.ranks[self.rank]} of group {self.group_name!r} (ranks {list(self.ranks)}) gave up "
                f"waiting for {source}: {what}, phase {phase % 2}. A peer has died, or the "
                "ranks made different calls. Results since then are invalid. Restart the group, or call "
                "tpfuse.ops.reset(group) on every rank; TPFUSE_WATCHDOG_SECONDS sets how long a poll waits."
            )


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside, torch allocates and communicates on a device that may not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def peer_addresses(handle: Any, own: Tensor, rank: int, world: int) -> list[int]:
    """Where the ranks of a rendezvous have the start of the tensor that is ``own`` here.

    Raises ``RuntimeError`` where one of them cannot be reached.
    """
    # get_buffer adds the offset of the tensor within its allocation, which buffer_ptrs leaves out.
    addresses = [handle.get_buffer(r, (1,), torch.int32).data_ptr() for r in range(world)]
    addresses[rank] = own.data_ptr()
    if not all(addresses):
        raise RuntimeError(f"no peer access: addresses {addresses}")
    return addresses


def _phase_bytes(world: int, verdict: Verdict, settings: Settings) -> int:
    return selection.phase_bytes(selection.entry(verdict.architecture, world, settings.table))


def allocate(world: int, device: torch.device, verdict: Verdict, settings: Settings) -> Tensor:
    """This rank's symmetric memory: two phases, and behind them the local state."""
    symm_mem = compat.symmetric_memory()

    from .kernels.state import STATE_WORDS

    if settings.backend != "auto" and symm_mem.get_backend(device) != settings.backend:
        symm_mem.set_backend(settings.backend)  # type: ignore[arg-type]
    words, table = 2 * _phase_bytes(world, verdict, settings) // 4, 2 * (world + 1)
    return symm_mem.empty(words + table + table % 4 + STATE_WORDS, dtype=torch.int32, device=device)


def connect(
    allocation: Tensor,
    group_name: str,
    group: dist.ProcessGroup,
    device: torch.device,
    klass: str,
    verdict: Verdict,
    settings: Settings,
) -> Plane:
    """The rendezvous of the group, and the plane over what it gives."""
    symm_mem = compat.symmetric_memory()

    world, rank = group.size(), group.rank()
    phase = _phase_bytes(world, verdict, settings)
    words, table = 2 * phase // 4, 2 * (world + 1)
    handle = symm_mem.rendezvous(allocation, group_name)  # type: ignore[arg-type]
    allocation.zero_()
    memory = allocation[:words]
    peers = allocation[words : words + table].view(torch.int64)
    state = allocation[words + table + table % 4 :]
    addresses = peer_addresses(handle, allocation, rank, world)
    record = torch.zeros(4, dtype=torch.int32, pin_memory=True)
    peers.copy_(torch.tensor([*addresses, record.data_ptr()], dtype=torch.int64))
    torch.cuda.synchronize(device)  # zeros everywhere before the second vote lets anybody push
    sharers = verdict.sharers
    if sharers > 1:
        # Ranks of other groups may be on this GPU too; all of them together must fit.
        sharers = max(sharers, dist.get_world_size())
    return Plane(
        group_name=group_name,
        rank=rank,
        world=world,
        device=device,
        stream_class=klass,
        architecture=verdict.architecture,
        sharers=sharers,
        phase_bytes=phase,
        memory=memory,
        peers=peers,
        state=state,
        record=record,
        seen=record.numpy(),
        handle=handle,
        ranks=tuple(dist.get_process_group_ranks(group)),
    )
