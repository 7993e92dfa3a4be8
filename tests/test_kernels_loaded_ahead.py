"""No call compiles or loads a kernel while its peers wait: all that any number of rows needs is loaded at the first call."""

from __future__ import annotations

import pytest
import torch
from tpfuse.ops import dispatch
from tpfuse.ops.launch import Room, geometry
from tpfuse.ops.plane import Settings
from tpfuse.ops.select import select

ROWS = 8192
MULTIPROCESSORS = 132


@pytest.mark.parametrize("shared", [False, True], ids=["own GPUs", "one GPU"])
@pytest.mark.parametrize("world", range(2, 9))
def test_every_row_count_uses_only_kernels_that_were_loaded(world, shared):
    settings = Settings()
    architecture = "sm_90-shared" if shared else "sm_90"
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
            for name, most in dispatch.largest_launches(architecture, world, dtype, hidden, settings).items()
            for variant in dispatch.variants_needed(rooms[name], most, groups, "early")
        }
        assert len(loaded) <= 12, "each takes seconds to compile"
        seen = set()
        for rows in range(1, ROWS + 1):
            chosen = select(architecture, world, dtype, hidden, rows)
            if chosen.algorithm == "library":
                continue
            for n in {min(rows, chosen.rows_per_launch), rows % chosen.rows_per_launch or chosen.rows_per_launch}:
                if (chosen.algorithm, n) in seen:
                    continue
                seen.add((chosen.algorithm, n))
                room = rooms[chosen.algorithm]
                needed = (chosen.algorithm, *dispatch.variant_of(room, geometry(room, n, groups), "early"))
                assert needed in loaded, f"{rows} rows of {hidden}: {needed}"
