"""Sequence parallelism: reduce-scatters and all-gathers in place of all-reduces. Every reduce-scatter fuses, bit for bit, and
every all-gather behind its norm with it, of an RMSNorm and of a LayerNorm with the biases of a GPT.

Two ways to write it, both anew: torchtitan's plan of DTensor styles for a Llama (``SequenceParallel`` norms, rowwise linears with
outputs in ``Shard(1)``; ``torchtitan/models/llama3/parallelize.py`` of github.com/pytorch/torchtitan, as it was while it called
``parallelize_module``), and Megatron's functions that reduce-scatter and gather along the first dimension
(``megatron/core/tensor_parallel/mappings.py`` of github.com/NVIDIA/Megatron-LM).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor, nn
from torch.nn import functional as F

import tpfuse
from tpfuse.inspect import dump

pytestmark = pytest.mark.ranks
DIM, HEADS, INNER, LAYERS, VOCABULARY, RANKS = 32, 4, 64, 2, 64, 2


def norm_of(kind: str) -> nn.Module:
    """A norm with a weight, and where it has one a bias, that the ranks share."""
    norm = nn.LayerNorm(DIM) if kind == "layer_norm" else nn.RMSNorm(DIM, eps=1e-5)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, generator=torch.Generator().manual_seed(parameter.dim() + len(kind)))
    return norm


class Attention(nn.Module):
    def __init__(self, heads: int = HEADS, biased: bool = False) -> None:
        super().__init__()
        width = heads * (DIM // HEADS)
        self.heads = heads
        self.wq, self.wk, self.wv = (nn.Linear(DIM, width, bias=False) for _ in range(3))
        self.wo = nn.Linear(width, DIM, bias=biased)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (w(x).view(batch, length, -1, DIM // HEADS).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, inner: int = INNER, biased: bool = False) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(DIM, inner, bias=False) for _ in range(2))
        self.w2 = nn.Linear(inner, DIM, bias=biased)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, norm: str) -> None:
        super().__init__()
        biased = norm == "layer_norm"
        self.attention, self.feed_forward = Attention(biased=biased), FeedForward(biased=biased)
        self.attention_norm, self.ffn_norm = norm_of(norm), norm_of(norm)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x))
        return h + self.feed_forward(self.ffn_norm(h))


class Llama(nn.Module):
    def __init__(self, norm: str) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList(Block(norm) for _ in range(LAYERS))
        self.norm = norm_of(norm)
        self.output = nn.Linear(DIM, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.output(self.norm(h))


def sequence_parallel(model: Llama, mesh: dist.DeviceMesh) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    head = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    parallelize_module(model, mesh, {"tok_embeddings": rows, "norm": SequenceParallel(), "output": head})
    gathered = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    plan = {
        "attention_norm": SequenceParallel(),
        "attention": gathered,
        **{f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")},
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
        "feed_forward": gathered,
        **{f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")},
        "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
    }
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)


def reduce_scatter_along_first_dim(x: Tensor) -> Tensor:
    output = torch.empty(x.shape[0] // RANKS, *x.shape[1:], dtype=x.dtype)
    dist.reduce_scatter_tensor(output, x.contiguous())
    return output


def gather_along_first_dim(x: Tensor) -> Tensor:
    output = torch.empty(x.shape[0] * RANKS, *x.shape[1:], dtype=x.dtype)
    dist.all_gather_into_tensor(output, x.contiguous())
    return output


class Megatron(nn.Module):
    """One rank's part of the layers: rows are (sequence, batch, hidden), of which each rank holds a stretch of the sequence.

    With LayerNorms the row-parallel linears have biases, which are added behind the sum.
    """

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention(HEADS // RANKS) for _ in range(LAYERS))
        self.mlp = nn.ModuleList(FeedForward(INNER // RANKS) for _ in range(LAYERS))
        self.norms = nn.ModuleList(norm_of(norm) for _ in range(2 * LAYERS + 1))
        self.bias = norm_of(norm).bias if norm == "layer_norm" else None

    def forward(self, h: Tensor) -> Tensor:
        for n, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = gather_along_first_dim(self.norms[2 * n](h))
            h = h + self.biased(reduce_scatter_along_first_dim(attention(x.transpose(0, 1)).transpose(0, 1)))
            h = h + self.biased(reduce_scatter_along_first_dim(mlp(gather_along_first_dim(self.norms[2 * n + 1](h)))))
        return self.norms[-1](h)

    def biased(self, x: Tensor) -> Tensor:
        return x if self.bias is None else x + self.bias


def both_ways(rank: int, world_size: int, style: str, norm: str, dtype: torch.dtype, batch: int, folder: Path):
    """Outputs equal with fusion and in eager mode, the sites of the fused graph, and its gathers before and after."""
    torch.manual_seed(0 if style == "torchtitan" else rank)
    if style == "torchtitan":
        model, x = Llama(norm).to(dtype), torch.randint(VOCABULARY, (batch, 6))
        sequence_parallel(model, dist.init_device_mesh("cpu", (world_size,)))
    else:
        model, x = Megatron(norm).to(dtype), torch.randn(3, batch, DIM).to(dtype)
    torch._dynamo.reset()
    tpfuse.clear_reports()
    options = {"tpfuse.inner": "aot_eager", "tpfuse.verify": True, "tpfuse.dump": str(folder)}
    with torch.no_grad():
        results = [model(x), torch.compile(model, backend="tpfuse", options=options, fullgraph=True)(x)]
    (report,) = tpfuse.reports()
    graphs = [folder / f"rank-{rank}" / report.graph_id / name for name in (dump.BEFORE, dump.AFTER)]
    gathers = [graph.read_text().count("_c10d_functional.all_gather_into_tensor") for graph in graphs]
    return torch.equal(*results), report.sites, gathers


@pytest.fixture(scope="module")
def pool():
    with RankPool(RANKS) as pool:
        yield pool


@pytest.mark.parametrize(
    ("style", "norm", "dtype", "batch"),
    [
        ("torchtitan", "rms_norm", torch.bfloat16, 1),
        ("megatron", "rms_norm", torch.bfloat16, 2),
        ("megatron", "layer_norm", torch.bfloat16, 2),
        pytest.param("torchtitan", "layer_norm", torch.bfloat16, 1, marks=pytest.mark.slow),
        pytest.param("torchtitan", "rms_norm", torch.float32, 2, marks=pytest.mark.slow),
        pytest.param("megatron", "rms_norm", torch.float16, 1, marks=pytest.mark.slow),
        pytest.param("torchtitan", "layer_norm", torch.float32, 2, marks=pytest.mark.slow),
        pytest.param("megatron", "layer_norm", torch.float16, 1, marks=pytest.mark.slow),
    ],
)
def test_every_reduce_scatter_fuses(pool, tmp_path, style, norm, dtype, batch):
    for equal, sites, gathers in pool.run(both_ways, style, norm, dtype, batch, tmp_path):
        assert equal
        assert [(s.fused, s.reason) for s in sites] == [(True, None)] * (2 * LAYERS + (style == "torchtitan"))
        patterns = [s.pattern for s in sites[-2 * LAYERS :]]
        bias = "bias+" if (style, norm) == ("megatron", "layer_norm") else ""  # the other's is part of the partial sum
        alone = f"reduce_scatter+{bias}add+{norm}"
        inside = f"{alone}+all_gather"
        # Megatron's last norm is not gathered in this model; the head of the other reads all rows.
        assert patterns == [inside] * (2 * LAYERS - 1) + [inside if style == "torchtitan" else alone]
        # One is left: of the norm before which Megatron sums nothing, and of torchtitan's logits.
        assert gathers == [2 * LAYERS if style == "megatron" else 2 * LAYERS + 2, 1]
        assert all(s.group == (0, 1) for s in sites)
