"""gpt-fast's way of tensor parallelism, written anew after ``tp.py`` and ``model.py`` of github.com/meta-pytorch/gpt-fast.

Its attention hook reduces ``output[0]``: the sum has no batch dimension and the residual has one. On a fake group a sum over
ranks is the partial sum itself, so the compiled model can be compared bit for bit without other processes.
"""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.nn import functional as F

import tpfuse

pytestmark = pytest.mark.long  # not on every save

DIM, HEADS, LAYERS = 64, 4, 2


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(2)
    yield
    dist.destroy_process_group()


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(DIM) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        f = x.float()
        return (f * torch.rsqrt(torch.mean(f * f, dim=-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wqkv, self.wo = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (p.view(batch, length, HEADS, -1).transpose(1, 2) for p in self.wqkv(x).split(DIM, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).contiguous().view(batch, length, DIM))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, keep_batch: bool) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()
        self.attention_norm, self.ffn_norm = RMSNorm(), RMSNorm()
        ranks = list(range(dist.get_world_size()))
        self.attention.register_forward_hook(
            lambda _module, _input, output: funcol.all_reduce(output if keep_batch else output[0], "sum", ranks)
        )
        self.feed_forward.register_forward_hook(lambda _module, _input, output: funcol.all_reduce(output, "sum", ranks))

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x))
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    def __init__(self, keep_batch: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(keep_batch) for _ in range(LAYERS))
        self.norm = RMSNorm()
        self.to(torch.bfloat16).eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


@pytest.mark.parametrize(
    ("rows", "inner"),
    [
        *((rows, "aot_eager") for rows in (1, 5)),
        *(pytest.param(rows, "inductor", marks=pytest.mark.slow) for rows in (1, 5)),
    ],
)
def test_gpt_fast_fuses_all_of_its_reductions(rows, inner):
    torch.manual_seed(rows)
    torch._dynamo.reset()
    model = Transformer()
    x = torch.randn(1, rows, DIM).bfloat16()
    compiled = torch.compile(model, backend="tpfuse", fullgraph=True, options={"tpfuse.inner": inner})
    with torch.inference_mode():
        got = compiled(x)
        assert [s.reason for s in tpfuse.reports()[-1].kept] == []
        assert len(tpfuse.reports()[-1].fused) == 2 * LAYERS
        if inner == "aot_eager":
            assert graphs.equal(got, model(x))


def test_a_hook_that_keeps_the_batch_gives_the_same_bits():
    torch.manual_seed(0)
    dropped, kept = Transformer(), Transformer(keep_batch=True)
    kept.load_state_dict(dropped.state_dict())
    x = torch.randn(1, 3, DIM).bfloat16()
    options = {"tpfuse.inner": "aot_eager", "tpfuse.verify": True}
    with torch.inference_mode():
        a, b = (torch.compile(m, backend="tpfuse", options=options)(x) for m in (dropped, kept))
    assert [len(r.fused) for r in tpfuse.reports()] == [2 * LAYERS] * 2
    assert graphs.equal(a, b)
