"""The nodes around one reduction, before and after the rewrite: what the page shows side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tpfuse.passes import collectives, source
from tpfuse.passes.report import GraphReport, ReportFormatError, Site

from . import code

NODES_VERSION = 1
READERS_SHOWN = 12


@dataclass(frozen=True)
class NodeLine:
    """One node of a graph, ready to print.

    Attributes:
        name: of the node.
        code: the node as one Python statement.
        source: ``file:line`` of the model code, the path of its module, or ``""``.
        text: that source line itself, or ``""``.
        size: bytes of its outputs, or None where a size is symbolic.
    """

    name: str
    code: str
    source: str
    text: str
    size: int | None


@dataclass(frozen=True)
class Region:
    """The nodes of one site before and after. A site that is kept has the same nodes in both, with what reads the sum; a lowered
    one has the same nodes."""

    before: tuple[NodeLine, ...]
    after: tuple[NodeLine, ...]


def regions(report: GraphReport, before: GraphModule | Graph, after: GraphModule | Graph) -> list[Region]:
    """One :class:`Region` per site of the report, in its order."""
    old = {node.name: node for node in code.graph_of(before).nodes}
    new = {node.name: node for node in code.graph_of(after).nodes}
    return [_region(site, old, new) for site in report.sites]


def to_json(found: Iterable[Region]) -> str:
    """The regions as JSON; :func:`from_json` reads them back equal."""
    return json.dumps({"schema": NODES_VERSION, "regions": [asdict(region) for region in found]}, indent=1)


def from_json(text: str) -> list[Region]:
    """Read what :func:`to_json` wrote. Raises :class:`ReportFormatError` when it is something else or newer."""
    try:
        data = json.loads(text)
        version = data["schema"]
        if version > NODES_VERSION:
            raise ReportFormatError(
                f"nodes.json has schema {version}, this tpfuse reads up to {NODES_VERSION}; upgrade tpfuse to read it"
            )
        return [Region(_lines(r["before"]), _lines(r["after"])) for r in data["regions"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ReportFormatError(f"not the nodes of a tpfuse dump: {error!r}") from error


def _region(site: Site, old: dict[str, Node], new: dict[str, Node]) -> Region:
    before = [old[name] for name in site.nodes if name in old]
    if not site.fused or site.lowered:
        if not site.fused:
            before += _readers(before, list(old.values()))
        after = [new[node.name] for node in before if node.name in new]
    else:
        fused = new.get(site.replaced_by or "")
        after = [] if fused is None else [fused, *(user for user in fused.users if _is_item(user))]
    return Region(tuple(map(_line, before)), tuple(map(_line, after)))


def _readers(found: list[Node], order: list[Node]) -> list[Node]:
    """What happens to a sum that was not fused: the nodes that depend on it, up to the next collective or a handful."""
    place = {node: index for index, node in enumerate(order)}
    seen, readers = set(found), []
    waiting = {user for node in found for user in node.users} - seen
    while waiting and len(seen) < READERS_SHOWN:
        node = min(waiting, key=lambda n: place.get(n, len(order)))
        waiting.remove(node)
        seen.add(node)
        readers.append(node)
        if not collectives.is_communication(node):
            waiting |= set(node.users) - seen
    return readers


def _line(node: Node) -> NodeLine:
    found = source.of(node)
    return NodeLine(
        name=node.name,
        code=code.statement(node),
        source=str(found),
        text=found.text,
        size=_size(node.meta.get("val")),
    )


def _is_item(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _size(value: Any) -> int | None:
    if isinstance(value, torch.Tensor):
        sizes = [size if isinstance(size, int) else None for size in value.shape]
        if None in sizes:
            return None
        total = value.element_size()
        for size in sizes:
            total *= size or 0
        return total
    if isinstance(value, tuple | list) and value:
        parts = [_size(item) for item in value]
        return None if None in parts else sum(part or 0 for part in parts)
    return None


def _lines(items: list[dict[str, Any]]) -> tuple[NodeLine, ...]:
    names = [f.name for f in fields(NodeLine)]
    return tuple(NodeLine(**{name: item[name] for name in names}) for item in items)
