"""Run the fast suite and the golden counts over torch and transformers versions; fail on a silent loss of matches.

    python tests/matrix/run.py                            every pair; environments are made under .cache/matrix
    python tests/matrix/run.py --ends                     oldest and newest torch, newest transformers, and of the suite what
                                                          another version can break (what CI runs)
    python tests/matrix/run.py --torch 2.11 --no-suite    one torch, counts only
    python tests/matrix/run.py --table docs/versions.md   also write the table between its markers

Each torch gets a virtual environment, each transformers a folder on the path. torch is a CPU build where PyTorch's wheel index
can be reached (0.2 GB), else what pip finds (on PyPI a CUDA build: 2 GB to fetch, 5 GB on disk). A version that cannot be
installed is said loudly and fails nothing as long as another one ran; a lost match or a failing test does.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden.json")
# Each torch with the Triton that its CUDA build asks for: a CPU build asks for none, and would get the newest.
TRITON = {"2.11.0": "3.6.0", "2.12.1": "3.7.1", "2.13.0": "3.7.1", "2.14.1": "3.8.0", "2.15.0": "3.9.0"}
TORCH = tuple(TRITON)
TRANSFORMERS = ("5.22.2", "5.23.0", "5.24.0")
TOOLS = (
    *("accelerate", "safetensors", "gguf", "numpy", "sympy"),
    *(
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "jsonschema",
        "rich",
        "typer",
        "jinja2",
        "setuptools>=77",
    ),
)
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
PATIENCE = 900  # seconds for one call of pip: a slow index must not take the time of everything that CI runs after it
FAST = "not ranks and not gpu and not slow"
# What another torch, Triton or transformers can break, for the ends in CI: private names, what Dynamo and Inductor hand over,
# spellings, and kernels ahead of time. The rest of the fast suite is ours alone, and runs with every torch without --ends.
TOUCHES = (
    *("compat", "hf_compat", "load_compat", "backend", "inner", "lowering", "export", "sound_pass", "spellings"),
    *("spellings_transformers", "rows", "unrounded", "quantized_pass", "op_surface", "snippets", "unfused", "source"),
    *("kernel_aot", "quant_aot", "add_norm_kernel", "dynamic_tensor_parallel", "vllm", "package", "ends", "no_graph"),
)
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"


@dataclass(frozen=True)
class Pair:
    """One environment: a torch with a transformers."""

    torch: str
    transformers: str


@dataclass(frozen=True)
class Result:
    """What one pair showed.

    Attributes:
        counts: model -> [found, fused], or text where a model gave no count; None when the pair did not install.
        losses: models whose count is not the golden one.
        suite: the counts line of the fast suite, or why it did not run.
        suite_failed: whether it ran and failed.
        seconds: what took how long.
    """

    pair: Pair
    counts: dict[str, list[int] | str] | None
    losses: tuple[str, ...] = ()
    suite: str = "not run"
    suite_failed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


class NotInstalled(Exception):
    """A version that pip cannot provide on this machine."""


class Broken(Exception):
    """A pair that installed, and whose counts could not be taken."""


def pip(python: Path, *arguments: str, folder: Path) -> None:
    """Install with exact versions; constraints that the machine sets for other purposes do not apply."""
    nothing = folder / "no-constraints.txt"
    nothing.touch()
    command = [str(python), "-m", "pip", "install", "--quiet", *arguments]
    env = {**os.environ, "PIP_CONSTRAINT": str(nothing)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise NotInstalled(f"pip took longer than {PATIENCE} s for {' '.join(arguments)}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotInstalled(lines[-1] if lines else done.stderr[-300:])


def environment(torch: str, folder: Path, cpu_wheels: str) -> Path:
    """The python of a virtual environment with this torch, tpfuse and the test tools."""
    root = folder / f"torch-{torch}"
    python = root / "bin" / "python"
    installed = root / ".installed"
    if not installed.exists() or installed.read_text() != " ".join(TOOLS):
        venv.create(root, with_pip=True)
        try:
            once = ("--retries", "0", "--timeout", "15")  # an index that cannot be reached must not cost minutes
            pip(python, *once, "--no-deps", "--index-url", cpu_wheels, f"torch=={torch}+cpu", folder=folder)
        except NotInstalled:
            print(f"    no CPU build of torch {torch} at {cpu_wheels}; taking what pip finds", flush=True)
        exact = (f"torch=={torch}", f"triton=={TRITON[torch]}")
        pip(python, *exact, f"transformers=={TRANSFORMERS[-1]}", *TOOLS, folder=folder)
        pip(python, *exact, "--editable", str(ROOT), folder=folder)
        installed.write_text(" ".join(TOOLS))
    return python


def overlay(python: Path, transformers: str, folder: Path) -> str:
    """A folder with another transformers to put on the path; empty for the one of the environment."""
    if transformers == TRANSFORMERS[-1]:
        return ""
    target = folder / f"transformers-{transformers}"
    if not target.is_dir():
        pip(python, "--no-deps", "--target", str(target), f"transformers=={transformers}", folder=folder)
    return str(target)


def run(python: Path, path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "",
    }
    return subprocess.run([str(python), *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def counts(python: Path, path: str, models: list[str]) -> dict[str, list[int] | str]:
    """The counts of every model, traced by as many processes as there are cores, in the order of the models."""
    shares = min(os.cpu_count() or 1, 4)

    def share(number: int) -> list[tuple[str, list[int] | str]]:
        done = run(python, path, "tests/matrix/golden.py", "--share", f"{number}/{shares}", *models)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"torch"')]
        if not lines:
            raise Broken(f"tests/matrix/golden.py gave no counts:\n{done.stderr[-2000:]}")
        return list(json.loads(lines[-1])["counts"].items())

    with ThreadPoolExecutor(shares) as pool:
        found = list(pool.map(share, range(shares)))
    return dict(pair for pairs in itertools.zip_longest(*found) for pair in pairs if pair is not None)


def suite(python: Path, path: str, ends: bool) -> tuple[str, bool]:
    """(counts line, failed) of the fast suite; what was skipped is printed, and all of it when something failed.

    Args:
        ends: only the files of ``TOUCHES``.
    """
    files = [f"tests/test_{name}.py" for name in TOUCHES] if ends else ["tests"]
    spread = ("-n", "auto", "--maxprocesses", "8", "--dist", "loadfile", "--no-loadscope-reorder")
    done = run(
        python, path, "-m", "pytest", *files, "-m", FAST, *spread, "-p", "no:cacheprovider", "--tb=short", "-rfEs"
    )
    lines = done.stdout.splitlines()
    if done.returncode:
        print(done.stdout[-20000:] + done.stderr[-2000:])
    else:
        print("\n".join(f"    {line}" for line in lines if line.startswith("SKIPPED")))
    counted = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|errors?)\b.* in ", line)]
    return (counted[-1] if counted else f"exit code {done.returncode}"), done.returncode != 0


def golden_counts(pair: Pair) -> dict[str, list[int]]:
    """The counts that a pair must show: those of every pair, and what is known to differ for its transformers or torch."""
    if not GOLDEN.exists():
        return {}
    known = json.loads(GOLDEN.read_text())
    minors = [f"{name} {'.'.join(v.split('.')[:2])}" for name, v in vars(pair).items()]
    return {**known["every pair"], **{m: c for minor in minors for m, c in known.get(minor, {}).items()}}


def check(found: dict[str, list[int] | str], golden: dict[str, list[int]]) -> tuple[str, ...]:
    """Models whose count differs from the golden one, said in words."""
    return tuple(
        f"{model}: {found[model]}, golden {golden[model]}"
        for model in golden
        if model in found and found[model] != golden[model]
    )


def measure(
    pair: Pair, folder: Path, models: list[str], with_suite: bool, environment: Callable[[], Path], ends: bool = False
) -> Result:
    """Counts and suite of a pair, in what ``environment`` returns or raises; "install" is the time until it is there."""
    began, seconds = time.monotonic(), {}

    def lap(name: str) -> None:
        nonlocal began
        seconds[name], began = time.monotonic() - began, time.monotonic()

    try:
        python = environment()
        path = overlay(python, pair.transformers, folder)
        lap("install")
        found = counts(python, path, models)
        lap("counts")
    except NotInstalled as error:
        return Result(pair, None, suite=f"not installed: {error}")
    except Broken as error:
        return Result(pair, {}, (str(error),), seconds=seconds)
    losses = check(found, golden_counts(pair))
    if not with_suite:
        return Result(pair, found, losses, seconds=seconds)
    line, failed = suite(python, path, ends)
    lap("suite")
    return Result(pair, found, losses, line, failed, seconds)


def table(results: list[Result]) -> Iterator[str]:
    """A Markdown table: one row a pair, golden counts as found/fused."""
    models = list(dict.fromkeys(m for r in results for m in (r.counts or {})))
    yield f"| torch | transformers | {' | '.join(models)} | fast suite |"
    yield "|" + "---|" * (len(models) + 3)
    for r in results:
        if r.counts is None:
            cells = ["-"] * len(models)
        else:
            cells = [_cell(r.counts.get(model)) for model in models]
        yield f"| {r.pair.torch} | {r.pair.transformers} | {' | '.join(cells)} | {_suite_cell(r.suite)} |"


def _suite_cell(suite: str) -> str:
    """Counts without durations; the suite runs once a torch, so most pairs have none."""
    return ", ".join(re.findall(r"\d+ (?:passed|failed|errors?|skipped)", suite)) or (
        "-" if suite == "not run" else suite
    )


def _cell(count: list[int] | str | None) -> str:
    if count is None:
        return "-"
    return f"{count[0]}/{count[1]}" if isinstance(count, list) else "error"


def write_table(file: Path, lines: list[str]) -> None:
    text = file.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    file.write_text(f"{before}{BEGIN}\nRun on {date}.\n\n" + "\n".join(lines) + f"\n{END}{after}")


def pairs(torches: list[str], transformers: list[str], ends: bool) -> list[Pair]:
    if ends:
        return [Pair(torches[0], transformers[-1]), Pair(torches[-1], transformers[-1])]
    return [Pair(t, h) for t in torches for h in transformers]


def describe(result: Result) -> None:
    if result.counts is None:
        print(f"    {'!' * 8} {result.suite}", flush=True)
        return
    print(f"    {json.dumps(result.counts)}")
    for loss in result.losses:
        print(f"    LOST OR CHANGED {loss}")
    if result.suite != "not run":
        print(f"    fast suite: {result.suite}")
    print("    " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items()), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--torch", action="append", help="a version or its beginning, e.g. 2.11; may be repeated")
    parser.add_argument("--transformers", action="append", help="likewise")
    parser.add_argument("--ends", action="store_true", help="oldest and newest torch with the newest transformers only")
    parser.add_argument("--no-suite", action="store_true", help="golden counts only")
    parser.add_argument("--models", nargs="*", default=[], help="models to count; default is all")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "matrix", help="where environments are kept")
    parser.add_argument("--cpu-wheels", default=CPU_WHEELS, help="index that is asked for a CPU build of torch first")
    parser.add_argument(
        "--discard", action="store_true", help="remove each environment after its last pair; there are two at most"
    )
    parser.add_argument("--table", type=Path, help="Markdown file whose marked part is replaced by the table")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    chosen = [v for v in TORCH if not given.torch or any(v.startswith(t) for t in given.torch)]
    libraries = [v for v in TRANSFORMERS if not given.transformers or any(v.startswith(t) for t in given.transformers)]
    if not chosen or not libraries:
        parser.error(f"nothing to run; torch is one of {', '.join(TORCH)}, transformers of {', '.join(TRANSFORMERS)}")
    results = []
    of_torch = [list(same) for _, same in itertools.groupby(pairs(chosen, libraries, given.ends), lambda p: p.torch)]
    # pip mostly waits, tests mostly compute: the next environment is installed while one is tested.
    installer, installs = ThreadPoolExecutor(1), []
    for number, wanted in enumerate(of_torch):
        for soon in of_torch[len(installs) : number + 2]:
            installs.append(installer.submit(environment, soon[0].torch, given.folder, given.cpu_wheels))
        for pair in wanted:
            # The suite once a torch: transformers touches only the models, and those are counted for every pair.
            with_suite = not given.no_suite and pair.transformers == libraries[-1]
            print(f"torch {pair.torch}, transformers {pair.transformers}", flush=True)
            result = measure(pair, given.folder, given.models, with_suite, installs[number].result, given.ends)
            results.append(result)
            describe(result)
        if given.discard:
            shutil.rmtree(given.folder / f"torch-{wanted[0].torch}", ignore_errors=True)
    lines = list(table(results))
    print("\n".join(["", *lines]))
    if given.table:
        write_table(given.table, lines)
    ran = [r for r in results if r.counts is not None]
    for r in results:
        if r.counts is None:
            print(f"NOT TESTED: torch {r.pair.torch}, transformers {r.pair.transformers}: {r.suite}", file=sys.stderr)
    if not ran:
        print("no pair could be installed", file=sys.stderr)
    return int(not ran or any(r.losses or r.suite_failed for r in ran))


if __name__ == "__main__":
    sys.exit(main())
