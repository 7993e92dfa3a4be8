"""Judge: whether an all-reduce can be fused at all, whether a region may be rewritten where it stands, and which of two
all-reduces gets a norm that both could claim.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph, Node
from tpfuse.ops.reference import DTYPES

from . import collectives, storages, unread, values
from .candidate import Candidate, Found
from .collectives import Collective
from .reasons import Reason, Refusal
from .values import MUL, shape_of


def reduction(c: Collective) -> Refusal | None:
    """Why no op of ours can do this all-reduce."""
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


class Legality:
    """Judges the candidates of one graph. Holds what all of them share: order, mutations, communication."""

    def __init__(self, graph: Graph, reductions: Sequence[Collective] = ()) -> None:
        self.reductions = reductions
        self.nodes = list(graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.mutations = [n for n in graph.nodes if storages.mutates(n)]
        self.communication = [n for n in graph.nodes if collectives.is_communication(n)]
        self.quantizes = unread.quantizes(graph.nodes)

    def refusal(self, candidate: Candidate) -> Refusal | None:
        """Why the region may not be rewritten; None when it may."""
        point = self.insertion_point(candidate)
        if point is None:
            return Refusal(Reason.ORDER, "an operand of the fused op is computed after its result is first read")
        shapes = candidate.reshapes
        if not values.same_rows(shapes[-1] if shapes else candidate.h.root, candidate.norm.out):
            return Refusal(
                Reason.ROWS_MOVE,
                f"the norm turns {shape_of(candidate.h.root)} into {shape_of(candidate.norm.out)} in a way that is not a reshape",
            )
        found = self._written(candidate, point) or self._read_elsewhere(candidate)
        if found is not None:
            return found
        other = self._later_sum(candidate)
        if other is not None:
            return Refusal(
                Reason.SUM_OF_REDUCTIONS, f"its sum is added to that of {other.name}, which takes it as an addend"
            )
        gathers = candidate.gather.starts if candidate.gather else ()
        reductions = [candidate.collective.node]
        if candidate.merged is not None:
            reductions.append(candidate.merged.collective.node)
        moved = {*gathers, *reductions}
        start = min(self.order[node] for node in reductions)
        end = max(self.order[node] for node in (point, *gathers))
        for node in self.communication:
            if node in moved or not start < self.order[node] < end:
                continue
            if candidate.over:  # three groups take part, and some of their ranks are in any other
                return Refusal(Reason.ORDER, f"{node.name} communicates between the all-reduce and the gather")
            if _same_group(node, candidate.collective):
                return Refusal(
                    Reason.ORDER, f"{node.name} communicates on the same ranks between the all-reduce and its norm"
                )
        return None

    def insertion_point(self, candidate: Candidate) -> Node | None:
        """The node before which the fused op goes: after all operands, before all readers; None when there is none."""
        produced = {candidate.h.root, *candidate.outputs}
        ready = max(self.order[n] for n in (candidate.collective.x, *candidate.operands))
        ready = max(ready, self.order[candidate.collective.node])
        replicas = candidate.gather.replicas if candidate.gather else None
        if replicas is not None:
            numbers = [n for n in (replicas.largest, replicas.missing) if isinstance(n, Node)]
            ready = max(ready, *(self.order[n] for n in numbers)) if numbers else ready
        if self.order[candidate.h.root] > ready:
            return candidate.h.root
        # An operand (usually the weight) is computed after the residual sum: go right behind it, before the first use.
        inside = set(candidate.nodes)
        readers = [u for node in produced for u in node.users if u not in inside]
        readers += [n for n in candidate.norm.steps if any(u not in inside for u in n.users)]  # these stay
        readers += [u for name in candidate.h.names for u in name.users if u not in inside and u not in candidate.h]
        readers += _names_that_stay(candidate.h, inside)
        if candidate.quantization is not None:  # what stands for these goes where they are
            readers += [*candidate.quantization.quantized, *candidate.quantization.scales]
        readers += candidate.gather.starts if candidate.gather else ()
        if any(self.order[reader] <= ready for reader in readers):
            return None
        return self.nodes[ready + 1]

    def _written(self, candidate: Candidate, point: Node) -> Refusal | None:
        """Whether something in the region is overwritten between the first and the last node that the rewrite moves."""
        c = candidate.collective
        region = {*candidate.nodes, *candidate.h.names}
        region.update(name for node in candidate.rounded or () for name in values.aliases(node, self.order).names)
        stores = {m for node in (*region, *candidate.operands, c.x) for m in storages.of(node)}
        first = min(self.order[n] for n in region)
        last = max(self.order[n] for n in (*region, point))
        for node in self.mutations:
            if node is c.node or not first <= self.order[node] <= last:
                continue
            written = storages.written(node)
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
        if not storages.mutates(c.node):
            return None
        buffer = storages.of(c.x)
        start = self.order[c.node]
        for node in self.nodes:
            if node in region or not storages.of(node) & buffer:
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
        node = candidate.addend or candidate.bias
        while node is not None and node.op == "call_function":
            if collectives.spelling_of(node) is not None:
                return node if self.order[node] > self.order[candidate.collective.node] else None
            first = node.all_input_nodes[0] if node.target is collectives.WAIT else values.aliased(node)
            node = _scaled_by(node) if first is None else first
        return None


def _scaled_by(node: Node) -> Node | None:
    """What a node multiplies by a number or a scalar tensor, or None where it does something else."""
    large = [a for a in node.all_input_nodes if (tensor := values.value(a)) is not None and tensor.dim()]
    return large[0] if node.target in MUL and len(large) == 1 and values.same_rows(large[0], node) else None


def _same_group(node: Node, c: Collective) -> bool:
    names = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, str) and a != c.reduce_op]
    known = {name: ranks for name in names if (ranks := collectives.group_ranks(name)[0])}
    if not known:
        return True  # not understood, a group that is an object for example: assume the worst
    return any(name == c.group_name or ranks == c.ranks for name, ranks in known.items())


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
