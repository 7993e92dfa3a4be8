"""What the GPU tests of quantized output run on every rank. Each function returns complaints: empty means all was well."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from graphs_on_ranks import captured, replays_equal_eager
from interpreted_ranks import Call, digest, inputs, same_bits
from tpfuse.ops import all_reduce_add_rms_norm, all_reduce_add_rms_norm_quant, raise_if_failed
from tpfuse.ops.flavour import NAMED as FLAVOURS
from tpfuse.ops.quant_reference import quantize
from tpfuse.ops.quantizer import NAMED

SCALE = 0.037


def _make(call: Call, rank: int, world: int) -> tuple[Any, Any, Any]:
    """What the op gives with the norm and without it, and what the op that does not quantize gives."""
    given = inputs(call, world)

    def cuda(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.cuda()

    quantizer = NAMED[call.quantizer]
    rows = given.xs[rank].cuda(), cuda(given.residual), cuda(given.weight)
    rest: dict[str, Any] = {
        "eps": call.eps,
        "bias": cuda(given.bias),
        "scale": call.scale,
        "flavour": FLAVOURS[call.flavour],
        "post_norm": call.post_norm,
    }
    static = torch.tensor(SCALE, device="cuda") if quantizer.granularity == "tensor" else None
    kept, alone = (
        all_reduce_add_rms_norm_quant(*rows, quantizer=quantizer, static_scale=static, keep_normed=keep, **rest)
        for keep in (True, False)
    )
    return kept, alone, all_reduce_add_rms_norm(*rows, **rest)


def _complaints(call: Call, rank: int, world: int) -> list[str]:
    """Norm and residual are those of the op that does not quantize, bit for bit; fp8 and scales are what becomes of that norm.

    The op that does not quantize is compared with the reference in ``on_ranks.py``.
    """
    got, alone, plain = _make(call, rank, world)
    quantizer = NAMED[call.quantizer]
    static = torch.tensor(SCALE) if quantizer.granularity == "tensor" else None
    want = quantize(plain[0].cpu(), quantizer, static)
    wrong = [n for n, g, w in zip(("quantized", "scales"), got, want, strict=False) if not same_bits(g.cpu(), w)]
    wrong += [f"{n} where normed is not kept" for n, g, w in zip(("quantized", "scales"), alone, want, strict=False)
              if not same_bits(g.cpu(), w)]  # fmt: skip
    wrong += ["scales' strides"] if got[1].stride() != want[1].stride() else []
    wrong += [n for n, g, w in zip(("normed", "residual"), got[2:], plain, strict=True) if not same_bits(g, w)]
    wrong += [] if same_bits(alone[3], plain[1]) else ["residual where normed is not kept"]
    of_all: list[Any] = [None] * world
    dist.all_gather_object(of_all, digest(*(t.cpu() for t in got[:2])))
    wrong += ["not the same on all ranks"] if len(set(of_all)) > 1 else []
    return [f"{call}: {what}" for what in wrong]


def edges(rank: int, world: int, part: int = 0, parts: int = 1) -> list[str]:
    """Every quantizer, dtype and kind of row; rows on both sides of the cap, which is 16.

    Nearly all of the time is compiling, so several runs at once may each take one of ``parts`` of the quantizers.
    """
    rng = random.Random(world)
    kinds = [{}, {"special": "zeros"}, {"special": "denormals"}, {"special": "nonfinite"}, {"flavour": "vllm"}]
    kinds += [
        {"flavour": "olmo2", "post_norm": True},
        {"flavour": "gemma", "weight_dtype": torch.float32, "bias": "row"},
    ]
    complaints = []
    for n, name in list(enumerate(sorted(NAMED)))[part::parts]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            hidden = (4096, 2880, 7168)[n % 3]
            for rows in (1, 2, 16, 17, 70):
                kind = rng.choice(kinds) if dtype == torch.bfloat16 else {}
                call = Call(rows, hidden, dtype=dtype, quantizer=name, seed=rows, **kind)  # type: ignore[arg-type]
                complaints += _complaints(call, rank, world)
    torch.cuda.synchronize()
    raise_if_failed()
    return complaints[:10]


def replays(rank: int, world: int) -> list[str]:
    """A CUDA graph of quantized and plain calls, replayed with other inputs, equals eager calls."""
    g = torch.Generator(device="cuda").manual_seed(rank)
    same = torch.Generator(device="cuda").manual_seed(99)
    x = torch.randn(40, 4096, generator=g, device="cuda").bfloat16()
    residual = torch.randn(40, 4096, generator=same, device="cuda").bfloat16()
    weight = torch.rand(4096, generator=same, device="cuda").bfloat16()

    def step() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for name in ("vllm-token", "deepgemm-ue8m0"):
            for rows in (1, 8, 40):
                found += all_reduce_add_rms_norm_quant(x[:rows], residual[:rows], weight, quantizer=NAMED[name])
            found += all_reduce_add_rms_norm(x[:4], residual[:4], weight)
        return found

    return replays_equal_eager(step, lambda: x.copy_(torch.randn(40, 4096, generator=g, device="cuda")))


def products(rank: int, world: int, replays: int = 200) -> list[str]:
    """Matrix products that a CUDA graph puts directly behind calls read what these have written, not what was there before.

    A library may launch such a product while the call before it still waits for its peers (programmatic dependent launch). The
    last rank comes late, so that all others wait. Each product is compared with that of the same bytes made alone.
    """
    g = torch.Generator(device="cuda").manual_seed(rank)
    same = torch.Generator(device="cuda").manual_seed(98)
    hidden, widths, sizes = 4096, (3072, 14336), (1, 8, 32, 128)  # Llama-3-8B's projections, over two ranks
    residual = torch.randn(max(sizes), hidden, generator=same, device="cuda").bfloat16()
    weight = torch.rand(hidden, generator=same, device="cuda").bfloat16()
    plain = [torch.randn(hidden, n, generator=same, device="cuda").bfloat16() for n in widths]
    fp8 = [torch.randn(n, hidden, generator=same, device="cuda").to(torch.float8_e4m3fn).t() for n in widths]
    fp8_scales = [torch.rand(1, n, generator=same, device="cuda") for n in widths]
    xs = [torch.zeros(rows, hidden, device="cuda", dtype=torch.bfloat16) for rows in sizes for _ in range(4)]

    def product(rows: tuple[torch.Tensor, ...], n: int) -> torch.Tensor:
        if len(rows) == 1:
            return rows[0] @ plain[n]
        return torch._scaled_mm(
            rows[0], fp8[n], scale_a=rows[1], scale_b=fp8_scales[n], out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def step() -> list[tuple[tuple[torch.Tensor, ...], int, torch.Tensor]]:
        found: list[tuple[tuple[torch.Tensor, ...], int, torch.Tensor]] = []
        for number, x in enumerate(xs):
            r = residual[: x.shape[0]]
            for quantized in (True, False):
                if rank == world - 1:
                    torch.cuda._sleep(10_000)  # cycles
                if quantized:
                    rows = all_reduce_add_rms_norm_quant(x, r, weight, quantizer=NAMED["vllm-token"])[:2]
                else:
                    rows = all_reduce_add_rms_norm(x, r, weight)[:1]
                n = number % len(widths)
                found.append((tuple(rows), n, product(tuple(rows), n)))
        return found

    graph, found = captured(step)
    wrong: dict[str, int] = {}
    for n in range(replays):
        for x in xs:  # of other sizes each time: a scale that was there before is wrong
            x.copy_(torch.randn(x.shape, generator=g, device="cuda") * 2.0 ** (n % 7 - 3))
        graph.replay()
        torch.cuda.synchronize()
        for rows, width, got in found:
            if not same_bits(got, product(rows, width)):
                kind = "fp8" if len(rows) == 2 else "bf16"
                what = f"{kind} product of {got.shape[1]} columns behind a call of {got.shape[0]} rows"
                wrong[what] = wrong.get(what, 0) + 1
    raise_if_failed()
    return [f"{what}: {times} of {replays * 2} times" for what, times in wrong.items()]
