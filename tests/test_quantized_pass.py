"""The fp8 quantization behind a norm, in the spellings of several libraries: it becomes part of the fused op, bit for bit, or
the site fuses without it and says why.

Everything runs on a fake process group, where a sum over ranks is the partial sum itself.
"""

from __future__ import annotations

import graphs
import pytest
import quantizations
import torch
import torch.distributed as dist
from graphs import all_reduce
from tpfuse.ops import Quantizer
from tpfuse.ops.quantizer import NAMED
from tpfuse.passes import (
    GraphReport,
    PassOptions,
    VerificationError,
    quant_scheme,
    register_quantizer,
    unregister_quantizer,
)

import tpfuse
from tpfuse.inner import inductor
from tpfuse.inspect import table, words

H = 256
E4M3 = torch.float8_e4m3fn
QUANT = torch.ops.tpfuse.all_reduce_add_rms_norm_quant.default
CHECKED = PassOptions(policy="all", verify=True)


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(4)
    yield
    dist.destroy_process_group()


def llama(h, w, eps=1e-5):
    f = h.float()
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)


def inputs(dtype=torch.bfloat16, shape=(2, 3, H), seed=0):
    g = torch.Generator().manual_seed(seed)
    x, r = (torch.randn(shape, generator=g) * 2).to(dtype), (torch.randn(shape, generator=g) * 2).to(dtype)
    w = torch.randn(shape[-1], generator=g).to(dtype)
    return x, r, w, torch.tensor(0.037)


def same(a, b):
    if isinstance(a, torch.Tensor):
        if a.element_size() == 1:
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        return graphs.equal(a, b)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def check(f, args=None, quantized=True, dynamic=()):
    """Trace, rewrite, compare on fresh inputs, with a row of zeros; returns the site and the rewritten graph."""
    args = args or inputs()
    gm = graphs.trace(f, args, dynamic=dynamic)
    new, report = graphs.fused_copy(gm, CHECKED)
    (site,) = report.sites
    assert site.fused, site
    assert (site.quantizer is not None) == quantized, site
    for seed in (1, 2):
        fresh = [*inputs(args[0].dtype, tuple(args[0].shape), seed)[: len(args)], *args[4:]]
        if seed == 2:
            fresh[0][..., :1, :], fresh[1][..., :1, :] = 0, 0
        given = _with_sizes(gm, fresh) if dynamic else fresh
        assert same(graphs.run(gm, *given), graphs.run(new, *given))
    assert graphs.count(new, QUANT) == int(quantized)
    assert graphs.count(new) == int(not quantized)
    assert graphs.all_reduces_left(new) == 0
    return site, new


def _with_sizes(gm, tensors):
    sizes = {}
    places = [n for n in gm.graph.nodes if n.op == "placeholder"]
    real = iter(tensors)
    pairs = [(n, None if isinstance(n.meta["val"], torch.SymInt) else next(real)) for n in places]
    for node, tensor in pairs:
        if tensor is not None:
            sizes.update({str(s): int(t) for s, t in zip(node.meta["val"].shape, tensor.shape, strict=True)})
    return [sizes[str(n.meta["val"])] if t is None else t for n, t in pairs]


def casts(gm):
    return sum(1 for n in gm.graph.nodes if getattr(n.meta.get("val"), "dtype", None) == E4M3)


NOT_BY_MEANING = ("deepgemm-ue8m0", "deepseek-ue8m0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [n for n in NAMED if n not in NOT_BY_MEANING])
def test_every_librarys_arithmetic_becomes_part_of_the_fused_op(name, dtype):
    spelling = getattr(quantizations, name.replace("-", "_"))

    def f(x, r, w, scale):
        h = r + all_reduce(x)
        return *spelling(llama(h, w), scale), h

    site, _ = check(f, inputs(dtype))
    found, named = Quantizer.parse(site.quantizer), NAMED[name]
    assert (found.granularity, found.dtype, found.floor) == (named.granularity, named.dtype, named.floor)
    assert site.pattern.endswith("rms_norm+quantize") and "quantized: e4m3 " in site.detail


@pytest.mark.parametrize("name", ["torchao-rowwise", "vllm-static", "deepseek-group128"])
def test_symbolic_rows_and_rows_flattened_for_the_product(name):
    spelling = getattr(quantizations, name.replace("-", "_"))

    def f(x, r, w, scale):
        h = r + all_reduce(x)
        q, scales = spelling(llama(h, w).reshape(-1, H), scale)
        return q.view(h.shape), scales, h

    check(f, dynamic=(0, 1))


def test_e5m2_without_a_clamp():
    def f(x, r, w):
        n = llama(r + all_reduce(x), w)
        scale = n.abs().amax(-1, keepdim=True).float() / torch.finfo(torch.float8_e5m2).max
        return (n.float() / scale).to(torch.float8_e5m2), scale

    site, _ = check(f, inputs()[:3])
    assert Quantizer.parse(site.quantizer) == Quantizer(dtype="e5m2", saturate="none")


def test_deepgemms_cast_which_pads_into_a_buffer():
    def f(x, r, w):
        n = llama(r + all_reduce(x), w).view(-1, H)
        padded = torch.empty_like(n).fill_(0)
        padded[:, :H] = n
        blocks = padded.view(len(n), -1, 128)
        scale = blocks.abs().float().amax(dim=2).view(len(n), -1).clamp(1e-4) / 448.0
        return (blocks * (1.0 / scale.unsqueeze(2))).to(E4M3).view(len(n), H)[:, :H].contiguous(), scale

    site, _ = check(f, inputs()[:3])
    wanted = Quantizer(granularity="group128", floor=1e-4, apply="mul_recip", saturate="none")
    assert Quantizer.parse(site.quantizer) == wanted


def test_each_of_several_products_quantizes_for_itself_and_the_router_reads_the_norm():
    def f(x, r, w, scale):
        h = r + all_reduce(x)
        n = llama(h, w)
        # Spelled differently, so that no compiler merges them.
        return (
            *quantizations.torchao_rowwise(n, scale),
            *quantizations.torchao_rowwise(n.view(-1, H), scale),
            *quantizations.torchao_rowwise(n.unsqueeze(0), scale),
            n @ n.transpose(-1, -2),
            h,
        )

    site, new = check(f)
    (fused,) = (n for n in new.graph.nodes if n.target is QUANT)
    assert fused.args[-1] is True  # keep_normed
    assert not any("amax" in str(n.target) for n in new.graph.nodes)
    assert site.note == ""


def test_what_only_the_products_read_is_not_kept():
    def f(x, r, w, scale):
        return quantizations.vllm_token(llama(r + all_reduce(x), w), scale)

    _, new = check(f)
    (fused,) = (n for n in new.graph.nodes if n.target is QUANT)
    assert fused.args[-1] is False


def test_of_different_static_scales_one_is_fused_and_the_site_says_so():
    def f(x, r, w, scale):
        n = llama(r + all_reduce(x), w)
        other = scale.new_full((), 0.5)
        return *(quantizations.vllm_static(n, s)[0] for s in (scale, other)), n.sum(-1)

    site, _ = check(f)
    assert "one of 2 different quantizations" in site.note
    assert site.note in site.detail


def test_the_factor_may_be_what_the_model_keeps():
    def f(x, r, w):
        n = llama(r + all_reduce(x), w)
        factor = torch.full_like(n[..., :1], 448.0, dtype=torch.float32) / n.abs().amax(-1, keepdim=True).float()
        return (n.float() * factor).clamp(-448.0, 448.0).to(E4M3), factor

    site, _ = check(f, inputs()[:3])
    assert Quantizer.parse(site.quantizer).returned == "reciprocal"


def test_one_scale_for_all_of_a_single_row_is_one_a_row():
    def f(x, r, w):
        n = llama(r + all_reduce(x), w)
        scale = (n.abs().amax(dim=(0, 1, 2), keepdim=True) / 448.0).float()  # torchao's PerTensor()
        return (n.float() / scale).clamp(-448.0, 448.0).to(E4M3), scale.reshape(1, 1)

    site, _ = check(f, inputs(shape=(1, 1, H))[:3])
    assert Quantizer.parse(site.quantizer).granularity == "token"


def test_scales_that_are_also_repeated_for_groups():
    def f(x, r, w, scale):
        q, scales = quantizations.torchao_rowwise(llama(r + all_reduce(x), w), scale)
        return q, scales, scales.unsqueeze(-1).expand(2, 3, 2, 1) * 2, 1 / scales

    check(f)


def _per_tensor(n, scale):
    return quantizations.torchao_static(n, n.abs().max().float() / 448.0)[0]


def _per_tensor_by_dimensions(n, scale):
    return quantizations.torchao_static(n, n.abs().amax(dim=(0, 1, 2)).float() / 448.0)[0]


def _in_the_input_dtype(n, scale):
    return (n / scale).clamp(-448.0, 448.0).to(E4M3)


def _groups_of_64(n, scale):
    blocks = n.unflatten(-1, (-1, 64)).float()
    return (blocks / (blocks.abs().amax(-1, keepdim=True) / 448.0)).to(E4M3).flatten(-2)


def _other_constant(n, scale):
    return (n.float() / (n.abs().amax(-1, keepdim=True).float() / 447.0)).to(E4M3)


def _other_scales(n, scale):
    amax = n.abs().amax(-1, keepdim=True).float().clamp(min=1e-4)
    return (n.float() * (torch.full_like(amax, 448.0) / amax)).to(E4M3), amax / 448.0


def _columns_moved(n, scale):
    return quantizations.torchao_static(n.roll(1, -1), scale)[0]


def _columns_moved_by_a_pad(n, scale):
    return quantizations.torchao_static(torch.nn.functional.pad(n, (1, -1)), scale)[0]


def _scaled_by_columns(n, scale):
    square = n.view(-1, H)[:1].expand(H, H)
    return (square.float() / (square.abs().amax(-1).float() / 448.0)).to(E4M3)


@pytest.mark.parametrize(
    ("quantize", "why"),
    [
        (_per_tensor, "taken of several rows together"),
        (_per_tensor_by_dimensions, "taken of several rows together"),
        (_in_the_input_dtype, "computed in torch.bfloat16"),
        (_groups_of_64, "taken of 64 values"),
        (_other_constant, "div stands between"),
        (_other_scales, "read for scales other than"),
        (_columns_moved, "roll"),
        (_columns_moved_by_a_pad, "constant_pad_nd"),
        (_scaled_by_columns, "is not understood"),
    ],
)
def test_what_no_quantizer_repeats_fuses_without_it_and_says_why(quantize, why):
    def f(x, r, w, scale):
        h = r + all_reduce(x)
        return quantize(llama(h, w), scale), h

    site, _ = check(f, quantized=False)
    assert why in site.note and site.note in site.detail


def test_a_scale_that_meets_columns_is_none_of_a_row_however_square_the_input():
    def f(x, r, w):
        n = llama(r + all_reduce(x), w)
        return (n.float() / (n.abs().amax(-1).float() / 448.0)).to(E4M3)

    site, _ = check(f, inputs(shape=(H, H))[:3], quantized=False)
    assert "is not understood" in site.note


def test_a_norm_that_nothing_quantizes_has_no_note():
    def f(x, r, w):
        h = r + all_reduce(x)
        n = llama(h, w)
        return (n @ n.transpose(-1, -2)).to(E4M3), n.float().sum(-1), h

    site, _ = check(f, inputs()[:3], quantized=False)
    assert site.note == ""


def test_post_norm_is_fused_without_its_quantization():
    def f(x, r, w, scale):
        n = llama(all_reduce(x), w)
        return r + n, quantizations.vllm_static(n, scale)[0]

    site, _ = check(f, quantized=False)
    assert "residual is added to it" in site.note


def test_a_scale_that_is_computed_after_the_norm():
    def alone(x, r, w, scale):
        n = llama(r + all_reduce(x), w)
        return quantizations.vllm_static(n, scale * 2)[0]

    check(alone)

    def read_before(x, r, w, scale):
        n = llama(r + all_reduce(x), w)
        return n @ n.transpose(-1, -2), quantizations.vllm_static(n, scale * 2)[0]

    site, _ = check(read_before, quantized=False)
    assert "computed after its result is first read" in site.note


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_with_symbolic_rows_it_has_the_bits_of_eager_mode(inner):
    def f(x, r, w, scale):
        h = r + all_reduce(x)
        return *quantizations.torchao_rowwise(llama(h, w).reshape(-1, H), scale), h

    torch._dynamo.reset()
    tpfuse.clear_reports()
    options = {"tpfuse.policy": "all", "tpfuse.inner": inner, "tpfuse.verify": True}
    quant_scheme.forget()
    with torch.inference_mode():
        compiled = torch.compile(f, backend="tpfuse", options=options, dynamic=True)
        for shape in ((2, 3, H), (4, 5, H)):
            given = inputs(shape=shape)
            assert same(f(*given), compiled(*given))
    (report,) = tpfuse.reports()
    assert report.sites[0].quantizer == str(NAMED["torchao-rowwise"])


# -- operators of other libraries ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library():
    lib = torch.library.Library("quantizing", "FRAGMENT")
    lib.define("token(Tensor x, bool odd=False) -> (Tensor, Tensor)")
    lib.define("static(Tensor(a!) result, Tensor x, Tensor scale) -> ()")

    def token(x, odd=False):
        return quantizations.vllm_token(x, None)

    def static(result, x, scale):
        result.copy_(quantizations.vllm_static(x, scale)[0])

    lib.impl("token", token, "CompositeExplicitAutograd")
    lib.impl("static", static, "CPU")
    torch.library.register_fake("quantizing::static", lambda result, x, scale: None, lib=lib)
    yield torch.ops.quantizing
    lib._destroy()


@pytest.fixture()
def registered(library):
    register_quantizer(library.token, NAMED["vllm-token"])
    register_quantizer(
        library.static, str(NAMED["vllm-static"]), input="x", static_scale="scale", quantized="result", scales=None
    )
    yield library
    unregister_quantizer(library.token)
    unregister_quantizer(library.static)


def test_a_registered_operator_becomes_part_of_the_fused_op(registered):
    def f(x, r, w):
        h = r + all_reduce(x)
        q, scales = registered.token(llama(h, w).view(-1, H))
        return q.view(h.shape), scales, h

    site, new = check(f, inputs()[:3])
    assert Quantizer.parse(site.quantizer) == NAMED["vllm-token"]
    assert graphs.count(new, registered.token.default) == 0


@pytest.mark.parametrize("version", [1, 2])
def test_a_registered_operator_that_writes_its_result(registered, version):
    def f(x, r, w, scale):
        h = r + all_reduce(x)
        n = llama(h, w)
        result = torch.empty_like(n, dtype=E4M3)
        registered.static(result, n, scale)
        return result, h

    with torch._inductor.config.patch(enable_auto_functionalized_v2=version == 2):  # vLLM compiles with the first
        site, _ = check(f)
    assert Quantizer.parse(site.quantizer) == NAMED["vllm-static"]


def test_an_operator_with_other_arguments_or_unknown_is_left_alone(library, registered):
    def odd(x, r, w):
        return registered.token(llama(r + all_reduce(x), w), True)

    site, _ = check(odd, inputs()[:3], quantized=False)
    assert "quantizing.token.default" in site.note
    unregister_quantizer(library.token)

    def plain(x, r, w):
        return library.token(llama(r + all_reduce(x), w))

    site, _ = check(plain, inputs()[:3], quantized=False)
    assert "quantizing.token.default" in site.note


def test_an_operator_with_other_bits_for_some_inputs_needs_relaxed_numerics(library):
    register_quantizer(library.token, NAMED["vllm-token"], exact=False)
    try:
        gm = graphs.trace(lambda x, r, w: library.token(llama(r + all_reduce(x), w)), inputs()[:3])
        (kept,) = graphs.fused_copy(gm, CHECKED)[1].sites
        assert kept.quantizer is None and "numerics='relaxed' accepts that" in kept.note
        (fused,) = graphs.fused_copy(gm, PassOptions("all", "relaxed"))[1].sites
        assert fused.quantizer == str(NAMED["vllm-token"]) and "other bits" in fused.detail
    finally:
        unregister_quantizer(library.token)


def test_vllms_own_operators_with_relaxed_numerics():
    lib = torch.library.Library("_C", "FRAGMENT")
    lib.define(
        "static_scaled_fp8_quant(Tensor(a!) result, Tensor input, Tensor scale, (int, int)? group_shape=None) -> ()"
    )
    lib.define(
        "dynamic_per_token_scaled_fp8_quant(Tensor(a!) result, Tensor input, Tensor(b!) scale, Tensor? scale_ub) -> ()"
    )
    for name in ("static_scaled_fp8_quant", "dynamic_per_token_scaled_fp8_quant"):
        torch.library.register_fake(f"_C::{name}", lambda *args: None, lib=lib)
        lib.impl(name, lambda *args: None, "CPU")  # for tracing; what the kernels compute is declared

    def f(x, r, w, scale):
        h = r + all_reduce(x)
        n, m = llama(h, w), llama(h + all_reduce(x * 2), w)
        static, token = (torch.empty_like(t, dtype=E4M3) for t in (n, m))
        scales = torch.empty(*m.shape[:-1], 1)
        torch.ops._C.static_scaled_fp8_quant(static, n, scale)
        torch.ops._C.dynamic_per_token_scaled_fp8_quant(token, m, scales, None)
        return static, token, scales

    try:
        gm = graphs.trace(f, inputs())
        new, report = graphs.fused_copy(gm, PassOptions("all", "relaxed"))
        found = [Quantizer.parse(site.quantizer) for site in report.sites]
        assert [(q.granularity, q.apply) for q in found] == [("tensor", "mul_recip"), ("token", "div")]
        assert graphs.count(new, QUANT) == 2 and not any("functionalized" in str(n.target) for n in new.graph.nodes)
        assert all(s.quantizer is None and "_C::" in s.note for s in graphs.fused_copy(gm)[1].sites)
    finally:
        lib._destroy()


def test_a_wrong_registration_is_found_by_verify(library):
    register_quantizer(library.token, NAMED["torchao-rowwise"])
    try:
        gm = graphs.trace(lambda x, r, w: library.token(llama(r + all_reduce(x), w)), inputs()[:3])
        with pytest.raises(VerificationError, match="quantized|scales"):
            graphs.fused_copy(gm, CHECKED)
    finally:
        unregister_quantizer(library.token)


def test_a_registration_is_part_of_the_compile_caches_key(library):
    before = inductor.registered_spellings()
    register_quantizer(library.token, NAMED["vllm-token"])
    try:
        assert inductor.registered_spellings() != before
    finally:
        unregister_quantizer(library.token)
    assert inductor.registered_spellings() == before


def test_a_report_shows_how_a_norm_was_quantized_and_what_stayed_outside():
    def f(x, r, w, scale):
        h = r + all_reduce(x)
        g = h + all_reduce(x * 2)
        return quantizations.vllm_static(llama(h, w), scale)[0], *_other_scales(llama(g, w), scale), g

    gm = graphs.trace(f, inputs())
    _, report = graphs.fused_copy(gm, CHECKED)
    assert report.summary().endswith("2 all-reduces, 2 fused (1 quantized), 0 kept")
    shown = table.plain(report)
    assert "rms_norm + quantize" in shown and "left outside of the op (1)" in shown
    assert words.quantizer(report.sites[0]) == NAMED["vllm-static"].describe()
    assert GraphReport.from_json(report.to_json()) == report


def test_registrations_that_make_no_sense_are_refused(library):
    with pytest.raises(TypeError, match="expected an operator"):
        register_quantizer(print, NAMED["vllm-token"])
    with pytest.raises(ValueError, match="static_scale is None"):
        register_quantizer(library.token, NAMED["vllm-static"])
    with pytest.raises(ValueError, match=r"no arguments \['wrong'\]; it has x, odd"):
        register_quantizer(library.token, NAMED["vllm-token"], arguments={"wrong": 1})
    with pytest.raises(ValueError, match="quantizer"):
        register_quantizer(library.token, "nonsense")
