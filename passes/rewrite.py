"""Replace judged regions by the fused op. Decides nothing: every question was answered by ``sites`` and ``sharing``."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
import tpfuse.ops  # noqa: F401  (registers the op)
from torch.fx import Graph, Node

from tpfuse import compat

from ..ops import reference
from ..ops.flavour import Flavour
from . import values
from .collectives import Collective, spelling_of
from .sites import Candidate

OP = torch.ops.tpfuse.all_reduce_add_rms_norm.default


@dataclass(frozen=True)
class Rewritten:
    """The nodes that stand for a region now.

    Attributes:
        fused: the fused op.
        normed: what readers of the norm read.
        summed: what readers of the residual sum read.
    """

    fused: Node
    normed: Node
    summed: Node


def fuse(graph: Graph, candidate: Candidate, before: Node) -> Rewritten:
    """Insert the fused op in front of ``before``, redirect all readers, erase the region."""
    c, norm = candidate.collective, candidate.norm
    with graph.inserting_before(before):
        x = _repeat(graph, candidate.chain, c.x)
        fused = graph.call_function(
            OP,
            (
                x,
                candidate.residual,
                norm.weight,
                candidate.bias,
                norm.eps,
                candidate.scale,
                str(norm.flavour),
                candidate.post_add is not None,
                c.group_name,
            ),
        )
        normed = graph.call_function(operator.getitem, (fused, 0))
        summed = graph.call_function(operator.getitem, (fused, 1))
        _describe(candidate, fused, normed, summed)
        out = _repeat(graph, candidate.reshapes, normed)
        total = summed if candidate.post_add is None else _repeat(graph, candidate.reshapes, summed)
    for node in (fused, normed, summed):
        for key in ("stack_trace", "nn_module_stack"):
            if key in c.node.meta:
                node.meta[key] = c.node.meta[key]
    region = candidate.nodes
    mine = {fused, normed, summed, x, out, *region}

    def redirect(old: Node, new: Node) -> None:
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in mine, propagate_meta=False)

    redirect(norm.out, out)
    if candidate.post_add is None:
        redirect(candidate.h.root, summed)
        for wait in c.waits if candidate.h.root in c.waits else ():
            redirect(wait, summed)
    else:
        redirect(candidate.post_add, total)
    _erase(graph, candidate)
    # Steps of the norm that others read too (a cast of the residual sum, say) stay, and read the new sum.
    if candidate.post_add is None and not compat.is_erased(candidate.h.root):
        candidate.h.root.replace_all_uses_with(summed, propagate_meta=False)
        _erase(graph, candidate)
    return Rewritten(fused, out, total)


def _repeat(graph: Graph, steps: tuple[Node, ...], start: Node) -> Node:
    """Apply the shape-changing steps to another value of the same rows."""
    current = start
    for step in steps:
        if step.target not in values.RESHAPES:
            continue
        new = graph.call_function(cast(Any, step.target), (current, *step.args[1:]), dict(step.kwargs))
        shape, model = values.value(step), values.value(current)
        if shape is not None and model is not None:
            new.meta["val"] = shape if shape.dtype == model.dtype else model.new_empty(shape.shape)
        current = new
    return current


def _describe(candidate: Candidate, fused: Node, normed: Node, summed: Node) -> None:
    """Give the new nodes the fake tensors that later passes ask for: those of the nodes they stand for, where shapes agree."""
    like, out = values.value(candidate.h.root), values.value(candidate.norm.out)
    if like is None or out is None:
        return
    total = like if candidate.post_add is None else values.value(candidate.post_add)
    if candidate.reshapes:
        out = like.new_empty(like.shape, dtype=out.dtype)
        total = total if total is like or total is None else like.new_empty(like.shape, dtype=total.dtype)
    normed.meta["val"], summed.meta["val"] = out, total
    fused.meta["val"] = (out, total)


def _erase(graph: Graph, candidate: Candidate) -> None:
    """Erase what nobody reads any more, readers first. Waits have effects, so no dead-code pass would remove them."""
    left = [n for n in dict.fromkeys([*candidate.nodes, *candidate.h.names]) if not compat.is_erased(n)]
    if candidate.collective.index is not None and candidate.collective.node in left:
        left.remove(candidate.collective.node)  # coalesced: shrink() takes it apart once all sites are done
    for check in [user for node in left for user in node.users if user.target in values.CHECKS]:
        graph.erase_node(check)
    progress = True
    while progress:
        dead = [n for n in left if not n.users and n.op == "call_function"]
        for node in dead:
            graph.erase_node(node)
            left.remove(node)
        progress = bool(dead)


def shrink(graph: Graph, collectives: list[Collective]) -> None:
    """Take the fused items out of coalesced all-reduces, so that they are not summed twice."""
    for node in {c.node for c in collectives if c.index is not None}:
        if compat.is_erased(node):
            continue
        items: dict[Any, Node] = {u.args[1]: u for u in node.users if u.target is operator.getitem}
        for index, item in list(items.items()):
            if not item.users:
                graph.erase_node(item)
                del items[index]
        if not items:
            graph.erase_node(node)
            continue
        inputs = list(cast(Any, node.args[0]))
        if len(items) == len(inputs):
            continue
        kept = sorted(items)
        with graph.inserting_before(node):
            smaller = graph.call_function(
                cast(Any, node.target), ([inputs[i] for i in kept], *node.args[1:]), dict(node.kwargs)
            )
            smaller.meta = dict(node.meta)
            tensors = node.meta.get("val")
            if isinstance(tensors, list | tuple):
                smaller.meta["val"] = [tensors[i] for i in kept]
        for position, index in enumerate(kept):
            items[index].args = (smaller, position)
        graph.erase_node(node)


def remaining(graph: Graph) -> int:
    """How many all-reduces the graph still runs."""
    return sum(1 for n in graph.nodes if spelling_of(n) is not None)


def verify(candidate: Candidate, fused: Node, rows: int = 3) -> str | None:
    """Run the model's own region and the fused op's reference on the same random rows.

    The all-reduce itself is left out: both sides start from the same sum. Returns None when every bit is equal, else
    what differs.
    """
    _, residual, weight, bias, eps, scale, flavour, post, _ = fused.args
    hidden = values.width(candidate.h.root)
    dtype = values.dtype(candidate.h.root)

    def random(node: object, seed: int) -> torch.Tensor | None:
        if not isinstance(node, Node):
            return None
        tensor = values.value(node)
        assert tensor is not None
        shape = (hidden,) if values.is_vector(node, hidden) and tensor.dim() == 1 else (rows, hidden)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(tensor.dtype)

    with compat.without_fake_mode(), torch.no_grad():
        summed = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        r, w, b = random(residual, 2), random(weight, 3), random(bias, 4)
        ours = reference.add_rms_norm(summed, r, w, b, eps, scale, Flavour.parse(flavour), post)
        h = summed
        last = candidate.terms[-1] if candidate.residual is not None and candidate.post_add is None else None
        for term in candidate.terms:
            if term.kind == "scale":
                h = h * term.factor
            else:
                addend = r if term is last else b
                assert addend is not None
                h = h + addend
        normed = candidate.norm.proof.run(h, w)
        total = h
        if candidate.post_add is not None:
            assert r is not None
            total = r + normed
        for name, model, got in (("normed", normed, ours[0]), ("residual_out", total, ours[1])):
            if model.dtype != got.dtype or not torch.equal(model, got):
                worst = (model.double() - got.double()).abs().max().item()
                return f"{name} differs by up to {worst:.3g} ({model.dtype} in the model, {got.dtype} fused)"
    return None
