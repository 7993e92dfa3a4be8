"""Find: the all-gather behind the norm of own rows, and proof that it puts together what the reduction took apart.

Sequence parallelism: a reduce-scatter gives each rank its block, the rank adds and norms it, an all-gather gives every rank
all blocks. The fused op does the gather too where the rank lists of both are equal, in order: never their sizes or names. What
DTensor puts behind a gather along another dimension (split, cat) reads the gathered rows and stays. Behind an all-reduce the
gather may be one over attention replicas: see :mod:`.replicas`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from . import collectives, replicas, values
from .candidate import Candidate, Gather
from .collectives import Collective
from .operators import SLICES

GATHERS = frozenset(
    packet.default
    for space in ("_c10d_functional", "_c10d_functional_autograd")
    if (packet := getattr(getattr(torch.ops, space), "all_gather_into_tensor", None)) is not None
)
ALL = 2**63 - 1  # as the end of a slice
WHOLE = values.overloads("slice.Tensor")
SIZES = values.overloads("sym_size.int")


def find(
    candidate: Candidate, order: dict[Node, int], reductions: Sequence[Collective] = ()
) -> tuple[Gather | None, str]:
    """The gather of a candidate's norm, and a sentence where there is one that stays a collective of its own.

    Args:
        candidate: judged legal.
        order: place of every node of the graph.
        reductions: all of the graph.
    """
    c, block = candidate.collective, candidate.block
    normed = values.aliases(candidate.norm.out, order)
    if block is None:
        return _over_replicas(candidate, normed, order, reductions)
    found = [reader for reader in normed.readers if reader.target in GATHERS]
    if not found:
        return None, ""
    stays = f"{found[0].name}, the gather of the norm, stays outside: "
    for node in found:
        _, group_size, group = (*node.args, None, None, None)[:3]
        ranks, _, error = collectives.group_ranks(group)
        if ranks != c.ranks or error:
            return None, stays + f"it is over {list(ranks)}, the sum over {list(c.ranks)}"
        if group_size != len(ranks) or not _is_waited_for(node):
            return None, stays + "it is not read through a wait, or its size is not that of its group"
    if block.nodes:
        # On this rank the slice may be a whole block and on another less, whose gather then reads rows that fill it up: the
        # ranks would decide differently, and wait for each other.
        return None, stays + "each rank slices its rows out of an all-reduce, and another one may keep fewer"
    other = next((reader for reader in normed.readers if reader not in found), None)
    if other is not None:
        return None, stays + f"{other.name} ({other.target}) reads the own rows of the norm as well"
    returned = [node for node in found if any(_leaves(wait, order) for wait in _waits(node))]
    if len(returned) > 1:
        # Two tensors, which the caller may write in place one by one; the fused op gives one.
        return (
            None,
            stays + f"the graph returns what {' and '.join(n.name for n in returned)} gather, each in its own memory",
        )
    names = [name for node in found for name in normed.path(node.args[0])]  # type: ignore[arg-type]
    results = [wait for node in found for wait in _waits(node)]
    return Gather(tuple(found), tuple(results), tuple(dict.fromkeys([*names, *found, *results]))), ""


def _over_replicas(
    candidate: Candidate, normed: values.Aliases, order: dict[Node, int], reductions: Sequence[Collective]
) -> tuple[Gather | None, str]:
    """The gather over attention replicas. What it asks has one answer on the ranks of all of them."""
    pads = [reader for reader in normed.readers if reader.target in replicas.PADS]
    filled = [values.aliases(pad, order) for pad in pads]
    readers = [*(reader for reader in normed.readers if reader not in pads), *(r for f in filled for r in f.readers)]
    found = [reader for reader in readers if reader.target in GATHERS]
    if not found:
        return None, ""
    start, others = found[0], [reader for reader in readers if reader is not found[0]]
    stays = f"{start.name}, the gather of the norm, stays outside: "
    if others:
        return None, stays + f"{others[0].name} ({others[0].target}) reads the own rows of the norm as well"
    part = next((node for node in candidate.nodes if node.target in SLICES and not _takes_all(node)), None)
    if part is not None:
        # The last row, say: of a replica with one row that is all, of another it is not.
        return None, stays + f"{part.name} takes some of the rows, and another replica may have more of them"
    for pad in pads:
        wrong = replicas.wrong_filling(pad)
        if wrong:
            return None, stays + wrong
    proof = replicas.proved(candidate.collective, start, reductions, order, pads)
    if isinstance(proof, str):
        return None, stays + proof
    if candidate.scale_tensor is not None or candidate.scale_first:
        return None, stays + "the sum is multiplied by a tensor, or before an addend"
    if candidate.narrowed:
        return None, stays + f"the sum is fp32 and rounded to {candidate.dtype}"
    if not _is_waited_for(start):
        return None, stays + "it is not read through a wait"
    path = [*filled[0].path(start.args[0]), start] if pads else [start]  # type: ignore[arg-type]
    name = pads[0].args[0] if pads else start.args[0]
    nodes = [*normed.path(name), *pads, *path, *_waits(start)]  # type: ignore[arg-type]
    return Gather((start,), tuple(_waits(start)), tuple(nodes), proof), ""


def _takes_all(node: Node) -> bool:
    """Whether a slice takes all of its input, however much that is."""
    given: tuple[Any, ...] = (*node.args[2:], *(0, ALL, 1)[len(node.args[2:]) :])
    start, end, step = (0 if given[0] is None else given[0]), (ALL if given[1] is None else given[1]), given[2]
    return node.target in WHOLE and not node.kwargs and (start, end, step) == (0, ALL, 1)


def _waits(start: Node) -> list[Node]:
    return [user for user in start.users if user.target is collectives.WAIT]


def _is_waited_for(start: Node) -> bool:
    """Whether nothing reads a gather but its waits, and what asks for its size, as graphs with symbolic rows do."""
    return bool(_waits(start)) and all(user.target is collectives.WAIT or user.target in SIZES for user in start.users)


def _leaves(node: Node, order: dict[Node, int]) -> bool:
    """Whether a value is an output of the graph, under any of its names."""
    return any(reader.op == "output" for reader in values.aliases(node, order).readers)
