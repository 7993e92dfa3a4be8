"""A sum that is multiplied by a scalar tensor: folded where its value is the graph's for good, else refused, or relaxed."""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist
from tpfuse.passes import GraphReport, PassOptions

import tpfuse

H = 32
EXACT = PassOptions(policy="all", verify=True)
RELAXED = PassOptions(policy="all", numerics="relaxed", verify=True)


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(2)
    yield
    dist.destroy_process_group()


def norm(h, w):
    f = h.float()
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


def random(*shape, dtype, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def one(f, *args, options=EXACT) -> GraphReport:
    """Rewrite, compare bits on fresh inputs, return the report."""
    gm = graphs.trace(f, args)
    new, report = graphs.fused_copy(gm, options)
    assert graphs.equal(graphs.run(gm, *args), graphs.run(new, *args))
    return report


# A value of bf16 that is no power of two: rounding shows.
LITERALS = {
    "in the sum's dtype": lambda x: torch.tensor(45.25, dtype=x.dtype),
    "of another dtype": lambda x: torch.tensor(45.25),
    "cast on the way": lambda x: torch.tensor(45.2548, dtype=torch.float32).to(x.dtype),
    "a root": lambda x: torch.tensor(2048**0.5, dtype=x.dtype),
    "an integer": lambda x: torch.tensor(12),
    "filled": lambda x: torch.full((), 45.25, dtype=x.dtype),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spelling", LITERALS)
def test_a_literal_is_a_number(spelling, dtype):
    def f(x, r, w):
        h = r + graphs.all_reduce(x) * LITERALS[spelling](x)
        return norm(h, w), h

    report = one(f, *(random(5, H, dtype=dtype, seed=s) for s in (1, 2)), random(H, dtype=dtype))
    assert [site.pattern for site in report.fused] == ["all_reduce+scale+add+rms_norm"]


def test_a_literal_between_sum_and_norm_of_an_embedding():
    def f(x, w):
        h = graphs.all_reduce(x) * torch.tensor(45.25, dtype=x.dtype)
        return norm(h, w), h

    report = one(f, random(5, H, dtype=torch.bfloat16), random(H, dtype=torch.bfloat16))
    assert [site.pattern for site in report.fused] == ["all_reduce+scale+rms_norm"]


def refused(f, *args) -> str:
    (site,) = one(f, *args).sites
    assert site.reason == "scale-not-constant"
    return site.detail


def test_what_the_dtype_does_not_hold_is_refused():
    """A CPU multiplies by all bits of an fp32 scalar, a GPU by what is left of it in bf16."""

    def f(x, w):
        h = graphs.all_reduce(x) * torch.tensor(0.22)
        return norm(h, w), h

    args = random(5, H, dtype=torch.bfloat16), random(H, dtype=torch.bfloat16)
    assert "no value of torch.bfloat16" in refused(f, *args)


def scaled(x, scale, w):
    h = graphs.all_reduce(x) * scale
    return norm(h, w), h


BUFFER = random(5, H, dtype=torch.bfloat16), torch.tensor(45.25, dtype=torch.bfloat16), random(H, dtype=torch.bfloat16)


def test_a_buffer_is_refused_for_its_value_may_change():
    assert "an input of the graph (placeholder)" in refused(scaled, *BUFFER)
    assert "the graph computes" in refused(lambda x, s, w: scaled(x, s.sqrt(), w), *BUFFER)


def test_a_buffer_written_between_two_calls_is_read_again():
    """Nothing is compiled anew for it: a number folded from it would be stale."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Buffer(torch.tensor(8.0))

        def forward(self, x, w):
            return scaled(x, self.scale, w)

    model, args = Model(), (random(5, H, dtype=torch.float32), random(H, dtype=torch.float32))
    for numerics, fused in (("exact", 0), ("relaxed", 1)):
        torch._dynamo.reset()
        tpfuse.clear_reports()
        options = {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all", "tpfuse.numerics": numerics}
        compiled = torch.compile(model, backend="tpfuse", options=options)
        with torch.no_grad(), tpfuse.expect(fused=fused):
            for value in (8.0, 3.0):
                model.scale.fill_(value)
                assert graphs.equal(compiled(*args), model(*args))
        assert len(tpfuse.reports()) == 1


def test_relaxed_multiplies_before_the_reduction():
    """Where one rank alone gives to a row, as in an embedding cut by tokens, that has the model's bits."""
    report = one(scaled, *BUFFER, options=RELAXED)
    (site,) = report.fused
    assert site.pattern == "all_reduce+scale+rms_norm" and "relaxed" in site.detail


def test_relaxed_with_a_residual():
    def f(x, s, r, w):
        h = r + graphs.all_reduce(x) * s
        return norm(h, w), h

    x, s, w = BUFFER
    assert len(one(f, x, s, random(5, H, dtype=x.dtype, seed=4), w, options=RELAXED).fused) == 1


@torch.no_grad()
def test_inductor_gives_a_literal_another_spelling():
    def f(x, w):
        h = graphs.all_reduce(x) * torch.tensor(45.25, dtype=x.dtype)
        return norm(h, w), h

    options = {"tpfuse.policy": "all", "tpfuse.verify": True}
    with tpfuse.expect(fused=1):
        torch.compile(f, backend="tpfuse", options=options)(BUFFER[0], BUFFER[2])
