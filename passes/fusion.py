"""The pass: find, judge, rewrite, report. A graph goes in; the rewritten graph and a report come out.

Imports no kernel and needs no GPU, so it runs on a fake process group as well as under a compile.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from functools import partial

import torch.distributed as dist
from torch.fx import Graph, GraphModule, Node

from . import collectives, gathers, handmade, lowering, quantization, region, rewrite, second_sum, sharing, square_sums
from .candidate import Candidate, Found
from .failure import guarded, internal, kept, noted
from .fused_call import build
from .judge import judge
from .legality import Legality, reduction, settle
from .merged import merge
from .options import PassOptions
from .reasons import Reason, Refusal
from .replacement import Replacement
from .report import GraphReport, LayerAudit, Site
from .site_of import site_of

INSIDE = "graphs inside of this one reduce too"
_ids = itertools.count()


def next_graph_id() -> str:
    """A name for a graph that no other report of this process has."""
    return f"graph-{next(_ids)}"


class VerificationError(RuntimeError):
    """``tpfuse.verify`` found a rewritten region that gives other numbers than the model's own."""


def fuse(
    graph: GraphModule | Graph, options: PassOptions | None = None, *, training: bool = False, inner: str = ""
) -> GraphReport:
    """Rewrite every legal ``all_reduce -> add -> norm`` of a functional ATen graph in place.

    Args:
        graph: a graph at the level that AOTAutograd, ``torch.export`` or Inductor's pre-pass produce.
        options: default is policy ``shared`` and exact numerics.
        training: the graph belongs to a training step; nothing is rewritten and every site says so.
        inner: name of the inner compiler, for the report.
    Returns:
        The report; it has exactly one site per all-reduce. Graphs that this one calls, as ``torch.cond`` does, are left alone
        and named in its notes: call this for each of them.
    Raises:
        TypeError: it is no graph.
        VerificationError: with ``options.verify``, when a rewritten region differs. The graph must not be used then.
    """
    if not isinstance(graph, GraphModule | Graph):
        raise TypeError(
            f"fuse takes an fx.GraphModule or fx.Graph of functional ATen; it was given a {type(graph).__name__}. A module has "
            "torch.export.export(module, args).run_decompositions().graph_module, or is compiled: "
            "torch.compile(module, backend='tpfuse')"
        )
    options = options or PassOptions()
    started = time.perf_counter()
    module = graph if isinstance(graph, GraphModule) else None
    g = graph.graph if isinstance(graph, GraphModule) else graph
    try:
        sites, audits = _rewrite(g, options, training)
        if module is not None and any(s.replaced_by for s in sites):
            module.recompile()
    except VerificationError:
        raise
    except Exception as error:
        if options.verify:
            raise
        sites, audits = kept(g, error), []
    initialized = dist.is_available() and dist.is_initialized()
    inside = [] if module is None else collectives.graphs_inside(module)
    notes = noted(g, handmade.notes)
    if inside:
        names = ", ".join(name for name, _ in inside)
        notes.append(f"{INSIDE}, each with a report of its own: {names}")
    return GraphReport(
        graph_id=next_graph_id(),
        rank=dist.get_rank() if initialized else 0,
        world_size=dist.get_world_size() if initialized else 1,
        sites=sites,
        layers=audits,
        policy=options.policy,
        numerics=options.numerics,
        inner=inner,
        seconds=time.perf_counter() - started,
        notes=notes,
    )


def _rewrite(g: Graph, options: PassOptions, training: bool) -> tuple[list[Site], list[LayerAudit]]:
    """Find, judge and build everything; only then edit. An exception leaves the graph as it was."""
    found = collectives.find(g)
    legality = Legality(g, found)
    sums = second_sum.by_node(found)
    looked = settle([guarded(c, options, partial(_look, legality, options, sums)) for c in found]) if found else []
    looked = merge(looked, sums, legality, options)
    built: dict[Node, Replacement] = {}
    for position, item in enumerate(looked):
        if isinstance(item.outcome, Candidate):
            looked[position], replacement = _build(item, options)
            if replacement is not None:
                built[item.outcome.norm.out] = replacement
    places = sharing.order_layers([_place(item, legality) for item in looked])
    receivers = _receivers(looked)
    audits = sharing.audit(found, places, receivers)
    judged = judge(looked, places, audits, sharing.refuted(found, places, receivers), options, training)
    absorbed = {f.outcome.merged.collective: f for f in judged if isinstance(f.outcome, Candidate) and f.outcome.merged}
    sites = [site_of(f, p, audits, absorbed.get(f.collective)) for f, p in zip(judged, places, strict=True)]

    decisions: list[rewrite.Decision] = []
    for item, site in zip(judged, list(sites), strict=True):
        if isinstance(item.outcome, Candidate):
            point = legality.insertion_point(item.outcome)
            assert point is not None  # judged legal
            decision = rewrite.Decision(built[item.outcome.norm.out], point)
            if options.verify:
                _verify(decision, site)
            if lowering.is_lowered(item.outcome, options):
                both = item.collective, item.outcome.merged and item.outcome.merged.collective
                sites = [replace(s, lowered=True) if c in both else s for s, c in zip(sites, found, strict=True)]
            else:
                decisions.append(decision)
    try:
        fused = rewrite.apply(g, decisions)
    except Exception as error:
        if options.verify:
            raise
        refusal = internal(error)
        kept = [Found(f.collective, refusal, f.pattern) if s.fused else f for f, s in zip(judged, sites, strict=True)]
        return [site_of(f, p, audits) for f, p in zip(kept, places, strict=True)], audits
    names: dict[collectives.Collective, str] = {}
    for decision, node in zip(decisions, fused, strict=True):
        candidate = decision.candidate
        names[candidate.collective] = node.name
        if candidate.merged is not None:
            names[candidate.merged.collective] = node.name
    return [replace(s, replaced_by=names.get(f.collective)) for s, f in zip(sites, judged, strict=True)], audits


def _place(item: Found, legality: Legality) -> sharing.Place:
    """Where a reduction stands. Numbers that ranks add up for a norm are not the sum of an attention or an MLP."""
    spot = sharing.place(item.collective, legality.order)
    statistics = isinstance(item.outcome, Refusal) and item.outcome.reason is Reason.NORM_STATISTICS
    return replace(spot, role="other") if statistics else spot


def _receivers(looked: list[Found]) -> dict[collectives.Collective, tuple[int, ...]]:
    """Of all-reduces of which a rank keeps a proved block: who keeps it."""
    blocks = ((f.collective, f.outcome.block) for f in looked if isinstance(f.outcome, Candidate))
    return {c: block.receivers for c, block in blocks if block is not None and block.nodes}


def _look(
    legality: Legality, options: PassOptions, sums: dict[Node, collectives.Collective], c: collectives.Collective
) -> Found:
    """One reduction: can it be fused at all, what follows it, may that be rewritten?"""
    refusal = reduction(c)
    if refusal is not None:
        return Found(c, refusal, c.kind)
    found = region.follow(c, legality.order, options.numerics == "relaxed")
    if isinstance(found.outcome, Candidate):
        refusal = second_sum.lonely(found.outcome, sums) or legality.refusal(found.outcome)
        if refusal is None:
            return replace(found, outcome=_quantized(_gathered(found.outcome, legality, options), legality, options))
    else:
        refusal = square_sums.refusal(c)
    return found if refusal is None else Found(c, refusal, found.pattern)


def _gathered(candidate: Candidate, legality: Legality, options: PassOptions) -> Candidate:
    """The candidate with the gather of its norm, where there is one that the fused op can do."""
    try:
        found, note = gathers.find(candidate, legality.order, legality.reductions)
        more = replace(candidate, gather=found, note=note)
        refusal = None if found is None else legality.refusal(more)
        return more if refusal is None else _ungathered(candidate, refusal)
    except Exception as error:
        if options.verify:
            raise
        return _ungathered(candidate, internal(error))


def _ungathered(candidate: Candidate, refusal: Refusal) -> Candidate:
    note = f"the gather behind the norm stays outside: {refusal.detail} ({refusal.reason})"
    return replace(candidate, gather=None, note=note)


def _quantized(candidate: Candidate, legality: Legality, options: PassOptions) -> Candidate:
    """The candidate with the quantization of its norm, where there is one that the fused op can do."""
    if not legality.quantizes or candidate.gather is not None:
        return candidate
    try:
        found, note = quantization.find(candidate.norm.out, legality.order, options.numerics == "relaxed")
        if found is None:
            return replace(candidate, note=note or candidate.note)
        if candidate.norm.kind == "layer_norm":
            return replace(candidate, note="the norm is quantized, but it is a LayerNorm")
        if candidate.post_add is not None:
            return replace(candidate, note="the norm is quantized, but the residual is added to it as well")
        if candidate.block is not None:
            return replace(candidate, note="the norm is quantized, but each rank keeps some rows of the sum only")
        if candidate.narrowed:
            return replace(
                candidate, note=f"the norm is quantized, but the sum is fp32 and rounded to {candidate.dtype}"
            )
        start = region.before_the_sum(candidate) if options.numerics == "relaxed" else None
        start = start or candidate
        if start.scale_tensor is not None or start.scale_first:
            return replace(
                candidate, note="the norm is quantized, but the sum is multiplied by a tensor, or before an addend"
            )
        more = replace(start, quantization=found, note=note)
        refusal = legality.refusal(more)
        return more if refusal is None else _unquantized(candidate, refusal)
    except Exception as error:
        if options.verify:
            raise
        return _unquantized(candidate, internal(error))


def _unquantized(candidate: Candidate, refusal: Refusal) -> Candidate:
    note = f"the quantization behind the norm stays outside: {refusal.detail} ({refusal.reason})"
    return replace(candidate, quantization=None, note=note)


def _build(item: Found, options: PassOptions) -> tuple[Found, Replacement | None]:
    assert isinstance(item.outcome, Candidate)
    try:
        built = build(item.outcome)
    except Exception as error:
        if options.verify:
            raise
        built = internal(error)
    if isinstance(built, Refusal):
        if item.outcome.quantization is not None:
            return _build(replace(item, outcome=_unquantized(item.outcome, built)), options)
        if item.outcome.gather is not None:
            return _build(replace(item, outcome=_ungathered(item.outcome, built)), options)
        return Found(item.collective, built, item.pattern), None
    return item, built


def _verify(decision: rewrite.Decision, site: Site) -> None:
    difference = rewrite.verify(decision)
    if difference is not None:
        raise VerificationError(
            f"tpfuse.verify: the rewrite of {site.nodes[0]} ({site.source or 'unknown source'}) is wrong: "
            f"{difference}. This is a bug in tpfuse; compile with options={{'tpfuse.policy': 'off'}} meanwhile."
        )
