"""Judge: every refusal that does not come from reading a norm.

Whether an all-reduce can be fused at all, why a walk ended without a norm, whether a region may be rewritten where it stands,
and which of two all-reduces gets a norm that both could claim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, Node
from tpfuse.ops.reference import DTYPES

from tpfuse import compat

from . import collectives, in_words, storages, streams, values
from .candidate import Candidate, Found, Term
from .collectives import Collective
from .quant_expression import FLOAT8
from .reasons import Reason, Refusal

ADD = values.overloads("add.Tensor")
MUL = values.overloads("mul.Tensor", "mul.Scalar")
SUMS = values.overloads("sum.dim_IntList")
DIV = values.overloads("div.Tensor", "div.Scalar")
WHERE = values.overloads("where.self")
NORMS = values.overloads("native_layer_norm.default", "_fused_rms_norm.default")
DROPOUTS = values.overloads("native_dropout.default", "dropout.default")
MASKS = values.CASTS | MUL | DIV | values.overloads("gt.Scalar", "lt.Scalar", "ge.Scalar")
MASK_DEPTH = 4
GATHERS = frozenset({"all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast"})


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


def several_readers(current: values.Aliases, terms: list[Term]) -> Refusal | None:
    """A sum with several readers and no norm among them."""
    if len(current.readers) <= 1:
        return None
    adds = [r for r in current.readers if r.target in ADD or r.target in MUL]
    others = [r for r in current.readers if r not in adds[:1]]
    if terms and any(t.kind == "full" for t in terms):
        return no_norm(current, terms)
    if any(r.op == "output" for r in others) and adds:
        return Refusal(Reason.RETURNED, f"the sum is an output of the graph besides being read by {adds[0].name}")
    if adds:
        names = ", ".join(r.name for r in others)
        return Refusal(Reason.EXTRA_READER, f"the sum is read by {names} besides {adds[0].name}")
    return no_norm(current, terms)


def no_norm(current: values.Aliases, terms: list[Term]) -> Refusal:
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
                "graph break, which TORCH_LOGS=graph_breaks shows, or layers that are compiled one by one, as by "
                "nested_compile_region)",
            )
    for reader in current.readers:
        name = in_words.opaque_norm(reader)
        if name is not None:
            return Refusal(
                Reason.UNKNOWN_NORM,
                f"the {what} is read by {name}, an operator that the pass cannot look into; a norm of PyTorch's operators, "
                "torch.nn.functional.rms_norm or spelled out, is seen",
            )
    for reader in current.readers:
        if not terms and in_words.gathers_again(current.root, reader):
            return Refusal(
                Reason.SPLIT_ALL_REDUCE,
                f"{reader.name} gathers the rows that the ranks summed, over the same ranks and before any norm: the two are an "
                "all-reduce in two calls, for which the pass would have to put another reduction",
            )
    for reader in current.readers:
        if reader.target in values.ROW_MOVERS or _gathers(reader):
            return Refusal(Reason.ROWS_MOVE, f"{reader.name} ({reader.target}) moves rows of the {what}")
    for reader in current.readers:
        if _adds_rows(reader):
            (source,) = reader.all_input_nodes
            return Refusal(
                Reason.ROWS_SUMMED,
                f"{reader.name} ({reader.target}) adds up rows of the {what}, {shape_of(source)} to {shape_of(reader)}; each of "
                "them was rounded when the ranks were summed, and a fused op would round their sum alone",
            )
    factors = [(r, a) for r in current.readers if r.target in MUL for a in r.all_input_nodes if a not in current]
    for reader, other in factors:
        tensor, hidden = values.value(other), values.width(current.root)
        if isinstance(other.meta.get("val"), torch.SymInt | torch.SymFloat):
            return Refusal(
                Reason.SCALE_NOT_CONSTANT,
                f"{reader.name} multiplies the {what} by {other.name}, a number that the graph was compiled without",
            )
        if tensor is not None and (tensor.dim() == 0 or values.is_vector(other, 1)):
            dims = f" of shape {tuple(tensor.shape)}" if tensor.dim() else ""
            return Refusal(Reason.SCALE_NOT_CONSTANT, f"{reader.name} multiplies the {what} by a scalar tensor{dims}")
        if isinstance(hidden, int) and values.is_vector(other, hidden):
            return Refusal(
                Reason.SCALE_NOT_CONSTANT,
                f"{reader.name} multiplies the {what} by {other.name}, one value a column{in_words.gate(other)}",
            )
    spread = streams.spread(current)
    if spread is not None:
        reader, number = spread
        return Refusal(
            Reason.STREAMS,
            f"{reader.name} ({reader.target}) spreads the {what} over {number} residual streams (hyper-connections): the fused "
            "op lacks the mixing of the streams by weights of each row, before and behind the add",
        )
    for reader, other in factors:
        if values.same_shape(reader, current.root) and not values.same_rows(other, current.root):
            return Refusal(
                Reason.SCALE_NOT_CONSTANT,
                f"{reader.name} multiplies the {what} by {other.name} of shape {shape_of(other)}{in_words.gate(other)}",
            )
    for reader in current.readers:
        if _drops_out(reader):
            return Refusal(Reason.DROPOUT, f"{reader.name} ({reader.target}) drops values of the {what} at random")
    for reader in current.readers:
        if storages.mutates(reader):
            return Refusal(
                Reason.MUTATION,
                f"{reader.name} ({reader.target}) writes the {what} in place; the pass reads functional graphs, which "
                "an exported program is after run_decompositions()",
            )
    for reader in current.readers:
        if reader.target in values.CASTS and values.moves(reader):
            return Refusal(Reason.NO_NORM, f"{reader.name} ({reader.target}) moves the {what} to another device")
        if reader.target in values.CASTS:
            cast = f"the {what} is cast from {values.dtype(current.root)} to {values.dtype(reader)}"
            late = "; the fused op rounds an fp32 sum before anything is added to it" if terms else ""
            return Refusal(Reason.DTYPE, cast + late)
    for reader in current.readers:
        sizes = reader.args[1] if reader.target in NORMS else None
        if isinstance(sizes, Sequence) and len(sizes) > 1:
            return Refusal(
                Reason.MEAN_DIM,
                f"{reader.name} ({reader.target}) normalizes the {what} over its last {len(sizes)} dimensions",
            )
    readers = ", ".join(f"{r.name} ({in_words.operator_of(r)})" for r in current.readers[:3]) or "nothing"
    return Refusal(Reason.NO_NORM, f"the {what} is read by {readers}; no norm follows")


def flattened(current: values.Aliases) -> Refusal | None:
    """A sum in one dimension that gets its rows back behind the reduction."""
    tensor = values.value(current.root)
    readers = [r for r in current.readers if r.target in values.RESHAPES]
    if tensor is None or tensor.dim() != 1 or not readers or len(readers) != len(current.readers):
        return None
    return Refusal(
        Reason.ROWS_MOVE,
        f"the sum is of a flattened tensor, and {readers[0].name} makes it {shape_of(readers[0])} again; reduce it in that shape "
        "(all_reduce(x) for all_reduce(x.view(-1))), then its rows are seen",
    )


def add_chain(kinds: Sequence[str]) -> Refusal:
    """More is added between the sum and its norm than the op takes."""
    return Refusal(
        Reason.ADD_CHAIN,
        f"the sum goes through {' then '.join(kinds)} before the norm; the fused op takes at most one addend and one scale, then "
        "one residual",
        tuple(kinds),
    )


class Legality:
    """Judges the candidates of one graph. Holds what all of them share: order, mutations, communication."""

    def __init__(self, graph: Graph, reductions: Sequence[Collective] = ()) -> None:
        self.reductions = reductions
        self.nodes = list(graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.mutations = [n for n in graph.nodes if storages.mutates(n)]
        self.communication = [n for n in graph.nodes if collectives.is_communication(n)]
        self.quantizes = any(values.dtype(n) in FLOAT8 for n in graph.nodes)

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


def shape_of(node: Node) -> str:
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


def _adds_rows(reader: Node) -> bool:
    """Whether a reader adds up whole rows, and keeps their columns."""
    dims = reader.args[1] if reader.target in SUMS and len(reader.args) > 1 else None
    source = values.value(reader.args[0]) if reader.args else None
    if source is None or source.dim() < 2 or not isinstance(dims, Sequence) or not dims:
        return False
    return all(isinstance(d, int) and d % source.dim() != source.dim() - 1 for d in dims)


def _gathers(node: Node) -> bool:
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "") in GATHERS
