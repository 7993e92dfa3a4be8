"""The Llama of ``e2e.py``: one rank's shard, written out, with random weights.

A decode step attends to a cache that is full and constant, so every step costs the same. A prefill is one sequence that
attends causally to its own rows and needs no cache.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import torch.distributed as dist
from e2e_measure import Case, Line, Plan, Recorder, Say, all_reduce, measure_shape, memory, prepare
from torch import Tensor, nn

import tpfuse
from tpfuse.measure import other_libraries


@dataclass(frozen=True)
class Sizes:
    """Of the Llama; ``heads`` and ``inner`` divide by the world size. Heads are ``width`` wide."""

    layers: int = 16
    hidden: int = 4096
    heads: int = 32
    width: int = 128
    inner: int = 11008
    context: int = 256
    vocabulary: int = 8192
    dtype: torch.dtype = torch.bfloat16
    key_value_heads: int | None = None  # as many as heads
    float8: bool = (
        False  # the four matrix products of a layer in fp8: torchao's scale a row of x and a row of the weight
    )


LLAMA_3_8B = Sizes(key_value_heads=8, inner=14336)
TINY = Sizes(layers=3, hidden=64, heads=4, width=16, inner=128, context=8, vocabulary=97, dtype=torch.float32)
TINY_FLOAT8 = replace(TINY, key_value_heads=2, dtype=torch.bfloat16)  # torchao wants bf16


def rms_norm(h: Tensor, weight: Tensor) -> Tensor:
    c = h.float()
    return weight * (c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


class Weights:
    """Makes random parameters: ``own`` ones of this rank, ``common`` ones that every rank holds whole."""

    def __init__(self, dtype: torch.dtype, rank: int, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._own = torch.Generator(device).manual_seed(1 + rank)
        self._common = torch.Generator(device).manual_seed(0)

    def own(self, *shape: int, scale: float = 0.02) -> nn.Parameter:
        return self._make(shape, 0.0, scale, self._own)

    def common(self, *shape: int, mean: float = 0.0) -> nn.Parameter:
        return self._make(shape, mean, 0.02, self._common)

    def _make(self, shape: tuple[int, ...], mean: float, scale: float, generator: torch.Generator) -> nn.Parameter:
        values = torch.empty(shape, device=self.device, dtype=self.dtype)
        return nn.Parameter(values.normal_(mean, scale, generator=generator), requires_grad=False)


def linear(weight: nn.Parameter) -> nn.Linear:
    """A linear layer without a bias that has this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    return layer


class Attention(nn.Module):
    """This rank's heads: (rows, H) -> partial sums (rows, H)."""

    def __init__(self, sizes: Sizes, world: int, batch: int, weights: Weights) -> None:
        super().__init__()
        kv_heads = sizes.key_value_heads or sizes.heads
        self.width, self.prefill, self.grouped = sizes.width, False, kv_heads < sizes.heads
        self.parts = tuple(n // world * sizes.width for n in (sizes.heads, kv_heads, kv_heads))
        self.qkv = linear(weights.own(sum(self.parts), sizes.hidden))
        self.out = linear(weights.own(sizes.hidden, self.parts[0]))
        # Keys and values of a full cache; a smaller batch uses its first rows.
        self.cache = weights.own(2, batch, kv_heads // world, sizes.context, sizes.width, scale=1.0)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        q, k, v = (part.view(rows, -1, self.width) for part in self.qkv(x).split(self.parts, -1))
        attention = nn.functional.scaled_dot_product_attention
        if self.prefill:
            q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
            a = attention(q, k, v, is_causal=True, enable_gqa=self.grouped)[0].transpose(0, 1)
        else:
            a = attention(q.unsqueeze(2), self.cache[0, :rows], self.cache[1, :rows], enable_gqa=self.grouped)
        return self.out(a.reshape(rows, -1))


class Mlp(nn.Module):
    """This rank's columns: (rows, H) -> partial sums (rows, H)."""

    def __init__(self, sizes: Sizes, inner: int, weights: Weights) -> None:
        super().__init__()
        self.up = linear(weights.own(2 * inner, sizes.hidden))
        self.down = linear(weights.own(sizes.hidden, inner))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, sizes: Sizes, world: int, batch: int, weights: Weights) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = (weights.common(sizes.hidden, mean=1.0) for _ in range(2))
        self.attention = Attention(sizes, world, batch, weights)
        self.mlp = Mlp(sizes, sizes.inner // world, weights)


class Decoder(nn.Module):
    """One rank's shard: tokens (rows,) -> the likeliest next tokens (rows,). ``reduction`` names a contender."""

    def __init__(self, sizes: Sizes, rank: int, world: int, batch: int, group_name: str, device: torch.device) -> None:
        super().__init__()
        counts = (sizes.heads, sizes.key_value_heads or sizes.heads, sizes.inner)
        if any(n % world for n in counts):
            raise ValueError("{} heads, {} of keys and values, {} columns: not for {} ranks".format(*counts, world))
        weights = Weights(sizes.dtype, rank, device)
        self.group_name, self.reduction = group_name, "tpfuse"
        self.embedding, self.head = (weights.common(sizes.vocabulary, sizes.hidden) for _ in range(2))
        self.layers = nn.ModuleList([Layer(sizes, world, batch, weights) for _ in range(sizes.layers)])
        self.norm = weights.common(sizes.hidden, mean=1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        h = nn.functional.embedding(tokens, self.embedding)
        for layer in self.layers:
            x = layer.attention(rms_norm(h, layer.attention_norm))
            h = h + all_reduce(x, self.reduction, self.group_name)
            x = layer.mlp(rms_norm(h, layer.mlp_norm))
            h = h + all_reduce(x, self.reduction, self.group_name)
        return (rms_norm(h, self.norm) @ self.head.T).argmax(-1)


def to_float8(model: nn.Module) -> None:
    """torchao's ``Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())`` on every linear layer."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quant_api, quantize_
    except ImportError as error:
        raise RuntimeError(f"float8 needs torchao (pip install torchao): {error}") from error
    on_gpu = next(model.parameters()).is_cuda
    # torchao refuses CPUs, where torch has the operators all the same, which is enough for a rehearsal.
    with contextlib.nullcontext() if on_gpu else patch.object(quant_api, "_check_hardware_support"):
        quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    # torchao switches it on. It times variants of Inductor's own kernels, takes others at each compile, and most of a minute.
    torch._inductor.config.coordinate_descent_tuning = False  # type: ignore[attr-defined]


def llama(rank: int, world: int, plan: Plan) -> list[Line]:
    """On every rank: all shapes of the plan on one instance of the model."""
    device = prepare(plan)
    sizes: Sizes = plan.sizes
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    say = Say(rank, f"llama W={world}")
    batch = max((rows for phase, rows in plan.shapes if phase == "decode"), default=1)
    model = Decoder(sizes, rank, world, batch, name, device)
    if sizes.float8:
        to_float8(model)
    if plan.device == "cuda":
        # Before anything is captured, and for the largest shape.
        other_libraries.reserve(name, max(rows for _, rows in plan.shapes) * sizes.hidden, sizes.dtype, device)
        # The plane is built here and not by the first compiled step, whose allocations belong to the CUDA graphs' pool.
        path = tpfuse.ops.describe_path(name)
        say(f"tpfuse takes the {path.kind} path {path.cause}")
    say(f"weights made{memory(plan)}")
    recorder = Recorder(plan, rank)

    def case(phase: str, rows: int) -> Case:
        def tokens(number: int) -> Tensor:
            seeded = torch.Generator().manual_seed(number)
            return torch.randint(sizes.vocabulary, (rows,), generator=seeded).to(device)

        for layer in model.layers:
            layer.attention.prefill = phase == "prefill"  # type: ignore[union-attr]
        return Case(
            model,
            lambda step, given: step(given),
            lambda: None,
            tokens,
            2 * sizes.layers,
            tuple(range(world)),
            (name,),
            expected_quantized=2 * sizes.layers - 1 if sizes.float8 else 0,  # the head reads the last norm in bf16
        )

    for phase, rows in plan.shapes:
        measure_shape("llama-float8" if sizes.float8 else "llama", phase, rows, case(phase, rows), plan, say, recorder)
    return recorder.lines
