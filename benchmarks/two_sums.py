"""Two partial sums in one call of the op, against one call behind NCCL's all-reduce of the second, and against NCCL and Inductor.

    python benchmarks/two_sums.py --ranks 2 --out results/

For each norm, H and number of rows, microseconds of: ``one_op``, the op that reduces both sums; ``nccl_then_op``, NCCL's sum
of the second and the op with its result; ``nccl``, both sums by NCCL and Inductor's kernel behind them; ``merged``, the sum
of both parts in one add and the op behind it, which rounds differently (relaxed numerics); ``one_sum``, the op without a
second sum. NCCL sums in place and each call needs fresh parts, so ``nccl_then_op`` has one copy in it and ``nccl`` two:
``copy`` is the time of one, and the ratios are taken without. Each contender is a CUDA graph of 20 calls; graphs are
replayed in turn, and the median of the rounds is what is printed, of the slowest rank.
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
NAMES = ("one_op", "nccl_then_op", "nccl", "merged", "one_sum", "copy")
COPIES = {"nccl_then_op": 1, "nccl": 2}
Line = dict[str, Any]


def contenders(norm: str, a: Any, b: Any, residual: Any, weight: Any, shift: Any) -> dict[str, Any]:
    """Name -> a function that makes one call and returns (normed, residual sum). Phi's vectors with a LayerNorm."""
    import torch
    import torch.distributed as dist
    from tpfuse.ops import all_reduce_add_layer_norm, all_reduce_add_rms_norm

    first, second = torch.empty_like(a), torch.empty_like(b)

    @torch.compile(dynamic=True)
    def add_norm(sa: Any, sb: Any, r: Any) -> Any:
        if norm == "rms_norm":
            h = r + (sa + sb)
            f = h.float()
            return weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).to(h.dtype), h
        h = r + ((sa + shift) + (sb + weight))
        return torch.nn.functional.layer_norm(h, (h.shape[-1],), weight, shift, EPS), h

    def summed(x: Any, into: Any) -> Any:
        into.copy_(x)
        dist.all_reduce(into)
        return into

    def op(x: Any, **more: Any) -> Any:
        if norm == "rms_norm":
            return all_reduce_add_rms_norm(x, residual, weight, eps=EPS, **more)
        names = {"bias": "addend", "partial_bias": "partial_addend"}
        more = {names.get(name, name): value for name, value in more.items()}
        return all_reduce_add_layer_norm(x, residual, weight, shift, eps=EPS, bias=shift, **more)

    def nccl_then_op() -> Any:
        whole = summed(b, second)
        return op(a, bias=whole if norm == "rms_norm" else whole + weight)

    behind = {} if norm == "rms_norm" else {"addend_bias": weight}
    return {
        "one_op": lambda: op(a, bias=b, partial_bias=True, **behind),
        "nccl_then_op": nccl_then_op,
        "nccl": lambda: add_norm(summed(a, first), summed(b, second), residual),
        "merged": lambda: op(a + b),
        "one_sum": lambda: op(a),
        "copy": lambda: first.copy_(a),
    }


def measure(
    rank: int, world: int, norms: tuple[str, ...], rows: tuple[int, ...], widths: tuple[int, ...]
) -> list[Line]:
    """One line for each (norm, H, rows). Raises ``AssertionError`` where the op differs from NCCL's sums between two ranks."""
    import torch
    from tpfuse.ops import raise_if_failed

    lines: list[Line] = []
    with torch.no_grad():
        for norm in norms:
            for hidden in widths:
                for count in rows:
                    own = torch.Generator(device="cuda").manual_seed(rank)
                    same = torch.Generator(device="cuda").manual_seed(99)
                    a, b = (torch.randn(count, hidden, generator=own, device="cuda").bfloat16() for _ in range(2))
                    residual = torch.randn(count, hidden, generator=same, device="cuda").bfloat16()
                    weight, shift = (torch.rand(hidden, generator=same, device="cuda").bfloat16() for _ in range(2))
                    calls = contenders(norm, a, b, residual, weight, shift)
                    ours, theirs = calls["one_op"]()[1].clone(), calls["nccl_then_op"]()[1]
                    if world == 2:  # more ranks are summed by NCCL in an order of its own
                        assert torch.equal(ours, theirs), f"{norm} {count} x {hidden}: other bits than NCCL's sums"
                    us = turns.microseconds(calls, ROUNDS)
                    lines.append({"norm": norm, "hidden": hidden, "rows": count, "us": us})
    torch.cuda.synchronize()
    raise_if_failed()
    return lines


def without_copies(line: Line, name: str) -> float:
    """Microseconds of a contender less its copies."""
    return float(line["us"][name] - COPIES.get(name, 0) * line["us"]["copy"])


def table(lines: list[Line]) -> str:
    """Times, and the ratios of the op with both sums to the others, without their copies."""
    text = [f"{'norm':>11}{'H':>6}{'rows':>6}" + "".join(f"{name:>14}" for name in NAMES)]
    for line in lines:
        start = f"{line['norm']:>11}{line['hidden']:6}{line['rows']:6}"
        text.append(start + "".join(f"{line['us'][name]:14.2f}" for name in NAMES))
    for norm in dict.fromkeys(line["norm"] for line in lines):
        for name in NAMES[1:-1]:
            mine = [line for line in lines if line["norm"] == norm]
            ratios = [line["us"]["one_op"] / without_copies(line, name) for line in mine]
            mean, worst = statistics.geometric_mean(ratios), max(ratios)
            text.append(f"{norm}: one_op over {name}, without copies: {mean:.3f}, worst {worst:.3f}")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--norms", default="rms_norm,layer_norm")
    parser.add_argument("--rows", default="1,8,64,256,1024")
    parser.add_argument("--hidden", default="2560,4096,8192", help="Phi-2, DeepSeek-MoE 16B, Command R")
    parser.add_argument("--out", type=Path, help="folder for two-sums-RANKS.json")
    args = parser.parse_args()
    from tpfuse.measure import tables
    from tpfuse.measure.ranks import run_ranks, why_not

    missing = why_not(args.ranks)
    if missing:
        parser.exit(2, f"two_sums.py: {missing}\n")
    norms = tuple(args.norms.split(","))
    rows, widths = (tuple(int(n) for n in text.split(",")) for text in (args.rows, args.hidden))
    env = {"TPFUSE_WATCHDOG_SECONDS": "20"}
    lines = run_ranks(measure, args.ranks, norms, rows, widths, timeout=500, env=env)[0]
    print(table(lines))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        stored = {"facts": tables.facts(), "ranks": args.ranks, "rows": lines}
        (args.out / f"two-sums-{args.ranks}.json").write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
