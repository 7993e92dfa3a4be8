"""Tables of measured results for the documentation, so that no figure there is typed by hand.

    python benchmarks/result_tables.py benchmarks/results/h100-nvlink-w2.json      # prints the tables of one file
    python benchmarks/result_tables.py --write docs/results/*.md README.md         # renews every table of these pages
    python benchmarks/result_tables.py --plot docs/results/h200-shared.svg benchmarks/results/h200-shared.json

In a page, a table stands between ``<!-- results: NAME -->`` and ``<!-- end -->``; NAME is a file of ``benchmarks/results``
without its suffix, and behind it may stand the contenders to show, separated by commas. ``<!-- results: highlights -->`` is
the short table of README.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stages import STAGES

from tpfuse.measure import links, tables

RESULTS = Path(__file__).parent / "results"
RANGES = ((1, 64), (8, 64), (65, 1 << 30))  # of rows
MARK = re.compile(r"<!-- results: (?P<name>[\w-]+)(?P<contenders>[^>]*) -->\n.*?<!-- end -->", re.DOTALL)


def row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def head(cells: Sequence[object]) -> Iterator[str]:
    yield row(cells)
    yield "|" + "---|" * len(cells)


def summary(results: Sequence[tables.Result], names: Sequence[str], measured: Sequence[links.Links]) -> Iterator[str]:
    """``tpfuse`` against every contender, and against the floor of the links if those were measured, by ranges of rows."""
    yield from head(("tpfuse against", "W", "rows", "shapes", "geometric mean", "least", "largest", "second largest"))
    against = {name: tables.ratios(results, "tpfuse", name) for name in names if name != "tpfuse"}
    for one in measured:
        against["t0 + L + B / bandwidth"] = {
            (r.world, r.rows, r.hidden): r.median
            / min(links.floor(one, a, r.world, r.rows * r.hidden * 2) for a in ("one_shot", "two_shot"))
            for r in results
            if r.contender == "tpfuse" and r.world == one.world and r.median
        }
    for name, by in against.items():
        for world, (low, high) in itertools.product(sorted({shape[0] for shape in by}), RANGES):
            ordered = sorted((ratio, n, h) for (w, n, h), ratio in by.items() if w == world and low <= n <= high)
            if ordered:
                rows = f"{min(n for _, n, _ in ordered)} to {max(n for _, n, _ in ordered)}"
                largest = [f"{ratio:.3f} ({n} rows of {h})" for ratio, n, h in reversed(ordered[-2:])]
                mean = tables.geometric_mean([ratio for ratio, _, _ in ordered])
                yield row((name, world, rows, len(ordered), f"{mean:.3f}", f"{ordered[0][0]:.3f}", *(*largest, "")[:2]))
    yield ""


def kernel_tables(
    results: Sequence[tables.Result], contenders: Sequence[str], measured: Sequence[links.Links] = ()
) -> Iterator[str]:
    """How ``tpfuse``, where it takes part, compares with every contender, then microseconds a call at every shape."""
    present = list(dict.fromkeys(r.contender for r in results if r.median))
    names = [c for c in contenders if c in present] or present
    if "tpfuse" in names:
        yield from summary(results, names, measured)
    yield from head(("W", "H", "rows", *names))
    found = {(r.contender, r.world, r.hidden, r.rows): r.median for r in results}
    for world, hidden, rows in sorted({(r.world, r.hidden, r.rows) for r in results}):
        times = [found.get((n, world, hidden, rows)) for n in names]
        yield row((world, hidden, rows, *("" if t is None else f"{t:.2f}" for t in times)))


def model_tables(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Steps of whole models: each baseline beside tpfuse, and the ratios."""
    columns = ("step us", "back to back us", "tpfuse / it, single", "tpfuse / it, back to back", "fused", "ranks equal")
    yield from head(("machine", "model", "W", "phase", "rows", "contender", *columns))
    for one in lines:
        same = ("machine", "model", "world", "phase", "rows")
        ours = next(x for x in lines if x["contender"] == "tpfuse" and all(x[k] == one[k] for k in same))
        ratios = [f"{ours[k] / one[k]:.3f}" if one is not ours else "" for k in ("step", "back_to_back")]
        fused = f"{one['fused']} of {one['all_reduces']}" if one is ours else ""
        where = (one["machine"], one["model"], one["world"], one["phase"], one["rows"], one["contender"])
        yield row(
            (
                *where,
                f"{one['step']:.0f}",
                f"{one['back_to_back']:.0f}",
                *ratios,
                fused,
                "yes" if one["ranks_equal"] else "NO",
            )
        )


def stage_tables(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Where the time of a call goes, microseconds."""
    yield from head(("W", "H", "rows", "kernel", "dependent launch", *STAGES))
    for one in found:
        kernel = f"{one['algorithm'].replace('_', '-')}, {one['programs']} programs of {one['part']}"
        times = (f"{one['ns'][stage] / 1000:.2f}" if stage in one["ns"] else "" for stage in STAGES)
        waits = "" if one["wait"] else ", floor"
        yield row((one["world"], one["hidden"], one["rows"], kernel + waits, one["pdl"], *times))


def row_tables(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Rows with destinations, microseconds a call."""
    gather = ("op, then NCCL's gather",) if "op + gather" in lines[0] else ()
    names = ("tpfuse", "NCCL, then Inductor's add and norm", *gather, "ratio")
    yield from head(("W", "blocks", "H", "rows of a block", *names))
    for one in lines:
        times = [f"{one[name]:.2f}" for name in ("tpfuse", "nccl", "op + gather") if name in one]
        where = (one["ranks"], one["blocks"], one["hidden"], one["rows"])
        yield row((*where, *times, f"{one['tpfuse'] / one['nccl']:.2f}"))


def quant_tables(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Calls with an fp8 output, microseconds."""
    names = list(dict.fromkeys(name for one in lines for name in one["us"]))
    yield from head(("quantizer", "H", "rows", *names, "one kernel / inductor"))
    for one in lines:
        times = [f"{one['us'][name]:.2f}" if name in one["us"] else "" for name in names]
        where = (one["quantizer"], one["hidden"], one["rows"])
        yield row((*where, *times, f"{one['us']['one kernel'] / one['us']['inductor']:.2f}"))


def layer_norm_tables(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Calls with a LayerNorm, microseconds."""
    yield from head(("H", "rows", "tpfuse", "NCCL, then Inductor", "tpfuse with an RMSNorm", "tpfuse / NCCL"))
    for one in lines:
        us = one["us"]
        times = (f"{us[name]:.2f}" for name in ("tpfuse", "nccl", "rms_norm"))
        yield row((one["hidden"], one["rows"], *times, f"{us['tpfuse'] / us['nccl']:.2f}"))


def two_sums_tables(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Calls that make two sums, microseconds; NCCL's times without the copies that only the benchmark makes."""
    contenders = ("tpfuse", "NCCL, then tpfuse", "NCCL, then Inductor", "added, then tpfuse")
    yield from head(("norm", "H", "rows", *contenders, "one op / NCCL, then tpfuse"))
    for one in lines:
        us = one["us"]
        behind = us["nccl_then_op"] - us["copy"]
        times = us["one_op"], behind, us["nccl"] - 2 * us["copy"], us["merged"]
        shape = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}[one["norm"]], one["hidden"], one["rows"]
        yield row((*shape, *(f"{t:.2f}" for t in times), f"{us['one_op'] / behind:.2f}"))


def token_tables(plan: dict[str, Any], lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Tokens of Hugging Face's ``generate``, milliseconds; the ratio is that of ``tpfuse.hf.compile`` to the contender."""
    columns = ("ms a token", "lowest to highest", "GPU busy", "prefill ms", "fused", "tpfuse.hf.compile / it")
    yield from head(("model", "layers", "batch", "contender", *columns))
    ours = {one["batch"]: one["token"] for one in lines if one["contender"] == "tpfuse.hf.compile"}
    for one in lines:
        fused = f"{one['fused']} of {one['all_reduces']}" if one["all_reduces"] else ""
        ratio = f"{ours[one['batch']] / one['token']:.2f}" if one["contender"] != "tpfuse.hf.compile" else ""
        times = (f"{one['token']:.2f}", f"{one['low']:.2f} to {one['high']:.2f}", f"{one['gpu_busy']:.2f}")
        where = (plan["model"], plan["layers"], one["batch"], one["contender"])
        yield row((*where, *times, f"{one['prefill']:.1f}", fused, ratio))


def tables_of(path: Path, contenders: Sequence[str] = ()) -> str:
    """The Markdown of one file of results."""
    stored = json.loads(path.read_text())
    if "plan" in stored:
        return "\n".join(token_tables(stored["plan"], stored["lines"]))
    if "lines" in stored:
        return "\n".join(model_tables(stored["lines"]))
    if "stages" in stored:
        return "\n".join(stage_tables(stored["stages"]))
    if "rows" in stored and "quantizer" in stored["rows"][0]:
        return "\n".join(quant_tables(stored["rows"]))
    if "rows" in stored and "one_op" in stored["rows"][0].get("us", ()):
        return "\n".join(two_sums_tables(stored["rows"]))
    if "rows" in stored and "us" in stored["rows"][0]:
        return "\n".join(layer_norm_tables(stored["rows"]))
    if "rows" in stored:
        return "\n".join(row_tables(stored["rows"]))
    measured = [links.Links(**one) for one in stored.get("links", ())]
    return "\n".join(kernel_tables(tables.load(path), contenders, measured))


# README's rows: what, where the figures are, (world, hidden, rows) of a kernel or (model, phase, rows) of a step.
HIGHLIGHTS = (
    ("one call, 1 row of 4096", "h100-nvlink-w2", (2, 4096, 1)),
    ("one call, 32 rows of 8192", "h100-nvlink-w2", (2, 8192, 32)),
    ("one call, 2048 rows of 8192", "h100-nvlink-w2", (2, 8192, 2048)),
    ("decode step of a 16-layer Llama, batch 8", "e2e", ("llama", "decode", 8)),
    ("prefill of 2048 tokens, same model", "e2e", ("llama", "prefill", 2048)),
    ("a token of Hugging Face's `generate`, 32-layer Llama, batch 1", "h100-hf-32-layers", (1,)),
)
HIGHLIGHTED = ("nccl", ("symm one-shot", "symm two-shot"), "flashinfer pdl", "tpfuse")
HIGHLIGHTS_MACHINE = "two H100s, NVLink4"


def highlights() -> Iterator[str]:
    """The rows that README shows, each with its speedup over NCCL. Of torch's two all-reduces the faster one counts."""
    yield from head(
        ("two H100s, NVLink, bf16", "NCCL", "torch symm. mem.", "FlashInfer", "tpfuse", "speedup over NCCL")
    )
    for what, file, shape in HIGHLIGHTS:
        stored = json.loads((RESULTS / f"{file}.json").read_text())
        if file == "e2e":
            times = {
                one["contender"]: one["back_to_back"]
                for one in stored["lines"]
                if (one["machine"], one["model"], one["phase"], one["rows"]) == (HIGHLIGHTS_MACHINE, *shape)
            }
        elif "hf" in file:
            # Of a user of transformers' own tensor parallelism, before and after.
            names = {"inductor reduce-overhead": "nccl", "tpfuse.hf.compile": "tpfuse"}
            times = {
                names[one["contender"]]: one["token"] * 1e3
                for one in stored["lines"]
                if (one["batch"],) == shape and one["contender"] in names
            }
        else:
            times = {
                one["contender"]: one["median"]
                for one in stored["results"]
                if (one["world"], one["hidden"], one["rows"]) == shape and one["median"]
            }
        cells = []
        for names in HIGHLIGHTED:
            found = [times[n] for n in ((names,) if isinstance(names, str) else names) if n in times]
            cells.append(duration(min(found)) if found else "-")
        cells[-1] = f"**{cells[-1]}**"
        yield row((what, *cells, f"{times['nccl'] / times['tpfuse']:.2f}x"))


def duration(us: float) -> str:
    """Three figures with the unit."""
    return f"{us / 1000:#.3g} ms" if us >= 1000 else f"{us:#.3g}".removesuffix(".") + " us"


def renewed(text: str) -> str:
    """A page with every table made again from its file."""

    def replace(match: re.Match[str]) -> str:
        contenders = [c.strip() for c in match["contenders"].split(",") if c.strip()]
        mark = match[0].split("\n", 1)[0]
        if match["name"] == "highlights":
            return "\n".join((mark, *highlights(), "<!-- end -->"))
        return f"{mark}\n{tables_of(RESULTS / (match['name'] + '.json'), contenders)}\n<!-- end -->"

    return MARK.sub(replace, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="results to print as Markdown")
    parser.add_argument("--write", nargs="+", type=Path, default=[], help="pages whose tables are renewed")
    parser.add_argument("--plot", type=Path, help="a plot of the one file given, instead of its tables")
    args = parser.parse_args()
    if args.plot is not None:
        if len(args.files) != 1:
            parser.error(f"--plot draws one file of results, not {len(args.files)}")
        tables.plot(tables.load(args.files[0]), args.plot)
        return
    for path in args.files:
        print(tables_of(path))
    for page in args.write:
        page.write_text(renewed(page.read_text()))


if __name__ == "__main__":
    main()
