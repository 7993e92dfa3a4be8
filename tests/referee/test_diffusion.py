"""Diffusion transformers: a timestep makes a gate of each sample for the sum; the report says so and asks for no fold.

``Block`` is written anew after ``FluxTransformerBlock`` (``models/transformers/transformer_flux.py`` of
github.com/huggingface/diffusers, whose ``_tp_plan`` cuts its linears by columns and rows).
"""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
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


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.out, self.down = nn.Linear(H, 4 * H), nn.Linear(H, H), nn.Linear(H, H)
        self.norm = nn.LayerNorm(H, elementwise_affine=False, eps=1e-6)
        self.requires_grad_(False)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        gate, shift, scale, gate_mlp = self.modulation(F.silu(timestep)).chunk(4, dim=-1)
        x = x + gate.unsqueeze(1) * graphs.all_reduce(self.out(x))
        y = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        return x + gate_mlp.unsqueeze(1) * graphs.all_reduce(self.down(y))


class LayerScale(nn.Module):
    """A gate that is a weight: it can be folded into the one in front of the all-reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.norm, self.gamma = nn.Linear(H, H), nn.LayerNorm(H), nn.Parameter(torch.rand(2, H))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.gamma[0] * graphs.all_reduce(self.out(x)))


def details(module: nn.Module, *inputs: Tensor) -> list[str]:
    compiled = torch.compile(module, backend="tpfuse", options={"tpfuse.inner": "aot_eager"})
    assert graphs.equal(compiled(*inputs), module(*inputs))
    (report,) = tpfuse.reports()
    assert {s.reason for s in report.sites} == {"scale-not-constant"}, report
    return [s.detail for s in report.sites]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.filterwarnings("ignore::tpfuse.FusionWarning")
def test_a_gate_of_each_sample_is_named_and_nothing_asked_for(batch):
    found = details(Block(), torch.randn(batch, 5, H), torch.randn(batch, H))
    assert len(found) == 2 and all("a gate that the model computes" in text for text in found), found


@pytest.mark.filterwarnings("ignore::tpfuse.FusionWarning")
def test_a_gate_that_is_a_weight_keeps_the_remedy():
    (text,) = details(LayerScale(), torch.randn(1, 5, H))
    assert "one value a column" in text and "gate" not in text
