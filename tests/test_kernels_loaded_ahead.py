"""No call compiles or loads a kernel while its peers wait: all that any number of rows needs is loaded at the first call."""

from __future__ import annotations

import pytest
import torch
from tpfuse.ops import schedule
from tpfuse.ops.geometry import Room, geometry
from tpfuse.ops.select import select
from tpfuse.ops.settings import Settings

pytestmark = pytest.mark.long  # not on every save

ROWS = 8192
MULTIPROCESSORS = 132


@pytest.mark.parametrize(
    ("links", "settings"),
    [
        ("", Settings()),
        ("-shared", Settings()),
        ("-pcie", Settings()),
        ("-pcie", Settings(batch_invariant=True)),
        ("-partial-nvlink", Settings(algorithm="two_shot")),
    ],
    ids=["own GPUs", "one GPU", "PCIe", "PCIe, batch-invariant", "two-shot forced"],
)
@pytest.mark.parametrize("world", range(2, 9))
@pytest.mark.parametrize("sums", (1, 2))
def test_every_row_count_uses_only_kernels_that_were_loaded(world, links, settings, sums):
    shared = links == "-shared"
    architecture = f"sm_90{links}"
    for hidden, dtype in (
        (2880, torch.bfloat16),
        (4096, torch.bfloat16),
        (5120, torch.bfloat16),
        (8192, torch.float32),
    ):
        groups = -(-hidden * dtype.itemsize // 2048)
        rooms = {name: Room(name, world, MULTIPROCESSORS, world if shared else 1) for name in ("one_shot", "two_shot")}
        loaded = {
            (name, *variant)
            for name, most in schedule.largest_launches(architecture, world, dtype, hidden, settings, sums=sums).items()
            for variant in schedule.variants_needed(rooms[name], most, groups, "early")
        }
        assert len(loaded) <= 12, "each takes seconds to compile"
        seen = set()
        for rows in range(1, ROWS + 1):
            chosen = select(
                architecture,
                world,
                dtype,
                hidden,
                rows,
                override=settings.algorithm,
                batch_invariant=settings.batch_invariant,
                sums=sums,
            )
            if chosen.algorithm == "library":
                continue
            for n in {min(rows, chosen.rows_per_launch), rows % chosen.rows_per_launch or chosen.rows_per_launch}:
                if (chosen.algorithm, n) in seen:
                    continue
                seen.add((chosen.algorithm, n))
                room = rooms[chosen.algorithm]
                needed = (chosen.algorithm, *schedule.variant_of(room, geometry(room, n, groups), "early"))
                assert needed in loaded, f"{rows} rows of {hidden}: {needed}"
