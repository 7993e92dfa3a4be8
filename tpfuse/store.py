"""The reports of this process, in the order in which graphs were compiled."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tpfuse.passes.reasons import Reason
from tpfuse.passes.report import GraphReport

log = logging.getLogger("tpfuse")
FEW = 3


class FusionMismatch(AssertionError):
    """:func:`expect` counted another number of fused all-reduces than it was told."""


_lock = threading.Lock()
_reports: list[GraphReport] = []
_abandoned: list[str] = []


def reports() -> list[GraphReport]:
    """The report of every graph compiled since the last :func:`clear_reports`, in order."""
    with _lock:
        return list(_reports)


def clear_reports() -> None:
    """Forget all reports, and count ``tpfuse.fuel`` from zero again."""
    with _lock:
        _reports.clear()
        _abandoned.clear()


def abandon(what: str) -> None:
    """Keep what Dynamo left to eager, each once, the first few."""
    with _lock:
        if what not in _abandoned and len(_abandoned) < FEW:
            _abandoned.append(what)


def abandoned() -> list[str]:
    """What Dynamo left to eager since the last :func:`clear_reports`."""
    with _lock:
        return list(_abandoned)


def remove(reports: Sequence[GraphReport]) -> None:
    """Forget the reports of a compile that was made again."""
    gone = {id(report) for report in reports}
    with _lock:
        _reports[:] = [report for report in _reports if id(report) not in gone]


def add(report: GraphReport) -> None:
    """Keep a report and log its one-line summary at INFO."""
    with _lock:
        _reports.append(report)
    log.info("%s", report.summary())


@contextmanager
def forgotten_on_failure() -> Iterator[None]:
    """Forget the reports made inside when an exception leaves: nothing of their graphs will run.

    The caller sees the exception, or Dynamo runs the model's own code (``suppress_errors``) or traces it again.
    """
    before = {id(report) for report in reports()}
    try:
        yield
    except BaseException:
        with _lock:
            _reports[:] = [report for report in _reports if id(report) in before]
        raise


def fuel_left(fuel: int | None) -> int | None:
    """What is left of a process-wide limit of rewrites.

    What ranks disagreed about has cost its fuel: ranks of other groups know nothing of that.
    """
    if fuel is None:
        return None
    disagree = Reason.RANKS_DISAGREE.value
    return max(0, fuel - sum(site.fused or site.reason == disagree for r in reports() for site in r.sites))


@contextmanager
def expect(fused: int | None = None, found: int | None = None) -> Iterator[None]:
    """Check how many all-reduces the code inside fuses.

    Args:
        fused: expected number of fused all-reduces over all graphs compiled inside.
        found: expected number of all-reduces, or None for any.
    Raises:
        FusionMismatch: the count differs; the message lists each unfused site with reason and source line, and the graphs' notes.
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
        lines += [f"  Dynamo left to eager: {what}" for what in abandoned()]
    for r in new:
        lines += [f"  {r.graph_id}: {s.source or '?'}: {s.reason}: {s.detail}" for s in r.kept]
        lines += [f"  {r.graph_id}: note: {note}" for note in r.notes]
    raise FusionMismatch("\n".join(lines))
