"""The reports of this process, and copies of them on disk for warm compile caches.

When Inductor's caches supply a graph, the pass does not run; the report of the compile that filled the cache is then read
back from a file beside those caches. A key covers all that the report depends on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tpfuse import compat
from tpfuse.passes.report import GraphReport, ReportFormatError

log = logging.getLogger("tpfuse")


class FusionMismatch(AssertionError):
    """:func:`expect` counted another number of fused all-reduces than it was told."""


_lock = threading.Lock()
_reports: list[GraphReport] = []


def reports() -> list[GraphReport]:
    """The report of every graph compiled since the last :func:`clear_reports`, in order."""
    with _lock:
        return list(_reports)


def clear_reports() -> None:
    """Forget all reports, and count ``tpfuse.fuel`` from zero again."""
    with _lock:
        _reports.clear()


def add(report: GraphReport) -> None:
    """Keep a report and log its one-line summary at INFO."""
    with _lock:
        _reports.append(report)
    log.info("%s", report.summary())


def fuel_left(fuel: int | None) -> int | None:
    """What is left of a process-wide limit of rewrites."""
    return None if fuel is None else max(0, fuel - sum(len(r.fused) for r in reports()))


@contextmanager
def expect(fused: int | None = None, found: int | None = None) -> Iterator[None]:
    """Check how many all-reduces the code inside fuses.

    Args:
        fused: expected number of fused all-reduces over all graphs compiled inside.
        found: expected number of all-reduces, or None for any.
    Raises:
        FusionMismatch: the count differs; the message lists each unfused site with reason and source line.
    """
    before = {id(r) for r in reports()}
    yield
    new = [r for r in reports() if id(r) not in before]
    got = sum(len(r.fused) for r in new)
    total = sum(len(r.sites) for r in new)
    if (fused is None or got == fused) and (found is None or total == found):
        return
    wanted = " and ".join(f"{n} {what}" for n, what in ((fused, "fused"), (found, "found")) if n is not None)
    lines = [f"expected {wanted} all-reduces, got {got} fused of {total} found in {len(new)} graphs"]
    if not new:
        lines.append("  no graph was compiled inside expect(); was the function compiled before?")
    for r in new:
        lines += [f"  {r.graph_id}: {s.source or '?'}: {s.reason}: {s.detail}" for s in r.kept]
    raise FusionMismatch("\n".join(lines))


def key(parts: Sequence[Any]) -> str:
    """A digest of everything a report depends on."""
    return hashlib.sha256(json.dumps([str(p) for p in parts]).encode()).hexdigest()[:32]


def _file(digest: str) -> Path:
    return Path(compat.cache_folder()) / "tpfuse" / f"{digest}.json"


def save(digest: str, found: Sequence[GraphReport]) -> bool:
    """Write reports for later processes; a failure costs only a cache hit and is logged at DEBUG."""
    target = _file(digest)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{digest}")
        with os.fdopen(handle, "w") as file:
            json.dump([r.to_dict() for r in found], file)
        os.replace(name, target)  # atomic, so that ranks which share the folder never read half a file
        return True
    except OSError as error:
        log.debug("report not kept for warm caches: %s", error)
        return False


def load(digest: str) -> list[GraphReport] | None:
    """The reports that :func:`save` wrote, or None when there are none that can be read."""
    try:
        data = json.loads(_file(digest).read_text())
        return [replace(GraphReport.from_dict(item), from_cache=True) for item in data]
    except (OSError, ValueError, ReportFormatError, TypeError):
        return None
