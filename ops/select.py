"""Selection: which algorithm a call takes.

A pure function of (architecture, world size, dtype, H, rows) over one table, so that ranks cannot disagree. It never
looks at clocks, free memory or anything else that is local. ``architecture`` is the compute capability of the group's
GPUs and, behind it, the class of the links between them (:func:`key`); the ranks agree on it when their plane is built.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from .kernels.state import ROW_BYTES

ALGORITHMS = ("one_shot", "two_shot", "library")
UNBOUNDED = 1 << 60
# Up to so many rows a call is quantized in the kernel that norms, above them by a kernel behind it. Between two H100s one
# kernel is the faster way at every size measured, the largest of which this is: docs/results/quant.md.
QUANT_ROWS = 256


@dataclass(frozen=True)
class Selection:
    """What a call does.

    Attributes:
        algorithm: ``"one_shot"``, ``"two_shot"`` or ``"library"``.
        rows_per_launch: larger calls are cut into launches of this many rows; rows are independent of each other.
    """

    algorithm: str
    rows_per_launch: int


def key(architecture: str, links: str) -> str:
    """What the table calls GPUs with links of a class: ``sm_90`` with NVLink between all of them, else ``sm_90-pcie``, ...

    Args:
        links: a class of :mod:`tpfuse.ops.topology`: ``nvlink``, ``partial-nvlink``, ``pcie``, ``unknown`` or ``shared``.
    """
    return architecture if links == "nvlink" else f"{architecture}-{links}"


@dataclass(frozen=True)
class Entry:
    """Thresholds in bytes of ``x`` for one (architecture with its links, world size).

    Attributes:
        one_shot_bytes: one-shot up to here.
        two_shot_bytes: two-shot up to here, library above.
        launch_bytes: bytes of ``x`` that one launch handles; larger calls are cut into several.
        measured: where the numbers come from.
    """

    architecture: str
    world: int
    one_shot_bytes: int
    two_shot_bytes: int
    launch_bytes: int
    measured: str


KIB, MIB = 1 << 10, 1 << 20
_MODEL = (
    "not measured: where the second round of two-shot, 1.02 us, pays for itself at 379 GB/s, both measured between two H100s "
    "on 2026-11-25"
)
_NVLINK = (
    "two H100s, NVLink4, 2026-11-25, H 4096 to 8192, 1 to 4096 rows (64 MiB): docs/measuring.md. One-shot is the fastest at "
    "every size; larger ones were not measured"
)
_FOUR = (
    "four H200s, NVLink, 2026-11-26, H 4096 and 7168, 1 to 1024 rows (14 MiB): docs/results/kernel-four-h200.md. One-shot is the "
    "faster one at 112 KiB, two-shot at 512 KiB; between them the model's 248 KiB"
)
_SHARED = "one H100 and one H200 shared by the ranks under MPS, 2026-11-25, 1 to 4096 rows: docs/measuring.md"
_GUESSED = "between the measured world sizes 2, 4 and 8; not measured"
_PCIE = "not measured: sizes at which one round in one launch is sure to win"
_PARTIAL = "not measured, so every size goes to the library until `tpfuse bench --tune` has measured this machine"
TABLE: tuple[Entry, ...] = (
    Entry("any", 2, 64 * MIB, 64 * MIB, 8 * MIB, _NVLINK),
    Entry("any", 3, 560 * KIB, 16 * MIB, 8 * MIB, _MODEL),
    Entry("any", 4, 248 * KIB, 16 * MIB, 8 * MIB, _FOUR),
    Entry("any", 5, 156 * KIB, 16 * MIB, 8 * MIB, _MODEL),
    Entry("any", 6, 112 * KIB, 16 * MIB, 8 * MIB, _MODEL),
    Entry("any", 7, 88 * KIB, 16 * MIB, 8 * MIB, _MODEL),
    Entry("any", 8, 72 * KIB, 16 * MIB, 8 * MIB, _MODEL),
    # Several ranks on one GPU: there is no NCCL behind it, so the kernels take every size. Launches are kept small: all
    # ranks' planes go through one L2, and a launch whose slots do not stay there takes three times as long a byte.
    Entry("any-shared", 2, UNBOUNDED, UNBOUNDED, 2 * MIB, _SHARED),
    Entry("any-shared", 3, 384 * KIB, UNBOUNDED, 1 * MIB, _GUESSED),
    Entry("any-shared", 4, 384 * KIB, UNBOUNDED, 1 * MIB, _SHARED),
    Entry("any-shared", 5, 192 * KIB, UNBOUNDED, 512 * KIB, _GUESSED),
    Entry("any-shared", 6, 128 * KIB, UNBOUNDED, 512 * KIB, _GUESSED),
    Entry("any-shared", 7, 128 * KIB, UNBOUNDED, 512 * KIB, _GUESSED),
    Entry("any-shared", 8, 64 * KIB, UNBOUNDED, 512 * KIB, _SHARED),
    # Links that are not NVLink between all GPUs have a fraction of its bandwidth, and the library knows ways around them.
    *(
        Entry(f"any-{links}", world, 32 * KIB, 32 * KIB, MIB, _PCIE)
        for links in ("pcie", "unknown")
        for world in range(2, 9)
    ),
    *(Entry("any-partial-nvlink", world, 0, 0, MIB, _PARTIAL) for world in range(2, 9)),
)


def entry(architecture: str, world: int, table: Sequence[Entry] = TABLE) -> Entry:
    """The entry of an architecture: its own, else the one for ``any`` with the same links."""
    _, dash, links = architecture.partition("-")
    for name in (architecture, f"any{dash}{links}"):
        for candidate in table:
            if candidate.architecture == name and candidate.world == world:
                return candidate
    raise ValueError(
        f"no selection entry for architecture {architecture!r} and world size {world}; the kernels take world sizes 2 to 8, and "
        "the links behind the architecture are nothing (NVLink), -partial-nvlink, -pcie, -unknown or -shared"
    )


def select(
    architecture: str,
    world: int,
    dtype: torch.dtype,
    hidden: int,
    rows: int,
    *,
    override: str = "auto",
    table: Sequence[Entry] = TABLE,
    batch_invariant: bool = False,
    sums: int = 1,
) -> Selection:
    """The algorithm of one call.

    Args:
        architecture: ``"sm_90"`` for NVLink between all GPUs, ``"sm_90-pcie"``, ``"sm_90-shared"``, ...: see :func:`key`.
        world: ranks in the group, 2 to 8.
        dtype, hidden, rows: of ``x``.
        override: ``"auto"``, or an algorithm to force (``TPFUSE_ALGORITHM``); equal on all ranks.
        batch_invariant: the kernels for every size, for the library sums in another order than they do.
        sums: partial sums of each row that the call reduces: so many times the bytes.
    Raises:
        ValueError: there is no entry for the architecture and number of ranks, or no such algorithm.
    """
    if override != "auto" and override not in ALGORITHMS:
        raise ValueError(f"override is {override!r}; valid are auto, {', '.join(ALGORITHMS)}")
    thresholds = entry(architecture, world, table)
    row_bytes = sums * hidden * dtype.itemsize
    size = rows * row_bytes
    if override != "auto":
        algorithm = override
    elif size <= thresholds.one_shot_bytes:
        algorithm = "one_shot"
    elif size // sums <= thresholds.two_shot_bytes:  # the library reduces every sum, too
        algorithm = "two_shot"
    elif batch_invariant:
        # In launches that fit a phase, however large the call is. Between two ranks one-shot moves no more bytes.
        algorithm = "two_shot" if world > 2 else "one_shot"
    else:
        algorithm = "library"
    if algorithm == "library":
        return Selection(algorithm, rows)
    # What fits a phase bounds a launch whatever was asked for: the capacity is checked here, on every call.
    phase = phase_bytes(thresholds)
    if algorithm == "two_shot" and two_shot_rows(phase, world, row_bytes) < 1:
        algorithm = "one_shot"  # two sums of the widest rows, in a plane for tiny launches: one row fits in one-shot
    most = phase // (world * row_bytes) if algorithm == "one_shot" else two_shot_rows(phase, world, row_bytes)
    return Selection(algorithm, max(1, min(rows, most, thresholds.launch_bytes // row_bytes)))


def one_shot_bytes(thresholds: Entry, blocks: int) -> int:
    """Bytes of ``x`` up to which rows with destinations take one-shot, with so many blocks of rows.

    With R of W ranks a block, two-shot sends ``(R - 1)(W - 2) / W`` of the bytes of ``x`` less out of each rank, and takes one
    more round; for the all-reduce R is W. So it pays for itself at ``(W - 1) / (R - 1)`` times the bytes where the table says
    that the all-reduce's does, and never for a block a rank.
    """
    receivers = thresholds.world // blocks
    if receivers == 1 or thresholds.world == 2:
        return UNBOUNDED
    return thresholds.one_shot_bytes * (thresholds.world - 1) // (receivers - 1)


def phase_bytes(thresholds: Entry) -> int:
    """Size of one phase of a plane: what the largest launch of the entry needs, in whole MiB."""
    one_shot = thresholds.world * min(thresholds.one_shot_bytes, thresholds.launch_bytes)
    two_shot = 2 * thresholds.launch_bytes + thresholds.world * ROW_BYTES
    return -(-max(one_shot, two_shot, thresholds.world * ROW_BYTES * 2) // MIB) * MIB


def two_shot_rows(phase: int, world: int, row_bytes: int) -> int:
    """Rows of one two-shot launch that fit a phase: scatter holds ceil(rows / W) * W of them, gather holds rows."""
    return (phase // row_bytes - (world - 1)) // 2


def save_table(path: Path, table: Sequence[Entry]) -> None:
    """Write a table for ``TPFUSE_TABLE``."""
    path.write_text(json.dumps([asdict(e) for e in table], indent=1) + "\n")


def load_table(path: Path) -> tuple[Entry, ...]:
    """Read a table that :func:`save_table` wrote; its entries come before the built-in ones.

    Raises ``ValueError`` naming the file and the entry that is wrong.
    """
    names = {f.name for f in fields(Entry)}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # ValueError: no JSON, or no text at all
        raise ValueError(f"TPFUSE_TABLE={path}: {error}; write a table with `tpfuse bench --tune`") from error
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError(f"TPFUSE_TABLE={path}: not a list of entries; write a table with `tpfuse bench --tune`")
    for number, item in enumerate(found):
        if set(item) != names:
            raise ValueError(f"TPFUSE_TABLE={path}: entry {number} has fields {sorted(item)}; expected {sorted(names)}")
        for field in fields(Entry):
            value = item[field.name]
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(
                    f"TPFUSE_TABLE={path}: {field.name} of entry {number} is {value!r}; expected a whole number"
                )
    return (*(Entry(**item) for item in found), *TABLE)


def fingerprint(table: Sequence[Entry]) -> str:
    """Equal exactly when the tables are: ranks compare it before they use one."""
    return hashlib.sha256(repr(tuple(table)).encode()).hexdigest()[:16]
