"""A report as a table: for the terminal with rich, as plain text without it, and as HTML for notebooks.

The layers of a model look alike, so sites that differ only in their layer share a row; ``each=True`` gives every site
its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from tpfuse.passes.report import GraphReport, Site

from . import estimate, words

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = ("role", "layers", "sites", "ranks", "shared", "pattern", "result", "source")
_NUMBERS = ("sites",)
_SHARED = {True: "yes", False: "no", None: "-"}


@dataclass(frozen=True)
class Row:
    """Sites that differ only in their layer."""

    sites: tuple[Site, ...]

    @property
    def fused(self) -> bool:
        return self.sites[0].fused

    def cells(self) -> tuple[str, ...]:
        """One text per column of :data:`COLUMNS`."""
        site = self.sites[0]
        return (
            site.role,
            words.layers(s.layer for s in self.sites),
            str(len(self.sites)),
            words.ranks(site.group),
            _SHARED[site.shared],
            " + ".join(site.pattern.split("+")),  # spaces, so that a narrow terminal wraps between the steps
            words.verdict(site),
            _short(site.source),
        )


def rows(report: GraphReport, each: bool = False) -> list[Row]:
    """The table's rows in graph order."""
    if each:
        return [Row((site,)) for site in report.sites]
    alike: dict[object, list[Site]] = {}
    for site in report.sites:
        key = (site.role, site.group, site.shared, site.pattern, site.fused, site.reason, site.source, site.flavour)
        alike.setdefault(key, []).append(site)
    return [Row(tuple(sites)) for sites in alike.values()]


def render(report: GraphReport, each: bool = False) -> RenderableType:
    """The report for rich to print. Raises ``ImportError`` without rich (``pip install tpfuse[inspect]``)."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, header_style="bold")
    for name in COLUMNS:
        table.add_column(
            name,
            justify="right" if name in _NUMBERS else "left",
            overflow="fold",
            no_wrap=name in ("role", "sites"),
        )
    for row in rows(report, each):
        colour = "green" if row.fused else "yellow"
        table.add_row(*(Text(cell, colour if name == "result" else "") for name, cell in _named(row.cells())))
    lines = [Text(line, "bold" if index == 0 else "") for index, line in enumerate(_lines(report))]
    return Group(lines[0], table, *lines[1:]) if report.sites else Group(*lines)


def text(report: GraphReport, each: bool = False) -> str:
    """The report as text of the terminal's width: a rich table, or plain columns where rich is not installed."""
    try:
        from rich.console import Console

        console = Console(no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(render(report, each))
        return capture.get().rstrip()
    except ImportError:
        return plain(report, each)


def plain(report: GraphReport, each: bool = False) -> str:
    """The same table with nothing but the standard library."""
    head, *rest = _lines(report)
    if not report.sites:
        return "\n".join([head, *rest])
    cells = [COLUMNS, *(row.cells() for row in rows(report, each))]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([head, "", table[0], "-" * len(table[0]), *table[1:], "", *rest]).rstrip()


def html(report: GraphReport) -> str:
    """The report as an HTML fragment for notebooks. It inherits the notebook's colours, so it suits light and dark."""
    border = "border-bottom:1px solid rgba(128,128,128,.35);padding:.3em .9em .3em 0;text-align:left;vertical-align:top"
    head = "".join(f'<th scope="col" style="{border}">{name}</th>' for name in COLUMNS)
    body = ""
    for row in rows(report):
        edge = "#2e8b57" if row.fused else "#c07c10"
        mark = f"border-left:3px solid {edge};padding-left:.5em"
        body += "<tr>"
        for name, cell in _named(row.cells()):
            shown = f'<span style="{mark}">{escape(cell)}</span>' if name == "result" else escape(cell)
            body += f'<td style="{border}">{shown}</td>'
        body += "</tr>"
    first, *rest = _lines(report)
    notes = "".join(f"<li>{escape(line)}</li>" for line in rest)
    return (
        f'<div class="tpfuse-report"><p><strong>{escape(first)}</strong></p>'
        f'<div style="overflow-x:auto"><table style="border-collapse:collapse"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div><ul>{notes}</ul></div>"
    )


def _lines(report: GraphReport) -> list[str]:
    """The summary first, then what to know and do."""
    lines = [f"{report.summary()}, rank {report.rank} of {report.world_size}{_cached(report)}"]
    if not report.sites:
        return [*lines, *_notes(report)]
    saved = estimate.NOTHING
    for site in report.fused:
        saved = saved + estimate.saving(site)
    if report.fused:
        per = in_all(saved)
        lines.append(f"saves an estimated {saved.launches} launches and {per} of memory traffic per call and rank")
    for code, sites in words.kept_of(report.sites).items():
        lines.append(f"{code} ({len(sites)}): {words.remedy(sites[0])}".rstrip(": "))
        miss = words.nearest_miss(sites[0]) or sites[0].detail
        if miss:
            lines.append(f"  e.g. {words.title(sites[0])}: {miss}")
    return [*lines, *_notes(report)]


def in_all(saved: estimate.Saving) -> str:
    """The traffic in units, per row where the row count is symbolic."""
    if saved.bytes is None:
        return f"{estimate.in_units(saved.bytes_per_row)} a row"
    return estimate.in_units(saved.bytes)


def _notes(report: GraphReport) -> list[str]:
    return [f"note: {note}" for note in report.notes]


def _cached(report: GraphReport) -> str:
    return ", from the compile cache" if report.from_cache else ""


def _named(cells: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    return zip(COLUMNS, cells, strict=True)


def _short(source: str) -> str:
    """The file's name and the line; the folder is in the JSON and on the page."""
    return source.rsplit("/", 1)[-1]
