"""What a token costs a user of Hugging Face's ``generate``: eager, Inductor and tpfuse on tensor-parallel ranks, one command.

    python benchmarks/hf.py --out results/                     # 2 GPUs, 8 layers of a shape, about 150 s
    python benchmarks/hf.py --layers 32 --batch 1 --budget 400 --gpt-fast ../gpt-fast
    python benchmarks/hf.py --model qwen3-30b-a3b --layers 8
    python benchmarks/hf.py --device cpu --tiny                # gloo ranks: shows that it runs, times nothing

Contenders. The weights are random, made on the device, and the same for all; greedy, static cache, bf16 (fp32 on a CPU).

- ``eager``: transformers' tensor parallelism (TP) and its ``generate``, nothing compiled. Its tokens are the reference.
- ``inductor``, ``inductor reduce-overhead``: the same with transformers' ``CompileConfig``.
- ``tpfuse on DTensors``: the same with ``backend="tpfuse"``, ``reduce-overhead``: what a user gets without ``tpfuse.hf``.
- ``tpfuse.hf.compile``: transformers' TP, then ``tpfuse.hf.compile(model)`` and ``model.generate``.
- ``tpfuse.hf.parallelize``: tpfuse's own cut, then the same.
- ``inductor in tpfuse's loop``: as ``tpfuse.hf.compile`` with ``backend="inductor"``: what the fusion alone is worth.
- ``gpt-fast with tpfuse``, ``gpt-fast with inductor``: with ``--gpt-fast``, the folder of a checkout of
  github.com/meta-pytorch/gpt-fast at c9f683e: the same shape, written by hand. Batch 1 and dense models only.

Method. Contenders of one batch size are all compiled first; then rounds, in each of which every contender generates once, so that
drift of the machine meets all alike. Milliseconds a token are (time of N tokens - time of 1 token) / (N - 1), median over the
rounds, of the slowest rank; the time of 1 token is the prefill. GPU-busy is the sum of the kernels' times under torch's profiler,
in a run of its own on rank 0; a kernel that waits for the other rank counts as busy. Tokens are a fraction equal to eager's: in
bf16 another order of rounding may flip a near tie, and every token after it; in fp32 they must be equal (exit code 1 otherwise).

What has not begun when the budget is spent is left out and said. Every figure is printed as it comes; ``hf.json`` in ``--out`` is
rewritten after each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from hf_measure import CONTENDERS, GPT_FAST, MODELS, Line, Plan, measure

from tpfuse.measure.ranks import gpu_count, run_ranks


def table(lines: list[Line]) -> str:
    rows = [
        (
            "batch",
            "contender",
            "ms a token",
            "low..high",
            "GPU busy",
            "prefill ms",
            "compile s",
            "fused",
            "equal",
            "note",
        )
    ]
    for x in lines:
        number = lambda v, form: "-" if v is None else format(v, form)  # noqa: E731
        spread = "-" if x.low is None or x.high is None else f"{x.low:.2f}..{x.high:.2f}"
        rows.append(
            (
                *(str(x.batch), x.contender, number(x.token, ".2f"), spread, number(x.gpu_busy, ".2f")),
                *(number(x.prefill, ".1f"), number(x.compile_seconds, ".0f"), f"{x.fused}/{x.all_reduces}"),
                *(number(x.equal_to_eager, ".0%"), x.note[:60]),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _gloo_rank(rank: int, world: int, folder: str, plan: Plan) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    lines = measure(rank, world, plan)
    if rank == 0:
        Path(folder, "lines").write_text(json.dumps(lines))
    dist.destroy_process_group()


def on_ranks(world: int, plan: Plan) -> list[Line]:
    if plan.device == "cuda":
        return [Line(**one) for one in run_ranks(measure, world, plan, timeout=plan.budget + 90)[0]]
    import torch.multiprocessing as mp

    os.environ.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")
    with tempfile.TemporaryDirectory(prefix="tpfuse-hf-") as folder:
        mp.spawn(_gloo_rank, args=(world, folder, plan), nprocs=world)
        return [Line(**one) for one in json.loads(Path(folder, "lines").read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: tuple(int(part) for part in text.split(","))  # noqa: E731
    names = lambda text: tuple(part.strip() for part in text.split(","))  # noqa: E731
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, for a rehearsal")
    parser.add_argument("--inner", choices=("inductor", "aot_eager"), help="default: inductor; aot_eager on a CPU")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-3-8b", help="whose shape")
    parser.add_argument("--gpt-fast", type=Path, metavar="FOLDER", help="a checkout of gpt-fast to measure beside")
    parser.add_argument("--layers", type=int, help="default: 8; 2 with --tiny")
    parser.add_argument("--batch", type=numbers, default=(1, 8, 32))
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, help="new tokens of a call; default: 64; 6 with --tiny")
    parser.add_argument("--rounds", type=int, help="default: 7; 2 with --tiny")
    parser.add_argument(
        "--contenders",
        type=names,
        help=f"only these, separated by commas, of: {', '.join((*CONTENDERS, *GPT_FAST))}",
    )
    parser.add_argument("--budget", type=float, default=150.0, help="seconds after which nothing new is begun")
    parser.add_argument("--out", type=Path, help="folder for hf.json, rewritten after every batch size")
    args = parser.parse_args()
    known = (*CONTENDERS, *GPT_FAST)
    unknown = [name for name in args.contenders or () if name not in known]
    if unknown:
        parser.error(f"--contenders: no contender is called {', '.join(unknown)}; they are {', '.join(known)}")
    if args.gpt_fast is not None and not (args.gpt_fast / "tp.py").is_file():
        parser.error(f"--gpt-fast: there is no tp.py in {args.gpt_fast}; give the folder of a checkout of gpt-fast")
    usual = CONTENDERS if args.gpt_fast is None else (*CONTENDERS, *GPT_FAST)
    if args.device == "cuda" and gpu_count() < args.ranks:
        parser.exit(
            2,
            f"hf.py: {args.ranks} ranks need a GPU each, and {gpu_count()} are visible; --device cpu --tiny rehearses\n",
        )
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        device=args.device,
        layers=args.layers or (2 if args.tiny else 8),
        tiny=args.tiny,
        batches=args.batch,
        contenders=args.contenders or usual,
        prompt=args.prompt,
        tokens=args.tokens or (6 if args.tiny else 64),
        rounds=args.rounds or (2 if args.tiny else 7),
        budget=args.budget,
        out=str(args.out) if args.out else None,
        model=args.model,
        gpt_fast=str(args.gpt_fast.resolve()) if args.gpt_fast else None,
        inner=args.inner or ("inductor" if args.device == "cuda" else "aot_eager"),
    )
    try:
        lines = on_ranks(args.ranks, plan)
    except Exception as error:
        print(f"hf.py: {type(error).__name__}: {str(error)[-3000:]}", flush=True)
        sys.exit(1)
    print(table(lines), flush=True)
    for line in lines:
        for problem in line.problems:
            print(f"PROBLEM batch {line.batch}, {line.contender}: {problem}", flush=True)
    sys.exit(1 if any(line.problems for line in lines) else 0)


if __name__ == "__main__":
    main()
