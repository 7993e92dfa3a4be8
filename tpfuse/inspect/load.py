"""Read a dump folder back: every rank's graphs with their reports and nodes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tpfuse.passes.report import GraphReport, ReportFormatError

from . import dump, nodes
from .nodes import Region


class DumpError(ValueError):
    """The folder is missing, is not a dump, or a newer tpfuse wrote it. The message is one line."""


@dataclass(frozen=True)
class DumpedGraph:
    """One graph of one rank. ``regions`` has one entry per site, or none where the dump holds no nodes."""

    name: str
    folder: Path
    report: GraphReport
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Dump:
    """All graphs of a dump folder, by graph name and then rank."""

    folder: Path
    graphs: tuple[DumpedGraph, ...]

    def by_name(self) -> dict[str, list[DumpedGraph]]:
        """Each graph with every rank's copy of it, ranks ascending."""
        found: dict[str, list[DumpedGraph]] = {}
        for graph in self.graphs:
            found.setdefault(graph.name, []).append(graph)
        return found

    def of_rank(self, rank: int) -> list[DumpedGraph]:
        """The graphs of one rank in the order in which they were compiled."""
        return [graph for graph in self.graphs if graph.report.rank == rank]


def read(folder: str | os.PathLike[str]) -> Dump:
    """Read a dump. Raises :class:`DumpError` when there is none, or a newer tpfuse wrote it."""
    path = Path(folder)
    if not path.exists():
        raise DumpError(f"{path} does not exist; give the folder that TPFUSE_DUMP or tpfuse.dump named")
    if not path.is_dir():
        raise DumpError(f"{path} is a file; give the folder that TPFUSE_DUMP or tpfuse.dump named")
    graphs = [_graph(found.parent) for found in _reports(path)]
    if not graphs:
        hint = "it is one graph of a dump: give the folder above rank-*" if (path / dump.REPORT).exists() else ""
        hint = hint or "no rank-*/*/report.json in it: run with TPFUSE_DUMP set to a folder"
        raise DumpError(f"{path} is not a tpfuse dump; {hint}")
    return Dump(path, tuple(sorted(graphs, key=lambda g: (_natural(g.name), g.report.rank))))


def _reports(path: Path) -> Iterator[Path]:
    # A name that starts with a dot is a dump that is being written, or whose writer died.
    return (p for p in path.glob(f"rank-*/*/{dump.REPORT}") if not p.parent.name.startswith("."))


def _graph(folder: Path) -> DumpedGraph:
    path = folder / dump.REPORT
    try:
        report = GraphReport.from_json(path.read_text(encoding="utf-8"))
        path = folder / dump.NODES
        regions = nodes.from_json(path.read_text(encoding="utf-8")) if path.exists() else []
    except (ReportFormatError, UnicodeDecodeError) as error:
        raise DumpError(f"{path}: {error}") from error
    except OSError as error:
        raise DumpError(f"{path} cannot be read: {error.strerror}") from error
    return DumpedGraph(folder.name, folder, report, tuple(regions))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts graph-2 before graph-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
