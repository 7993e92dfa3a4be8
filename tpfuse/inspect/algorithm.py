"""Which algorithm the op takes at a site, for a number of rows: the op's own selection, asked without a GPU."""

from __future__ import annotations

import re

import torch

from tpfuse.ops import gather_schedule, rows_schedule
from tpfuse.ops.select import entry, one_shot_bytes, select
from tpfuse.ops.vote import MAX_WORLD
from tpfuse.passes.report import Site

LIBRARY = "library"
# Behind an algorithm: the gather behind the norm is a step of its own, which the library does.
GATHERED_OUTSIDE = "+all_gather"
ROWS_KEPT = re.compile(r"reduce_scatter|all_reduce\+rows/(\d+)")


def algorithm_of(site: Site, rows: int, architecture: str) -> str:
    """The algorithm of a fused site with so many rows.

    Args:
        site: of a report.
        rows: per attention replica; where a rank keeps some rows of the sum, or sums its own, so many of those.
        architecture: as :func:`tpfuse.ops.select` takes it.
    Returns:
        ``one_shot``, ``two_shot``, ``library``; where the normed rows are gathered ``gathered_rows`` or ``gathered_blocks``, one
        kernel for all of it, or one of the three with ``+all_gather`` behind it: too many bytes for that kernel, so the op
        without a gather runs, and the library's gather.
    """
    try:
        dtype, width, world = getattr(torch, site.dtype), int(site.shape[-1]), len(site.callers)
        part = ROWS_KEPT.match(site.pattern)
        block = rows * width * dtype.itemsize
        if part is None and not site.over:
            return select(architecture, world, dtype, width, rows).algorithm
        gathers = site.pattern.endswith("+all_gather")
        if part is None and world > MAX_WORLD:
            # No kernel gathers over so many replicas, but one may sum for the ranks of each.
            return select(architecture, len(site.group), dtype, width, rows).algorithm + GATHERED_OUTSIDE
        thresholds = entry(architecture, world)
        blocks = world // len(site.group) if part is None else int(part[1] or world)
        if gathers and block <= gather_schedule.bytes_taken(thresholds, blocks):
            return gather_schedule.algorithm_of(world, blocks)
        if part is None:  # replicas: the ranks of each sum their own rows
            found = select(architecture, len(site.group), dtype, width, rows).algorithm
        elif block > rows_schedule.bytes_taken(thresholds, blocks):
            found = LIBRARY
        else:
            found = "one_shot" if blocks * block <= one_shot_bytes(thresholds, blocks) else "two_shot"
        return found + GATHERED_OUTSIDE if gathers else found
    except ValueError:  # a world size that the kernels do not take
        return LIBRARY
