"""LayerNorm over rows with destinations: the proofs are those of an RMSNorm (``test_rows.py``), the op is the LayerNorm's.

Traced on one rank of a fake group of four, which stands at place 2. Every rewrite is verified.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from test_rows import H, fused, gather, graphs, random, scatter

W = 4
ROWS = torch.ops.tpfuse.reduce_rows_add_layer_norm.default
GATHER = torch.ops.tpfuse.reduce_rows_add_layer_norm_gather.default


@pytest.fixture(autouse=True)
def column():
    """The group of a rank with its counterpart in the other replica: ranks 0 and 2, 1 and 3."""
    graphs.start_fake_group(W, 2)
    columns = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    yield columns[0].group_name
    dist.destroy_process_group()


def native(h, w, b):
    return torch.nn.functional.layer_norm(h, (H,), w, b)


def cohere(h, w, b):
    f = h.float()
    centered = f - f.mean(-1, keepdim=True)
    return (w.float() * (centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + 1e-5))).to(h.dtype)


def one(f, *args, pattern, target=ROWS, last=(W, "reduce_scatter"), dynamic=()):
    """Exactly one site, fused as said and verified; nothing of the reduction is left."""
    new, report = fused(f, *args, dynamic=dynamic)
    (site,) = report.sites
    assert (site.fused, site.pattern, site.note) == (True, pattern, ""), site
    assert "LayerNorm" in site.detail
    (node,) = [n for n in new.graph.nodes if n.target is target]
    assert node.args[-len(last) :] == last
    assert not any(name in str(n.target) for n in new.graph.nodes for name in ("all_reduce", "reduce_scatter_tensor"))
    new.graph.lint()
    return new, site


def args(rows=2, dtype=torch.bfloat16):
    own = [random(rows, H, seed=n, dtype=dtype) + 3 for n in (1, 2)]
    return random(W * rows, H, dtype=dtype), *own, *(random(H, seed=n, dtype=dtype) for n in (3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("normed", [native, cohere])
def test_a_reduce_scatter(normed, dtype):
    def f(x, a, r, w, b):
        h = r + scatter(x)
        return normed(h, w, b), h

    one(f, *args(dtype=dtype), pattern="reduce_scatter+add+layer_norm")


def test_bias_addend_scale_and_residual():
    """The two sublayers of a parallel block: the vector of a projection, and a sum that is made already."""

    def f(x, a, r, w, b):
        h = r + ((scatter(x) + w) + a) * 0.22
        return native(h, w, b), h

    one(f, *args(), pattern="reduce_scatter+bias+add+scale+add+layer_norm")


def test_without_residual_with_bias_and_views():
    def f(x, a, r, w, b):
        y = scatter(x) + b
        return native(y.view(1, 2, H), w, None), y

    one(f, *args(), pattern="reduce_scatter+bias+layer_norm")


@pytest.mark.parametrize("kept", [5, 3, 0])
def test_the_rows_of_the_own_replica_behind_an_all_reduce(column, kept):
    def f(y, r, w, b, e):
        h = r + graphs.all_reduce(gather(y, column) @ e)[5 : 5 + kept]
        return native(h, w, b), h

    given = random(5, H), random(kept, H, seed=1), random(H, seed=2), random(H, seed=3), random(H, H, seed=4)
    one(f, *given, pattern="all_reduce+rows/2+add+layer_norm", last=(2, "all_reduce"))


def test_a_slice_that_nothing_proves_is_refused_as_before(column):
    def f(y, r, w, b, e):
        h = r + graphs.all_reduce(gather(y, column) @ e)[4:7]
        return native(h, w, b), h

    given = random(5, H), random(3, H, seed=1), random(H, seed=2), random(H, seed=3), random(H, H, seed=4)
    new, report = fused(f, *given)
    assert (report.sites[0].fused, report.sites[0].reason) == (False, "rows-move")
    assert graphs.all_reduces_left(new) == 1


def test_what_the_op_for_rows_does_not_take_is_refused_with_a_sentence():
    def scaled_first(x, a, r, w, b):
        h = r + (scatter(x) * 0.5 + a)
        return native(h, w, b), h

    def by_a_tensor(x, a, r, w, b):
        h = r + scatter(x) * w[0]
        return native(h, w, b), h

    def of_wide_sums(x, a, r, w, b):
        h = r + scatter(x.float()).to(r.dtype)
        return native(h, w, b), h

    for f, reason, says in (
        (scaled_first, "add-chain", "adds first"),
        (by_a_tensor, "scale-not-constant", "a tensor; the op for LayerNorm takes a number"),
        (of_wide_sums, "dtype", "takes no sum that is wider"),
    ):
        new, report = fused(f, *args())
        assert (report.sites[0].reason, report.sites[0].fused) == (reason, False), report.sites
        assert says in report.sites[0].detail, report.sites[0].detail
        assert any("reduce_scatter_tensor" in str(n.target) for n in new.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_gather_behind_the_norm_is_part_of_the_op(dtype):
    def f(x, a, r, w, b):
        h = r + scatter(x)
        return gather(native(h, w, b), graphs.world(), W), h

    pattern, last = "reduce_scatter+add+layer_norm+all_gather", ("reduce_scatter",)
    new, _ = one(f, *args(dtype=dtype), pattern=pattern, target=GATHER, last=last)
    assert not any("_c10d_functional" in str(n.target) for n in new.graph.nodes)


def test_a_symbolic_number_of_rows():
    def f(x, a, r, w, b):
        h = r + (scatter(x) + a)
        return gather(native(h, w, b), graphs.world(), W), h

    whole = random(8, 3, H), random(2, 3, H, seed=1), random(2, 3, H, seed=2), random(H, seed=3), random(H, seed=4)
    pattern, last = "reduce_scatter+add+add+layer_norm+all_gather", ("reduce_scatter",)
    _, site = one(f, *whole, pattern=pattern, target=GATHER, last=last, dynamic=(1,))
    assert "s" in str(site.shape[1])


def test_who_reads_the_own_rows_keeps_the_gather_outside():
    def f(x, a, r, w, b):
        h = r + scatter(x)
        y = native(h, w, b)
        return gather(y, graphs.world(), W), y * 2, h

    _, report = fused(f, *args())
    (site,) = report.sites
    assert (site.fused, site.pattern) == (True, "reduce_scatter+add+layer_norm")
    assert "reads the own rows of the norm as well" in site.note
