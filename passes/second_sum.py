"""Find: another sum that meets a candidate's own sum in one norm, over bias vectors, reshapes and the residual.

Parallel blocks (attention and MLP read one norm) and MoE layers with shared experts have such sums. They are added in one of
three orders, which :class:`~tpfuse.passes.candidate.Merged` names. Whether one op may make both is for :mod:`.merged` to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Node
from tpfuse.ops.reference import NARROW

from . import region, values
from .candidate import Candidate, Merged
from .collectives import Collective
from .dead_ends import add_chain
from .reasons import Refusal
from .values import ADD, MUL


@dataclass(frozen=True)
class _Way:
    """The way from a sum to a value: ``nodes`` in order behind the sum.

    Attributes:
        factor: what one of them multiplies it by, or None.
        bias: the vector that one of them adds, behind the factor; or None.
    """

    other: Collective
    nodes: tuple[Node, ...]
    factor: Node | float | None
    bias: Node | None

    def merged(self, order: str, operand: Node, more: tuple[Node, ...] = ()) -> Merged:
        return Merged(self.other, (*self.nodes, *more), self.factor, self.bias, order, operand)


def by_node(found: Iterable[Collective]) -> dict[Node, Collective]:
    """Every finished sum of a graph by the nodes that hold it."""
    return {name: c for c in found for name in (c.value, *c.waits)}


def lonely(candidate: Candidate, sums: Mapping[Node, Collective]) -> Refusal | None:
    """The refusal of an RMSNorm's addend behind a vector, unless another sum over the same ranks is added too.

    The op for RMSNorm takes the two only where it makes that sum as well.
    """
    if candidate.addend is None or candidate.norm.kind == "layer_norm":
        return None
    for operand in (candidate.addend, candidate.residual):
        way = None if operand is None else _way(operand, sums)
        if way is not None and way.other.ranks == candidate.collective.ranks:
            return None
    return add_chain([term.kind for term in candidate.terms if term.kind != "factor"])


def meetings(candidate: Candidate, sums: Mapping[Node, Collective], order: Mapping[Node, int]) -> Iterator[Candidate]:
    """The candidate with another sum in place of one of its operands, for each operand that comes from one.

    Args:
        sums: as of :func:`by_node`.
        order: node positions.
    """
    if candidate.factor is not None:
        return
    full = candidate.addend or (candidate.bias if _is_full(candidate, candidate.bias) else None)
    if full is not None:
        way = _way(full, sums)
        if way is not None:
            yield replace(_without(candidate, full), merged=way.merged("together", full))
    operand = candidate.residual
    scaled = candidate.scale != 1.0 or candidate.scale_tensor is not None
    if operand is None or candidate.post_add is not None or candidate.rounded is not None or scaled:
        return
    way = _way(operand, sums)
    if way is not None and full is None:
        bare = replace(candidate, residual=None, merged=way.merged("together", operand))
        yield bare if candidate.norm.kind == "layer_norm" else region.post(bare, dict(order))
    elif way is not None and full is not None:
        bare = _without(candidate, full)
        yield replace(bare, residual=full, merged=way.merged("own_first", operand))
    elif full is None:
        yield from _behind_the_residual(candidate, operand, sums)


def _behind_the_residual(candidate: Candidate, operand: Node, sums: Mapping[Node, Collective]) -> Iterator[Candidate]:
    """``(residual + other) + own``: what is added to the own sum is itself a residual and a sum."""
    add, names = _origin(operand)
    if add.target not in ADD or add.kwargs.get("alpha", 1) != 1:
        return
    pair = [a for a in add.args if isinstance(a, Node)]
    if len(pair) != 2 or pair[0] is pair[1]:
        return
    for theirs, residual in (pair, pair[::-1]):
        way = _way(theirs, sums)
        whole = all(values.same_rows(n, add) and values.dtype(n) == values.dtype(add) for n in pair)
        if way is not None and whole:
            yield replace(candidate, residual=residual, merged=way.merged("other_first", operand, (add, *names)))


def _origin(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """The node that computes a value, and the names of it that lead to ``node``."""
    names: list[Node] = []
    while True:
        source = values.aliased(node)
        if source is None:
            return node, tuple(reversed(names))
        names.append(node)
        node = source


def _is_full(candidate: Candidate, node: Node | None) -> bool:
    return node is not None and any(t.kind == "full" and t.operand is node for t in candidate.terms)


def _without(candidate: Candidate, full: Node) -> Candidate:
    return replace(candidate, addend=None) if candidate.addend is full else replace(candidate, bias=None)


def _way(node: Node, sums: Mapping[Node, Collective]) -> _Way | None:
    """The sum behind a value that is added, or None when it is something else."""
    path: list[Node] = []
    factor: Node | float | None = None
    bias: Node | None = None
    while node not in sums:
        source = values.aliased(node)
        if source is None and node.target in values.CASTS:
            source = _rounded(node, sums)
        elif source is None and node.target in MUL and factor is None:
            source, factor = _scaled(node, sums)
        elif source is None and node.target in ADD and factor is None and bias is None:
            source, bias = _biased(node)
        if source is None:
            return None
        path.append(node)
        node = source
    return _Way(sums[node], tuple(reversed(path)), factor, bias)


def _rounded(node: Node, sums: Mapping[Node, Collective]) -> Node | None:
    """The fp32 sum that a cast rounds to 16 bits before anything else is done with it; None for any other cast."""
    mine = node.args[0]
    if not isinstance(mine, Node) or values.moves(node) or _origin_in(mine, sums) is None:
        return None
    return mine if values.dtype(mine) == torch.float32 and values.dtype(node) in NARROW else None


def _biased(node: Node) -> tuple[Node | None, Node | None]:
    """(what a vector is added to, the vector)."""
    for mine, vector in (node.args[:2], tuple(reversed(node.args[:2]))):
        if not isinstance(mine, Node) or not isinstance(vector, Node) or node.kwargs.get("alpha", 1) != 1:
            continue
        tensor, hidden = values.value(vector), values.width(mine)
        fits = values.same_rows(node, mine) and values.dtype(node) == values.dtype(mine) == values.dtype(vector)
        if fits and tensor is not None and tensor.dim() == 1 and isinstance(hidden, int):
            whole = values.value(mine)
            if values.is_vector(vector, hidden) and whole is not None and whole.dim() > 1:
                return mine, vector
    return None, None


def _scaled(node: Node, sums: Mapping[Node, Collective]) -> tuple[Node | None, Node | float | None]:
    """(the sum, the factor) of a product of a sum and a number or a value a row."""
    for mine, factor in (node.args[:2], tuple(reversed(node.args[:2]))):
        if not isinstance(mine, Node) or not values.same_rows(node, mine) or values.dtype(node) != values.dtype(mine):
            continue
        if _origin_in(mine, sums) is None:
            continue
        if isinstance(factor, int | float):
            return mine, float(factor)
        if isinstance(factor, Node) and values.width(factor) == 1 and values.width(mine) != 1:
            return mine, factor
    return None, None


def _origin_in(node: Node, sums: Mapping[Node, Collective]) -> Node | None:
    """The finished sum of which ``node`` is a name, or None."""
    source: Node | None = node
    while source is not None and source not in sums:
        source = values.aliased(source)
    return source
