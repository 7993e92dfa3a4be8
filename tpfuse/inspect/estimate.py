"""What fusing one site saves: kernel launches and trips through memory.

The model, in one place. B is the size of the summed tensor (rows x H x bytes per element); weights are ignored, for
they are read once either way.

The baseline is what Inductor makes of the same graph, seen in its generated code: the all-reduce runs in place, and one
kernel adds the residual and normalizes.

==========================  ========  =======================================================
step                        launches  this rank's own memory traffic
==========================  ========  =======================================================
all-reduce in place         1         reads B, writes B
add and norm, one kernel    1         reads sum and residual, writes both results: 4 B
fused, one-shot, two-shot   1         reads x and residual, writes both results: 4 B
fused, library path         2         as the baseline
fused, lowered (CPU)        2         the baseline itself
all-gather behind the norm  1         reads the normed rows of this rank, B, and writes those of all
==========================  ========  =======================================================

So a fused site saves one launch and 2 B: the sum is neither written nor read back. What crosses the links and what is
staged in exchange buffers on the way is not counted. Without a residual the figures of both sides shrink alike and the
difference stays 2 B. A gather inside the fused op saves one launch more, and 2 B: the normed rows of this rank are written once,
where all ranks' are, and not read back. The model says nothing about time: measure that with ``tpfuse bench``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tpfuse.ops.vote import MAX_WORLD
from tpfuse.passes.report import Site

LAUNCHES_SAVED = 1
TRIPS_SAVED = 2


@dataclass(frozen=True)
class Saving:
    """What one call of the compiled graph saves at one site, or at many.

    Attributes:
        launches: kernel launches.
        bytes: memory traffic of one rank, or None where the row count is symbolic.
        bytes_per_row: the same for one row.
    """

    launches: int
    bytes: int | None
    bytes_per_row: int

    def __add__(self, other: Saving) -> Saving:
        total = None if self.bytes is None or other.bytes is None else self.bytes + other.bytes
        return Saving(self.launches + other.launches, total, self.bytes_per_row + other.bytes_per_row)


NOTHING = Saving(0, 0, 0)


def saving(site: Site, rows: int | None = None, path: str | None = None) -> Saving:
    """What fusing this site saves, or would save if it were fused.

    Args:
        site: fused or not.
        rows: row count to assume instead of the one in the graph.
        path: the algorithm for that size, as :func:`.algorithm.algorithm_of` names it; ``library`` saves nothing, and a gather
            that the library does behind the op nothing more. Over more ranks than the kernels take it is the only one.
    """
    sums, _, outside = (path or "").partition("+")
    if (
        sums == "library"
        or too_many_ranks(site)
        or site.lowered
        or not site.shape
        or not isinstance(site.shape[-1], int)
    ):
        return NOTHING
    # A site without a flavour is a sum that another site's op makes too: the gather is that one's. Over many replicas it is the
    # library's, while the ranks of each may sum by themselves.
    outside = outside or ("all_gather" if len(site.callers) > MAX_WORLD else "")
    gathers = site.pattern.endswith("+all_gather") and site.flavour is not None and not outside
    per_row = TRIPS_SAVED * (1 + gathers) * site.shape[-1] * item_size(site.dtype)
    known = rows_of(site) if rows is None else rows
    return Saving(LAUNCHES_SAVED * (1 + gathers), None if known is None else known * per_row, per_row)


def too_many_ranks(site: Site) -> bool:
    """Whether the site's group is larger than the kernels take, so that its op is the library's all-reduce and one kernel."""
    return len(site.group) > MAX_WORLD


def rows_of(site: Site) -> int | None:
    """Rows of the summed tensor: the product of all sizes but the last, or None where one is symbolic."""
    rows = 1
    for size in site.shape[:-1]:
        if not isinstance(size, int):
            return None
        rows *= size
    return rows


def item_size(dtype: str) -> int:
    """Bytes per element of a dtype named as reports name it; 0 for an unknown name."""
    found = getattr(torch, dtype, None) if dtype else None
    return found.itemsize if isinstance(found, torch.dtype) else 0


def in_units(count: int | None) -> str:
    """A byte count for people, e.g. ``16.0 KiB``; ``unknown`` for None."""
    if count is None:
        return "unknown"
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
