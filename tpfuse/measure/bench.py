"""Measure the op against other ways of doing the same, on the ranks of this machine.

    from tpfuse.ops import bench
    results = bench.run(bench.Plan(worlds=(2, 4), hiddens=(4096,), rows=(1, 8, 64)))
    print(bench.table(results))

Method: 20 calls in a CUDA graph; each replay's time is the *minimum over ranks*, because the last rank to start waits for
nobody and so is free of launch skew; the figure is the median of the replays. Every contender gets the same data, its
result is compared with fp64, and its outputs are hashed on every rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse.ops import geometry as launch_module
from tpfuse.ops.kernels.variant import MAX_GROUPS
from tpfuse.ops.plane import Plane

from . import contenders
from .contenders import Call, Problem, Unavailable

CALLS_A_GRAPH = 20
REPLAYS = 15
EPS = 1e-6


@dataclass(frozen=True)
class Plan:
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


@dataclass(frozen=True)
class Result:
    """One contender at one shape. Times in microseconds for one call; ``note`` says why there is none."""

    contender: str
    world: int
    rows: int
    hidden: int
    median: float | None
    low: float | None
    high: float | None
    error: float | None  # largest of the two outputs' ||out - fp64|| / ||fp64||
    ranks_equal: bool | None
    note: str = ""


def _forced(
    algorithm: str | None,
    pdl: str | None = None,
    wait: bool = True,
    part: launch_module.Part | None = None,
    share: int = 2,
) -> Callable[[Problem], Call]:
    """Our kernels with some of the settings fixed.

    Args:
        wait: False is the floor.
        part: what a program holds of a row; None leaves the geometry to :mod:`tpfuse.ops.geometry`.
        share: with ``part``, the kernel takes one part in ``share`` of what its ranks may have in flight on a GPU.
    """

    def make(p: Problem) -> Call:
        from tpfuse.ops import cuda, op, paths, prepare, schedule
        from tpfuse.ops.flavour import LLAMA

        # The op itself prepares the group, and loads what auto needs.
        op.all_reduce_add_rms_norm(p.x, p.residual, p.weight, eps=p.eps, group=p.group_name)
        path = paths.path_of(p.group_name, p.x.device)
        ours = path.plane
        if ours is None:
            raise Unavailable(path.cause)
        settings = path.settings
        settings = replace(
            settings,
            algorithm=algorithm or settings.algorithm,
            dependent_launch=settings.dependent_launch if pdl is None else pdl,
        )
        prepared = next(
            q
            for k, q in prepare.PREPARED.items()
            if k[0] == p.group_name and k[2] == p.hidden and q.flavour == LLAMA and k[1] == p.x.dtype and not k[5]
        )
        assert prepared.constants is not None
        groups = prepared.constants.groups
        most = resident(algorithm, part, ours) // share if part is not None and algorithm is not None else 0

        def shape_of(rows: int) -> launch_module.Geometry:
            assert part is not None
            found = launch_module.forced_geometry(rows, groups, part, most)
            if found is None:
                raise Unavailable(f"{rows} rows of {groups} groups, {part} a program, need more than {most} programs")
            return found

        shapes = None if part is None else shape_of
        plan = schedule.schedule_of(ours, settings, prepared.constants, p.x.dtype, p.rows, wait, shapes)
        if not plan.launches:
            raise Unavailable("selection takes the library path here")
        prepare.load_together(
            [launch.kernel for launch in plan.launches], ours, prepare.samples(prepared.constants, ours)
        )

        def call() -> tuple[Tensor, Tensor]:
            normed, h = torch.empty_like(p.x), torch.empty_like(p.x)
            stream = torch.cuda.current_stream().cuda_stream
            for launch in plan.launches:
                part = slice(launch.start, launch.start + launch.rows)
                cuda._launch(
                    launch,
                    stream,
                    ours,
                    prepared,
                    p.x[part],
                    p.residual[part],
                    p.weight,
                    None,
                    normed[part],
                    h[part],
                    p.eps,
                    1.0,
                )
            return normed, h

        return call

    return make


def resident(algorithm: str, part: launch_module.Part, p: Plane) -> int:
    """Programs of one rank that its registers leave room for, with the other ranks of the GPU beside it."""
    processors = torch.cuda.get_device_properties(p.device).multi_processor_count
    return min(
        launch_module.MAX_PROGRAMS, processors * launch_module.resident_programs(algorithm, p.world, part) // p.sharers
    )


def named_geometry(name: str) -> tuple[str, launch_module.Part, int] | None:
    """(algorithm, part, share) of a name such as ``one-shot:512x2:full``; None for other names."""
    parsed = re.fullmatch(r"(one|two)-shot:(128|256|512|1024)x([1-9]\d?)(:full)?", name)
    if not parsed or int(parsed[3]) > MAX_GROUPS:
        return None
    return f"{parsed[1]}_shot", launch_module.Part(int(parsed[2]), int(parsed[3])), 1 if parsed[4] else 2


def contender(name: str) -> Callable[[Problem], Call]:
    """What a name stands for: one of :data:`CONTENDERS`, or a geometry.

    ``one-shot:512x2`` is one-shot by programs of 512 threads that hold two steps of a row, on half of the GPU;
    ``two-shot:128x4:full`` is two-shot by programs of 128 threads and four steps, on all of it.

    Raises:
        ValueError: the name is neither; the message lists the valid ones.
    """
    if name in CONTENDERS:
        return CONTENDERS[name]
    found = named_geometry(name)
    if found is not None:
        algorithm, part, share = found
        return _forced(algorithm, part=part, share=share)
    raise ValueError(
        f"{name!r} is no contender; they are {', '.join(CONTENDERS)}, and geometries such as one-shot:512x2 or "
        "two-shot:128x4:full (threads of a program x steps that it takes over a row)"
    )


def _library(p: Problem) -> Call:
    """The library path at any size: the group's NCCL all-reduce, then our add+norm kernel."""
    from tpfuse.ops import library
    from tpfuse.ops.flavour import LLAMA
    from tpfuse.ops.kernels.variant import constants

    if p.shared:
        raise Unavailable("NCCL refuses two ranks on one GPU, and gloo cannot be captured")
    c = constants(p.x.dtype, p.x.dtype, p.hidden, LLAMA, bias="none", scaled=False, has_residual=True, post_norm=False)

    def call() -> tuple[Tensor, Tensor]:
        normed, h = torch.empty_like(p.x), torch.empty_like(p.x)
        reduced = library.all_reduce(p.x, p.group_name)
        library.add_norm(reduced, p.residual, p.weight, None, normed, h, p.eps, 1.0, c)
        return normed, h

    return call


def _op(p: Problem) -> Call:
    from tpfuse.ops import op

    def call() -> tuple[Tensor, Tensor]:
        return op.all_reduce_add_rms_norm(p.x, p.residual, p.weight, eps=p.eps, group=p.group_name)

    return call


CONTENDERS: dict[str, Callable[[Problem], Call]] = {
    "tpfuse": _op,
    "tpfuse no pdl": _forced(None, pdl="off"),
    "tpfuse end pdl": _forced(None, pdl="end"),
    "one-shot": _forced("one_shot"),
    "two-shot": _forced("two_shot"),
    "library": _library,
    "floor": _forced(None, wait=False),
    "symm one-shot": contenders.symm_one_shot,
    "symm two-shot": contenders.symm_two_shot,
    "flashinfer": contenders.flashinfer(pdl=False),
    "flashinfer pdl": contenders.flashinfer(pdl=True),
    "nccl": contenders.nccl,
}
LEAVES_WORDS = ("floor",)  # pushes that nobody waits for: the plane must be reset afterwards


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


def measure(rank: int, world: int, plan: Plan) -> list[Result]:
    """Run on every rank (see :mod:`tpfuse.measure.ranks`): all shapes of the plan at this world size."""
    from tpfuse.ops import paths

    torch._inductor.config.compile_threads = 1  # type: ignore[attr-defined]
    group_name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    device = torch.device("cuda", torch.cuda.current_device())
    shared = torch.cuda.device_count() < world
    results = []
    began = time.monotonic()
    if any(name.startswith("symm") for name in plan.contenders):
        largest = max(plan.rows) * max(plan.hiddens)
        contenders.reserve(group_name, largest, torch.bfloat16, device)
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


def run(plan: Plan, env: dict[str, str] | None = None) -> list[Result]:
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


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def _lookup(results: Sequence[Result]) -> dict[tuple[str, int, int, int], Result]:
    return {(r.contender, r.world, r.rows, r.hidden): r for r in results}


def ratios(results: Sequence[Result], ours: str, other: str) -> dict[tuple[int, int, int], float]:
    """``ours / other`` by (world, rows, hidden), where both were measured."""
    found = _lookup(results)
    out = {}
    for (name, world, rows, hidden), r in found.items():
        o = found.get((other, world, rows, hidden))
        if name == ours and r.median and o is not None and o.median:
            out[(world, rows, hidden)] = r.median / o.median
    return out


def table(results: Sequence[Result]) -> str:
    """The whole table and a summary as text."""
    names = list(dict.fromkeys(r.contender for r in results))
    found = _lookup(results)
    lines = ["us per call, median (high - low)", "W     H  rows " + "".join(f"{n:>22}" for n in names)]
    for world, hidden, rows in sorted({(r.world, r.hidden, r.rows) for r in results}):
        cells = []
        for name in names:
            r = found.get((name, world, rows, hidden))
            if r is None or r.median is None:
                cells.append(f"{'-':>22}")
            else:
                flag = " !ranks differ" if r.ranks_equal is False else ""
                cells.append(f"{r.median:>14.2f} ({r.high - r.low:5.2f}){flag}")  # type: ignore[operator]
        lines.append(f"{world} {hidden:>5} {rows:>5} " + "".join(cells))
    for other in names:
        if other.startswith("tpfuse") or "tpfuse" not in names:
            continue
        by = ratios(results, "tpfuse", other)
        if by:
            worst = max(by, key=lambda k: by[k])
            lines.append(
                f"tpfuse / {other}: geometric mean {geometric_mean(list(by.values())):.3f}, "
                f"worst {by[worst]:.3f} at W={worst[0]} rows={worst[1]} H={worst[2]} ({len(by)} shapes)"
            )
    errors = {n: [r.error for r in results if r.contender == n and r.error is not None] for n in names}
    lines.append("largest error against fp64: " + ", ".join(f"{n} {max(e):.2e}" for n, e in errors.items() if e))
    notes = {(r.contender, r.note) for r in results if r.note}
    lines += [f"{name}: {note[:300]}" for name, note in sorted(notes)]
    return "\n".join(lines)


def save(results: Sequence[Result], path: Path, **facts: str) -> None:
    """JSON: facts about the machine, then one record a result."""
    path.write_text(json.dumps({"facts": facts, "results": [asdict(r) for r in results]}, indent=1) + "\n")


def load(path: Path) -> list[Result]:
    """The results of a file that :func:`save` wrote."""
    return [Result(**record) for record in json.loads(path.read_text())["results"]]


def plot(results: Sequence[Result], path: Path) -> None:
    """Microseconds against rows, one panel a (world, H); the format follows the suffix (.svg, .png)."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install tpfuse[bench]") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text, not outlines: a third of the size
    import matplotlib.pyplot as plt

    worlds = sorted({r.world for r in results})
    hiddens = sorted({r.hidden for r in results})
    figure, axes = plt.subplots(
        len(worlds),
        len(hiddens),
        figsize=(4 * len(hiddens), 3 * len(worlds) + 0.4),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    names = list(dict.fromkeys(r.contender for r in results if r.median))
    lines: dict[str, Any] = {}
    for i, world in enumerate(worlds):
        for j, hidden in enumerate(hiddens):
            axis = axes[i][j]
            for number, name in enumerate(names):
                points = sorted(
                    (r.rows, r.median)
                    for r in results
                    if r.contender == name and r.world == world and r.hidden == hidden and r.median
                )
                if points:
                    (lines[name],) = axis.plot(
                        *zip(*points, strict=True), marker="o", markersize=3, color=f"C{number}", label=name
                    )
            axis.set(title=f"W={world}, H={hidden}", yscale="log", xlabel="rows", ylabel="us a call")
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
    # Below the panels: inside one it hides the points of the smallest calls.
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=len(names), fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def facts() -> dict[str, str]:
    """What the figures were measured on."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
    }
