"""One warning when a tensor-parallel model ends up with nothing fused and nobody asked for that.

A model that runs unfused is right and slow, which no test of its output shows. Each cause is told once a process, with what
to do, in a category of its own: ``warnings.filterwarnings("ignore", category=tpfuse.FusionWarning)`` silences all of them.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.fx import Graph

from tpfuse import store
from tpfuse.passes import GraphReport, Reason, Site, handmade

_lock = threading.Lock()
_told: set[str] = set()


class FusionWarning(UserWarning):
    """A compiled model runs without fused all-reduces, for the reason that the message names."""


def tell(cause: str, message: str) -> None:
    """Warn, unless this process has been warned of the same cause before."""
    with _lock:
        if cause in _told:
            return
        _told.add(cause)
    try:
        warnings.warn(f"tpfuse: {message}", FusionWarning, stacklevel=3)
    except FusionWarning:  # who made it an error has not been told where somebody swallows that
        with _lock:
            _told.discard(cause)
        raise


def alone() -> bool:
    """Whether this process has no other ranks, so that there is nothing to fuse."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1


def forget() -> None:
    """Warn of everything again, as a new process does."""
    with _lock:
        _told.clear()


def count_row_collectives(graph: Graph) -> tuple[int, int]:
    """(reduce-scatters, all-gathers) of a graph, by operator name, whichever library's they are."""
    names = [n.target.name().lower() for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    scatters = sum("reduce_scatter" in name for name in names)
    gathers = sum("all_gather" in name or "allgather" in name for name in names)
    return scatters, gathers


def look(reports: Sequence[GraphReport], policy: str, fuel: int | None) -> None:
    """Warn when these graphs, just compiled, have reductions of which none was fused.

    Says nothing where a graph of this process has fused something, where ``policy`` is off or a ``fuel`` is set, and where
    every reduction is over one rank.
    """
    if policy == "off" or fuel is not None or any(report.fused for report in store.reports()):
        return
    for report in reports:
        if any(site.reason == Reason.RANKS_DISAGREE.value for site in report.sites):
            continue  # this has had a warning of its own
        # An exception inside the pass has had its own warning; of statistics there is nothing to fuse.
        quiet = (Reason.GROUP_SIZE.value, Reason.INTERNAL.value, Reason.NORM_STATISTICS.value)
        sites = [site for site in report.sites if site.reason not in quiet]
        if sites:
            tell(*_about(report, sites))
        made = [note for note in report.notes if note.startswith(handmade.BEGINNING)]
        if made and not report.sites:
            tell("hand-made", f"{report.graph_id} has no reduction but one {made[0]}")


def _about(report: GraphReport, sites: list[Site]) -> tuple[str, str]:
    """(cause, message) of a graph whose reductions were all kept: the commonest reason speaks for them."""
    counts = Counter(str(site.reason) for site in sites)
    reason = counts.most_common(1)[0][0]
    first = next(site for site in sites if site.reason == reason)
    why = ", ".join(f"{code} {n}" for code, n in counts.most_common())
    place = f" ({first.source})" if first.source else ""
    return reason, (
        f"none of the {len(sites)} reductions of {report.graph_id} was fused: {why}. {first.remedy} "
        f"E.g.{place} {first.detail or 'no detail'}. print(tpfuse.reports()[-1]) lists them"
    )
