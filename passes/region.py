"""Find: follow a reduced sum over bias, scale and residual to its norm.

The walk ends in a :class:`~tpfuse.passes.candidate.Candidate`, which names every operand of the fused op, or in a
:class:`~tpfuse.passes.reasons.Refusal` that says what stands in the way. The graph is only read; whether a candidate may be
rewritten is for :mod:`~tpfuse.passes.legality` to say.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from . import dead_ends, literals, narrowed, norms, rows, values, widened
from .candidate import Candidate, Found, Start, Term
from .collectives import Collective
from .norms import NormForm
from .reasons import Reason, Refusal
from .terms import factor_of, own_of_a_rank, rounded_term, term_of, wide_term
from .values import ADD
from .widened import WideAdd

MAX_TERMS = 4


def follow(c: Collective, order: dict[Node, int], relaxed: bool = False) -> Found:
    """Follow one sum to its norm. Never raises on a strange graph: what is not understood is refused.

    Args:
        order: node positions.
        relaxed: accept a norm whose rounding the fused op does not repeat, and a scale that is a tensor.
    """
    terms: list[Term] = []
    block = rows.scattered(c)  # None for an all-reduce
    current = values.aliases(c.value, order, also=c.waits)
    if block is None:
        kept = rows.kept(c, current, order)
        if isinstance(kept, Refusal):
            return Found(c, kept, c.kind)
        if kept is not None:
            block, current = kept
    flat = dead_ends.flattened(current)
    if flat is not None:
        return Found(c, flat, c.kind)
    rounded = narrowed.find(current)
    if rounded:
        current = values.aliases(rounded[-1], order)
    start = Start(c, block, rounded)
    while True:
        wide = widened.find(current, order)
        if isinstance(wide, WideAdd) and wide.readers:
            found = _unrounded(start, terms, wide, values.dtype(current.root), order, relaxed)
            return Found(c, _of_block(found, block), start.pattern(terms, "add+norm?"))
        term = wide if isinstance(wide, Refusal) else term_of(current) if wide is None else rounded_term(wide)
        # A scalar of the rows that a rank keeps is another one on each rank: not to be multiplied in before the sum.
        if relaxed and not terms and block is None and not rounded:
            term = factor_of(c, current, term)
        # A scaled sum is normalized after the scale: s and 2 * s have one norm, up to eps and rounding.
        scaled = isinstance(term, Term) and term.kind in ("scale", "factor")
        norm = None if scaled else norms.match(current, order, relaxed)
        if isinstance(norm, NormForm):
            found = _candidate(start, terms, current, norm, order)
            return Found(c, _of_block(found, block), start.pattern(terms, norm.kind))
        if isinstance(norm, Refusal) and term is None:
            return Found(c, norm, start.pattern(terms, "norm?"))
        pattern = start.pattern(terms, None)
        refusal = dead_ends.several_readers(current, terms)
        if refusal is not None:
            return Found(c, refusal, pattern)
        if isinstance(term, Refusal):
            return Found(c, term, pattern)
        if term is None or len(terms) == MAX_TERMS:
            return Found(c, dead_ends.no_norm(current, terms), pattern)
        if wide is None:
            name = next(a for a in term.node.all_input_nodes if a in current)
            term = replace(term, path=tuple(current.path(name)))
        terms.append(term)
        current = values.aliases(term.node, order)


def _of_block(found: Candidate | Refusal, block: rows.RowBlock | None) -> Candidate | Refusal:
    if not isinstance(found, Candidate) or block is None:
        return found
    if found.residual is not None and values.dtype(found.residual) != values.dtype(found.collective.value):
        return Refusal(
            Reason.DTYPE,
            f"the rows that a rank keeps are added to {found.residual.name}, {values.dtype(found.residual)}; the op for them "
            "takes a residual of the sum's dtype",
        )
    if found.scale_tensor is not None:
        return Refusal(
            Reason.SCALE_NOT_CONSTANT,
            f"the rows that a rank keeps are multiplied by {found.scale_tensor.name}, a tensor; the op for them takes a number",
        )
    if found.scale_first:
        return Refusal(
            Reason.ADD_CHAIN,
            "the rows that a rank keeps are scaled before something is added to them; the fused op for such rows adds first",
        )
    return replace(found, block=block)


def before_the_sum(candidate: Candidate) -> Candidate | None:
    """The candidate with its scalar tensor multiplied in before the reduction (:func:`.factor_of`); None where something is
    added first, or the scalar may be another one on each rank. Relaxed."""
    scale, *others = candidate.terms or (None,)
    scalar = candidate.scale_tensor
    if scale is None or scalar is None or scale.operand is not scalar or candidate.block:
        return None
    if not literals.is_scalar(scalar) or own_of_a_rank(scalar, candidate.collective.ranks) is not None:
        return None
    terms = (replace(scale, kind="factor"), *others)
    return replace(candidate, terms=terms, factor=scalar, scale_tensor=None, scale_first=False)


def _unrounded(
    start: Start, terms: list[Term], wide: WideAdd, dtype: torch.dtype | None, order: dict[Node, int], relaxed: bool
) -> Candidate | Refusal:
    """A norm that reads the residual sum before it is rounded. ``dtype``: of the sum."""
    term = wide_term(wide)
    if isinstance(term, Refusal):
        return term
    norm = norms.match(wide.result, order, relaxed, dtype)
    readers = ", ".join(r.name for r in wide.readers)
    if norm is None and wide.stays:
        return Refusal(
            Reason.DTYPE,
            f"the sum is {dtype}, what is added to it, {wide.other.name}, is torch.float32 and was never {dtype}; no norm reads "
            f"what {wide.node.name} makes of them",
        )
    if norm is None:
        return Refusal(
            Reason.DTYPE,
            f"{wide.node.name} adds to the sum in fp32, and is read by {readers} before it is rounded to {dtype}",
        )
    if isinstance(norm, Refusal):
        return norm
    if term.kind != "full":
        return Refusal(
            Reason.UNKNOWN_FLAVOUR,
            f"the norm reads {wide.node.name}, which adds a vector to the sum in fp32, unrounded",
        )
    if wide.stays:
        return _candidate(start, [*terms, term], wide.result, norm, order)
    inside = {*norm.steps, norm.out}
    kept = [n for n in norm.steps if any(user not in inside and not values.is_dead(user) for user in n.users)]
    outside = [r for r in wide.readers if r not in inside] + kept
    if outside and wide.unrounded().stays:  # something else needs the fp32 value: it is the residual to come
        return _unrounded(start, terms, wide.unrounded(), dtype, order, relaxed)
    if outside:
        return Refusal(
            Reason.EXTRA_READER,
            f"{outside[0].name} needs the residual sum before it is rounded, besides the norm; the fused op gives it rounded, "
            f"unless what is added, {wide.given.name}, is cast to fp32 before",
        )
    found = _candidate(start, [*terms, term], wide.result, norm, order)
    return found if isinstance(found, Refusal) else replace(found, rounded=wide.rounded)


def _candidate(
    start: Start, terms: list[Term], h: values.Aliases, norm: NormForm, order: dict[Node, int]
) -> Candidate | Refusal:
    c = start.collective
    factor = terms[0].operand if terms and terms[0].kind == "factor" else None
    kinds = [t.kind for t in terms if t.kind != "factor"]
    residual = terms[-1].operand if kinds and kinds[-1] == "full" else None
    before = terms[:-1] if residual is not None else terms
    before_kinds = kinds[:-1] if residual is not None else kinds
    addends = [kind for kind in before_kinds if kind != "scale"]
    two = before_kinds[:2] == ["bias", "full"]  # for an RMSNorm second_sum.lonely asks what the second is
    if len(addends) > 1 + two or len(before_kinds) - len(addends) > 1:
        return dead_ends.add_chain(kinds)
    bias = next((t.operand for t in before if t.kind in ("bias", "full")), None)
    addend = next(t.operand for t in before if t.kind == "full") if two else None
    scale = next((t for t in before if t.kind == "scale"), None)
    scale_first = len(before_kinds) > 1 and before_kinds[0] == "scale"
    tensor, number = (None, 1.0) if scale is None else (scale.operand, scale.factor)
    if norm.kind == "layer_norm" and tensor is not None:
        return Refusal(
            Reason.SCALE_NOT_CONSTANT,
            f"the sum is multiplied by {tensor.name}, a tensor; the op for LayerNorm takes a number",
        )
    if norm.kind == "layer_norm" and scale_first:
        return Refusal(
            Reason.ADD_CHAIN,
            "the sum is scaled before something is added to it; the fused op for LayerNorm adds first",
            tuple(kinds),
        )
    operands = [n for n in (bias, addend, residual, factor, tensor) if n is not None]
    for operand in operands:
        if values.depends_on(operand, c.node, order):
            return Refusal(Reason.RESIDUAL_DERIVED, f"{operand.name} is computed from the sum itself")
    candidate = Candidate(
        *(c, tuple(terms), bias, number, residual, h, norm),
        factor=factor,
        scale_tensor=tensor,
        scale_first=scale_first,
        addend=addend,
        narrowed=start.narrowed,
    )
    # An add behind a LayerNorm stays outside: no model that we know adds its residual there.
    if residual is None and norm.kind != "layer_norm":
        candidate = post(candidate, order)
    return narrowed.refusal(start.narrowed, candidate.residual, start.block is not None) or candidate


def post(candidate: Candidate, order: dict[Node, int]) -> Candidate:
    """Extend ``norm -> add`` (Gemma2, OLMo2) when the sum itself has no reader but the norm."""
    region = set(candidate.norm.steps) | {candidate.norm.out}
    if any(reader not in region for reader in candidate.h.readers):
        return candidate
    out = values.aliases(candidate.norm.out, order)
    for reader in out.readers:
        if reader.target not in ADD or reader.kwargs.get("alpha", 1) != 1:
            continue
        mine = [a for a in reader.all_input_nodes if a in out]
        others = [a for a in reader.all_input_nodes if a not in out]
        if len(mine) != 1 or len(others) != 1 or len(reader.all_input_nodes) != 2:
            continue
        other = others[0]
        fits = (
            values.dtype(other) == values.dtype(candidate.h.root) == values.dtype(reader)
            and values.same_rows(other, mine[0])
            and values.same_rows(mine[0], candidate.norm.out)
            and values.same_rows(reader, mine[0])
        )
        first_use = min(order[r] for r in out.readers)
        if fits and order[other] < first_use and not values.depends_on(other, candidate.collective.node, order):
            return replace(candidate, residual=other, post_add=reader, post_path=tuple(out.path(mine[0])))
    return candidate
