"""The pass on graphs that nobody wrote for it: it fuses exactly or refuses, and never breaks a compile."""

from __future__ import annotations

import sys
import warnings

import graphs
import pytest
import torch
import torch.distributed as dist
from graphs import all_reduce
from tpfuse.passes import PassOptions, Reason, VerificationError

import tpfuse

H = 16
VERIFY = PassOptions(policy="all", verify=True)


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(4)
    yield
    dist.destroy_process_group()


def norm(h, w, eps=1e-5):
    f = h.float()
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)


def random(*shape, seed=0, dtype=torch.bfloat16):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


def check(f, *args, as_written=False, dynamic=()):
    """Trace, rewrite with verification, compare bits on fresh inputs; return the report."""
    gm = graphs.trace_as_written(f, args) if as_written else graphs.trace(f, args, dynamic)
    before = str(gm.graph)
    new, report = graphs.fused_copy(gm, VERIFY)
    if not report.fused:
        assert str(new.graph) == before, "nothing was fused, but the graph changed"
    for seed in (1, 2):
        fresh = [random(*a.shape, seed=seed * 100 + i, dtype=a.dtype) for i, a in enumerate(args)]
        assert graphs.equal(graphs.run(gm, *fresh), graphs.run(new, *fresh)), report.sites
    return report


def fused(report):
    return [s.fused for s in report.sites]


# -- operands that differ by leading dimensions of size one ---------------------------------------------------------

SHAPES = [((5, H), (1, 5, H)), ((1, 5, H), (5, H)), ((1, H), (1, 1, H)), ((1, 1, H), (1, H)), ((1, 1, 5, H), (5, H))]


@pytest.mark.parametrize("left", [True, False], ids=["residual first", "sum first"])
@pytest.mark.parametrize(("sum_shape", "residual_shape"), SHAPES, ids=str)
def test_operands_that_differ_by_leading_ones_hold_the_same_rows(sum_shape, residual_shape, left):
    def f(x, r, w):
        y = all_reduce(x)
        h = r + y if left else y + r
        return norm(h, w), h, h.sum(-1)

    report = check(f, random(*sum_shape), random(*residual_shape, seed=1), random(H, seed=2))
    assert fused(report) == [True]
    assert report.sites[0].pattern == "all_reduce+add+rms_norm"


@pytest.mark.parametrize(("sum_shape", "residual_shape"), SHAPES, ids=str)
def test_post_norm_with_leading_ones(sum_shape, residual_shape):
    def f(x, r, w):
        n = norm(all_reduce(x), w)
        return r + n, n

    report = check(f, random(*sum_shape), random(*residual_shape, seed=1), random(H, seed=2))
    assert fused(report) == [True]
    assert report.sites[0].pattern == "all_reduce+rms_norm+add"


@pytest.mark.parametrize("bias", [(H,), (1, H), (1, 1, H)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_bias_of_any_leading_ones_is_a_bias(bias, rows):
    def f(x, r, w, b):
        h = r + (all_reduce(x) + b)
        return norm(h, w), h

    report = check(f, random(2, rows, H), random(2, rows, H, seed=1), random(H, seed=2), random(*bias, seed=3))
    assert [s.pattern for s in report.sites] == ["all_reduce+bias+add+rms_norm"]
    assert fused(report) == [True]


def test_one_row_broadcast_over_many_is_a_bias_or_refused_but_no_error():
    def f(x, r, w):
        h = r + all_reduce(x)
        return norm(h, w), h

    assert fused(check(f, random(5, H), random(1, H, seed=1), random(H))) == [True]  # a vector: a bias
    report = check(f, random(2, 5, H), random(2, 1, H, seed=1), random(H))
    assert [s.reason for s in report.sites] == [Reason.RESIDUAL_SHAPE.value]
    report = check(f, random(1, H), random(5, H, seed=1), random(H))
    assert [s.reason for s in report.sites] == [Reason.RESIDUAL_SHAPE.value]


def test_symbolic_rows_with_a_batch_of_one():
    def f(x, r, w):
        h = r + all_reduce(x[0])
        return norm(h, w), h

    gm = graphs.trace(f, (random(1, 5, H), random(1, 5, H), random(H)), dynamic=(1,))
    _, report = graphs.fused_copy(gm, VERIFY)
    assert fused(report) == [True]


def test_flexolmo_norms_a_view_of_the_sum_and_adds_the_residual_behind_it():
    def f(x, r, w):
        return r + norm(all_reduce(x).view(2, 3, H), w)

    report = check(f, random(6, H), random(2, 3, H, seed=1), random(H, seed=2))
    assert [s.pattern for s in report.sites] == ["all_reduce+rms_norm+add"]
    assert fused(report) == [True]


def test_a_full_addend_before_a_reshape_follows_the_sum():
    def f(x, r, a, w):
        h = r + (all_reduce(x) + a).view(2, 3, H)
        return norm(h, w), h

    assert fused(check(f, random(6, H), random(2, 3, H, seed=1), random(6, H, seed=2), random(H, seed=3))) == [True]


def test_the_documented_residual_shape_example_is_refused_and_its_remedy_fuses():
    def broadcast(y, r, w):
        return norm(r[:1] + all_reduce(y), w)

    def expanded(y, r, w):
        y = all_reduce(y)
        return norm(r[:1].expand_as(y) + y, w)

    args = random(2, 3, H), random(2, 3, H, seed=1), random(H, seed=2)
    assert [s.reason for s in check(broadcast, *args).sites] == [Reason.RESIDUAL_SHAPE.value]
    assert fused(check(expanded, *args)) == [True]


# -- shapes are part of the meaning ---------------------------------------------------------------------------------


def columns(h, w):
    return h * torch.rsqrt(h.pow(2).mean(-1) + 1e-5) * w


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_mean_without_keepdim_on_a_square_input_scales_columns_and_is_no_norm(dtype):
    def f(x, r, w):
        h = r + all_reduce(x)
        return columns(h, w), h

    args = random(H, H, dtype=dtype), random(H, H, seed=1, dtype=dtype), random(H, seed=2, dtype=dtype)
    assert [s.reason for s in check(f, *args).sites] == [Reason.UNKNOWN_NORM.value]


def test_a_statistic_of_rows_in_another_number_of_dimensions_is_no_norm():
    def f(x, r, w):
        h = r + all_reduce(x)
        v = h.unsqueeze(1)  # (2, 1, H)
        return h * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-5) * w, h  # (2, 2, H)

    assert fused(check(f, random(2, H), random(2, H, seed=1), random(H, seed=2))) == [False]


@pytest.mark.parametrize("rows", [1, 3, H])
def test_keepdim_false_with_unsqueeze_is_a_norm_also_on_a_square(rows):
    def f(x, r, w):
        h = r + all_reduce(x)
        g = h.float()
        return w * (g * torch.rsqrt(g.pow(2).mean(-1) + 1e-5).unsqueeze(-1)).to(h.dtype), h

    assert fused(check(f, random(rows, H), random(rows, H, seed=1), random(H, seed=2))) == [True]


def test_verify_replays_the_models_own_reduction(monkeypatch):
    """A recognizer that took columns for rows would be caught by tpfuse.verify."""
    from tpfuse.passes import expression, norms

    monkeypatch.setattr(expression, "_keeps_dim", lambda *_: True)
    monkeypatch.setattr(expression, "_layout", lambda node, kind, *_: "kept" if kind in ("mean", "sum") else "rows")
    norms.forget()

    def f(x, r, w):
        h = r + all_reduce(x)
        return columns(h, w), h

    args = random(H, H, dtype=torch.float32), random(H, H, dtype=torch.float32), random(H, dtype=torch.float32)
    with pytest.raises(VerificationError, match="normed differs"):
        graphs.fused_copy(graphs.trace(f, args), VERIFY)
    norms.forget()


# -- in-place writes ------------------------------------------------------------------------------------------------


def test_post_norm_with_a_residual_that_is_written_in_place_is_refused():
    def f(x, r, w):
        n = norm(all_reduce(x), w)
        r.view(-1).add_(1)
        return n + r

    report = check(f, random(3, H), random(3, H, seed=1), random(H, seed=2), as_written=True)
    assert not any(s.fused and s.pattern.endswith("+add") for s in report.sites), report.sites


def all_reduce_in_place(y):
    started = torch.ops._c10d_functional.all_reduce_(y, "sum", graphs.world())
    return torch.ops._c10d_functional.wait_tensor(started)


@pytest.mark.parametrize("late", ["view", "itself", "slice", "output"])
def test_an_all_reduce_in_place_whose_buffer_is_read_later_is_refused(late):
    def f(x, r, w):
        y = x * 2
        view = {"view": lambda: y.view(-1), "slice": lambda: y[:1]}.get(late, lambda: y)()
        total = all_reduce_in_place(y)
        h = r + total
        n = norm(h, w)
        return (n, y) if late == "output" else (n, view + 1)

    report = check(f, random(3, H), random(3, H, seed=1), random(H, seed=2), as_written=True)
    assert fused(report) == [False]


def test_an_all_reduce_in_place_of_a_graph_input_is_refused():
    def f(x, r, w):
        h = r + all_reduce_in_place(x)
        return norm(h, w)

    report = check(f, random(3, H), random(3, H, seed=1), random(H, seed=2), as_written=True)
    assert [s.reason for s in report.sites] == [Reason.MUTATION.value]


def test_an_all_reduce_in_place_of_an_own_buffer_fuses():
    def f(x, r, w):
        y = x * 2
        h = r + all_reduce_in_place(y)
        return norm(h, w), h

    assert fused(check(f, random(3, H), random(3, H, seed=1), random(H, seed=2), as_written=True)) == [True]


@pytest.mark.parametrize("write", ["residual", "view of the residual", "weight", "sum"])
def test_a_write_inside_the_region_is_refused(write):
    def f(x, r, w):
        y = all_reduce(x)
        h = r + y
        if write == "residual":
            r.mul_(2)
        elif write == "view of the residual":
            r.view(-1)[3:].mul_(2)
        elif write == "weight":
            w.add_(1)
        else:
            y.add_(1)
        return norm(h, w), h

    report = check(f, random(3, H), random(3, H, seed=1), random(H, seed=2), as_written=True)
    assert fused(report) == [False]


def test_a_write_elsewhere_does_not_hinder():
    def f(x, r, w, cache):
        y = all_reduce(x)
        cache.view(-1)[:2].mul_(2)
        h = r + y
        return norm(h, w), h, cache

    report = check(f, random(3, H), random(3, H, seed=1), random(H, seed=2), random(4, seed=3), as_written=True)
    assert fused(report) == [True]


def test_a_name_of_the_residual_sum_that_stays_before_the_fused_op_is_not_left_dangling():
    def f(x, r, w):
        h = r + all_reduce(x)
        v = h.view(-1, H)  # made before the weight, read after the norm
        w = w * 1.0
        return norm(h, w), v + 1

    check(f, random(2, 3, H), random(2, 3, H, seed=1), random(H, seed=2))


# -- a pass that fails leaves the graph as it was -------------------------------------------------------------------


def plain(x, r, w):
    h = r + all_reduce(x)
    return norm(h, w), h


ARGS = random(2, 3, H), random(2, 3, H, seed=1), random(H, seed=2)


STEPS = {
    "find": ("collectives", "_read"),
    "look": ("norms", "read"),
    "place": ("sharing", "place"),
    "build": ("fused_call", "_build"),
    "judge": ("fusion", "judge"),
    "insert": ("rewrite", "_insert"),
    "check": ("rewrite", "_check"),
}


@pytest.mark.parametrize("where", STEPS)
def test_an_exception_inside_the_pass_keeps_every_all_reduce_and_warns_once(where, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError(f"broken {where}")

    module, name = STEPS[where]
    monkeypatch.setattr(sys.modules[f"tpfuse.passes.{module}"], name, broken)
    gm = graphs.trace(plain, ARGS)
    before = [(n.name, n.op, str(n.target), str(n.args), str(n.kwargs)) for n in gm.graph.nodes]
    with pytest.warns(RuntimeWarning, match=f"left the graph as it was: ZeroDivisionError: broken {where}"):
        report = tpfuse.fuse(gm, graphs.ALL)
    assert [(n.name, n.op, str(n.target), str(n.args), str(n.kwargs)) for n in gm.graph.nodes] == before
    gm.graph.lint()
    assert [(s.fused, s.reason, s.detail) for s in report.sites] == [
        (False, "internal", f"ZeroDivisionError: broken {where}")
    ]
    assert where == "find" or report.sites[0].group == (0, 1, 2, 3)
    assert graphs.equal(graphs.run(gm, *ARGS), plain(*ARGS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tpfuse.fuse(graphs.trace(plain, ARGS), graphs.ALL)  # the second time it is silent
    with pytest.raises(ZeroDivisionError):
        tpfuse.fuse(graphs.trace(plain, ARGS), VERIFY)


def test_an_exception_at_one_site_leaves_the_others_fused(monkeypatch):
    from tpfuse.passes import norms

    reads = []
    read = norms.read

    def odd(*args):
        reads.append(args)
        if len(reads) == 1:
            raise ZeroDivisionError("only the first")
        return read(*args)

    monkeypatch.setattr(norms, "read", odd)

    def two(x, r, w):
        h = r + all_reduce(x)
        n = norm(h, w)
        h2 = h + all_reduce(n)
        return norm(h2, w), h2

    gm = graphs.trace(two, ARGS)
    with pytest.warns(RuntimeWarning, match="only the first"):
        report = tpfuse.fuse(gm, graphs.ALL)
    assert [s.reason for s in report.sites] == ["internal", None]
    assert graphs.equal(graphs.run(gm, *ARGS), two(*ARGS))


def test_a_compile_with_a_broken_pass_gives_the_models_own_numbers(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("in a compile")

    monkeypatch.setattr("tpfuse.passes.rewrite._check", broken)
    with torch.inference_mode(), pytest.warns(RuntimeWarning, match="in a compile"):
        got = torch.compile(plain, backend="tpfuse", options={"tpfuse.inner": "aot_eager", "tpfuse.policy": "all"})(
            *ARGS
        )
    assert graphs.equal(got, plain(*ARGS))
    assert [s.reason for s in tpfuse.reports()[-1].sites] == ["internal"]


# -- reasons that do not mislead ------------------------------------------------------------------------------------


def test_a_sum_over_experts_is_not_called_a_mean():
    def f(x):
        return all_reduce(x).sum(0) * 2

    assert [s.reason for s in check(f, random(4, 3, H)).sites] == [Reason.ROWS_SUMMED.value]


def test_a_sum_at_the_end_of_a_broken_graph_says_so():
    def f(x):
        return all_reduce(x)

    site = check(f, random(3, H)).sites[0]
    assert site.reason == Reason.RETURNED.value
    assert "graph break" in site.detail and "TORCH_LOGS=graph_breaks" in site.detail


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_dropout_in_train_mode_is_named(inner):
    def f(x, r, w):
        return norm(r + torch.nn.functional.dropout(all_reduce(x), 0.5, training=True), w)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(f, backend="tpfuse", options={"tpfuse.inner": inner, "tpfuse.policy": "all"})(*ARGS)
    site = tpfuse.reports()[-1].sites[0]
    assert site.reason == Reason.DROPOUT.value and "model.eval()" in site.remedy


# -- reasons that name the cause -----------------------------------------------------------------------------------


def test_a_norm_of_some_rows_is_refused_because_rows_move():
    def f(x, r, w):
        h = r + all_reduce(x)
        return norm(h[:, -1:], w)

    (site,) = tpfuse.fuse(graphs.trace(f, ARGS), graphs.ALL).sites
    assert site.reason == "rows-move" and "slice" in site.detail


def test_a_sum_scaled_by_a_tensor_of_another_dtype_before_the_residual_is_refused_for_its_scale():
    def f(x, r, w, t):
        h = r + all_reduce(x) * t
        return norm(h, w), h

    (site,) = tpfuse.fuse(graphs.trace(f, (*ARGS, torch.tensor(0.5, dtype=torch.float64))), graphs.ALL).sites
    assert site.reason == "scale-not-constant"


def test_an_eager_collective_that_make_fx_traced_is_a_site_of_the_report():
    def f(x, r, w):
        y = x * 1
        torch.distributed.all_reduce(y)
        return norm(r + y, w)

    x = torch.randn(3, H)
    gm = graphs.trace_as_written(f, (x, x, torch.rand(H)))
    (site,) = tpfuse.fuse(gm, PassOptions(policy="all")).sites
    assert (site.fused, site.reason) == (False, "unknown-group")
    assert "make it functional" in site.detail
