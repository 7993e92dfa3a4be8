"""Find every all-reduce and reduce-scatter of a graph, in whatever way it is spelled.

A :class:`Collective` names the node that starts the reduction, the node that holds the finished sum, what is summed, how
and over which global ranks. Nothing here changes the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import Graph, GraphModule, Node

from tpfuse import compat

aten = torch.ops.aten


@dataclass(frozen=True)
class CollectiveSpelling:
    """How one operator spells an all-reduce.

    Attributes:
        op: the overload as it appears in a graph.
        input: position or keyword of the summed tensor (or list of tensors).
        group: position or keyword of the group's name.
        reduce_op: position or keyword of the reduction's name, or None when the operator always sums.
        ranks: resolves the group argument to global ranks; None uses torch's own registry of groups.
        coalesced: the input is a list and the output is indexed.
        kind: ``all_reduce``, or ``reduce_scatter`` of equal shares of the first dimension.
    """

    op: Any
    input: int | str = 0
    group: int | str = 2
    reduce_op: int | str | None = 1
    ranks: Callable[[Any], tuple[int, ...]] | None = None
    coalesced: bool = False
    kind: str = "all_reduce"


@dataclass(frozen=True)
class Collective:
    """One reduction of a graph.

    Attributes:
        node: the node that starts it.
        value: the node that holds the finished sum (the wait, or ``node`` itself where there is none).
        x: the partial sum that goes in.
        reduce_op: lower case name, e.g. ``sum``.
        group_arg: the group as the graph holds it.
        group_name: torch's name of the group, or None when it could not be resolved.
        ranks: global ranks; empty when unknown.
        waits: every wait of this reduction.
        index: position in a coalesced all-reduce, else None.
        error: why the group is unknown, else an empty string.
        kind: ``all_reduce`` or ``reduce_scatter``.
    """

    node: Node
    value: Node
    x: Node
    reduce_op: str
    group_arg: Any
    group_name: str | None
    ranks: tuple[int, ...]
    waits: tuple[Node, ...]
    index: int | None = None
    error: str = ""
    kind: str = "all_reduce"


_registered: dict[Any, CollectiveSpelling] = {}


def register_collective(
    op: Any,
    *,
    input: int | str = 0,
    group: int | str = "group_name",
    reduce_op: int | str | None = None,
    ranks: Callable[[Any], tuple[int, ...]] | None = None,
) -> None:
    """Teach the pass another library's all-reduce, e.g. ``torch.ops.vllm.all_reduce.default``.

    Args:
        op: an ``OpOverload`` (or a packet with a ``default`` overload) that returns the finished sum of one tensor.
        input: position or keyword of the summed tensor.
        group: position or keyword of the group argument.
        reduce_op: position or keyword of the reduction's name; None means that the operator always sums.
        ranks: maps the group argument to global ranks in the order of the group; None resolves it as a torch group name.
            A torch group over just those ranks must exist, for the fused op runs on it.
    Raises:
        TypeError: ``op`` is not an operator of ``torch.ops``.
    """
    overload = getattr(op, "default", op)
    if not isinstance(overload, torch._ops.OpOverload):
        raise TypeError(
            f"register_collective: op is {op!r}; expected an operator such as torch.ops.vllm.all_reduce.default"
        )
    _registered[overload] = CollectiveSpelling(overload, input, group, reduce_op, ranks)


def unregister_collective(op: Any) -> None:
    """Forget what :func:`register_collective` registered. Unknown operators are ignored."""
    _registered.pop(getattr(op, "default", op), None)


def registered() -> list[CollectiveSpelling]:
    """What :func:`register_collective` has registered in this process."""
    return list(_registered.values())


def _built_in() -> dict[Any, CollectiveSpelling]:
    spellings: dict[Any, CollectiveSpelling] = {}
    for space in ("_c10d_functional", "_c10d_functional_autograd"):
        for name, coalesced in (("all_reduce", False), ("all_reduce_", False), ("all_reduce_coalesced", True)):
            packet = getattr(getattr(torch.ops, space), name, None)
            if packet is not None:
                spellings[packet.default] = CollectiveSpelling(packet.default, coalesced=coalesced)
        packet = getattr(getattr(torch.ops, space), "reduce_scatter_tensor", None)
        if packet is not None:
            spellings[packet.default] = CollectiveSpelling(packet.default, group=3, kind="reduce_scatter")
    return spellings


_BUILT_IN = _built_in()
WAIT = torch.ops._c10d_functional.wait_tensor.default
EAGER = frozenset(
    packet.default
    for name in ("allreduce_", "allreduce_coalesced_")
    if (packet := getattr(torch.ops.c10d, name, None)) is not None
)


def spelling_of(node: Node) -> CollectiveSpelling | None:
    """How this node spells an all-reduce or a reduce-scatter, or None."""
    if node.op != "call_function":
        return None
    return _BUILT_IN.get(node.target) or _registered.get(node.target)


def is_communication(node: Node) -> bool:
    """Whether the node exchanges data between ranks (any collective, not only an all-reduce)."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is WAIT:
        return False
    if node.target in _registered:
        return True
    return node.target.namespace in ("_c10d_functional", "_c10d_functional_autograd", "c10d", "tpfuse", "symm_mem")


def group_ranks(group_arg: Any) -> tuple[tuple[int, ...], str | None, str]:
    """(global ranks, torch's group name, error) of a group as a graph holds it."""
    if isinstance(group_arg, Node):
        return (), None, f"the group is computed in the graph ({group_arg.name})"
    try:
        group = compat.resolve_group(group_arg)
        ranks = tuple(dist.get_process_group_ranks(group))
    except Exception as error:  # torch raises RuntimeError, ValueError or KeyError by version
        return (), None, f"group {group_arg!r} cannot be resolved: {error}"
    if dist.is_initialized() and dist.get_rank() not in ranks:
        return ranks, None, f"rank {dist.get_rank()} is not a member of group {group_arg!r} with ranks {list(ranks)}"
    return ranks, group.group_name, ""


def _argument(node: Node, where: int | str) -> Any:
    """An argument by position or keyword, whichever way the node passes it."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    names = [argument.name for argument in schema]
    if isinstance(where, str):
        position, name = (names.index(where) if where in names else len(names)), where
    else:
        position, name = where, (names[where] if where < len(names) else "")
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if position < len(node.args) else None


def find(graph: Graph) -> list[Collective]:
    """All all-reduces and reduce-scatters of the graph in graph order, one entry per summed tensor."""
    found: list[Collective] = []
    for node in graph.nodes:
        spelling = spelling_of(node)
        if spelling is not None:
            found.extend(_read(node, spelling))
        elif node.op == "call_function" and node.target in EAGER:
            found.extend(_eager(node))
    return found


def _eager(node: Node) -> Iterator[Collective]:
    """What ``make_fx`` makes of ``dist.all_reduce``: the group is an object that no pass can name."""
    error = f"{node.name} ({node.target}) is an eager collective as it ran; torch.compile and torch.export make it functional"
    for x in node.args[0]:  # type: ignore[union-attr]
        if isinstance(x, Node):
            yield Collective(node, node, x, "unknown", None, None, (), (), None, error)


def graphs_inside(module: GraphModule) -> list[tuple[str, GraphModule]]:
    """Names and graphs of what a graph calls (``torch.cond``, ``nested_compile_region``), at any depth, where that reduces."""
    inside = ((name, m) for name, m in module.named_modules() if isinstance(m, GraphModule) and m is not module)
    return [(name, m) for name, m in inside if find(m.graph)]


def _read(node: Node, spelling: CollectiveSpelling) -> Iterator[Collective]:
    group_arg = _argument(node, spelling.group)
    reduce_op = "sum" if spelling.reduce_op is None else str(_argument(node, spelling.reduce_op)).lower()
    if spelling.ranks is None:
        ranks, name, error = group_ranks(group_arg)
    else:
        ranks, name, error = _ranks_by_callback(spelling, group_arg)
    if not spelling.coalesced:
        x = _argument(node, spelling.input)
        waits = _waits(node)
        yield Collective(
            node, waits[0] if waits else node, x, reduce_op, group_arg, name, ranks, waits, None, error, spelling.kind
        )
        return
    items = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    for index, x in enumerate(_argument(node, spelling.input)):
        item = items.get(index)
        waits = _waits(item) if item is not None else ()
        value = waits[0] if waits else (item if item is not None else node)
        yield Collective(node, value, x, reduce_op, group_arg, name, ranks, waits, index, error)


def _ranks_by_callback(spelling: CollectiveSpelling, group_arg: Any) -> tuple[tuple[int, ...], str | None, str]:
    assert spelling.ranks is not None
    try:
        ranks = tuple(spelling.ranks(group_arg))
    except Exception as error:  # somebody else's callback
        return (), None, f"the ranks callback of {spelling.op} failed for group {group_arg!r}: {error}"
    for name, members in compat.known_groups():
        if members == ranks:
            return ranks, name, ""
    return ranks, None, f"no torch process group exists over ranks {list(ranks)}; create one with dist.new_group"


def _waits(node: Node | None) -> tuple[Node, ...]:
    """The waits of a node, and theirs: functional collectives wait under a compile, and a model may wait once more."""
    found = [] if node is None else [node]
    for name in found:
        found += [user for user in name.users if user.target is WAIT]
    return tuple(found[1:])
