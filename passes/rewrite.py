"""Replace judged regions by the fused op, all of them or none. Decides nothing: ``sites`` and ``replacement`` did."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from tpfuse import compat

from . import constants, literals, values
from .candidate import Candidate
from .collectives import Collective
from .operators import KINDS
from .quant_expression import FULL, RUN_AGAIN
from .quant_scheme import same_bytes
from .quantizers import is_call
from .replacement import Replacement, kept_shape
from .replicas import PADS


@dataclass(frozen=True)
class Decision:
    """A region that will be rewritten: its replacement, and the node of the original graph before which it goes."""

    replacement: Replacement
    point: Node

    @property
    def candidate(self) -> Candidate:
        return self.replacement.candidate


class Transaction:
    """Edits of a graph that can be taken back until :meth:`commit`: new nodes, redirected readers, names of outputs."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = list(graph.nodes)
        self.arguments = {n: (n.args, n.kwargs) for n in self.nodes}

    def roll_back(self) -> None:
        """The graph as it was."""
        for node in self.nodes:
            args, kwargs = self.arguments[node]
            if node.args != args or node.kwargs != kwargs:
                node.args, node.kwargs = args, kwargs
        old = set(self.nodes)
        for node in reversed(list(self.graph.nodes)):
            if node not in old:
                self.graph.erase_node(node)


def apply(graph: Graph, decisions: Sequence[Decision]) -> list[Node]:
    """Carry out all decisions; returns the fused nodes. On an exception the graph is as it was before the call."""
    if not decisions:
        return []
    found = [d.candidate.collective for d in decisions]
    outputs = _outputs(graph)
    names = [n.name for n in outputs]
    transaction = Transaction(graph)
    try:
        unread = {user for d in decisions for node in _region(d) for user in node.users if values.is_dead(user)}
        fused = _insert(graph, decisions)
        dead = _dead(graph, decisions, unread | _shrink(graph, found))
        _check(graph, decisions, dead)
    except BaseException:
        transaction.roll_back()
        raise
    for node in reversed(list(graph.nodes)):
        if node in dead:
            graph.erase_node(node)
    _keep_output_names(graph, names)
    return fused


def _region(decision: Decision) -> list[Node]:
    candidate = decision.candidate
    return [n for n in (*candidate.nodes, *candidate.h.names) if n.op == "call_function"]


def _insert(graph: Graph, decisions: Sequence[Decision]) -> list[Node]:
    """Insert every replacement and let all readers read it."""
    moved: dict[Node, Node] = {}  # regions may have one another's results as operands
    fused = []
    for decision in decisions:
        new, candidate = decision.replacement, decision.candidate
        made = new.insert(graph, decision.point, moved)
        fused.append(made[new.fused.index])
        mine = set(made)

        def redirect(old: Node, to: Node, mine: set[Node] = mine) -> None:
            old.replace_all_uses_with(to, delete_user_cb=lambda user: user not in mine, propagate_meta=False)
            moved[old] = to

        waits = candidate.collective.waits
        for node, value in new.outputs:
            for name in {node, *(waits if node in waits else ())}:  # without an addend the sum is its own residual sum
                redirect(name, made[value.index])
    return fused


def _dead(graph: Graph, decisions: Sequence[Decision], regions: set[Node]) -> set[Node]:
    """The nodes of ``regions`` and of the decisions that nobody reads any more. Waits have effects, so no dead-code pass
    would remove them."""
    regions = regions | {node for decision in decisions for node in _region(decision)}
    dead: set[Node] = set()
    for node in reversed(list(graph.nodes)):
        if node in regions and all(user in dead for user in node.users):
            dead.add(node)
    return dead


def _check(graph: Graph, decisions: Sequence[Decision], dead: set[Node]) -> None:
    """What must hold before anything is erased: values come before their readers, and no fused all-reduce still runs."""
    seen: set[Node] = set()
    for node in graph.nodes:
        if node in dead:
            continue
        for source in node.all_input_nodes:
            if source not in seen:
                raise RuntimeError(f"{node.name} would read {source.name} before it is computed, or after it is erased")
        seen.add(node)
    for decision in decisions:
        candidate = decision.candidate
        c = candidate.collective
        both = [c.node, *([] if candidate.merged is None else [candidate.merged.collective.node])]
        # It would be summed twice: slower than no fusion, and silent.
        for node in both if c.index is None else ():
            if node not in dead:
                readers = ", ".join(u.name for u in node.users if u not in dead)
                raise RuntimeError(f"{node.name} was fused, but {readers} still reads it")


def _shrink(graph: Graph, found: Sequence[Collective]) -> set[Node]:
    """Take the fused items out of coalesced all-reduces, so that they are not summed twice.

    The smaller all-reduce stands beside the old one. Returns the old ones with their items, which nobody reads any more.
    """
    old: set[Node] = set()
    for node in {c.node for c in found if c.index is not None}:
        old |= {node, *(u for u in node.users if u.target is operator.getitem)}
        fused = {c.index for c in found if c.node is node}
        items: dict[Any, list[Node]] = {}
        for user in node.users:
            if user.target is operator.getitem and user.args[1] not in fused:
                items.setdefault(user.args[1], []).append(user)
        inputs = list(cast(Any, node.args[0]))
        kept = sorted(items)
        if not kept:
            continue
        with graph.inserting_before(node):
            smaller = graph.call_function(
                cast(Any, node.target), ([inputs[i] for i in kept], *node.args[1:]), dict(node.kwargs)
            )
            smaller.meta = dict(node.meta)
            tensors = node.meta.get("val")
            if isinstance(tensors, list | tuple):
                smaller.meta["val"] = [tensors[i] for i in kept]
        for position, index in enumerate(kept):
            for item in items[index]:
                item.args = (smaller, position)
    return old


def _outputs(graph: Graph) -> list[Node]:
    found: list[Node] = []
    map_arg(graph.output_node().args, found.append)
    return found


def _keep_output_names(graph: Graph, names: list[str]) -> None:
    """Give the outputs their old names: the signature of an exported program refers to them by name."""
    taken = {n.name for n in graph.nodes}
    for node, name in zip(_outputs(graph), names, strict=True):
        if node.name != name and name not in taken and node.op == "call_function":
            node.name = name


# -- tpfuse.verify ----------------------------------------------------------------------------------------------------


def verify(decision: Decision) -> str | None:
    """Run the model's own nodes and the replacement's steps on the same random values, in the shapes of the graph.

    The all-reduce itself is left out: both start from the same sum. Call it before :func:`apply`. Returns None when every
    bit is equal, or with relaxed numerics every value close, else what differs.
    """
    new, candidate = decision.replacement, decision.candidate
    c = candidate.collective
    with compat.without_fake_mode(), torch.no_grad():
        known: dict[Node, Any] = {}
        for seed, node in enumerate(dict.fromkeys((c.x, *candidate.operands)), 1):
            known[node] = _random(node, seed)
        ours = new.run(lambda node: _run(node, known))
        theirs = dict(known)
        theirs.update(constants.held(candidate.terms))
        if candidate.block is None:
            theirs.update(dict.fromkeys((c.node, c.value, *c.waits), known[c.x]))
        else:
            theirs[candidate.kept] = candidate.block.of(known[c.x], kept_shape(candidate))
        if candidate.merged is not None:
            other, whole = candidate.merged.collective, known[candidate.merged.collective.x]
            total = whole if candidate.block is None else candidate.block.of(whole, kept_shape(candidate))
            theirs.update(dict.fromkeys((other.node, other.value, *other.waits), total))
        gather = candidate.gather
        if gather is not None:
            whole = new.gathered(_run(cast(Node, gather.starts[0].args[0]), theirs))
            theirs.update(dict.fromkeys((*gather.starts, *gather.results), whole))
        for node, value in new.outputs:
            name, got = _name_of(node, candidate), ours[value.index]
            if (
                name in ("quantized", "scales")
                and candidate.quantization is not None
                and not candidate.quantization.exact
            ):
                continue
            try:
                model = _run(node, theirs)
            except NotImplementedError:
                continue  # an operator of another library that does not run on a CPU; what it computes is declared
            if model.dtype != got.dtype or model.shape != got.shape:
                return (
                    f"{name} is {model.dtype} {tuple(model.shape)} in the model, {got.dtype} {tuple(got.shape)} fused"
                )
            if not same_bytes(model, got) and (candidate.exact or not _close(model, got, candidate.dtype)):
                worst = (model.double() - got.double()).abs().max().item()
                return f"{name} differs by up to {worst:.3g} (in {model.dtype})"
    return None


def _close(model: torch.Tensor, got: torch.Tensor, dtype: torch.dtype | None) -> bool:
    """Whether two values agree as closely as a flavour must that relaxed numerics accept (``replay.prove``)."""
    tolerance = 4 * torch.finfo(dtype or got.dtype).eps
    return torch.allclose(model.double(), got.double(), rtol=tolerance, atol=tolerance)


def _name_of(node: Node, candidate: Candidate) -> str:
    found = candidate.quantization
    if found is not None and node in found.quantized:
        return "quantized"
    if found is not None and node in found.scales:
        return "scales"
    gathered = (*candidate.gather.starts, *candidate.gather.results) if candidate.gather else ()
    return "normed" if node is candidate.norm.out or node in gathered else "residual_out"


def _random(node: Node, seed: int) -> torch.Tensor:
    tensor = values.value(node)
    assert tensor is not None
    shape = [compat.example_size(n) for n in tensor.shape]
    generator = torch.Generator().manual_seed(seed)
    if not tensor.dtype.is_floating_point:
        return torch.ones(shape, dtype=tensor.dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def _run(node: Node, known: dict[Node, Any]) -> Any:
    """The value of a node, computed from ``known`` by the graph's own operators with their own arguments."""
    if node in known:
        return known[node]
    tensor = values.value(node)
    symbolic = tensor is None and isinstance(node.meta.get("val"), torch.SymInt)
    if symbolic:
        known[node] = compat.example_size(node.meta["val"])
    elif not _reaches(node, known) and node.target not in FULL:
        held = literals.literal(node)
        known[node] = held if isinstance(held, torch.Tensor) else _random(node, len(known) + 1)
    else:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: _run(n, known))
        known[node] = cast(Any, node.target)(*args, **kwargs)
    return known[node]


def _reaches(node: Node, known: dict[Node, Any]) -> bool:
    """Whether a node is computed from known ones by the arithmetic of a region; nothing else is ever run."""
    if node in known:
        return True
    if node.target not in _ARITHMETIC and not is_call(node):
        return False
    return any(_reaches(source, known) for source in node.all_input_nodes)


_ARITHMETIC = frozenset(KINDS) | PADS | values.COPIES | values.RESHAPES | RUN_AGAIN
