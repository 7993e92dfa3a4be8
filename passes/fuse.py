"""The pass: find, judge, rewrite, report. A graph goes in; the rewritten graph and a report come out.

Imports no kernel and needs no GPU, so it runs on a fake process group as well as under a compile.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from tpfuse import compat

from . import collectives, rewrite, sharing, values
from .options import PassOptions
from .reasons import Reason, Refusal
from .report import GraphReport, LayerAudit, Site
from .sites import Candidate, Found, Walk, settle

_ids = itertools.count()


def next_graph_id() -> str:
    """A name for a graph that no other report of this process has."""
    return f"graph-{next(_ids)}"


class VerificationError(RuntimeError):
    """``tpfuse.verify`` found a rewritten region that gives other numbers than the model's own."""


def fuse(
    graph: GraphModule | Graph, options: PassOptions | None = None, *, training: bool = False, inner: str = ""
) -> GraphReport:
    """Rewrite every legal ``all_reduce -> add -> RMSNorm`` of a functional ATen graph in place.

    Args:
        graph: a graph at the level that AOTAutograd, ``torch.export`` or Inductor's pre-pass produce.
        options: default is policy ``shared`` and exact numerics.
        training: the graph belongs to a training step; nothing is rewritten and every site says so.
        inner: name of the inner compiler, for the report.
    Returns:
        The report; it has exactly one site per all-reduce.
    Raises:
        VerificationError: with ``options.verify``, when a rewritten region differs. The graph must not be used then.
    """
    options = options or PassOptions()
    started = time.perf_counter()
    module = graph if isinstance(graph, GraphModule) else None
    g = graph.graph if isinstance(graph, GraphModule) else graph

    found = collectives.find(g)
    relaxed = options.numerics == "relaxed"
    walk = Walk(g, relaxed)
    looked = settle([walk.look(c) for c in found]) if found else []
    places = sharing.order_layers([sharing.place(c, walk.order) for c in found])
    audits = sharing.audit(found, places)
    judged = _judge(looked, places, audits, options, training)

    sites: list[Site] = []
    changed = False
    # Points are nodes of the original graph; they are looked up before anything moves.
    points = [walk.insertion_point(f.outcome) if isinstance(f.outcome, Candidate) else None for f in judged]
    described = [_site(f, p, audits) for f, p in zip(judged, places, strict=True)]
    outputs = [n.name for n in _outputs(g)]
    moved: dict[Node, Node] = {}
    for item, point, site in zip(judged, points, described, strict=True):
        if not isinstance(item.outcome, Candidate):
            sites.append(site)
            continue
        candidate = _follow_moves(item.outcome, moved)
        assert point is not None
        new = rewrite.fuse(g, candidate, _alive(point, walk))
        if options.verify:
            difference = rewrite.verify(candidate, new.fused)
            if difference is not None:
                raise VerificationError(
                    f"tpfuse.verify: the rewrite of {site.nodes[0]} ({site.source or 'unknown source'}) is wrong: "
                    f"{difference}. This is a bug in tpfuse; compile with options={{'tpfuse.policy': 'off'}} meanwhile."
                )
        # What stands for the erased nodes now: later regions may have them as operands.
        moved[item.outcome.norm.out] = new.normed
        moved[item.outcome.post_add or item.outcome.h.root] = new.summed
        sites.append(replace(site, replaced_by=new.fused.name))
        changed = True
    if changed:
        rewrite.shrink(g, found)
        _keep_output_names(g, outputs)
        g.lint()
        _check_replaced(judged)
        if module is not None:
            module.recompile()
    initialised = dist.is_available() and dist.is_initialized()
    return GraphReport(
        graph_id=next_graph_id(),
        rank=dist.get_rank() if initialised else 0,
        world_size=dist.get_world_size() if initialised else 1,
        sites=sites,
        layers=audits,
        policy=options.policy,
        numerics=options.numerics,
        inner=inner,
        seconds=time.perf_counter() - started,
    )


def _outputs(graph: Graph) -> list[Node]:
    found: list[Node] = []
    map_arg(graph.output_node().args, found.append)
    return found


def _keep_output_names(graph: Graph, names: list[str]) -> None:
    """Give the outputs their old names: the signature of an exported program refers to them by name."""
    taken = {n.name for n in graph.nodes}
    for node, name in zip(_outputs(graph), names, strict=True):
        if node.name != name and name not in taken and node.op == "call_function":
            node.name = name


def _check_replaced(judged: list[Found]) -> None:
    """A reduction that was fused and still runs would be summed twice: slower than no fusion, and silent."""
    for item in judged:
        node = item.collective.node
        if isinstance(item.outcome, Candidate) and item.collective.index is None and not compat.is_erased(node):
            raise RuntimeError(
                f"tpfuse: {node.name} was fused, but something still reads it: {', '.join(u.name for u in node.users)}. "
                "This is a bug in tpfuse; compile with options={'tpfuse.policy': 'off'} meanwhile."
            )


def _alive(point: Node, walk: Walk) -> Node:
    """The first node from ``point`` on that earlier rewrites have left in place."""
    while compat.is_erased(point):
        point = walk.nodes[walk.order[point] + 1]
    return point


def _judge(
    looked: list[Found],
    places: list[sharing.Place],
    audits: list[LayerAudit],
    options: PassOptions,
    training: bool,
) -> list[Found]:
    """Apply training, policy and fuel to what is legal."""
    shared = sharing.shared_groups(audits)
    by_layer = {a.layer: a for a in audits}
    judged, left = [], options.fuel
    for item, spot in zip(looked, places, strict=True):
        outcome = item.outcome
        if training:
            outcome = Refusal(Reason.TRAINING, "the graph was compiled for training (some input requires grad)")
        elif isinstance(outcome, Candidate):
            refusal = _policy(item, by_layer.get(spot.layer) if spot.layer is not None else None, shared, options)
            if refusal is not None:
                outcome = refusal
            elif left is not None and left <= 0:
                outcome = Refusal(Reason.FUEL, f"tpfuse.fuel={options.fuel} was used up by earlier rewrites")
            elif left is not None:
                left -= 1
        judged.append(Found(item.collective, outcome, item.pattern))
    return judged


def _policy(
    item: Found, layer: LayerAudit | None, shared: set[tuple[int, ...]], options: PassOptions
) -> Refusal | None:
    ranks = item.collective.ranks
    if options.policy == "all":
        return None
    if options.policy == "off":
        return Refusal(Reason.POLICY, "tpfuse.policy='off' rewrites nothing; 'all' would fuse it")
    if ranks in shared:
        return None
    if layer is not None and layer.shared is False:
        return Refusal(Reason.GROUP_MISMATCH, f"{layer.detail}; tpfuse.policy='all' would fuse it")
    return Refusal(
        Reason.POLICY,
        f"no layer of this graph proves that attention and MLP share ranks {list(ranks)}; tpfuse.policy='all' would fuse it",
    )


def _site(item: Found, spot: sharing.Place, audits: list[LayerAudit]) -> Site:
    c, outcome = item.collective, item.outcome
    tensor = values.value(c.value)
    layer = next((a for a in audits if a.layer == spot.layer), None)
    common: dict[str, Any] = {
        "role": spot.role,
        "layer": spot.layer,
        "group": c.ranks,
        "shared": None if layer is None or spot.role not in ("attention", "mlp") else layer.shared,
        "source": spot.source,
        "shape": () if tensor is None else tuple(compat.size_hint(n) for n in tensor.shape),
        "dtype": "" if tensor is None else str(tensor.dtype).removeprefix("torch."),
    }
    if isinstance(outcome, Candidate):
        norm = outcome.norm
        exact = "" if norm.exact else " (relaxed: other bits than the model's)"
        return Site(
            fused=True,
            reason=None,
            detail=f"{norm.flavour.describe()}{exact}",
            pattern=outcome.pattern,
            nodes=[n.name for n in outcome.nodes],
            eps=norm.eps,
            flavour=str(norm.flavour),
            **common,
        )
    names = dict.fromkeys([c.node.name, *(w.name for w in c.waits)])
    return Site(
        fused=False,
        reason=outcome.reason.value,
        detail=outcome.detail,
        pattern=item.pattern,
        nodes=list(names),
        matched=outcome.matched,
        **common,
    )


def _follow_moves(candidate: Candidate, moved: dict[Node, Node]) -> Candidate:
    """The candidate with operands that an earlier rewrite replaced exchanged for what stands for them now."""
    c = candidate.collective
    changes: dict[str, Any] = {}
    for name in ("bias", "residual"):
        node = getattr(candidate, name)
        if node is not None and node in moved:
            changes[name] = moved[node]
    if c.x in moved:
        changes["collective"] = replace(c, x=moved[c.x])
    return replace(candidate, **changes) if changes else candidate
