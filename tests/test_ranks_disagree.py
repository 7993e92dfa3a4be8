"""Ranks that decide differently about a graph leave it as it was, all of them, and it runs with the bits of eager."""

from __future__ import annotations

import warnings

import pytest
import torch
from ranks import RankPool

pytestmark = pytest.mark.ranks
H = 16


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


def norm(h):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


def total(x, group):
    c10d = torch.ops._c10d_functional
    return c10d.wait_tensor(c10d.all_reduce(x, "sum", group))


def first_block(group, columns=H):
    """Every rank keeps the first half of the rows of the sum: on rank 0 that is proved to be its own block, on rank 1 it is not."""
    c10d = torch.ops._c10d_functional

    def step(x, residual):
        everyone = c10d.wait_tensor(c10d.all_gather_into_tensor(x, 2, group))
        rows = total(everyone.sigmoid(), group)[0 : x.shape[0]]
        return norm(rows + residual)

    return step


@torch.no_grad()
def ran(step, calls, options=None, **how):
    """(equal to eager in all calls?, (fused, reason) of each site of each graph, the warnings of tpfuse)."""
    import tpfuse
    from tpfuse import unfused

    torch._dynamo.reset()
    tpfuse.clear_reports()
    unfused.forget()
    options = {"tpfuse.inner": "aot_eager", **(options or {})}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        compiled = torch.compile(step, backend="tpfuse", options=options, fullgraph=True, **how)
        same = [torch.equal(compiled(*call), step(*call)) for call in calls]
    sites = [[(site.fused, site.reason) for site in report.sites] for report in tpfuse.reports()]
    return all(same), sites, [str(w.message) for w in told if "tpfuse" in str(w.message)]


def group_of_all():
    import torch.distributed as dist

    return dist.group.WORLD.group_name


def inputs(rank, rows, width=H):
    torch.manual_seed(rank)
    return torch.randn(rows, width), torch.randn(rows, width)


def blocks(rank, world_size, rows, width, inner):
    return ran(first_block(group_of_all()), [inputs(rank, n, width) for n in rows], {"tpfuse.inner": inner})


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_code_that_only_one_rank_can_prove_runs_as_it_was(pool, inner):
    for same, sites, told in pool.run(blocks, (4,), {"aot_eager": 16, "inductor": 24}[inner], inner):
        assert same
        assert sites == [[(False, "ranks-disagree")]]
        (only,) = told
        assert "rank 1 decided differently from rank 0 about one graph: All-reduce 0 on rank 0" in only
        assert "fused over [0, 1]; on rank 1: " in only and "kept (rows-move)" in only
