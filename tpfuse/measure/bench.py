"""Measure the op against other ways of doing the same, on the ranks of this machine.

    from tpfuse.measure import bench, tables
    results = bench.run(bench.Survey(worlds=(2, 4), hiddens=(4096,), rows=(1, 8, 64)))
    print(tables.table(results))

Method: 20 calls in a CUDA graph; each replay's time is the *minimum over ranks*, because the last rank to start waits for
nobody and so is free of launch skew; the figure is the median of the replays. Every contender gets the same data, its
result is compared with fp64, and its outputs are hashed on every rank.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import compat
from tpfuse.ops.experiment import Unavailable

from . import other_libraries
from .contenders import LEAVES_WORDS, contender
from .other_libraries import Call, Problem
from .tables import Result, load, save

CALLS_A_GRAPH = 20
REPLAYS = 15
EPS = 1e-6


@dataclass(frozen=True)
class Survey:
    """What to measure. ``contenders`` are names that :func:`contender` takes."""

    worlds: tuple[int, ...] = (2, 4, 8)
    hiddens: tuple[int, ...] = (4096, 5120, 7168, 8192)
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    contenders: tuple[str, ...] = (
        "tpfuse",
        "tpfuse no pdl",
        "floor",
        "symm one-shot",
        "symm two-shot",
        "flashinfer",
        "flashinfer pdl",
        "nccl",
    )
    timeout: float = 300.0
    partial: str = ""  # a file that keeps what was measured of a world size that does not finish in time


def problem(
    rank: int, world: int, rows: int, hidden: int, group_name: str, shared: bool, device: torch.device
) -> tuple[Problem, list[Tensor]]:
    """One call as a rank makes it, and the rows of all ranks: the same numbers on every rank."""

    def make(seed: int, *shape: int) -> Tensor:
        g = torch.Generator(device=device).manual_seed(seed)
        return torch.randn(*shape, generator=g, device=device).bfloat16()

    xs = [make(1000 * rows + hidden + r, rows, hidden) for r in range(world)]
    return Problem(xs[rank], make(7, rows, hidden), make(8, hidden), EPS, rank, world, group_name, shared), xs


def _fp64(xs: list[Tensor], residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = residual.double()
    for x in xs:
        h = h + x.double()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * weight.double(), h


def _distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def output_hash(*tensors: Tensor) -> str:
    """Equal exactly when the bits are; for large tensors a checksum taken on the device, weighted by position."""
    h = hashlib.sha256()
    for t in tensors:
        words = t.contiguous().view(-1).view(torch.uint8)
        if words.numel() > 1 << 22 and words.numel() % 4 == 0:
            values = words.view(torch.int32).long()
            values *= torch.arange(1, 2 * values.numel(), 2, device=t.device)
            words = values.sum().view(1).view(torch.uint8)
        h.update(words.cpu().numpy().tobytes())
    return h.hexdigest()[:16]


_captured: list[torch.cuda.CUDAGraph] = []
_streams: list[torch.cuda.Stream] = []  # one for all: the allocator keeps the memory of each stream apart


def time_call(call: Call, calls: int = CALLS_A_GRAPH, replays: int = REPLAYS) -> list[float]:
    """Microseconds a call, one figure a replay, the minimum over ranks."""
    if not _streams:
        _streams.append(torch.cuda.Stream())
    side = _streams[0]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    dist.barrier()
    # Not torch.cuda.graph: it collects garbage and empties the allocator's cache, which takes longer than the measurement.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        graph.capture_begin(pool=_captured[-1].pool() if _captured else None, capture_error_mode="thread_local")
        for _ in range(calls):
            call()
        graph.capture_end()
    _captured[:] = [graph]  # keeps the pool of its memory alive for the next one
    dist.barrier()
    times = []
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for number in range(replays + 3):
        dist.barrier()
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(stop) * 1e3 / calls)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, times)
    return [min(at) for at in zip(*everyone, strict=True)]


def measure(rank: int, world: int, plan: Survey) -> list[Result]:
    """Run on every rank (see :mod:`tpfuse.measure.ranks`): all shapes of the plan at this world size."""
    from tpfuse.ops import paths

    compat.compile_in_this_process()
    group_name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    device = torch.device("cuda", torch.cuda.current_device())
    shared = torch.cuda.device_count() < world
    results = []
    began = time.monotonic()
    if any(name.startswith("symm") for name in plan.contenders):
        largest = max(plan.rows) * max(plan.hiddens)
        other_libraries.reserve(group_name, largest, torch.bfloat16, device)
    for rows in sorted(plan.rows):
        for hidden in plan.hiddens:
            given, xs = problem(rank, world, rows, hidden, group_name, shared, device)
            want = _fp64(xs, given.residual, given.weight)
            for name in plan.contenders:
                # No contender starts while a rank's ordinary kernels are still to run: on a shared GPU it could keep them out.
                torch.cuda.synchronize()
                dist.barrier()
                results.append(_measure_one(name, given, want, rows, hidden, world))
                if name in LEAVES_WORDS:
                    paths.reset(group_name)
                if plan.partial and rank == 0:
                    save(results, Path(plan.partial), last=f"{time.monotonic() - began:.1f} s")
    return results


def _measure_one(name: str, p: Problem, want: tuple[Tensor, Tensor], rows: int, hidden: int, world: int) -> Result:
    empty = Result(name, world, rows, hidden, None, None, None, None, None)
    try:
        call = contender(name)(p)
    except Unavailable as reason:
        return replace(empty, note=str(reason))
    normed, h = call()
    torch.cuda.synchronize()
    error, equal = None, None
    if name not in LEAVES_WORDS:  # the floor's results mean nothing
        error = max(_distance(normed, want[0]), _distance(h, want[1]))
        hashes: list[Any] = [None] * world
        dist.all_gather_object(hashes, output_hash(normed, h))
        equal = len(set(hashes)) == 1
    times = sorted(time_call(call, CALLS_A_GRAPH if rows <= 256 else 4))
    return replace(
        empty,
        median=statistics.median(times),
        low=times[len(times) // 10],
        high=times[-1 - len(times) // 10],
        error=error,
        ranks_equal=equal,
    )


def run(plan: Survey, env: dict[str, str] | None = None) -> list[Result]:
    """Start the ranks for each world size of the plan and measure. Returns all results.

    The ranks run nothing but one contender at a time, so on a shared GPU the kernels may fill it (see ``SHARED_GPU`` in
    :mod:`tpfuse.ops.plane`); ``env`` is set in the ranks and wins.
    """
    from .ranks import RankFailed, run_ranks

    for name in plan.contenders:
        contender(name)
    env = {"TPFUSE_SHARED_GPU": "packed", **(env or {})}
    results: list[Result] = []
    for world in plan.worlds:
        if plan.partial:
            Path(plan.partial).unlink(missing_ok=True)
        try:
            results += run_ranks(measure, world, plan, timeout=plan.timeout, env=env)[0]
        except RankFailed as error:
            if not plan.partial or not Path(plan.partial).exists():
                raise
            kept = load(Path(plan.partial))
            results += kept
            print(f"W={world} did not finish; {len(kept)} figures kept. {error}", file=sys.stderr, flush=True)
    return results
