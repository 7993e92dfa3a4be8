"""From the rows of a reduction with destinations to launches. Pure apart from the cache of kernels."""

from __future__ import annotations

from dataclasses import replace

import torch

from . import select as selection
from .kernel import Kernel
from .kernels.variant import Constants
from .plane import Plane
from .prepare import Prepared, load_ahead, samples
from .schedule import Schedule, dependent_launch_of, kernel_of, launches_of, room_of, variants_needed
from .select import UNBOUNDED, Entry, Selection
from .settings import Settings

ONE_SHOT, TWO_SHOT = "received_rows", "received_two_shot"

# Bytes of a block above which NCCL's reduce-scatter, which sends every row once, is as fast: four H200s, docs/results/rows.md.
# Where several ranks receive a block, the library reduces every row on every rank, and the kernels win further up. So they do
# between two ranks, at every size measured (28 MiB).
SCATTERED_BYTES = 12 << 20


def rows_taken(p: Plane, settings: Settings, hidden: int, dtype: torch.dtype, blocks: int) -> int:
    """How many rows a block may have in a call that takes the kernels; 0 where none does.

    A rank pushes and polls as much for a row of a block whatever their number: up to where the all-reduce's kernels end.
    """
    if settings.batch_invariant:
        return UNBOUNDED
    if settings.algorithm != "auto":
        return 0 if settings.algorithm == "library" else UNBOUNDED
    thresholds = selection.entry(p.architecture, p.world, settings.table)
    return bytes_taken(thresholds, blocks) // (hidden * dtype.itemsize)


def bytes_taken(thresholds: Entry, blocks: int) -> int:
    """How many bytes a block may have in a call that takes the kernels, where nothing but the table decides."""
    most = max(thresholds.one_shot_bytes, thresholds.two_shot_bytes)
    if 2 < blocks == thresholds.world and most < UNBOUNDED:  # unbounded: ranks that share a GPU have no such library
        return min(most, SCATTERED_BYTES)
    return most


def one_shot_rows(p: Plane, settings: Settings, hidden: int, dtype: torch.dtype, blocks: int) -> int:
    """How many rows a block may have in a call that takes one-shot."""
    most = selection.one_shot_bytes(selection.entry(p.architecture, p.world, settings.table), blocks)
    if most == UNBOUNDED or settings.algorithm == "one_shot":
        return UNBOUNDED
    return 0 if settings.algorithm == "two_shot" else most // (blocks * hidden * dtype.itemsize)


def rows_of_a_launch(p: Plane, settings: Settings, hidden: int, dtype: torch.dtype, algorithm: str, blocks: int) -> int:
    """Rows of each block that one launch may hold: a slot for each of them and each rank fits into a phase.

    In two-shot a rank has slots for the rows that it owns, one for each rank, and one for the sum of every row.
    """
    thresholds = selection.entry(p.architecture, p.world, settings.table)
    row_bytes = hidden * dtype.itemsize
    fit = p.phase_bytes // row_bytes
    fit = fit // p.world if algorithm == ONE_SHOT else (fit - p.world) // (blocks + 1)
    return max(1, min(fit, thresholds.launch_bytes // row_bytes))


def schedule_of(p: Plane, settings: Settings, c: Constants, dtype: torch.dtype, rows: int, blocks: int) -> Schedule:
    """Launches for ``rows`` rows of each block, or none: the library path."""
    if rows > rows_taken(p, settings, c.hidden, dtype, blocks):
        return Schedule(Selection("library", rows), ())
    algorithm = ONE_SHOT if rows <= one_shot_rows(p, settings, c.hidden, dtype, blocks) else TWO_SHOT
    chosen = Selection(algorithm, min(rows, rows_of_a_launch(p, settings, c.hidden, dtype, algorithm, blocks)))
    return Schedule(chosen, launches_of(p, settings, c, chosen, rows, blocks=blocks))


def kernels_needed(p: Plane, settings: Settings, c: Constants, dtype: torch.dtype, blocks: int) -> list[Kernel]:
    """Every kernel that a call of this kind may need, whatever its rows."""
    taken = rows_taken(p, settings, c.hidden, dtype, blocks)
    limit = one_shot_rows(p, settings, c.hidden, dtype, blocks)
    needed = []
    for algorithm, largest in ((ONE_SHOT, min(taken, limit)), (TWO_SHOT, taken if taken > limit else 0)):
        most = min(largest, rows_of_a_launch(p, settings, c.hidden, dtype, algorithm, blocks))
        if most:
            found = variants_needed(room_of(p, settings, algorithm), most, c.groups, dependent_launch_of(p, settings))
            needed += [kernel_of(algorithm, c, replace(v, blocks=blocks), attribute) for v, attribute in found]
    return needed


def of_prepared(blocks: int, prepared: Prepared, p: Plane, dtype: torch.dtype, rows: int) -> Schedule:
    """:func:`schedule_of` for calls of a kind."""
    assert prepared.constants is not None
    return schedule_of(p, prepared.path.settings, prepared.constants, dtype, rows, blocks)


def load(prepared: Prepared, p: Plane, dtype: torch.dtype, blocks: int) -> None:
    """Compile and load the kernels for every row count before any of them runs; see :mod:`.prepare`."""
    assert prepared.constants is not None
    needed = kernels_needed(p, prepared.path.settings, prepared.constants, dtype, blocks)
    load_ahead(needed, p, samples(prepared.constants, p, counts=3))
