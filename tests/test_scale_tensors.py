"""A sum times a scalar tensor: folded where its value is the graph's for good, else an operand, refused, or relaxed."""

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("numerics", [EXACT, RELAXED], ids=lambda o: o.numerics)
def test_a_tensor_of_the_sums_dtype_is_an_operand(numerics, dtype):
    """A buffer, and what the graph computes of one: each rank multiplies the sum by what its own holds, as the model does."""
    x, _, w = (t.to(dtype) for t in BUFFER)
    for scale, f in ((torch.tensor(45.25, dtype=dtype), scaled), (torch.tensor(45.2548), cast_scale)):
        (site,) = one(f, x, scale, w, options=numerics).fused
        assert site.pattern == "all_reduce+scale+rms_norm" and "relaxed" not in site.detail


def cast_scale(x, scale, w):
    return scaled(x, scale.to(x.dtype), w)


@pytest.mark.parametrize("order", ["bias, scale", "scale, bias", "scale, addend", "scale"])
@pytest.mark.parametrize("scale", ["number", "tensor"])
def test_scale_addend_and_residual_in_the_models_order(order, scale):
    """Laguna: ``residual + (sum * scale + shared)``; each step rounds."""

    def f(x, s, r, a, w):
        y = graphs.all_reduce(x)
        factor = s if scale == "tensor" else 2.5
        for step in order.split(", "):
            y = y * factor if step == "scale" else y + (a[0] if step == "bias" else a)
        h = r + y
        return norm(h, w), h

    x, s, w = BUFFER
    (site,) = one(f, x, s, random(5, H, dtype=x.dtype, seed=4), random(5, H, dtype=x.dtype, seed=5), w).fused
    assert site.pattern == "+".join(["all_reduce", *order.replace("addend", "add").split(", "), "add", "rms_norm"])


def test_two_scales_or_two_addends_before_the_residual_are_too_many():
    def f(x, s, r, w):
        h = r + (graphs.all_reduce(x) * s + w) * 2.0
        return norm(h, w), h

    x, s, w = BUFFER
    (site,) = one(f, x, s, random(5, H, dtype=x.dtype, seed=4), w).sites
    assert site.reason == "add-chain" and "one addend and one scale" in site.detail


def test_a_scale_that_depends_on_the_sum_is_no_operand():
    def f(x, w):
        y = graphs.all_reduce(x)
        return scaled_again(y, y.amax(), w)

    def scaled_again(y, scale, w):
        h = y * scale
        return norm(h, w), h

    (site,) = one(f, BUFFER[0], BUFFER[2]).sites
    assert not site.fused


def test_a_tensor_of_another_dtype_is_refused_for_devices_round_it_differently():
    x, _, w = BUFFER
    assert "an input of the graph (placeholder)" in refused(scaled, x, torch.tensor(45.25), w)
    assert "the graph computes" in refused(lambda x, s, w: scaled(x, s.sqrt(), w), x, torch.tensor(45.25), w)


def test_a_buffer_written_between_two_calls_is_read_again():
    """Nothing is compiled anew for it: a number folded from it would be stale."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Buffer(torch.tensor(8.0))

        def forward(self, x, w):
            return scaled(x, self.scale, w)

    model, args = Model(), (random(5, H, dtype=torch.float32), random(H, dtype=torch.float32))
    for numerics in ("exact", "relaxed"):
        torch._dynamo.reset()
        tpfuse.clear_reports()
        options = {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all", "tpfuse.numerics": numerics}
        compiled = torch.compile(model, backend="tpfuse", options=options)
        with torch.no_grad(), tpfuse.expect(fused=1):
            for value in (8.0, 3.0):
                model.scale.fill_(value)
                assert graphs.equal(compiled(*args), model(*args))
        assert len(tpfuse.reports()) == 1


def test_relaxed_multiplies_before_the_reduction():
    """Where one rank alone gives to a row, as in an embedding cut by tokens, that has the model's bits."""
    x, _, w = BUFFER
    (site,) = one(scaled, x, torch.tensor(45.25), w, options=RELAXED).fused
    assert site.pattern == "all_reduce+scale+rms_norm" and "relaxed" in site.detail


def test_relaxed_with_a_residual():
    def f(x, s, r, w):
        h = r + graphs.all_reduce(x) * s
        return norm(h, w), h

    x, _, w = BUFFER
    s = torch.tensor(45.25)
    assert len(one(f, x, s, random(5, H, dtype=x.dtype, seed=4), w, options=RELAXED).fused) == 1


@pytest.mark.parametrize(
    ("scale", "fused"),
    [
        (lambda x, v: v[3], True),  # nanochat: one value of a vector
        (lambda x, v: v[3].exp() * 2, True),
        (lambda x, v: graphs.all_reduce(x.float()).amax((0, 1)), True),
        (lambda x, v: v.abs().amax(), False),  # of this rank's part of a weight
        (lambda x, v: x.float().abs().mean(), False),  # of this rank's partial sum
        (lambda x, v: torch.rand(()), False),
    ],
)
def test_relaxed_keeps_a_scalar_behind_the_sum_that_each_rank_may_compute_from_values_of_its_own(scale, fused):
    def f(x, v, w):
        s = scale(x, v)
        return norm(graphs.all_reduce(x) * s, w)

    gm = graphs.trace(f, (random(5, H, dtype=torch.bfloat16), random(8, dtype=torch.float32), BUFFER[2]))
    site = graphs.fused_copy(gm, RELAXED)[1].sites[-1]
    assert (site.fused, site.reason) == ((True, None) if fused else (False, "scale-not-constant")), site


def test_relaxed_multiplies_before_the_reduction_where_the_op_that_quantizes_takes_no_tensor():
    def f(x, s, r, w):
        h = r + graphs.all_reduce(x) * s
        n = norm(h, w).float()
        scale = n.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448.0
        return (n / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale, h

    x, s, w = BUFFER
    gm = graphs.trace(f, (x, s, random(5, H, dtype=x.dtype, seed=4), w))
    for options, ends, says in ((EXACT, "rms_norm", "multiplied by a tensor"), (RELAXED, "quantize", "relaxed")):
        (site,) = graphs.fused_copy(gm, options)[1].fused
        assert site.pattern.startswith("all_reduce+scale+add+rms_norm") and site.pattern.endswith(ends)
        assert says in site.detail


@torch.no_grad()
def test_inductor_gives_a_literal_another_spelling():
    def f(x, w):
        h = graphs.all_reduce(x) * torch.tensor(45.25, dtype=x.dtype)
        return norm(h, w), h

    options = {"tpfuse.policy": "all", "tpfuse.verify": True}
    with tpfuse.expect(fused=1):
        torch.compile(f, backend="tpfuse", options=options)(BUFFER[0], BUFFER[2])


def gate_of(r, w):
    """A shared expert's gate: one value for each row."""
    return torch.sigmoid((r * w).sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("order", ["gate", "gate, addend", "addend, gate"])
@pytest.mark.parametrize("rows", [(5,), (2, 3), (1,), (0,)], ids=str)
def test_a_gate_of_one_value_a_row_is_an_operand(rows, order, dtype):
    def f(x, r, a, w):
        y = graphs.all_reduce(x)
        for step in order.split(", "):
            y = y * gate_of(r, w) if step == "gate" else y + a
        h = r + y
        return norm(h, w), h

    x, r, a = (random(*rows, H, dtype=dtype, seed=s) for s in (1, 2, 3))
    (site,) = one(f, x, r, a, random(H, dtype=dtype)).fused
    assert "relaxed" not in site.detail and "scale" in site.pattern


def test_a_gate_behind_a_sum_that_was_flattened():
    def f(x, r, w):
        h = r + (graphs.all_reduce(x) * gate_of(r.flatten(0, 1), w)).view(r.shape)
        return norm(h, w), h

    x, r = random(6, H, dtype=torch.bfloat16), random(2, 3, H, dtype=torch.bfloat16, seed=2)
    (site,) = one(f, x, r, random(H, dtype=torch.bfloat16)).fused
    assert site.pattern == "all_reduce+scale+add+rms_norm"


def test_relaxed_leaves_a_gate_behind_the_sum():
    """Each rank may have a gate of its own."""

    def f(x, r, w):
        h = r + graphs.all_reduce(x) * gate_of(r, w)
        return norm(h, w), h

    args = (
        random(5, H, dtype=torch.bfloat16),
        random(5, H, dtype=torch.bfloat16, seed=2),
        random(H, dtype=torch.bfloat16),
    )
    (site,) = one(f, *args, options=RELAXED).fused
    assert "relaxed" not in site.detail


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 3, 1), (3, 1)], ids=str)
def test_a_gate_that_several_rows_share_is_no_operand(shape):
    def f(x, g, w):
        h = graphs.all_reduce(x) * g
        return norm(h, w), h

    x, w = random(2, 3, H, dtype=torch.bfloat16), random(H, dtype=torch.bfloat16)
    (site,) = one(f, x, random(*shape, dtype=torch.bfloat16), w).sites
    assert not site.fused and "a gate" not in site.detail, site.detail


def test_a_gate_of_another_dtype_is_no_operand():
    def f(x, g, w):
        h = (graphs.all_reduce(x) * g).to(x.dtype)
        return norm(h, w), h

    args = random(5, H, dtype=torch.bfloat16), random(5, 1, dtype=torch.float32), random(H, dtype=torch.bfloat16)
    (site,) = one(f, *args).sites
    assert not site.fused
