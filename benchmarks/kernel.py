"""Kernel benchmark: a table in the terminal, JSON and a plot.

python benchmarks/kernel.py --worlds 2,4,8 --rows 1,8,64 --hidden 4096,8192 --out results/
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tpfuse.ops import bench


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    default = bench.Plan()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=numbers, default=default.worlds)
    parser.add_argument("--hidden", type=numbers, default=default.hiddens)
    parser.add_argument("--rows", type=numbers, default=default.rows)
    parser.add_argument("--contenders", default=",".join(default.contenders), help=", ".join(bench.CONTENDERS))
    parser.add_argument("--timeout", type=float, default=default.timeout, help="seconds for one world size")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--name", default="kernel")
    args = parser.parse_args()
    plan = bench.Plan(args.worlds, args.hidden, args.rows, tuple(args.contenders.split(",")), args.timeout)
    results = []
    args.out.mkdir(parents=True, exist_ok=True)
    for world in plan.worlds:
        one = bench.Plan((world,), plan.hiddens, plan.rows, plan.contenders, plan.timeout)
        try:
            results += bench.run(one)
        except Exception as error:  # a world size that fails leaves the others their figures
            print(f"W={world}: {type(error).__name__}: {error}", flush=True)
        bench.save(results, args.out / f"{args.name}.json")
    bench.save(results, args.out / f"{args.name}.json", **bench.facts())
    if results:
        bench.plot(results, args.out / f"{args.name}.svg")
        text = bench.table(results)
        (args.out / f"{args.name}.txt").write_text(text + "\n")
        print(text)


if __name__ == "__main__":
    main()
