"""Find: a sum that is taken in fp32 and rounded to 16 bits before anything is added to it.

Experts that are combined in fp32 and the fp32 reductions of Megatron and GPT-NeoX are such sums. The fused op takes them as they
are: it rounds once, to the dtype of its residual, and everything behind it is as for a sum of that dtype.
"""

from __future__ import annotations

import torch
from torch.fx import Node
from tpfuse.ops.reference import NARROW

from . import values
from .reasons import Reason, Refusal


def find(current: values.Aliases) -> tuple[Node, ...]:
    """What leads from an fp32 sum to its rounded value, the cast last; nothing where something else reads the sum."""
    if values.dtype(current.root) != torch.float32 or len(current.readers) != 1:
        return ()
    cast = current.readers[0]
    if cast.target not in values.CASTS or values.dtype(cast) not in NARROW or values.moves(cast):
        return ()
    source = cast.args[0]
    return (*current.path(source), cast) if isinstance(source, Node) and source in current else ()


def refusal(narrowed: tuple[Node, ...], residual: Node | None, block: bool) -> Refusal | None:
    """Why the fused op cannot round the sum as the graph does; None when it can.

    Args:
        narrowed: as of :func:`find`.
        residual: what is added last.
        block: each rank keeps some rows of the sum.
    """
    if not narrowed:
        return None
    cast = narrowed[-1]
    rounds = f"the sum is torch.float32 and rounded to {values.dtype(cast)} by {cast.name}"
    if block:
        return Refusal(
            Reason.DTYPE, f"{rounds}; the op for rows that a rank keeps takes no sum that is wider than its residual"
        )
    if residual is None:
        return Refusal(Reason.DTYPE, f"{rounds}; the fused op rounds to the dtype of a residual, and none is added")
    if values.dtype(residual) != values.dtype(cast):
        return Refusal(
            Reason.DTYPE,
            f"{rounds}; what is added to it, {residual.name}, is {values.dtype(residual)}, and the fused op rounds to the "
            "dtype of its residual",
        )
    return None
