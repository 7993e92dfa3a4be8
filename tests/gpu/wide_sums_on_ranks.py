"""What the GPU tests of fp32 parts beside a 16-bit residual run on every rank. Complaints come back, none where all was well."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import layer_norm_on_ranks
import on_ranks
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from graphs_on_ranks import replays_equal_eager
from interpreted_ranks import Call, digest, expected, inputs, ulps_apart
from tpfuse.ops import all_reduce_add_layer_norm, all_reduce_add_rms_norm, raise_if_failed
from tpfuse.ops.flavour import NAMED
from tpfuse.ops.layer_norm_flavour import NAMED as LAYER_NORMS

DTYPES = (torch.bfloat16, torch.float16)
KINDS: list[dict[str, Any]] = [
    {},
    {"special": "zeros"},
    {"special": "nonfinite"},
    {"special": "denormals"},
    {"flavour": "gemma", "bias": "row", "scale": 0.22},
    {"bias": "full"},
    {"flavour": "olmo2", "post_norm": True},
    {"layer_norm": True, "flavour": "layer_norm", "eps": 1e-5, "bias": "row"},
    {"layer_norm": True, "flavour": "cohere", "eps": 1e-5, "addend": True},
]


def _complaints(call: Call, rank: int, world: int) -> list[str]:
    """The residual is exact, the norm within the roundings behind it, and all ranks have the same bits."""
    if call.layer_norm:
        return layer_norm_on_ranks._complaints(call, rank, world)
    normed, residual = (t.cpu() for t in on_ranks.make_call(call, rank, world))
    want, summed = expected(call, inputs(call, world))
    form = NAMED[call.flavour]
    allowed = 2 if call.special == "denormals" or (form.normed == "input" and form.gain != "none") else 1
    apart = ulps_apart(normed, want), ulps_apart(residual, summed)
    of_all: list[Any] = [None] * world
    dist.all_gather_object(of_all, digest(normed, residual))
    wrong = ["not the same on all ranks"] if len(set(of_all)) > 1 else []
    if apart[0] > allowed or (apart[1] and not call.post_norm):
        wrong.append(f"{apart} ulps from the reference, allowed {allowed}")
    if call.post_norm:  # a small difference of residual and norm, which is a rounding apart
        bound = 2 * torch.finfo(call.dtype).eps * (want.float().abs() + summed.float().abs())
        wrong += ["residual"] if bool(((residual.float() - summed.float()).abs() > bound).any()) else []
    return [f"{call}: {what}" for what in wrong]


def edges(rank: int, world: int) -> list[str]:
    """Every kind of operand, over widths that one program, several and many steps hold; both dtypes in turn."""
    complaints = []
    for n, kind in enumerate(KINDS):
        for hidden in (72, 4096, 7168, 8192):
            for rows in (1, 17, 150):
                call = Call(rows, hidden, dtype=DTYPES[(n + rows) % 2], wide_sum=True, seed=rows + n, **kind)
                complaints += _complaints(call, rank, world)
    torch.cuda.synchronize()
    raise_if_failed()
    return complaints[:10]


def random_calls(rank: int, world: int, count: int = 300) -> list[str]:
    """Calls with wide and with narrow parts in random order on one plane."""
    rng = random.Random(world)
    complaints = []
    for number in range(count):
        kind = rng.choice(KINDS[:7])
        rows, hidden = rng.choice((1, 1, 2, 3, 8, 33, 200)), rng.choice((72, 7168))
        call = Call(rows, hidden, wide_sum=True, seed=number, **kind)
        complaints += _complaints(call, rank, world)
        if rng.random() < 0.5:
            complaints += _complaints(replace(call, wide_sum=False), rank, world)
    torch.cuda.synchronize()
    raise_if_failed()
    return complaints[:10]


def replays(rank: int, world: int) -> list[str]:
    """A CUDA graph of calls with wide and narrow parts, replayed with other inputs, equals eager calls."""
    own = torch.Generator(device="cuda").manual_seed(rank)
    same = torch.Generator(device="cuda").manual_seed(99)
    x = torch.randn(40, 7168, generator=own, device="cuda")
    residual = torch.randn(40, 7168, generator=same, device="cuda").bfloat16()
    weight, shift = (torch.rand(7168, generator=same, device="cuda").bfloat16() for _ in range(2))

    def step() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for rows in (1, 8, 40):
            found += all_reduce_add_rms_norm(x[:rows], residual[:rows], weight)
            found += all_reduce_add_rms_norm(x[:rows].bfloat16(), residual[:rows], weight)
            found += all_reduce_add_layer_norm(
                x[:rows], residual[:rows], weight, shift, flavour=LAYER_NORMS["layer_norm"]
            )
        return found

    return replays_equal_eager(step, lambda: x.copy_(torch.randn(40, 7168, generator=own, device="cuda")))
