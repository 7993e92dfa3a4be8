"""Find: follow a reduced sum over bias, scale and residual to its norm.

The walk ends in a :class:`~tpfuse.passes.candidate.Candidate`, which names every operand of the fused op, or in a
:class:`~tpfuse.passes.reasons.Refusal` that says what stands in the way. The graph is only read; whether a candidate may be
rewritten is for :mod:`~tpfuse.passes.legality` to say.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from . import legality, norms, values
from .candidate import Candidate, Found, Term, pattern_of
from .collectives import Collective
from .legality import ADD, MUL
from .norms import NormForm
from .reasons import Reason, Refusal

MAX_TERMS = 4


def follow(c: Collective, order: dict[Node, int], relaxed: bool = False) -> Found:
    """Follow one sum to its norm. Never raises on a strange graph: what is not understood is refused.

    Args:
        order: node positions.
        relaxed: accept a norm whose rounding the fused op does not repeat.
    """
    terms: list[Term] = []
    pattern = "all_reduce"
    current = values.aliases(c.value, order, also=c.waits)
    while True:
        term = _term(current)
        # A scaled sum is normalised after the scale: s and 2 * s have one norm, up to eps and rounding.
        scaled = isinstance(term, Term) and term.kind == "scale"
        norm = None if scaled else norms.match(current, order, relaxed)
        if isinstance(norm, NormForm):
            return Found(c, _candidate(c, terms, current, norm, order), pattern_of(terms, "rms_norm"))
        if isinstance(norm, Refusal) and term is None:
            return Found(c, norm, pattern_of(terms, "norm?"))
        pattern = pattern_of(terms, None)
        refusal = legality.several_readers(current, terms)
        if refusal is not None:
            return Found(c, refusal, pattern)
        if isinstance(term, Refusal):
            return Found(c, term, pattern)
        if term is None or len(terms) == MAX_TERMS:
            return Found(c, legality.no_norm(current, terms), pattern)
        name = next(a for a in term.node.all_input_nodes if a in current)
        terms.append(replace(term, path=tuple(current.path(name))))
        current = values.aliases(term.node, order)


def _term(current: values.Aliases) -> Term | Refusal | None:
    """The one reader as a step towards the norm."""
    if len(current.readers) != 1:
        return None
    reader = current.readers[0]
    if reader.target in MUL:
        factor = next((a for a in reader.args if isinstance(a, int | float)), None)
        return None if factor is None else Term("scale", reader, None, float(factor))
    if reader.target not in ADD:
        return None
    if reader.kwargs.get("alpha", 1) != 1:
        return Refusal(Reason.UNKNOWN_FLAVOUR, f"{reader.name} adds with alpha={reader.kwargs['alpha']}")
    operands = [a for a in reader.args if isinstance(a, Node)]
    mine = [a for a in operands if a in current]
    other = next((a for a in operands if a not in current), None)
    if other is None:
        return Refusal(Reason.RESIDUAL_DERIVED, f"{reader.name} adds the sum to itself") if mine else None
    hidden = values.width(current.root)
    if values.dtype(other) != values.dtype(current.root):
        return Refusal(Reason.DTYPE, f"the sum is {values.dtype(current.root)}, {other.name} is {values.dtype(other)}")
    rows = values.same_rows(other, mine[0])
    if isinstance(hidden, int) and values.is_vector(other, hidden) and values.same_rows(reader, mine[0]):
        # A tensor of one row is a residual where the sum has one row too, unless its shape says vector.
        tensor = values.value(other)
        if not rows or (tensor is not None and tensor.dim() == 1 and not values.same_shape(other, mine[0])):
            return Term("bias", reader, other)
    if not rows or not values.same_rows(reader, mine[0]):
        shapes = f"{legality.shape_of(other)} to {legality.shape_of(mine[0])}"
        return Refusal(Reason.RESIDUAL_SHAPE, f"{reader.name} adds {other.name}: {shapes}")
    return Term("full", reader, other)


def _candidate(
    c: Collective, terms: list[Term], h: values.Aliases, norm: NormForm, order: dict[Node, int]
) -> Candidate | Refusal:
    kinds = [t.kind for t in terms]
    residual = terms[-1].operand if terms and kinds[-1] == "full" else None
    before = terms[:-1] if residual is not None else terms
    before_kinds = [t.kind for t in before]
    if before_kinds not in ([], ["bias"], ["full"], ["scale"], ["bias", "scale"], ["full", "scale"]):
        return Refusal(
            Reason.ADD_CHAIN,
            f"the sum goes through {' then '.join(kinds)} before the norm; the fused op takes at most one addend, "
            "then one scale, then one residual",
            tuple(kinds),
        )
    bias = next((t.operand for t in before if t.operand is not None), None)
    scale = next((t.factor for t in before if t.kind == "scale"), 1.0)
    operands = [n for n in (bias, residual) if n is not None]
    for operand in operands:
        if values.depends_on(operand, c.node, order):
            return Refusal(Reason.RESIDUAL_DERIVED, f"{operand.name} is computed from the sum itself")
    candidate = Candidate(c, tuple(terms), bias, scale, residual, h, norm)
    return candidate if residual is not None else _post(candidate, order)


def _post(candidate: Candidate, order: dict[Node, int]) -> Candidate:
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
