"""Find: what the one reader of a sum does to it, as a step towards the norm."""

from __future__ import annotations

import math
from dataclasses import replace

from torch.fx import Node

from . import constants, equal_values, literals, values
from .candidate import Term
from .collectives import Collective
from .reasons import Reason, Refusal
from .values import ADD, DIV, MUL, shape_of
from .widened import WideAdd


def term_of(current: values.Aliases) -> Term | Refusal | None:
    """The one reader as a step towards the norm."""
    if len(current.readers) != 1:
        return None
    reader = current.readers[0]
    if reader.target in MUL:
        factor = next((a for a in reader.args if isinstance(a, int | float)), None)
        tensor = _scalar_operand(current)
        if factor is None and tensor is not None:
            known = constants.scale_of(tensor, values.dtype(current.root))
            if isinstance(known, Refusal):
                # Each rank multiplies the reduced sum by what its own tensor holds then, as the model does.
                return Term("scale", reader, tensor) if constants.multiplies_alike(tensor, current.root) else known
            factor = known
        if factor is None and tensor is None:
            gate = _gate_of_rows(current)
            return None if gate is None else Term("scale", reader, gate)
        return None if factor is None else Term("scale", reader, None, float(factor))
    if reader.target in DIV:
        return _quotient(current, reader)
    if reader.target not in ADD:
        return None
    if reader.kwargs.get("alpha", 1) != 1:
        return Refusal(Reason.UNKNOWN_FLAVOUR, f"{reader.name} adds with alpha={reader.kwargs['alpha']}")
    operands = [a for a in reader.args if isinstance(a, Node)]
    mine = [a for a in operands if a in current]
    other = next((a for a in operands if a not in current), None)
    if len(operands) == 1 and mine:
        return Refusal(
            Reason.RESIDUAL_SHAPE,
            f"{reader.name} adds a number to the sum; the op adds a vector or a tensor of the sum's shape",
        )
    if other is None:
        return Refusal(Reason.RESIDUAL_DERIVED, f"{reader.name} adds the sum to itself") if mine else None
    if values.dtype(other) != values.dtype(current.root):
        return Refusal(Reason.DTYPE, f"the sum is {values.dtype(current.root)}, {other.name} is {values.dtype(other)}")
    return _added(reader, mine[0], other)


def _quotient(current: values.Aliases, reader: Node) -> Term | Refusal | None:
    """The sum divided by a number, as a mean over the ranks is: a scale where the reciprocal is exact, so that no bit differs."""
    by = reader.args[1]
    if reader.args[0] not in current or isinstance(by, bool) or not isinstance(by, int | float):
        return None
    if values.dtype(reader) != values.dtype(current.root):
        return None
    mantissa, exponent = math.frexp(by)
    if abs(mantissa) == 0.5 and abs(exponent) < 100:
        return Term("scale", reader, None, 1.0 / by)
    return Refusal(
        Reason.SCALE_NOT_CONSTANT,
        f"{reader.name} divides the sum by {by}, and the op multiplies, which rounds differently unless the number is a power of "
        "two. Multiply by the reciprocal",
    )


def _scalar_operand(current: values.Aliases) -> Node | None:
    """The scalar tensor that the one reader multiplies a value by, in the value's dtype."""
    (reader,) = current.readers
    if values.dtype(reader) != values.dtype(current.root):
        return None
    return next((a for a in reader.args if isinstance(a, Node) and a not in current and literals.is_scalar(a)), None)


def _gate_of_rows(current: values.Aliases) -> Node | None:
    """What the one reader multiplies a value by, one value for each row, ``(..., 1)``, in the value's dtype: a gate."""
    (reader,) = current.readers
    whole = values.value(current.root)
    if whole is None or not values.same_shape(reader, current.root) or values.dtype(reader) != whole.dtype:
        return None
    gate = next((a for a in reader.args if isinstance(a, Node) and a not in current), None)
    have = None if gate is None else values.value(gate)
    if gate is None or have is None or not values.same_sizes(have.shape, (*whole.shape[:-1], 1)):
        return None
    return gate if constants.multiplies_alike(gate, current.root) else None


def factor_of(c: Collective, current: values.Aliases, term: Term | Refusal | None) -> Term | Refusal | None:
    """With relaxed numerics: the sum times a scalar tensor is the sum of what the ranks give, each times that tensor."""
    if not isinstance(term, Refusal) or term.reason is not Reason.SCALE_NOT_CONSTANT:
        return term
    scalar = _scalar_operand(current)
    assert scalar is not None
    own = own_of_a_rank(scalar, c.ranks)
    if own is not None:
        return Refusal(Reason.SCALE_NOT_CONSTANT, f"the sum is multiplied by {scalar.name}, which {own}")
    return Term("factor", current.readers[0], scalar)


def own_of_a_rank(scalar: Node, ranks: tuple[int, ...]) -> str | None:
    """Why each rank may have a scalar of its own: then the sum of the products is not the product with the sum.

    A parameter or buffer that is one value, or one value of a vector, is held to be a copy of the same on all ranks, as models
    are cut. What is computed from a tensor must come from values that the ranks have reduced or gathered.
    """
    unproved = equal_values.unequal(scalar, ranks)
    return unproved if unproved is None or not constants.of_inputs(scalar) else None


def _added(add: Node, mine: Node, other: Node) -> Term | Refusal:
    """What an add of ``other`` to the sum, known as ``mine``, is."""
    hidden = values.width(mine)
    fits = values.same_rows(other, mine)
    if isinstance(hidden, int) and values.is_vector(other, hidden) and values.same_rows(add, mine):
        # A tensor of one row is a residual where the sum has one row too, unless its shape says vector.
        tensor = values.value(other)
        if not fits or (tensor is not None and tensor.dim() == 1 and not values.same_shape(other, mine)):
            return Term("bias", add, other)
    if not fits or not values.same_rows(add, mine):
        shapes = f"{shape_of(other)} to {shape_of(mine)}"
        return Refusal(Reason.RESIDUAL_SHAPE, f"{add.name} adds {other.name}: {shapes}")
    return Term("full", add, other)


def wide_term(wide: WideAdd) -> Term | Refusal:
    """The add in fp32 as a step towards a norm that reads it unrounded."""
    term = _added(wide.node, wide.mine, wide.other)
    return term if isinstance(term, Refusal) else replace(term, path=wide.path, casts=wide.casts)


def rounded_term(wide: WideAdd) -> Term | Refusal:
    """The add in fp32 with the cast behind it: an add in the dtype of the sum."""
    term = wide_term(wide)
    if isinstance(term, Refusal):
        return term
    if len(wide.rounded) != 1 or wide.rounded[0].args[0] is not wide.node:
        names = ", ".join(n.name for n in wide.result.readers) or "nothing"
        return Refusal(
            Reason.DTYPE, f"{wide.node.name} adds in fp32, and is read by {names}, expected one cast to the sum's dtype"
        )
    return replace(term, node=wide.rounded[0], path=(*term.path, wide.node))
