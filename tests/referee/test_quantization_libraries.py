"""How quantization libraries quantize what a linear layer reads, each spelling written anew after the library's own file.

Behind a fused norm each becomes part of the op, bit for bit, or the report says what differs.
"""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist
from graphs import all_reduce
from ranks import RankPool
from tpfuse.ops import Quantizer
from tpfuse.ops.quantizer import FBGEMM_TOKEN, TORCHAO_STATIC
from tpfuse.passes import PassOptions
from tpfuse.passes.quant_scheme import same_bytes

import tpfuse

H = 256
E4M3, MAX = torch.float8_e4m3fn, 448.0
INVERSE = str(FBGEMM_TOKEN)
LIBRARY = torch.library.Library("tpfuse_referee", "DEF")
LIBRARY.define("quantize_op(Tensor input, Tensor amax, int num_bits, int exponent_bits) -> Tensor")
LIBRARY.define("product(Tensor input, Tensor weight) -> Tensor")
LIBRARY.impl("quantize_op", lambda x, amax, bits, exponent: x.to(E4M3).to(x.dtype), "CompositeExplicitAutograd")
LIBRARY.impl("product", lambda x, w: x @ w.t(), "CompositeExplicitAutograd")
torch.library.register_fake("tpfuse_referee::quantize_op", lambda x, *_: torch.empty_like(x), lib=LIBRARY)
torch.library.register_fake("tpfuse_referee::product", lambda x, w: x.new_empty(*x.shape[:-1], w.shape[0]), lib=LIBRARY)


@pytest.fixture
def fake_group():
    graphs.start_fake_group(2)
    yield
    dist.destroy_process_group()


def llama(h, w):
    f = h.float()
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


def compressed_tensors_static(n, scale):
    """compressed-tensors 0.20, ``lifecycle/forward.py`` and ``round_to_quantized_type_args``: bounds are tensors, and what
    is cast to fp8 is widened to the dtype of the quotient and cast once more."""
    low, high = torch.tensor(-MAX), torch.tensor(MAX)
    quotient = n / scale.reshape(1)
    rounded = torch.clamp(quotient, low, high).to(E4M3).to(quotient.dtype)
    return rounded.to(E4M3), rounded.float() * scale


def compressed_tensors_token(n, scale):
    """compressed-tensors 0.20, ``utils/helpers.py``, ``calculate_qparams``: a scale of 0 becomes the eps of its dtype."""
    low, high = (f(n, -1, keepdim=True) for f in (torch.amin, torch.amax))
    low, high = torch.min(low, torch.zeros_like(low)), torch.max(high, torch.zeros_like(high))
    scale = torch.max(low.abs(), high.abs()) / MAX
    scale = torch.where(scale == 0, torch.tensor(torch.finfo(n.dtype).eps, dtype=n.dtype), scale)
    return torch.clamp(n / scale, torch.tensor(-MAX), torch.tensor(MAX)).to(E4M3), scale


def torchao_rowwise_training(n, scale):
    """torchao 0.18, ``float8/float8_utils.py``, ``amax_to_scale`` of ``Float8Linear`` with row-wise scales: derived in fp64."""
    factor = (MAX / torch.clamp(n.abs().amax(-1, keepdim=True).to(torch.float64), min=1e-12)).to(torch.float32)
    return (n.to(torch.float32) * factor).clamp(-MAX, MAX).to(E4M3), 1.0 / factor


def torchao_blockwise(n, scale):
    """torchao 0.18, ``blockwise_fp8_training/kernels.py``, ``torch_blockwise_scale_act_quant_lhs``: also bounded by infinity."""
    x = n.reshape(-1, 128)
    amax = torch.clamp(x.abs().max(dim=1, keepdim=True).values.to(torch.float64), min=1e-12, max=float("inf"))
    factor = (MAX / amax).to(torch.float32)
    return (x * factor).clamp(-MAX, MAX).to(E4M3).reshape(n.shape), 1.0 / factor.reshape(*n.shape[:-1], -1)


def torchao_power_of_two(n, scale):
    """torchao 0.18, ``_round_scale_down_to_power_of_2`` of its recipe ``rowwise``."""
    factor = (MAX / torch.clamp(n.abs().amax(-1, keepdim=True).to(torch.float64), min=1e-12)).to(torch.float32)
    factor = torch.exp2(torch.floor(torch.log2(factor)))
    return (n.to(torch.float32) * factor).clamp(-MAX, MAX).to(E4M3)


def torchao_int8(n, scale):
    """torchao 0.18, ``Int8DynamicActivationInt8WeightConfig``."""
    scale = (n.abs().amax(-1, keepdim=True) / 127.5).clamp(min=1.2e-7).float()
    return (n * (1.0 / scale)).round().clamp(-128, 127).to(torch.int8), scale


def modelopt_product(n, scale):
    """NVIDIA ModelOpt 0.47, ``backends/fp8_per_tensor_gemm.py``, ``_to_fp8``: an fp32 scale without dimensions."""
    return (n / scale).clamp(-MAX, MAX).to(E4M3)


def modelopt_tensor(n, scale):
    """NVIDIA ModelOpt 0.47, ``qtensor/fp8_tensor.py``, ``FP8QTensor.quantize`` without axis: one scale of all rows, in bf16."""
    scale = n.abs().max() / MAX
    return (n / scale.clone()).to(E4M3), scale


def modelopt_in_one_call(n, scale):
    """NVIDIA ModelOpt 0.47, ``tensor_quant.py``: ``tensorrt::quantize_op`` quantizes and widens again."""
    return torch.ops.tpfuse_referee.quantize_op(n, scale, 8, 4) * 1.0


REPEATED = {
    compressed_tensors_static: str(TORCHAO_STATIC),
    torchao_rowwise_training: INVERSE,
    torchao_blockwise: INVERSE.replace("token", "group128"),
}
DIFFERENT = {
    compressed_tensors_token: "puts another number in the place of some scales",
    torchao_power_of_two: "floor",
    torchao_int8: "to integers, where the fused op quantizes to fp8 alone",
    modelopt_product: "use x.float() / scale",
    modelopt_tensor: "taken of several rows together",
    modelopt_in_one_call: "quantizes the norm in one call and gives torch.bfloat16 back",
}


def rows(seed):
    """A partial sum, a residual, a weight and a scale; a row of zeros, one with NaN, one with infinity, tiny and large ones."""
    g = torch.Generator().manual_seed(seed)
    x, r = (torch.randn(7, H, generator=g) * 2 for _ in range(2))
    x[0], r[0], x[1, 3], x[2, 5] = 0, 0, float("nan"), float("inf")
    for row, magnitude in ((3, 1e-20), (4, 1e-12), (5, 1e4)):
        x[row] *= magnitude
        r[row] *= magnitude
    w = torch.randn(H, generator=g) * 2.0 ** torch.randint(-30, 5, (H,), generator=g)
    return x.bfloat16(), r.bfloat16(), w.bfloat16(), torch.tensor(0.037)


def fused(quantize, args):
    """The site of a block that quantizes its norm so; bits are compared."""

    def f(x, r, w, scale):
        h = r + all_reduce(x)
        return quantize(llama(h, w), scale), h

    gm = graphs.trace(f, args)
    new, report = graphs.fused_copy(gm, PassOptions("all", verify=True))
    (site,) = report.sites
    assert site.fused, site
    for seed in (1, 2, 3):
        pairs = zip(flat(graphs.run(gm, *rows(seed))), flat(graphs.run(new, *rows(seed))), strict=True)
        assert all(same_bytes(a, b) for a, b in pairs)
    return site


def flat(tree):
    return torch.utils._pytree.tree_leaves(tree)


@pytest.mark.parametrize("quantize", REPEATED, ids=lambda f: f.__name__)
def test_what_a_quantizer_repeats_becomes_part_of_the_op(quantize, fake_group):
    site = fused(quantize, rows(0))
    want, got = Quantizer.parse(REPEATED[quantize]), Quantizer.parse(site.quantizer)
    assert (got.granularity, got.derive, got.apply, got.floor) == (
        want.granularity,
        want.derive,
        want.apply,
        want.floor,
    )
    assert site.note == "", "equal quantizations count once"


@pytest.mark.parametrize("quantize", DIFFERENT, ids=lambda f: f.__name__)
def test_what_no_quantizer_repeats_says_what_differs(quantize, fake_group):
    site = fused(quantize, rows(0))
    assert site.quantizer is None
    assert DIFFERENT[quantize] in site.note and site.note in site.detail


def test_a_bound_that_a_module_holds_may_change_and_is_no_number(fake_group):
    def quantize(n, bound):
        return torch.clamp(n.float() / 0.5, -bound, bound).to(E4M3)

    site = fused(quantize, rows(0))
    assert site.quantizer is None and "clamp" in site.note


def test_a_scale_in_fp64_with_another_bound_keeps_its_bits(fake_group):
    """Where fp32 rounds the bound to one whose inverse is another, the arithmetic is no quantizer's."""

    def quantize(n, scale):
        amax = torch.clamp(n.abs().amax(-1, keepdim=True).double(), min=1 + 2.0**-25)
        return (n.float() * (448.0 * 1.25 / amax).float()).clamp(-MAX, MAX).to(E4M3)

    assert fused(quantize, rows(0)).quantizer is None


def test_the_quantization_behind_a_product_of_a_library_is_the_next_layers(fake_group):
    """optimum-quanto 0.2.7: ``quanto::qbytes_mm`` multiplies by int8 weights; what follows it is no quantization of the norm."""

    def quantize(n, scale):
        y = torch.ops.tpfuse_referee.product(n, torch.ones(H, H, dtype=n.dtype))
        return (y.float() / scale).to(E4M3)

    site = fused(quantize, rows(0))
    assert site.quantizer is None and site.note == ""


@pytest.mark.long
@pytest.mark.parametrize("quantize", REPEATED, ids=lambda f: f.__name__)
def test_inductor_splits_a_clamp_in_two_and_the_quantization_is_still_found(quantize, fake_group):
    def f(x, r, w, scale):
        h = r + all_reduce(x * 0.5)
        return quantize(llama(h, w), scale), h

    torch._dynamo.reset()
    tpfuse.clear_reports()
    options = {"tpfuse.policy": "all", "tpfuse.verify": True}
    with torch.no_grad():
        torch.compile(f, backend="tpfuse", dynamic=False, options=options)(*rows(0))
    (site,) = tpfuse.reports()[-1].sites
    assert site.quantizer is not None and site.note == "", site


def over_ranks(rank, world_size, name):
    """The quantizer over real sums, and whether the bits are those of the graph as it was."""
    quantize = {f.__name__: f for f in REPEATED}[name]

    def f(x, r, w, scale):
        y = x * 0.5
        dist.all_reduce(y)
        h = r + y
        return quantize(llama(h, w), scale), h

    def given():
        return rows(0)[0] * (rank + 1), *rows(1)[1:]

    results = {}
    for backend, options in (("aot_eager", None), ("tpfuse", {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all"})):
        torch._dynamo.reset()
        with torch.no_grad():
            results[backend] = torch.compile(f, backend=backend, dynamic=False, options=options)(*given())
    (site,) = tpfuse.reports()[-1].sites
    pairs = zip(flat(results["aot_eager"]), flat(results["tpfuse"]), strict=True)
    return site.quantizer, all(same_bytes(a, b) for a, b in pairs)


@pytest.mark.ranks
def test_over_two_ranks():
    with RankPool(2) as pool:
        for quantize in REPEATED:
            for quantizer, equal in pool.run(over_ranks, quantize.__name__):
                assert quantizer is not None and equal, quantize.__name__
