"""Judge: two sums over the same ranks that meet in one norm, which one op can make.

The op reduces both, each rounded as by itself, and adds them in the model's order: the model's bits in one launch.

With relaxed numerics one reduction is enough: ``AR(a) + AR(b)`` is ``AR(a + b)``, and ``AR(a) * g + AR(b)`` is
``AR(a * g + b)`` where ``g`` is the same on all of the ranks. The bits differ, for a rank now rounds its own sum first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch.fx import Node

from tpfuse import compat

from . import equal_values, storages, values
from .candidate import Candidate, Found
from .collectives import Collective
from .failure import internal
from .fused_call import build
from .legality import Legality
from .options import PassOptions
from .reasons import Reason, Refusal
from .second_sum import lonely, meetings


def merge(
    found: Sequence[Found], sums: Mapping[Node, Collective], legality: Legality, options: PassOptions
) -> list[Found]:
    """Candidates with another sum made by their own op where that is right, and refusals of those that need that.

    An exception costs one merge only; with ``options.verify`` it is raised.
    """
    claimed = {f.collective for f in found if isinstance(f.outcome, Candidate)}
    merged = list(found)
    for position, item in enumerate(found):
        for together in _meetings(item.outcome, sums, legality, options):
            assert together.merged is not None
            other = together.merged.collective
            if other in claimed:
                continue
            made = _made(together, legality, options)
            if isinstance(made, Candidate):
                merged[position] = Found(item.collective, made, made.pattern)
                break
            theirs = next(n for n, f in enumerate(found) if f.collective is other)
            first = found[theirs].outcome
            explained = isinstance(first, Refusal) and first.reason in (Reason.SUM_OF_REDUCTIONS, Reason.ORDER)
            if together.merged.order == "together" or explained:
                detail = (
                    f"its sum is added to that of {item.collective.node.name}, and they stay two reductions: {made}"
                )
                merged[theirs] = Found(other, Refusal(Reason.SUM_OF_REDUCTIONS, detail), found[theirs].pattern)
    for position, item in enumerate(merged):
        refusal = lonely(item.outcome, {}) if isinstance(item.outcome, Candidate) else None
        if refusal is not None:
            merged[position] = Found(item.collective, refusal, item.pattern)
    return merged


def _meetings(
    outcome: Candidate | Refusal, sums: Mapping[Node, Collective], legality: Legality, options: PassOptions
) -> list[Candidate]:
    try:
        return list(meetings(outcome, sums, legality.order)) if isinstance(outcome, Candidate) else []
    except Exception as error:
        if options.verify:
            raise
        internal(error)  # warns
        return []


def _made(together: Candidate, legality: Legality, options: PassOptions) -> Candidate | str:
    """The candidate with both sums in its op, or why they stay two.

    With relaxed numerics one reduction makes both where that is right, for it moves half of the bytes.
    """
    assert together.merged is not None
    exact = replace(together, merged=replace(together.merged, exact=True))
    ways = [(exact, _why_not_exact)]
    if options.numerics == "relaxed":
        ways.insert(0, (together, _why_not_one_reduction))
    whys = []
    try:
        for candidate, why_not in ways:
            why = _why_not(candidate) or why_not(candidate) or _illegal(candidate, legality)
            if why is None:
                return candidate
            whys.append(why)
    except Exception as error:
        if options.verify:
            raise
        whys.append(internal(error).detail)
    return "; ".join(dict.fromkeys(whys))


def _illegal(together: Candidate, legality: Legality) -> str | None:
    """What legality, or the fused op, has against both sums in one reduction."""
    refusal = legality.refusal(together) or build(together)
    return refusal.detail if isinstance(refusal, Refusal) else None


def _why_not(together: Candidate) -> str | None:
    """Why two sums must stay two reductions; None when one is right."""
    c, merged = together.collective, together.merged
    assert merged is not None
    other = merged.collective
    if other.ranks != c.ranks or other.kind != c.kind or other.reduce_op != c.reduce_op or other.error:
        return f"{other.node.name} is a {other.kind} over {list(other.ranks)}, {c.node.name} a {c.kind} over {list(c.ranks)}"
    if together.block is not None and together.block.nodes:
        return "each rank keeps some rows of them"
    casts = [n for n in merged.nodes if n.target in values.CASTS]
    rounded = [s.node.name for s, nodes in ((c, together.narrowed), (other, casts)) if nodes]
    if rounded:
        names = " and ".join(rounded)
        return f"the op makes a sum alone that is taken in fp32 and rounded before anything is added, as of {names}"
    if other.index is not None or storages.mutates(other.node):
        return f"{other.node.name} writes in place or is one of several in one call"
    # Experts see rows without their batch dimension; what leads to the norm brings both into one shape, or build() refuses.
    rows = together.block is None or values.same_rows(other.x, c.x)
    if values.dtype(other.x) != values.dtype(c.x) or not rows:
        return "their partial sums differ in shape or dtype"
    term = next(t for t in together.terms if t.operand is merged.operand)
    inside = {other.node, *other.waits, *merged.nodes, term.node, *term.path, *term.casts}
    for node in (other.node, *other.waits, *merged.nodes, *term.casts):
        reader = next((u for u in node.users if u not in inside and not values.is_dead(u)), None)
        if reader is not None:
            return f"{reader.name} reads {node.name} too"
    return None


def _why_not_one_reduction(together: Candidate) -> str | None:
    """Why the partial sums must not be added before one reduction."""
    c, merged = together.collective, together.merged
    assert merged is not None
    if together.scale_first:
        return f"the sum of {c.node.name} alone is scaled"
    if isinstance(merged.factor, Node):
        unproved = equal_values.unequal(merged.factor, c.ranks)
        if unproved is not None:
            return f"the factor {merged.factor.name} {unproved}, so it may differ between the ranks {list(c.ranks)}"
    return None


def _why_not_exact(together: Candidate) -> str | None:
    """Why the op cannot make both sums, each for itself, with the model's bits."""
    merged = together.merged
    assert merged is not None
    layer_norm = together.norm.kind == "layer_norm"
    vectors = together.bias is not None or merged.bias is not None
    scaled = together.scale != 1.0 or together.scale_tensor is not None
    if together.block is not None:
        return "the op for rows that a rank keeps makes one sum"
    if together.quantization is not None:
        return "the norm is quantized, and the op that does that makes one sum"
    if together.gather is not None:
        return "the norm is gathered, and the op that does that makes one sum"
    if vectors and not layer_norm:
        return "a vector is added to one of them, and beside two sums the op for RMSNorm takes none"
    if merged.factor is None:
        return None
    if layer_norm or scaled or vectors or merged.order != "together":
        return f"it alone is multiplied by {merged.factor}, and more follows"
    if isinstance(merged.factor, Node) and not _one_a_row(merged.factor, together):
        return f"it is multiplied by {merged.factor.name}, which has one value for several rows"
    return None


def _one_a_row(factor: Node, together: Candidate) -> bool:
    """Whether a factor provably has as many values as the sum has rows: then it has one for each, in their order."""
    have, whole = values.value(factor), values.value(together.h.root)
    if have is None or whole is None:
        return False
    return compat.statically_true(math.prod(have.shape) == math.prod(whole.shape[:-1]))
