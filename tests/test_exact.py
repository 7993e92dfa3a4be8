"""Real sums on gloo ranks: the fused graph's outputs equal the unfused graph's bit for bit, on every rank."""

from __future__ import annotations

import pytest
import torch
from ranks import RankPool
from tpfuse.ops import flavour

H = 64
SHAPES = [(0, H), (1, H), (2, H), (17, H), (0, 3, H), (1, 1, H), (2, 1, H), (1, 17, H)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(rank, every, flavour_name, dtype, weight_dtype, variant):
    """Shapes of one flavour and dtype on one rank; returns the number of fused sites and hashes of the outputs."""
    import graphs
    from tpfuse.ops.flavour import NAMED
    from tpfuse.ops.reference import rms_norm

    chosen = NAMED[flavour_name]

    def layer(x, r, w, b):
        y = graphs.all_reduce(x * 1.5)
        if variant == "bias":
            y = y + b
        if variant == "scale":
            y = y * 0.22
        if variant == "post":
            n = rms_norm(y, w, 1e-5, chosen)
            return n, r + n
        if chosen.reads == "unrounded" and variant != "none":
            h = r.float() + y.float()
            return rms_norm(h, w, 1e-5, chosen, y.dtype), h.to(y.dtype)
        h = y if variant == "none" else r + y
        return rms_norm(h, w, 1e-5, chosen), h

    out = []
    # What is made of rows and dimensions does not depend on flavour and dtype.
    of_rows = (flavour_name, variant) == ("llama", "add") and (every or dtype == torch.bfloat16)
    for shape in SHAPES if of_rows else SHAPES[3::2] if every else SHAPES[-1:]:
        shared, mine = torch.Generator().manual_seed(1), torch.Generator().manual_seed(100 + rank)
        x = (torch.randn(shape, generator=mine) * 2).to(dtype)
        r = (torch.randn(shape, generator=shared) * 2).to(dtype)
        w = None if chosen.gain == "none" else torch.randn(H, generator=shared).to(weight_dtype)
        b = torch.randn(H, generator=shared).to(dtype)
        unfused = graphs.trace(layer, (x, r, w, b))
        fused, report = graphs.fused_copy(unfused)
        assert graphs.count(fused) == 1 and graphs.all_reduces_left(fused) == 0
        # In fp32 there is nothing to round, and without a residual nothing is added.
        unrounded = chosen.reads == "unrounded" and variant != "none" and dtype != torch.float32
        assert report.fused[0].flavour.endswith("/unrounded") == unrounded, report.fused[0].flavour
        with torch.no_grad():
            outputs = [fused(x, r, w, b), unfused(x, r, w, b), layer(x, r, w, b)]
        for a, b_, c in zip(*outputs, strict=True):
            assert a.dtype == b_.dtype == c.dtype and a.shape == b_.shape, (shape, a.dtype, b_.dtype)
            assert torch.equal(a, b_) and torch.equal(a, c), (flavour_name, dtype, shape, variant)
        out.append((len(report.fused), [tuple(t.double().flatten().tolist()) for t in outputs[0]]))
    return out


def compiled(rank, world_size, flavour_name, dtype):
    """The same through ``torch.compile``, with ``dist.all_reduce`` in place and as many rows as ranks have in common."""
    import torch.distributed as dist
    from tpfuse.ops.flavour import NAMED
    from tpfuse.ops.reference import rms_norm

    import tpfuse

    chosen = NAMED[flavour_name]

    def layer(x, r, w):
        y = x * 1.5
        dist.all_reduce(y)
        r += y
        return rms_norm(r, w, 1e-5, chosen)

    generator = torch.Generator().manual_seed(rank)
    outputs = []
    for backend, options in (("aot_eager", None), ("tpfuse", {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all"})):
        torch._dynamo.reset()
        generator.manual_seed(rank)
        x = torch.randn(2, 3, H, generator=generator).to(dtype)
        r, w = torch.ones(2, 3, H, dtype=dtype), torch.linspace(-2, 2, H, dtype=dtype)
        with torch.no_grad():
            outputs.append((torch.compile(layer, backend=backend, options=options)(x, r, w), r))
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)
    (report,) = tpfuse.reports()
    tpfuse.clear_reports()
    return len(report.fused)


def run_cases(rank, world_size, every, cases):
    return [case(rank, every, *c) for c in cases]


def cases() -> list[tuple[str, torch.dtype, torch.dtype, str]]:
    every = [(name, dtype, dtype, "add") for name in flavour.NAMED for dtype in DTYPES]
    every += [("llama", torch.bfloat16, torch.bfloat16, v) for v in ("bias", "scale", "post", "none")]
    every += [("gemma", torch.bfloat16, torch.bfloat16, "post"), ("olmo2", torch.float16, torch.float16, "post")]
    every += [("vllm", torch.bfloat16, torch.bfloat16, v) for v in ("bias", "scale", "none")]
    every += [(name, torch.bfloat16, torch.float32, "add") for name in ("llama", "olmo2", "gemma", "vllm", "sglang")]
    return every


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world_size", "every"), [(2, False), *(pytest.param(size, True, marks=pytest.mark.slow) for size in (2, 3))]
)
def test_fused_equals_unfused_bit_for_bit(world_size, every):
    with RankPool(world_size) as pool:
        results = pool.run(run_cases, every, cases())
        for name in ("llama", "gemma", "olmo2") if every else ("gemma",):
            assert pool.run(compiled, name, torch.bfloat16) == [1] * world_size
    for i, name in enumerate(cases()):
        for rank in range(world_size):
            assert all(count == 1 for count, _ in results[rank][i]), f"{name}: not fused on rank {rank}"
            assert [v for _, v in results[rank][i]] == [v for _, v in results[0][i]], f"{name}: ranks differ"
