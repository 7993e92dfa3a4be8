"""Which memory a node's value lies in, and which memory a node writes: asked of torch's fake tensors and schemas.

A view of any kind shares the storage of its base, whatever operator made it, so nothing here lists views.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from tpfuse import compat


def of(node: Node) -> frozenset[int]:
    """The storages of a node's value (of each tensor in it); empty where the graph does not say."""
    found = node.meta.get("val", node.meta.get("example_value"))
    tensors = found if isinstance(found, list | tuple) else [found]
    storages = (compat.storage_of(t) for t in tensors if isinstance(t, torch.Tensor))
    return frozenset(s for s in storages if s is not None)


def mutates(node: Node) -> bool:
    """Whether the node writes memory that it did not make."""
    return node.op in ("call_function", "call_method") and compat.is_mutation(node)


def written(node: Node) -> frozenset[int] | None:
    """The storages that a mutating node writes; None when that cannot be told."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    found: set[int] = set()
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        arg: Any = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        for item in arg if isinstance(arg, list | tuple) else [arg]:
            if isinstance(item, Node):
                storages = of(item)
                if not storages:
                    return None
                found |= storages
    return frozenset(found)
