"""The pass: find, judge, rewrite, report. A graph goes in; the rewritten graph and a report come out.

Imports no kernel and needs no GPU, so it runs on a fake process group as well as under a compile.
"""

from __future__ import annotations

import itertools
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.fx import Graph, GraphModule, Node

from tpfuse import compat

from . import collectives, rewrite, sharing, values
from .options import PassOptions
from .reasons import Reason, Refusal
from .replacement import Replacement, build
from .report import GraphReport, LayerAudit, Site
from .sites import Candidate, Found, Walk, settle

log = logging.getLogger("tpfuse")
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
    try:
        sites, audits = _rewrite(g, options, training)
        if module is not None and any(s.fused for s in sites):
            module.recompile()
    except VerificationError:
        raise
    except Exception as error:
        if options.verify:
            raise
        sites, audits = _kept(g, error), []
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


def _rewrite(g: Graph, options: PassOptions, training: bool) -> tuple[list[Site], list[LayerAudit]]:
    """Find, judge and build everything; only then edit. An exception leaves the graph as it was."""
    found = collectives.find(g)
    walk = Walk(g, options.numerics == "relaxed")
    looked = settle([_guarded(c, options, walk.look) for c in found]) if found else []
    built: dict[Node, Replacement] = {}
    for position, item in enumerate(looked):
        if isinstance(item.outcome, Candidate):
            looked[position], replacement = _build(item, options)
            if replacement is not None:
                built[item.outcome.norm.out] = replacement
    places = sharing.order_layers([sharing.place(c, walk.order) for c in found])
    audits = sharing.audit(found, places)
    judged = _judge(looked, places, audits, options, training)
    sites = [_site(f, p, audits) for f, p in zip(judged, places, strict=True)]

    decisions: list[rewrite.Decision] = []
    for item, site in zip(judged, sites, strict=True):
        if isinstance(item.outcome, Candidate):
            point = walk.insertion_point(item.outcome)
            assert point is not None  # judged legal
            decision = rewrite.Decision(built[item.outcome.norm.out], point)
            if options.verify:
                _verify(decision, site)
            decisions.append(decision)
    try:
        fused = iter(rewrite.apply(g, decisions))
    except Exception as error:
        if options.verify:
            raise
        refusal = _internal(error)
        kept = [Found(f.collective, refusal, f.pattern) if s.fused else f for f, s in zip(judged, sites, strict=True)]
        return [_site(f, p, audits) for f, p in zip(kept, places, strict=True)], audits
    return [replace(s, replaced_by=next(fused).name) if s.fused else s for s in sites], audits


def _guarded(c: collectives.Collective, options: PassOptions, look: Callable[[collectives.Collective], Found]) -> Found:
    """One all-reduce that the pass stumbles over must not cost the others their fusion."""
    try:
        return look(c)
    except Exception as error:
        if options.verify:
            raise
        return Found(c, _internal(error), "all_reduce")


def _build(item: Found, options: PassOptions) -> tuple[Found, Replacement | None]:
    assert isinstance(item.outcome, Candidate)
    try:
        built = build(item.outcome)
    except Exception as error:
        if options.verify:
            raise
        built = _internal(error)
    if isinstance(built, Refusal):
        return Found(item.collective, built, item.pattern), None
    return item, built


def _verify(decision: rewrite.Decision, site: Site) -> None:
    difference = rewrite.verify(decision)
    if difference is not None:
        raise VerificationError(
            f"tpfuse.verify: the rewrite of {site.nodes[0]} ({site.source or 'unknown source'}) is wrong: "
            f"{difference}. This is a bug in tpfuse; compile with options={{'tpfuse.policy': 'off'}} meanwhile."
        )


_warned: set[str] = set()


def _internal(error: Exception) -> Refusal:
    """The refusal for an exception of the pass itself; warns once for each."""
    text = f"{type(error).__name__}: {error}"
    if text not in _warned:
        _warned.add(text)
        warnings.warn(
            f"tpfuse: the pass failed and left the graph as it was: {text}. This is a bug in tpfuse; the model runs unfused "
            "there. options={'tpfuse.verify': True} raises the exception with its traceback.",
            RuntimeWarning,
            stacklevel=3,
        )
    log.debug("the pass failed", exc_info=error)
    return Refusal(Reason.INTERNAL, text)


def _kept(g: Graph, error: Exception) -> list[Site]:
    """One site for every all-reduce of a graph that was left as it was, without the part that failed."""
    refusal = _internal(error)
    try:
        nowhere = sharing.Place("other", None, "")
        return [_site(Found(c, refusal, "all_reduce"), nowhere, []) for c in collectives.find(g)]
    except Exception:
        nodes = [n for n in g.nodes if collectives.spelling_of(n) is not None]
        reason = refusal.reason.value
        return [Site(False, reason, refusal.detail, "all_reduce", "other", None, (), None, "", [n.name]) for n in nodes]


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
