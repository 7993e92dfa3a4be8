"""Compile the kernels of a benchmark into Triton's cache with many processes, so that time on the GPU goes to measuring.

    python benchmarks/compile_ahead.py --worlds 2,4,8 --hidden 4096,8192 --rows 1,8,64 --processes 16
    python benchmarks/kernel.py        --worlds 2,4,8 --hidden 4096,8192 --rows 1,8,64

bf16 and Llama's rounding order, as the benchmark has them: what selection chooses with and without dependent launch, the floor,
both algorithms forced, and the geometries that ``--contenders`` names. World sizes above the number of GPUs are compiled for
ranks that share one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from arguments import add_shapes
from tpfuse.ops import experiment, geometry, prepare, schedule
from tpfuse.ops.flavour import LLAMA
from tpfuse.ops.kernel import Kernel
from tpfuse.ops.kernels.variant import Constants, constants
from tpfuse.ops.settings import Settings

from tpfuse.measure import bench
from tpfuse.measure.contenders import named_geometry
from tpfuse.measure.ranks import gpu_count


@dataclass(frozen=True)
class Stand:
    """What the choice of a kernel looks at of a plane; no memory is allocated for it."""

    world: int
    sharers: int
    architecture: str
    device: torch.device
    rank: int = 0
    phase_bytes: int = 1 << 20


def kernels(
    worlds: Sequence[int], hiddens: Sequence[int], rows: Sequence[int], contenders: Sequence[str], gpus: int
) -> list[tuple[Any, ...]]:
    """(kernel, constants, stand) of everything that the benchmark will launch, each kernel once."""
    found: dict[int, tuple[Kernel, Constants, Stand]] = {}
    modes = [Settings(shared_gpu="packed"), Settings(shared_gpu="packed", dependent_launch="off")]
    modes += [Settings(shared_gpu="packed", algorithm=name) for name in ("one_shot", "two_shot")]
    forced = [found for found in map(named_geometry, contenders) if found]
    device = torch.device("cuda", 0)
    major, minor = torch.cuda.get_device_capability(device)
    for world in worlds:
        shared = world > gpus
        name = f"sm_{major}{minor}" + ("-shared" if shared else "")
        stand = Stand(world, world if shared else 1, name, device)
        for hidden in hiddens:
            c = constants(
                torch.bfloat16,
                torch.bfloat16,
                hidden,
                LLAMA,
                bias="none",
                scaled=False,
                has_residual=True,
                post_norm=False,
            )
            for algorithm, part, share in forced:
                most = experiment.resident(algorithm, part, stand) // share  # type: ignore[arg-type]

                def shape_of(
                    n: int, c: Constants = c, part: geometry.Part = part, most: int = most
                ) -> geometry.Geometry | None:
                    return geometry.forced_geometry(n, c.groups, part, most)

                mode = Settings(shared_gpu="packed", algorithm=algorithm)
                for n in rows:
                    if shape_of(n) is None:
                        continue
                    plan = schedule.schedule_of(stand, mode, c, torch.bfloat16, n, shape_of=shape_of)  # type: ignore[arg-type]
                    for one in plan.launches:
                        found.setdefault(id(one.kernel), (one.kernel, c, stand))
            for settings, wait in [(modes[0], False), *((mode, True) for mode in modes)]:
                if (settings, wait) == (modes[0], True):
                    for kernel in schedule.kernels_needed(stand, settings, c, torch.bfloat16):  # type: ignore[arg-type]
                        found.setdefault(id(kernel), (kernel, c, stand))
                for n in set(rows):
                    plan = schedule.schedule_of(stand, settings, c, torch.bfloat16, n, wait)  # type: ignore[arg-type]
                    for one in plan.launches:
                        found.setdefault(id(one.kernel), (one.kernel, c, stand))
    return list(found.values())


def compile_share(number: int, of: int, worlds: Any, hiddens: Any, rows: Any, contenders: Any, gpus: int) -> None:
    """Compile every ``of``-th kernel; the widest first, for they take longest."""
    torch.cuda.set_device(0)
    todo = sorted(
        kernels(worlds, hiddens, rows, contenders, gpus),
        key=lambda k: -k[0].constexprs[1].world * k[0].constexprs[1].steps,
    )
    for kernel, c, stand in todo[number::of]:
        kernel.compile(*prepare.samples(c, stand))
    if number == 0:
        print(f"{len(todo)} kernels", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shapes(parser, bench.Survey())
    parser.add_argument(
        "--contenders", default="", help="geometries such as one-shot:512x2, beside what is always compiled"
    )
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args()
    gpus = gpu_count()
    if gpus == 0:
        parser.exit(2, "compile_ahead.py: no GPU is visible; kernels are compiled for the one that will run them\n")
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    share = (args.processes, args.worlds, args.hidden, args.rows, args.contenders.split(","), gpus)
    workers = [context.Process(target=compile_share, args=(n, *share)) for n in range(args.processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(f"compiled in {time.monotonic() - began:.0f} s")
    sys.exit(int(any(worker.exitcode for worker in workers)))


if __name__ == "__main__":
    main()
