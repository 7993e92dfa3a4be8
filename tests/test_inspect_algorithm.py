"""What explain says of a number of rows is what the op's schedules do with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from browser.sample import report

from tpfuse.inspect import estimate
from tpfuse.inspect.algorithm import algorithm_of

H = 4096
MIB = (1 << 20) // (2 * H)  # so many rows in bf16
EIGHT = tuple(range(8))
SITE = replace(report(layers=1).sites[0], shape=(1, H), dtype="bfloat16", lowered=False)
REPLICAS = replace(SITE, pattern="all_reduce+add+rms_norm+all_gather")


def of_replicas(size: int, world: int):
    return replace(REPLICAS, group=EIGHT[:size], over=EIGHT[:world])


@pytest.mark.parametrize(
    ("site", "below", "limit", "above"),
    [
        (of_replicas(2, 4), "gathered_blocks", 16 * MIB, "one_shot+all_gather"),  # between two ranks at every size
        (of_replicas(2, 8), "gathered_blocks", 16 * MIB * 3 // 7, "one_shot+all_gather"),
        (of_replicas(4, 8), "gathered_blocks", 16 * MIB // 7, "two_shot+all_gather"),  # three copies of each row
        (replace(SITE, group=EIGHT[:4]), "two_shot", 16 * MIB, "library"),
        (replace(SITE, group=EIGHT[:4], pattern="reduce_scatter+add+rms_norm"), "one_shot", 12 * MIB, "library"),
        (
            replace(SITE, group=EIGHT[:4], pattern="reduce_scatter+add+rms_norm+all_gather"),
            *("gathered_rows", 16 * MIB, "library+all_gather"),
        ),
        (
            replace(SITE, group=EIGHT, pattern="reduce_scatter+add+rms_norm+all_gather"),
            *("gathered_rows", 16 * MIB * 3 // 7, "one_shot+all_gather"),
        ),
        # Of all blocks together: 72 KiB is 9 rows, seven times that for two receivers.
        (replace(SITE, group=EIGHT, pattern="all_reduce+rows/4+add+rms_norm"), "one_shot", 63 // 4, "two_shot"),
        (replace(SITE, group=EIGHT, pattern="all_reduce+rows/4+add+rms_norm"), "two_shot", 16 * MIB, "library"),
    ],
)
def test_algorithms_change_where_the_op_changes_them(site, below, limit, above):
    assert [algorithm_of(site, rows, "sm_90") for rows in (limit, limit + 1)] == [below, above]


def test_a_gather_outside_of_the_op_saves_nothing():
    site = of_replicas(4, 8)
    inside, behind, none = (
        estimate.saving(site, 32, path) for path in ("gathered_blocks", "two_shot+all_gather", "library+all_gather")
    )
    assert (inside.launches, behind.launches, none.launches) == (2, 1, 0)
    assert (inside.bytes, behind.bytes, none.bytes) == (32 * 4 * H * 2, 32 * 2 * H * 2, 0)


def test_links_and_worlds_without_kernels_take_the_library():
    assert algorithm_of(of_replicas(4, 8), 1, "sm_90-partial-nvlink") == "library+all_gather"
    assert algorithm_of(replace(SITE, group=tuple(range(9))), 1, "sm_90") == "library"


def test_over_more_ranks_than_the_kernels_take_those_of_a_replica_sum_and_the_library_gathers():
    site = replace(REPLICAS, group=EIGHT, over=tuple(range(16)))
    assert algorithm_of(site, 32, "sm_90") == "two_shot+all_gather"
    assert estimate.saving(site, 32).launches == estimate.saving(site, 32, "two_shot+all_gather").launches == 1
