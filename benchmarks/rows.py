"""Rows with destinations against what a compiler makes of the same boundary, on the GPUs of one host.

    python benchmarks/rows.py --ranks 4 --out results/

For each number of blocks that divides the ranks: this op, and NCCL's collective (a reduce-scatter where each rank has a block,
else an all-reduce of which the own rows are sliced) followed by Inductor's add and norm. Each contender is a CUDA graph of
20 calls; graphs are replayed in turn, and the median of the rounds is what is printed. A line has rows of a block, H,
microseconds a call of both, and their ratio.

    python benchmarks/rows.py --ranks 4 --gather --out results/

With ``--gather`` the op that also gathers the normed rows, with a block for each rank, against NCCL's reduce-scatter, Inductor's
add and norm, NCCL's all-gather; and against the op without the gather, NCCL's all-gather behind it (``op + gather``).

With ``--layer-norm`` either of the two is measured with a LayerNorm.

    python benchmarks/rows.py --ranks 4 --replicas --out results/

With ``--replicas`` attention replicas of at least two ranks that gather the normed rows of all: see ``rows_replicas.py``. This
runs on one GPU that all ranks share as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import turns

ROUNDS = 15


def _add_norm(y: Any, r: Any, w: Any) -> Any:
    import torch

    h = r + y
    f = h.float()
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype), h


def _add_layer_norm(y: Any, r: Any, w: Any) -> Any:
    import torch

    h = r + y
    return torch.nn.functional.layer_norm(h, w.shape, w, w), h


def _contenders(
    x: Any, residual: Any, weight: Any, blocks: int, rank: int, world: int, gather: bool, layer_norm: bool
) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from tpfuse import ops

    norm = "add_layer_norm" if layer_norm else "add_rms_norm"
    of_rows, of_all = getattr(ops, f"reduce_rows_{norm}"), getattr(ops, f"reduce_rows_{norm}_gather")
    given = (x, residual, weight, weight) if layer_norm else (x, residual, weight)
    rows = residual.shape[0]
    start = rank * blocks // world * rows
    own = torch.empty_like(residual)
    whole = torch.empty_like(x)
    add_norm = torch.compile(_add_layer_norm if layer_norm else _add_norm)

    def nccl() -> Any:
        if blocks == world:
            dist.reduce_scatter_tensor(own, x)
            return add_norm(own, residual, weight)
        whole.copy_(x)  # NCCL sums in place; the partial sum of a real layer is a buffer of its own too
        dist.all_reduce(whole)
        return add_norm(whole[start : start + rows], residual, weight)

    if gather:
        together = torch.empty_like(x)

        def gathered(pair: Any) -> Any:
            dist.all_gather_into_tensor(together, pair[0])
            return together, pair[1]

        return {
            "tpfuse": lambda: of_all(*given),
            "nccl": lambda: gathered(nccl()),
            "op + gather": lambda: gathered(of_rows(*given)),
        }
    return {"tpfuse": lambda: of_rows(*given, blocks=blocks), "nccl": nccl}


def measure(
    rank: int, world: int, rows: tuple[int, ...], widths: tuple[int, ...], gather: bool, layer_norm: bool = False
) -> list[dict[str, Any]]:
    """One line for each (blocks, H, rows); the slowest rank's time."""
    import torch

    lines = []
    for blocks in [n for n in range(2, world + 1) if world % n == 0 and not (gather and n < world)]:
        for hidden in widths:
            for count in rows:
                x = torch.randn(blocks * count, hidden, device="cuda").bfloat16()
                residual = torch.randn(count, hidden, device="cuda").bfloat16()
                weight = torch.rand(hidden, device="cuda").bfloat16()
                calls = _contenders(x, residual, weight, blocks, rank, world, gather, layer_norm)
                with torch.no_grad():
                    times = turns.microseconds(calls, ROUNDS)
                ours, theirs = times["tpfuse"], times["nccl"]
                lines.append({"ranks": world, "blocks": blocks, "rows": count, "hidden": hidden, **times})
                if rank == 0:
                    print(
                        f"W={world} blocks={blocks} H={hidden} rows={count}: {ours:7.2f} us, NCCL + Inductor "
                        f"{theirs:7.2f} us, {ours / theirs:.2f}"
                        + (f"; op, then NCCL's gather {times['op + gather']:7.2f} us" if gather else ""),
                        flush=True,
                    )
    return lines


def measure_replicas(
    rank: int, world: int, rows: tuple[int, ...], widths: tuple[int, ...], shared: bool
) -> list[dict[str, Any]]:
    """One line for each (blocks, H, rows of each replica); the slowest rank's time."""
    import rows_replicas
    import torch

    lines = []
    for blocks in rows_replicas.block_counts(world):
        groups = rows_replicas.groups_of(world, blocks, blocks * max(rows) * max(widths), shared)
        for hidden in widths:
            for count in rows:
                x, residual = (torch.randn(count, hidden, device="cuda").bfloat16() for _ in range(2))
                weight = torch.rand(hidden, device="cuda").bfloat16()
                calls = rows_replicas.contenders(x, residual, weight, groups, torch.compile(_add_norm), shared)
                with torch.no_grad():
                    times = turns.microseconds(calls, ROUNDS)
                lines.append({"ranks": world, "blocks": blocks, "rows": count, "hidden": hidden, **times})
                if rank == 0:
                    baseline = times.get("symm" if shared else "nccl")
                    ratio = "no baseline fits on the GPU" if baseline is None else f"{times['tpfuse'] / baseline:.2f}"
                    said = ", ".join(f"{name} {time:7.2f} us" for name, time in times.items())
                    print(f"W={world} replicas={blocks} H={hidden} rows={count}: {said}; {ratio}", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", default="1,8,32,128,256", help="rows of a block")
    parser.add_argument("--hidden", default="4096,7168")
    parser.add_argument("--gather", action="store_true", help="measure the op that also gathers the normed rows")
    parser.add_argument("--layer-norm", action="store_true", help="with a LayerNorm")
    parser.add_argument("--replicas", action="store_true", help="attention replicas that gather the rows of all")
    parser.add_argument("--out", type=Path, help="folder for rows.json")
    args = parser.parse_args()
    from tpfuse.measure import tables
    from tpfuse.measure.ranks import gpu_count, run_ranks, why_not

    shared = gpu_count() < args.ranks
    if args.replicas and (args.gather or args.layer_norm or args.ranks < 4 or args.ranks % 2):
        wanted = "4, 6 or 8 ranks and neither --gather nor --layer-norm"
        parser.exit(2, f"rows.py: --replicas wants {wanted}, not {' '.join(sys.argv[1:])}\n")
    if args.replicas and (missing := why_not(args.ranks)):
        parser.exit(2, f"rows.py: cannot run {args.ranks} ranks here: {missing}\n")
    if shared and not args.replicas:
        parser.exit(2, f"rows.py: {gpu_count()} GPUs are visible, {args.ranks} are needed: NCCL wants one a rank\n")
    numbers = [tuple(int(n) for n in text.split(",")) for text in (args.rows, args.hidden)]
    function, last = (measure_replicas, [shared]) if args.replicas else (measure, [args.gather, args.layer_norm])
    (lines, *_) = run_ranks(function, args.ranks, *numbers, *last, timeout=600)
    baseline = "symm" if shared else "nccl"
    ratios = [line["tpfuse"] / line[baseline] for line in lines if baseline in line]
    if ratios:
        print(f"geometric mean {statistics.geometric_mean(ratios):.2f}, worst {max(ratios):.2f}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        stored = {"facts": tables.facts(), "rows": lines}
        name = "rows-gather" if args.gather else "rows-replicas" if args.replicas else "rows"
        name += "-layer-norm" if args.layer_norm else ""
        (args.out / f"{name}-{args.ranks}.json").write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
