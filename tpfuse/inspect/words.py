"""Short sentences about a site, the same in the terminal, the notebook, the dump and the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tpfuse.passes.report import GraphReport, Site


def title(site: Site) -> str:
    """Where the all-reduce is, e.g. ``layer 3 attention`` or ``embedding``."""
    return site.role if site.layer is None else f"layer {site.layer} {site.role}"


def verdict(site: Site) -> str:
    """``fused`` or ``kept: <reason>``."""
    return "fused" if site.fused else f"kept: {site.reason}"


def nearest_miss(site: Site) -> str:
    """How far the match came and what stopped it; empty when fused or when nothing beyond the all-reduce matched."""
    if site.fused or not site.matched:
        return ""
    detail = f"; {site.detail}" if site.detail else ""
    return f"matched up to {site.matched[-1]}{detail}"


def flavour(site: Site) -> str:
    """The rounding order of the site's norm in words; empty when there is none."""
    if not site.flavour:
        return ""
    from tpfuse.ops.flavour import Flavour
    from tpfuse.ops.layer_norm_flavour import LayerNormFlavour

    return _described(site.flavour, LayerNormFlavour.parse if "layer_norm" in site.pattern else Flavour.parse)


def quantizer(site: Site) -> str:
    """How the fused op quantizes the site's norm, in words; empty where it does not."""
    if not site.quantizer:
        return ""
    from tpfuse.ops.quantizer import Quantizer

    return _described(site.quantizer, Quantizer.parse)


def _described(text: str, parse: Callable[[str], Any]) -> str:
    try:
        return str(parse(text).describe())
    except ValueError:  # written by a version that knew others
        return text


def ranks(group: Iterable[int]) -> str:
    """Ranks in short form: ``0-3``, ``0,2,4,6``, or ``unknown``."""
    members = list(group)
    if not members:
        return "unknown"
    if len(members) > 2 and members == list(range(members[0], members[-1] + 1)):
        return f"{members[0]}-{members[-1]}"
    return ",".join(map(str, members))


def shape(site: Site) -> str:
    """dtype and shape of the sum, e.g. ``bfloat16[8, 4096]``."""
    return f"{site.dtype}[{', '.join(map(str, site.shape))}]" if site.shape else site.dtype


def layers(numbers: Iterable[int | None]) -> str:
    """Layer numbers in short form: ``0-79``, ``0,2-5``; a dash when there are none."""
    known = sorted({n for n in numbers if n is not None})
    spans: list[list[int]] = []
    for number in known:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "-"


def origin(report: GraphReport) -> str:
    """Which graph on which rank, e.g. ``graph-0, rank 1 of 4``."""
    cached = ", from the compile cache" if report.from_cache else ""
    return f"{report.graph_id}, rank {report.rank} of {report.world_size}{cached}"


_ADMITTED = {
    "shared-layer": "attention and MLP of a layer reduce over just these ranks",
    "not-refuted": "nothing in the graph shows these ranks to be of attention or MLP alone",
    "rows-proved": "it is proved who keeps which rows",
    "policy-all": "by the policy 'all'",
}


def admitted(site: Site) -> str:
    """Why the policy let a fused site be rewritten; empty when kept, or when an earlier tpfuse wrote the report."""
    return "" if site.admitted is None else _ADMITTED.get(site.admitted, site.admitted)


def remedy(site: Site) -> str:
    """What to do about the reason; empty when fused, or when the code is one of a newer tpfuse."""
    try:
        return site.remedy
    except ValueError:
        return ""


def kept_of(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """The sites that were not fused, by reason, most frequent first."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        if not site.fused:
            found.setdefault(str(site.reason), []).append(site)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
