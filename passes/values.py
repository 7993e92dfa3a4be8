"""Small questions about graph nodes that every step of the pass asks: shapes, dtypes, aliases, order.

An *alias* of a value is another node that holds the same numbers in the same rows: a view that keeps the last dimension,
a clone, a detach, a copy into another buffer, a cast to the dtype it already has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from tpfuse import compat

aten = torch.ops.aten
prims = torch.ops.prims


def overloads(*names: str) -> frozenset[Any]:
    """The ATen or prims overloads that exist in this torch, by ``packet.overload``."""
    found = []
    for name in names:
        packet_name, overload = name.split(".")
        space = prims if packet_name.startswith("prims::") else aten
        packet = getattr(space, packet_name.removeprefix("prims::"), None)
        if packet is not None and overload in packet.overloads():
            found.append(getattr(packet, overload))
    return frozenset(found)


RESHAPES = overloads(
    "view.default",
    "_unsafe_view.default",
    "reshape.default",
    "unsqueeze.default",
    "squeeze.dim",
    "squeeze.dims",
    "squeeze.default",
    "expand.default",
    "flatten.using_ints",
    # What views become where a compiler wants no aliases (Torch-TensorRT's decompositions).
    "_reshape_copy.default",
    "view_copy.default",
)
EXPANDS = overloads("expand.default")
IDENTITIES = overloads(
    "clone.default",
    "detach.default",
    "alias.default",
    "contiguous.default",
    "lift_fresh.default",
    "lift_fresh_copy.default",
)
COPIES = overloads("copy.default")
# torch.export checks dtype and device of casted values at run time; such a check reads the value and needs nothing of it.
CHECKS = overloads("_assert_tensor_metadata.default")
ADD = overloads("add.Tensor")
MUL = overloads("mul.Tensor", "mul.Scalar")
DIV = overloads("div.Tensor", "div.Scalar")
CASTS = overloads("_to_copy.default", "to.dtype", "prims::convert_element_type.default")
ROW_MOVERS = overloads(
    "slice.Tensor",
    "select.int",
    "index.Tensor",
    "index_select.default",
    "gather.default",
    "permute.default",
    "transpose.int",
    "t.default",
    "cat.default",
    "split.Tensor",
    "split_with_sizes.default",
    "narrow.default",
    "roll.default",
    "flip.default",
    "index_put.default",
    "slice_scatter.default",
    "index_add.default",
    "scatter.src",
    "unbind.int",
    "chunk.default",
)


def value(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node, or None when the node holds something else."""
    found = node.meta.get("val", node.meta.get("example_value")) if isinstance(node, Node) else None
    return found if isinstance(found, torch.Tensor) else None


def dtype(node: Node) -> torch.dtype | None:
    tensor = value(node)
    return None if tensor is None else tensor.dtype


def width(node: Node) -> Any:
    """Size of the last dimension (an int, or symbolic), or None without one."""
    tensor = value(node)
    return tensor.shape[-1] if tensor is not None and tensor.dim() > 0 else None


def moves(node: Node) -> bool:
    """Whether a node, a cast for example, may bring its first argument to another device."""
    new, old = value(node), value(node.args[0])
    return new is None or old is None or new.device != old.device


def same_shape(a: Node, b: Node) -> bool:
    """Whether two nodes provably have one shape; adds no guard."""
    x, y = value(a), value(b)
    return x is not None and y is not None and same_sizes(x.shape, y.shape)


def without_leading_ones(sizes: Any) -> tuple[Any, ...]:
    """A shape without the dimensions of size one in front: two values whose shapes agree but for those hold the same rows."""
    start = 0
    while start < len(sizes) - 1 and compat.statically_true(sizes[start] == 1):
        start += 1
    return tuple(sizes[start:])


def same_sizes(a: Any, b: Any) -> bool:
    """Whether two shapes are provably equal; adds no guard."""
    return len(a) == len(b) and all(compat.statically_true(m == n) for m, n in zip(a, b, strict=True))


def same_rows(a: Node, b: Node) -> bool:
    """Whether two nodes hold the same rows: equal shapes up to leading dimensions of size one."""
    x, y = value(a), value(b)
    if x is None or y is None or not x.dim() or not y.dim():
        return False
    return same_sizes(without_leading_ones(x.shape), without_leading_ones(y.shape))


def is_vector(node: Node, hidden: int) -> bool:
    """Whether the node is one value per column: shape ``(H,)`` or ``(1, ..., 1, H)``."""
    tensor = value(node)
    if tensor is None or tensor.dim() == 0:
        return False
    return all(compat.statically_true(size == 1) for size in tensor.shape[:-1]) and compat.statically_true(
        tensor.shape[-1] == hidden
    )


def aliased(node: Node) -> Node | None:
    """The input of which a node is another name, or None where it computes a value."""
    return next((a for a in node.all_input_nodes if is_alias(node, a)), None)


def is_alias(node: Node, source: Node) -> bool:
    """Whether ``node`` holds the numbers of ``source`` in the same rows."""
    if node.op != "call_function":
        return False
    new, old = value(node), value(source)
    if new is None or old is None or new.dtype != old.dtype or new.device != old.device:
        return False
    if node.target in IDENTITIES or node.target in CASTS:
        return node.args[0] is source
    if node.target in COPIES:
        return node.args[1] is source and node.args[0] is not source and same_shape(node, source)
    if node.target not in RESHAPES or node.args[0] is not source:
        return False
    if old.dim() == 0 or new.dim() == 0 or not compat.statically_true(new.shape[-1] == old.shape[-1]):
        return False
    # expand() keeps the last dimension too, but repeats rows unless the number of rows stays.
    return node.target not in EXPANDS or same_shape(node, source)


@dataclass
class Aliases:
    """A value under all its names.

    Attributes:
        root: the node that computes it.
        parent: for every other name, the name it was made from.
        readers: nodes outside the class that read one of its names, in graph order, without duplicates.
    """

    root: Node
    parent: dict[Node, Node] = field(default_factory=dict)
    readers: list[Node] = field(default_factory=list)

    @property
    def names(self) -> list[Node]:
        return [self.root, *self.parent]

    def __contains__(self, node: object) -> bool:
        return node is self.root or node in self.parent

    def path(self, name: Node) -> list[Node]:
        """The alias nodes that lead from the root to ``name``, in order, without the root."""
        steps: list[Node] = []
        while name is not self.root:
            steps.append(name)
            name = self.parent[name]
        return steps[::-1]


def aliases(root: Node, order: dict[Node, int], also: tuple[Node, ...] = ()) -> Aliases:
    """All names of ``root`` and their readers. ``also`` are further nodes known to hold the same value."""
    found = Aliases(root)
    for other in also:
        if other is not root:
            found.parent[other] = root
    queue = list(found.names)
    readers: set[Node] = set()
    while queue:
        name = queue.pop()
        for user in name.users:
            if user in found:
                continue
            if is_alias(user, name):
                found.parent[user] = name
                readers.discard(user)
                queue.append(user)
            elif not is_dead(user):
                readers.add(user)
    found.readers = sorted((r for r in readers if r not in found), key=order.__getitem__)
    return found


def is_dead(node: Node) -> bool:
    """A node without readers and without effects: dead code that some mounts have not yet removed, and export's checks."""
    return not node.users and node.op == "call_function" and (node.target in CHECKS or not node.is_impure())


def depends_on(node: Node, source: Node, order: dict[Node, int]) -> bool:
    """Whether ``node`` is computed from ``source``. Looks only at nodes between the two."""
    start = order[source]
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current is source:
            return True
        if current in seen or order[current] < start:
            continue
        seen.add(current)
        stack.extend(current.all_input_nodes)
    return False


def shape_of(node: Node) -> str:
    """The shape of a value in words, symbols as their hints."""
    tensor = value(node)
    return "?" if tensor is None else str(tuple(compat.size_hint(n) for n in tensor.shape))
