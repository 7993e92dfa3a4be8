"""Measure one-shot, two-shot and the library on this machine and derive a selection table: ``tpfuse bench --tune``.

    from tpfuse.measure import tune
    tuned = tune.run(tune.Sweep(worlds=(2, 4)))
    tune.save(Path("table.json"), [t.entry for t in tuned])      # then TPFUSE_TABLE=table.json

Two steps that know nothing of each other: :func:`measure` runs on the ranks and returns timings, the same on every rank;
:func:`derive` is a pure function from timings to an :class:`~tpfuse.ops.select.Entry`. The ranks are started with a generous
table of their own, because the size of a plane follows from the table in force.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tpfuse.ops.select import ALGORITHMS, KIB, MIB, TABLE, UNBOUNDED, Entry, entry, load_table, save_table

ITEM_BYTES = 2  # bf16
GROWTH = 1.02  # how much slower a smaller launch may be on average: it needs a smaller plane
CONTENDERS = {"one_shot": "one-shot", "two_shot": "two-shot", "library": "library"}


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    Attributes:
        worlds: world sizes, 2 to 8.
        hiddens: H.
        sizes: bytes of ``x``; a size that is no whole number of rows is left out.
        launches: candidates for the bytes of one launch; larger calls are cut.
        timeout: seconds for one world size.
    """

    worlds: tuple[int, ...] = (2, 4, 8)
    hiddens: tuple[int, ...] = (4096, 8192)
    sizes: tuple[int, ...] = (
        *(n * KIB for n in (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768)),
        *(n * MIB for n in (1, 2, 3, 4, 8, 16, 32)),
    )
    launches: tuple[int, ...] = (2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB)
    timeout: float = 500.0

    def one_shot_most(self, world: int) -> int:
        """The largest size that one-shot is tried at: between two ranks it moves no more bytes than two-shot."""
        return max(self.sizes) if world == 2 else 4 * MIB


@dataclass(frozen=True)
class Timing:
    """One algorithm at one shape. ``microseconds`` a call in launches of ``launch_bytes``; the library has 0."""

    world: int
    hidden: int
    rows: int
    algorithm: str
    microseconds: float
    launch_bytes: int = 0

    @property
    def size(self) -> int:
        """Bytes of ``x``."""
        return self.rows * self.hidden * ITEM_BYTES


@dataclass(frozen=True)
class Measured:
    """What the ranks of one world size found; equal on all of them. ``facts`` says on what."""

    architecture: str
    timings: tuple[Timing, ...]
    facts: dict[str, str]


@dataclass(frozen=True)
class Tuned:
    """The entry of one world size and the timings that it follows from."""

    entry: Entry
    timings: tuple[Timing, ...]


# -- from timings to an entry ---------------------------------------------------------------------------------------


def derive(timings: Sequence[Timing], architecture: str, measured: str) -> Entry:
    """The thresholds that lose least against the best algorithm of each shape.

    The regret of a choice at a shape is its time over the best one there, minus 1; thresholds are measured sizes, and of all
    pairs the one with the least mean regret wins. One noisy figure thus moves a threshold by at most what it costs. Without
    timings of the library (ranks that share a GPU have none) the algorithm of the largest size has no upper bound. With them,
    and where the kernels are still ahead at the largest size that was measured, the bound is that size.

    Args:
        timings: of one world size.
        architecture, measured: go into the entry.
    Raises:
        ValueError: no timings, several world sizes, or a shape that no pair of thresholds covers.
    """
    worlds = {t.world for t in timings}
    if len(worlds) != 1:
        raise ValueError(f"an entry is derived from timings of one world size, not of {sorted(worlds)}")
    launch = _launch_bytes(timings)
    shapes_ = _by_shape(timings, launch)
    library = any("library" in times for times in shapes_.values())
    sizes = sorted({size for size, _, _ in shapes_})
    best: tuple[float, int, int] | None = None
    for one_shot in (0, *sizes):
        for two_shot in [s for s in (0, *sizes) if s >= one_shot] if library else [UNBOUNDED]:
            regret = _regret(shapes_, one_shot, two_shot)
            # Equal regret: the smaller thresholds, which need the smaller plane.
            if regret is not None and (best is None or (regret, one_shot, two_shot) < best):
                best = (regret, one_shot, two_shot)
    if best is None:
        raise ValueError(
            "no pair of thresholds covers every measured shape; measure two-shot at all of them, or one-shot at the small "
            "ones and the library at the rest"
        )
    _, one_shot, two_shot = best
    if one_shot == sizes[-1] and not library:
        one_shot = UNBOUNDED
    return Entry(architecture, worlds.pop(), one_shot, two_shot, launch, measured)


_Shapes = dict[tuple[int, int, int], dict[str, float]]  # (bytes, H, rows) -> algorithm -> microseconds


def _by_shape(timings: Sequence[Timing], launch_bytes: int) -> _Shapes:
    """The kernels count with launches of ``launch_bytes``, or with the nearest that was measured."""
    launches = sorted({t.launch_bytes for t in timings if t.algorithm != "library"})
    nearest = min(launches, key=lambda n: abs(n - launch_bytes), default=0)
    found: _Shapes = {}
    for t in timings:
        if t.algorithm == "library" or t.launch_bytes == nearest:
            found.setdefault((t.size, t.hidden, t.rows), {})[t.algorithm] = t.microseconds
    return found


def _chosen(size: int, one_shot: int, two_shot: int) -> str:
    return "one_shot" if size <= one_shot else "two_shot" if size <= two_shot else "library"


def _regret(shapes_: _Shapes, one_shot: int, two_shot: int) -> float | None:
    """Mean regret of a pair of thresholds; None where it chooses what was not measured."""
    regrets = []
    for (size, _, _), times in shapes_.items():
        chosen = _chosen(size, one_shot, two_shot)
        if chosen not in times:
            return None
        regrets.append(times[chosen] / min(times.values()) - 1)
    return round(statistics.fmean(regrets), 9)


def _launch_bytes(timings: Sequence[Timing]) -> int:
    """The smallest launch whose faster kernel is on average within ``GROWTH`` of the best, over shapes that it cuts."""
    by_shape: dict[tuple[int, int], dict[int, float]] = {}
    candidates = sorted({t.launch_bytes for t in timings if t.algorithm == "two_shot"})
    if not candidates:
        raise ValueError("no timings of two-shot")
    for t in timings:
        if t.algorithm != "library" and t.size > candidates[0]:
            times = by_shape.setdefault((t.hidden, t.rows), {})
            times[t.launch_bytes] = min(t.microseconds, times.get(t.launch_bytes, t.microseconds))
    whole = [times for times in by_shape.values() if len(times) == len(candidates)]
    if not whole:
        return candidates[-1]
    mean = {c: statistics.fmean(times[c] / min(times.values()) for times in whole) for c in candidates}
    least = min(mean.values())
    return next(c for c in candidates if mean[c] <= least * GROWTH)


def mean_regret(e: Entry, timings: Sequence[Timing]) -> float:
    """How much slower the choices of an entry are than the best of each measured shape, on average; 0 is never.

    Shapes where the entry chooses what was not measured are left out; NaN when that is all of them.
    """
    found = _by_shape(timings, e.launch_bytes)
    covered = {k: times for k, times in found.items() if _chosen(k[0], e.one_shot_bytes, e.two_shot_bytes) in times}
    regret = _regret(covered, e.one_shot_bytes, e.two_shot_bytes) if covered else None
    return float("nan") if regret is None else regret


def provenance(facts: dict[str, str], timings: Sequence[Timing], date: datetime.date) -> str:
    """The ``measured`` text of an entry: GPU, date, versions, sizes."""
    sizes = sorted({t.size for t in timings})
    hiddens = ", ".join(str(h) for h in sorted({t.hidden for t in timings}))
    return (
        f"{facts['gpu']}, {date.isoformat()}, torch {facts['torch']}, triton {facts['triton']}, cuda {facts['cuda']}, bf16, "
        f"H {hiddens}, {_bytes(sizes[0])} to {_bytes(sizes[-1])}, {len(timings)} timings"
    )


def _bytes(size: int) -> str:
    if size >= UNBOUNDED:
        return "any size"
    return f"{size // MIB} MiB" if size >= MIB and size % MIB == 0 else f"{size / KIB:g} KiB"


def text(tuned: Tuned, before: Sequence[Entry] = TABLE) -> str:
    """The timings of one world size as a table, what the entry chooses, and how another table would have done."""
    e = tuned.entry
    lines = [f"{'W':>2} {'H':>5} {'rows':>5} {'bytes':>9} {'one-shot':>9} {'two-shot':>9} {'library':>9}  us; chosen"]
    for (size, hidden, rows), times in sorted(_by_shape(tuned.timings, e.launch_bytes).items()):
        cells = " ".join(f"{times[a]:9.2f}" if a in times else f"{'-':>9}" for a in ALGORITHMS)
        chosen = _chosen(size, e.one_shot_bytes, e.two_shot_bytes)
        lines.append(f"{e.world:2d} {hidden:5d} {rows:5d} {_bytes(size):>9} {cells}  {chosen}")
    old = entry(e.architecture, e.world, before)
    lines.append(
        f"{e.architecture} W={e.world}: one-shot up to {_bytes(e.one_shot_bytes)}, two-shot up to {_bytes(e.two_shot_bytes)}, "
        f"{_bytes(e.launch_bytes)} a launch. On average {mean_regret(e, tuned.timings):.1%} slower than the best of each "
        f"shape; the table before: {mean_regret(old, tuned.timings):.1%}"
    )
    return "\n".join(lines)


# -- files ----------------------------------------------------------------------------------------------------------


def check_writable(path: Path, is_table: bool) -> None:
    """Raise before minutes of measuring, not after.

    Raises:
        ValueError: the file cannot be written, or holds something that is no table; the message names it.
    """
    if is_table:
        kept_entries(path)
    there = path.exists()
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    if not there:
        path.unlink()


def kept_entries(path: Path) -> list[Entry]:
    """The entries of a table that exists already, without the built-in ones; none where there is no file.

    Raises:
        ValueError: it is no table; the message names the file.
    """
    if not path.is_file():
        return []
    return list(load_table(path)[: -len(TABLE)])


def save(path: Path, entries: Sequence[Entry]) -> None:
    """Write a table for ``TPFUSE_TABLE``. Entries of other architectures and world sizes that are in the file stay."""
    fresh = {(e.architecture, e.world) for e in entries}
    kept = [e for e in kept_entries(path) if (e.architecture, e.world) not in fresh]
    save_table(path, [*entries, *kept])


def save_timings(path: Path, tuned: Sequence[Tuned]) -> None:
    """JSON: one record a world size, with its entry and its timings."""
    records = [{"entry": asdict(t.entry), "timings": [asdict(one) for one in t.timings]} for t in tuned]
    path.write_text(json.dumps(records, indent=1) + "\n")


# -- measuring ------------------------------------------------------------------------------------------------------


def generous(plan: Sweep, world: int, table: Sequence[Entry] = TABLE) -> list[Entry]:
    """A table under which the ranks' planes take everything that the plan measures, whatever their architecture."""
    most, launch = plan.one_shot_most(world), max(plan.launches)
    # An entry of an architecture goes before one for "any", so each that the built-in table knows is overridden too.
    names = dict.fromkeys(("any", "any-shared", *(e.architecture for e in table)))
    return [Entry(name, world, most, UNBOUNDED, launch, "generous, for tuning") for name in names]


def shapes(plan: Sweep) -> list[tuple[int, int]]:
    """(hidden, rows) of the plan, the largest of each hidden size first."""
    return [
        (hidden, size // (hidden * ITEM_BYTES))
        for hidden in plan.hiddens
        for size in sorted(set(plan.sizes), reverse=True)
        if size % (hidden * ITEM_BYTES) == 0
    ]


def measure(rank: int, world: int, plan: Sweep) -> Measured:
    """Run on every rank, started with :func:`generous` as ``TPFUSE_TABLE``: all shapes of the plan.

    Raises:
        RuntimeError: the group cannot use the kernels (the message says why), a poll gave up, or one-shot and two-shot gave
            different bits.
    """
    from tpfuse.ops import experiment, paths
    from tpfuse.ops.paths import raise_if_failed

    from . import bench, contenders, tables
    from .other_libraries import Unavailable

    group_name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    path = paths.describe_path(group_name)
    if path.plane is None:
        raise RuntimeError(f"nothing to tune: the group takes the library path ({path.cause})")
    device = path.plane.device
    shared = torch.cuda.device_count() < world
    timings: list[Timing] = []
    for hidden, rows in shapes(plan):
        size = rows * hidden * ITEM_BYTES
        problem, _ = bench.problem(rank, world, rows, hidden, group_name, shared, device)
        calls = bench.CALLS_A_GRAPH if size <= 2 * MIB else 4
        outputs: dict[str, torch.Tensor] = {}

        def time(algorithm: str, problem: Any = problem, calls: int = calls, outputs: Any = outputs) -> float:
            # Nothing starts while a rank has ordinary kernels to run: on a shared GPU one that waits could keep them out.
            torch.cuda.synchronize()
            dist.barrier()
            call = contenders.CONTENDERS[CONTENDERS[algorithm]](problem)
            outputs[algorithm] = call()[0].clone()
            # Every rank has the least over ranks; rank 0's list is the one that counts.
            said = [bench.time_call(call, calls)]
            dist.broadcast_object_list(said, src=0)
            return statistics.median(said[0])

        algorithms = ("one_shot", "two_shot") if size <= plan.one_shot_most(world) else ("two_shot",)
        taken: dict[str, float] = {}
        for number, launch in enumerate(sorted(plan.launches)):
            # Launches that take the whole call are all the same.
            if number == 0 or sorted(plan.launches)[number - 1] < size:
                with experiment.launches_of(launch, group_name, device):
                    taken = {algorithm: time(algorithm) for algorithm in algorithms}
            timings += [Timing(world, hidden, rows, algorithm, taken[algorithm], launch) for algorithm in algorithms]
        with contextlib.suppress(Unavailable):
            timings.append(Timing(world, hidden, rows, "library", time("library")))
        torch.cuda.synchronize()
        raise_if_failed(group_name)
        if "one_shot" in outputs and not torch.equal(outputs["one_shot"], outputs["two_shot"]):
            raise RuntimeError(f"one-shot and two-shot gave different bits at {rows} rows of {hidden}")
        if rank == 0:
            last = ", ".join(
                f"{t.algorithm} {t.microseconds:.2f}" for t in timings if (t.hidden, t.rows) == (hidden, rows)
            )
            print(f"tune W={world} H={hidden} rows={rows}: {last}", file=sys.stderr, flush=True)
    facts = {**tables.facts(), "gpu": torch.cuda.get_device_name(device) + (" shared by the ranks" if shared else "")}
    return Measured(path.plane.architecture, tuple(timings), facts)


def run(plan: Sweep, keep: Callable[[Tuned], None] = lambda tuned: None) -> list[Tuned]:
    """Start the ranks for each world size of the plan, measure and derive.

    Args:
        keep: called with each world size's result as soon as it is there, so that a later failure loses nothing.
    Raises:
        RuntimeError: ranks failed; see :class:`tpfuse.measure.ranks.RankFailed`.
        ValueError: a plan without shapes.
    """
    from .ranks import run_ranks

    if not shapes(plan):
        raise ValueError(f"no size of {list(plan.sizes)} is a whole number of rows of {list(plan.hiddens)}")
    found = []
    for world in plan.worlds:
        with tempfile.TemporaryDirectory(prefix="tpfuse-tune-") as folder:
            table = Path(folder) / "generous.json"
            save_table(table, generous(plan, world))
            env = {"TPFUSE_TABLE": str(table), "TPFUSE_ALGORITHM": "auto"}
            measured: Measured = run_ranks(measure, world, plan, timeout=plan.timeout, env=env)[0]
        text = provenance(measured.facts, measured.timings, datetime.date.today())
        found.append(Tuned(derive(measured.timings, measured.architecture, text), measured.timings))
        keep(found[-1])
    return found


def to_files(plan: Sweep, out: Path | None, timings: Path | None) -> str:
    """Tune, write the table to ``out`` and the timings to ``timings`` after every world size, and say what was found.

    Raises:
        ValueError: a file cannot be written, or ``out`` is no table; before anything is measured.
    """
    for path, is_table in ((out, True), (timings, False)):
        if path is not None:
            check_writable(path, is_table)
    done: list[Tuned] = []

    def keep(tuned: Tuned) -> None:
        done.append(tuned)
        print(text(tuned), file=sys.stderr, flush=True)
        if out is not None:
            save(out, [tuned.entry])
        if timings is not None:
            save_timings(timings, done)

    run(plan, keep)
    entries = json.dumps([asdict(t.entry) for t in done], indent=1)
    return entries if out is None else f"{entries}\nwritten to {out}; export TPFUSE_TABLE={out} on every rank"
