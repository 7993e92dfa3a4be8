"""Random spellings of a quantization: whatever the pass makes of one, the bits are those of the graph as it was."""

from __future__ import annotations

import random

import graphs
import pytest
import torch
import torch.distributed as dist
from graphs import all_reduce
from tpfuse.passes import PassOptions
from tpfuse.passes.quant_scheme import same_bytes

H = 256
CHOICES = {
    "normed": (torch.bfloat16, torch.float16, torch.float32),
    "fp8": (torch.float8_e4m3fn, torch.float8_e5m2),
    "flat": (True, False),
    "groups": (True, False),
    "amax": ("amax", "max", "wide amax", "amax, then wide"),
    "keepdim": (True, False),
    "bound": ("", "amax", "scale"),
    "least": (1e-12, 1e-4, 2.0**-10),
    "scale": ("amax / max", "amax * (1 / max)", "max / amax"),
    "power of two": (False, False, True),
    "widened": (True, True, False),
    "apply": ("x / scale", "x * scale.reciprocal()", "x * (1 / scale)"),
    "rounded": (False, False, True),
    "clamp": ("clamp", "clamp_min, clamp_max", ""),
}


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(4)
    yield
    dist.destroy_process_group()


def quantized(n, c):
    """Rows and scales as the choices ``c`` spell it."""
    largest = torch.finfo(c["fp8"]).max
    x = n.reshape(-1, H) if c["flat"] else n
    x = x.unflatten(-1, (-1, 128)) if c["groups"] else x
    magnitudes = (x.float() if c["amax"] == "wide amax" else x).abs()
    amax = magnitudes.max(-1, c["keepdim"])[0] if c["amax"] == "max" else magnitudes.amax(-1, c["keepdim"])
    amax = amax.float() if c["amax"] == "amax, then wide" else amax
    amax = amax if c["keepdim"] else amax.unsqueeze(-1)
    amax = amax.clamp(min=c["least"]) if c["bound"] == "amax" else amax
    ways = {"amax / max": lambda: amax / largest, "amax * (1 / max)": lambda: amax * (1.0 / largest)}
    scale = ways.get(c["scale"], lambda: torch.full_like(amax, largest) / amax)()
    scale = scale.clamp(min=c["least"]) if c["bound"] == "scale" else scale
    scale = torch.exp2(torch.ceil(torch.log2(scale))) if c["power of two"] else scale
    scale, x = (scale.float(), x.float()) if c["widened"] else (scale, x)
    ways = {"x / scale": lambda: x / scale, "x * (1 / scale)": lambda: x * (1.0 / scale)}
    y = x * scale if c["scale"] == "max / amax" else ways.get(c["apply"], lambda: x * scale.reciprocal())()
    y = y.to(n.dtype) if c["rounded"] else y
    ways = {"clamp": lambda: y.clamp(-largest, largest), "": lambda: y}
    y = ways.get(c["clamp"], lambda: torch.clamp_max(torch.clamp_min(y, -largest), largest))().to(c["fp8"])
    return y.reshape(n.shape), scale.squeeze(-1)


def rows(dtype, seed):
    """A residual, a partial sum and a weight; rows of zeros, with NaN, with infinity, and tiny ones."""
    g = torch.Generator().manual_seed(seed)
    x, r = (torch.randn(2, 3, H, generator=g) * 2 for _ in range(2))
    x[0, 0], r[0, 0] = 0, 0
    x[0, 1, 5], x[0, 2, 7] = float("nan"), float("inf")
    x[1, 0] *= 1e-20
    r[1, 0] *= 1e-20
    return x.to(dtype), r.to(dtype), torch.randn(H, generator=g).to(dtype)


def fused(seed):
    """Whether the quantization of one random spelling was fused; its bits are compared."""
    generator = random.Random(seed)
    c = {name: generator.choice(values) for name, values in CHOICES.items()}
    site = site_of(lambda n: quantized(n, c), c["normed"], c)
    assert bool(site.quantizer) != bool(site.note), (c, site)
    return site.quantizer is not None


def site_of(quantize, dtype=torch.bfloat16, what=None):
    """The fused site of a block whose norm is quantized so; its bits are compared."""

    def f(x, r, w):
        h = r + all_reduce(x)
        wide = h.float()
        n = w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(h.dtype)
        return *quantize(n), h

    gm = graphs.trace(f, rows(dtype, 0))
    new, report = graphs.fused_copy(gm, PassOptions("all", verify=True))
    (site,) = report.sites
    assert site.fused, (what, site)
    for given in (rows(dtype, 1), rows(dtype, 2)):
        pairs = zip(graphs.run(gm, *given), graphs.run(new, *given), strict=True)
        assert all(same_bytes(a, b) for a, b in pairs), (what, site)
    return site


@pytest.mark.parametrize(("first", "count"), [(0, 12), pytest.param(12, 200, marks=pytest.mark.slow)])
@pytest.mark.long
def test_random_spellings_keep_their_bits(first, count):
    made = [fused(seed) for seed in range(first, first + count)]
    assert sum(made) > count // 2, "most have a quantizer"


def by_row(n, derive):
    scale = derive(n.abs().amax(-1, keepdim=True).double() / 448).float()
    return (n.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def between(n, low, high):
    return (torch.clamp(n.float() / torch.tensor([0.5]), low, high).to(torch.float8_e4m3fn),)


ODD = {
    "a power of two in fp64": lambda n: by_row(n, lambda scale: torch.exp2(torch.ceil(torch.log2(scale)))),
    "a magnitude in fp64": lambda n: by_row(n, torch.abs),
    "exp2 in fp64": lambda n: (torch.exp2(n.double()).float().to(torch.float8_e4m3fn),),
    "integers times a number in fp64": lambda n: (
        (n.to(torch.int32) * torch.full((), 2.0, dtype=torch.float64)).float().to(torch.float8_e4m3fn),
    ),
    "bounds that make more rows": lambda n: between(
        n, torch.full((2, 1, 1, 1), -448.0), torch.full((2, 1, 1, 1), 448.0)
    ),
    "bounds in the other order": lambda n: between(n, torch.tensor(448.0), torch.tensor(-448.0)),
    "a bound that is NaN": lambda n: between(n, torch.tensor(float("nan")), torch.tensor(448.0)),
    "a bound that is written": lambda n: between(n, torch.tensor(-448.0).mul_(0.5), torch.tensor(448.0)),
}


@pytest.mark.parametrize("name", ODD)
def test_what_no_quantizer_has_stays_outside_and_is_no_failure(name):
    site = site_of(ODD[name])
    assert site.quantizer is None and "quantizes the norm, but" in site.note, site
    assert "internal" not in site.note


def test_bounds_that_the_graph_holds_are_read():
    assert site_of(lambda n: between(n, torch.tensor(-448.0), torch.tensor(448.0))).quantizer


def test_a_mask_in_bytes_is_no_quantization():
    site = site_of(lambda n: ((n > 0).to(torch.uint8), n))
    assert site.quantizer is None and site.note == ""
