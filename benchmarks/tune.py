"""Derive a selection table for this machine: the same as ``tpfuse bench --tune``, with the sizes as arguments.

python benchmarks/tune.py --worlds 2,4 --out table.json --timings timings.json
TPFUSE_TABLE=table.json torchrun ...
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from arguments import numbers

from tpfuse.measure import tune
from tpfuse.measure.ranks import gpu_count


def main() -> None:
    default = tune.Sweep()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=numbers, default=default.worlds)
    parser.add_argument("--hidden", type=numbers, default=default.hiddens)
    parser.add_argument("--sizes", type=numbers, default=default.sizes, help="bytes of x")
    parser.add_argument("--launches", type=numbers, default=default.launches, help="bytes of a launch, to try")
    parser.add_argument("--timeout", type=float, default=default.timeout, help="seconds for one world size")
    parser.add_argument("--out", type=Path, help="the table, for TPFUSE_TABLE")
    parser.add_argument("--timings", type=Path, help="JSON of every timing")
    args = parser.parse_args()
    if gpu_count() == 0:
        parser.exit(2, "tune.py: no GPU is visible\n")
    plan = tune.Sweep(args.worlds, args.hidden, args.sizes, args.launches, args.timeout)
    try:
        print(tune.to_files(plan, args.out, args.timings))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"tune.py: {error}")


if __name__ == "__main__":
    main()
