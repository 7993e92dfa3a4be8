"""The value of a scalar tensor that sums are multiplied by, and what such a scalar is made of."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from tpfuse import compat

from . import values
from .candidate import Term
from .literals import is_scalar, literal
from .reasons import Reason, Refusal

PICKS = values.RESHAPES | values.IDENTITIES | values.CASTS | values.overloads("select.int", "slice.Tensor")


def multiplies_alike(scalar: Node, value: Node) -> bool:
    """Whether a scalar tensor has the dtype and device of a value, so that it is multiplied as it is, on every device."""
    one, other = values.value(scalar), values.value(value)
    return one is not None and other is not None and one.dtype == other.dtype and one.device == other.device


def scale_of(node: Node, dtype: torch.dtype | None) -> float | Refusal:
    """The value of a scalar tensor that values of ``dtype`` are multiplied by, as a number that gives the same bits.

    A number that ``dtype`` does not hold exactly is refused: whether it is rounded before it is multiplied depends on the device
    (a CPU multiplies by what the scalar holds, a GPU by what it loads in the dtype of the result).
    """
    found = literal(node)
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
    found = {node: literal(node) for node in scalars}
    return {node: tensor for node, tensor in found.items() if isinstance(tensor, torch.Tensor)}
