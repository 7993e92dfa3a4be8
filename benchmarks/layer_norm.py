"""The op with a LayerNorm against NCCL's all-reduce and what Inductor makes of the add and the LayerNorm behind it.

    python benchmarks/layer_norm.py --ranks 2 --out results/

For each H and number of rows: the op, NCCL with Inductor's kernel, and the op with an RMSNorm, which shows what the mean costs.
Each contender is a CUDA graph of 20 calls; graphs are replayed in turn, and the median of the rounds is what is printed, of the
slowest rank. The last columns have the error of the normed rows against fp64, of the op and of Inductor's kernel.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import turns

ROUNDS = 15
EPS = 1e-5
Line = dict[str, Any]


def contenders(x: Any, residual: Any, weight: Any, bias: Any) -> dict[str, Any]:
    """Name -> a function that makes one call and returns (normed, residual sum)."""
    import torch
    import torch.distributed as dist
    from tpfuse.ops import all_reduce_add_layer_norm, all_reduce_add_rms_norm

    whole = torch.empty_like(x)

    @torch.compile(dynamic=True)
    def add_norm(y: Any, r: Any) -> Any:
        h = r + y
        return torch.nn.functional.layer_norm(h, (h.shape[-1],), weight, bias, EPS), h

    def nccl() -> Any:
        whole.copy_(x)  # NCCL sums in place, and the next call needs x as it was
        dist.all_reduce(whole)
        return add_norm(whole, residual)

    return {
        "tpfuse": lambda: all_reduce_add_layer_norm(x, residual, weight, bias, eps=EPS),
        "nccl": nccl,
        "rms_norm": lambda: all_reduce_add_rms_norm(x, residual, weight, eps=EPS),
    }


def error(normed: Any, x: Any, residual: Any, weight: Any, bias: Any) -> float:
    """Root mean square of the error of normed rows, over that of the rows."""
    import torch
    import torch.distributed as dist

    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x.cpu())
    h = residual.double() + sum(p.double() for p in parts).to(residual.device)
    truth = torch.nn.functional.layer_norm(h, (h.shape[-1],), weight.double(), bias.double(), EPS)
    return float(((normed.double() - truth).square().mean() / truth.square().mean()).sqrt())


def measure(rank: int, world: int, rows: tuple[int, ...], widths: tuple[int, ...], mean: float) -> list[Line]:
    """One line for each (H, rows)."""
    import torch
    from tpfuse.ops import raise_if_failed

    lines: list[Line] = []
    with torch.no_grad():
        for hidden in widths:
            for count in rows:
                own = torch.Generator(device="cuda").manual_seed(rank)
                same = torch.Generator(device="cuda").manual_seed(99)
                x = torch.randn(count, hidden, generator=own, device="cuda").bfloat16()
                residual = (torch.randn(count, hidden, generator=same, device="cuda") + mean).bfloat16()
                weight, bias = (torch.rand(hidden, generator=same, device="cuda").bfloat16() for _ in range(2))
                calls = contenders(x, residual, weight, bias)
                errors = {who: error(calls[who]()[0], x, residual, weight, bias) for who in ("tpfuse", "nccl")}
                lines.append(
                    {"hidden": hidden, "rows": count, "us": turns.microseconds(calls, ROUNDS), "error": errors}
                )
    torch.cuda.synchronize()
    raise_if_failed()
    return lines


def table(lines: list[Line]) -> str:
    """Times, the ratio of the op to NCCL and Inductor, that of the op to the op with an RMSNorm, and errors."""
    names = ("tpfuse", "nccl", "rms_norm")
    text = [f"{'H':>6}{'rows':>6}" + "".join(f"{n:>10}" for n in names) + f"{'/nccl':>8}{'/rms':>8}{'error':>22}"]
    for line in lines:
        us, errors = line["us"], line["error"]
        text.append(
            f"{line['hidden']:6}{line['rows']:6}"
            + "".join(f"{us[n]:10.2f}" for n in names)
            + f"{us['tpfuse'] / us['nccl']:8.2f}{us['tpfuse'] / us['rms_norm']:8.2f}"
            + f"{errors['tpfuse']:11.2e}{errors['nccl']:11.2e}"
        )
    for other in names[1:]:
        ratios = [line["us"]["tpfuse"] / line["us"][other] for line in lines]
        text.append(f"tpfuse over {other}: {statistics.geometric_mean(ratios):.3f}, worst {max(ratios):.3f}")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,512")
    parser.add_argument("--hidden", default="4608,6144,8192", help="Starcoder2 15B, Nemotron 15B, Command R")
    parser.add_argument("--mean", type=float, default=0.0, help="of the residual's rows, in their standard deviations")
    parser.add_argument("--out", type=Path, help="folder for layer-norm-RANKS.json")
    args = parser.parse_args()
    from tpfuse.measure import tables
    from tpfuse.measure.ranks import run_ranks, why_not

    missing = why_not(args.ranks)
    if missing:
        parser.exit(2, f"layer_norm.py: {missing}\n")
    rows, widths = (tuple(int(n) for n in text.split(",")) for text in (args.rows, args.hidden))
    env = {"TPFUSE_WATCHDOG_SECONDS": "20"}
    lines = run_ranks(measure, args.ranks, rows, widths, args.mean, timeout=500, env=env)[0]
    print(table(lines))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        stored = {"facts": tables.facts(), "ranks": args.ranks, "mean": args.mean, "rows": lines}
        (args.out / f"layer-norm-{args.ranks}.json").write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
