"""The op with an fp8 output against the op and a quantize kernel of Inductor behind it.

    python benchmarks/quant.py --ranks 2 --out results/

For each quantizer, H and number of rows: the op that quantizes, once with everything in one kernel (``TPFUSE_QUANT_ROWS`` above
all rows) and once with our kernel behind the norm (0); the op without quantization and what Inductor makes of the library's
steps; and FlashInfer's kernel of the same kind, where its package is installed. Each contender is a CUDA graph of 20 calls;
graphs are replayed in turn, and the median of the rounds is what is printed, of the slowest rank. A second table has the error of
the dequantized rows against fp64.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import turns

ROUNDS = 11
QUANTIZERS = ("vllm-static", "vllm-token", "vllm-group128-kernel", "deepgemm-ue8m0")
FLASHINFER = ("vllm-static", "vllm-token", "deepgemm-ue8m0")  # what FlashInfer has a pattern for
EPS = 1e-6
Line = dict[str, Any]


def steps_of(name: str) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The library's own steps from normed rows and a static scale to (fp8, scales), for Inductor to compile."""
    import torch

    top, fp8 = 448.0, torch.float8_e4m3fn

    def static(x: Any, scale: Any) -> tuple[Any, Any]:
        return (x.float() * scale.reciprocal()).clamp(-top, top).to(fp8), scale

    def token(x: Any, scale: Any) -> tuple[Any, Any]:
        s = (x.abs().amax(-1, keepdim=True).float() / top).clamp(min=1.0 / (top * 512.0))
        return (x.float() * s.reciprocal()).clamp(-top, top).to(fp8), s

    def group(x: Any, scale: Any) -> tuple[Any, Any]:
        y = x.float().unflatten(-1, (x.shape[-1] // 128, 128))
        s = y.abs().amax(-1, keepdim=True).clamp(min=1e-10) * (1.0 / top)
        return (y / s).clamp(-top, top).to(fp8).flatten(-2), s.squeeze(-1)

    def power_of_two(x: Any, scale: Any) -> tuple[Any, Any]:
        y = x.float().unflatten(-1, (x.shape[-1] // 128, 128))
        s = torch.exp2(torch.ceil(torch.log2(y.abs().amax(-1, keepdim=True).clamp(min=1e-10) * (1.0 / top))))
        return (y / s).clamp(-top, top).to(fp8).flatten(-2), s.squeeze(-1)  # not packed: less than the library does

    named = {"vllm-static": static, "vllm-token": token, "vllm-group128-kernel": group, "deepgemm-ue8m0": power_of_two}
    return named[name]


def contenders(name: str, x: Any, residual: Any, weight: Any, scale: Any, behind: bool) -> dict[str, Any]:
    """Name -> a function that makes one call and returns (fp8, scales)."""
    import torch
    import torch.distributed as dist
    from tpfuse.ops import all_reduce_add_rms_norm, all_reduce_add_rms_norm_quant
    from tpfuse.ops.experiment import Unavailable
    from tpfuse.ops.quant_reference import empty_scales
    from tpfuse.ops.quantizer import NAMED

    from tpfuse.measure.other_libraries import Problem, flashinfer

    quantizer = NAMED[name]
    static = scale if quantizer.granularity == "tensor" else None
    compiled = torch.compile(steps_of(name), dynamic=True)

    def ours() -> tuple[Any, Any]:
        found = all_reduce_add_rms_norm_quant(x, residual, weight, quantizer=quantizer, static_scale=static, eps=EPS)
        return found[0], found[1] if found[1].numel() else scale

    def inductor() -> tuple[Any, Any]:
        return compiled(all_reduce_add_rms_norm(x, residual, weight, eps=EPS)[0], scale)

    if behind:
        return {"ours behind": ours}
    found: dict[str, Any] = {"one kernel": ours, "inductor": inductor}
    if name in FLASHINFER:
        rank, world = dist.get_rank(), dist.get_world_size()
        group = dist.group.WORLD.group_name  # type: ignore[union-attr]
        shared = torch.cuda.device_count() < world
        scales = scale if static is not None else empty_scales(x, quantizer)
        try:
            make = flashinfer(pdl=True, fp8=quantizer.granularity, scales=scales)
            call = make(Problem(x, residual, weight, EPS, rank, world, group, shared))
            found["flashinfer"] = lambda: (call()[0], scales)
        except Unavailable as reason:
            if rank == 0 and x.shape[0] == 1:
                print(f"flashinfer: {reason}", flush=True)
    return found


def unpacked(scales: Any, hidden: int) -> Any:
    """``(rows, ceil(hidden / 512))`` int32, four exponents each, as ``(rows, ceil(hidden / 128))`` fp32 powers of two."""
    import torch

    exponents = torch.stack([scales >> shift & 0xFF for shift in (0, 8, 16, 24)], -1).flatten(-2)
    return (exponents[:, : -(-hidden // 128)] << 23).view(torch.float32)


def error(result: tuple[Any, Any], truth: Any) -> float:
    """Root mean square of the error of the dequantized rows, over that of the rows."""
    import torch

    quantized, scales = result
    values = quantized.double()
    if scales.dtype == torch.int32:
        scales = unpacked(scales, values.shape[-1])
    if scales.dim() and scales.shape[-1] > 1:
        values = (values.unflatten(-1, (scales.shape[-1], 128)) * scales.double().unsqueeze(-1)).flatten(-2)
    else:
        values = values * scales.double()
    return float(((values - truth).square().mean() / truth.square().mean()).sqrt())


def truth_of(x: Any, residual: Any, weight: Any) -> Any:
    """The normed rows in fp64, from the parts of all ranks."""
    import torch
    import torch.distributed as dist

    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x.cpu())
    h = residual.double() + sum(torch.as_tensor(p).double() for p in parts).to(residual.device)  # type: ignore[union-attr]
    return weight.double() * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)


def measure(rank: int, world: int, rows: tuple[int, ...], widths: tuple[int, ...], behind: bool) -> list[Line]:
    """One line for each (quantizer, H, rows)."""
    import torch
    from tpfuse.ops import raise_if_failed

    lines = []
    with torch.no_grad():
        for name in QUANTIZERS:
            for hidden in widths:
                for count in rows:
                    own = torch.Generator(device="cuda").manual_seed(rank)
                    same = torch.Generator(device="cuda").manual_seed(99)
                    x = torch.randn(count, hidden, generator=own, device="cuda").bfloat16()
                    residual = torch.randn(count, hidden, generator=same, device="cuda").bfloat16()
                    weight = torch.rand(hidden, generator=same, device="cuda").bfloat16()
                    scale = torch.tensor(4.0 / 448.0, device="cuda")
                    calls = contenders(name, x, residual, weight, scale, behind)
                    truth = truth_of(x, residual, weight)
                    errors = {who: error(call(), truth) for who, call in calls.items()}
                    line: Line = {
                        "quantizer": name,
                        "hidden": hidden,
                        "rows": count,
                        "us": turns.microseconds(calls, ROUNDS),
                        "error": errors,
                    }
                    lines.append(line)
    torch.cuda.synchronize()
    raise_if_failed()
    return lines


def joined(first: list[Line], second: list[Line]) -> list[Line]:
    """The lines of both runs, with the contenders of both."""
    return [
        {**a, "us": {**a["us"], **b["us"]}, "error": {**a["error"], **b["error"]}}
        for a, b in zip(first, second, strict=True)
    ]


def table(lines: list[Line]) -> str:
    """Times with the ratio of one kernel to Inductor's, then errors."""
    names = sorted({who for line in lines for who in line["us"]})
    text = [f"{'quantizer':22}{'H':>6}{'rows':>6}" + "".join(f"{n:>14}" for n in names) + f"{'ratio':>8}  (us)"]
    for line in lines:
        us = line["us"]
        cells = "".join(f"{us[n]:14.2f}" if n in us else f"{'-':>14}" for n in names)
        ratio = us["one kernel"] / us["inductor"]
        text.append(f"{line['quantizer']:22}{line['hidden']:6}{line['rows']:6}{cells}{ratio:8.2f}")
    for other in ("inductor", "flashinfer"):
        for limit, label in ((32, "1 to 32 rows"), (1 << 60, "all rows")):
            times = [ln["us"] for ln in lines if ln["rows"] <= limit and other in ln["us"]]
            ratios = [us["one kernel"] / us[other] for us in times]
            if ratios:
                mean = statistics.geometric_mean(ratios)
                text.append(f"one kernel over {other}, {label}: {mean:.3f}, worst {max(ratios):.3f}")
    text += [
        "",
        f"{'error against fp64':22}{'H':>6}" + "".join(f"{n:>14}" for n in names) + "  (relative, root mean square)",
    ]
    for quantizer in QUANTIZERS:
        for hidden in sorted({line["hidden"] for line in lines}):
            mine = [ln["error"] for ln in lines if (ln["quantizer"], ln["hidden"]) == (quantizer, hidden)]
            means = [
                statistics.mean([e[n] for e in mine if n in e]) if any(n in e for e in mine) else None for n in names
            ]
            text.append(
                f"{quantizer:22}{hidden:6}" + "".join(f"{'-':>14}" if m is None else f"{m:14.3e}" for m in means)
            )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", default="1,4,16,32,64,128,256")
    parser.add_argument("--hidden", default="4096,7168", help="multiples of 128")
    parser.add_argument("--out", type=Path, help="folder for quant-RANKS.json")
    args = parser.parse_args()
    from tpfuse.measure import tables
    from tpfuse.measure.ranks import run_ranks, why_not

    missing = why_not(args.ranks)
    if missing:
        parser.exit(2, f"quant.py: {missing}\n")
    rows, widths = (tuple(int(n) for n in text.split(",")) for text in (args.rows, args.hidden))
    found = []
    for behind in (False, True):
        env = {"TPFUSE_QUANT_ROWS": "0" if behind else str(max(rows)), "TPFUSE_WATCHDOG_SECONDS": "20"}
        found.append(run_ranks(measure, args.ranks, rows, widths, behind, timeout=300, env=env)[0])
    lines = joined(*found)
    print(table(lines))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        stored = {"facts": tables.facts(), "ranks": args.ranks, "rows": lines}
        (args.out / f"quant-{args.ranks}.json").write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
