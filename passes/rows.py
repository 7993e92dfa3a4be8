"""Find: a sum of which each rank keeps some rows, and proof that ranks differ in nothing but their place.

Two spellings: a reduce-scatter, and an all-reduce of which a slice, or one piece of a split, is read. That alone proves nothing:
the others' slices are in their own graphs, and one that begins at row 0 fits any number of blocks. What proves it is where the
rows came from. A gather put them together, block by block, over a group whose rank list has one rank of each block, at this
rank's place in it: then the blocks are the gather's, and the slice must be the own one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import Node

from tpfuse import compat

from . import collectives, values
from .collectives import Collective
from .reasons import Reason, Refusal

SELECTS = values.overloads("select.int")
SLICES = values.overloads("slice.Tensor")
SPLITS = values.overloads(  # into pieces, of which a getitem takes one
    "split.Tensor",
    "split.sizes",
    "split_with_sizes.default",
    "chunk.default",
    "tensor_split.sections",
    "tensor_split.indices",
    "unbind.int",
    "unsafe_split.Tensor",
    "unsafe_split_with_sizes.default",
    "unsafe_chunk.default",
    # What views become where a compiler wants no aliases.
    "split_copy.Tensor",
    "split_with_sizes_copy.default",
    "unbind_copy.int",
)
UNBINDS = values.overloads("unbind.int", "unbind_copy.int")
GATHERS = "all_gather_into_tensor"
MAX_STEPS = 3


@dataclass(frozen=True)
class RowBlock:
    """The rows that this rank keeps: at most one of ``blocks`` equal blocks, from its beginning.

    Attributes:
        blocks: how many there are, a divisor of the group's size.
        place: which one is this rank's.
        receivers: global ranks that keep rows of this block.
        nodes: what selects them behind an all-reduce, with the aliases between; none behind a reduce-scatter.
    """

    blocks: int
    place: int
    receivers: tuple[int, ...]
    nodes: tuple[Node, ...] = ()

    def of(self, whole: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The kept rows of a sum of all rows, in this shape."""
        flat = whole.reshape(-1, whole.shape[-1])
        start = self.place * (flat.shape[0] // self.blocks)
        return flat[start : start + math.prod(shape[:-1])].reshape(shape)


def scattered(c: Collective) -> RowBlock | None:
    """What a reduce-scatter keeps; None for an all-reduce."""
    if c.kind != "reduce_scatter" or dist.get_rank() not in c.ranks:
        return None
    return RowBlock(len(c.ranks), c.ranks.index(dist.get_rank()), (dist.get_rank(),))


def kept(
    c: Collective, total: values.Aliases, order: dict[Node, int]
) -> tuple[RowBlock, values.Aliases] | Refusal | None:
    """The block of an all-reduced sum that alone is read, and its names; None where all rows are read.

    A refusal where rows are selected and no proof says that they are this rank's block.
    """
    path: list[Node] = []
    current, start = total, 0
    while len(path) < MAX_STEPS * 4 and len(current.readers) == 1:
        reader = taken = current.readers[0]
        if reader.target in SPLITS:
            pieces = [user for user in reader.users if not values.is_dead(user)]
            if len(pieces) != 1 or pieces[0].target is not operator.getitem:
                return None  # several pieces are read: see below
            taken = pieces[0]
        elif reader.target not in SELECTS | SLICES:
            break
        name = reader.args[0]
        moved = _first_row(reader, name) if taken is reader else _first_row_of_piece(reader, taken)
        if not isinstance(name, Node) or moved is None:
            return None  # not whole rows: what reads it is said as for every other reader
        path += [*current.path(name), *dict.fromkeys((reader, taken))]
        start = start + moved
        current = values.aliases(taken, order)
    if not path or compat.statically_true(_rows(values.value(total.root)) == _rows(values.value(current.root))):
        return None
    found = _proved(c, start, _rows(values.value(total.root)), _rows(values.value(current.root)), list(order))
    if isinstance(found, Refusal):
        return Refusal(found.reason, f"{path[-1].name} keeps some rows of the sum: {found.detail}")
    blocks, place = found
    size = len(c.ranks) // blocks
    receivers = c.ranks[place * size : (place + 1) * size]
    return RowBlock(blocks, place, receivers, tuple(path)), current


def _rows(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else math.prod(tensor.shape[:-1])


def _first_row(node: Node, name: Any) -> Any:
    """How many rows a select or slice leaves out in front; None when what it takes is not one stretch of whole rows."""
    source, taken = values.value(name), values.value(node)
    if source is None or taken is None or source.dim() < 2:
        return None
    arguments = list(node.args[1:])
    dim = arguments[0] if arguments else 0
    if not isinstance(dim, int) or node.kwargs:
        return None
    dim %= source.dim()
    if dim == source.dim() - 1 or not all(compat.statically_true(size == 1) for size in source.shape[:dim]):
        return None
    first: Any = arguments[1] if len(arguments) > 1 else 0
    if isinstance(first, Node):
        first = first.meta.get("val")
    if node.target in SLICES:
        if len(arguments) > 3 and arguments[3] != 1:
            return None
        first = 0 if first is None else first
    if first is None:
        return None
    if compat.statically_true(first < 0):
        first = first + source.shape[dim]
    elif not compat.statically_true(first >= 0):
        return None
    return first * math.prod(source.shape[dim + 1 : -1])


def _first_row_of_piece(split: Node, piece: Node) -> Any:
    """The same of one piece of a split."""
    source, pieces, index = values.value(split.args[0]), split.meta.get("val"), piece.args[1]
    position = 1 if split.target in UNBINDS else 2
    dim = split.args[position] if len(split.args) > position else split.kwargs.get("dim", 0)
    if source is None or source.dim() < 2 or not isinstance(pieces, list | tuple):
        return None
    if not isinstance(dim, int) or not isinstance(index, int):
        return None
    dim %= source.dim()
    if dim == source.dim() - 1 or not all(compat.statically_true(size == 1) for size in source.shape[:dim]):
        return None
    index %= len(pieces)
    first: Any = index if split.target in UNBINDS else sum(part.shape[dim] for part in pieces[:index])
    return first * math.prod(source.shape[dim + 1 : -1])


def _comes_from(x: Node, gathers: Collection[Node], nodes: list[Node]) -> bool:
    """Whether a value is computed from one of the gathers: another gather of as many rows, of logits say, says nothing of it."""
    between = set(nodes[nodes.index(next(iter(gathers))) :])
    stack, seen = [x], {x}
    while stack:
        node = stack.pop()
        if node in gathers:
            return True
        sources = [a for a in node.all_input_nodes if a in between and a not in seen]
        stack += sources
        seen.update(sources)
    return False


def _proved(c: Collective, start: Any, rows: Any, kept_rows: Any, nodes: list[Node]) -> tuple[int, int] | Refusal:
    """(blocks, own place) of the gather that put the rows together, or why there is no such proof."""
    rank = dist.get_rank()
    if rank not in c.ranks or rows is None or kept_rows is None:
        return Refusal(Reason.ROWS_MOVE, "the group or the shapes are not known")
    at = c.ranks.index(rank)
    found: dict[Node, int] = {}
    for node in nodes:
        if getattr(getattr(node.target, "overloadpacket", None), "__name__", "") != GATHERS:
            continue
        if not compat.statically_true(_rows(values.value(node)) == rows):
            continue
        names = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, str)]
        members = collectives.group_ranks(names[-1])[0] if names else ()
        if len(members) < 2 or len(c.ranks) % len(members):
            continue
        size = len(c.ranks) // len(members)
        if members == tuple(c.ranks[n * size + at % size] for n in range(len(members))):
            found[node] = len(members)
    seen = set(found.values())
    if len(seen) != 1 or not _comes_from(c.x, found, nodes):
        disagree = len(seen) > 1
        why = f"gathers over {sorted(seen)} ranks disagree" if disagree else "no gather of the graph put them together"
        return Refusal(Reason.ROWS_MOVE, f"{why} in blocks, one for each part of the group")
    (blocks,) = seen
    place = at // (len(c.ranks) // blocks)
    if not compat.statically_true(start * blocks == place * rows):
        return Refusal(
            Reason.ROWS_MOVE,
            f"they begin at {start} of {rows}, which is not block {place} of {blocks}",
        )
    if not compat.follows_from_guards(kept_rows * blocks <= rows):
        return Refusal(Reason.ROWS_MOVE, f"{kept_rows} of {rows} may be more than one of {blocks} blocks")
    return blocks, place
