"""Everything that is measured on a machine with GPUs, one command: builds, checks, times, and keeps what each step wrote.

    python benchmarks/machine.py --out results/             # world sizes that the GPUs allow; one GPU: 2, 4 and 8 ranks share it
    python benchmarks/machine.py --worlds 4 --out results/ --only check,kernels
    python benchmarks/machine.py --worlds 8 --list          # the commands, without running any

Steps: ``compile`` kernels with all cores; ``check`` is ``tests/gpu``; ``kernels`` is ``kernel.py``, with the links between
the GPUs where every rank has its own; ``stages``; ``llama`` and ``deepseek`` are ``e2e.py``; ``tune`` derives a selection table.
Every step has a limit of its own, and one that fails leaves the others their figures; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from arguments import numbers

from tpfuse.measure.ranks import gpu_count

HERE = Path(__file__).resolve().parent
HIDDEN = "4096,5120,7168,8192"
ROWS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096"
SHARED = "tpfuse,symm one-shot,symm two-shot,flashinfer pdl,floor"
OWN = "tpfuse,one-shot,two-shot,library,nccl,symm one-shot,symm two-shot,flashinfer pdl,floor"
ALL_ROWS = ("--batch", "1,8,32,128", "--prefill", "2048")
# World size -> (tp, attention dp, dense tp) of the DeepSeek-like model.
LAYOUTS = {2: (2, 1, 2), 4: (4, 2, 2), 8: (8, 2, 4)}


@dataclass(frozen=True)
class Step:
    """A command and the seconds it may take; its output goes to ``NAME.log``."""

    name: str
    command: tuple[str, ...]
    limit: int


def steps(worlds: tuple[int, ...], out: Path, gpus: int) -> list[Step]:
    """The steps for these world sizes, in the order in which they are worth most if time runs out."""

    def script(name: str, *arguments: object) -> tuple[str, ...]:
        return (sys.executable, str(HERE / name), *map(str, arguments))

    listed = ",".join(map(str, worlds))
    own = [world for world in worlds if world <= gpus]
    shapes = ("--hidden", HIDDEN, "--rows", ROWS)
    found = [
        Step("compile", script("compile_ahead.py", "--worlds", listed, *shapes), 300),
        Step("check", (sys.executable, "-m", "pytest", str(HERE.parent / "tests" / "gpu"), "-rs"), 1200),
    ]
    for world in worlds:
        more = ("--contenders", OWN, "--links") if world in own else ("--contenders", SHARED)
        kernel = script("kernel.py", "--worlds", world, *shapes, *more, "--name", f"kernel-W{world}", "--out", out)
        found.append(Step(f"kernels-W{world}", kernel, 400))
    found.append(
        Step(
            "stages", script("stages.py", "--worlds", listed, "--rows", "1,8,16,32", "--out", out / "stages.json"), 200
        )
    )
    for world in worlds:
        batch = ALL_ROWS if world in own else ("--batch", "1,8,32")
        llama = script("e2e.py", "--worlds", world, *batch, "--out", out / f"llama-W{world}.json")
        found.append(Step(f"llama-W{world}", llama, 600))
    for world in own:
        if world in LAYOUTS:
            tp, dp, k = LAYOUTS[world]
            layout = ("--model", "deepseek", "--tp", tp, "--dp", dp, "--k", k)
            deepseek = script("e2e.py", *layout, *ALL_ROWS, "--out", out / f"deepseek-W{world}.json")
            found.append(Step(f"deepseek-W{world}", deepseek, 600))
    tune = ("--out", out / "table.json", "--timings", out / "timings.json")
    found.append(Step("tune", script("tune.py", "--worlds", listed, *tune), 600))
    return found


def run(step: Step, out: Path) -> bool:
    """Run one step, its output into a log; says how it ended."""
    began = time.monotonic()
    log = out / f"{step.name}.log"
    with log.open("w") as file:
        # A session of its own: what the step has started, ranks for example, ends with it.
        process = subprocess.Popen(
            step.command, stdout=file, stderr=subprocess.STDOUT, cwd=HERE.parent, start_new_session=True
        )
        try:
            code = process.wait(step.limit)
            verdict = "done" if code == 0 else f"FAILED with exit code {code}"
        except subprocess.TimeoutExpired:
            verdict = f"FAILED: not finished in {step.limit} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(f"{step.name:14} {time.monotonic() - began:6.0f} s  {verdict}; {log}", flush=True)
    return verdict == "done"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--worlds", type=numbers, help="default: 2, 4, 8 as far as there are GPUs; all of them on one GPU"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for results and logs")
    parser.add_argument(
        "--only", default="", help="steps, separated by commas; llama stands for llama-W2, llama-W4, ..."
    )
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    args = parser.parse_args()
    gpus = gpu_count()
    if gpus == 0 and not args.list:
        parser.exit(2, "machine.py: no GPU is visible; --list prints what would run\n")
    worlds = args.worlds or (tuple(w for w in (2, 4, 8) if w <= gpus) if gpus > 1 else (2, 4, 8))
    found = steps(worlds, args.out.resolve(), gpus)
    wanted = [name for name in args.only.split(",") if name]
    known = {step.name for step in found} | {step.name.split("-")[0] for step in found}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        parser.error(f"--only: no step is called {', '.join(unknown)}; they are {', '.join(sorted(known))}")
    if wanted:
        found = [step for step in found if {step.name, step.name.split("-")[0]} & set(wanted)]
    if args.list:
        for step in found:
            print(f"# {step.name}, at most {step.limit} s\n{shlex.join(step.command)}")
        return
    if importlib.util.find_spec("pytest") is None and any(step.name == "check" for step in found):
        parser.error("the step check needs pytest: pip install tpfuse[dev], or leave it out with --only")
    args.out.mkdir(parents=True, exist_ok=True)
    fine = [run(step, args.out) for step in found]
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
