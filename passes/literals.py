"""The value of a scalar tensor that a compiled graph holds for good, and why another one is not known.

A buffer of a module is an input of its graph: Dynamo guards its shape and dtype, not its value, so a write into it between two
calls compiles nothing anew. A number that was folded from it would then be stale, and nobody would notice. What a graph
holds for good are literals: ``torch.tensor(8.0)`` in a forward (lifted, as torch calls it) and what fills a tensor with a number.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch.fx import Node

from tpfuse import compat

from . import values

LIFTS = values.overloads("lift_fresh.default", "lift_fresh_copy.default")
FILLS = values.overloads("full.default")
SCALARS = values.overloads("scalar_tensor.default")


def is_scalar(node: Node) -> bool:
    """Whether a node holds a tensor without dimensions."""
    tensor = values.value(node)
    return tensor is not None and tensor.dim() == 0


def literal(node: Node) -> torch.Tensor | str:
    """The tensor, on a CPU, or what stands in the way of knowing it."""
    with compat.without_fake_mode(), torch.no_grad():
        if node.op != "call_function":
            return f"an input of the graph ({node.op}), a buffer for example, whose value may change between calls"
        source = node.args[0] if node.args else None
        if node.target in LIFTS and isinstance(source, Node) and source.op == "get_attr":
            return _attribute(source)
        if node.target in FILLS and isinstance(node.args[1], int | float):
            return torch.full((), node.args[1], dtype=values.dtype(node))
        if node.target in SCALARS and isinstance(source, int | float):
            return torch.scalar_tensor(source, dtype=values.dtype(node))
        if isinstance(source, Node) and is_scalar(source):
            if node.target in values.CASTS:
                found = literal(source)
                dtype = values.dtype(node)
                return found if isinstance(found, str) or dtype is None else found.to(dtype)
            if node.target in values.IDENTITIES:
                return literal(source)
        return f"a scalar tensor that the graph computes ({node.target})"


def number(node: Node) -> float | None:
    """The value as a number, NaN excepted; None where it is not known."""
    held = literal(node)
    with compat.without_fake_mode():
        found = held.item() if isinstance(held, torch.Tensor) and held.dtype.is_floating_point else math.nan
    return None if math.isnan(found) else float(found)


def _attribute(node: Node) -> torch.Tensor | str:
    owner = node.graph.owning_module
    try:
        held = None if owner is None else reduce(getattr, str(node.target).split("."), owner)
    except AttributeError:
        held = None
    if not isinstance(held, torch.Tensor) or compat.is_fake(held) or held.is_meta or held.numel() != 1:
        return f"a constant ({node.target}) whose value the graph does not show"
    return held.detach().cpu()
