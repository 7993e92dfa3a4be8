"""A sum in another shape than its residual: the reshapes between are repeated on addend or residual, for any number of rows."""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from tpfuse.passes import PassOptions, fuse

import tpfuse
from tpfuse import unfused

H = 32
VERIFIED = PassOptions(policy="all", verify=True)


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(2)
    yield
    dist.destroy_process_group()


def norm(h: Tensor, w: Tensor) -> Tensor:
    f = h.float()
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


def flat_experts(x, r, w, e):
    """Qwen2-MoE, Llama4, ERNIE-4.5-MoE: the experts see rows, the residual has batch and sequence."""
    rows = x.reshape(-1, H)
    h = r + (graphs.all_reduce(rows @ e) + rows * 0.5).view(r.shape)
    return norm(h, w), h


def scaled_experts(x, r, w, e):
    rows = x.reshape(-1, H)
    h = r + (graphs.all_reduce(rows @ e) + rows).view(r.shape) * 0.5
    return norm(h, w), h


def flat_residual(x, r, w, e):
    rows = x.reshape(-1, H)
    h = r.view(-1, H) + (graphs.all_reduce(rows @ e) + rows)
    return norm(h, w).view(r.shape), h.view(r.shape)


def norm_then_view(x, r, w, e):
    """FlexOlmo: the sum is normed flat or not, and added to the residual afterwards."""
    h = r + norm(graphs.all_reduce(x.reshape(-1, H) @ e), w).view(r.shape)
    return norm(h, w), h


def view_then_norm(x, r, w, e):
    h = r + norm(graphs.all_reduce(x.reshape(-1, H) @ e).view(r.shape), w)
    return norm(h, w), h


PROGRAMS = (flat_experts, scaled_experts, flat_residual, norm_then_view, view_then_norm)


def inputs(*shape: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(3)
    shapes = (shape, shape, (H,), (H, H))
    return tuple(torch.randn(*s, generator=g).bfloat16() for s in shapes)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_bits_for_every_number_of_rows(program):
    for shape in ((2, 5, H), (1, 5, H), (2, 1, H), (1, 1, H)):
        args = inputs(*shape)
        gm = graphs.trace(program, args)
        new, report = graphs.fused_copy(gm, VERIFIED)
        assert [site.fused for site in report.sites] == [True], report.sites
        assert graphs.equal(graphs.run(gm, *args), graphs.run(new, *args))


@pytest.mark.parametrize("dynamic", [(0,), (0, 1)], ids=str)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_batch_and_sequence_may_be_symbolic(program, dynamic):
    report = fuse(graphs.trace(program, inputs(2, 5, H), dynamic), VERIFIED)
    assert [site.fused for site in report.sites] == [True], report.sites


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_flattened_sum_is_told_to_keep_its_shape(dynamic):
    """Engines flatten what they reduce: ``all_reduce(y.view(-1))``. The model's norm is there, in another shape."""

    def flattened(x, r, w, e):
        return norm(r + graphs.all_reduce((x @ e).view(-1)).view(r.shape), w)

    torch._dynamo.reset()
    tpfuse.clear_reports()
    compiled = torch.compile(flattened, backend="tpfuse", dynamic=dynamic, options={"tpfuse.inner": "aot_eager"})
    x, r, w, e = torch.randn(2, 3, H), torch.randn(2, 3, H), torch.rand(H), torch.randn(H, H)
    with torch.no_grad(), pytest.warns(tpfuse.FusionWarning, match="the shape that the norm reads"):
        unfused.forget()
        assert graphs.equal(compiled(x, r, w, e), flattened(x, r, w, e))
    (site,) = tpfuse.reports()[-1].sites
    assert site.reason == "rows-move" and "flattened" in site.detail
