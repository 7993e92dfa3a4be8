"""Find: sums over ranks that are made without a reduction, for a note in the report.

``all_gather`` and a sum of what came is an all-reduce by hand, ``all_to_all`` and a sum a reduce-scatter. The pass does not
take them for one: they add in an order of their own, so another reduction has other bits. But the report names them, for it
looks otherwise as if the model had no sums over ranks.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Graph, Node

from tpfuse import compat

from . import collectives, source, values
from .dead_ends import SUMS
from .values import ADD, DIV, MUL

GATHERS = "all_gather"  # in the names of all_gather_into_tensor, its coalesced and its out variants
EXCHANGES = "all_to_all"
MEANS = values.overloads("mean.dim")
# What takes the ranks' values apart; gathers of rows by an index are left out, for experts exchange and pick rows so.
MOVES = (values.ROW_MOVERS | values.overloads("stack.default")) - values.overloads(
    "index.Tensor", "index_select.default", "gather.default", "index_put.default", "index_add.default", "scatter.src"
)
BITS = values.overloads("view.dtype")  # fp8 is sent as bytes
BEGINNING = "made by hand: "


@dataclass(frozen=True)
class HandMade:
    """One sum over ranks without a reduction.

    Attributes:
        start: the collective that brings the ranks' values.
        total: the node that adds them up.
        ranks: global ranks.
    """

    start: Node
    total: Node
    ranks: tuple[int, ...]

    @property
    def kind(self) -> str:
        """What could stand in its place."""
        return "all_reduce" if GATHERS in _name(self.start) else "reduce_scatter"


def find(graph: Graph) -> list[HandMade]:
    """All hand-made sums of a graph, in graph order."""
    found = []
    for node in graph.nodes:
        if not collectives.is_communication(node) or not any(word in _name(node) for word in (GATHERS, EXCHANGES)):
            continue
        ranks = _ranks(node)
        total = _total(node, len(ranks)) if len(ranks) > 1 else None
        if total is not None:
            found.append(HandMade(node, total, ranks))
    return found


def notes(graph: Graph) -> list[str]:
    """A sentence for each line of the model that makes such sums, with what to write in their place."""
    found = find(graph)
    lines = Counter((str(source.of(f.total)), f.kind, f.ranks) for f in found)
    said = []
    for (place, kind, ranks), number in lines.items():
        first = next(f for f in found if (str(source.of(f.total)), f.kind, f.ranks) == (place, kind, ranks))
        times = f", {number} times" if number > 1 else ""
        where = f" at {place}" if place else ""
        if kind == "all_reduce":
            what, call = "an all-reduce", "all_reduce(x)"
            cost = f" and sends {len(ranks)} times the values of one rank"
        else:
            what, call, cost = "a reduce-scatter", "reduce_scatter_tensor(own_rows, x)", ""
        said.append(
            f"{BEGINNING}{first.total.name} adds up what {first.start.name} brings from ranks {list(ranks)}{where}{times}. "
            f"That is {what}, but adds in an order of its own{cost}, so the pass leaves it. "
            f"torch.distributed.{call} in its place can be fused"
        )
    return said


def _name(node: Node) -> str:
    return str(node.target)


def _ranks(node: Node) -> tuple[int, ...]:
    names = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, str)]
    return collectives.group_ranks(names[-1])[0] if names else ()


def _total(start: Node, size: int) -> Node | None:
    """The first node that adds up as many values as there are ranks, behind nothing but names and moves of them."""
    gathers = GATHERS in _name(start)
    came = {start}
    for node in _behind(start):
        sources = [a for a in node.all_input_nodes if a in came]
        if node.target in SUMS or node.target in MEANS:
            if _sums_ranks(node, sources[0], size, leading=not gathers):
                return node
        elif node.target in ADD:
            if len(sources) == 2 and all(_is_part(start, a, size) for a in sources):
                return node
        elif _passes_on(node):
            came.add(node)
    return None


def _behind(start: Node) -> Iterator[Node]:
    """What reads a value, and what reads that as long as it only passes it on; each once, in the order of the graph."""
    seen: set[Node] = {start}
    queue = [start]
    found: list[Node] = []
    while queue:
        for user in queue.pop().users:
            if user not in seen and user.op == "call_function":
                seen.add(user)
                found.append(user)
                if _passes_on(user):
                    queue.append(user)
    yield from sorted(found)


def _passes_on(node: Node) -> bool:
    if node.target in MUL | DIV:
        return len(node.all_input_nodes) == 2 and all(_was_sent(a) for a in node.all_input_nodes)
    if node.target is collectives.WAIT or node.target is operator.getitem or node.target in MOVES:
        return True
    return node.target in values.RESHAPES | values.IDENTITIES | values.CASTS | values.COPIES | BITS


def _was_sent(node: Node) -> bool:
    """Whether a value came from other ranks: compressed values are multiplied by scales that were sent with them."""
    while node.op == "call_function" and not collectives.is_communication(node):
        source = node.args[1] if node.target in values.COPIES else (node.args[0] if node.args else None)
        source = source[0] if isinstance(source, list | tuple) and source else source
        if node.target in MUL | DIV or not _passes_on(node) or not isinstance(source, Node):
            return False
        node = source
    return node.op == "call_function"


def _sums_ranks(node: Node, read: Node, size: int, leading: bool) -> bool:
    """Whether the dimensions that a sum is over have one place for each rank; ``leading``: and are the first."""
    before, after = values.value(read), values.value(node)
    dims = node.args[1] if len(node.args) > 1 else None
    if before is None or after is None or not before.is_floating_point() or before.dim() < 2:
        return False
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, list | tuple) or not dims:
        return False
    places = [d % before.dim() for d in dims]
    if before.dim() - 1 in places or (leading and places != [0]):
        return False
    return bool(compat.statically_true(math.prod(before.shape[d] for d in places) == size))


def _is_part(start: Node, node: Node, size: int) -> bool:
    """Whether a value is as large as what one rank gives."""
    whole, part = values.value(start), values.value(node)
    if whole is None:
        whole = values.value(next(iter(start.users), start))
    if whole is None or part is None or not part.is_floating_point():
        return False
    return bool(compat.statically_true(part.numel() * size == whole.numel()))
