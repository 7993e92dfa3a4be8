"""Results of the benchmark: kept as JSON, shown as a table and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Result:
    """One contender at one shape. Times in microseconds for one call; ``note`` says why there is none."""

    contender: str
    world: int
    rows: int
    hidden: int
    median: float | None
    low: float | None
    high: float | None
    error: float | None  # largest of the two outputs' ||out - fp64|| / ||fp64||
    ranks_equal: bool | None
    note: str = ""


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def _lookup(results: Sequence[Result]) -> dict[tuple[str, int, int, int], Result]:
    return {(r.contender, r.world, r.rows, r.hidden): r for r in results}


def ratios(results: Sequence[Result], ours: str, other: str) -> dict[tuple[int, int, int], float]:
    """``ours / other`` by (world, rows, hidden), where both were measured."""
    found = _lookup(results)
    out = {}
    for (name, world, rows, hidden), r in found.items():
        o = found.get((other, world, rows, hidden))
        if name == ours and r.median and o is not None and o.median:
            out[(world, rows, hidden)] = r.median / o.median
    return out


def table(results: Sequence[Result]) -> str:
    """The whole table and a summary as text."""
    names = list(dict.fromkeys(r.contender for r in results))
    found = _lookup(results)
    lines = ["us per call, median (high - low)", "W     H  rows " + "".join(f"{n:>22}" for n in names)]
    for world, hidden, rows in sorted({(r.world, r.hidden, r.rows) for r in results}):
        cells = []
        for name in names:
            r = found.get((name, world, rows, hidden))
            if r is None or r.median is None:
                cells.append(f"{'-':>22}")
            else:
                flag = " !ranks differ" if r.ranks_equal is False else ""
                cells.append(f"{r.median:>14.2f} ({r.high - r.low:5.2f}){flag}")  # type: ignore[operator]
        lines.append(f"{world} {hidden:>5} {rows:>5} " + "".join(cells))
    for other in names:
        if other.startswith("tpfuse") or "tpfuse" not in names:
            continue
        by = ratios(results, "tpfuse", other)
        if by:
            worst = max(by, key=lambda k: by[k])
            lines.append(
                f"tpfuse / {other}: geometric mean {geometric_mean(list(by.values())):.3f}, "
                f"worst {by[worst]:.3f} at W={worst[0]} rows={worst[1]} H={worst[2]} ({len(by)} shapes)"
            )
    errors = {n: [r.error for r in results if r.contender == n and r.error is not None] for n in names}
    lines.append("largest error against fp64: " + ", ".join(f"{n} {max(e):.2e}" for n, e in errors.items() if e))
    notes = {(r.contender, r.note) for r in results if r.note}
    lines += [f"{name}: {note[:300]}" for name, note in sorted(notes)]
    return "\n".join(lines)


def save(results: Sequence[Result], path: Path, **facts: str) -> None:
    """JSON: facts about the machine, then one record a result."""
    path.write_text(json.dumps({"facts": facts, "results": [asdict(r) for r in results]}, indent=1) + "\n")


def load(path: Path) -> list[Result]:
    """The results of a file that :func:`save` wrote."""
    return [Result(**record) for record in json.loads(path.read_text())["results"]]


def plot(results: Sequence[Result], path: Path) -> None:
    """Microseconds against rows, one panel a (world, H); the format follows the suffix (.svg, .png)."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install tpfuse[bench]") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text, not outlines: a third of the size
    import matplotlib.pyplot as plt

    worlds = sorted({r.world for r in results})
    hiddens = sorted({r.hidden for r in results})
    figure, axes = plt.subplots(
        len(worlds),
        len(hiddens),
        figsize=(4 * len(hiddens), 3 * len(worlds) + 0.4),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    names = list(dict.fromkeys(r.contender for r in results if r.median))
    lines: dict[str, Any] = {}
    for i, world in enumerate(worlds):
        for j, hidden in enumerate(hiddens):
            axis = axes[i][j]
            for number, name in enumerate(names):
                points = sorted(
                    (r.rows, r.median)
                    for r in results
                    if r.contender == name and r.world == world and r.hidden == hidden and r.median
                )
                if points:
                    (lines[name],) = axis.plot(
                        *zip(*points, strict=True), marker="o", markersize=3, color=f"C{number}", label=name
                    )
            axis.set(title=f"W={world}, H={hidden}", yscale="log", xlabel="rows", ylabel="us a call")
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
    # Below the panels: inside one it hides the points of the smallest calls.
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=len(names), fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def facts() -> dict[str, str]:
    """What the figures were measured on."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
    }
