"""The reductions of one graph as a picture: a row per layer, attention beside MLP, fused or kept."""

from __future__ import annotations

from html import escape

from tpfuse.passes.report import GraphReport, Site

from . import words

ROW, BLOCK_W, BLOCK_H, GAP, LEFT, TOP = 34, 250, 26, 12, 92, 64
COLUMNS = ("attention", "mlp")
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1d2430 } .dim { fill: #5b6675 } .head { font-weight: 600 }
.fused { fill: #d5efe1; stroke: #1f7a4d } .kept { fill: #fdf3e0; stroke: #a15c00; stroke-dasharray: 4 3 }
.page { fill: #ffffff }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e8ee } .dim { fill: #9aa5b4 } .page { fill: #14181e }
  .fused { fill: #143d2a; stroke: #5cc28f } .kept { fill: #3a2b10; stroke: #e0a54a }
}
"""


def picture(report: GraphReport) -> str:
    """An SVG document with one block per site."""
    blocks: list[str] = []
    y = TOP
    for label, row in _rows(report.sites):
        columns: dict[int, list[Site]] = {}
        for site in row:
            columns.setdefault(COLUMNS.index(site.role) if site.role in COLUMNS else 0, []).append(site)
        height = max(len(stack) for stack in columns.values())
        blocks.append(f'<text x="16" y="{y + 17}" class="dim">{escape(label)}</text>')
        for column, stack in columns.items():
            blocks += [_block(site, LEFT + column * (BLOCK_W + GAP), y + i * ROW) for i, site in enumerate(stack)]
        y += height * ROW
    width = LEFT + 2 * BLOCK_W + GAP + 16
    head = f'<text x="16" y="24" class="head">{escape(report.summary())}</text>'
    names = "".join(
        f'<text x="{LEFT + i * (BLOCK_W + GAP)}" y="50" class="dim">{name}</text>' for i, name in enumerate(COLUMNS)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 12}" viewBox="0 0 {width} {y + 12}" '
        f'role="img" aria-label="{escape(report.summary(), quote=True)}"><style>{STYLE}</style>'
        f'<rect class="page" width="100%" height="100%"/>{head}{names}{"".join(blocks)}</svg>\n'
    )


def _rows(sites: list[Site]) -> list[tuple[str, list[Site]]]:
    """Sites of one layer together; a site without a layer has a row of its own, in graph order."""
    rows: dict[object, tuple[str, list[Site]]] = {}
    for index, site in enumerate(sites):
        if site.layer is None:
            rows["alone", index] = (site.role, [site])
        else:
            rows.setdefault(site.layer, (f"layer {site.layer}", []))[1].append(site)
    return list(rows.values())


def _block(site: Site, x: int, y: int) -> str:
    tip = escape(f"{words.title(site)}: {words.verdict(site)}. {site.detail} {site.source}".strip())
    label = "fused" if site.fused else str(site.reason)
    return (
        f'<g><title>{tip}</title><rect class="{"fused" if site.fused else "kept"}" x="{x}" y="{y}" width="{BLOCK_W}" '
        f'height="{BLOCK_H}" rx="5"/><text x="{x + 10}" y="{y + 17}">{escape(label)}</text>'
        f'<text x="{x + BLOCK_W - 10}" y="{y + 17}" text-anchor="end" class="dim">'
        f"ranks {words.ranks(site.group)}</text></g>"
    )
