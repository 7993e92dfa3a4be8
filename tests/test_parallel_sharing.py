"""Sharing is judged by rank lists: not by a group's name, description or size."""

import pytest
import torch.distributed as dist
from ranks import RankPool
from test_parallel_agreement import reports_of

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def pool():
    with RankPool(4) as pool:
        yield pool


def pairs(first, second, rank, description=None):
    """This rank's group out of each list of pairs; every rank creates all of them."""
    mine = []
    for lists in (first, second):
        groups = {tuple(ranks): dist.new_group(list(ranks), group_desc=description) for ranks in lists}
        mine.append(next(group for ranks, group in groups.items() if rank in ranks))
    return mine


def audit(attention, mlp):
    (report,) = reports_of(attention, mlp)
    (layer,) = report.layers
    return layer.attention, layer.mlp, layer.shared, [site.fused for site in report.sites]


def same_size_other_ranks(rank, world_size):
    return audit(*pairs([(0, 1), (2, 3)], [(0, 2), (1, 3)], rank, description="tp"))


def test_two_groups_of_one_size_and_one_description_are_not_shared(pool):
    assert pool.run(same_size_other_ranks) == [
        ((0, 1), (0, 2), False, [False, False]),
        ((0, 1), (1, 3), False, [False, False]),
        ((2, 3), (0, 2), False, [False, False]),
        ((2, 3), (1, 3), False, [False, False]),
    ]


def other_name_same_ranks(rank, world_size):
    attention, mlp = pairs([(0, 1), (2, 3)], [(0, 1), (2, 3)], rank)
    return attention.group_name != mlp.group_name, audit(attention, mlp)


def test_groups_named_otherwise_with_the_same_ranks_are_shared(pool):
    for rank, (different_names, result) in enumerate(pool.run(other_name_same_ranks)):
        pair = (0, 1) if rank < 2 else (2, 3)
        assert different_names
        assert result == (pair, pair, True, [True, True])


def name_used_again(rank, world_size, folder):
    """The same group names before and after the default group is made anew, with other ranks behind them."""
    results = []
    for number, second in enumerate(([(0, 1), (2, 3)], [(0, 2), (1, 3)])):
        if number:
            dist.destroy_process_group()
            store = dist.FileStore(f"{folder}/store", world_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        first = [(0, 1), (2, 3)]
        attention, mlp = pairs(first, second, rank)
        results.append(((attention.group_name, mlp.group_name), audit(attention, mlp)))
    return results


def test_a_name_that_now_means_other_ranks_is_judged_by_its_ranks(tmp_path):
    with RankPool(4) as pool:
        for rank, (before, after) in enumerate(pool.run(name_used_again, str(tmp_path))):
            pair = (0, 1) if rank < 2 else (2, 3)
            cross = (0, 2) if rank % 2 == 0 else (1, 3)
            assert before == (before[0], (pair, pair, True, [True, True]))
            assert after[1] == (pair, cross, False, [False, False])
            if rank in (0, 3):
                assert before[0] == after[0]
