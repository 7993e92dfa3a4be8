"""Find: two sums over the same ranks that are added to each other, which one reduction can make.

``AR(a) + AR(b)`` is ``AR(a + b)``, and ``AR(a) * g + AR(b)`` is ``AR(a * g + b)`` where ``g`` is the same on all of the ranks.
The bits differ, for a rank now rounds its own sum first: only with relaxed numerics. MoE layers with shared experts have such
sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch.fx import Node

from . import collectives, storages, values
from .candidate import Candidate, Found, Merged
from .collectives import Collective
from .failure import internal
from .legality import ADD, MUL, Legality
from .options import PassOptions
from .reasons import Reason, Refusal
from .replacement import build

GATHERED = frozenset({"all_reduce", "all_reduce_", "all_gather_into_tensor", "broadcast"})
POINTWISE = values.RESHAPES | values.IDENTITIES | values.CASTS | ADD | MUL
POINTWISE |= values.overloads(
    "sigmoid.default", "silu.default", "tanh.default", "exp.default", "neg.default", "reciprocal.default", "div.Tensor",
    "sub.Tensor", "mm.default", "bmm.default", "sum.dim_IntList", "mean.dim", "amax.default", "_softmax.default",
)  # fmt: skip
DEPTH = 64


@dataclass(frozen=True)
class _Addend:
    """The way from a sum to what is added: ``nodes`` in order behind the sum, one of which may multiply by ``factor``."""

    other: Collective
    nodes: tuple[Node, ...]
    factor: Node | float | None


def merge(found: Sequence[Found], legality: Legality, options: PassOptions) -> list[Found]:
    """Candidates that take another sum as their addend, with that sum made by their own reduction where that is right.

    An exception costs one merge only; with ``options.verify`` it is raised.
    """
    sums = {name: f.collective for f in found for name in (f.collective.value, *f.collective.waits)}
    claimed = {f.collective for f in found if isinstance(f.outcome, Candidate)}
    merged = list(found)
    for position, item in enumerate(found):
        if not isinstance(item.outcome, Candidate) or item.outcome.bias is None or item.outcome.factor is not None:
            continue
        addend = _addend(item.outcome.bias, sums)
        if addend is None or addend.other in claimed:
            continue
        try:
            outcome = _together(item.outcome, addend, legality)
        except Exception as error:
            if options.verify:
                raise
            outcome = internal(error).detail
        if isinstance(outcome, Candidate):
            merged[position] = Found(item.collective, outcome, outcome.pattern)
            continue
        theirs = next(n for n, f in enumerate(found) if f.collective is addend.other)
        detail = f"its sum is added to that of {item.collective.node.name}, and they stay two reductions: {outcome}"
        merged[theirs] = Found(addend.other, Refusal(Reason.SUM_OF_REDUCTIONS, detail), found[theirs].pattern)
    return merged


def _together(candidate: Candidate, addend: _Addend, legality: Legality) -> Candidate | str:
    """The candidate with both sums in one reduction, or why they must stay two."""
    why = _why_not(candidate, addend)
    if why is not None:
        return why
    together = replace(candidate, bias=None, merged=Merged(addend.other, addend.nodes, addend.factor))
    refusal = legality.refusal(together) or build(together)
    return refusal.detail if isinstance(refusal, Refusal) else together


def _addend(node: Node, sums: dict[Node, Collective]) -> _Addend | None:
    """The sum behind an addend, or None when it is something else."""
    path: list[Node] = []
    factor: Node | float | None = None
    while node not in sums:
        source = next((a for a in node.all_input_nodes if values.is_alias(node, a)), None)
        if source is None and node.target in MUL and factor is None:
            source, factor = _scaled(node, sums)
        if source is None:
            return None
        path.append(node)
        node = source
    return _Addend(sums[node], tuple(reversed(path)), factor)


def _scaled(node: Node, sums: dict[Node, Collective]) -> tuple[Node | None, Node | float | None]:
    """(the sum, the factor) of a product of a sum and a number or a value a row."""
    for mine, factor in (node.args[:2], tuple(reversed(node.args[:2]))):
        if not isinstance(mine, Node) or not values.same_rows(node, mine) or values.dtype(node) != values.dtype(mine):
            continue
        source: Node | None = mine
        while source is not None and source not in sums:
            source = next((a for a in source.all_input_nodes if values.is_alias(source, a)), None)
        if source is None:
            continue
        if isinstance(factor, int | float):
            return mine, float(factor)
        if isinstance(factor, Node) and values.width(factor) == 1 and values.width(mine) != 1:
            return mine, factor
    return None, None


def _why_not(candidate: Candidate, addend: _Addend) -> str | None:
    """Why two sums must stay two reductions; None when one is right."""
    c, other = candidate.collective, addend.other
    if candidate.scale_first:
        return f"the sum of {c.node.name} alone is scaled"
    if other.ranks != c.ranks or other.kind != c.kind or other.reduce_op != c.reduce_op or other.error:
        return f"{other.node.name} is a {other.kind} over {list(other.ranks)}, {c.node.name} a {c.kind} over {list(c.ranks)}"
    if candidate.block is not None and candidate.block.nodes:
        return "each rank keeps some rows of them"
    if other.index is not None or storages.mutates(other.node):
        return f"{other.node.name} writes in place or is one of several in one call"
    if values.dtype(other.x) != values.dtype(c.x) or not values.same_rows(other.x, c.x):
        return "their partial sums differ in shape or dtype"
    inside = {other.node, *other.waits, *addend.nodes, candidate.terms[0].node}
    for node in (other.node, *other.waits, *addend.nodes):
        reader = next((u for u in node.users if u not in inside and not values.is_dead(u)), None)
        if reader is not None:
            return f"{reader.name} reads {node.name} too"
    if isinstance(addend.factor, Node):
        unproved = unequal(addend.factor, c.ranks)
        if unproved is not None:
            return f"the factor {addend.factor.name} {unproved}, so it may differ between the ranks {list(c.ranks)}"
    return None


def unequal(node: Node, ranks: tuple[int, ...]) -> str | None:
    """What a value depends on that may differ between ``ranks``; None where it is proved to be equal on all of them.

    Equal are results of reductions and gathers over at least these ranks, and what is computed from them alone. A number that
    was written into the graph may come from the rank, so products and sums with one prove nothing; neither does an input of the
    graph, which may be one rank's part of a weight.
    """
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current.op == "call_function" and current.target is collectives.WAIT:
            start = current.args[0]
            assert isinstance(start, Node)
            name = getattr(getattr(start.target, "overloadpacket", None), "__name__", "")
            names = [a for a in (*start.args, *start.kwargs.values()) if isinstance(a, str)]
            members = collectives.group_ranks(names[-1])[0] if names else ()
            if name in GATHERED and set(ranks) <= set(members) and dist.get_rank() in members:
                continue
            return f"depends on {start.name} over {list(members)}"
        numbers = [a for a in (*current.args, *current.kwargs.values()) if isinstance(a, int | float)]
        computes = current.target in ADD | MUL or current.target in values.overloads("div.Tensor", "sub.Tensor")
        if current.op != "call_function" or current.target not in POINTWISE or (computes and numbers):
            return f"depends on {current.name}"
        sources = [a for a in current.all_input_nodes if a not in seen]
        seen.update(sources)
        stack.extend(sources)
        if len(seen) > DEPTH:
            return f"depends on more than {DEPTH} values"
    return None
