"""What the pass costs: seconds for Llama graphs of 10 to 80 layers, beside Inductor's own compile time.

python benchmarks/pass_cost.py [--layers 10 20 40 80] [--inductor 10]

Runs in one process on a fake process group; the graph is that of one tensor-parallel rank.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tpfuse.passes import PassOptions, fuse, norms

from tpfuse import compat

HIDDEN, HEADS, WORLD = 64, 4, 4


@dataclass(frozen=True)
class Cost:
    """One line of the table. ``first`` is the time on a cold memo, ``warm`` the median on a warm one, in seconds."""

    layers: int
    nodes: int
    sites: int
    fused: int
    first: float
    warm: float
    inductor: float | None


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        f = h.float()
        return self.weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-5)).to(h.dtype)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        local = HIDDEN // WORLD
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(HIDDEN, local, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(local, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (1, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = self.o_proj(
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )
        dist.all_reduce(out)
        return out


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        local = 2 * HIDDEN // WORLD
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, local, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(local, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        dist.all_reduce(out)
        return out


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn, self.mlp = Attention(), Mlp()

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = h + self.self_attn(self.input_layernorm(h))
        return h + self.mlp(self.post_attention_layernorm(h))


class Llama(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(Layer() for _ in range(layers)), Norm()

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            h = layer(h)
        return self.norm(h)


def capture(layers: int) -> torch.fx.GraphModule:
    """The functional ATen graph of one rank."""
    captured: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        captured.append(gm)
        return compat.boxed(gm.forward)

    torch._dynamo.reset()
    model = Llama(layers).bfloat16().eval().requires_grad_(False)
    with torch.no_grad():
        torch.compile(model, backend=compat.aot_autograd(fw_compiler=keep))(torch.randn(2, 8, HIDDEN).bfloat16())
    return captured[0]


def inductor_seconds(layers: int) -> float:
    """Inductor's compile time of the same model, caches off."""
    torch._dynamo.reset()
    model = Llama(layers).bfloat16().eval().requires_grad_(False)
    start = time.perf_counter()
    with torch.no_grad(), compat.without_compile_caches():
        torch.compile(model, backend="inductor")(torch.randn(2, 8, HIDDEN).bfloat16())
    return time.perf_counter() - start


def measure(layers: int, with_inductor: bool, repeats: int = 5) -> Cost:
    """The pass on fresh copies of one graph: once with a cold memo, then several times warm."""
    gm = capture(layers)
    options = PassOptions()
    norms.forget()
    reports = [fuse(copy.deepcopy(gm), options) for _ in range(repeats + 1)]
    first, *warm = (r.seconds for r in reports)
    seconds = inductor_seconds(layers) if with_inductor else None
    report = reports[0]
    return Cost(
        layers, len(gm.graph.nodes), len(report.sites), len(report.fused), first, statistics.median(warm), seconds
    )


def start_fake_group() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument(
        "--inductor", type=int, nargs="*", default=[10], help="layer counts to compile with Inductor too"
    )
    args = parser.parse_args()
    start_fake_group()
    print(
        f"{'layers':>6} {'nodes':>6} {'sites':>6} {'fused':>6} {'first s':>8} {'warm s':>8} {'ms/site':>8} {'Inductor s':>11}"
    )
    for layers in args.layers:
        c = measure(layers, layers in args.inductor)
        inductor = "" if c.inductor is None else f"{c.inductor:.1f}"
        per_site = c.warm / c.sites * 1e3
        print(
            f"{c.layers:6d} {c.nodes:6d} {c.sites:6d} {c.fused:6d} {c.first:8.3f} {c.warm:8.3f} {per_site:8.2f} {inductor:>11}",
            flush=True,
        )


if __name__ == "__main__":
    main()
