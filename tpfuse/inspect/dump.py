"""Write one graph's dump: ``DIR/rank-R/graph-G/{before.py, after.py, report.json, nodes.json, graph.svg}``.

A dump is a by-product: whatever goes wrong here is logged and the compile goes on. A folder appears complete or not at
all, and an existing one is never overwritten, so that ranks, graphs and processes do not disturb each other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

from torch.fx import Graph, GraphModule

from tpfuse.passes.report import GraphReport

from . import code, nodes, svg, words

log = logging.getLogger(__name__)

BEFORE, AFTER, REPORT, NODES, PICTURE = "before.py", "after.py", "report.json", "nodes.json", "graph.svg"
_ATTEMPTS = 10_000
_written: dict[str, Path] = {}  # this process's dumps by graph


def write(
    folder: str | os.PathLike[str], report: GraphReport, before: GraphModule | Graph, after: GraphModule | Graph
) -> None:
    """Write the dump of one graph on one rank.

    Args:
        folder: the dump folder; made when missing.
        report: of this graph.
        before: a copy of the graph made before the rewrite.
        after: the rewritten graph.

    Never raises: a failure is logged as a warning.
    """
    try:
        written = _write(Path(folder), report, before, after)
    except Exception as error:  # a full disk, a read-only folder, an argument without a printable form
        log.warning("tpfuse could not dump %s to %s: %s: %s", report.graph_id, folder, type(error).__name__, error)
    else:
        _written[report.graph_id] = written
        log.info("tpfuse dumped %s to %s", report.graph_id, written)


def remove(report: GraphReport) -> None:
    """Take back the dump of a graph that was compiled again, if there is one. Never raises."""
    written = _written.pop(report.graph_id, None)
    if written is not None:
        shutil.rmtree(written, ignore_errors=True)


def correct(report: GraphReport) -> None:
    """Write the report of a dumped graph once more, after other ranks had a say in it. Never raises."""
    written = _written.get(report.graph_id)
    if written is None:
        return
    try:
        scratch = written / f".{REPORT}"
        scratch.write_text(report.to_json() + "\n", encoding="utf-8")
        os.replace(scratch, written / REPORT)
    except OSError as error:
        log.warning("tpfuse could not correct %s: %s: %s", written, type(error).__name__, error)


def _write(folder: Path, report: GraphReport, before: GraphModule | Graph, after: GraphModule | Graph) -> Path:
    files = {
        BEFORE: _header(report, "before the rewrite") + code.python(before, _marks(report, fused_node=False)),
        AFTER: _header(report, "after the rewrite") + code.python(after, _marks(report, fused_node=True)),
        REPORT: report.to_json() + "\n",
        NODES: nodes.to_json(nodes.regions(report, before, after)) + "\n",
        PICTURE: svg.picture(report),
    }
    parent = folder / f"rank-{report.rank}"
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".tpfuse-", dir=parent))
    try:
        for name, text in files.items():
            (scratch / name).write_text(text, encoding="utf-8")
        scratch.chmod(0o755)  # mkdtemp's 0700 would hide the dump from other users of the folder
        return _publish(scratch, parent, report.graph_id)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, parent: Path, name: str) -> Path:
    """Rename the finished folder to its name, or to the next free one when a graph of another process has it."""
    for attempt in range(1, _ATTEMPTS):
        target = parent / (name if attempt == 1 else f"{name}.{attempt}")
        # A rename onto a folder that is not empty fails, which is what makes taking a name a single step.
        with contextlib.suppress(OSError):
            os.rename(scratch, target)
            return target
        if not target.exists():
            os.rename(scratch, target)  # not a collision: raise what is really wrong
    raise FileExistsError(f"{parent} holds {_ATTEMPTS} dumps of {name}; use an empty folder")


def _header(report: GraphReport, when: str) -> str:
    return (
        f"# tpfuse: {words.origin(report)}, {when}\n# {report.summary()}\n"
        f"# policy {report.policy}, numerics {report.numerics}, inner compiler {report.inner or 'unknown'}\n\n"
    )


def _marks(report: GraphReport, *, fused_node: bool) -> dict[str, str]:
    marks = {}
    for number, site in enumerate(report.sites):
        name = site.replaced_by if site.replaced_by and fused_node else (site.nodes[0] if site.nodes else None)
        if name:
            marks[name] = f"site {number}: {words.title(site)}, {words.verdict(site)}, ranks {words.ranks(site.group)}"
    return marks
