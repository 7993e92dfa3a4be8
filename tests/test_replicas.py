"""All-gathers over attention replicas behind a norm: in the fused op where rank lists prove the layout, else outside with why.

Traced on one rank of a fake group of four, two replicas of two. What depends on the number of this replica's rows must decide
nothing, so most cases are asked of a replica that is the largest and of one that is filled up.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from test_rows import H, c10d, fused, gather, graphs, norm, random

GATHER = torch.ops.tpfuse.all_reduce_add_rms_norm_gather.default
LARGEST = 5
PATTERN = "all_reduce+add+rms_norm+all_gather"


class Groups:
    def __init__(self):
        rank = dist.get_rank()
        blocks, columns = ([dist.new_group(ranks) for ranks in lists] for lists in (([0, 1], [2, 3]), ([0, 2], [1, 3])))
        self.world, self.block, self.column = (
            graphs.world(), blocks[rank // 2].group_name, columns[rank % 2].group_name,
        )  # fmt: skip


@pytest.fixture(params=[0, 3])
def groups(request):
    graphs.start_fake_group(4, request.param)
    yield Groups()
    dist.destroy_process_group()


def filled(y, largest=LARGEST, value=0.0):
    flat = y.reshape(-1, y.shape[-1])
    return torch.nn.functional.pad(flat, (0, 0, 0, largest - flat.shape[0]), value=value).contiguous()


def experts(rows, e, group):
    """What makes the rank lists of the replicas known: the sum behind the experts."""
    return graphs.all_reduce(torch.nn.functional.silu(rows @ e), group=group)


def layer(groups, fill=filled, world=None, normed=norm, column=None):
    def f(x, r, w, e):
        h = r + graphs.all_reduce(x, group=groups.block)
        y = gather(fill(normed(h, w)), column or groups.column)
        return experts(y, e, world or groups.world), h

    return f


def args(rows, dtype=torch.bfloat16):
    x, r = random(1, rows, H, dtype=dtype), random(1, rows, H, seed=1, dtype=dtype)
    return x, r, random(H, seed=2, dtype=dtype), random(H, H, seed=3, dtype=dtype)


def first(report):
    return next(site for site in report.sites if len(site.group) == 2)


def inside(f, groups, *given, pattern=PATTERN, dynamic=(), target=GATHER):
    new, report = fused(f, *given, dynamic=dynamic)
    site = first(report)
    assert (site.fused, site.pattern, site.note, site.over) == (True, pattern, "", (0, 1, 2, 3)), site
    assert "it replaces all_gather_into_tensor" in site.detail
    (node,) = [n for n in new.graph.nodes if n.target is target]
    assert node.args[-4:-1] == (groups.world, groups.block, groups.column)
    assert not any("all_gather" in str(n.target) for n in new.graph.nodes) and graphs.all_reduces_left(new) == 1
    new.graph.lint()
    return new, report, node


def outside(f, *given, why):
    new, report = fused(f, *given)
    site = first(report)
    assert site.fused and not site.pattern.endswith("all_gather") and site.over == (), site
    assert graphs.count(new, GATHER) == 0 and any("all_gather_into" in str(n.target) for n in new.graph.nodes)
    assert why in site.note and "stays outside" in site.note, site.note
    return new, site


@pytest.mark.parametrize("rows", [LARGEST, 3, 0])
def test_the_rows_of_all_replicas(groups, rows):
    """As many rows as the largest replica, fewer, and none: one decision."""
    *_, node = inside(layer(groups), groups, *args(rows))
    assert node.args[-1] == LARGEST


def test_the_largest_replica_need_not_show_that_others_are_filled_up(groups):
    inside(layer(groups, fill=lambda y: y.view(LARGEST, H)), groups, *args(LARGEST))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_a_bias_and_a_residual_in_another_shape(groups, dtype):
    def f(x, r, w, e):
        h = r.view(1, 3, H) + (graphs.all_reduce(x, group=groups.block) + w)
        return experts(gather(filled(norm(h, w)), groups.column), e, groups.world), h

    x, r, w, e = args(3, dtype)
    inside(f, groups, x, r.view(3, H), w, e, pattern="all_reduce+bias+add+rms_norm+all_gather")


@pytest.mark.parametrize("rows", [LARGEST, 3, 0])
def test_a_layer_norm_with_an_addend_behind_a_vector(groups, rows):
    def f(x, r, w, e):
        h = r + ((graphs.all_reduce(x, group=groups.block) + w) + r * 2)
        y = torch.nn.functional.layer_norm(h, (H,), w, w, 1e-6)
        return experts(gather(filled(y), groups.column), e, groups.world), h

    target = torch.ops.tpfuse.all_reduce_add_layer_norm_gather.default
    pattern = "all_reduce+bias+add+add+layer_norm+all_gather"
    *_, node = inside(f, groups, *args(rows), pattern=pattern, target=target)
    assert node.args[-1] == LARGEST


@pytest.mark.parametrize("rows", [3, 5])
def test_symbolic_rows(groups, rows):
    """The number of rows of the largest replica is a symbol of its own, also where this replica is the largest."""

    def f(x, r, w, e, like):
        if x.shape[1] > like.shape[1]:
            raise ValueError("more rows than the largest replica")
        h = r + graphs.all_reduce(x, group=groups.block)
        y = gather(filled(norm(h, w), like.shape[1]), groups.column)
        return experts(y, e, groups.world) * y.shape[0], h

    _, _, node = inside(f, groups, *args(rows), torch.empty(1, LARGEST, 1), dynamic=(1,))
    assert isinstance(node.args[-1].meta["val"], torch.SymInt)


def test_a_number_of_missing_rows_that_is_given(groups):
    """Then no node holds the rows of the largest replica. Its own graph has no such number, and decides alike."""

    def f(x, r, w, e, missing):
        h = r + graphs.all_reduce(x, group=groups.block)
        rows = norm(h, w).reshape(-1, H)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing.shape[1])).contiguous()
        return experts(gather(rows, groups.column), e, groups.world), h

    *_, node = inside(f, groups, *args(3), torch.empty(1, 2, 1), dynamic=(1,))
    assert node.args[-1].meta["val"].node.hint == LARGEST
    *_, node = inside(f, groups, *args(3), torch.empty(1, 2, 1))
    assert node.args[-1] == LARGEST


@pytest.mark.parametrize("rows", [1, 0])
def test_a_slice_that_takes_all_rows_of_this_replica_alone(groups, rows):
    """The last row of each replica: of this one all, so that sum and norm fuse. With more rows they do not."""
    outside(layer(groups, normed=lambda h, w: norm(h[:, -1:], w)), *args(rows), why="takes some of the rows")
    inside(layer(groups, normed=lambda h, w: norm(h[:, :], w)), groups, *args(rows))


@pytest.mark.parametrize("length", [4, 3])
def test_several_parts_that_are_filled_up_each(groups, length):
    """The replica with the longest parts shows no sign of that: the shape that is gathered, equal on all, decides."""

    def fill(y):
        return torch.nn.functional.pad(y, (0, 0, 0, 4 - length)) if length < 4 else y

    def of(parts):
        x, r = (random(parts, length, H, seed=n, dtype=torch.bfloat16) for n in (0, 1))
        return layer(groups, fill=fill), (x, r, *args(1)[2:])

    f, given = of(2)
    outside(f, *given, why="several parts")
    f, given = of(1)
    *_, node = inside(f, groups, *given)  # one part: rows, verified in its three dimensions
    assert node.args[-1] == 4


def test_symbolic_rows_that_are_equal_on_all_replicas(groups):
    _, _, node = inside(layer(groups, fill=lambda y: y.reshape(-1, H)), groups, *args(3), dynamic=(1,))
    assert isinstance(node.args[-1], torch.fx.Node)


@pytest.mark.parametrize("rows", [3, 5, 7])
def test_rows_that_the_model_does_not_bound(groups, rows):
    """A guard bounds them: with more rows than the largest replica has, the model would leave rows out, and the op raises."""

    def f(x, r, w, e, like):
        h = r + graphs.all_reduce(x, group=groups.block)
        return experts(gather(filled(norm(h, w), like.shape[1]), groups.column), e, groups.world), h

    if rows > 6:
        gm = graphs.trace(f, (*args(rows), torch.empty(1, 6, 1)), dynamic=(1,))
        _, report = graphs.fused_copy(gm)
        assert first(report).fused and "not proved to keep all rows" in first(report).note
    else:
        inside(f, groups, *args(rows), torch.empty(1, 6, 1), dynamic=(1,))


@pytest.mark.parametrize("rows", [LARGEST, 3])
def test_what_reads_the_own_rows_keeps_the_gather_outside(groups, rows):
    def router(x, r, w, e):
        h = r + graphs.all_reduce(x, group=groups.block)
        y = norm(h, w)
        return experts(gather(filled(y), groups.column), e, groups.world), y @ e, h

    def filled_rows(x, r, w, e):
        h = r + graphs.all_reduce(x, group=groups.block)
        y = filled(norm(h, w))
        return experts(gather(y, groups.column), e, groups.world), y.relu(), h

    def twice(x, r, w, e):
        h = r + graphs.all_reduce(x, group=groups.block)
        y = filled(norm(h, w))
        return experts(gather(y, groups.column) + gather(y, groups.column), e, groups.world), h

    for f in (router, filled_rows, twice):
        outside(f, *args(rows), why="reads the own rows of the norm as well")


def test_ranks_that_no_other_reduction_of_the_graph_has(groups):
    def f(x, r, w, e):
        h = r + graphs.all_reduce(x, group=groups.block)
        return gather(filled(norm(h, w)), groups.column) @ e, h

    outside(f, *args(3), why="no reduction of the graph says that these are replicas")


def test_a_gather_over_the_ranks_of_the_sum_or_over_all_of_them(groups):
    for column, size in ((groups.block, 2), (groups.world, 4)):

        def f(x, r, w, e, column=column, size=size):
            h = r + graphs.all_reduce(x, group=groups.block)
            return experts(gather(filled(norm(h, w)), column, size), e, groups.world), h

        outside(f, *args(3), why="no reduction of the graph says")


def test_blocks_in_another_order(groups):
    turned = dist.new_group([0, 1, 2, 3], use_local_synchronization=False)
    dist.distributed_c10d._world.pg_group_ranks[turned] = {
        0: 0,
        2: 1,
        1: 2,
        3: 3,
    }  # torch sorts the ranks of a new group
    outside(layer(groups, world=turned.group_name), *args(3), why="no reduction of the graph says")


@pytest.mark.parametrize("rows", [LARGEST, 3])
@pytest.mark.parametrize(
    ("fill", "why"),
    [
        (lambda y: filled(y, value=1.0), "not with zeros"),
        (lambda y: filled(y, value=-0.0), "not with zeros"),
        (lambda y: torch.nn.functional.pad(y.view(-1, H), (0, 0, LARGEST - y.shape[1], 0)), "not with rows at the end"),
    ],
)
def test_rows_that_are_filled_up_otherwise(groups, rows, fill, why):
    if rows == LARGEST and "end" in why:
        pytest.skip("nothing is filled up, on either side")
    outside(layer(groups, fill=fill), *args(rows), why=why)


@pytest.mark.parametrize("rows", [LARGEST, 3])
def test_sums_that_the_op_lacks(groups, rows):
    def scaled(x, r, w, e):
        h = r + graphs.all_reduce(x, group=groups.block) * w[0]
        return experts(gather(filled(norm(h, w)), groups.column), e, groups.world), h

    outside(scaled, *args(rows), why="multiplied by a tensor")

    def wide(x, r, w, e):
        h = r + graphs.all_reduce(x, group=groups.block).float()
        y = w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return experts(gather(filled(y), groups.column), e, groups.world), h

    x, r, w, e = args(rows)
    outside(wide, x, r.float(), w, e, why="expected the dtype of x")


def test_what_communicates_in_between(groups):
    both = [dist.new_group(ranks) for ranks in ([0, 3], [1, 2])]
    other = both[0].group_name

    def f(x, r, w, e, z):
        h = r + graphs.all_reduce(x, group=groups.block)
        y = norm(h, w)
        noise = c10d.wait_tensor(c10d.all_reduce(z, "max", other))
        return experts(gather(filled(y), groups.column), e, groups.world), h, noise

    outside(f, *args(3), random(3), why="communicates between the all-reduce and the gather")


def test_the_verifier_sees_a_wrong_number_of_rows(groups):
    from dataclasses import replace
    from unittest.mock import patch

    from tpfuse.passes import fused_call, fusion

    def wrong(candidate):
        if not candidate.over:
            return fused_call.build(candidate)
        other = next(n for n in candidate.norm.out.graph.nodes if n.name.startswith("arg4"))
        return fused_call.build(replace(candidate, norm=replace(candidate.norm, weight=other)))

    def f(x, r, w, e, v):
        h = r + graphs.all_reduce(x, group=groups.block)
        return experts(gather(filled(norm(h, w)), groups.column), e, groups.world), h * v

    with patch.object(fusion, "build", wrong), pytest.raises(fusion.VerificationError, match="normed differs"):
        fused(f, *args(3), random(H, seed=5))


def test_the_report_keeps_the_ranks_of_the_op(groups):
    from tpfuse.passes import GraphReport

    _, report, _ = inside(layer(groups), groups, *args(3))
    again = GraphReport.from_json(report.to_json())
    assert again.sites == report.sites
    data = report.to_dict()
    for site in data["sites"]:
        del site["over"]  # of a version before
    assert first(GraphReport.from_dict(data)).over == ()


def test_a_compile_cache_tells_replicas_from_places_in_them():
    """Groups of equal sizes, once those of a replica and once those of a place, prove different things about one graph."""
    from tpfuse.inner.inductor import group_shapes

    found = {}
    for rank in (0, 3):
        for name, lists in {"replica": ([0, 1], [2, 3]), "place": ([0, 2], [1, 3])}.items():
            graphs.start_fake_group(4, rank)
            for ranks in lists:
                dist.new_group(ranks)
            found.setdefault(name, set()).add(str(group_shapes()))
            dist.destroy_process_group()
    assert all(len(shapes) == 1 for shapes in found.values())  # the same on every rank
    assert found["replica"] != found["place"]
