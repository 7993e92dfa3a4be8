"""A small tensor-parallel decoder without transformers, for tests of inner compilers, caches and export.

Each layer reduces twice: 2 all-reduces a layer, each followed by a residual add and a norm (the last by the final norm).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN, HEADS, VOCABULARY = 64, 4, 96


class RMSNorm(nn.Module):
    """Llama's spelling: round to the input's dtype, then multiply by the weight."""

    def __init__(self, generator: torch.Generator, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN, generator=generator) + 0.5)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class Linear(nn.Module):
    """A linear layer of which each rank holds a slice; with ``reduce`` the slices are of the input."""

    def __init__(self, n_in: int, n_out: int, reduce: bool, group: Any, generator: torch.Generator) -> None:
        super().__init__()
        whole = torch.randn(n_out, n_in, generator=generator) / n_in**0.5
        self.weight = nn.Parameter(whole.chunk(group.size(), dim=int(reduce))[group.rank()].clone())
        self.group = group if reduce else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if self.group is not None:
            dist.all_reduce(y, group=self.group)
        return y


class Attention(nn.Module):
    def __init__(self, group: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.q_proj = Linear(HIDDEN, HIDDEN, False, group, generator)
        self.k_proj = Linear(HIDDEN, HIDDEN, False, group, generator)
        self.v_proj = Linear(HIDDEN, HIDDEN, False, group, generator)
        self.o_proj = Linear(HIDDEN, HIDDEN, True, group, generator)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, group: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.gate_proj = Linear(HIDDEN, 2 * HIDDEN, False, group, generator)
        self.up_proj = Linear(HIDDEN, 2 * HIDDEN, False, group, generator)
        self.down_proj = Linear(2 * HIDDEN, HIDDEN, True, group, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer. ``break_inside`` puts a graph break between the attention's reduction and its norm."""

    def __init__(self, group: Any, generator: torch.Generator, break_inside: bool = False) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(generator)
        self.self_attn = Attention(group, generator)
        self.post_attention_layernorm = RMSNorm(generator)
        self.mlp = MLP(group, generator)
        self.break_inside = break_inside

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.self_attn(self.input_layernorm(x))
        if self.break_inside:
            torch._dynamo.graph_break()
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    """``layers`` layers of hidden size 64 over ``group``; equal weights on every rank and in every process."""

    def __init__(
        self, layers: int = 2, group: Any = None, dtype: torch.dtype = torch.bfloat16, break_inside: bool = False
    ) -> None:
        super().__init__()
        group = group or dist.group.WORLD
        generator = torch.Generator().manual_seed(7)
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.embed_tokens.weight.data = torch.randn(VOCABULARY, HIDDEN, generator=generator)
        self.layers = nn.ModuleList(Layer(group, generator, break_inside) for _ in range(layers))
        self.norm = RMSNorm(generator)
        self.to(dtype).eval().requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def tokens(rows: int = 1, columns: int = 5) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(3))
