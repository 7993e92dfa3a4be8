"""Find the first rewrite that breaks a check, by binary search over ``TPFUSE_FUEL``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpfuse.passes.report import GraphReport, Site

from . import load, words

FOUND, NOT_TO_BLAME = 0, 1


class BisectError(ValueError):
    """The command cannot be bisected. The message is one line."""


@dataclass(frozen=True)
class Culprit:
    """The first rewrite with which the check fails.

    Attributes:
        number: of the rewrite, from 1, in the order of compilation; 0 means that the check fails without any rewrite.
        runs: how often the command ran in all.
        report: of the graph it is in, or None for number 0.
        site: the rewritten all-reduce, or None for number 0.
    """

    number: int
    runs: int
    report: GraphReport | None
    site: Site | None


def first_failing(passes: Callable[[int], bool], count: int) -> int:
    """The smallest fuel with which the check fails, given that it fails with ``count``.

    Fuel 0 takes part, so a check that fails without any rewrite costs no extra run: n rewrites need at most
    ceil(log2(n + 1)) runs.
    """
    good, bad = -1, count
    while bad - good > 1:
        middle = (good + bad) // 2
        if passes(middle):
            good = middle
        else:
            bad = middle
    return bad


def run(command: Sequence[str], *, quiet: bool = False) -> int:
    """Bisect a command and print what was found.

    Returns:
        0 when a rewrite was found, 1 when none is to blame.
    Raises:
        BisectError: no command, a command that cannot start, or one that fuses nothing.
    """
    if not command:
        raise BisectError("no command given; use: tpfuse bisect -- python check.py")
    with tempfile.TemporaryDirectory(prefix="tpfuse-bisect-") as folder:
        runner = _Runner(list(command), Path(folder), quiet)
        if runner.passes(None):
            print(f"`{_line(command)}` succeeds with every rewrite: there is nothing to find")
            return NOT_TO_BLAME
        rewrites = _rewrites(Path(folder), command)
        runner.expected = 1 + len(rewrites).bit_length()
        number = first_failing(runner.passes, len(rewrites))
    culprit = Culprit(number, runner.runs, *(rewrites[number - 1] if number else (None, None)))
    print(_told(culprit, len(rewrites)))
    return FOUND if number else NOT_TO_BLAME


class _Runner:
    """Runs the command with a given fuel and tells each run in one line."""

    def __init__(self, command: list[str], folder: Path, quiet: bool) -> None:
        self.command, self.folder, self.quiet = command, folder, quiet
        self.runs, self.expected = 0, 0

    def passes(self, fuel: int | None) -> bool:
        """Whether the check succeeds; None is every rewrite, dumped to the folder."""
        environment = {name: value for name, value in os.environ.items() if name not in ("TPFUSE_FUEL", "TPFUSE_DUMP")}
        # On a cache hit the pass would not run, so neither fuel nor dump would have an effect.
        environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
        if fuel is None:
            environment["TPFUSE_DUMP"] = str(self.folder)
        else:
            environment["TPFUSE_FUEL"] = str(fuel)
        self.runs += 1
        started = time.perf_counter()
        sink = subprocess.DEVNULL if self.quiet else None
        try:
            code = subprocess.run(self.command, env=environment, stdout=sink, stderr=sink, check=False).returncode
        except OSError as error:
            raise BisectError(f"cannot run {self.command[0]!r}: {error.strerror}") from error
        of = f" of at most {self.expected}" if self.expected else ""
        with_fuel = "every rewrite" if fuel is None else f"{fuel} rewrite{'' if fuel == 1 else 's'}"
        verdict = "succeeds" if code == 0 else f"fails with exit code {code}"
        print(f"run {self.runs}{of}: {with_fuel}: {verdict} ({time.perf_counter() - started:.1f} s)", file=sys.stderr)
        return code == 0


def _rewrites(folder: Path, command: Sequence[str]) -> list[tuple[GraphReport, Site]]:
    """Every rewrite of the rank that made the most, in the order in which fuel counts them."""
    try:
        dump = load.read(folder)
    except load.DumpError as error:
        raise BisectError(
            f"`{_line(command)}` fails, and compiled nothing with tpfuse; does it use backend='tpfuse'?"
        ) from error
    by_rank: dict[int, list[tuple[GraphReport, Site]]] = {}
    for graph in dump.graphs:
        made = by_rank.setdefault(graph.report.rank, [])
        made += [(graph.report, site) for site in graph.report.fused]
    rewrites = max(by_rank.values(), key=len)
    if not rewrites:
        raise BisectError(f"`{_line(command)}` fails, and tpfuse fused nothing in it: no rewrite is to blame")
    return rewrites


def _told(culprit: Culprit, count: int) -> str:
    runs = f"{culprit.runs} runs of the command"
    if culprit.site is None or culprit.report is None:
        return f"The command fails without any rewrite ({runs}): tpfuse is not to blame."
    site = culprit.site
    lines = [
        f"Rewrite {culprit.number} of {count} is the first that breaks the command ({runs}).",
        f"  where    {words.title(site)}, {culprit.report.graph_id}",
        f"  source   {site.source or 'unknown'}",
        f"  pattern  {site.pattern} over ranks {words.ranks(site.group)}, {words.shape(site)}",
        f"  rounding {words.flavour(site) or 'unknown'}",
        *([f"  quantization {words.quantizer(site)}"] if site.quantizer else []),
        f"Leave it out with TPFUSE_FUEL={culprit.number - 1}; TPFUSE_VERIFY=1 compares each rewrite with the original.",
    ]
    return "\n".join(lines)


def _line(command: Sequence[str]) -> str:
    return " ".join(command)
