"""All-gathers behind the norm of own rows: in the fused op where ranks and rows are proved, else outside with a sentence why.

Traced on one rank of a fake group of four; ``tests/referee/test_sequence_parallel.py`` runs whole models on real ranks.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from test_rows import H, c10d, fused, gather, graphs, norm, random, scatter

W = 4
GATHER = torch.ops.tpfuse.reduce_rows_add_rms_norm_gather.default
ROWS = torch.ops.tpfuse.reduce_rows_add_rms_norm.default


@pytest.fixture(autouse=True)
def world():
    graphs.start_fake_group(W, 2)
    yield graphs.world()
    dist.destroy_process_group()


def args(rows=2, dtype=torch.bfloat16):
    return random(W * rows, H, dtype=dtype), random(rows, H, seed=1, dtype=dtype), random(H, seed=2, dtype=dtype)


def names(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def inside(f, *given, pattern="reduce_scatter+add+rms_norm+all_gather", dynamic=()):
    """One site, fused with its gather, and nothing of the reduction or the gather left."""
    new, report = fused(f, *given, dynamic=dynamic)
    (site,) = report.sites
    assert (site.fused, site.pattern, site.note) == (True, pattern, ""), site
    assert graphs.count(new, GATHER) == 1 and graphs.count(new, ROWS) == 0
    assert not any("_c10d_functional" in name for name in names(new)), names(new)
    assert any("all_gather" in name for name in site.nodes)
    new.graph.lint()
    return new, site


def outside(f, *given, why):
    """One site, fused without its gather, and a note that says why."""
    new, report = fused(f, *given)
    (site,) = report.sites
    assert site.fused and not site.pattern.endswith("all_gather"), site
    assert graphs.count(new, GATHER) == 0 and any("all_gather" in name for name in names(new))
    assert why in site.note and "stays outside" in site.note and why in site.detail, site.note
    return new, site


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gather_over_the_same_ranks(world, dtype):
    def f(x, r, w):
        h = r + scatter(x, W)
        return gather(norm(h, w), world, W), h

    new, _ = inside(f, *args(dtype=dtype))
    (node,) = [n for n in new.graph.nodes if n.target is GATHER]
    assert node.args[-1] == "reduce_scatter"


def test_another_name_of_the_same_ranks_and_another_shape(world):
    again = dist.new_group(list(range(W))).group_name
    assert again != world

    def f(x, r, w):
        h = r + scatter(x, W)
        y = gather(norm(h.unsqueeze(0), w).view(2, 1, H), again, W)
        return y.view(1, 2 * W, H), h

    inside(f, *args())


def test_a_gather_along_the_sequence_of_a_batch(world):
    """DTensor's spelling: rows of each sequence are gathered along the first dimension, then split and put beside each other."""

    def f(x, r, w):
        parts = torch.cat(torch.chunk(x, W, dim=1))
        h = r + scatter(parts, W)
        y = gather(norm(h, w), world, W)
        return torch.cat(torch.chunk(y, W, dim=0), dim=1), h

    inside(f, random(3, 8, H), random(3, 2, H, seed=1), random(H, seed=2))


def test_several_gathers_of_one_norm(world):
    def f(x, r, w):
        h = r + scatter(x, W)
        y = norm(h, w)
        return gather(y, world, W) * 2, gather(y, world, W) + 1, h

    inside(f, *args())


def test_two_gathers_that_leave_the_graph_stay_two_tensors(world):
    """What calls the graph may write one of them in place."""

    def both(x, r, w):
        n = norm(r + scatter(x, W), w)
        return gather(n, world, W), gather(n, world, W).view(1, 4 * 2, H)

    outside(both, *args(), why="each in its own memory")

    def one(x, r, w):
        n = norm(r + scatter(x, W), w)
        return gather(n, world, W), gather(n, world, W) * 2

    inside(one, *args())


def test_without_residual_with_bias_and_a_symbolic_number_of_rows(world):
    def bias(x, w, b):
        y = scatter(x, W) + b
        return gather(norm(y, w), world, W), y

    def dynamic(x, r, w):
        h = r + scatter(x, W)
        return gather(norm(h, w), world, W), h

    inside(bias, random(8, H), random(H), random(H), pattern="reduce_scatter+bias+rms_norm+all_gather")
    _, site = inside(dynamic, random(8, 3, H), random(2, 3, H), random(H), dynamic=(1,))
    assert isinstance(site.shape[1], str | int)


@pytest.mark.parametrize("end", [6, 5])
def test_the_own_block_of_an_all_reduce_stays_with_its_gather_however_many_rows_it_has(world, end):
    """A rank with all rows of its block must decide as one with fewer, whose gather reads rows that fill the block up."""

    def f(y, r, w, e):
        h = r + graphs.all_reduce(gather(y, world, W) @ e)[4:end]
        return gather(norm(h, w), world, W), h

    given = random(2, H), random(end - 4, H, seed=1), random(H, seed=2), random(H, H, seed=3)
    _, site = outside(f, *given, why="another one may keep fewer")
    assert site.pattern == "all_reduce+rows/4+add+rms_norm"


@pytest.mark.parametrize("rows", [W, 2 * W])
def test_a_number_of_rows_stays_a_symbol(world, rows):
    """One row a rank is a constant of its graph, the rows of all ranks are not: nothing may make them one."""

    def f(x, w):
        h = scatter(x, W)
        return gather(norm(h, w), world, W) + 1, h * 1

    gm = graphs.trace(f, (random(rows, 3, H), random(H, seed=2)), dynamic=(0,))
    inputs = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    size = next(t.shape[0] for t in inputs if isinstance(t, torch.Tensor) and t.dim() == 3)
    _, report = graphs.fused_copy(gm)
    assert report.sites[0].fused and not size.node.shape_env.replacements
    assert "not proved to hold the rows" in report.sites[0].note


def test_a_gather_over_other_ranks_or_in_another_order_stays(world):
    pair = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][1].group_name
    turned = dist.new_group([1, 0, 3, 2], use_local_synchronization=False)
    # torch sorts the ranks of a new group; a mesh need not.
    dist.distributed_c10d._world.pg_group_ranks[turned] = {1: 0, 0: 1, 3: 2, 2: 3}

    def over(group, size):
        def f(x, r, w):
            h = r + scatter(x, W)
            return gather(norm(h, w), group, size), h

        return f

    outside(over(pair, 2), *args(), why="it is over [2, 3], the sum over [0, 1, 2, 3]")
    outside(over(turned.group_name, W), *args(), why="it is over [1, 0, 3, 2], the sum over [0, 1, 2, 3]")


def test_a_norm_whose_own_rows_are_read_stays_with_its_gather(world):
    """A router that reads the own rows; a norm that is returned."""

    def router(x, r, w):
        h = r + scatter(x, W)
        y = norm(h, w)
        return gather(y, world, W), y @ y.t(), h

    def returned(x, r, w):
        h = r + scatter(x, W)
        y = norm(h, w)
        return gather(y, world, W), y, h

    outside(router, *args(), why="reads the own rows of the norm as well")
    outside(returned, *args(), why="reads the own rows of the norm as well")


def test_a_gather_that_would_pass_another_collective_of_the_group_stays(world):
    def f(x, r, w, z):
        h = r + scatter(x, W)
        y = norm(h, w)
        other = c10d.wait_tensor(c10d.all_reduce(z, "max", world))
        return gather(y, world, W), h, other

    given = (*args(), random(3))
    gm = graphs.trace(f, given)
    new, report = graphs.fused_copy(gm)
    scattered = next(s for s in report.sites if s.pattern.startswith("reduce_scatter"))
    assert scattered.fused and "communicates on the same ranks" in scattered.note, scattered
    assert graphs.count(new, GATHER) == 0 and graphs.count(new, ROWS) == 1


def test_the_verifier_sees_a_wrong_weight_behind_a_gather(world):
    """The check of a rewrite with a gather can fail."""
    from dataclasses import replace
    from unittest.mock import patch

    from tpfuse.passes import fused_call, fusion

    def f(x, r, w, v):
        h = r + scatter(x, W)
        return gather(norm(h, w), world, W), h * v

    def wrong(candidate):
        other = next(n for n in candidate.norm.out.graph.nodes if n.name.startswith("arg3"))
        return fused_call.build(replace(candidate, norm=replace(candidate.norm, weight=other)))

    given = (*args(), random(H, seed=5))
    with patch.object(fusion, "build", wrong), pytest.raises(fusion.VerificationError, match="normed differs"):
        fused(f, *given)


def test_ops_that_gather_refuse_an_fp32_residual_beside_16_bits(world):
    """What a GPU prepared for a residual of the dtype of ``x`` would read its bytes as that dtype."""
    from tpfuse.ops import VLLM, all_reduce_add_rms_norm_gather, reduce_rows_add_rms_norm_gather

    x, r, w = args()
    block, across = dist.new_group([2, 3]), dist.new_group([0, 2])
    groups = {"group": world, "block_group": block, "gather_group": across}
    says = "_gather: residual is torch.float32 .* expected the dtype of x, torch.bfloat16"
    with torch.no_grad():
        with pytest.raises(ValueError, match=says):
            all_reduce_add_rms_norm_gather(x[:2], r.float(), w, largest=2, flavour=VLLM, **groups)
        with pytest.raises(ValueError, match=says):
            reduce_rows_add_rms_norm_gather(x, r.float(), w, group=world, flavour=VLLM)
