"""From the rows of a reduction with destinations to launches. Pure apart from the cache of kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from . import prepare
from . import select as selection
from .geometry import geometry
from .kernel import Kernel
from .kernels.variant import Constants, torch_dtype
from .plane import Plane
from .prepare import Prepared, load_together
from .schedule import Launch, Schedule, dependent_launch_of, kernel_of, room_of, variant_of, variants_needed
from .select import Selection
from .settings import Settings

ALGORITHM = "received_rows"


def most_rows(p: Plane, settings: Settings, hidden: int, dtype: torch.dtype) -> int:
    """Rows of each block that one launch may hold: a slot for each of them and each rank fits into a phase."""
    thresholds = selection.entry(p.architecture, p.world, settings.table)
    row_bytes = hidden * dtype.itemsize
    return max(1, min(p.phase_bytes // (p.world * row_bytes), thresholds.launch_bytes // row_bytes))


def takes_kernels(p: Plane, settings: Settings, hidden: int, dtype: torch.dtype, rows: int) -> bool:
    """Whether calls with ``rows`` rows a block take the kernels.

    A rank pushes and polls as much for a row of a block whatever their number: up to where the all-reduce's kernels end.
    """
    if settings.batch_invariant:
        return True
    if settings.algorithm != "auto":
        return settings.algorithm != "library"
    thresholds = selection.entry(p.architecture, p.world, settings.table)
    return rows * hidden * dtype.itemsize <= max(thresholds.one_shot_bytes, thresholds.two_shot_bytes)


def schedule_of(p: Plane, settings: Settings, c: Constants, dtype: torch.dtype, rows: int, blocks: int) -> Schedule:
    """Launches for ``rows`` rows of each block, or none: the library path."""
    if not takes_kernels(p, settings, c.hidden, dtype, rows):
        return Schedule(Selection("library", rows), ())
    room, pdl = room_of(p, settings, ALGORITHM), dependent_launch_of(p, settings)
    most = min(rows, most_rows(p, settings, c.hidden, dtype))
    launches = []
    for start in range(0, rows, most):
        n = min(most, rows - start)
        shape = geometry(room, n, c.groups)
        variant, attribute = variant_of(room, shape, pdl)
        kernel = kernel_of(ALGORITHM, c, replace(variant, blocks=blocks), attribute)
        launches.append(Launch(kernel, shape.programs, start, n))
    return Schedule(Selection(ALGORITHM, most), tuple(launches))


def kernels_needed(p: Plane, settings: Settings, c: Constants, dtype: torch.dtype, blocks: int) -> list[Kernel]:
    """Every kernel that a call of this kind may need, whatever its rows."""
    most = most_rows(p, settings, c.hidden, dtype)
    while most > 1 and not takes_kernels(p, settings, c.hidden, dtype, most):
        most -= 1
    if not takes_kernels(p, settings, c.hidden, dtype, most):
        return []
    found = variants_needed(room_of(p, settings, ALGORITHM), most, c.groups, dependent_launch_of(p, settings))
    return [kernel_of(ALGORITHM, c, replace(variant, blocks=blocks), attribute) for variant, attribute in found]


def load(prepared: Prepared, p: Plane, dtype: torch.dtype, blocks: int) -> None:
    """Compile and load the kernels for every row count before any of them runs; see :mod:`.prepare`."""
    if prepare.LOAD_AHEAD and prepared.constants is not None:
        needed = kernels_needed(p, prepared.path.settings, prepared.constants, dtype, blocks)
        load_together(sorted(needed, key=lambda k: repr(k.constexprs)), p, samples(prepared.constants, p))


def samples(c: Constants, p: Plane) -> tuple[Any, ...]:
    """Arguments of the right types to compile a kernel with, as in :func:`tpfuse.ops.prepare.samples`."""
    x, weight, normed, residual_out = (torch_dtype(d) for d in (c.dtype, c.weight_dtype, c.out_dtype, c.residual_dtype))
    tables = (torch.int64, torch.int32)
    return (x, x, weight, x, normed, residual_out, *tables, p.rank, 1, 1, 1, p.phase_bytes, 1 << 40, 1e-6, 1.0)
