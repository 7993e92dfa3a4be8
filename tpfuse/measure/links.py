"""Measure what bounds an all-reduce between the GPUs of a group, and the floor that follows.

    from tpfuse.measure import links
    from tpfuse.measure.ranks import run_ranks
    measured = run_ranks(links.measure_links, 4)[0]
    links.floor(measured, "one_shot", 4, 65536)        # microseconds

Two constants, with the primitives that the op's kernels use:

- L, the time from a store until a poll on another GPU sees it: two kernels play ping-pong, half a round trip is one L.
- BW, the bytes a second that leave one rank while every rank sends at once, as in an all-reduce: a kernel that pushes with
  16-byte stores, and ``Tensor.copy_`` into the peer's memory. The faster of the two counts.

Together with t0, an empty kernel in a CUDA graph, for ``B`` bytes of ``x`` over ``W`` ranks:

    one-shot  t0 + L + (W - 1) B / BW            two-shot  t0 + 2 L + 2 (W - 1) / W B / BW

It is a model: no kernel can be much faster; add, norm and polls cost on top.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import compat
from tpfuse.ops.plane import peer_addresses
from tpfuse.ops.select import TABLE, Entry, select

from .tables import Result

ROUNDS = 1000
MIB = 1 << 20
SIZE = 64 * MIB  # bytes that each rank pushes: more than stays in a cache
REPEATS = 7
LIMIT_NS = 2_000_000_000  # a poll that waits longer gives up


@dataclass(frozen=True)
class Links:
    """What was measured. Times in microseconds, bandwidths in bytes a microsecond (1000 is 1 GB/s), each way at once.

    Attributes:
        world: ranks.
        device: name of the GPU.
        architecture: as the selection table names it, e.g. ``sm_90``.
        shared: the ranks share one GPU: latency and bandwidth are those of its memory, and no floor for links.
        empty: t0, one empty kernel in a CUDA graph.
        latency: L, the median over pairs with rank 0.
        latencies: L of rank 0 with rank 1, 2, ...
        pushed: bandwidth of 16-byte stores out of the slowest rank.
        copied: the same of ``Tensor.copy_`` to the next rank.
    """

    world: int
    device: str
    architecture: str
    shared: bool
    empty: float
    latency: float
    latencies: tuple[float, ...]
    pushed: float
    copied: float

    @property
    def bandwidth(self) -> float:
        """BW of the floor: the faster way to move bytes."""
        return max(self.pushed, self.copied)


def floor(links: Links, kind: str, world: int, size: int) -> float:
    """The least time in microseconds of an all-reduce of ``size`` bytes over ``world`` ranks.

    Args:
        kind: ``"one_shot"`` or ``"two_shot"``. A library's all-reduce moves what two-shot moves.
        world: at least 2.
        size: bytes of ``x`` on each rank.
    Raises:
        ValueError: another kind, or a world size below 2.
    """
    if world < 2:
        raise ValueError(f"a floor for world size {world}: an all-reduce has at least 2 ranks")
    if kind == "one_shot":
        return links.empty + links.latency + (world - 1) * size / links.bandwidth
    if kind == "two_shot":
        return links.empty + 2 * links.latency + 2 * (world - 1) / world * size / links.bandwidth
    raise ValueError(f"no floor for {kind!r}; known are one_shot and two_shot")


def crossing(links: Links, world: int) -> float:
    """Bytes from which on the floor of two-shot is below that of one-shot; infinity for two ranks."""
    if world == 2:
        return float("inf")
    return links.latency * links.bandwidth * world / ((world - 1) * (world - 2))


# -- measuring ------------------------------------------------------------------------------------------------------


def pattern(sender: int, size: int, device: torch.device) -> Tensor:
    """int32 (size / 4,): what a rank pushes, different for every rank and word."""
    words = torch.arange(size // 4, dtype=torch.int32, device=device)
    return words * 40503 + 977 * (sender + 1)


def arrived(region: Tensor, sender: int, rank: int, world: int) -> bool:
    """Whether the chunks of ``sender`` that are meant for ``rank`` are in ``region``, int32 (size / 4,)."""
    from .link_kernels import CHUNK_BYTES

    chunks = region.view(-1, CHUNK_BYTES // 4)
    numbers = torch.arange(chunks.shape[0], device=region.device)
    mine = (sender + 1 + numbers % (world - 1)) % world == rank
    want = pattern(sender, region.numel() * 4, region.device).view_as(chunks)
    return bool((chunks[mine] == want[mine]).all())


@dataclass(frozen=True)
class _Memory:
    """Symmetric memory of this rank: slots of the ping-pong, then one region for each sender."""

    tensor: Tensor
    handle: Any
    peers: Tensor  # int64 (W,), addresses
    slots: int  # bytes
    size: int  # bytes of a region

    def region(self, sender: int) -> Tensor:
        start = (self.slots + sender * self.size) // 4
        return self.tensor[start : start + self.size // 4]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _allocate(rank: int, world: int, rounds: int, size: int, device: torch.device) -> _Memory:
    symm_mem = compat.symmetric_memory()

    from .link_kernels import SLOT_BYTES

    slots = rounds * SLOT_BYTES
    tensor = symm_mem.empty((slots + world * size) // 4, dtype=torch.int32, device=device)
    handle = symm_mem.rendezvous(tensor, dist.group.WORLD.group_name)  # type: ignore[union-attr,arg-type]
    tensor.zero_()
    addresses = peer_addresses(handle, tensor, rank, world)
    return _Memory(tensor, handle, torch.tensor(addresses, dtype=torch.int64, device=device), slots, size)


def _least(values: Sequence[float]) -> list[float]:
    """Element by element the least over ranks: the last rank to start waits for nobody."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, list(values))
    return [min(at) for at in zip(*everyone, strict=True)]


def _timed(call: Callable[[], Any]) -> float:
    """Microseconds of the work that ``call`` puts on the current stream; all ranks meet first."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    dist.barrier()
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1e3


def _idle() -> float:
    """A rank that does not play meets the others all the same."""
    torch.cuda.synchronize()
    dist.barrier()
    return float("inf")


def _latency(rank: int, other: int, memory: _Memory, rounds: int, repeats: int, limit: int) -> float:
    """L between rank 0 and ``other``, in microseconds; the other ranks only meet."""
    from .link_kernels import ping_pong_kernel

    plays = rank in (0, other)
    record = torch.zeros(4, dtype=torch.int32, device=memory.tensor.device)

    def play(count: int) -> None:
        if plays:
            peer = other if rank == 0 else 0
            ptx = memory.tensor.device.type == "cuda"
            ping_pong_kernel[(1,)](memory.peers, record, rank, peer, count, limit, ptx, num_warps=1)

    play(0)  # compiled and loaded before a peer waits for it
    nothing, times = [], []
    for _ in range(repeats):
        memory.tensor[: memory.slots // 4].zero_()
        nothing.append(_timed(lambda: play(0)) if plays else _idle())
        times.append(_timed(lambda: play(rounds)) if plays else _idle())
    failed: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failed, record.tolist())
    for r, (gave_up, _, at, _) in enumerate(failed):
        if gave_up:
            raise RuntimeError(f"links: rank {r} gave up in round {at} of the ping-pong between ranks 0 and {other}")
    launched = statistics.median(_least(nothing))
    return (statistics.median(_least(times)) - launched) / rounds / 2


def _bandwidth(call: Callable[[], Any], size: int, repeats: int) -> float:
    """Bytes a microsecond out of the slowest rank, while all ranks make the call at once, twenty times in a row."""
    calls = 20
    call()
    torch.cuda.synchronize()

    def several() -> None:
        for _ in range(calls):
            call()

    times = [_timed(several) for _ in range(repeats)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, statistics.median(times))
    return size * calls / max(everyone)


def measure_links(
    rank: int, world: int, rounds: int = ROUNDS, size: int = SIZE, repeats: int = REPEATS, limit: int = LIMIT_NS
) -> Links:
    """Measure on the ranks of the default group; every rank gets the same answer. See :func:`tpfuse.measure.ranks.run_ranks`.

    Args:
        rounds: round trips of one ping-pong.
        size: bytes that each rank pushes, a multiple of 8192.
        limit: nanoseconds after which a poll gives up.
    Raises:
        ValueError: fewer than two ranks, or a size that is no multiple of 8192.
        RuntimeError: a poll gave up, or pushed bytes did not arrive.
    """
    from . import bench
    from .link_kernels import CHUNK_BYTES, bulk_push_kernel, empty_kernel

    if world < 2 or size % CHUNK_BYTES:
        raise ValueError(
            f"measure_links needs at least 2 ranks, not {world}, and a multiple of {CHUNK_BYTES} bytes, not {size}"
        )
    device = _device()
    properties = torch.cuda.get_device_properties(device)
    memory = _allocate(rank, world, rounds, size, device)
    source = pattern(rank, size, device)
    programs = 4 * properties.multi_processor_count
    offset = memory.slots + rank * size

    def push() -> None:
        bulk_push_kernel[(programs,)](
            source, memory.peers, rank, size // CHUNK_BYTES, offset, world, device.type == "cuda", num_warps=4
        )

    def nothing() -> tuple[Tensor, Tensor]:
        empty_kernel[(1,)](source)
        return source, source

    after = (rank + 1) % world
    target = memory.handle.get_buffer(after, (size // 4,), torch.int32, offset // 4)

    def copy() -> None:
        target.copy_(source)

    for call in (push, nothing):
        call()
    torch.cuda.synchronize()
    dist.barrier()
    problems: list[Any] = [None] * world
    wrong = [s for s in range(world) if s != rank and not arrived(memory.region(s), s, rank, world)]
    dist.all_gather_object(problems, wrong)
    if any(problems):
        raise RuntimeError(f"links: bytes did not arrive; by rank, the senders they are missing from: {problems}")
    empty = statistics.median(bench.time_call(nothing))
    pushed = _bandwidth(push, size, repeats)
    copied = _bandwidth(copy, size, repeats)
    latencies = [_latency(rank, other, memory, rounds, repeats, limit) for other in range(1, world)]
    shared = torch.cuda.device_count() < world
    mine = Links(
        world=world,
        device=properties.name,
        architecture=f"sm_{properties.major}{properties.minor}" + ("-shared" if shared else ""),
        shared=shared,
        empty=empty,
        latency=statistics.median(latencies),
        latencies=tuple(latencies),
        pushed=pushed,
        copied=copied,
    )
    said = [mine]
    dist.broadcast_object_list(said, src=0)  # one rank's figures, so that what follows from them is the same everywhere
    return said[0]


# -- beside the benchmark's table -----------------------------------------------------------------------------------


def kind_of(contender: str, links: Links, hidden: int, rows: int, table: Sequence[Entry]) -> str | None:
    """The algorithm that a contender of the benchmark runs at a bf16 shape, or None where no floor applies to it.

    Returns:
        ``"one_shot"``, ``"two_shot"``, or ``"library"``, whose floor is that of two-shot.
    """
    forced = {"one-shot": "one_shot", "two-shot": "two_shot", "symm one-shot": "one_shot", "symm two-shot": "two_shot"}
    if contender in forced:
        return forced[contender]
    if contender in ("nccl", "library"):
        return "library"
    if contender.split(maxsplit=1)[0] == "tpfuse":
        return select(links.architecture, links.world, torch.bfloat16, hidden, rows, table=table).algorithm
    return None


def beside_floor(results: Sequence[Result], measured: Sequence[Links], table: Sequence[Entry] = TABLE) -> str:
    """A table of measured time, floor and their ratio for the shapes whose links were measured, as text.

    Args:
        results: of :func:`tpfuse.measure.bench.run`, bf16.
        measured: at most one for each world size; those of a shared GPU give no floor.
        table: the selection table that was in force.
    """
    by_world = {links.world: links for links in measured if not links.shared}
    lines = [
        f"{'W':>2} {'H':>5} {'rows':>5} {'contender':>16} {'algorithm':>10} {'us':>9} {'floor':>9} {'us / floor':>10}"
    ]
    for r in sorted(results, key=lambda r: (r.world, r.hidden, r.rows)):
        links = by_world.get(r.world)
        if links is None or r.median is None:
            continue
        kind = kind_of(r.contender, links, r.hidden, r.rows, table)
        if kind is None:
            continue
        least = floor(links, "two_shot" if kind == "library" else kind, r.world, r.rows * r.hidden * 2)
        lines.append(
            f"{r.world:2d} {r.hidden:5d} {r.rows:5d} {r.contender:>16} {kind:>10} {r.median:9.2f} {least:9.2f} "
            f"{r.median / least:10.2f}"
        )
    if len(lines) == 1:
        return "no floor: the ranks share a GPU, or no shape was measured"
    return "\n".join(lines)


def describe(links: Links) -> str:
    """The constants of one world size as one line of text."""
    latencies = ", ".join(f"{value:.2f}" for value in links.latencies)
    cross = crossing(links, links.world)
    where = "one GPU shared by all ranks: not links" if links.shared else "a GPU each"
    until = "one-shot is always below" if cross == float("inf") else f"two-shot is below from {cross / 1024:.0f} KiB on"
    return (
        f"W={links.world} {links.device} ({where}): t0 {links.empty:.2f} us, L {links.latency:.2f} us (rank 0 with each: "
        f"{latencies}), pushed {links.pushed / 1e3:.0f} GB/s, copied {links.copied / 1e3:.0f} GB/s; floors: {until}"
    )
