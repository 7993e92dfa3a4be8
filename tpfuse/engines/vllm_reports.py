"""Reports of whole models, out of vLLM's workers and into the user's process.

vLLM compiles a model in pieces, equal pieces once, and on a warm start takes them from Inductor's cache, from its own, or
from its ahead-of-time cache, where no pass runs. So the reports of pieces are kept by the key of the artifact, and the
report of a model is put together from its pieces and lies beside vLLM's artifact as well. All are files in the layout of
a dump: ``RUN/rank-R/MODEL/report.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tpfuse import report_cache
from tpfuse.passes import GraphReport

REPORT = "report.json"
RUNS_KEPT = 20
PATIENCE = 2.0  # seconds: a rank that shares Inductor's cache may see the artifact before the report of it


@dataclass(frozen=True)
class Piece:
    """One compiled piece of a model. ``report`` is None when a cache supplied it and the report of that compile is gone."""

    compile_range: str
    index: int
    report: GraphReport | None


@dataclass
class EngineReport:
    """What was fused in one run of the engine.

    Attributes:
        folder: of the run; ``tpfuse view`` shows it.
        ranks: for each worker the reports of its models. A model has one for each compile range of vLLM.
    """

    folder: Path
    ranks: dict[int, list[GraphReport]] = field(default_factory=dict)

    @property
    def alike(self) -> bool:
        """Whether all workers fused the same."""
        seen = {json.dumps([(r.graph_id, _outcomes(r)) for r in reports]) for reports in self.ranks.values()}
        return len(seen) <= 1

    def __str__(self) -> str:
        if not self.ranks:
            return f"no worker has reported yet to {self.folder}"
        numbers = sorted(self.ranks)
        shown = numbers[:1] if self.alike and len(numbers) > 1 else numbers
        lines = []
        for rank in shown:
            who = f"ranks {numbers[0]} to {numbers[-1]}, each" if len(shown) < len(numbers) else f"rank {rank}"
            for report in self.ranks[rank]:
                cached = " (from a cache)" if report.from_cache else ""
                lines.append(f"{who}: {report.summary()}{cached}")
                lines += [f"  {note}" for note in report.notes]
        return "\n".join([*lines, f"tpfuse view {self.folder}"])


def _outcomes(report: GraphReport) -> list[Any]:
    return [(site.fused, site.reason, site.flavour, site.quantizer) for site in report.sites]


def merge(model: str, pieces: Sequence[Piece], rank: int, world_size: int) -> list[GraphReport]:
    """The report of a model for each compile range, from its pieces in the order of the model."""
    merged = []
    ranges = dict.fromkeys(piece.compile_range for piece in pieces)
    for compile_range in ranges:
        mine = sorted((p for p in pieces if p.compile_range == compile_range), key=lambda p: p.index)
        known = [p.report for p in mine if p.report is not None]
        notes = list(dict.fromkeys(note for report in known for note in report.notes))
        if missing := len(mine) - len(known):
            notes.append(
                f"{missing} of {len(mine)} pieces came from a compile cache whose report is gone: their all-reduces are not "
                "counted. Empty vLLM's cache folder to see them"
            )
        seen: set[int] = set()
        sites = []
        for report in known:
            # A piece that stands for several has the layer of the first.
            again = id(report) in seen
            seen.add(id(report))
            sites += [replace(site, layer=None) if again else site for site in report.sites]
        first = known[0] if known else None
        merged.append(
            GraphReport(
                graph_id=model if len(ranges) == 1 else f"{model}-{compile_range}",
                rank=rank,
                world_size=world_size,
                sites=sites,
                policy=first.policy if first else "all",
                numerics=first.numerics if first else "exact",
                inner="vllm",
                seconds=sum(report.seconds for report in {id(r): r for r in known}.values()),
                from_cache=all(report.from_cache for report in known),
                notes=notes,
                reduce_scatters=sum(report.reduce_scatters or 0 for report in known),
                all_gathers=sum(report.all_gathers or 0 for report in known),
            )
        )
    return merged


def keep_piece(digest: str, report: GraphReport) -> None:
    """Keep the report of a piece for ranks and starts that find the piece in Inductor's cache."""
    report_cache.save(digest, [report])


def kept_piece(digest: str) -> GraphReport | None:
    """What :func:`keep_piece` kept, perhaps on another rank a moment ago."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = report_cache.load(digest)
        if found:
            return found[0]
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)


def write(file: Path, reports: Sequence[GraphReport]) -> None:
    """Write a list of reports, at once or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".tpfuse-")
    with os.fdopen(handle, "w") as out:
        json.dump([report.to_dict() for report in reports], out)
    os.replace(name, file)


def read(file: Path) -> list[GraphReport] | None:
    """What :func:`write` wrote; None when there is nothing that can be read."""
    try:
        return [GraphReport.from_dict(item) for item in json.loads(file.read_text())]
    except (OSError, ValueError):
        return None


def new_run(root: Path) -> Path:
    """A name for the folder of one run, which the first worker makes. Old runs are removed."""
    with contextlib.suppress(OSError):
        for old in sorted(root.glob("run-*"))[:-RUNS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return root / f"run-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}-{os.getpid()}"


def publish(folder: Path, reports: Sequence[GraphReport]) -> None:
    """Write the reports of one worker into the folder of the run."""
    for report in reports:
        name = re.sub(r"[^\w.-]+", "_", report.graph_id).strip(".") or "model"
        parent = folder / f"rank-{report.rank}" / name
        parent.mkdir(parents=True, exist_ok=True)
        scratch = parent / f".{REPORT}.{os.getpid()}"
        scratch.write_text(report.to_json() + "\n")
        os.replace(scratch, parent / REPORT)


def collect(folder: Path) -> EngineReport:
    """The reports of all workers of one run."""
    found = EngineReport(folder)
    for file in sorted(folder.glob(f"rank-*/*/{REPORT}")):
        report = GraphReport.from_json(file.read_text())
        found.ranks.setdefault(report.rank, []).append(report)
    found.ranks = dict(sorted(found.ranks.items()))
    return found


def reasons(reports: Sequence[GraphReport]) -> str:
    """The reasons of what was kept, commonest first, each with its remedy."""
    kept = [site for report in reports for site in report.kept]
    counts = Counter(str(site.reason) for site in kept)
    first = {str(site.reason): site for site in reversed(kept)}
    return "; ".join(f"{code} {n}: {first[code].detail or first[code].remedy}" for code, n in counts.most_common())
