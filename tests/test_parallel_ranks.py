"""The helper that starts ranks: results in order, a rank's own exception, a hang that names who hung."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailure, RankPool, run_ranks

pytestmark = pytest.mark.ranks


def summed(rank, world_size, x):
    value = torch.tensor([x + rank])
    dist.all_reduce(value)
    return value.item(), os.environ.get("RANKS_TEST")


def fail_on_one(rank, world_size):
    if rank == 1:
        raise ValueError("no such layer")
    dist.barrier()


def hang_on_one(rank, world_size):
    if rank == 1:
        time.sleep(60)
    return rank


def test_results_come_back_in_rank_order_and_env_reaches_the_ranks():
    assert run_ranks(summed, 2, 1.0, env={"RANKS_TEST": "yes"}) == [(3.0, "yes")] * 2


def test_a_failure_or_a_hang_is_named_and_the_pool_recovers():
    with RankPool(2) as pool:
        assert pool.run(summed, 1.0) == [(3.0, None)] * 2
        with pytest.raises(ValueError, match="no such layer") as raised:
            pool.run(fail_on_one)
        assert isinstance(raised.value.__cause__, RankFailure)
        assert "fail_on_one" in str(raised.value.__cause__)
        with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 had not finished"):
            pool.run(hang_on_one, timeout=8)
        assert pool.run(summed, 2.0) == [(5.0, None)] * 2
