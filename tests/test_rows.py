"""Sums of which a rank keeps some rows: reduce-scatters, and a slice behind an all-reduce whose rows a gather put together.

Traced on one rank of a fake group of four, which stands at place 2; ``parallel`` tests run such layers on real ranks.
"""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist
from tpfuse.passes import PassOptions

H = 16
RANK = 2
ROWS = torch.ops.tpfuse.reduce_rows_add_rms_norm.default
c10d = torch.ops._c10d_functional
VERIFY = PassOptions(verify=True)  # under the default policy


@pytest.fixture(autouse=True)
def column():
    """The group of a rank with its counterpart in the other replica: ranks 0 and 2, 1 and 3."""
    graphs.start_fake_group(4, RANK)
    columns = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    yield columns[0].group_name
    dist.destroy_process_group()


@pytest.fixture
def neighbors(column):
    return [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][1].group_name


def norm(h, w):
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


def gather(y, group, size=2):
    return c10d.wait_tensor(c10d.all_gather_into_tensor(y, size, group))


def scatter(x, size=4, group=None):
    return c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", size, group or graphs.world()))


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fused(f, *args, dynamic=()):
    gm = graphs.trace(f, args, dynamic)
    new, report = graphs.fused_copy(gm, VERIFY)
    return new, report


def one(f, *args, blocks, pattern, collective):
    """Exactly one site, fused as said, and verified; nothing of the reduction is left."""
    new, report = fused(f, *args)
    (site,) = report.sites
    assert (site.fused, site.pattern, site.group) == (True, pattern, (0, 1, 2, 3)), site
    (node,) = [n for n in new.graph.nodes if n.target is ROWS]
    assert node.args[-2:] == (blocks, collective)
    assert not any(name in str(n.target) for n in new.graph.nodes for name in ("all_reduce", "reduce_scatter"))
    new.graph.lint()
    return new, report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_reduce_scatter(dtype):
    def f(x, r, w):
        h = r + scatter(x)
        return norm(h, w), h

    args = random(8, H, dtype=dtype), random(2, H, seed=1, dtype=dtype), random(H, seed=2, dtype=dtype)
    one(f, *args, blocks=4, pattern="reduce_scatter+add+rms_norm", collective="reduce_scatter")


def test_a_reduce_scatter_without_residual_with_bias_and_views():
    def f(x, w, b):
        y = scatter(x) + b
        return norm(y.view(1, 2, H), w), y

    args = random(8, H), random(H, seed=2), random(H, seed=3)
    one(f, *args, blocks=4, pattern="reduce_scatter+bias+rms_norm", collective="reduce_scatter")


def test_a_reduce_scatter_of_a_batch_whose_sequence_comes_first():
    def f(x, r, w):
        h = scatter(x) + r
        return norm(h, w), h

    one(
        f, random(8, 3, H), random(2, 3, H), random(H), blocks=4, pattern="reduce_scatter+add+rms_norm",
        collective="reduce_scatter",
    )  # fmt: skip


def test_an_addend_and_a_norm_before_the_residual():
    def addend(x, a, r, w):
        h = r + (scatter(x) + a)
        return norm(h, w), h

    def post(x, a, r, w):
        return norm(scatter(x), w) + r, a

    args = random(8, H), random(2, H, seed=1), random(2, H, seed=2), random(H, seed=3)
    one(addend, *args, blocks=4, pattern="reduce_scatter+add+add+rms_norm", collective="reduce_scatter")
    one(post, *args, blocks=4, pattern="reduce_scatter+rms_norm+add", collective="reduce_scatter")


def experts(column, start=5, end=8, of=0):
    """The boundary of an MoE layer under attention DP: gather, experts, all-reduce, own rows, add, norm."""

    def f(y, r, w, e):
        x = gather(y, column).unsqueeze(0) @ e
        h = r + graphs.all_reduce(x)[of, start:end].view(1, end - start, H)
        return norm(h, w), h

    return f


def inputs(kept=3, block=5):
    return random(block, H), random(1, kept, H, seed=1), random(H, seed=2), random(H, H, seed=3)


def test_the_rows_of_the_own_replica_behind_an_all_reduce(column):
    pattern = "all_reduce+rows/2+add+rms_norm"
    for kept in (3, 5, 1, 0):
        _, report = one(experts(column, 5, 5 + kept), *inputs(kept), blocks=2, pattern=pattern, collective="all_reduce")
        assert report.sites[0].nodes


def test_the_layer_is_shared_when_its_rows_return_to_the_ranks_of_attention(column, neighbors):
    class Attention(torch.nn.Module):
        def forward(self, x):
            return graphs.all_reduce(torch.nn.functional.scaled_dot_product_attention(x, x, x), group=neighbors)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = Attention()

        def forward(self, x, r, w, e):
            h = r + self.self_attn(x)
            rows = gather(norm(h, w)[0], column).unsqueeze(0)
            y = graphs.all_reduce(torch.nn.functional.silu(rows @ e))
            h = h + y[0, 5:10].view(1, 5, H)
            return norm(h, w), h

    args = random(1, 5, H), random(1, 5, H, seed=1), random(H, seed=2), random(H, H, seed=3)
    _, report = fused(Layer(), *args)
    assert [(s.role, s.group, s.fused, s.shared) for s in report.sites] == [
        ("attention", (2, 3), True, True),
        ("mlp", (0, 1, 2, 3), True, True),
    ]
    (layer,) = report.layers
    assert (layer.attention, layer.mlp, layer.shared) == ((2, 3), (2, 3), True)
    assert "gives each of its blocks back" in layer.detail


@pytest.mark.parametrize(("start", "end"), [(0, 3), (6, 9), (4, 9)])
def test_other_rows_than_the_own_block_are_refused(column, start, end):
    args = random(5, H), random(1, end - start, H, seed=1), random(H, seed=2), random(H, H, seed=3)
    new, report = fused(experts(column, start, end), *args)
    (site,) = report.sites
    assert (site.fused, site.reason) == (False, "rows-move")
    assert "not block 1 of 2" in site.detail
    assert graphs.all_reduces_left(new) == 1


def test_more_rows_than_a_block_are_refused():
    graphs.start_fake_group(4, 0)
    column = dist.new_group([0, 2]).group_name
    args = random(5, H), random(1, 6, H, seed=1), random(H, seed=2), random(H, H, seed=3)
    _, report = fused(experts(column, 0, 6), *args)
    assert (report.sites[0].reason, "more than one of 2 blocks" in report.sites[0].detail) == ("rows-move", True)


def test_a_slice_without_a_gather_proves_nothing():
    def f(x, r, w):
        h = r + graphs.all_reduce(x)[5:8]
        return norm(h, w), h

    _, report = fused(f, random(10, H), random(3, H, seed=1), random(H, seed=2))
    assert report.sites[0].reason == "rows-move"
    assert "no gather of the graph" in report.sites[0].detail


def test_a_gather_that_did_not_make_the_rows_proves_nothing(column):
    """The last token of a prompt of two, and logits that are gathered: as many rows as the sum has, by chance. A rank for which
    that token is the own block must not decide otherwise than the other one."""

    def f(x, r, w, e):
        h = r + graphs.all_reduce(x)[1:2]
        return gather(norm(h, w) @ e, column), h

    _, report = fused(f, random(2, H), random(1, H, seed=1), random(H, seed=2), random(H, H, seed=3))
    assert report.sites[0].reason == "rows-move"
    assert "no gather of the graph" in report.sites[0].detail


def test_a_gather_over_other_ranks_proves_nothing(neighbors):
    """Ranks 2 and 3 are one replica where blocks are contiguous: their gather does not say whose rows are whose."""
    _, report = fused(experts(neighbors), *inputs())
    assert report.sites[0].reason == "rows-move"


def test_a_sum_that_is_read_whole_as_well_is_kept(column):
    def f(y, r, w, e):
        total = graphs.all_reduce(gather(y, column) @ e)
        h = r + total[5:8]
        return norm(h, w), h, total

    _, report = fused(f, random(5, H), random(3, H, seed=1), random(H, seed=2), random(H, H, seed=3))
    assert not report.sites[0].fused


def test_columns_are_no_rows(column):
    def f(y, r, w, e):
        h = r + graphs.all_reduce(gather(y, column) @ e)[:, 4:12]
        return norm(h, w), h

    _, report = fused(f, random(5, H), random(10, 8, seed=1), random(8, seed=2), random(H, H, seed=3))
    assert report.sites[0].reason == "rows-move"


@pytest.mark.parametrize("bounded", [0, 1])  # which of two equal symbols survives is torch's choice
def test_a_replica_whose_rows_are_bounded_before_their_number_is_found_equal_to_another(column, bounded):
    """Sizes that the graph holds as symbols: of rows, of the largest replica, and of a residual that has as many rows."""

    def f(x, largest, r, w, e):
        if (x, r)[bounded].shape[1] > largest.shape[1]:
            raise ValueError("more rows than the largest replica has")
        r = r + x
        total = graphs.all_reduce(gather(largest[0], column).unsqueeze(0) @ e)
        h = r + total[:, largest.shape[1] : largest.shape[1] + r.shape[1]]
        return norm(h, w), h

    args = random(1, 3, H), random(1, 5, H), random(1, 3, H, seed=1), random(H, seed=2), random(H, H, seed=3)
    _, report = fused(f, *args, dynamic=(1,))
    (site,) = report.sites
    assert site.fused, site.detail
    assert "s" in str(site.shape[1])  # a symbol


PIECES = {
    "chunk": lambda t: t.chunk(2)[1],
    "chunk of the rows of a batch": lambda t: t.unsqueeze(0).chunk(2, dim=1)[1].view(-1, H),
    "split": lambda t: torch.split(t, 5)[1],
    "split with sizes": lambda t: torch.split(t, [5, 5])[1],
    "split with sizes of which the own block comes in two": lambda t: torch.split(t, [2, 3, 5])[2],
    "tensor_split": lambda t: t.tensor_split(2)[1],
    "view and index": lambda t: t.view(2, 5, H)[1],
    "view and unbind": lambda t: t.view(2, 5, H).unbind(0)[-1],
    "narrow": lambda t: t.narrow(0, 5, 5),
    "a chunk, and rows of it": lambda t: t.chunk(2)[1][:4],
}


@pytest.mark.parametrize("spelling", PIECES)
def test_one_piece_of_a_split_is_the_own_block(column, spelling):
    def f(y, r, w, e):
        h = r + PIECES[spelling](graphs.all_reduce(gather(y, column) @ e))
        return norm(h, w), h

    kept = 4 if "rows of it" in spelling else 5
    args = random(5, H), random(kept, H, seed=1), random(H, seed=2), random(H, H, seed=3)
    one(f, *args, blocks=2, pattern="all_reduce+rows/2+add+rms_norm", collective="all_reduce")


def test_pieces_along_an_inner_dimension_are_rows_where_those_before_it_are_one(column):
    """``(1, 2, 5, H)``: index 1 of the second dimension is rows 5 to 9; of ``(2, 5, H)`` index 1 of the second is two rows."""

    def f(y, r, w, e):
        total = graphs.all_reduce(gather(y, column) @ e)
        h = r + total.view(1, 2, 5, H).unbind(1)[1].view(5, H)
        return norm(h, w), h

    args = random(5, H), random(5, H, seed=1), random(H, seed=2), random(H, H, seed=3)
    one(f, *args, blocks=2, pattern="all_reduce+rows/2+add+rms_norm", collective="all_reduce")


@pytest.mark.parametrize(
    ("piece", "rows", "says"),
    [
        (lambda t: t.chunk(2)[0], 5, "not block 1 of 2"),
        (lambda t: t.chunk(5)[1], 2, "not block 1 of 2"),
        (lambda t: torch.split(t, 4)[1], 4, "not block 1 of 2"),  # 4, 4 and 2 rows
        (lambda t: torch.split(t, [4, 6])[1], 6, "not block 1 of 2"),
        (lambda t: t.view(2, 5, H).unbind(1)[1], 2, "moves rows of the sum"),
        (lambda t: t.chunk(2)[1] + t.chunk(2)[0], 5, "moves rows of the sum"),
        (lambda t: t.chunk(2, dim=1)[1].repeat(1, 2), 10, "moves rows of the sum"),
    ],
)
def test_another_piece_is_refused(column, piece, rows, says):
    def f(y, r, w, e):
        h = r + piece(graphs.all_reduce(gather(y, column) @ e))
        return norm(h, w), h

    args = random(5, H), random(rows, H, seed=1), random(H, seed=2), random(H, H, seed=3)
    new, report = fused(f, *args)
    (site,) = report.sites
    assert (site.fused, site.reason) == (False, "rows-move"), site.detail
    assert says in site.detail
    assert graphs.all_reduces_left(new) == 1


def test_a_chunk_without_a_gather_proves_nothing():
    def f(x, r, w):
        h = r + graphs.all_reduce(x).chunk(4)[RANK]
        return norm(h, w), h

    _, report = fused(f, random(8, H), random(2, H, seed=1), random(H, seed=2))
    assert report.sites[0].reason == "rows-move"
    assert "no gather of the graph" in report.sites[0].detail


def test_a_chunk_of_an_uneven_number_of_rows_is_refused(column):
    """Nine rows in two chunks are five and four, but a gather's blocks are equal."""

    def f(y, r, w, e):
        h = r + graphs.all_reduce(gather(y, column)[:9] @ e).chunk(2)[1]
        return norm(h, w), h

    _, report = fused(f, random(5, H), random(4, H, seed=1), random(H, seed=2), random(H, H, seed=3))
    assert report.sites[0].reason == "rows-move"
