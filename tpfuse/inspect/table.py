"""A report as a table: for the terminal with rich, as plain text without it, and as HTML for notebooks.

The layers of a model look alike, so sites that differ only in their layer share a row; ``each=True`` gives every site
its own. Where the terminal is too narrow for all columns, a second line of each row takes the pattern and the source.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import TYPE_CHECKING

from tpfuse.ops.vote import MAX_WORLD
from tpfuse.passes import fusion, source
from tpfuse.passes.report import LOWERED, GraphReport, Site

from . import estimate, words

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

COLUMNS = ("role", "layers", "sites", "ranks", "shared", "pattern", "result", "source")
_NUMBERS = ("sites",)
_SECOND_LINE = ("pattern", "source")
_WIDEST = {"layers": 14, "ranks": 12}  # so that the narrow form fits 80 columns
_GAP = "  "
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
            " + ".join(site.pattern.split("+")),
            words.verdict(site),
            source.short(source.without_layer(site.source) if len(self.sites) > 1 else site.source),
        )


def rows(report: GraphReport, each: bool = False) -> list[Row]:
    """The table's rows in graph order."""
    if each:
        return [Row((site,)) for site in report.sites]
    alike: dict[object, list[Site]] = {}
    for site in report.sites:
        line = source.without_layer(site.source)
        result = (site.fused, site.lowered, site.reason, site.flavour, site.quantizer, site.note)
        key = (site.role, site.group, site.shared, site.pattern, line, *result)
        alike.setdefault(key, []).append(site)
    return [Row(tuple(sites)) for sites in alike.values()]


def render(report: GraphReport, each: bool = False) -> RenderableType:
    """The report for rich to print. Raises ``ImportError`` without rich (``pip install tpfuse[inspect]``)."""
    from rich.console import Group
    from rich.text import Text

    lines = [Text(line, "bold" if index == 0 else "") for index, line in enumerate(_lines(report))]
    return Group(lines[0], _Table(rows(report, each)), *lines[1:]) if report.sites else Group(*lines)


@dataclass(frozen=True)
class _Table:
    """The rows for rich, in the form that fits the console."""

    rows: Sequence[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        yield Text()
        lines = layout([row.cells() for row in self.rows], options.max_width)
        head = next(i for i, line in enumerate(lines) if line.startswith("-")) + 1
        for i, line in enumerate(lines):
            shown = Text(line, "bold" if i < head else "", no_wrap=True, overflow="ignore")
            shown.highlight_regex(r"\bfused\b", "green")
            shown.highlight_regex(r"\bkept: [\w-]*", "yellow")
            yield shown
        yield Text()


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
    width = shutil.get_terminal_size().columns
    table = layout([row.cells() for row in rows(report, each)], width)
    return "\n".join([head, "", *table, "", *rest]).rstrip()


def layout(cells: Sequence[tuple[str, ...]], width: int) -> list[str]:
    """Header, rule and rows as lines of at most ``width`` columns where that is possible; numbers are never broken."""
    lines = [COLUMNS, *cells]
    columns = list(range(len(COLUMNS)))
    wrapped = [[_wrap(text, _WIDEST.get(COLUMNS[i], len(text))) for i, text in enumerate(line)] for line in lines]
    narrow = sum(_widths(wrapped)) + len(_GAP) * (len(columns) - 1) > width
    if narrow:
        columns = [i for i in columns if COLUMNS[i] not in _SECOND_LINE]
        wrapped = [[line[i] for i in columns] for line in wrapped]
    widths = _widths(wrapped)
    made: list[list[str]] = []
    for line, parts in zip(lines, wrapped, strict=True):
        shown = []
        for pieces in zip_longest(*parts, fillvalue=""):
            aligned = (
                text.rjust(size) if COLUMNS[i] in _NUMBERS else text.ljust(size)
                for i, text, size in zip(columns, pieces, widths, strict=True)
            )
            shown.append(_GAP.join(aligned).rstrip())
        if narrow:
            below = [text for name, text in _named(line) if name in _SECOND_LINE and text]
            indent = " " * (widths[0] + len(_GAP))
            one = indent + " at ".join(below)
            shown += [one] if len(one) <= width else [indent + text for text in below]
        made.append(shown)
    head, *body = made
    rule = "-" * max(len(text) for shown in made for text in shown)
    return [*head, rule, *(text for shown in body for text in shown)]


def _widths(lines: Sequence[Sequence[Sequence[str]]]) -> list[int]:
    return [max(len(text) for line in lines for text in line[i]) for i in range(len(lines[0]))]


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns, broken behind commas only."""
    lines = [""]
    for part in re.split(r"(?<=,)", text):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return lines


def html(report: GraphReport) -> str:
    """The report as an HTML fragment for notebooks. It inherits the notebook's colors, so it suits light and dark."""
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
        return [*lines, *_nothing(report), *_notes(report)]
    saved = estimate.NOTHING
    for site in report.fused:
        saved = saved + estimate.saving(site)
    lowered = sum(site.lowered for site in report.sites)
    if lowered:
        lines.append(f"{lowered} of {len(report.fused)} fused run as: {LOWERED}")
    wide = sum(estimate.too_many_ranks(site) for site in report.fused if not site.lowered)
    if wide:
        lines.append(
            f"{wide} of {len(report.fused)} fused run as: library all-reduce and one kernel, for their group has more than "
            f"{MAX_WORLD} ranks"
        )
    if lowered + wide < len(report.fused):
        per = in_all(saved)
        lines.append(f"saves an estimated {saved.launches} launches and {per} of memory traffic per call and rank")
    unproved = [site for site in report.fused if site.admitted == "not-refuted"]
    if unproved:
        ranks = ", ".join(dict.fromkeys(words.ranks(site.group) for site in unproved))
        lines.append(
            f"not-refuted ({len(unproved)}): {words.admitted(unproved[0])} ({ranks}); tpfuse.policy='strict' would keep them"
        )
    for code, sites in words.kept_of(report.sites).items():
        lines.append(f"{code} ({len(sites)}): {words.remedy(sites[0])}".rstrip(": "))
        miss = words.nearest_miss(sites[0]) or sites[0].detail
        if miss:
            lines.append(f"  e.g. {words.title(sites[0])}: {miss}")
    noted = [site for site in report.fused if site.note]
    if noted:
        lines.append(f"left outside of the op ({len(noted)}), e.g. {words.title(noted[0])}: {noted[0].note}")
    return [*lines, *_notes(report)]


def in_all(saved: estimate.Saving) -> str:
    """The traffic in units, per row where the row count is symbolic."""
    if saved.bytes is None:
        return f"{estimate.in_units(saved.bytes_per_row)} a row"
    return estimate.in_units(saved.bytes)


def _nothing(report: GraphReport) -> list[str]:
    """What a graph without an all-reduce may mean, where ranks could have reduced something."""
    if report.world_size == 1:
        return [
            "no all-reduce: there is one rank. Several come from torchrun, torch.distributed.init_process_group and a cut model"
        ]
    if any(note.startswith(fusion.INSIDE) for note in report.notes):
        return ["no all-reduce in this graph itself, see the reports of the graphs inside of it"]
    others = [(report.reduce_scatters, "reduce-scatters"), (report.all_gathers, "all-gathers")]
    has = " and ".join(f"{count} {what}" for count, what in others if count)
    if has:
        return [f"no all-reduce, but {has}: tpfuse fuses all-reduces, and reduce-scatters over the first dimension"]
    return [
        "no all-reduce: the model is not cut over the ranks, its sums are in another graph (a graph break), or they are made by "
        "an operator that tpfuse does not know (tpfuse.register_collective)"
    ]


def _notes(report: GraphReport) -> list[str]:
    return [f"note: {note}" for note in report.notes]


def _cached(report: GraphReport) -> str:
    return ", from the compile cache" if report.from_cache else ""


def _named(cells: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    return zip(COLUMNS, cells, strict=True)
