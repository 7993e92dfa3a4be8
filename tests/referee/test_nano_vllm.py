"""nano-vllm's way of tensor parallelism, written anew after ``models/qwen3.py`` and ``layers/`` (``layernorm.py``, ``linear.py``,
``embed_head.py``) of github.com/GeeeekExplorer/nano-vllm.

Its norm adds sum and residual in fp32 and normalizes that before it is rounded; the residual is rounded. Its sums are in-place
``dist.all_reduce`` calls, its arithmetic is in place too. On a fake group a sum over ranks is the partial sum itself, so the
compiled model can be compared bit for bit without other processes.
"""

from __future__ import annotations

import inspect

import graphs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import tpfuse

pytestmark = pytest.mark.long  # not on every save

HIDDEN, HEADS, LAYERS, VOCABULARY = 64, 4, 3, 32
SITES = 2 * LAYERS + 1  # attention and MLP of each layer, and the vocabulary-parallel embedding


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(2)
    yield
    dist.destroy_process_group()


class RMSNorm(nn.Module):
    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def alone(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float()
        variance = x.pow(2).mean(dim=-1, keepdim=True)
        x.mul_(torch.rsqrt(variance + self.eps))
        return x.to(dtype).mul_(self.weight)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        dtype = x.dtype
        x = x.float().add_(residual.float())
        residual = x.to(dtype)
        variance = x.pow(2).mean(dim=-1, keepdim=True)
        x.mul_(torch.rsqrt(variance + self.eps))
        return x.to(dtype).mul_(self.weight), residual

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return (self.alone(x), x) if residual is None else self.after_add(x, residual)


class RowParallel(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN, inputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        dist.all_reduce(y)
        return y


class Embedding(nn.Module):
    """The first of two halves of the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCABULARY // 2, HIDDEN))

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens >= 0) & (tokens < VOCABULARY // 2)
        y = mask.unsqueeze(-1) * F.embedding(mask * tokens, self.weight)
        dist.all_reduce(y)
        return y


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.o_proj = RowParallel(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.view(-1, HEADS, HIDDEN // HEADS).transpose(0, 1) for p in self.qkv(x).split(HIDDEN, dim=-1))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(o.transpose(0, 1).flatten(1, -1))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.down_proj = RowParallel(2 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(), RMSNorm()

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(x), residual)
        return self.mlp(x), residual


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = Embedding()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = RMSNorm()
        self.to(torch.bfloat16).eval().requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, residual = self.embed_tokens(tokens), None
        for layer in self.layers:
            x, residual = layer(x, residual)
        return self.norm(x, residual)[0]


def keeps_roundings() -> bool:
    """Whether Inductor leaves a rounding before a widening cast. Without it the residual stays fp32 from layer to layer."""
    from torch._inductor.fx_passes import joint_graph

    return "dtype1.itemsize < dtype2.itemsize" in inspect.getsource(joint_graph)


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_nano_vllm_fuses_all_of_its_reductions(inner):
    torch.manual_seed(1)
    torch._dynamo.reset()
    tpfuse.clear_reports()
    model, tokens = Model(), torch.arange(7)
    compiled = torch.compile(
        model, backend="tpfuse", fullgraph=True, options={"tpfuse.inner": inner, "tpfuse.verify": True}
    )
    with torch.inference_mode():
        got, want = compiled(tokens), model(tokens)
    report = tpfuse.reports()[-1]
    if inner == "inductor" and not keeps_roundings():
        # The residual stays fp32 from the first add on. That one is of two bf16 values, and is read unrounded.
        assert all(site.fused for site in report.sites[:1] + report.sites[2:]), report
        return
    assert [(s.reason, s.detail) for s in report.kept] == []
    assert [s.pattern for s in report.fused] == ["all_reduce+rms_norm"] + 2 * LAYERS * ["all_reduce+add+rms_norm"]
    assert len(report.fused) == SITES
    reads = ["before it is rounded" in s.detail for s in report.fused]
    assert reads == [False] + 2 * LAYERS * [True]
    if inner == "aot_eager":
        assert graphs.equal(got, want)
