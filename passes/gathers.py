"""Find: the all-gather behind a norm of own rows, and proof that it puts the blocks back where the reduction took them from.

Sequence parallelism: a reduce-scatter gives each rank its block, the rank adds and norms it, an all-gather gives every rank
all blocks. The fused op does the gather too where the rank lists of both are equal, in order: never their sizes or names. What
DTensor puts behind a gather along another dimension (split, cat) reads the gathered rows and stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from . import collectives, values

if TYPE_CHECKING:
    from .candidate import Candidate

GATHERS = frozenset(
    packet.default
    for space in ("_c10d_functional", "_c10d_functional_autograd")
    if (packet := getattr(getattr(torch.ops, space), "all_gather_into_tensor", None)) is not None
)


@dataclass(frozen=True)
class Gather:
    """All-gathers of one norm, which the fused op does.

    Attributes:
        starts: the nodes that start them.
        results: the nodes that hold all rows (their waits).
        nodes: both, and the names of the norm that they read.
    """

    starts: tuple[Node, ...]
    results: tuple[Node, ...]
    nodes: tuple[Node, ...]


def find(candidate: Candidate, order: dict[Node, int]) -> tuple[Gather | None, str]:
    """The gather of a candidate's norm, and a sentence where there is one that stays a collective of its own."""
    c, block = candidate.collective, candidate.block
    normed = values.aliases(candidate.norm.out, order)
    found = [reader for reader in normed.readers if reader.target in GATHERS]
    if block is None or not found:
        return None, ""
    stays = f"{found[0].name}, the gather of the norm, stays outside: "
    for node in found:
        _, group_size, group = (*node.args, None, None, None)[:3]
        ranks, _, error = collectives.group_ranks(group)
        if ranks != c.ranks or error:
            return None, stays + f"it is over {list(ranks)}, the sum over {list(c.ranks)}"
        if group_size != len(ranks) or any(user.target is not collectives.WAIT for user in node.users):
            return None, stays + "it is not read through a wait, or its size is not that of its group"
    if block.nodes:
        # On this rank the slice may be a whole block and on another less, whose gather then reads rows that fill it up: the
        # ranks would decide differently, and wait for each other.
        return None, stays + "each rank slices its rows out of an all-reduce, and another one may keep fewer"
    other = next((reader for reader in normed.readers if reader not in found), None)
    if other is not None:
        return None, stays + f"{other.name} ({other.target}) reads the own rows of the norm as well"
    returned = [node for node in found if any(_leaves(wait, order) for wait in node.users)]
    if len(returned) > 1:
        # Two tensors, which the caller may write in place one by one; the fused op gives one.
        return (
            None,
            stays + f"the graph returns what {' and '.join(n.name for n in returned)} gather, each in its own memory",
        )
    names = [name for node in found for name in normed.path(node.args[0])]  # type: ignore[arg-type]
    results = [wait for node in found for wait in node.users]
    return Gather(tuple(found), tuple(results), tuple(dict.fromkeys([*names, *found, *results]))), ""


def _leaves(node: Node, order: dict[Node, int]) -> bool:
    """Whether a value is an output of the graph, under any of its names."""
    return any(reader.op == "output" for reader in values.aliases(node, order).readers)
