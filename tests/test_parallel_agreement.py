"""check_agreement: the rank that differs is named on every rank, and a rank that does not come hangs nobody."""

import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import nn

import tpfuse
from tpfuse.parallel import AgreementError, ParallelConfig, build_groups, check_agreement

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def pool():
    with RankPool(4) as pool:
        yield pool


class Block(nn.Module):
    """Attention and MLP of one layer as far as the pass sees them: two sums, each with residual add and norm."""

    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(8, eps=1e-6), nn.RMSNorm(8, eps=1e-6)

    def forward(self, x, groups):
        attention = self.self_attn(x)
        dist.all_reduce(attention, group=groups[0])
        x = x + attention
        y = self.mlp(self.norm1(x))
        dist.all_reduce(y, group=groups[1])
        return self.norm2(x + y)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block()])

    def forward(self, x, groups):
        for layer in self.layers:
            x = layer(x, groups)
        return x


def reports_of(attention, mlp):
    torch._dynamo.reset()
    tpfuse.clear_reports()
    torch.manual_seed(0)
    options = {"tpfuse.inner": "aot_eager"}
    with torch.no_grad():
        torch.compile(Stack(), backend="tpfuse", options=options, fullgraph=True)(torch.ones(3, 8), (attention, mlp))
    return tpfuse.reports()


def outcome(*args, **kwargs):
    start = time.monotonic()
    try:
        return check_agreement(*args, **kwargs), (), time.monotonic() - start
    except AgreementError as error:
        return str(error), error.ranks, time.monotonic() - start


def agree(rank, world_size):
    pair = build_groups(ParallelConfig(4, 2, 1, 2)).group("attn_tp")
    reports = reports_of(pair, pair)
    return outcome(reports, pair), outcome(reports), [site.fused for site in reports[0].sites]


def test_ranks_that_agree(pool):
    # Over all four ranks too: the two pairs reduce over different ranks, but each pair over its own.
    for pair, everyone, fused in pool.run(agree):
        assert pair[0] == everyone[0] == 2
        assert fused == [True, True]


def one_other_decision(rank, world_size, odd):
    """As of policy="off" on one rank. Compiled that way the compile itself fails: see test_agreement_of_ranks.py."""
    reports = reports_of(dist.group.WORLD, dist.group.WORLD)
    if rank == odd:
        kept = [replace(site, fused=False, reason="policy") for site in reports[0].sites]
        reports = [replace(reports[0], sites=kept)]
    return outcome(reports, timeout=300)


def test_a_rank_with_another_decision_is_named_on_every_rank(pool):
    for message, ranks, seconds in pool.run(one_other_decision, 2):
        assert ranks == (2,)
        assert message.startswith(
            "rank 2 decided differently from ranks 0, 1, 3. All-reduce 0 on rank 0: attention of layer 0"
        )
        assert (
            "fused over [0, 1, 2, 3]; on rank 2: attention of layer 0: all_reduce+add+rms_norm kept (policy)" in message
        )
        assert seconds < 300


def one_other_quantizer(rank, world_size, odd):
    """As of an operator that one rank registered with another quantizer."""
    reports = reports_of(dist.group.WORLD, dist.group.WORLD)
    mine = "B" if rank == odd else "A"
    reports = [replace(reports[0], sites=[replace(site, quantizer=mine) for site in reports[0].sites])]
    return outcome(reports, timeout=300)


def test_a_rank_that_quantizes_in_another_way_is_named(pool):
    for _, ranks, _ in pool.run(one_other_quantizer, 1):
        assert ranks == (1,)


def wrong_group(rank, world_size):
    """Rank 3 believes that its MLP reduces over [1, 3]; everybody else that theirs reduces over their pair."""
    pair = build_groups(ParallelConfig(4, 2, 1, 2)).group("attn_tp")
    reports = reports_of(pair, pair)
    if rank == 3:
        first, second = reports[0].sites
        reports = [replace(reports[0], sites=[first, replace(second, group=(1, 3))])]
    return outcome(reports, timeout=300)


def test_ranks_that_reduce_together_must_name_the_same_ranks(pool):
    for message, ranks, _ in pool.run(wrong_group):
        assert 3 in ranks
        assert "reduce all-reduce 1 over different ranks" in message


def one_absent(rank, world_size):
    if rank == 1:
        return None
    return outcome([], timeout=2)


def test_a_rank_that_does_not_call_is_named_after_the_timeout(pool):
    for rank, result in enumerate(pool.run(one_absent)):
        if rank != 1:
            message, ranks, seconds = result
            assert ranks == (1,)
            assert message.startswith(
                "no decisions from rank 1 of [0, 1, 2, 3] within 2 s; every rank of the group must call"
            )
            assert seconds < 200


def test_without_a_process_group():
    if dist.is_initialized():  # a fake one of another file's
        dist.destroy_process_group()
    with pytest.raises(ValueError, match="check_agreement needs a process group"):
        check_agreement([])
