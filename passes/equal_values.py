"""Prove: a value that is the same on all ranks of a reduction, which one rank's graph shows only of what ranks made together."""

from __future__ import annotations

import torch.distributed as dist
from torch.fx import Node

from . import collectives, values
from .values import ADD, MUL

GATHERED = frozenset({"all_reduce", "all_reduce_", "all_gather_into_tensor", "broadcast"})
POINTWISE = values.RESHAPES | values.IDENTITIES | values.CASTS | ADD | MUL
POINTWISE |= values.overloads(
    "sigmoid.default", "silu.default", "tanh.default", "exp.default", "neg.default", "reciprocal.default", "div.Tensor",
    "sub.Tensor", "mm.default", "bmm.default", "sum.dim_IntList", "mean.dim", "amax.default", "_softmax.default",
)  # fmt: skip
DEPTH = 64


def unequal(node: Node, ranks: tuple[int, ...]) -> str | None:
    """What a value depends on that may differ between ``ranks``; None where it is proved to be equal on all of them.

    Equal are results of reductions and gathers over at least these ranks, and what is computed from them alone. A number that
    was written into the graph may come from the rank, so products and sums with one prove nothing; neither does an input of the
    graph, which may be one rank's part of a weight.
    """
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current.op == "call_function" and current.target is collectives.WAIT:
            start = current.args[0]
            assert isinstance(start, Node)
            name = getattr(getattr(start.target, "overloadpacket", None), "__name__", "")
            names = [a for a in (*start.args, *start.kwargs.values()) if isinstance(a, str)]
            members = collectives.group_ranks(names[-1])[0] if names else ()
            if name in GATHERED and set(ranks) <= set(members) and dist.get_rank() in members:
                continue
            return f"depends on {start.name} over {list(members)}"
        numbers = [a for a in (*current.args, *current.kwargs.values()) if isinstance(a, int | float)]
        computes = current.target in ADD | MUL or current.target in values.overloads("div.Tensor", "sub.Tensor")
        if current.op != "call_function" or current.target not in POINTWISE or (computes and numbers):
            return f"depends on {current.name}"
        sources = [a for a in current.all_input_nodes if a not in seen]
        seen.update(sources)
        stack.extend(sources)
        if len(seen) > DEPTH:
            return f"depends on more than {DEPTH} values"
    return None
