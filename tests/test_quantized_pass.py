"""The fp8 quantization behind a norm, in the spellings of several libraries: it becomes part of the fused op, bit for bit, or the site
fuses without it and says why.

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
from tpfuse.passes import PassOptions, register_quantizer, unregister_quantizer

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

    site, new = check(f, inputs(dtype))
    found, named = Quantizer.parse(site.quantizer), NAMED[name]
    assert (found.granularity, found.dtype, found.floor) == (named.granularity, named.dtype, named.floor)
    assert site.pattern.endswith("rms_norm+quantize") and "quantized: e4m3 " in site.detail
