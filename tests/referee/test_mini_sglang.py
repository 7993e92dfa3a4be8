"""Norms that are operators of a kernel library: the report names the operator, for the pass cannot look into it.

``Layer`` is written anew after ``models/llama.py``, ``layers/norm.py`` and ``distributed/impl.py`` of
github.com/sgl-project/mini-sglang: FlashInfer's ``fused_add_rmsnorm`` writes sum and residual in place.
"""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import tpfuse

H = 32


@pytest.fixture(autouse=True)
def fake_group():
    torch._dynamo.reset()
    tpfuse.clear_reports()
    graphs.start_fake_group(2)
    yield
    dist.destroy_process_group()


@torch.library.custom_op("mini_sglang_test::fused_add_rmsnorm", mutates_args=("x", "residual"))
def fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    residual.add_(x)
    x.copy_(F.rms_norm(residual, (H,), weight, eps))


class Layer:
    """No module, as there."""

    def __init__(self) -> None:
        self.o, self.weight = torch.randn(H, H), torch.rand(H)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x = F.linear(x, self.o)
        dist.all_reduce(x)
        fused_add_rmsnorm(x, residual, self.weight, 1e-6)
        return x, residual


@pytest.mark.filterwarnings("ignore::tpfuse.FusionWarning")
def test_an_opaque_norm_is_named():
    layers, x, residual = [Layer(), Layer()], torch.randn(3, H), torch.randn(3, H)

    def run(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        for layer in layers:
            x, residual = layer.forward(x, residual)
        return x, residual

    with torch.inference_mode():
        want = run(x.clone(), residual.clone())
        got = torch.compile(run, backend="tpfuse", options={"tpfuse.inner": "aot_eager"})(x.clone(), residual.clone())
    assert graphs.equal(got, want)
    (report,) = tpfuse.reports()
    assert [s.reason for s in report.sites] == ["unknown-norm"] * 2, report
    assert all("mini_sglang_test.fused_add_rmsnorm" in s.detail for s in report.sites), report
