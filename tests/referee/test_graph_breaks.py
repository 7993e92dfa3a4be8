"""Models whose reductions Dynamo cannot trace: report and a warning say so, for each graph looks as if it had none.

``Reduce`` is written anew after ``fairscale/nn/model_parallel/mappings.py`` of github.com/facebookresearch/fairscale, on which
Meta's reference Llama models stand (``models/llama3/model.py`` of github.com/meta-llama/llama-models).
"""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist
from told import heard, start_fresh
from torch import Tensor, nn

import tpfuse

H = 32
AOT = {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all"}


@pytest.fixture(autouse=True)
def fresh():
    start_fresh(2)
    yield
    dist.destroy_process_group()


class Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class Comm:
    """An engine's own communicator, kept from Dynamo."""

    @torch.compiler.disable
    def all_reduce(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x


class Block(nn.Module):
    def __init__(self, reduce) -> None:
        super().__init__()
        self.proj, self.norm, self.reduce = nn.Linear(H, H), nn.RMSNorm(H), reduce
        self.requires_grad_(False)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(residual + self.reduce(self.proj(x)))


def run(block: Block) -> list[str]:
    """The texts of our warnings. The result must be eager's."""
    x, residual = torch.randn(3, H), torch.randn(3, H)
    with heard() as texts:
        got = torch.compile(block, backend="tpfuse", options=AOT)(x, residual)
    assert graphs.equal(got, block(x, residual))
    return texts


@pytest.mark.parametrize(
    "reduce, why",
    [(Reduce.apply, "mark_dirty"), (Comm().all_reduce, "torch.compiler.disable")],
    ids=["fairscale", "disabled"],
)
def test_a_reduction_between_two_graphs_is_told_with_its_line(reduce, why):
    (text,) = run(Block(reduce))
    assert f"{__file__}:" in text and why in text and "fullgraph=True" in text
    first, last = tpfuse.reports()
    (note,) = first.notes
    assert f"{__file__}:" in note and why in note and "a graph break ends" in str(first)
    assert last.notes == [], "no break ends it"
    with pytest.raises(tpfuse.FusionMismatch, match="a graph break ends this graph at"), tpfuse.expect(fused=1):
        torch._dynamo.reset()
        run(Block(reduce))


def test_a_break_elsewhere_is_a_note_and_no_warning():
    class Prints(Block):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            y = residual * 2
            torch._dynamo.graph_break()
            return super().forward(x, y)

    assert run(Prints(graphs.all_reduce)) == []
    first, last = tpfuse.reports()
    assert len(first.notes) == 1 and last.notes == [] and len(last.fused) == 1


def test_one_process_is_not_warned():
    dist.destroy_process_group()
    graphs.start_fake_group(1)
    assert run(Block(Comm().all_reduce)) == []
