"""The value of a scalar tensor that a compiled graph holds for good, and why another one is not known.

A buffer of a module is an input of its graph: Dynamo guards its shape and dtype, not its value, so a write into it between two
calls compiles nothing anew. A number that was folded from it would then be stale, and nobody would notice. What a graph
holds for good are literals: ``torch.tensor(8.0)`` in a forward (lifted, as torch calls it) and what fills a tensor with a number.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
from torch.fx import Node

from tpfuse import compat

from . import values
from .candidate import Term
from .reasons import Reason, Refusal

LIFTS = values.overloads("lift_fresh.default", "lift_fresh_copy.default")
FILLS = values.overloads("full.default")
SCALARS = values.overloads("scalar_tensor.default")
PICKS = values.RESHAPES | values.IDENTITIES | values.CASTS | values.overloads("select.int", "slice.Tensor")


def is_scalar(node: Node) -> bool:
    """Whether a node holds a tensor without dimensions."""
    tensor = values.value(node)
    return tensor is not None and tensor.dim() == 0


def multiplies_alike(scalar: Node, value: Node) -> bool:
    """Whether a scalar tensor has the dtype and device of a value, so that it is multiplied as it is, on every device."""
    one, other = values.value(scalar), values.value(value)
    return one is not None and other is not None and one.dtype == other.dtype and one.device == other.device


def scale_of(node: Node, dtype: torch.dtype | None) -> float | Refusal:
    """The value of a scalar tensor that values of ``dtype`` are multiplied by, as a number that gives the same bits.

    A number that ``dtype`` does not hold exactly is refused: whether it is rounded before it is multiplied depends on the device
    (a CPU multiplies by what the scalar holds, a GPU by what it loads in the dtype of the result).
    """
    found = _value(node)
    if isinstance(found, str):
        return Refusal(
            Reason.SCALE_NOT_CONSTANT,
            f"the sum is multiplied by {node.name}, {found}; numerics='relaxed' multiplies before it is reduced",
        )
    with compat.without_fake_mode():
        number = float(found.item())
        held = None if dtype is None else float(torch.tensor(number, dtype=torch.float64).to(dtype).item())
    if held != number:
        return Refusal(
            Reason.SCALE_NOT_CONSTANT,
            f"the sum is multiplied by {node.name}, which holds {number!r} as {found.dtype}: no value of {dtype}, so that its "
            "rounding depends on the device; numerics='relaxed' multiplies before it is reduced",
        )
    return number


def of_inputs(node: Node) -> bool:
    """Whether a scalar tensor is one value of an input of the graph, or arithmetic with such: no statistic of other values."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current.op != "call_function":
            continue
        sources = [a for a in current.all_input_nodes if values.value(a) is not None]
        random = torch.Tag.nondeterministic_seeded in getattr(current.target, "tags", ())
        if random or not (current.target in PICKS or all(is_scalar(a) for a in sources)):
            return False
        stack += [a for a in sources if a not in seen]
        seen.update(sources)
    return True


def held(terms: Iterable[Term]) -> dict[Node, torch.Tensor]:
    """The scalar tensors that became numbers, with their values."""
    numbers = (term.node for term in terms if term.kind == "scale" and term.operand is None)
    scalars = (a for node in numbers for a in node.all_input_nodes if is_scalar(a))
    found = {node: _value(node) for node in scalars}
    return {node: tensor for node, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def _value(node: Node) -> torch.Tensor | str:
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
                found = _value(source)
                dtype = values.dtype(node)
                return found if isinstance(found, str) or dtype is None else found.to(dtype)
            if node.target in values.IDENTITIES:
                return _value(source)
        return f"a scalar tensor that the graph computes ({node.target})"


def _attribute(node: Node) -> torch.Tensor | str:
    owner = node.graph.owning_module
    try:
        held = None if owner is None else reduce(getattr, str(node.target).split("."), owner)
    except AttributeError:
        held = None
    if not isinstance(held, torch.Tensor) or compat.is_fake(held) or held.is_meta or held.numel() != 1:
        return f"a constant ({node.target}) whose value the graph does not show"
    return held.detach().cpu()
