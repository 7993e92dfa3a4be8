"""Sums of squares that ranks add up for a norm over columns of all of them, told apart so that a report can name them.

A norm over all heads of q, say, where each rank has some heads: a number a row is reduced, not the row.
"""

from __future__ import annotations

from torch.fx import Node

from . import values
from .collectives import Collective
from .operators import KINDS
from .reasons import Reason, Refusal

JOINS = values.overloads("cat.default", "stack.default")
DEPTH = 12  # nodes between the squares of one norm and the reduction
MOST = 8  # norms that share a reduction


def refusal(c: Collective) -> Refusal | None:
    """The refusal of a reduction of sums or means of squares; None for any other."""
    read = _squared(c.x, DEPTH)
    if not read:
        return None
    names = ", ".join(node.name for node in read)
    return Refusal(
        Reason.NORM_STATISTICS,
        f"it adds up the squares of {names}, {len(read)} numbers a row, for a norm over the columns of {len(c.ranks)} ranks",
    )


def _squared(node: Node, depth: int) -> list[Node]:
    """What is squared and summed over its last dimension, for each column of a value; empty where a column is something else."""
    if depth == 0 or node.op != "call_function":
        return []
    if node.target in JOINS:
        parts = [_squared(part, depth - 1) for part in node.args[0]]  # type: ignore[union-attr, arg-type]
        found = [x for part in parts for x in part]
        return found if all(parts) and len(found) <= MOST else []
    kind = KINDS.get(node.target)
    if kind in ("sum", "mean"):
        over = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        source = node.args[0]
        last = (values.value(source).dim() - 1) if values.value(source) is not None else None  # type: ignore[union-attr]
        return _square(source) if over in ([-1], [last]) else []  # type: ignore[arg-type]
    numbers = all(not isinstance(a, Node) for a in node.args[1:])
    if kind in ("cast", "same") or (kind in ("mul", "div") and numbers):
        return _squared(node.args[0], depth - 1) if isinstance(node.args[0], Node) else []
    return []


def _square(node: Node) -> list[Node]:
    """What a node is the square of."""
    node = _under_casts(node)
    kind = KINDS.get(node.target)
    squared = (
        kind == "square"
        or (kind == "pow" and node.args[1] == 2)
        or (kind == "mul" and len(node.args) == 2 and node.args[0] is node.args[1])
    )
    return [_under_casts(node.all_input_nodes[0])] if squared else []


def _under_casts(node: Node) -> Node:
    while node.op == "call_function" and KINDS.get(node.target) in ("cast", "same"):
        node = node.all_input_nodes[0]
    return node
