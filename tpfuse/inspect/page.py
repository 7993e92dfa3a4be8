"""One self-contained HTML page for a dump: no network, no server, no library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

from tpfuse.passes.reasons import REMEDIES
from tpfuse.passes.report import LOWERED, GraphReport, Site

from . import compare, estimate, words
from .load import Dump, DumpedGraph
from .nodes import NodeLine, Region

_EMPTY = Region((), ())


@dataclass(frozen=True)
class Table:
    """A table to show above the graphs: what is known beside the reports."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def page(dump: Dump, title: str = "", context: Sequence[Table] = ()) -> str:
    """The page of a whole dump. Raises ``ImportError`` without jinja2 (``pip install tpfuse[inspect]``).

    Args:
        dump: what to show.
        title: of the page; the dump's folder when empty.
        context: tables above the graphs.
    """
    import jinja2

    folder = files("tpfuse.inspect.templates")
    template = jinja2.Template((folder / "page.html.j2").read_text(encoding="utf-8"), autoescape=True)
    # In a script element only "<" can end or escape the text.
    shown = {**_data(dump), "context": [asdict(table) for table in context]}
    data = json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c")
    return template.render(
        title=title or str(dump.folder),
        data=data,
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
    )


def _data(dump: Dump) -> dict[str, Any]:
    return {
        "graphs": [_graph(name, copies) for name, copies in dump.by_name().items()],
        "remedies": {str(reason): text for reason, text in REMEDIES.items()},
    }


def _graph(name: str, copies: Sequence[DumpedGraph]) -> dict[str, Any]:
    """One graph on all its ranks. Ranks with the same report share one entry, so eight ranks rarely cost eight times."""
    variants: dict[str, dict[str, Any]] = {}
    for copy in copies:
        shown = _variant(copy)
        variants.setdefault(json.dumps(shown), {**shown, "ranks": []})["ranks"].append(copy.report.rank)
    reports = [copy.report for copy in copies]
    return {
        "name": name,
        "world": reports[0].world_size,
        "variants": list(variants.values()),
        "differences": [{"site": d.site, "ranks": list(d.ranks), "text": d.text} for d in compare.differences(reports)],
    }


def _variant(copy: DumpedGraph) -> dict[str, Any]:
    report = copy.report
    regions = copy.regions or (_EMPTY,) * len(report.sites)
    return {
        "summary": report.summary(),
        "settings": _settings(report),
        "notes": report.notes,
        "saved": _saved(report),
        "sites": [_site(site, region) for site, region in zip(report.sites, regions, strict=False)],
        "layers": [
            {"layer": a.layer, "attention": a.attention, "mlp": a.mlp, "shared": a.shared, "detail": a.detail}
            for a in report.layers
        ],
    }


def _settings(report: GraphReport) -> str:
    cached = ", from the compile cache" if report.from_cache else ""
    return f"policy {report.policy}, numerics {report.numerics}, inner {report.inner or 'unknown'}{cached}"


def _saved(report: GraphReport) -> str:
    total = estimate.NOTHING
    for site in report.fused:
        total = total + estimate.saving(site)
    return _saving(total) if report.fused else "nothing"


def _saving(saved: estimate.Saving) -> str:
    launches = "1 launch" if saved.launches == 1 else f"{saved.launches} launches"
    amount = (
        estimate.in_units(saved.bytes_per_row) + " a row" if saved.bytes is None else estimate.in_units(saved.bytes)
    )
    return f"{launches}, {amount}"


def _site(site: Site, region: Region) -> dict[str, Any]:
    first = region.before[0] if region.before else None
    moved = estimate.saving(replace(site, lowered=False)).bytes
    return {
        "title": words.title(site),
        "role": site.role,
        "layer": site.layer,
        "fused": site.fused,
        "reason": site.reason,
        "lowered": site.lowered,
        "detail": "; ".join(filter(None, (f"runs as: {LOWERED}", site.note))) if site.lowered else site.detail,
        "miss": words.nearest_miss(site),
        "steps": site.pattern.split("+"),
        "matched": list(site.matched),
        "group": list(site.group),
        "shared": site.shared,
        "admitted": words.admitted(site),
        "source": site.source,
        "line": first.text if first and first.source == site.source else "",
        "shape": words.shape(site),
        "bytes": "" if moved is None else estimate.in_units(moved // estimate.TRIPS_SAVED),
        "eps": site.eps,
        "flavour": words.flavour(site),
        "quantizer": words.quantizer(site),
        "saved": _saving(estimate.saving(site)),
        "before": [_line(line) for line in region.before],
        "after": [_line(line) for line in region.after],
    }


def _line(line: NodeLine) -> dict[str, Any]:
    return {
        "code": line.code,
        "source": line.source,
        "text": line.text,
        "bytes": "" if line.size is None else estimate.in_units(line.size),
    }
