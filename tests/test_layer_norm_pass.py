"""LayerNorm by meaning: every spelling becomes the op with the bits of the model; what the op does not compute is refused."""

from __future__ import annotations

import graphs
import pytest
import torch
from graphs import all_reduce
from torch import nn
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from tpfuse.ops.layer_norm_flavour import LayerNormFlavour
from tpfuse.passes import PassOptions

OP = torch.ops.tpfuse.all_reduce_add_layer_norm.default
H, SHAPE = 64, (2, 3, 64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OPTIONS = PassOptions(policy="all", verify=True)


@pytest.fixture(scope="module", autouse=True)
def _group():
    graphs.start_fake_group()


def inputs(dtype=torch.bfloat16, affine=None):
    g = torch.Generator().manual_seed(3)
    x, r, a = (torch.randn(SHAPE, generator=g).to(dtype) + k for k in (0, 5, 0))
    w, b = (torch.randn(H, generator=g).to(affine or dtype) for _ in range(2))
    return x, r, w, b, a


def native(h, w, b):
    return nn.functional.layer_norm(h, (H,), w, b)


def cohere(h, w, b):
    f = h.float()
    mean = f.mean(-1, keepdim=True)
    variance = (f - mean).pow(2).mean(-1, keepdim=True)
    return (w.float() * ((f - mean) * torch.rsqrt(variance + 1e-5))).to(h.dtype)


def var_mean(h, w, b):
    f = h.float()
    variance, mean = torch.var_mean(f, -1, correction=0, keepdim=True)
    return ((f - mean) * torch.rsqrt(variance + 1e-5) * w + b).to(h.dtype)


def rounded_early(h, w, b):
    f = h.float()
    c = f - f.mean(-1, keepdim=True)
    return b + w * (c / torch.sqrt((c * c).mean(-1, keepdim=True) + 1e-5)).to(h.dtype)


def in_input_dtype(h, w, b):
    c = h - h.mean(-1, keepdim=True)
    return w * (c * (1 / torch.sqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5))) + b


SPELLINGS = {
    "torch.nn.LayerNorm": (native, "native/input/rsqrt/float32/weight/own/bias/input"),
    "without bias": (lambda h, w, b: native(h, w, None), "native/input/rsqrt/float32/weight/own/none/input"),
    "without weight": (lambda h, w, b: native(h, None, b), "native/input/rsqrt/float32/none/own/bias/input"),
    "Nemotron": (lambda h, w, b: native(h, w + 1, b), "native/input/rsqrt/float32/one_plus_weight/own/bias/input"),
    # A kernel that writes fp32 would not round before the cast: the cast stays outside.
    "cast to fp32 behind it": (
        lambda h, w, b: native(h, w, b).float(),
        "native/input/rsqrt/float32/weight/own/bias/input",
    ),
    "OLMo": (
        lambda h, w, b: nn.functional.layer_norm(h.float(), (H,)).to(h.dtype),
        "native/float32/rsqrt/float32/none/own/none/input",
    ),
    "Cohere": (cohere, "squares/float32/rsqrt/float32/weight/float32/none/input"),
    "var_mean": (var_mean, "var_mean/float32/rsqrt/float32/weight/own/bias/input"),
    "rounded before the weight": (rounded_early, "squares/float32/div_sqrt/input/weight/own/bias/input"),
    "in the input dtype": (in_input_dtype, "squares/input/mul_recip_sqrt/input/weight/own/bias/input"),
    "fp32 results": (
        lambda h, w, b: nn.functional.layer_norm(h.float(), (H,), w.float(), b.float()),
        "native/float32/rsqrt/float32/weight/float32/bias/float32",
    ),
}


def check(f, args, flavour=None, options=OPTIONS, fused=1):
    gm = f if isinstance(f, torch.fx.GraphModule) else graphs.trace(f, args)
    new, report = graphs.fused_copy(gm, options)
    assert [s.fused for s in report.sites].count(True) == fused, report.sites
    assert graphs.equal(graphs.run(gm, *args), graphs.run(new, *args))
    assert graphs.count(new, OP) == fused
    if flavour:
        assert report.sites[-1].flavour == flavour
    return report


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_becomes_the_op_and_keeps_its_bits(name):
    norm, flavour = SPELLINGS[name]

    def f(x, r, w, b):
        h = r + all_reduce(x)
        return norm(h, w, b), h

    for dtype in DTYPES:
        args = inputs(dtype)[:4]
        report = check(f, args, flavour if dtype == torch.bfloat16 else None)
        site = report.sites[0]
        assert site.pattern == "all_reduce+add+layer_norm" and "LayerNorm" in site.detail
        assert LayerNormFlavour.parse(site.flavour).describe() in site.detail


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_inductor_makes_of_the_operator_is_known(dtype):
    """Decomposed, its arithmetic is another one, which the reference repeats too."""
    x, r, w, b, _ = inputs(dtype)
    table = get_decompositions([torch.ops.aten.native_layer_norm])
    gm = make_fx(lambda x, r, w, b: native(r + all_reduce(x), w, b), decomposition_table=table, tracing_mode="fake")(
        x, r, w, b
    )
    gm.graph.eliminate_dead_code()  # as AOTAutograd does: mean and rstd in the dtype of the rows
    assert not any("native_layer_norm" in str(n.target) for n in gm.graph.nodes)
    check(gm, (x, r, w, b), "var_mean/float32/rsqrt/float32/weight/own/bias/input")


def test_an_affine_in_fp32_beside_rows_of_16_bits():
    x, r, w, b, _ = inputs(affine=torch.float32)
    check(lambda x, r, w, b: native(r + all_reduce(x), w, b), (x, r, w, b))


def test_bias_scale_residual_and_a_second_addend():
    def parallel(x, r, w, b, a):
        h = ((all_reduce(x) + w) + a) + r  # a linear's bias, the other sublayer, the residual
        return native(h, w, b), h

    report = check(parallel, inputs())
    assert report.sites[0].pattern == "all_reduce+bias+add+add+layer_norm"

    def scaled(x, r, w, b, a):
        h = r + ((all_reduce(x) + w) + a) * 0.22
        return native(h, w, b), h

    assert check(scaled, inputs()).sites[0].pattern == "all_reduce+bias+add+scale+add+layer_norm"

    def flat(x, r, w, b, a):
        h = r + ((all_reduce(x.view(-1, H)) + w) + a.view(-1, H)).view(SHAPE)
        return native(h, w, b), h

    check(flat, inputs())

    def two_addends(x, r, w, b, a):
        return native(((all_reduce(x) + a) + a * 2) + r, w, b)

    _, report = graphs.fused_copy(graphs.trace(two_addends, inputs()), OPTIONS)
    assert report.sites[0].reason == "add-chain"


def test_two_layers_in_a_row_and_symbolic_rows():
    def f(x, r, w, b):
        h = r + all_reduce(x)
        y = native(h, w, b)
        h = h + all_reduce(y * 0.5)
        return native(h, w, None), h

    args = inputs()[:4]
    check(f, args, fused=2)
    gm = graphs.trace(f, args, dynamic=(1,))
    _, report = graphs.fused_copy(gm, OPTIONS)
    assert [s.fused for s in report.sites] == [True, True], report.sites


REFUSED = {
    "the mean is read elsewhere": (
        lambda h, w, b: torch.native_layer_norm(h, (H,), w, b, 1e-5)[:2],
        "layer-norm",
    ),
    "the variance is read elsewhere": (
        lambda h, w, b: (
            (h.float() - (m := torch.var_mean(h.float(), -1, correction=0, keepdim=True))[1])
            * torch.rsqrt(m[0] + 1e-5),
            m[0] * 2,
        ),
        "layer-norm",
    ),
    "one less in the denominator": (
        lambda h, w, b: (h - h.mean(-1, keepdim=True)) * torch.rsqrt(h.var(-1, keepdim=True) + 1e-5),
        "layer-norm",
    ),
    "groups": (lambda h, w, b: nn.functional.layer_norm(h.view(2, 3, 4, 16), (16,)).view(SHAPE), "partial-width"),
    "mean of squares less the square of the mean": (
        lambda h, w, b: (
            (h.float() - h.float().mean(-1, keepdim=True))
            * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) - h.float().mean(-1, keepdim=True).pow(2) + 1e-5)
        ).to(h.dtype),
        "layer-norm",
    ),
    "eps outside the root": (
        lambda h, w, b: (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True).sqrt() + 1e-5),
        "layer-norm",
    ),
    "rows and columns at once": (lambda h, w, b: nn.functional.layer_norm(h, h.shape[-2:]), "mean-dim"),
    "rows and columns at once, with a weight": (
        lambda h, w, b: nn.functional.layer_norm(h, h.shape[-2:], w.expand(h.shape[-2:])),
        "mean-dim",
    ),
    "the weight twice": (lambda h, w, b: native(h, w, b) * w, None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_layer_norm_of_the_op_is_refused(name):
    norm, reason = REFUSED[name]
    args = inputs()[:4]
    gm = graphs.trace(lambda x, r, w, b: norm(r + all_reduce(x), w, b), args)
    new, report = graphs.fused_copy(gm, OPTIONS)
    assert report.sites[0].reason == reason, report.sites
    assert graphs.equal(graphs.run(gm, *args), graphs.run(new, *args))


def test_a_norm_of_the_unrounded_sum_is_refused():
    args = inputs()[:4]

    def f(x, r, w, b):
        h = r.float() + all_reduce(x).float()
        return cohere(h, w, b).bfloat16(), h.bfloat16()

    _, report = graphs.fused_copy(graphs.trace(f, args), OPTIONS)
    assert report.sites[0].reason == "layer-norm" and "rounded" in report.sites[0].detail, report.sites


def test_relaxed_takes_the_nearest_arithmetic_and_says_so():
    args = inputs()[:4]

    def f(x, r, w, b):
        h = r + all_reduce(x)
        c = h.float() - h.float().mean(-1, keepdim=True)
        variance = c.pow(2).mean(-1, keepdim=True).to(h.dtype).float()  # rounded on the way
        return (c * torch.rsqrt(variance + 1e-5) * w + b).to(h.dtype), h

    gm = graphs.trace(f, args)
    _, report = graphs.fused_copy(gm, OPTIONS)
    assert report.sites[0].reason == "unknown-flavour" and "LayerNorm" in report.sites[0].detail
    new, report = graphs.fused_copy(gm, PassOptions(policy="all", numerics="relaxed", verify=True))
    assert report.sites[0].fused and "relaxed" in report.sites[0].detail
    for model, fused in zip(graphs.run(gm, *args), graphs.run(new, *args), strict=True):
        assert torch.allclose(model.float(), fused.float(), rtol=2**-6, atol=2**-6)


def test_a_quantized_layer_norm_keeps_its_quantization_outside():
    args = inputs()[:4]

    def f(x, r, w, b):
        h = r + all_reduce(x)
        n = native(h, w, b)
        scale = n.abs().amax(-1, keepdim=True).float() / 448.0
        return (n.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float(), scale, h

    site = check(f, args).sites[0]
    assert site.quantizer is None
