"""Steps of whole models: tpfuse against Inductor alone, the same weights over the same group, both as CUDA graphs.

    python benchmarks/e2e.py --worlds 2,4 --batch 1,8,32 --out e2e.json
    python benchmarks/e2e.py --worlds 2 --batch 1,8,32,128 --prefill 2048
    python benchmarks/e2e.py --model llama-float8 --worlds 2 --batch 1,8,32,128      # needs torchao
    python benchmarks/e2e.py --model deepseek --tp 4 --dp 2 --k 2 --batch 1,8,32,128 --prefill 2048
    python benchmarks/e2e.py --model deepseek --experts 8 --batch 1,8,32           # on one GPU, shared by four ranks
    python benchmarks/e2e.py --model deepseek --widths moonlight --batch 1,8,32    # a small model of the same architecture
    python benchmarks/e2e.py --device cpu --tiny [--model deepseek]        # gloo ranks: shows that it runs, times nothing

Models. ``llama``: 16 layers of H = 4096, one rank's shard written out here, random weights; a decode step attends to a cache
that is full and constant, so every step costs the same; a prefill attends causally to its own rows. ``llama-float8``: the same
with the layers of Llama-3-8B and torchao's row-wise float8. ``deepseek``: see ``benchmarks/e2e_deepseek.py``.

Contenders, all under ``torch.compile(mode="reduce-overhead", dynamic=False, fullgraph=True)``, or without the mode and one CUDA
graph around the compiled step (``llama-float8``, ``--captured``):

- ``tpfuse``: ``backend="tpfuse"`` on the plain functional all-reduces of the model.
- ``symm one-shot``, ``symm two-shot``: ``backend="inductor"``, and every all-reduce is torch's symmetric-memory one, behind an
  op that Inductor does not look into (left alone it would copy the symmetric buffer, which is a graph input to it).
  Two-shot takes part in prefills only.
- ``nccl`` (``gloo`` on a CPU): ``backend="inductor"`` on the functional all-reduces. NCCL needs a GPU for each rank.
- ``tpfuse quant off``, llama-float8 only: ``tpfuse`` with the quantization behind a norm left to Inductor.
- ``tpfuse rows off``, deepseek only, where it is named or ranks share a GPU: ``tpfuse`` without rows with destinations; see
  ``benchmarks/e2e_rows.py``. ``tpfuse gathers off``, where it is named: without the gathers behind norms.

Method. Before each step all ranks meet; a step's time is the *minimum over ranks*, because the last rank to start waits for
nobody; the figure is the median of the steps, launch from Python included. ``back to back`` is the time of a step among 20
that were launched without waiting for one another, where the GPU sets the pace. Steps that are one CUDA graph are timed in
turn, some of each contender at a time, from the first to the last and back; others one contender after the other. Each of the
former is made twice, in mirrored order, and captured three times each, because where its buffers lie moves the time; its figures
are those of all six. Tokens of a decode step are the input of the next. Ratios of both times are printed, against each baseline
and against the one that is fastest back to back.

Checks. The number of fused all-reduces must be what the model has (exit code 1 otherwise); every rank must choose the same
tokens (likewise); with ``--attention flash`` a CUDA graph replayed on the same inputs must choose the same (likewise). Torch left
to itself may take cuDNN's attention, whose bits differ from call to call where there are many rows. Tokens of tpfuse and of each
baseline are compared on equal inputs and reported as a fraction: baselines add in another order or precision (torch's one-shot in
bf16), so near ties may fall either way.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import e2e_deepseek
import e2e_llama
import torch
import torch.distributed as dist
from e2e_measure import CHAIN, CHAINS, CHECKS, STEPS, WARM, Line, Plan, table

from tpfuse.measure.ranks import gpu_count, run_ranks


def _gloo_rank(rank: int, fn: Callable[..., list[Line]], world: int, folder: str, plan: Plan) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    lines = fn(rank, world, plan)
    if rank == 0:
        torch.save([asdict(line) for line in lines], f"{folder}/lines")
    dist.destroy_process_group()


def on_ranks(fn: Callable[..., list[Line]], world: int, plan: Plan, timeout: float) -> list[Line]:
    """Rank 0's lines of ``fn(rank, world, plan)``. On a CPU the ranks are gloo processes."""
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if plan.device == "cuda":
        return run_ranks(fn, world, plan, timeout=timeout, env=environment)[0]
    import torch.multiprocessing as mp

    os.environ.update(environment, OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory(prefix="tpfuse-e2e-") as folder:
        mp.spawn(_gloo_rank, args=(fn, world, folder, plan), nprocs=world)
        return [Line(**one) for one in torch.load(f"{folder}/lines")]


def numbers(text: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in text.split(",") if part)
    if any(n < 1 for n in found):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of at least 1, separated by commas")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("llama", "llama-float8", "deepseek"), default="llama")
    parser.add_argument("--worlds", type=numbers, default=(2, 4), help="llama: world sizes")
    parser.add_argument("--tp", type=int, default=4, help="deepseek: ranks")
    parser.add_argument("--dp", type=int, default=2, help="deepseek: replicas of attention")
    parser.add_argument("--k", type=int, default=2, help="deepseek: ranks of the dense MLP (tp / dp shares)")
    parser.add_argument("--batch", type=numbers, default=(1, 8, 32), help="rows of a decode step, for each replica")
    parser.add_argument("--prefill", type=numbers, default=(), help="rows of a prefill, for each replica")
    parser.add_argument("--contenders", help="only these, separated by commas")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument(
        "--widths",
        choices=tuple(e2e_deepseek.WIDTHS),
        default="deepseek-v3",
        help="deepseek: whose widths, also of its layers and experts where these are not given",
    )
    parser.add_argument("--dense-layers", type=int, help="deepseek: how many of the layers are dense")
    parser.add_argument("--experts", type=int, help="deepseek: routed experts of a layer")
    parser.add_argument("--hidden", type=int, help="deepseek: hidden size")
    parser.add_argument(
        "--symmetric", action="store_true", help="deepseek: collectives left by tpfuse as on a shared GPU"
    )
    parser.add_argument(
        "--captured",
        action="store_true",
        help="one CUDA graph around the step, and contenders in turn (float8: always)",
    )
    parser.add_argument(
        "--attention",
        choices=("torch", "flash"),
        default="torch",
        help="flash: without cuDNN's attention, so that a step repeats its bits",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--inner", choices=("inductor", "aot_eager"), help="default: inductor, aot_eager on a CPU")
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal")
    parser.add_argument("--timeout", type=float, default=560.0, help="seconds for one world size")
    parser.add_argument("--out", type=Path, help="JSON file, rewritten after every figure")
    args = parser.parse_args()
    if args.device == "cuda" and gpu_count() == 0:
        parser.exit(2, "e2e.py: no GPU is visible; --device cpu --tiny rehearses on a CPU\n")
    shapes = (*(("decode", n) for n in args.batch), *(("prefill", n) for n in args.prefill))
    if not shapes:
        parser.error("nothing to measure: give --batch or --prefill")
    if args.out is not None:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.unlink(missing_ok=True)
            args.out.touch()
            args.out.unlink()
        except OSError as error:
            parser.exit(2, f"e2e.py: {args.out} cannot be written: {error.strerror}\n")
    plan = Plan(
        shapes=shapes,
        device=args.device,
        inner=args.inner or ("inductor" if args.device == "cuda" else "aot_eager"),
        sizes=None,
        contenders=tuple(args.contenders.split(",")) if args.contenders else None,
        out=str(args.out) if args.out else None,
        attention=args.attention,
        steps=(3, 2, 2, 2, 1) if args.tiny else (WARM, CHECKS, STEPS, CHAIN, CHAINS),
    )
    lines: list[Line] = []
    runs: list[tuple[int, Callable[..., list[Line]], Plan]]
    if args.model != "deepseek":
        sizes = e2e_llama.TINY if args.tiny else e2e_llama.Sizes()
        if args.model == "llama-float8":
            sizes = replace(e2e_llama.TINY_FLOAT8 if args.tiny else e2e_llama.LLAMA_3_8B, float8=True)
        if args.layers:
            sizes = replace(sizes, layers=args.layers)
        runs = [
            (world, e2e_llama.llama, replace(plan, sizes=sizes, captured=sizes.float8 or args.captured))
            for world in args.worlds
        ]
    else:
        try:
            runs = [e2e_deepseek.run_of(args, plan)]
        except ValueError as error:
            parser.exit(2, f"e2e.py: {error}\n")
    failed = False
    for world, fn, one in runs:
        try:
            lines += on_ranks(fn, world, one, args.timeout)
        except Exception as error:  # a world size that fails leaves the others their figures
            failed = True
            print(f"W={world}: {type(error).__name__}: {str(error)[-3000:]}", flush=True)
    if lines:
        print(table(lines), flush=True)
    for line in lines:
        for problem in line.problems:
            failed = True
            print(f"PROBLEM W={line.world} {line.phase} {line.rows} rows, {line.contender}: {problem}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
