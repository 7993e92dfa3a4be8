"""One region in many spellings: each fuses exactly, or is refused by its own reason code.

Everything runs on a fake process group, where a sum over ranks is the partial sum itself: that compares rewritten with
original graphs bit for bit without processes. Real sums are in ``test_exact.py``.
"""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist
from graphs import all_reduce
from torch import nn
from tpfuse.passes import PassOptions, Reason

H = 64
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(4)
    yield
    dist.destroy_process_group()


def llama(h, w, eps=1e-5):
    f = h.float()
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)


def inputs(dtype=torch.bfloat16, shape=(2, 3, H), seed=0, weight_dtype=None):
    g = torch.Generator().manual_seed(seed)
    x, r = (torch.randn(shape, generator=g) * 2).to(dtype), (torch.randn(shape, generator=g) * 2).to(dtype)
    w = torch.randn(shape[-1], generator=g).to(weight_dtype or dtype)
    b = torch.randn(shape[-1], generator=g).to(dtype)
    return x, r, w, b


def check(f, args, fused=True, options=graphs.ALL, **kw):
    """Trace, rewrite, compare on fresh inputs; return the one site and the rewritten graph."""
    gm = graphs.trace(f, args, **kw)
    new, report = graphs.fused_copy(gm, options)
    assert [s.fused for s in report.sites] == [fused], report.sites
    for seed in (1, 2):
        g = torch.Generator().manual_seed(seed)
        fresh = [
            (torch.randn(a.shape, generator=g) * 3).to(a.dtype) if isinstance(a, torch.Tensor) else a for a in args
        ]
        assert graphs.equal(graphs.run(gm, *fresh), graphs.run(new, *fresh))
    assert graphs.count(new) == int(fused)
    assert graphs.all_reduces_left(new) == int(not fused), "a replaced all-reduce still runs"
    return report.sites[0], new


# -- norms --------------------------------------------------------------------------------------------------------

NORMS = {
    "cast then weight (Llama)": llama,
    "weight on the right": lambda h, w: llama(h, 1) * w,
    "sqrt and division": lambda h, w: (
        w * (h.float() / torch.sqrt(h.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(h.dtype)
    ),
    "division by a root, reciprocal": lambda h, w: (
        w * (h.float() * (1.0 / torch.sqrt(h.float().pow(2).mean(-1, keepdim=True) + 1e-5))).to(h.dtype)
    ),
    "pow(-0.5)": lambda h, w: (
        w * (h.float() * torch.pow(h.float().pow(2).mean(-1, keepdim=True) + 1e-5, -0.5)).to(h.dtype)
    ),
    "h * h": lambda h, w: (
        w * (h.float() * torch.rsqrt((h.float() * h.float()).mean(-1, keepdim=True) + 1e-5)).to(h.dtype)
    ),
    "square()": lambda h, w: (
        w * (h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + 1e-5)).to(h.dtype)
    ),
    "sum / H": lambda h, w: (
        w * (h.float() * torch.rsqrt(h.float().pow(2).sum(-1, keepdim=True) / H + 1e-5)).to(h.dtype)
    ),
    "keepdim=False": lambda h, w: (
        w * (h.float() * torch.rsqrt(h.float().pow(2).mean(-1) + 1e-5).unsqueeze(-1)).to(h.dtype)
    ),
    "eps first": lambda h, w: w * (h.float() * torch.rsqrt(1e-5 + h.float().pow(2).mean(-1, keepdim=True))).to(h.dtype),
    "1 + w in fp32 (Gemma)": lambda h, w: (llama(h.float(), 1) * (1.0 + w.float())).to(h.dtype),
    "w + 1 in fp32": lambda h, w: (llama(h.float(), 1) * (w.float() + 1.0)).to(h.dtype),
    "1 + w in the weight's dtype": lambda h, w: llama(h, 1) * (1 + w),
    "weight in fp32, one cast (OLMo2)": lambda h, w: (w * llama(h.float(), 1)).to(h.dtype),
    "no weight": lambda h, w: llama(h, 1),
    "all in the input dtype": lambda h, w: w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)),
    "nn.RMSNorm": lambda h, w: nn.functional.rms_norm(h, (H,), w, 1e-5),
    "nn.RMSNorm, eps=None": lambda h, w: nn.functional.rms_norm(h, (H,), w),
    "nn.RMSNorm without weight": lambda h, w: nn.functional.rms_norm(h, (H,), None, 1e-5),
    "weight viewed as (1, 1, H)": lambda h, w: (
        w.view(1, 1, H) * (h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(h.dtype)
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norms_in_every_spelling_fuse_exactly(name, dtype):
    x, r, w, _ = inputs(dtype)

    def f(x, r, w):
        h = r + all_reduce(x)
        return NORMS[name](h, w), h

    check(f, (x, r, w), options=PassOptions(policy="all", verify=True))


@pytest.mark.parametrize(
    "name", ["cast then weight (Llama)", "weight in fp32, one cast (OLMo2)", "1 + w in fp32 (Gemma)"]
)
def test_fp32_weight_with_bf16_input(name):
    x, r, w, _ = inputs(weight_dtype=torch.float32)

    def f(x, r, w):
        h = r + all_reduce(x)
        return NORMS[name](h, w), h

    check(f, (x, r, w))


def test_relaxed_numerics_accept_another_rounding_order():
    def odd(h, w):  # the weight is multiplied into the root first: the same norm, rounded elsewhere
        f = h.float()
        return (f * (torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-5) * w.float())).to(h.dtype)

    def f(x, r, w):
        h = r + all_reduce(x)
        return odd(h, w), h

    x, r, w, _ = inputs()
    site, _ = check(f, (x, r, w), fused=False)
    assert site.reason == Reason.UNKNOWN_FLAVOUR.value
    gm = graphs.trace(f, (x, r, w))
    new, report = graphs.fused_copy(gm, PassOptions(policy="all", numerics="relaxed"))
    assert report.sites[0].fused and "relaxed" in report.sites[0].detail
    torch.testing.assert_close(gm(x, r, w), new(x, r, w), rtol=2e-2, atol=2e-2)


# -- what stands between the all-reduce and the norm ------------------------------------------------------------------


def _in_place_residual(x, r, w):
    r = r.clone()
    r += all_reduce(x)
    return llama(r, w), r


def _in_place_sum(x, r, w):
    y = all_reduce(x)
    y += r
    return llama(y, w), y


def _late_wait(x, r, w):
    started = torch.ops._c10d_functional.all_reduce(x, "sum", graphs.world())
    r = r * 2
    y = torch.ops._c10d_functional.wait_tensor(started)
    h = r + y
    return llama(h, w), h


def _waited_twice(x, r, w):
    h = r + torch.ops._c10d_functional.wait_tensor(all_reduce(x))
    return llama(h, w), h


def _flat(x, r, w):
    y = all_reduce(x.reshape(-1, H)).view(x.shape)
    h = y + r
    return llama(h, w), h


def _norm_on_flat(x, r, w):
    h = all_reduce(x) + r
    return llama(h.view(-1, H), w), h


def _dropout(x, r, w):
    h = r + nn.functional.dropout(all_reduce(x), 0.1, training=False)
    return llama(h, w), h


def _embedding(x, r, w, b):
    y = all_reduce(x)
    return llama(y, w), y * 2, y


def _post_then_norm(x, r, w, b):
    h = r + llama(all_reduce(x) + b, w)
    return llama(h, w), h


def _dead_residual(x, r, w):
    return llama(r + all_reduce(x), w)


def _norm_twice(x, r, w):
    h = r + all_reduce(x)
    n = llama(h, w)
    return n @ n.transpose(-1, -2), n.float(), h * 2


def _two_norms(x, r, w):
    h = r + all_reduce(x)
    return llama(h, w), llama(h, w * 2), h


def _cast_of_h_read_too(x, r, w):
    h = r + all_reduce(x)
    f = h.float()
    n = w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-5)).to(h.dtype)
    return n, f.sum(), h


def _copy_into_buffer(x, r, w):
    y = torch.ops.aten.copy.default(torch.empty_like(x), all_reduce(x))
    h = r + y
    return llama(h, w), h


BETWEEN = {
    "residual + sum": lambda x, r, w: (llama(r + all_reduce(x), w), r + 0),
    "sum + residual": lambda x, r, w: (llama(all_reduce(x) + r, w), r + 0),
    "residual += sum": _in_place_residual,
    "sum += residual": _in_place_sum,
    "late wait": _late_wait,
    "waited twice": _waited_twice,
    "views": _flat,
    "norm on a flat view": _norm_on_flat,
    "dropout clone (Phi3)": _dropout,
    "dead residual": _dead_residual,
    "norm read several times": _norm_twice,
    "two norms of one residual sum": _two_norms,
    "a cast of the residual sum is read too": _cast_of_h_read_too,
    "copied into a buffer": _copy_into_buffer,
}


@pytest.mark.parametrize("shape", [(5, H), (2, 3, H), (1, 2, 3, H)], ids=str)
@pytest.mark.parametrize("name", BETWEEN)
def test_what_stands_between_is_seen_through(name, shape):
    x, r, w, _ = inputs(shape=shape)
    site, _ = check(BETWEEN[name], (x, r, w), options=PassOptions(policy="all", verify=True))
    assert site.pattern == "all_reduce+add+rms_norm"


@pytest.mark.parametrize(
    ("name", "f", "pattern"),
    [
        ("no residual", lambda x, r, w, b: (llama(all_reduce(x), w),), "all_reduce+rms_norm"),
        (
            "embedding",
            _embedding,
            "all_reduce+rms_norm",
        ),
        ("bias", lambda x, r, w, b: (llama(r + (all_reduce(x) + b), w),), "all_reduce+bias+add+rms_norm"),
        ("mean over 2 ranks", lambda x, r, w, b: (llama(r + all_reduce(x) / 2, w),), "all_reduce+scale+add+rms_norm"),
        ("scale (Granite)", lambda x, r, w, b: (llama(r + all_reduce(x) * 0.22, w),), "all_reduce+scale+add+rms_norm"),
        (
            "bias and scale",
            lambda x, r, w, b: (llama(r + (all_reduce(x) + b) * 0.22, w),),
            "all_reduce+bias+scale+add+rms_norm",
        ),
        ("two addends", lambda x, r, w, b: (llama(r + (all_reduce(x) + r * 3), w),), "all_reduce+add+add+rms_norm"),
        ("post-norm (Gemma2)", lambda x, r, w, b: (r + llama(all_reduce(x), w),), "all_reduce+rms_norm+add"),
        (
            "post-norm, then a norm",
            _post_then_norm,
            "all_reduce+bias+rms_norm+add",
        ),
    ],
)
def test_variants(name, f, pattern):
    args = inputs()
    site, _ = check(f, args, options=PassOptions(policy="all", verify=True))
    assert site.pattern == pattern


def test_deepseek_sums_two_reductions_and_one_op_makes_both():
    def f(x, r, w):
        routed = all_reduce(x)
        shared = all_reduce(x * 2)
        h = r + (routed + shared)
        return llama(h, w), h

    args = inputs()[:3]
    gm = graphs.trace(f, args)
    new, report = graphs.fused_copy(gm)
    assert [s.fused for s in report.sites] == [True, True]
    assert graphs.equal(gm(*args), new(*args))
    assert graphs.count(new) == 1 and graphs.all_reduces_left(new) == 0


def test_coalesced_all_reduces_lose_just_the_fused_item():
    def f(x, r, w):
        a, b = torch.ops._c10d_functional.all_reduce_coalesced([x, x * 2], "sum", graphs.world())
        a = torch.ops._c10d_functional.wait_tensor(a)
        b = torch.ops._c10d_functional.wait_tensor(b)
        h = r + a
        return llama(h, w), b.relu()

    args = inputs()[:3]
    gm = graphs.trace(f, args)
    new, report = graphs.fused_copy(gm)
    assert [s.fused for s in report.sites] == [True, False]
    assert graphs.equal(gm(*args), new(*args))
    (left,) = [n for n in new.graph.nodes if "all_reduce_coalesced" in str(n.target)]
    assert len(left.args[0]) == 1


def test_in_place_dist_all_reduce_and_a_chain_of_layers():
    def f(x, r, w):
        sums = []
        for _ in range(3):
            r = r + all_reduce(x)
            x = llama(r, w)
            sums.append(x)
        return x, r

    args = inputs()[:3]
    gm = graphs.trace(f, args)
    new, report = graphs.fused_copy(gm, PassOptions(policy="all", verify=True))
    assert [s.fused for s in report.sites] == [True] * 3
    assert graphs.equal(gm(*args), new(*args)) and graphs.all_reduces_left(new) == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_static_and_dynamic_shapes(dynamic):
    x, r, w, _ = inputs()

    def f(x, r, w):
        y = all_reduce(x.reshape(-1, H)).view(x.shape)
        h = r + y
        return llama(h, w), h

    gm = graphs.trace(f, (x, r, w), dynamic=(0, 1) if dynamic else ())
    new, report = graphs.fused_copy(gm)
    assert report.sites[0].fused, report.sites
    sizes = [n for n in gm.graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], torch.SymInt)]
    assert bool(sizes) == dynamic
    for rows in (3, 17) if dynamic else (3,):
        x, r, w, _ = inputs(shape=(2, rows, H), seed=rows)
        values = iter((x, r, w))
        args = [
            {2: 2, 3: rows, H: H}[n.meta["val"].node.hint] if n in sizes else next(values)
            for n in gm.graph.nodes
            if n.op == "placeholder"
        ]
        assert graphs.equal(gm(*args), new(*args))


# -- near misses: each with its own code ------------------------------------------------------------------------------


def _unbiased_layer_norm(h, w):
    variance, mean = torch.var_mean(h.float(), -1, keepdim=True)
    return w * ((h.float() - mean) * torch.rsqrt(variance + 1e-5)).to(h.dtype)


def _centered_only(h, w):
    c = h - h.mean(-1, keepdim=True)
    return w * (c * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5))


def _mutated(x, r, w):
    y = all_reduce(x)
    r.add_(1)
    h = r + y
    return llama(h, w)


def _derived(x, r, w):
    y = all_reduce(x)
    h = y + y.relu()
    return llama(h, w)


def _rows_move(x, r, w):
    h = r[:, -1:] + all_reduce(x)[:, -1:]
    return llama(h, w)


def _returned(x, r, w):
    y = all_reduce(x)
    h = r + y
    return llama(h, w), y


def _extra(x, r, w):
    y = all_reduce(x)
    h = r + y
    return llama(h, w), y.relu()


def _order(x, r, w):
    started = torch.ops._c10d_functional.all_reduce(x, "sum", graphs.world())
    other = all_reduce(r)
    h = torch.ops._c10d_functional.wait_tensor(started) + r
    return llama(h, w), other.relu()


def _grouped(h, w):
    g = h.view(2, 3, 4, 16)
    return w * (g * torch.rsqrt(g.pow(2).mean(-1, keepdim=True) + 1e-5)).reshape(2, 3, H)


def _doubled(x, r, w):
    y = all_reduce(x)
    return llama(r + (y + y), w)


def near(norm):
    return lambda x, r, w: norm(r + all_reduce(x), w)


NEAR_MISSES = {
    "LayerNorm over H - 1": (near(_unbiased_layer_norm), Reason.LAYER_NORM),
    "centered, over the mean of squares": (near(_centered_only), Reason.LAYER_NORM),
    "eps outside the root": (
        near(lambda h, w: w * (h / (h.pow(2).mean(-1, keepdim=True).sqrt() + 1e-5))),
        Reason.EPS_OUTSIDE_ROOT,
    ),
    "mean over another dimension": (
        near(lambda h, w: w * (h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-5))),
        Reason.MEAN_DIM,
    ),
    "mean over two dimensions": (
        near(lambda h, w: w * (h * torch.rsqrt(h.pow(2).mean((-1, -2), keepdim=True) + 1e-5))),
        Reason.MEAN_DIM,
    ),
    "partial width": (
        near(lambda h, w: w * (h * torch.rsqrt(h[..., : H // 2].pow(2).mean(-1, keepdim=True) + 1e-5))),
        Reason.PARTIAL_WIDTH,
    ),
    "grouped": (near(_grouped), Reason.PARTIAL_WIDTH),
    "weight inside the mean": (
        near(lambda h, w: h * w * torch.rsqrt((h * w).pow(2).mean(-1, keepdim=True) + 1e-5)),
        Reason.WEIGHT_INSIDE_MEAN,
    ),
    "mean of absolute values": (
        near(lambda h, w: w * (h * torch.rsqrt(h.pow(4).mean(-1, keepdim=True) + 1e-5))),
        Reason.UNKNOWN_NORM,
    ),
    "negated": (
        near(lambda h, w: w * (-1.0 * h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5))),
        Reason.UNKNOWN_NORM,
    ),
    "eps is a tensor": (
        near(lambda h, w: w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + w[0]))),
        Reason.EPS_NOT_CONSTANT,
    ),
    "max": (lambda x, r, w: llama(r + all_reduce(x, "max"), w), Reason.REDUCE_OP),
    "avg": (lambda x, r, w: llama(r + all_reduce(x, "avg"), w), Reason.REDUCE_OP),
    "the sum is returned": (_returned, Reason.RETURNED),
    "the sum is read elsewhere": (_extra, Reason.EXTRA_READER),
    "residual broadcast": (lambda x, r, w: llama(r[:1] + all_reduce(x), w), Reason.RESIDUAL_SHAPE),
    "residual in fp64": (lambda x, r, w: llama(r.double() * 3 + all_reduce(x), w), Reason.DTYPE),
    "sum cast to fp32": (lambda x, r, w: r.float() + all_reduce(x).float(), Reason.DTYPE),
    "residual from the sum": (_derived, Reason.EXTRA_READER),
    "sum added to itself": (_doubled, Reason.RESIDUAL_DERIVED),
    "rows move": (_rows_move, Reason.ROWS_MOVE),
    "another collective in between": (_order, Reason.ORDER),
    "no norm": (lambda x, r, w: (r + all_reduce(x)).relu(), Reason.NO_NORM),
    "norm in another graph": (lambda x, r, w: r + all_reduce(x), Reason.NO_NORM),
    "three addends": (lambda x, r, w: llama(r + (r * 2 + (r * 3 + all_reduce(x))), w), Reason.ADD_CHAIN),
    "alpha": (lambda x, r, w: llama(torch.add(r, all_reduce(x), alpha=2), w), Reason.UNKNOWN_FLAVOUR),
    "scale of one value with a dimension": (
        lambda x, r, w: llama(r + all_reduce(x) * r[0, 0, :1], w),
        Reason.SCALE_NOT_CONSTANT,
    ),
    "one value a column (LayerScale)": (lambda x, r, w: llama(r + all_reduce(x) * w, w), Reason.SCALE_NOT_CONSTANT),
    "a number is added": (lambda x, r, w: llama(r + (all_reduce(x) + 0.5), w), Reason.RESIDUAL_SHAPE),
    "a number that is summed over no rows": (lambda x, r, w: all_reduce(x.sum()).sum((0,)), Reason.NO_NORM),
    "divided by 3": (lambda x, r, w: llama(r + all_reduce(x) / 3, w), Reason.SCALE_NOT_CONSTANT),
    "integer sum": (lambda x, r, w: all_reduce(x.int()), Reason.DTYPE),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_refused_each_with_its_own_code(name):
    f, reason = NEAR_MISSES[name]
    gm = graphs.trace(f, inputs()[:3])
    new, report = graphs.fused_copy(gm)
    codes = [s.reason for s in report.sites]
    assert reason.value in codes and not any(s.fused for s in report.sites[:1]), report.sites
    assert graphs.all_reduces_left(new) == graphs.all_reduces_left(gm)
    site = report.sites[codes.index(reason.value)]
    assert site.detail and site.remedy


def test_a_residual_written_in_place_between_is_refused():
    x, r, w, _ = inputs()
    gm = graphs.trace_as_written(_mutated, (x, r, w))
    _, report = graphs.fused_copy(gm)
    assert report.sites[0].reason == "mutation", report.sites


def test_functionalised_in_place_residual_is_just_another_value():
    x, r, w, _ = inputs()
    gm = graphs.trace(_mutated, (x, r, w))
    new, report = graphs.fused_copy(gm)
    assert report.sites[0].fused
    assert graphs.equal(graphs.run(gm, x, r, w), graphs.run(new, x, r, w))


def test_training_graphs_are_refused():
    x, r, w, _ = inputs()
    gm = graphs.trace(lambda x, r, w: llama(r + all_reduce(x), w), (x, r, w))
    _, report = graphs.fused_copy(gm, training=True)
    assert [s.reason for s in report.sites] == ["training"]


def test_dynamic_width_is_refused():
    gm = graphs.trace(lambda x, r: llama(r + all_reduce(x), 1), inputs()[:2], dynamic=(2,))
    _, report = graphs.fused_copy(gm)
    assert report.sites[0].reason == "dynamic-width", report.sites


def test_every_reason_is_a_code_with_a_remedy():
    from tpfuse.passes import REMEDIES

    assert set(REMEDIES) == set(Reason)
    assert all(remedy.endswith(".") for remedy in REMEDIES.values())


def test_views_between_scale_and_residual_leave_nothing_running():
    def f(x, r, w):
        y = all_reduce(x.view(-1, H)).view(x.shape) * 0.5
        h = y.view(-1, H) + r.view(-1, H)
        return llama(h, w), h

    args = inputs()[:3]
    gm = graphs.trace(f, args)
    new, report = graphs.fused_copy(gm, PassOptions(policy="all", verify=True))
    assert report.sites[0].fused, report.sites
    assert graphs.equal(gm(*args), new(*args)) and graphs.all_reduces_left(new) == 0
