"""Models that are spread over devices: a norm on another device than its sum is not fused, operands are taken where the sum is.

The other device is ``meta``, which every machine has: all that counts in a graph is that it is another one.
"""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist
from graphs import all_reduce
from tpfuse.passes import PassOptions, fuse

H = 64
OTHER = "meta"


@pytest.fixture(autouse=True)
def fake_group():
    graphs.start_fake_group(2)
    yield
    dist.destroy_process_group()


def llama(h, w):
    f = h.float()
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


def olmo(h, w):
    f = h.float()
    return (w.float() * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6))).to(h.dtype)


def norm_elsewhere(x, r, w, far):
    return llama((r + all_reduce(x)).to(OTHER), far)


def sum_elsewhere(x, r, w, far):
    return llama(all_reduce(x).to(OTHER) + r.to(OTHER), far)


def cast_and_move(x, r, w, far):
    h = (r + all_reduce(x)).to(OTHER, torch.float32)
    return far * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(far.dtype)


def unrounded_elsewhere(x, r, w, far):
    h = all_reduce(x).to(OTHER, torch.float32) + r.to(OTHER)
    return far * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(far.dtype)


@pytest.mark.parametrize("f", [norm_elsewhere, sum_elsewhere, cast_and_move, unrounded_elsewhere])
def test_a_norm_on_another_device_than_its_sum_is_refused(f):
    (site,) = fuse(traced(f), PassOptions(policy="all")).sites
    assert not site.fused and site.reason in ("no-norm", "dtype"), site


def offloaded_weight(x, r, w, far):
    h = r + all_reduce(x)
    return llama(h, far.to("cpu")), h


def offloaded_weight_in_fp32(x, r, w, far):
    h = r + all_reduce(x)
    return olmo(h, far.to("cpu")), h


def weight_that_is_moved_and_cast(x, r, w, far):
    h = r + all_reduce(x)
    return olmo(h, far.to("cpu", torch.float32)), h


def residual_from_elsewhere(x, r, w, far):
    h = far.expand(3, H).contiguous().to("cpu", torch.float32) + all_reduce(x).float()
    return olmo(h, w), h


def result_goes_elsewhere(x, r, w, far):
    h = r + all_reduce(x)
    return llama(h, w).to(OTHER), h


@pytest.mark.parametrize(
    "f",
    [
        offloaded_weight,
        offloaded_weight_in_fp32,
        weight_that_is_moved_and_cast,
        residual_from_elsewhere,
        result_goes_elsewhere,
    ],
)
def test_operands_and_results_stay_on_the_device_of_the_sum(f):
    gm = traced(f)
    want = [n.meta["val"].device for n in gm.graph.output_node().args[0]]
    assert fuse(gm, PassOptions(policy="all")).sites[0].fused
    assert [n.meta["val"].device for n in gm.graph.output_node().args[0]] == want
    (op,) = (n for n in gm.graph.nodes if n.target is graphs.OP)
    assert {n.meta["val"].device.type for n in op.all_input_nodes} == {"cpu"}


def traced(f):
    x = torch.randn(3, H).bfloat16()
    w = torch.rand(H).bfloat16()
    return graphs.trace_as_written(f, (x, x.clone(), w, w.to(OTHER)))
