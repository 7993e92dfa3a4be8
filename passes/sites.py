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

from . import collectives, memory, norms, values
from .collectives import Collective
from .norms import NormForm
from .reasons import Reason, Refusal

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_TERMS = 4
ADD = values.overloads("add.Tensor")
MUL = values.overloads("mul.Tensor", "mul.Scalar")
WHERE = values.overloads("where.self")
DROPOUTS = values.overloads("native_dropout.default", "dropout.default")
MASKS = values.CASTS | MUL | values.overloads("div.Tensor", "div.Scalar", "gt.Scalar", "lt.Scalar", "ge.Scalar")
MASK_DEPTH = 4
GATHERS = frozenset({"all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast"})


@dataclass(frozen=True)
class Term:
    """One step between the sum and the norm.

    Attributes:
        kind: ``bias`` (a vector is added), ``full`` (a tensor with the rows of the sum is added) or ``scale``.
        node: the node that does it.
        operand: what is added; None for a scale.
        factor: of a scale.
        path: alias nodes between the value before and this step; their reshapes are repeated on the partial sum.
    """

    kind: str
    node: Node
    operand: Node | None = None
    factor: float = 1.0
    path: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A region that may be rewritten, with every operand of the fused op.

    Attributes:
        collective: the all-reduce.
        terms: in order, at most one bias (or full addend), one scale, one residual.
        bias: vector or full addend, or None.
        scale: 1.0 when there is none.
        residual: or None.
        h: the value that is normalised, under all its names (the sum itself when there are no terms).
        norm: what was found.
        post_add: the add after the norm when the residual is added there, else None.
        post_path: alias nodes between the norm and that add.
    """

    collective: Collective
    terms: tuple[Term, ...]
    bias: Node | None
    scale: float
    residual: Node | None
    h: values.Aliases
    norm: NormForm
    post_add: Node | None = None
    post_path: tuple[Node, ...] = ()

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
    def operands(self) -> tuple[Node, ...]:
        """What the fused op reads besides the partial sum."""
        return tuple(n for n in (self.bias, self.residual, self.norm.weight) if n is not None)

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
        region = [self.collective.node, *self.collective.waits]
        region += [node for term in self.terms for node in (*term.path, term.node)]
        region += [*self.norm.steps, self.norm.out]
        if self.post_add is not None:
            region += [*self.post_path, self.post_add]
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
        self.mutations = [n for n in graph.nodes if memory.mutates(n)]
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
        pattern = "all_reduce"
        current = values.aliases(c.value, self.order, also=c.waits)
        while True:
            term = self._term(current)
            # A scaled sum is normalised after the scale: s and 2 * s have one norm, up to eps and rounding.
            scaled = isinstance(term, Term) and term.kind == "scale"
            norm = None if scaled else norms.match(current, self.order, self.relaxed)
            if isinstance(norm, NormForm):
                return self._candidate(c, terms, current, norm), _pattern(terms, "rms_norm")
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
            name = next(a for a in term.node.all_input_nodes if a in current)
            terms.append(replace(term, path=tuple(current.path(name))))
            current = values.aliases(term.node, self.order)

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
                    return Refusal(
                        Reason.RETURNED,
                        "the sum is an output of the graph. If the model does not return it, the graph ends between the sum and "
                        "its norm: a graph break (TORCH_LOGS=graph_breaks shows where), or layers that are compiled one by one",
                    )
                return Refusal(
                    Reason.NO_NORM,
                    f"the {what} leaves the graph before any norm reads it: the model returns it, or the graph ends there (a "
                    "graph break, which TORCH_LOGS=graph_breaks shows, or layers that are compiled one by one)",
                )
        for reader in current.readers:
            if reader.target in values.ROW_MOVERS or _gathers(reader):
                return Refusal(Reason.ROWS_MOVE, f"{reader.name} ({reader.target}) moves rows of the {what}")
        for reader in current.readers:
            if _drops_out(reader):
                return Refusal(Reason.DROPOUT, f"{reader.name} ({reader.target}) drops values of the {what} at random")
        for reader in current.readers:
            if memory.mutates(reader):
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
        rows = values.same_rows(other, mine[0])
        if isinstance(hidden, int) and values.is_vector(other, hidden) and values.same_rows(reader, mine[0]):
            # A tensor of one row is a residual where the sum has one row too, unless its shape says vector.
            tensor = values.value(other)
            if not rows or (tensor is not None and tensor.dim() == 1 and not values.same_shape(other, mine[0])):
                return Term("bias", reader, other)
        if not rows or not values.same_rows(reader, mine[0]):
            shapes = f"{_shape(other)} to {_shape(mine[0])}"
            return Refusal(Reason.RESIDUAL_SHAPE, f"{reader.name} adds {other.name}: {shapes}")
        return Term("full", reader, other)

    # -- from the norm to a candidate

    def _candidate(self, c: Collective, terms: list[Term], h: values.Aliases, norm: NormForm) -> Candidate | Refusal:
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
        candidate = Candidate(c, tuple(terms), bias, scale, residual, h, norm)
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
                and values.same_rows(other, mine[0])
                and values.same_rows(mine[0], candidate.norm.out)
                and values.same_rows(reader, mine[0])
            )
            first_use = min(self.order[r] for r in out.readers)
            if (
                fits
                and self.order[other] < first_use
                and not values.depends_on(other, candidate.collective.node, self.order)
            ):
                return replace(candidate, residual=other, post_add=reader, post_path=tuple(out.path(mine[0])))
        return candidate

    # -- legality

    def insertion_point(self, candidate: Candidate) -> Node | None:
        """The node before which the fused op goes: after all operands, before all readers; None when there is none."""
        produced = {candidate.h.root, candidate.norm.out}
        if candidate.post_add is not None:
            produced.add(candidate.post_add)
        ready = max(self.order[n] for n in (candidate.collective.x, *candidate.operands))
        ready = max(ready, self.order[candidate.collective.node])
        if self.order[candidate.h.root] > ready:
            return candidate.h.root
        # An operand (usually the weight) is computed after the residual sum: go right behind it, before the first use.
        inside = set(candidate.nodes)
        readers = [u for node in produced for u in node.users if u not in inside]
        readers += [n for n in candidate.norm.steps if any(u not in inside for u in n.users)]  # these stay
        readers += [u for name in candidate.h.names for u in name.users if u not in inside and u not in candidate.h]
        readers += _names_that_stay(candidate.h, inside)
        if any(self.order[reader] <= ready for reader in readers):
            return None
        return self.nodes[ready + 1]

    def _legal(self, candidate: Candidate) -> Refusal | None:
        point = self.insertion_point(candidate)
        if point is None:
            return Refusal(Reason.ORDER, "an operand of the fused op is computed after its result is first read")
        shapes = candidate.reshapes
        if not values.same_rows(shapes[-1] if shapes else candidate.h.root, candidate.norm.out):
            return Refusal(
                Reason.ROWS_MOVE,
                f"the norm turns {_shape(candidate.h.root)} into {_shape(candidate.norm.out)} in a way that is not a reshape",
            )
        refusal = self._written(candidate, point) or self._read_elsewhere(candidate)
        if refusal is not None:
            return refusal
        other = self._later_sum(candidate)
        if other is not None:
            return Refusal(
                Reason.SUM_OF_REDUCTIONS, f"its sum is added to that of {other.name}, which takes it as an addend"
            )
        start, end = self.order[candidate.collective.node], self.order[point]
        for node in self.communication:
            if start < self.order[node] < end and self._same_group(node, candidate.collective):
                return Refusal(
                    Reason.ORDER, f"{node.name} communicates on the same ranks between the all-reduce and its norm"
                )
        return None

    def _written(self, candidate: Candidate, point: Node) -> Refusal | None:
        """Whether something in the region is overwritten between the first and the last node that the rewrite moves."""
        c = candidate.collective
        region = {*candidate.nodes, *candidate.h.names}
        stores = {m for node in (*region, *candidate.operands, c.x) for m in memory.of(node)}
        first = min(self.order[n] for n in region)
        last = max(self.order[n] for n in (*region, point))
        for node in self.mutations:
            if node is c.node or not first <= self.order[node] <= last:
                continue
            written = memory.written(node)
            if written is None or written & stores:
                return Refusal(Reason.MUTATION, f"{node.name} ({node.target}) writes an operand in place")
        return None

    def _read_elsewhere(self, candidate: Candidate) -> Refusal | None:
        """Whether the sum is read past the names that the rewrite redirects.

        An all-reduce that writes its input in place leaves the sum in a buffer that older views show as well.
        """
        c = candidate.collective
        region = {*candidate.nodes, *candidate.h.names, *values.aliases(c.value, self.order, also=c.waits).names}
        if c.node is not c.value and c.index is None:
            for reader in c.node.users:
                if reader not in region:
                    return Refusal(Reason.EXTRA_READER, f"{reader.name} reads the all-reduce without its wait")
        if not memory.mutates(c.node):
            return None
        buffer = memory.of(c.x)
        start = self.order[c.node]
        for node in self.nodes:
            if node in region or not memory.of(node) & buffer:
                continue
            if node.op != "call_function":
                return Refusal(Reason.MUTATION, f"the all-reduce writes the graph's input {node.name} in place")
            late = next((u for u in node.users if self.order[u] > start and u not in region), None)
            if late is not None:
                return Refusal(
                    Reason.MUTATION,
                    f"{late.name} reads {node.name} later, a view of the buffer that the all-reduce writes in place",
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


def _names_that_stay(h: values.Aliases, inside: set[Node]) -> list[Node]:
    """The names of a value, other than its root, that something outside the region reads, or a further such name."""
    stay: set[Node] = set()
    for name in reversed(list(h.parent)):  # a name comes after the one that it was made from
        if any(user in stay or (user not in inside and user not in h) for user in name.users):
            stay.add(name)
    return list(stay)


def _pattern(terms: list[Term], end: str | None) -> str:
    names = {"bias": "bias", "full": "add", "scale": "scale"}
    return "+".join(["all_reduce", *(names[t.kind] for t in terms), *([end] if end else [])])


def _shape(node: Node) -> str:
    tensor = values.value(node)
    return "?" if tensor is None else str(tuple(compat.size_hint(n) for n in tensor.shape))


def _drops_out(node: Node) -> bool:
    """Whether a node is dropout, or multiplies by a random mask, which is what dropout is decomposed into."""
    if node.target in DROPOUTS:
        return True
    if node.target not in MUL and node.target not in WHERE:
        return False
    stack = [(a, 0) for a in node.all_input_nodes]
    while stack:
        current, depth = stack.pop()
        target = current.target
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
            return True
        if "inductor_random" in str(target):
            return True
        if depth < MASK_DEPTH and (depth == 0 or values.dtype(current) == torch.bool or target in MASKS):
            stack.extend((a, depth + 1) for a in current.all_input_nodes)
    return False


def _gathers(node: Node) -> bool:
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "") in GATHERS
