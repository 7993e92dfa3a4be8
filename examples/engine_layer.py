"""The op as a drop-in for the layer code of a serving engine: no compiler, one call where there were three.

    python examples/engine_layer.py            two ranks on a CPU; prints that both versions give the same bits

Engines such as SGLang pass ``hidden`` and ``residual`` along separately and leave the reduction of each block to the next
norm. That is just the op's signature, so a layer changes in two places: its row-parallel projections stop reducing, and
its norms reduce. The dense MLP shares the attention group here, data parallel attention or not, so both places fuse.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tpfuse.ops import LLAMA, all_reduce_add_rms_norm

HIDDEN, LAYERS, ROWS, RANKS = 256, 4, 8, 2


class ReduceAddNorm(nn.Module):
    """What follows a row-parallel projection: reduce over the attention group, add the residual, normalize."""

    def __init__(self, weight: Tensor, group: Any, fused: bool, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.group, self.fused, self.eps = nn.Parameter(weight), group, fused, eps

    def forward(self, partial: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if self.fused:
            return all_reduce_add_rms_norm(
                partial, residual, self.weight, eps=self.eps, flavour=LLAMA, group=self.group
            )
        hidden = partial.clone()
        dist.all_reduce(hidden, group=self.group)
        residual = residual + hidden
        h = residual.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(residual.dtype), residual


class Layer(nn.Module):
    """One decoder layer. ``partial`` is the sum that the layer before left unreduced, of this rank alone."""

    def __init__(self, index: int, group: Any, fused: bool) -> None:
        super().__init__()
        same = torch.Generator().manual_seed(index)
        mine = torch.Generator().manual_seed(1000 * (1 + dist.get_rank()) + index)

        def shard() -> nn.Parameter:
            return nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=mine) / HIDDEN**0.5)

        self.attention, self.mlp = shard(), shard()
        self.input_norm = ReduceAddNorm(torch.rand(HIDDEN, generator=same) + 0.5, group, fused)
        self.post_attention_norm = ReduceAddNorm(torch.rand(HIDDEN, generator=same) + 0.5, group, fused)

    def forward(self, partial: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_norm(partial, residual)
        hidden, residual = self.post_attention_norm(hidden @ self.attention, residual)
        return nn.functional.silu(hidden @ self.mlp), residual


class Decoder(nn.Module):
    """Layers that hand on (partial sum, residual), and the final norm that reduces the last one."""

    def __init__(self, group: Any, fused: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i, group, fused) for i in range(LAYERS))
        self.norm = ReduceAddNorm(torch.ones(HIDDEN), group, fused)
        self.to(torch.bfloat16).requires_grad_(False)

    def forward(self, partial: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            partial, residual = layer(partial, residual)
        return self.norm(partial, residual)


def compare(rank: int, world_size: int) -> bool:
    """Whether the fused and the plain decoder give the same bits on this rank."""
    group = dist.group.WORLD
    partial = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(rank)).bfloat16()
    residual = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(99)).bfloat16()
    plain = Decoder(group, fused=False)(partial, residual)
    fused = Decoder(group, fused=True)(partial, residual)
    return all(torch.equal(a, b) for a, b in zip(plain, fused, strict=True))


def rank_main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    equal = compare(rank, RANKS)
    print(f"rank {rank}: {2 * LAYERS + 1} reductions in one op each; same bits as unfused: {equal}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    if not equal:
        raise SystemExit(1)


def main() -> None:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=rank_main, args=(r, f"{folder}/store")) for r in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("the fused and the plain layers differ, or a rank failed")


if __name__ == "__main__":
    main()
