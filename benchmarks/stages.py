"""Where the time of one fused call goes: each stage by the GPU's own clock, beside the same kernel without waiting.

    python benchmarks/stages.py --worlds 8 --hidden 4096 --rows 16,32 --out stages.json

The kernels are the op's own, compiled to keep the times of their stages (``Variant.stamps``); calls follow one another in a
CUDA graph and the last one of each replay counts. A stage is what the first warp of a program sees: the median over programs,
ranks and replays. ``boundary`` is from the last program of a call to the first one of the next on the same rank; ``skew`` is
between the first and the last rank to begin: only where ranks share a GPU, and so a clock, and wait for one another.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from arguments import add_shapes
from tpfuse.ops import experiment, reset
from tpfuse.ops.kernels.state import STAMP_NAMES, STATE_WORDS

from tpfuse.measure import bench, ranks, tables

CALLS, REPLAYS = 20, 15
BETWEEN = tuple(f"{a} to {b}" for a, b in itertools.pairwise(STAMP_NAMES))
STAGES = ("boundary", *BETWEEN, "call", "skew")


def all_stages(rank: int, world: int, shapes: list[tuple[int, int]], algorithm: str) -> list[dict[str, Any]]:
    """Run on every rank: :func:`stages` of every (H, rows), with waiting and without."""
    return [
        {
            "world": world,
            "hidden": hidden,
            "rows": rows,
            "wait": wait,
            **stages(rank, world, rows, hidden, algorithm, wait),
        }
        for hidden, rows in shapes
        for wait in (True, False)
    ]


def stages(rank: int, world: int, rows: int, hidden: int, algorithm: str, wait: bool) -> dict[str, Any]:
    """The stages of one shape in nanoseconds: medians, the same on all ranks.

    Raises:
        Unavailable: selection takes the library path, or more than one launch, for this shape.
    """
    group_name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    device = torch.device("cuda", torch.cuda.current_device())
    shared = torch.cuda.device_count() < world
    p, _ = bench.problem(rank, world, rows, hidden, group_name, shared, device)
    made = experiment.prepared_call(
        p.x, p.residual, p.weight, p.eps, group_name, algorithm=algorithm, wait=wait, stamps=True
    )
    call, state, one = made.call, made.state, made.launches[0]
    assert state is not None
    variant = one.kernel.constexprs[1]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(CALLS):
            call()
        graph.capture_end()
    found: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for _ in range(REPLAYS):
        torch.cuda.synchronize()
        dist.barrier()
        graph.replay()
        torch.cuda.synchronize()
        # The last call had phase 1, the one before it phase 0: stamps of (phase, program).
        words = state[STATE_WORDS:].view(torch.int64).view(2, 1024, 8)[:, : one.programs, : len(STAMP_NAMES)]
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, words.cpu().tolist())
        for before, last in everyone:
            end_before = max(program[-1] for program in before)
            found["boundary"].append(min(program[1] for program in last) - end_before)
            found["call"].append(max(program[-1] for program in last) - end_before)
            for number, stage in enumerate(BETWEEN):
                found[stage] += [program[number + 1] - program[number] for program in last]
        if shared and wait:
            begun = [min(program[1] for program in last) for _, last in everyone]
            found["skew"].append(max(begun) - min(begun))
    if not wait:
        reset(group_name)
    facts = {
        "algorithm": made.algorithm,
        "part": f"{variant.lanes}x{variant.steps}",
        "programs": one.programs,
        "split": variant.split,
        "pdl": variant.pdl,
    }
    return {**facts, "ns": {stage: statistics.median(times) for stage, times in found.items() if times}}


def text(found: list[dict[str, Any]]) -> str:
    """One line a shape and kernel, microseconds."""
    lines = [f"{'W':>2} {'H':>5} {'rows':>5} {'kernel':26}" + "".join(f"{stage:>22}" for stage in STAGES)]
    for one in found:
        kernel = f"{one['algorithm']} {one['part']} x {one['programs']}" + ("" if one["wait"] else ", floor")
        cells = "".join(f"{one['ns'][s] / 1000:22.2f}" if s in one["ns"] else f"{'-':>22}" for s in STAGES)
        lines.append(f"{one['world']:2d} {one['hidden']:5d} {one['rows']:5d} {kernel:26}{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shapes(parser, bench.Survey(worlds=(2,), hiddens=(4096,), rows=(1, 32)))
    parser.add_argument("--algorithm", default="auto", help="auto, one_shot or two_shot")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one world size")
    parser.add_argument("--out", type=Path, help="JSON of all stages")
    args = parser.parse_args()
    if ranks.gpu_count() == 0:
        parser.exit(2, "stages.py: no GPU is visible\n")
    found = []
    shapes = [(hidden, rows) for hidden in args.hidden for rows in args.rows]
    for world in args.worlds:
        env = {"TPFUSE_SHARED_GPU": "packed"}
        found += ranks.run_ranks(all_stages, world, shapes, args.algorithm, timeout=args.timeout, env=env)[0]
        if args.out is not None:
            args.out.write_text(json.dumps({"facts": tables.facts(), "stages": found}, indent=1) + "\n")
    print(text(found))


if __name__ == "__main__":
    main()
