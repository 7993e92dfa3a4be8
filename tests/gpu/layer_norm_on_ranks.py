"""What the GPU tests of LayerNorm run on every rank. Each function returns complaints: empty means all was well."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from graphs_on_ranks import replays_equal_eager
from interpreted_ranks import Call, digest, expected, inputs, same_bits, ulps_apart
from tpfuse.ops import all_reduce_add_layer_norm, all_reduce_add_rms_norm, raise_if_failed
from tpfuse.ops.layer_norm_flavour import NAMED

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _op(call: Call, given: Any, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    def cuda(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.cuda()

    return all_reduce_add_layer_norm(
        given.xs[rank].cuda(),
        *(cuda(t) for t in (given.residual, given.weight, given.shift)),
        eps=call.eps,
        bias=cuda(given.bias),
        addend=cuda(given.addend),
        scale=call.scale,
        flavour=NAMED[call.flavour],
    )


def _complaints(call: Call, rank: int, world: int) -> list[str]:
    """The residual is exact, the norm within a rounding, a row does not depend on the other rows, and all ranks agree."""
    given = inputs(call, world)
    normed, residual = (t.cpu() for t in _op(call, given, rank))
    want, summed = expected(call, given)
    wrong = ["residual"] if ulps_apart(residual, summed) else []  # a library may keep the sign of a zero
    # An output may be a small difference of larger numbers: the bound is that of the largest of its row.
    finite = want.float().isfinite()
    size = torch.where(finite, want.float().abs(), 0.0).amax(-1, keepdim=True) + 1.0
    step = torch.finfo(call.dtype).eps
    allowed = size * (step * 16 * (1 + abs(call.mean)) if call.dtype == torch.float32 else step)
    apart = torch.where(finite, (normed.float() - want.float()).abs(), 0.0)
    if bool((apart > allowed).any()) or not torch.equal(normed.isnan(), want.isnan()):
        wrong.append(f"normed is {(apart / allowed).max().item():.2f} of the bound apart")
    if call.rows > 1 and call.bias != "full":
        first = [t[:1] for t in given.xs]
        cut = [None if t is None else t[:1] for t in (given.residual, given.addend)]
        alone = _op(replace(call, rows=1), replace(given, xs=first, residual=cut[0], addend=cut[1]), rank)
        if not all(same_bits(a.cpu()[0], b[0]) for a, b in zip(alone, (normed, residual), strict=True)):
            wrong.append("the first row alone has other bits")
    of_all: list[Any] = [None] * world
    dist.all_gather_object(of_all, digest(normed, residual))
    wrong += ["not the same on all ranks"] if len(set(of_all)) > 1 else []
    return [f"{call}: {what}" for what in wrong]


def edges(rank: int, world: int) -> list[str]:
    """Every flavour, dtype and kind of operand, over widths that one program, several and many steps hold."""
    kinds: list[dict[str, Any]] = [
        {},
        {"mean": 20.0},
        {"special": "zeros"},
        {"special": "denormals"},
        {"special": "nonfinite"},
        {"bias": "row", "addend": True},
        {"bias": "full", "scale": 0.22},
        {"residual": False},
        {"weight_dtype": torch.float32},
    ]
    complaints = []
    for n, kind in enumerate(kinds):
        for hidden in (72, 2880, 4096, 8192, 16384):
            for rows in (1, 2, 17, 150):
                dtype = torch.bfloat16 if "special" in kind or hidden > 8192 else DTYPES[(n + rows) % 3]
                flavour = sorted(NAMED)[(n + hidden // 8 + rows) % len(NAMED)]
                if "weight_dtype" in kind:
                    flavour = "layer_norm"
                call = Call(rows, hidden, dtype=dtype, layer_norm=True, flavour=flavour, eps=1e-5, seed=rows, **kind)
                complaints += _complaints(call, rank, world)
    torch.cuda.synchronize()
    raise_if_failed()
    return complaints[:10]


def random_calls(rank: int, world: int, count: int = 150) -> list[str]:
    """Calls of random shape in random order, an RMSNorm now and then: both use the plane's words between programs."""
    rng = random.Random(world)
    complaints = []
    for number in range(count):
        call = Call(
            rng.choice((1, 1, 2, 3, 8, 33, 200)),
            8 * rng.randrange(1, 1024),
            dtype=rng.choice(DTYPES),
            layer_norm=True,
            flavour=rng.choice(sorted(NAMED)),
            residual=rng.random() < 0.9,
            bias=rng.choice(("none", "row")),
            addend=rng.random() < 0.3,
            mean=rng.choice((0.0, 5.0)),
            eps=1e-5,
            seed=number,
        )
        complaints += _complaints(call, rank, world)
        if rng.random() < 0.3:
            x = torch.ones(call.rows, 8192, device="cuda", dtype=torch.bfloat16)
            normed, _ = all_reduce_add_rms_norm(x, x, torch.ones_like(x[0]))
            if not bool((normed == 1).all()):
                complaints.append(f"the RMSNorm behind call {number} is wrong")
    torch.cuda.synchronize()
    raise_if_failed()
    return complaints[:10]


def replays(rank: int, world: int) -> list[str]:
    """A CUDA graph of calls with both norms, replayed with other inputs, equals eager calls."""
    g = torch.Generator(device="cuda").manual_seed(rank)
    same = torch.Generator(device="cuda").manual_seed(99)
    x = torch.randn(40, 8192, generator=g, device="cuda").bfloat16()
    residual = torch.randn(40, 8192, generator=same, device="cuda").bfloat16()
    weight, shift = (torch.rand(8192, generator=same, device="cuda").bfloat16() for _ in range(2))

    def step() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for rows in (1, 8, 40):
            found += all_reduce_add_layer_norm(x[:rows], residual[:rows], weight, shift)
            found += all_reduce_add_rms_norm(x[:rows], residual[:rows], weight)
        return found

    return replays_equal_eager(step, lambda: x.copy_(torch.randn(40, 8192, generator=g, device="cuda")))
