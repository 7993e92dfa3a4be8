"""Find: a sum that is added to something in fp32, and rounded to its dtype behind that add or not at all.

Two things are spelled like this. Where the fp32 value is only rounded, the add is one of the sum's own dtype: adding two
16-bit values in fp32 and rounding gives the bits of their own add (Figueroa, "When is double rounding innocuous?", 1995), and
that is how torch computes it. Where a norm reads the fp32 value, it reads the sum before it is rounded: a flavour of its own.
What is added may also have been fp32 all along: under autocast the residual is, and is never rounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node
from tpfuse.ops.reference import NARROW

from . import values
from .reasons import Reason, Refusal


@dataclass(frozen=True)
class WideAdd:
    """``sum.float() + other.float()``.

    Attributes:
        node: the add, fp32.
        mine: the operand of it that is the sum.
        other: what is added: in the dtype of the sum, before it was widened, or, where it never had that, fp32.
        path: the nodes between the sum and the add: aliases, the cast, aliases.
        given: the same as the add reads it: fp32, or ``other`` where the add itself widens it.
        casts: the nodes that widen ``other``.
        result: the fp32 value under all its names.
        rounded: readers that round it to the dtype of the sum.
        readers: the others.
    """

    node: Node
    mine: Node
    other: Node
    given: Node
    path: tuple[Node, ...]
    casts: tuple[Node, ...]
    result: values.Aliases
    rounded: tuple[Node, ...]
    readers: tuple[Node, ...]

    @property
    def stays(self) -> bool:
        """Whether what is added is taken as it is, fp32, so that the fp32 value is the residual to come."""
        return self.other is self.given and values.dtype(self.given) == torch.float32

    def unrounded(self) -> WideAdd:
        """The same add, of the operand in fp32."""
        return replace(self, other=self.given, casts=())


def find(current: values.Aliases, order: dict[Node, int]) -> WideAdd | Refusal | None:
    """The add in fp32 that alone reads a 16-bit sum; None when something else reads it."""
    dtype = values.dtype(current.root)
    if dtype is None or dtype not in NARROW or len(current.readers) != 1:
        return None
    add = current.readers[0]
    mine, path = _read_by(current, add)
    if add.target in values.CASTS:
        if values.dtype(add) != torch.float32 or values.moves(add):
            return None
        widened = values.aliases(add, order)
        if len(widened.readers) != 1:
            return None
        path = (*path, add)
        add = widened.readers[0]
        mine, more = _read_by(widened, add)
        path += more
    if add.target not in values.ADD or add.kwargs.get("alpha", 1) != 1 or values.dtype(add) != torch.float32:
        return None
    others = [a for a in add.args if isinstance(a, Node) and a is not mine]
    if len(others) != 1:
        return None  # a number, or the sum itself
    other, casts = _before_widening(others[0], dtype) or (others[0], ())
    result = values.aliases(add, order)
    rounded = tuple(r for r in result.readers if r.target in values.CASTS and values.dtype(r) == dtype)
    readers = tuple(r for r in result.readers if r not in rounded)
    if values.dtype(other) == torch.float32 and not readers:
        return Refusal(
            Reason.DTYPE,
            f"the sum is {dtype}, what is added to it, {other.name}, is torch.float32 and was never {dtype}; their sum is "
            f"read only where it is cast to {dtype}, by {rounded[0].name if rounded else 'nothing'}: an addend in fp32, such as "
            f"an adapter's. Add it to the partial sum before the reduction (tpfuse.hf.parallelize cuts LoRA so), or cast "
            f"{other.name} to {dtype} before the add",
        )
    if values.dtype(other) not in (dtype, torch.float32):
        return Refusal(Reason.DTYPE, f"the sum is {dtype}, what is added to it, {other.name}, is {values.dtype(other)}")
    return WideAdd(add, mine, other, others[0], path, casts, result, rounded, readers)


def _read_by(value: values.Aliases, reader: Node) -> tuple[Node, tuple[Node, ...]]:
    name = next(a for a in reader.all_input_nodes if a in value)
    return name, tuple(value.path(name))


def _before_widening(node: Node, dtype: torch.dtype) -> tuple[Node, tuple[Node, ...]] | None:
    """The value of ``dtype`` that ``node`` holds in fp32, and the nodes between; None when it was never of ``dtype``."""
    between: list[Node] = []
    start = node
    while values.dtype(node) != dtype:
        source = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(source, Node):
            return None
        cast = node.target in values.CASTS and values.dtype(source) == dtype and not values.moves(node)
        if not cast and not values.is_alias(node, source):
            return None
        between.append(node)
        node = source
    return (node, tuple(between[::-1])) if node is start or values.same_rows(node, start) else None
