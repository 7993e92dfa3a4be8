"""Kernel benchmark: a table in the terminal, JSON and a plot.

python benchmarks/kernel.py --worlds 2,4,8 --rows 1,8,64 --hidden 4096,8192 --out results/
python benchmarks/kernel.py --links              # measures latency and bandwidth between GPUs too, and prints the floor
python benchmarks/kernel.py --only-links
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from arguments import add_shapes
from tpfuse.ops.settings import Settings

from tpfuse.measure import bench, contenders, links, tables
from tpfuse.measure.ranks import gpu_count, run_ranks


def measure_links(plan: bench.Survey, out: Path) -> list[links.Links]:
    """Latency and bandwidth at each world size of the plan, printed and kept in ``out``."""
    measured = []
    for world in plan.worlds:
        try:
            measured.append(run_ranks(links.measure_links, world, timeout=plan.timeout)[0])
        except Exception as error:  # a world size that fails leaves the others their figures
            print(f"W={world}: {type(error).__name__}: {error}", flush=True)
            continue
        print(links.describe(measured[-1]), flush=True)
        out.write_text(json.dumps([asdict(one) for one in measured], indent=1) + "\n")
    return measured


def main() -> None:
    default = bench.Survey()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shapes(parser, default)
    parser.add_argument("--contenders", default=",".join(default.contenders), help=", ".join(contenders.CONTENDERS))
    parser.add_argument("--timeout", type=float, default=default.timeout, help="seconds for one world size")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--name", default="kernel")
    parser.add_argument(
        "--links", action="store_true", help="measure what bounds an all-reduce, too; see tpfuse.measure.links"
    )
    parser.add_argument("--only-links", action="store_true", help="and nothing else")
    args = parser.parse_args()
    if gpu_count() == 0:
        parser.exit(2, "kernel.py: no GPU is visible\n")
    plan = bench.Survey(args.worlds, args.hidden, args.rows, tuple(args.contenders.split(",")), args.timeout)
    results = []
    args.out.mkdir(parents=True, exist_ok=True)
    measured = measure_links(plan, args.out / f"{args.name}-links.json") if args.links or args.only_links else []
    if args.only_links:
        sys.exit(len(measured) < len(plan.worlds))
    failed = False
    for world in plan.worlds:
        partial = args.out / f"{args.name}-W{world}.part.json"
        one = bench.Survey((world,), plan.hiddens, plan.rows, plan.contenders, plan.timeout, str(partial))
        try:
            found = bench.run(one)
            failed |= len(found) < len(plan.hiddens) * len(plan.rows) * len(plan.contenders)  # cut short
            results += found
        except Exception as error:  # a world size that fails leaves the others their figures
            failed = True
            print(f"W={world}: {type(error).__name__}: {error}", flush=True)
        tables.save(results, args.out / f"{args.name}.json")
        partial.unlink(missing_ok=True)
    tables.save(results, args.out / f"{args.name}.json", **tables.facts())
    if results:
        tables.plot(results, args.out / f"{args.name}.svg")
        text = tables.table(results)
        (args.out / f"{args.name}.txt").write_text(text + "\n")
        print(text)
        if measured:
            print(links.beside_floor(results, measured, Settings.from_environment().table))
    sys.exit(failed)


if __name__ == "__main__":
    main()
