"""Follow each reduced sum to its norm and judge whether the region may be rewritten.

The walk goes from the all-reduce over bias, scale and residual to the norm. It ends in a :class:`Candidate`, which names
every operand of the fused op, or in a :class:`~tpfuse.passes.reasons.Refusal`. The graph is only read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from tpfuse import compat

from . import collectives, norms, values
from .collectives import Collective
from .norms import NormForm
from .reasons import Reason, Refusal

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_TERMS = 4
ADD = values.overloads("add.Tensor")
MUL = values.overloads("mul.Tensor", "mul.Scalar")
GATHERS = frozenset({"all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast"})


@dataclass(frozen=True)
class Term:
    """One step between the sum and the norm.

    Attributes:
        kind: ``bias`` (a vector is added), ``full`` (a tensor of the sum's shape is added) or ``scale``.
        node: the node that does it.
        operand: what is added; None for a scale.
        factor: of a scale.
    """

    kind: str
    node: Node
    operand: Node | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Candidate:
    """A region that may be rewritten, with every operand of the fused op.

    Attributes:
        collective: the all-reduce.
        chain: alias nodes between the sum and its last term; their reshapes are repeated on the partial sum.
        terms: in order, at most one bias (or full addend), one scale, one residual.
        bias: vector or full addend, or None.
        scale: 1.0 when there is none.
        residual: or None.
        h: the value that is normalised, under all its names (the sum itself when there are no terms).
        norm: what was found.
        post_add: the add after the norm when the residual is added there, else None.
    """

    collective: Collective
    chain: tuple[Node, ...]
    terms: tuple[Term, ...]
    bias: Node | None
    scale: float
    residual: Node | None
    h: values.Aliases
    norm: NormForm
    post_add: Node | None = None

    @property
    def pattern(self) -> str:
        parts = ["all_reduce"]
        if self.bias is not None:
            parts.append("add" if any(t.kind == "full" and t.operand is self.bias for t in self.terms) else "bias")
        if self.scale != 1.0:
            parts.append("scale")
        if self.residual is not None and self.post_add is None:
            parts.append("add")
        parts.append("rms_norm")
        if self.post_add is not None:
            parts.append("add")
        return "+".join(parts)

    @property
    def reshapes(self) -> tuple[Node, ...]:
        """The reshapes between the residual sum's shape and the shape in which the model reads the normalised value."""
        region = [*self.norm.steps, self.norm.out]
        first = next((a for n in region for a in n.all_input_nodes if a in self.h), self.h.root)
        hidden = values.width(self.h.root)
        inner = [n for n in self.norm.steps if n.target in values.RESHAPES and values.width(n) == hidden]
        return tuple(n for n in (*self.h.path(first), *inner) if n.target in values.RESHAPES)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that the fused op replaces, the all-reduce first."""
        region = [self.collective.node, *self.collective.waits, *self.chain]
        region += [term.node for term in self.terms]
        region += [*self.norm.steps, self.norm.out]
        if self.post_add is not None:
            region.append(self.post_add)
        return tuple(dict.fromkeys(region))


@dataclass(frozen=True)
class Found:
    """One all-reduce with what the walk made of it."""

    collective: Collective
    outcome: Candidate | Refusal
    pattern: str


class Walk:
    """Looks at the all-reduces of one graph. Holds what all of them share: order, mutations, communication."""

    def __init__(self, graph: Graph, relaxed: bool = False) -> None:
        self.nodes = list(graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.relaxed = relaxed
        self.mutations = [n for n in graph.nodes if _mutates(n)]
        self.communication = [n for n in graph.nodes if collectives.is_communication(n)]

    def look(self, collective: Collective) -> Found:
        """Follow one sum. Never raises on a strange graph: what is not understood is refused."""
        refusal = self._reduction(collective)
        if refusal is not None:
            return Found(collective, refusal, "all_reduce")
        outcome, pattern = self._follow(collective)
        if isinstance(outcome, Candidate):
            refusal = self._legal(outcome)
            if refusal is not None:
                return Found(collective, refusal, pattern)
        return Found(collective, outcome, pattern)

    # -- the reduction itself

    def _reduction(self, c: Collective) -> Refusal | None:
        if c.error:
            return Refusal(Reason.UNKNOWN_GROUP, c.error)
        if c.reduce_op != "sum":
            return Refusal(Reason.REDUCE_OP, f"the reduction is {c.reduce_op!r}, expected 'sum'")
        if len(c.ranks) < 2:
            return Refusal(Reason.GROUP_SIZE, f"the group is {list(c.ranks)}")
        dtype = values.dtype(c.value)
        if dtype not in DTYPES:
            return Refusal(Reason.DTYPE, f"the sum is {dtype}, expected one of {', '.join(map(str, DTYPES))}")
        return None

    # -- from the sum to the norm

    def _follow(self, c: Collective) -> tuple[Candidate | Refusal, str]:
        terms: list[Term] = []
        chain: tuple[Node, ...] = ()
        pattern = "all_reduce"
        current = values.aliases(c.value, self.order, also=c.waits)
        while True:
            term = self._term(current)
            # A scaled sum is normalised after the scale: s and 2 * s have one norm, up to eps and rounding.
            scaled = isinstance(term, Term) and term.kind == "scale"
            norm = None if scaled else norms.match(current, self.order, self.relaxed)
            if isinstance(norm, NormForm):
                return self._candidate(c, chain, terms, current, norm), _pattern(terms, "rms_norm")
            if isinstance(norm, Refusal) and term is None:
                return norm, _pattern(terms, "norm?")
            pattern = _pattern(terms, None)
            refusal = self._stop(c, current, terms)
            if refusal is not None:
                return refusal, pattern
            if isinstance(term, Refusal):
                return term, pattern
            if term is None or len(terms) == MAX_TERMS:
                return self._no_norm(current, terms), pattern
            chain += self._chain(current, term)
            terms.append(term)
            current = values.aliases(term.node, self.order)

    @staticmethod
    def _chain(current: values.Aliases, term: Term) -> tuple[Node, ...]:
        name = next(a for a in term.node.all_input_nodes if a in current)
        return tuple(current.path(name))

    def _stop(self, c: Collective, current: values.Aliases, terms: list[Term]) -> Refusal | None:
        """A sum with several readers and no norm among them."""
        if len(current.readers) <= 1:
            return None
        adds = [r for r in current.readers if r.target in ADD or r.target in MUL]
        others = [r for r in current.readers if r not in adds[:1]]
        if terms and any(t.kind == "full" for t in terms):
            return self._no_norm(current, terms)
        if any(r.op == "output" for r in others) and adds:
            return Refusal(Reason.RETURNED, f"the sum is an output of the graph besides being read by {adds[0].name}")
        if adds:
            names = ", ".join(r.name for r in others)
            return Refusal(Reason.EXTRA_READER, f"the sum is read by {names} besides {adds[0].name}")
        return self._no_norm(current, terms)

    def _no_norm(self, current: values.Aliases, terms: list[Term]) -> Refusal:
        """Nothing more can be followed: say what stands in the way."""
        what = "residual sum" if terms else "sum"
        for reader in current.readers:
            if reader.op == "output":
                if not terms:
                    return Refusal(Reason.RETURNED, "the sum is an output of the graph")
                return Refusal(Reason.NO_NORM, f"the {what} leaves the graph before any norm reads it")
        for reader in current.readers:
            if reader.target in values.ROW_MOVERS or _gathers(reader):
                return Refusal(Reason.ROWS_MOVE, f"{reader.name} ({reader.target}) moves rows of the {what}")
        for reader in current.readers:
            if _mutates(reader):
                return Refusal(
                    Reason.MUTATION,
                    f"{reader.name} ({reader.target}) writes the {what} in place; the pass reads functional graphs, which "
                    "an exported program is after run_decompositions()",
                )
        for reader in current.readers:
            if reader.target in values.CASTS:
                return Refusal(
                    Reason.DTYPE, f"the {what} is cast from {values.dtype(current.root)} to {values.dtype(reader)}"
                )
        readers = ", ".join(f"{r.name} ({r.target})" for r in current.readers[:3]) or "nothing"
        return Refusal(Reason.NO_NORM, f"the {what} is read by {readers}; no norm follows")

    def _term(self, current: values.Aliases) -> Term | Refusal | None:
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
            return Refusal(
                Reason.DTYPE, f"the sum is {values.dtype(current.root)}, {other.name} is {values.dtype(other)}"
            )
        if isinstance(hidden, int) and values.is_vector(other, hidden) and not values.same_shape(other, mine[0]):
            return Term("bias", reader, other)
        if not values.same_shape(other, mine[0]) or not values.same_shape(reader, mine[0]):
            shapes = f"{_shape(other)} to {_shape(mine[0])}"
            return Refusal(Reason.RESIDUAL_SHAPE, f"{reader.name} adds {other.name}: {shapes}")
        return Term("full", reader, other)

    # -- from the norm to a candidate

    def _candidate(
        self, c: Collective, chain: tuple[Node, ...], terms: list[Term], h: values.Aliases, norm: NormForm
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
            if values.depends_on(operand, c.node, self.order):
                return Refusal(Reason.RESIDUAL_DERIVED, f"{operand.name} is computed from the sum itself")
        if (
            bias is not None
            and not values.is_vector(bias, values.width(h.root))
            and not values.same_shape(bias, h.root)
        ):
            return Refusal(
                Reason.RESIDUAL_SHAPE,
                f"{bias.name} is {_shape(bias)}; the sum is reshaped to {_shape(h.root)} after it is added",
            )
        candidate = Candidate(c, chain, tuple(terms), bias, scale, residual, h, norm)
        return candidate if residual is not None else self._post(candidate)

    def _post(self, candidate: Candidate) -> Candidate:
        """Extend ``norm -> add`` (Gemma2, OLMo2) when the sum itself has no reader but the norm."""
        region = set(candidate.norm.steps) | {candidate.norm.out}
        if any(reader not in region for reader in candidate.h.readers):
            return candidate
        out = values.aliases(candidate.norm.out, self.order)
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
                and values.same_shape(other, mine[0])
                and values.same_shape(mine[0], candidate.norm.out)
            )
            first_use = min(self.order[r] for r in out.readers)
            if (
                fits
                and self.order[other] < first_use
                and not values.depends_on(other, candidate.collective.node, self.order)
            ):
                return replace(candidate, residual=other, post_add=reader)
        return candidate

    # -- legality

    def insertion_point(self, candidate: Candidate) -> Node | None:
        """The node before which the fused op goes: after all operands, before all readers; None when there is none."""
        produced = {candidate.h.root, candidate.norm.out}
        if candidate.post_add is not None:
            produced.add(candidate.post_add)
        operands = [candidate.collective.x, candidate.bias, candidate.residual, candidate.norm.weight]
        ready = max((self.order[n] for n in operands if n is not None), default=-1)
        ready = max(ready, self.order[candidate.collective.node])
        if self.order[candidate.h.root] > ready:
            return candidate.h.root
        # An operand (usually the weight) is computed after the residual sum: go right behind it, before the first use.
        inside = set(candidate.nodes)
        readers = [u for node in produced for u in node.users if u not in inside]
        readers += [n for n in candidate.norm.steps if any(u not in inside for u in n.users)]  # these stay
        readers += [u for name in candidate.h.names for u in name.users if u not in inside and u not in candidate.h]
        if any(self.order[reader] <= ready for reader in readers):
            return None
        return self.nodes[ready + 1]

    def _legal(self, candidate: Candidate) -> Refusal | None:
        point = self.insertion_point(candidate)
        if point is None:
            return Refusal(Reason.ORDER, "an operand of the fused op is computed after its result is first read")
        shapes = candidate.reshapes
        if not values.same_shape(shapes[-1] if shapes else candidate.h.root, candidate.norm.out):
            return Refusal(
                Reason.ROWS_MOVE,
                f"the norm turns {_shape(candidate.h.root)} into {_shape(candidate.norm.out)} in a way that is not a reshape",
            )
        start, end = self.order[candidate.collective.node], self.order[point]
        operands = [candidate.collective.x, candidate.bias, candidate.residual, candidate.norm.weight]
        stores = {_storage(n) for n in operands if n is not None}
        stores |= {_storage(n) for n in (candidate.collective.value, *candidate.h.names)}
        for node in self.mutations:
            if start < self.order[node] <= self.order[candidate.norm.out] and (_written(node) & stores):
                return Refusal(Reason.MUTATION, f"{node.name} ({node.target}) writes an operand in place")
        other = self._later_sum(candidate)
        if other is not None:
            return Refusal(
                Reason.SUM_OF_REDUCTIONS, f"its sum is added to that of {other.name}, which takes it as an addend"
            )
        for node in self.communication:
            if start < self.order[node] < end and self._same_group(node, candidate.collective):
                return Refusal(
                    Reason.ORDER, f"{node.name} communicates on the same ranks between the all-reduce and its norm"
                )
        return None

    def _later_sum(self, candidate: Candidate) -> Node | None:
        """The all-reduce behind a full addend, when it comes after ours: that one is nearer to the norm."""
        node = candidate.bias
        while node is not None and node.op == "call_function":
            if collectives.spelling_of(node) is not None:
                return node if self.order[node] > self.order[candidate.collective.node] else None
            first = next(
                (a for a in node.all_input_nodes if node.target is collectives.WAIT or values.is_alias(node, a)), None
            )
            node = first
        return None

    @staticmethod
    def _same_group(node: Node, c: Collective) -> bool:
        names = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, str)]
        if not names:
            return True  # not understood: assume the worst
        return any(
            name == c.group_name or collectives.group_ranks(name)[0] == c.ranks for name in names if name != c.reduce_op
        )


def settle(found: Sequence[Found]) -> list[Found]:
    """Let at most one all-reduce claim each norm: the last, for it is the nearest to the norm.

    DeepSeek's MoE layers add the sums of the routed and of the shared experts; the earlier sum then is an operand of the
    later one's fused op.
    """
    owner: dict[Node, int] = {}
    for index, item in enumerate(found):
        if isinstance(item.outcome, Candidate):
            owner[item.outcome.norm.out] = index
    settled = []
    for index, item in enumerate(found):
        outcome = item.outcome
        if isinstance(outcome, Candidate) and owner[outcome.norm.out] != index:
            other = found[owner[outcome.norm.out]].collective
            outcome = Refusal(
                Reason.SUM_OF_REDUCTIONS,
                f"its sum is added to that of {other.node.name}, whose fused op takes it as an addend",
            )
        settled.append(Found(item.collective, outcome, item.pattern))
    return settled


def _pattern(terms: list[Term], end: str | None) -> str:
    names = {"bias": "bias", "full": "add", "scale": "scale"}
    return "+".join(["all_reduce", *(names[t.kind] for t in terms), *([end] if end else [])])


def _shape(node: Node) -> str:
    tensor = values.value(node)
    return "?" if tensor is None else str(tuple(compat.size_hint(n) for n in tensor.shape))


def _gathers(node: Node) -> bool:
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "") in GATHERS


def _mutates(node: Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.is_mutable and node.target.namespace not in ("_c10d_functional",)


def _written(node: Node) -> set[Node]:
    """The storages that a mutating node writes."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    written = set()
    for position, argument in enumerate(schema):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        arg = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        for item in arg if isinstance(arg, list | tuple) else [arg]:
            if isinstance(item, Node):
                written.add(_storage(item))
    return written


def _storage(node: Node) -> Node:
    """The node that owns the memory behind a view."""
    while node.op == "call_function" and (
        _mutates(node)  # an in-place operation returns what it wrote
        or node.target in values.RESHAPES
        or node.target
        in values.overloads(
            "detach.default",
            "alias.default",
            "slice.Tensor",
            "select.int",
            "permute.default",
            "transpose.int",
            "t.default",
        )
    ):
        first = node.args[0]
        if not isinstance(first, Node):
            break
        node = first
    return node
