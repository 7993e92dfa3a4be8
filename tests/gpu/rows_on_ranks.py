"""What the GPU tests of rows with destinations run on every rank. Each function returns complaints: empty means all was well."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from interpreted_ranks import Call, expected, inputs, of_rank, ulps_apart
from tpfuse.ops import all_reduce_add_rms_norm, raise_if_failed, reduce_rows_add_rms_norm
from tpfuse.ops.flavour import NAMED


def some_calls(world: int, count: int, seed: int) -> list[Call]:
    """The same on every rank: both ops in turn, unequal and zero rows kept, several widths and flavours."""
    rng = random.Random(seed)
    blocks = [n for n in range(2, world + 1) if world % n == 0]
    # Each kind and width is a set of kernels to compile: few of both, many sizes.
    kinds = [{}, {"dtype": torch.float32, "special": "zeros"}, {"flavour": "gemma", "bias": "full", "scale": 0.22}]
    calls = []
    for n in range(count):
        rows, hidden = rng.choice((1, 2, 3, 7, 16, 33, 64)), rng.choice((64, 7168))
        of = rng.choice((1, *blocks, *blocks))
        per_block = [rng.choice((0, 1, rows, rows)) for _ in range(of)]
        kept = tuple(min(rows, per_block[r * of // world]) for r in range(world)) if of > 1 else ()
        calls.append(Call(rows, hidden, blocks=of, kept=kept, seed=seed + n, **rng.choice(kinds)))  # type: ignore[arg-type]
    return calls


def _make(call: Call, rank: int, world: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, torch.Tensor]]:
    everything = inputs(call, world)
    mine = of_rank(call, everything, rank, world)

    def cuda(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.cuda()

    given = (everything.xs[rank].cuda(), cuda(mine.residual), cuda(mine.weight))
    options = {
        "eps": call.eps,
        "bias": cuda(mine.bias),
        "scale": call.scale,
        "flavour": NAMED[call.flavour],
        "post_norm": call.post_norm,
    }
    if call.blocks == 1:
        got = all_reduce_add_rms_norm(*given, **options)  # type: ignore[arg-type]
    else:
        got = reduce_rows_add_rms_norm(*given, blocks=call.blocks, **options)  # type: ignore[arg-type]
    return expected(call, mine), got


def mixed_calls(rank: int, world: int, count: int, seed: int) -> list[str]:
    """``count`` calls of both ops on one plane; the residual must be exact, the norm within a rounding."""
    complaints = []
    for number, call in enumerate(some_calls(world, count, seed)):
        want, got = _make(call, rank, world)
        allowed = (8, 8 * call.post_norm) if call.dtype == torch.float32 else (1, int(call.post_norm))
        for name, w, g, limit in zip(("normed", "residual"), want, got, allowed, strict=True):
            if ulps_apart(g.cpu(), w) > limit:
                complaints.append(f"call {number} {call}: {name} is {ulps_apart(g.cpu(), w)} ulps off")
    torch.cuda.synchronize()
    raise_if_failed()
    return complaints[:10]


def replays(rank: int, world: int) -> list[str]:
    """A CUDA graph of both ops, replayed with other inputs, between eager calls."""
    blocks = 2
    g = torch.Generator(device="cuda").manual_seed(rank)
    x = torch.randn(8, 4096, generator=g, device="cuda").bfloat16()
    same = torch.Generator(device="cuda").manual_seed(99)
    residual = torch.randn(4, 4096, generator=same, device="cuda").bfloat16()
    weight = torch.rand(4096, generator=same, device="cuda").bfloat16()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        _, h = reduce_rows_add_rms_norm(x, residual, weight, blocks=blocks)
        return all_reduce_add_rms_norm(x[:4], h, weight)

    step()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    complaints = []
    for n in range(20):
        x.copy_(torch.randn(8, 4096, generator=g, device="cuda"))
        graph.replay()
        found = [t.clone() for t in out]
        for name, a, b in zip(("normed", "residual"), found, step(), strict=True):
            if not torch.equal(a, b):
                complaints.append(f"replay {n}: {name} differs from an eager call")
    torch.cuda.synchronize()
    raise_if_failed()
    return complaints
