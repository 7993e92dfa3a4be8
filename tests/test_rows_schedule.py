"""Which kernel rows with destinations take, and in launches of how many rows. Pure, so that ranks cannot disagree."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tpfuse.ops import gather_schedule, rows_schedule
from tpfuse.ops.flavour import LLAMA
from tpfuse.ops.kernels.variant import constants
from tpfuse.ops.select import TABLE, UNBOUNDED, entry, phase_bytes
from tpfuse.ops.settings import Settings

H, BF16 = 7168, torch.bfloat16


def plane(world: int, architecture: str = "sm_90") -> Any:
    phase = phase_bytes(entry(architecture, world))
    return SimpleNamespace(architecture=architecture, world=world, phase_bytes=phase)


def settings(**changes: Any) -> Any:
    return SimpleNamespace(**{"table": TABLE, "algorithm": "auto", "batch_invariant": False, **changes})


def limit(world: int, blocks: int, **changes: Any) -> int:
    return rows_schedule.one_shot_rows(plane(world), settings(**changes), H, BF16, blocks)


def sent(world: int, blocks: int, algorithm: str) -> float:
    """Bytes out of each rank by the rows' own arithmetic, as a part of those of x: pushes to owners and receivers."""
    receivers, out = world // blocks, 0
    for row in range(world * receivers):  # of each block; a multiple of the owners
        for block in range(blocks):
            of_block = range(block * receivers, (block + 1) * receivers)
            for rank in range(world):
                if algorithm == rows_schedule.ONE_SHOT:
                    out += sum(r != rank for r in of_block)
                else:
                    owner = of_block[row % receivers]
                    out += (owner != rank) + (owner == rank) * (receivers - 1)
    return out / world / (world * receivers * blocks)


@pytest.mark.parametrize("world", range(2, 9))
def test_two_shot_is_for_blocks_of_several_ranks_where_it_sends_less(world: int) -> None:
    for blocks in [n for n in range(2, world + 1) if world % n == 0]:
        receivers = world // blocks
        one, two = (sent(world, blocks, name) for name in (rows_schedule.ONE_SHOT, rows_schedule.TWO_SHOT))
        assert one == pytest.approx(receivers * (world - 1) / world)
        assert two == pytest.approx((world + receivers - 2) / world)
        if receivers == 1:
            assert one == two and limit(world, blocks) == UNBOUNDED
            continue
        # The all-reduce's two-shot pays for its second round at the table's bytes, with so much less to send:
        thresholds = entry("sm_90", world)
        saved = thresholds.one_shot_bytes * ((world - 1) - 2 * (world - 1) / world)
        rows = limit(world, blocks)
        assert rows * blocks * H * 2 * (one - two) <= saved < (rows + 1) * blocks * H * 2 * (one - two)


def test_forced_algorithms_and_batch_invariance() -> None:
    assert limit(8, 2, algorithm="one_shot") == UNBOUNDED
    assert limit(8, 2, algorithm="two_shot") == 0
    assert limit(8, 8, algorithm="two_shot") == UNBOUNDED  # two-shot would send no less
    assert rows_schedule.rows_taken(plane(8), settings(algorithm="library"), H, BF16, 2) == 0
    assert rows_schedule.rows_taken(plane(8), settings(batch_invariant=True), H, BF16, 2) == UNBOUNDED


@pytest.mark.parametrize("architecture", ["sm_90", "sm_90-shared", "sm_90-pcie"])
def test_the_slots_of_a_launch_fit_a_phase(architecture: str) -> None:
    for world in range(2, 9):
        p = plane(world, architecture)
        for blocks in [n for n in range(2, world + 1) if world % n == 0]:
            for hidden in (64, 7168, 16384):
                for algorithm in (rows_schedule.ONE_SHOT, rows_schedule.TWO_SHOT):
                    rows = rows_schedule.rows_of_a_launch(p, settings(), hidden, BF16, algorithm, blocks)
                    owned = -(-rows // (world // blocks)) * world
                    slots = rows * world if algorithm == rows_schedule.ONE_SHOT else owned + rows
                    assert rows >= 1 and slots * hidden * 2 <= p.phase_bytes


def test_the_settings_of_the_process_have_what_is_asked_of_them() -> None:
    assert {"table", "algorithm", "batch_invariant"} <= set(Settings.__dataclass_fields__)


def of_kind(hidden: int, weight: torch.dtype = BF16) -> Any:
    kind: Any = {"bias": "none", "scaled": False, "has_residual": True, "post_norm": False}
    return constants(BF16, weight, hidden, LLAMA, **kind)


@pytest.mark.parametrize("architecture", ["sm_90", "sm_90-shared", "sm_90-pcie"])
def test_both_slots_of_a_gathered_row_fit_a_phase(architecture: str) -> None:
    for world in range(2, 9):
        p = plane(world, architecture)
        for blocks in [n for n in range(2, world + 1) if world % n == 0]:
            givers = world if blocks == world else world // blocks
            for hidden in (64, 7168, 16384):
                for weight, normed_bytes in ((BF16, 2), (torch.float32, 4)):
                    rows = gather_schedule.rows_of_a_launch(p, settings(), of_kind(hidden, weight), blocks)
                    assert rows >= 1
                    assert rows * hidden * (2 * givers + normed_bytes * blocks) <= p.phase_bytes


def test_what_takes_the_kernel_where_rows_are_gathered() -> None:
    def taken(world: int, architecture: str = "sm_90", blocks: int = 0, **changes: Any) -> int:
        p = plane(world, architecture)
        return gather_schedule.most_rows(p, settings(**changes), of_kind(H), BF16, blocks or world)

    limit, row = gather_schedule.GATHERED_BYTES, 2 * H
    assert taken(4) == limit // row == taken(4, blocks=2)
    assert taken(2) == (64 << 20) // row  # as far as the all-reduce's kernels go
    assert taken(8) == taken(8, blocks=4) == limit * 3 // 7 // row  # to seven others instead of three
    assert taken(8, blocks=2) == limit * 3 // 7 // 3 // row  # four ranks a block: three copies
    assert taken(4, "sm_90-pcie") == (32 << 10) // (2 * H)
    assert taken(4, "sm_90-shared") == UNBOUNDED // (2 * H)
    assert taken(4, batch_invariant=True) == UNBOUNDED == taken(4, algorithm="one_shot")
    assert taken(4, algorithm="library") == 0 == taken(4, "sm_90-partial-nvlink")
    small = SimpleNamespace(**{**vars(plane(4)), "phase_bytes": 4 * H * 2})
    assert gather_schedule.most_rows(small, settings(), of_kind(H), BF16, 4) == 0  # no table promises a larger one
