"""Decode steps of a Llama: tpfuse against inductor alone, both in mode="reduce-overhead" over the same group.

    python benchmarks/e2e.py --worlds 2,4 --batch 1,8,32

16 layers of H = 4096 with random weights. The baseline reduces with torch's symmetric-memory one-shot, the fused model with the
op. Prints step time, ratio and whether all ranks chose the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tpfuse.ops.one_gpu import run_ranks

LAYERS, HIDDEN, HEADS, INNER, CONTEXT, VOCAB = 16, 4096, 32, 11008, 256, 8192


def rms_norm(h: Tensor, weight: Tensor) -> Tensor:
    c = h.float()
    return weight * (c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


class Decoder(nn.Module):
    """One rank's shard of the model; the cache is full and constant, so every step costs the same."""

    def __init__(self, world: int, batch: int, group_name: str) -> None:
        super().__init__()
        self.group_name = group_name
        heads, inner = HEADS // world, INNER // world
        self.heads = heads

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02, requires_grad=False)

        self.norms = nn.ParameterList([weights(HIDDEN) for _ in range(2 * LAYERS + 1)])
        self.qkv = nn.ParameterList([weights(3 * heads * 128, HIDDEN) for _ in range(LAYERS)])
        self.out = nn.ParameterList([weights(HIDDEN, heads * 128) for _ in range(LAYERS)])
        self.up = nn.ParameterList([weights(2 * inner, HIDDEN) for _ in range(LAYERS)])
        self.down = nn.ParameterList([weights(HIDDEN, inner) for _ in range(LAYERS)])
        self.keys = nn.ParameterList([weights(2, batch, heads, CONTEXT, 128) for _ in range(LAYERS)])
        self.embedding, self.head = weights(VOCAB, HIDDEN), weights(VOCAB, HIDDEN)

    def reduce(self, x: Tensor) -> Tensor:
        return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", self.group_name))

    def forward(self, tokens: Tensor) -> Tensor:
        h = nn.functional.embedding(tokens, self.embedding)
        for i in range(LAYERS):
            x = rms_norm(h, self.norms[2 * i])
            q = (x @ self.qkv[i].T).chunk(3, -1)[0].view(len(tokens), self.heads, 1, 128)
            a = nn.functional.scaled_dot_product_attention(q, self.keys[i][0], self.keys[i][1])
            h = h + self.reduce(a.reshape(len(tokens), -1) @ self.out[i].T)
            gate, up = (rms_norm(h, self.norms[2 * i + 1]) @ self.up[i].T).chunk(2, -1)
            h = h + self.reduce((nn.functional.silu(gate) * up) @ self.down[i].T)
        return (rms_norm(h, self.norms[-1]) @ self.head.T).argmax(-1)


def measure(rank: int, world: int, batches: tuple[int, ...]) -> list[str]:
    torch._inductor.config.compile_threads = 1  # type: ignore[attr-defined]
    torch._inductor.config._collective.auto_select = True  # type: ignore[attr-defined]
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    lines = []
    for batch in batches:
        torch.manual_seed(rank)
        model = Decoder(world, batch, name)
        for shared in (model.embedding, model.head, *model.norms):
            dist.broadcast(shared.data, 0)
        times: dict[str, float] = {}
        same = True
        for backend in ("inductor", "tpfuse"):
            torch._dynamo.reset()
            step = torch.compile(model, backend=backend, mode="reduce-overhead", dynamic=False)
            tokens = torch.arange(batch, device="cuda")
            taken = []
            with torch.no_grad():
                for number in range(30):
                    torch.cuda.synchronize()
                    dist.barrier()
                    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    start.record()
                    tokens = step(tokens).clone()
                    stop.record()
                    torch.cuda.synchronize()
                    if number >= 10:
                        taken.append(start.elapsed_time(stop) * 1e3)
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, (taken, tokens.tolist()))
            times[backend] = statistics.median(min(at) for at in zip(*(t for t, _ in everyone), strict=True))
            same = same and len({tuple(chosen) for _, chosen in everyone}) == 1
        lines.append(
            f"W={world} batch={batch}: inductor {times['inductor']:.0f} us, tpfuse {times['tpfuse']:.0f} us, ratio "
            f"{times['tpfuse'] / times['inductor']:.3f}, tokens equal on all ranks: {same}"
        )
    return lines


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=numbers, default=(2, 4))
    parser.add_argument("--batch", type=numbers, default=(1, 8, 32))
    args = parser.parse_args()
    for world in args.worlds:
        print("\n".join(run_ranks(measure, world, args.batch, timeout=600)[0]), flush=True)


if __name__ == "__main__":
    main()
