"""Find: the all-gather over attention replicas behind a norm, and proof that one op over all their ranks does the same.

Attention data parallelism: the ranks of a replica (its block) sum, add and norm its rows, and a gather over the ranks at one
place of each block brings the rows of all replicas together, each filled up with rows of zeros to the largest one's number.
What proves the layout are three rank lists: that of the sum, that of the gather, and that of another reduction of the graph over
all blocks in order, as the sum behind the experts is.

The ranks of different replicas trace different graphs and must decide alike. So nothing here depends on how many rows this
replica has: the largest fills up nothing, and its graph may show no sign that others do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tpfuse import compat

from . import collectives, values
from .collectives import Collective

PADS = values.overloads("constant_pad_nd.default")


@dataclass(frozen=True)
class Replicas:
    """The ranks and rows of a gather over replicas.

    Attributes:
        ranks: global ranks of all replicas, block by block: those of the fused op.
        group_name, gather_group: torch's names of the group over ``ranks``, and of that of the gather.
        blocks: how many replicas there are.
        largest: rows of the largest replica: a number, the node that holds it, or None where no node does, and it is the number
            of the own rows and of those that are missing.
        missing: rows that fill up the own ones, where ``largest`` is None: a number, or the node that holds it.
    """

    ranks: tuple[int, ...]
    group_name: str
    gather_group: str
    blocks: int
    largest: int | Node | None
    missing: int | Node = 0


def wrong_filling(pad: Node) -> str:
    """What else a node of ``PADS`` does than to put rows of zeros behind the rows of its input; empty where nothing."""
    given: tuple[Any, ...] = (*pad.args, 0)
    source, amounts, fill = given[0], given[1], pad.kwargs.get("value", given[2])
    tensor = values.value(source)
    if not isinstance(fill, int | float) or fill != 0 or math.copysign(1.0, fill) < 0:
        return f"{pad.name} fills up with {fill}, not with zeros"
    # From the last dimension on, in front and behind: only the rows' last pair may say something.
    others = [amount for n, amount in enumerate(amounts) if n != 3]
    if tensor is None or any(isinstance(a, Node) or a != 0 for a in others):
        return f"{pad.name} fills up by {list(amounts)}, not with rows at the end alone"
    if not all(compat.statically_true(size == 1) for size in tensor.shape[:-2]):
        return f"{pad.name} fills up each of several parts of the rows"
    rows: Any = amounts[3] if len(amounts) > 3 else 0
    if isinstance(rows, Node):
        rows = rows.meta.get("val")
    # Without a proof it becomes a guard, so that it does not matter whether the sizes of this rank's graph are symbols.
    if rows is None or not compat.guarded(rows >= 0):
        return f"{pad.name} is not proved to keep all rows"
    return ""


def proved(
    c: Collective, start: Node, reductions: Sequence[Collective], order: dict[Node, int], pads: Sequence[Node]
) -> Replicas | str:
    """The replicas of the gather that ``start`` starts behind the norm of ``c``'s sum, or a sentence why they are not proved."""
    _, size, group, *_ = (*start.args, None, None)
    across, name, error = collectives.group_ranks(group)
    if error or name is None or size != len(across) or len(across) < 2:
        return f"its group is not known: {error or f'{size} of {list(across)}'}"
    found: dict[tuple[int, ...], set[str]] = {}
    for other in reductions:
        if other.group_name is not None and _are_blocks(other.ranks, c.ranks, across):
            found.setdefault(other.ranks, set()).add(other.group_name)
    if len(found) != 1:
        said = " and ".join(f"that over {list(ranks)}" for ranks in sorted(found)) or "no reduction of the graph"
        return f"it is over {list(across)}, the sum over {list(c.ranks)}, and {said} says that these are replicas"
    ((ranks, names),) = found.items()
    tensor = values.value(start.args[0])
    if tensor is None:
        return "what it gathers has no shape"
    if not all(compat.statically_true(size == 1) for size in tensor.shape[:-2]):
        # This shape is that of all replicas. Another one may fill up each part, where this one shows no sign of that.
        return f"it gathers {tuple(tensor.shape)}, several parts, and not rows"
    rows = math.prod(tensor.shape[:-1])
    number = compat.number_of(rows)
    largest = _holder(rows, order) if number is None else number
    amounts: Any = pads[0].args[1] if pads else ()
    missing = amounts[3] if largest is None and len(amounts) > 3 else 0
    return Replicas(ranks, min(names), name, len(across), largest, missing)


def _are_blocks(ranks: tuple[int, ...], block: tuple[int, ...], across: tuple[int, ...]) -> bool:
    """Whether ``ranks`` are blocks of neighbors, ``block`` is one and ``across`` has the ranks at one place of each."""
    size = len(block)
    own = set(block) & set(across) & set(ranks)
    if len(ranks) != size * len(across) or len(own) != 1:
        return False
    at = ranks.index(own.pop())
    return ranks[at // size * size :][:size] == block and ranks[at % size :: size] == across


def _holder(rows: Any, order: dict[Node, int]) -> Node | None:
    """The first node that holds this symbolic number."""
    for node in order:
        held = node.meta.get("val")
        if isinstance(held, torch.SymInt) and compat.statically_true(held == rows):
            return node
    return None
