"""Read the arithmetic that hangs on a value into a short program, detached from the graph.

A program is what the rest of the norm matching looks at: it can be compared, remembered and run on other numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from tpfuse import compat

from . import values
from .operators import KINDS, REDUCTIONS, SLICES

MAX_STEPS = 40  # the longest spelling in transformers 5.24 takes 14; more means that this is not one norm


@dataclass(frozen=True)
class Ref:
    """An operand: ``s`` itself, an earlier step, or a leaf from outside."""

    kind: str  # "s" | "step" | "leaf"
    index: int = 0


@dataclass(frozen=True)
class Leaf:
    """An operand that does not depend on ``s``.

    Attributes:
        shape: ``vector`` (one value per column) or ``scalar``.
        base: dtype of the node at the start of ``chain``.
        chain: what happens to it on the way: ``cast``/dtype pairs and ``("plus_one", None)``.
        dtype: of the operand.
    """

    shape: str
    base: torch.dtype | None
    chain: tuple[tuple[str, Any], ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Step:
    """One arithmetic node.

    Attributes:
        layout: how the value lies beside the rows of ``s``: ``rows`` (a value for each element), ``kept`` (a statistic of each
            row, whose last dimension is 1), ``dropped`` (a statistic without that dimension), ``part`` (a slice or a
            regrouping of the columns), ``""``: none of these, so the value has no meaning as part of a norm.
        last_dim: whether a reduction is over the last dimension alone.
        keepdim: of a reduction, as the model gives it.
        kept: whether a reshape or slice keeps the width.
        leaks: whether a node outside the program reads the value.
    """

    kind: str
    target: Any
    args: tuple[Any, ...]
    dtype: torch.dtype | None
    layout: str = "rows"
    last_dim: bool = True
    keepdim: bool = True
    kept: bool = True
    leaks: bool = False


@dataclass
class Program:
    """Steps with the nodes they came from. Only the first three fields enter the memo."""

    steps: list[Step] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    leaf_nodes: list[tuple[Node, Node]] = field(default_factory=list)  # (operand, base of its chain)
    layouts: dict[Node, str] = field(default_factory=dict)


def read(source: values.Aliases, order: dict[Node, int], hidden: int) -> Program:
    """The arithmetic that hangs on ``s``, in graph order, up to the first operation that no norm contains."""
    known: dict[Node, Ref] = {name: Ref("s") for name in source.names}
    leaves: dict[Node, Ref] = {}
    program = Program(layouts=dict.fromkeys(source.names, "rows"))
    queue = {user for name in source.names for user in name.users if user not in known}
    rejected: set[Node] = set()
    while queue and len(program.nodes) < MAX_STEPS:
        node = min(queue, key=order.__getitem__)
        queue.discard(node)
        step = _step(node, known, leaves, program, hidden)
        if step is None:
            rejected.add(node)
            continue
        known[node] = Ref("step", len(program.steps))
        program.steps.append(step)
        program.nodes.append(node)
        program.layouts[node] = step.layout
        queue.update(user for user in node.users if user not in known and user not in rejected)
    inside = set(program.nodes)
    for index, node in enumerate(program.nodes):
        leaks = any(user not in inside and not values.is_dead(user) for user in node.users)
        if leaks:
            program.steps[index] = replace(program.steps[index], leaks=True)
    return program


def _step(node: Node, known: dict[Node, Ref], leaves: dict[Node, Ref], program: Program, hidden: int) -> Step | None:
    kind = KINDS.get(node.target) if node.op == "call_function" else None
    if kind is None:
        return None
    if kind == "item" and not (node.args[0] in known and isinstance(node.args[1], int) and node.users):
        return None
    if node.target in SLICES and _selects_rows(node):
        return None
    if kind == "cast" and values.moves(node):
        return None
    pending: list[tuple[Node, Leaf, Node]] = []
    args: list[Any] = []
    read = node.args[:1] if kind in ("same", "part", "cast", "mean", "sum", "norm2", "variance") else node.args
    for arg in read:
        if not isinstance(arg, Node):
            args.append(tuple(arg) if isinstance(arg, list) else arg)
            continue
        ref = known.get(arg) or leaves.get(arg)
        if ref is None:
            leaf, base = _leaf(arg, hidden)
            if leaf is None:
                return None
            pending.append((arg, leaf, base))
            ref = Ref("leaf", len(program.leaves) + len(pending) - 1)
        args.append(ref)
    if kind == "variance":
        args.append(node.kwargs.get("correction", 1))
    if any(isinstance(a, torch.SymInt | torch.SymFloat) for a in args):
        return None
    if kind in ("add", "sub") and node.kwargs.get("alpha", 1) != 1:
        return None
    for arg, leaf, base in pending:
        leaves[arg] = Ref("leaf", len(program.leaves))
        program.leaves.append(leaf)
        program.leaf_nodes.append((arg, base))
    last_dim, keepdim, kept = True, True, True
    tensor = values.value(node)
    first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if kind in ("mean", "sum", "norm2", "variance"):
        last_dim = _over_last_dim(node, kind)
        keepdim = _keeps_dim(node, kind)
    elif kind in ("same", "part") and first is not None:
        kept = _keeps_width(node, first, known)
    layout = _layout(node, kind, first, program.layouts, last_dim, keepdim, kept)
    dtype = None if tensor is None else tensor.dtype
    return Step(kind, node.target, tuple(args), dtype, layout, last_dim, keepdim, kept)


def _layout(
    node: Node,
    kind: str,
    first: Node | None,
    layouts: dict[Node, str],
    last_dim: bool,
    keepdim: bool,
    kept: bool,
) -> str:
    """See :attr:`Step.layout`. Broadcasting joins values by their position from the right, so a statistic without its last
    dimension meets columns, not rows: a square input hides that, since all shapes fit."""
    if kind in ("mean", "sum", "norm2", "variance"):
        if first is None or layouts.get(first) != "rows" or not last_dim:
            return ""
        return "kept" if keepdim else "dropped"
    if kind in ("same", "part"):
        return _reshaped(node, first, layouts) if kept and first is not None else "part"
    if kind in ("layer_norm", "fused", "item"):
        return layouts.get(first, "rows") if first is not None else ""
    mine = [(a, layouts[a]) for a in node.args if isinstance(a, Node) and a in layouts]
    others = [a for a in node.args if isinstance(a, Node) and a not in layouts]
    kinds = {layout for _, layout in mine}
    if "part" in kinds:
        return "part"
    wide = [a for a in others if (t := values.value(a)) is not None and t.dim() > 0 and t.numel() != 1]
    if "" in kinds or not kinds or ("dropped" in kinds and (len(kinds) > 1 or wide)):
        return ""
    tensor = values.value(node)
    if tensor is None:
        return ""
    want = tensor.shape if kinds == {"dropped"} else tensor.shape[:-1]
    for arg, layout in mine:
        have = values.value(arg)
        if have is None:
            return ""
        rows = have.shape if layout == "dropped" else have.shape[:-1]
        if not values.same_sizes(_rows(rows), _rows(want)):
            return ""
    if kinds == {"dropped"}:
        return "dropped"
    return "rows" if "rows" in kinds or wide else "kept"


def _rows(sizes: Any) -> tuple[Any, ...]:
    """The dimensions that number the rows, without those of size one in front."""
    return values.without_leading_ones((*sizes, 0))[:-1]


def _reshaped(node: Node, first: Node, layouts: dict[Node, str]) -> str:
    """The layout behind a reshape of which :func:`_keeps_width` said yes."""
    layout, new, old = layouts.get(first, ""), values.value(node), values.value(first)
    if new is None or old is None or new.dim() == 0 or old.dim() == 0:
        return layout if new is not None and old is not None and new.dim() == old.dim() else ""
    if layout == "dropped":
        # One value a row: it becomes a column by unsqueeze(-1), and nothing else is understood.
        last = node.target in values.overloads("unsqueeze.default") and node.args[1] in (-1, new.dim() - 1)
        return "kept" if last else "dropped" if values.same_sizes(new.shape, old.shape) else ""
    if node.target in values.EXPANDS and not values.same_sizes(_rows(new.shape), _rows(old.shape)):
        return ""  # repeats rows
    if compat.statically_true(new.shape[-1] == old.shape[-1]) and not _drops_last(node, old):
        return layout
    return "dropped" if layout == "kept" and _drops_last(node, old) else ""


def _drops_last(node: Node, old: torch.Tensor) -> bool:
    if node.target not in values.overloads("squeeze.dim"):
        return False
    return node.args[1] in (-1, old.dim() - 1) and compat.statically_true(old.shape[-1] == 1)


def _keeps_dim(node: Node, kind: str) -> bool:
    position = 3 if kind == "norm2" else 2
    return bool(node.args[position] if len(node.args) > position else node.kwargs.get("keepdim", False))


def _over_last_dim(node: Node, kind: str) -> bool:
    tensor = values.value(node.args[0])
    position = 2 if kind == "norm2" else 1
    dims = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    if kind == "norm2" and (node.args[1] if len(node.args) > 1 else 2) != 2:
        return False
    if tensor is None or not isinstance(dims, list | tuple) or len(dims) != 1 or not isinstance(dims[0], int):
        return False
    return dims[0] % tensor.dim() == tensor.dim() - 1


def _selects_rows(node: Node) -> bool:
    """Whether a slice takes some rows at their full width: no part of a norm, whose rows all stay."""
    new, old = values.value(node), values.value(node.args[0])
    if new is None or old is None or not compat.statically_true(new.shape[-1] == old.shape[-1]):
        return False
    return not all(compat.statically_true(m == n) for m, n in zip(new.shape, old.shape, strict=True))


def _keeps_width(node: Node, first: Node, known: dict[Node, Ref]) -> bool:
    """Whether a reshape or slice leaves the last dimension as it is (or only adds or drops a 1, for a statistic)."""
    new, old = values.value(node), values.value(first)
    if new is None or old is None:
        return False
    if node.target in SLICES:
        return all(compat.statically_true(m == n) for m, n in zip(new.shape, old.shape, strict=True))
    new_width = new.shape[-1] if new.dim() else 1
    old_width = old.shape[-1] if old.dim() else 1
    if compat.statically_true(new_width == old_width):
        return True
    # mean(..., keepdim=False).unsqueeze(-1): a statistic gains the dimension it lost.
    return node.target in values.overloads("unsqueeze.default", "squeeze.dim") and (
        compat.statically_true(new_width == 1) or compat.statically_true(old_width == 1)
    )


def _leaf(node: Node, hidden: int) -> tuple[Leaf | None, Node]:
    tensor = values.value(node)
    if tensor is None:  # a symbolic number, e.g. an eps that is a graph input
        return Leaf("scalar", None, (), None), node
    if tensor.dim() == 0 or (tensor.dim() == 1 and hidden != 1 and compat.statically_true(tensor.shape[0] == 1)):
        return Leaf("scalar", tensor.dtype, (), tensor.dtype), node
    if not values.is_vector(node, hidden):
        return None, node
    chain: list[tuple[str, Any]] = []
    base = node
    while base.op == "call_function":
        kind = KINDS.get(base.target)
        previous = next((a for a in base.args if isinstance(a, Node)), None)
        if previous is None or not values.is_vector(previous, hidden):
            break
        if kind == "cast" and values.moves(base):
            break
        if kind == "cast":
            chain.append(("cast", values.dtype(base)))
        elif kind == "add" and any(isinstance(a, int | float) and a == 1 for a in base.args):
            chain.append(("plus_one", None))
        elif kind != "same":
            break
        base = previous
    while base.op == "call_function" and KINDS.get(base.target) == "same":
        base = base.args[0]  # type: ignore[assignment]
    base_tensor = values.value(base)
    if base_tensor is None or base_tensor.dim() != 1:
        return Leaf("vector", tensor.dtype, (), tensor.dtype), node
    return Leaf("vector", base_tensor.dtype, tuple(reversed(chain)), tensor.dtype), base


def ancestors(steps: tuple[Step, ...], out: int) -> set[int]:
    seen, stack = set(), [out]
    while stack:
        index = stack.pop()
        if index in seen:
            continue
        seen.add(index)
        stack.extend(a.index for a in steps[index].args if isinstance(a, Ref) and a.kind == "step")
    return seen


def closed(steps: tuple[Step, ...], out: int, inside: set[int]) -> bool:
    """Whether nothing but a cast or square of ``s`` is read from outside the norm (those are cheap to keep)."""
    for index, step in enumerate(steps):
        if index in inside:
            if index != out and step.leaks and not early(steps, index):
                return False
            continue
        for arg in step.args:
            read = isinstance(arg, Ref) and arg.kind == "step" and arg.index in inside and arg.index != out
            if read and not early(steps, arg.index):
                return False
    return True


def early(steps: tuple[Step, ...], index: int) -> bool:
    return not any(steps[i].kind in REDUCTIONS for i in ancestors(steps, index))
