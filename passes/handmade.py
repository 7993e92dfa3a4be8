"""Find: sums over ranks that are made without a reduction, for a note in the report.

``all_gather`` and a sum of what came is an all-reduce by hand, ``all_to_all`` and a sum a reduce-scatter. The pass does not
take them for one: they add in an order of their own, so another reduction has other bits. But the report names them, for it
looks otherwise as if the model had no sums over ranks.
"""

from __future__ import annotations

import heapq
import operator
from collections import defaultdict
from dataclasses import dataclass

from torch.fx import Graph, Node

from . import collectives, source, values
from .dead_ends import SUMS
from .rank_places import BITS, Part, Places, Whole, behind, source_of, sums_ranks
from .values import ADD, DIV, MUL

GATHERS = "all_gather"  # in the names of all_gather_into_tensor, its coalesced and its out variants
EXCHANGES = "all_to_all"
MEANS = values.overloads("mean.dim")
# Between what came and its scales. Gathers of rows by an index are left out, for experts exchange and pick rows so.
PASSES_ON = (
    values.RESHAPES | values.IDENTITIES | values.CASTS | values.COPIES | BITS | values.ROW_MOVERS
) - values.overloads(
    "index.Tensor", "index_select.default", "gather.default", "index_put.default", "index_add.default", "scatter.src"
) | {collectives.WAIT, operator.getitem}
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
    lines: dict[tuple[str, str, tuple[int, ...]], list[HandMade]] = defaultdict(list)
    for one in find(graph):
        lines[str(source.of(one.total)), one.kind, one.ranks].append(one)
    said = []
    for (place, kind, ranks), alike in lines.items():
        first = alike[0]
        times = f", {len(alike)} times" if len(alike) > 1 else ""
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
    """The first node that adds up one value of each rank, behind nothing but names and moves of them."""
    if EXCHANGES in _name(start) and not _alike(start.args[1] if len(start.args) > 1 else None):
        return None
    known: dict[Node, Places] = {start: Whole(1)}
    queue = list(start.users)
    heapq.heapify(queue)  # in the order of the graph, so that all that a node reads is known before it
    seen = set(queue)
    while queue:
        node = heapq.heappop(queue)
        sources = [a for a in node.all_input_nodes if a in known]
        if node.op != "call_function" or not sources:
            continue
        if node.target in SUMS or node.target in MEANS:
            if _floating(sources[0]) and sums_ranks(node, sources[0], known[sources[0]], size):
                return node
        elif node.target in ADD:
            if len(sources) == size == 2 and all(map(_floating, sources)):
                found = [known[a] for a in sources]
                if all(isinstance(p, Part) for p in found) and found[0] != found[1]:
                    return node
        else:
            state = _scaled(node, known) if node.target in MUL | DIV else behind(node, known, size)
            if state is not None:
                known[node] = state
                for user in node.users:
                    if user not in seen:
                        seen.add(user)
                        heapq.heappush(queue, user)
    return None


def _alike(sizes: object) -> bool:
    """Whether an exchange brings as much from each rank: otherwise the parts are no rows of one shape."""
    return not isinstance(sizes, list | tuple) or len({str(n) for n in sizes}) <= 1


def _floating(node: Node) -> bool:
    tensor = values.value(node)
    return tensor is not None and tensor.is_floating_point()


def _scaled(node: Node, known: dict[Node, Places]) -> Places | None:
    """Of compressed values that are multiplied by the scales that were sent with them."""
    if len(node.all_input_nodes) != 2 or not all(map(_was_sent, node.all_input_nodes)):
        return None
    return next((known[a] for a in node.all_input_nodes if a in known and values.same_shape(a, node)), None)


def _was_sent(node: Node) -> bool:
    """Whether a value came from other ranks."""
    while node.op == "call_function" and not collectives.is_communication(node):
        source = source_of(node)
        if node.target not in PASSES_ON or source is None:
            return False
        node = source
    return node.op == "call_function"
