"""From the rows of a call whose norms are gathered to launches. Pure apart from the cache of kernels.

``blocks`` of as many ranks each: with one rank a block ``gathered_rows``, else ``gathered_blocks``.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from . import rows_schedule
from . import select as selection
from .kernels.variant import Constants
from .plane import Plane
from .prepare import Prepared, load_ahead, samples
from .rows_schedule import rows_taken
from .schedule import Schedule, dependent_launch_of, kernel_of, launches_of, room_of, variants_needed
from .select import UNBOUNDED, Entry, Selection
from .settings import Settings

# Bytes of a block above which the library gathers, for four ranks: there the kernel takes 0.93 of the time of the op and NCCL's
# gather at 16 MiB, and 1.03 at 28 MiB (four H200s, docs/results/rows.md). Between two ranks it wins at every size measured, up to
# 28 MiB. With more ranks a row goes to more of them: not measured, in proportion.
GATHERED_BYTES = 16 << 20


def gathered_bytes(world: int, copies: int) -> int:
    """Bytes of a block up to which one kernel gathers, where each partial row goes to ``copies`` others of its block."""
    if world == 2:
        return UNBOUNDED
    return min(GATHERED_BYTES, GATHERED_BYTES * 3 // (world - 1)) // copies


def algorithm_of(world: int, blocks: int) -> str:
    return "gathered_rows" if blocks == world else "gathered_blocks"


def rows_of_a_launch(p: Plane, settings: Settings, c: Constants, blocks: int) -> int:
    """Rows of each block that one launch may hold, 0 where not even one fits into a phase.

    A row has a slot for what each rank gives to its sum, and one for the norm from each block, which may be wider.
    """
    thresholds = selection.entry(p.architecture, p.world, settings.table)
    givers = p.world if blocks == p.world else p.world // blocks
    fit = p.phase_bytes // (givers * c.row_bytes + blocks * c.normed_row_bytes)
    return min(fit, max(1, thresholds.launch_bytes // c.row_bytes))


def most_rows(p: Plane, settings: Settings, c: Constants, dtype: torch.dtype, blocks: int) -> int:
    """How many rows a block may have in a call that takes the kernel; 0 where none does."""
    if rows_of_a_launch(p, settings, c, blocks) == 0:
        return 0
    if settings.algorithm != "auto" or settings.batch_invariant:
        return rows_taken(p, settings, c.hidden, dtype, 1)
    return bytes_taken(selection.entry(p.architecture, p.world, settings.table), blocks) // c.row_bytes


def bytes_taken(thresholds: Entry, blocks: int) -> int:
    """How many bytes a block may have in a call that takes the kernel, where nothing but the table decides."""
    taken = rows_schedule.bytes_taken(thresholds, 1)
    if thresholds.two_shot_bytes == UNBOUNDED:  # ranks that share a GPU
        return taken
    # With several ranks a block each row goes to all others of them, which a library's all-reduce need not do.
    copies = max(1, thresholds.world // blocks - 1)
    return min(taken, gathered_bytes(thresholds.world, copies))


def schedule_of(p: Plane, settings: Settings, c: Constants, dtype: torch.dtype, rows: int, blocks: int) -> Schedule:
    """Launches for ``rows`` rows of each block, or none: the library path."""
    if rows > most_rows(p, settings, c, dtype, blocks):
        return Schedule(Selection("library", rows), ())
    chosen = Selection(algorithm_of(p.world, blocks), min(rows, rows_of_a_launch(p, settings, c, blocks)))
    return Schedule(chosen, launches_of(p, settings, c, chosen, rows, blocks=blocks))


def of_prepared(blocks: int, prepared: Prepared, p: Plane, dtype: torch.dtype, rows: int) -> Schedule:
    """:func:`schedule_of` for calls of a kind."""
    assert prepared.constants is not None
    return schedule_of(p, prepared.path.settings, prepared.constants, dtype, rows, blocks)


def load(prepared: Prepared, p: Plane, dtype: torch.dtype, blocks: int) -> None:
    """Compile and load the kernels for every row count before any of them runs; see :mod:`.prepare`."""
    c, settings, algorithm = prepared.constants, prepared.path.settings, algorithm_of(p.world, blocks)
    assert c is not None
    most = min(most_rows(p, settings, c, dtype, blocks), rows_of_a_launch(p, settings, c, blocks))
    if most:
        found = variants_needed(room_of(p, settings, algorithm), most, c.groups, dependent_launch_of(p, settings))
        needed = [kernel_of(algorithm, c, replace(v, blocks=blocks), attribute) for v, attribute in found]
        load_ahead(needed, p, samples(c, p, counts=3))
