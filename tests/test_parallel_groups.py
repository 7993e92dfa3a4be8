"""Process groups: one object for each rank list, on a subset of the ranks and with pipeline stages, made by all ranks alike."""

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool

from tpfuse.parallel import ConfigError, ParallelConfig, build_groups
from tpfuse.parallel.groups import small_tensor_device

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def pool():
    with RankPool(4) as pool:
        yield pool


def aliases(rank, world_size):
    groups = build_groups(ParallelConfig(4, 2, 1, 2))
    again = build_groups(ParallelConfig(4, 2, 1, 2))
    other = build_groups(ParallelConfig(4, 2, 1, 4))
    return (
        groups is again,
        groups.group("attn_tp") is groups.group("dense_tp"),
        groups.group("tp") is groups.group("moe_tp") is dist.group.WORLD,
        other.group("attn_tp") is groups.group("attn_tp"),
        groups.group("pp") is None,
        groups.ranks_of("attn_tp"),
        groups.index_in("attn_dp"),
        len(groups.by_ranks),
    )


def test_equal_rank_lists_share_one_group(pool):
    for rank, (*same, attn_tp, dp_index, count) in enumerate(pool.run(aliases)):
        assert all(same)
        assert attn_tp == ((0, 1) if rank < 2 else (2, 3))
        assert dp_index == rank // 2
        assert count == 3  # tp, attn_tp and attn_dp


def subset(rank, world_size):
    groups = build_groups(ParallelConfig(2), ranks=(3, 1))
    if groups.rank is None:
        try:
            groups.group("tp")
        except ConfigError as error:
            return str(error)
        return None
    value = torch.tensor([float(rank)])
    dist.all_reduce(value, group=groups.group("tp"))
    return groups.rank, groups.ranks_of("tp"), value.item()


def test_a_subset_of_the_ranks_in_an_order_of_its_own(pool):
    zero, one, two, three = pool.run(subset)
    assert zero.startswith("global rank 0 is outside this deployment, which has the global ranks [3, 1]")
    assert "global rank 2" in two
    assert three == (0, (3, 1), 4.0)
    assert one == (1, (3, 1), 4.0)


def stages(rank, world_size):
    groups = build_groups(ParallelConfig(2, pp_size=2))
    value = torch.tensor([float(rank)])
    dist.all_reduce(value, group=groups.group("tp"))
    return groups.ranks_of("tp"), groups.ranks_of("pp"), value.item()


def test_pipeline_stages(pool):
    assert pool.run(stages) == [
        ((0, 1), (0, 2), 1.0),
        ((0, 1), (1, 3), 1.0),
        ((2, 3), (0, 2), 5.0),
        ((2, 3), (1, 3), 5.0),
    ]


def wrong_ranks(rank, world_size):
    messages = []
    for config, ranks in ((ParallelConfig(8), None), (ParallelConfig(2), (0, 1, 2)), (ParallelConfig(2), (1, 1))):
        with pytest.raises(ConfigError) as raised:
            build_groups(config, ranks)
        messages.append(str(raised.value))
    return messages


def test_ranks_that_do_not_fit_are_named(pool):
    too_many, wrong_count, twice = pool.run(wrong_ranks)[0]
    assert "[0, 1, 2, 3, 4, 5, 6, 7] must be distinct and below the default group's size 4" in too_many
    assert "3 ranks given for a config of 2" in wrong_count
    assert "[1, 1] must be distinct" in twice


def test_without_a_default_group():
    with pytest.raises(ConfigError, match="no default process group; call"):
        build_groups(ParallelConfig(2))


@pytest.mark.parametrize(
    ("backends", "device"),
    [
        ("cpu:gloo,cuda:gloo", "cpu"),
        ("cpu:gloo,cuda:nccl", "cpu"),
        ("cuda:nccl", "cuda:3"),
        # Both spellings of NCCL alone, as torch itself reads them.
        (str(dist.distributed_c10d.BackendConfig(dist.Backend("nccl"))), "cuda:3"),
    ],
)
def test_numbers_go_where_the_group_takes_them(monkeypatch, backends, device):
    """A group that was made as ``cuda:nccl`` was handed numbers on the CPU, which no backend of it takes."""
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert small_tensor_device(object()) == torch.device(device)
