"""Find: where in a value stands what each rank gave, as the value is reshaped, moved and taken apart behind a collective.

``view(ranks, rows, hidden)`` of what an all-gather brings has a dimension of ranks; ``view(rows, ranks, hidden)`` has one of the
same size that is none. Only adding up over the first is a sum over ranks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from tpfuse import compat

from . import collectives, values

BITS = values.overloads("view.dtype")  # fp8 is sent as bytes
_KEEP = values.IDENTITIES | values.CASTS | values.COPIES | BITS | {collectives.WAIT}
_PERMUTE = values.overloads("permute.default")
_TRANSPOSE = values.overloads("transpose.int")
_SELECT = values.overloads("select.int")
_SLICE = values.overloads("slice.Tensor")
_SPLIT = values.overloads("split.Tensor", "split_with_sizes.default", "chunk.default")
_UNBIND = values.overloads("unbind.int")
_JOIN = values.overloads("cat.default", "stack.default")


@dataclass(frozen=True)
class Whole:
    """What all ranks gave: ``outer`` places, in each of them every rank's part, in rank order."""

    outer: Any


@dataclass(frozen=True)
class Part:
    """What one rank gave, or some of it."""

    rank: int


@dataclass(frozen=True)
class Pieces:
    """What a split gives: a part of each rank, or pieces along another dimension than that of the ranks, which is ``dim``."""

    dim: int | None = None


Places = Whole | Part | Pieces


def behind(node: Node, known: Mapping[Node, Places], size: int) -> Places | None:
    """Where the ranks' parts stand in the value of a node; None where that is not known.

    Args:
        known: of the values that the node reads.
        size: number of ranks.
    """
    args: Any = node.args
    target, after = node.target, values.value(node)
    if target in _JOIN:
        return _joined(node, known, size)
    source = source_of(node)
    state = None if source is None else known.get(source)
    if source is None or state is None:
        return None
    if target is operator.getitem:
        return _piece(state, args[1], after)
    if target in _KEEP:
        return state if target in BITS or target is collectives.WAIT or values.same_shape(source, node) else None
    before = values.value(source)
    if before is None or isinstance(state, Pieces):
        return None
    if target in values.RESHAPES:
        return state if after is not None and _equal(after.numel(), before.numel()) else None
    if target not in values.ROW_MOVERS:
        return None
    return state if isinstance(state, Part) else _moved(node, before.shape, state, size)


def source_of(node: Node) -> Node | None:
    """The value that a node passes on."""
    args: Any = node.args
    source = args[1 if node.target in values.COPIES else 0] if args else None
    return source if isinstance(source, Node) else None


def sums_ranks(total: Node, read: Node, state: Places, size: int) -> bool:
    """Whether a sum or mean over dimensions adds up one value of each rank."""
    args: Any = total.args
    before = values.value(read)
    dims = args[1] if len(args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(state, Whole) or before is None or not isinstance(dims, list | tuple) or before.dim() < 2:
        return False
    shape: Any = before.shape
    places = sorted(d % len(shape) for d in dims if isinstance(d, int) and not _equal(shape[d], 1))
    if not places or places[-1] == len(shape) - 1 or places != list(range(places[0], places[-1] + 1)):
        return False
    return _equal(math.prod(shape[: places[0]]), state.outer) and _equal(math.prod(shape[d] for d in places), size)


def _equal(a: Any, b: Any) -> bool:
    return bool(compat.statically_true(a == b))


def _dim(shape: Any, outer: Any, size: int) -> int | None:
    """The dimension whose outermost factor is the ranks."""
    for d, n in enumerate(shape):
        if _equal(math.prod(shape[:d]), outer) and not _equal(n, 1):
            return d if _equal(n % size, 0) else None
    return None


def _piece(state: Places, index: Any, piece: Any) -> Places | None:
    """Of a split, or of a collective that brings several tensors."""
    if not isinstance(state, Pieces):
        return state
    if state.dim is None:
        return Part(index)
    return None if piece is None else Whole(math.prod(piece.shape[: state.dim]))


def _joined(node: Node, known: Mapping[Node, Places], size: int) -> Whole | None:
    """Parts that stand one behind another along a dimension."""
    args: Any = node.args
    pieces = args[0] if isinstance(args[0], list | tuple) else ()
    found = [known.get(p) if isinstance(p, Node) else None for p in pieces]
    whole: Any = values.value(node)
    if whole is None or [p.rank if isinstance(p, Part) else None for p in found] != list(range(size)):
        return None
    if not all(values.same_shape(p, pieces[0]) for p in pieces):
        return None
    dim = (args[1] if len(args) > 1 else node.kwargs.get("dim", 0)) % whole.dim()
    return Whole(math.prod(whole.shape[:dim]))


def _moved(node: Node, shape: Any, state: Whole, size: int) -> Places | None:
    args: Any = node.args
    ranks = _dim(shape, state.outer, size)
    if ranks is None:
        return None
    after: Any = values.value(node)
    if node.target in _PERMUTE or node.target in _TRANSPOSE or node.target in values.overloads("t.default"):
        order = list(range(len(shape)))
        if node.target in _PERMUTE:
            order = [d % len(shape) for d in args[1]]
        elif len(shape) > 1:
            a, b = args[1:3] if node.target in _TRANSPOSE else (0, 1)
            order[a], order[b] = order[b], order[a]
        return None if after is None else Whole(math.prod(after.shape[: order.index(ranks)]))
    first = args[1] if node.target in _SELECT | _SLICE | _UNBIND and len(args) > 1 else None
    if node.target in _SPLIT:
        first = args[2] if len(args) > 2 else node.kwargs.get("dim", 0)
    dim = (first or 0) % len(shape)
    if node.target in _SELECT and after is not None:
        if dim != ranks:
            return Whole(math.prod(after.shape[: ranks - (dim < ranks)]))
        return Part(args[2] % size) if _equal(shape[dim], size) else None
    if node.target in _SLICE and after is not None:
        return _sliced(node, shape, after.shape, ranks, dim, size)
    if node.target in _SPLIT | _UNBIND:
        gone = node.target in _UNBIND
        if dim != ranks:
            return Pieces(ranks - (gone and dim < ranks))
        pieces: Any = node.meta.get("val")
        alike = isinstance(pieces, list | tuple) and len(pieces) == size
        return Pieces() if alike and (gone or all(_equal(p.shape[dim] * size, shape[dim]) for p in pieces)) else None
    return None


def _sliced(node: Node, shape: Any, after: Any, ranks: int, dim: int, size: int) -> Places | None:
    args: Any = node.args
    if dim != ranks:
        return Whole(math.prod(after[:ranks]))
    start = (args[2] if len(args) > 2 else 0) or 0
    start = start.meta.get("val") if isinstance(start, Node) else start  # of a size known at run time
    one = after[dim]
    if (args[4] if len(args) > 4 else 1) != 1 or not _equal(one * size, shape[dim]):
        return None
    return next(
        (Part(rank) for rank in range(size) if _equal(start, rank * one) or _equal(start, (rank - size) * one)), None
    )
