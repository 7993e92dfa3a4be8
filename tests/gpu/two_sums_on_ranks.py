"""What the GPU tests of two partial sums run on every rank. Each function returns complaints: empty means all was well."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from graphs_on_ranks import replays_equal_eager
from interpreted_ranks import Call, digest, expected, inputs, layer_norm_flavour, same_bits, ulps_apart
from tpfuse.ops import all_reduce_add_layer_norm, all_reduce_add_rms_norm, raise_if_failed
from tpfuse.ops.flavour import NAMED

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RMS: list[dict[str, Any]] = [
    {"bias": "partial", **kind}
    for kind in (
        {},
        {"residual_first": True},
        {"special": "zeros"},
        {"special": "negative_zeros", "residual_first": True},
        {"special": "nonfinite"},
        {"special": "denormals"},
        {"scale": 0.22, "flavour": "gemma"},
        {"scale": 2.5, "scale_tensor": True, "scale_first": True},
        {"scale_rows": True, "scale_first": True},
        {"post_norm": True, "flavour": "olmo2"},
        {"flavour": "vllm"},
        {"wide_residual": True, "flavour": "sglang", "weight_dtype": torch.float32},
        {"residual": False},
    )
]
LAYER: list[dict[str, Any]] = [
    {"layer_norm": True, "partial_addend": True, "eps": 1e-5, "flavour": "layer_norm", **kind}
    for kind in (
        {},
        {"bias": "row", "addend_bias": True},
        {"addend_bias": True, "mean": 20.0},
        {"flavour": "cohere", "residual_first": True},
        {"flavour": "cohere", "residual_first": True, "bias": "row", "addend_bias": True},
        {"bias": "full", "scale": 0.5},
        {"special": "zeros", "residual": False},
    )
]


def _op(call: Call, given: Any, rank: int) -> tuple[Tensor, Tensor]:
    def cuda(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.cuda()

    operands = given.xs[rank].cuda(), cuda(given.residual), cuda(given.weight)
    second = given.seconds[rank].cuda()
    if call.layer_norm:
        return all_reduce_add_layer_norm(
            *operands,
            cuda(given.shift),
            eps=call.eps,
            bias=cuda(given.bias),
            addend=second,
            scale=call.scale,
            flavour=layer_norm_flavour(call),
            partial_addend=True,
            addend_bias=cuda(given.addend_bias),
            residual_first=call.residual_first,
        )
    return all_reduce_add_rms_norm(
        *operands,
        eps=call.eps,
        bias=second,
        scale=cuda(factor) if isinstance(factor := call.scale_value, Tensor) else factor,
        scale_first=call.scale_first,
        flavour=NAMED[call.flavour],
        post_norm=call.post_norm,
        partial_bias=True,
        residual_first=call.residual_first,
    )


def _complaints(call: Call, rank: int, world: int) -> list[str]:
    """Without post-norm the residual is exact; the norm is within a rounding, a row alone and all ranks have the same bits."""
    given = inputs(call, world)
    normed, residual = (t.cpu() for t in _op(call, given, rank))
    want, summed = expected(call, given)
    wrong = ["residual"] if not call.post_norm and ulps_apart(residual, summed) else []
    finite = want.float().isfinite()
    size = torch.where(finite, want.float().abs(), 0.0).amax(-1, keepdim=True) + 1.0
    step = torch.finfo(normed.dtype).eps
    allowed = size * (step * 16 * (1 + abs(call.mean)) if normed.dtype == torch.float32 else 2 * step)
    for name, got, exact in (("normed", normed, want), *((("residual", residual, summed),) if call.post_norm else ())):
        apart = torch.where(finite, (got.float() - exact.float()).abs(), 0.0)
        if bool((apart > allowed).any()) or not torch.equal(got.isnan(), exact.isnan()):
            wrong.append(f"{name} is {(apart / allowed).max().item():.2f} of the bound apart")
    if call.rows > 1 and call.bias != "full" and not call.scale_rows:
        cut = replace(
            given,
            xs=[t[:1] for t in given.xs],
            seconds=[t[:1] for t in given.seconds],
            residual=None if given.residual is None else given.residual[:1],
        )
        alone = _op(replace(call, rows=1), cut, rank)
        if not all(same_bits(a.cpu()[0], b[0]) for a, b in zip(alone, (normed, residual), strict=True)):
            wrong.append("the first row alone has other bits")
    of_all: list[Any] = [None] * world
    dist.all_gather_object(of_all, digest(normed, residual))
    wrong += ["not the same on all ranks"] if len(set(of_all)) > 1 else []
    return [f"{call}: {what}" for what in wrong]


def edges(rank: int, world: int) -> list[str]:
    """Every kind of operand and order, over widths that one program, several and many steps hold."""
    complaints = []
    for n, kind in enumerate(RMS + LAYER):
        for hidden in (72, 2880, 8192, 16384):
            for rows in (1, 3, 17, 150):
                narrow = "special" in kind or "wide_residual" in kind or kind.get("flavour") == "vllm" or hidden > 8192
                call = Call(
                    rows, hidden, dtype=torch.bfloat16 if narrow else DTYPES[(n + hidden // 8) % 3], seed=rows, **kind
                )
                complaints += _complaints(call, rank, world)
    torch.cuda.synchronize()
    raise_if_failed()
    return complaints[:10]


def random_calls(rank: int, world: int, count: int = 400) -> list[str]:
    """Calls of one and of two sums in random order on one plane."""
    rng = random.Random(world)
    complaints = []
    for number in range(count):
        kind = rng.choice(RMS[:4] + LAYER[:5])
        # One dtype a width: each kind of call compiles kernels for every number of rows.
        rows, (hidden, dtype) = (
            rng.choice((1, 1, 2, 3, 8, 33, 200)),
            rng.choice(list(zip((72, 2880, 8192), DTYPES, strict=True))),
        )
        complaints += _complaints(Call(rows, hidden, dtype=dtype, seed=number, **kind), rank, world)
        if rng.random() < 0.5:
            x = torch.ones(rows, 8192, device="cuda", dtype=torch.bfloat16)
            normed, _ = all_reduce_add_rms_norm(x, x, torch.ones_like(x[0]))
            if not bool((normed == 1).all()):
                complaints.append(f"the call of one sum behind call {number} is wrong")
    torch.cuda.synchronize()
    raise_if_failed()
    return complaints[:10]


def replays(rank: int, world: int) -> list[str]:
    """A CUDA graph of calls of one and of two sums, replayed with other inputs, equals eager calls."""
    own = torch.Generator(device="cuda").manual_seed(rank)
    same = torch.Generator(device="cuda").manual_seed(99)
    x, second = (torch.randn(40, 8192, generator=own, device="cuda").bfloat16() for _ in range(2))
    residual = torch.randn(40, 8192, generator=same, device="cuda").bfloat16()
    weight, shift = (torch.rand(8192, generator=same, device="cuda").bfloat16() for _ in range(2))

    def step() -> list[Tensor]:
        found: list[Tensor] = []
        for rows in (1, 8, 40):
            a, b, r = x[:rows], second[:rows], residual[:rows]
            found += all_reduce_add_rms_norm(a, r, weight, bias=b, partial_bias=True)
            found += all_reduce_add_layer_norm(
                a, r, weight, shift, bias=shift, addend=b, partial_addend=True, addend_bias=weight
            )
            found += all_reduce_add_rms_norm(a, r, weight)
        return found

    def change() -> None:
        for t in (x, second):
            t.copy_(torch.randn(40, 8192, generator=own, device="cuda"))

    return replays_equal_eager(step, change)
