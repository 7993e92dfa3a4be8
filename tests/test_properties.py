"""Properties over random graphs: whatever is fused equals the original bit for bit; every all-reduce has one site."""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist
from graphs import all_reduce
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tpfuse.passes import PassOptions, Reason

pytestmark = pytest.mark.long  # not on every save

H = 16


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(4)
    yield
    dist.destroy_process_group()


def rms(h, w, spelling):
    f = h if spelling["in_dtype"] else h.float()
    v = {"mean": lambda: (f * f).mean(-1, keepdim=True), "sum": lambda: f.pow(2).sum(-1, keepdim=True) / H}[
        spelling["mean"]
    ]()
    v = v + spelling["eps"] if spelling["eps_inside"] else v
    n = {"rsqrt": lambda: f * torch.rsqrt(v), "div": lambda: f / v.sqrt(), "pow": lambda: v**-0.5 * f}[
        spelling["root"]
    ]()
    n = n if spelling["eps_inside"] else n + spelling["eps"]
    if spelling["late_weight"]:
        return w * n.to(h.dtype)
    return (n * w).to(h.dtype)


spellings = st.fixed_dictionaries(
    {
        "in_dtype": st.booleans(),
        "mean": st.sampled_from(["mean", "sum"]),
        "root": st.sampled_from(["rsqrt", "div", "pow"]),
        "eps": st.sampled_from([1e-6, 1e-5, 0.1]),
        "eps_inside": st.sampled_from([True, True, True, False]),
        "late_weight": st.booleans(),
    }
)
layers = st.fixed_dictionaries(
    {
        "spelling": spellings,
        "between": st.lists(st.sampled_from(["view", "clone", "bias", "scale", "relu", "slice", "full"]), max_size=3),
        "residual": st.sampled_from(["left", "right", "none", "post", "broadcast", "derived"]),
        "read_sum_too": st.sampled_from([False, False, False, True]),
        "op": st.sampled_from(["sum", "sum", "sum", "max"]),
        "return_h": st.booleans(),
    }
)


def build(plan):
    """A function over (x, r, w, b) that runs the planned layers one after the other."""

    def f(x, r, w, b):
        outputs = []
        for layer in plan:
            y = all_reduce(x, layer["op"])
            raw = y
            for step in layer["between"]:
                y = {
                    "view": lambda y=y: y.reshape(-1, H).reshape(y.shape),
                    "clone": lambda y=y: y.clone(),
                    "bias": lambda y=y: y + b,
                    "scale": lambda y=y: y * 0.5,
                    "relu": lambda y=y: y.relu(),
                    "slice": lambda y=y: torch.cat([y[:, 1:], y[:, :1]], 1),
                    "full": lambda y=y, x=x: x * 3 + y,
                }[step]()
            if layer["residual"] == "post":
                n = rms(y, w, layer["spelling"])
                h = r + n
            else:
                h = {
                    "left": lambda y=y, r=r: r + y,
                    "right": lambda y=y, r=r: y + r,
                    "none": lambda y=y: y,
                    "broadcast": lambda y=y, r=r: r[:, :1] + y,
                    "derived": lambda y=y: y + y.tanh(),
                }[layer["residual"]]()
                n = rms(h, w, layer["spelling"])
            if layer["read_sum_too"]:
                outputs.append(raw.sum(-1))
            if layer["return_h"]:
                outputs.append(h)
            r, x = h, n * 2
        return (*outputs, n, r)

    return f


# No shrinking: a failing plan is short enough to read, and shrinking traces hundreds of graphs.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES)
@given(
    plan=st.lists(layers, min_size=1, max_size=3),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    weight=st.sampled_from(["same", torch.float32]),
    fuel=st.one_of(st.none(), st.integers(0, 3)),
    seed=st.integers(0, 1000),
)
def test_whatever_is_fused_equals_the_original(plan, dtype, weight, fuel, seed):
    g = torch.Generator().manual_seed(seed)
    x, r = (torch.randn(2, 3, H, generator=g).to(dtype) for _ in range(2))
    w = torch.randn(H, generator=g).to(dtype if weight == "same" else weight)
    b = torch.randn(H, generator=g).to(dtype)
    gm = graphs.trace(build(plan), (x, r, w, b))
    new, report = graphs.fused_copy(gm, PassOptions(policy="all", fuel=fuel, verify=True))
    assert len(report.sites) == len(plan) == graphs.all_reduces_left(gm)
    assert all(s.fused or (Reason(s.reason) and s.detail) for s in report.sites)
    assert graphs.count(new) == len(report.fused)
    assert graphs.all_reduces_left(new) == len(report.kept)
    assert fuel is None or len(report.fused) <= fuel
    for i in range(2):
        g = torch.Generator().manual_seed(seed + 1 + i)
        args = [(torch.randn(a.shape, generator=g) * 4).to(a.dtype) for a in (x, r, w, b)]
        assert graphs.equal(graphs.run(gm, *args), graphs.run(new, *args))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(spelling=spellings, residual=st.sampled_from(["left", "right"]))
def test_legal_regions_with_an_rms_norm_are_always_fused(spelling, residual):
    spelling = {**spelling, "eps_inside": True}
    layer = {
        "spelling": spelling, "between": [], "residual": residual, "read_sum_too": False, "op": "sum", "return_h": True,
    }  # fmt: skip
    args = [torch.randn(2, 3, H).bfloat16(), torch.randn(2, 3, H).bfloat16(), torch.randn(H).bfloat16(), torch.zeros(H)]
    _, report = graphs.fused_copy(graphs.trace(build([layer]), args))
    assert [s.fused for s in report.sites] == [True], report.sites
