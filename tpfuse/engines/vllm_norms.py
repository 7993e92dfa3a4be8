"""vLLM's norm operators, opened into the arithmetic that the pass proves, and put back where nothing was fused.

vLLM has spelled a norm in two ways: ``auto_functionalized(_C.fused_add_rms_norm)`` and, in newer releases,
``vllm_ir.fused_add_rms_norm``, which it lowers after all passes. Either hides the residual add from a pass. What a norm
computes follows from how vLLM lowers it: its own arithmetic (*native*) reads the sum before it is rounded, its CUDA kernel after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node

from tpfuse import compat

aten = torch.ops.aten
CAST = torch.ops.prims.convert_element_type.default  # the spelling of a cast after Inductor's decompositions
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
# What may lie between a sum and its norm: a residual that is added outside the norm, a multiplier.
BETWEEN = (*RESHAPES, aten.add.Tensor, aten.mul.Tensor)
REACH = 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # vLLM computes a norm in fp32
# Providers of a norm whose rounding is known, by vLLM's names, and whether they read the sum before it is rounded.
READS_UNROUNDED = {"native": True, "vllm_c": False}


@dataclass
class Norm:
    """One norm operator: its operands, and the nodes that hold its outputs.

    Attributes:
        node, args, kwargs: the operator as it was; it is erased once the norm is opened.
        x, residual, weight, eps: operands; residual and weight may be None.
        outputs: (position, node) of each output that is read; the position is None where the operator returns one tensor.
        provider: the implementation of vLLM that would run; None where vLLM decides that when it lowers the operator.
        made: the nodes that were put in its place, in graph order.
        normed, summed: those of them that stand for the outputs.
    """

    node: Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Node
    residual: Node | None
    weight: Node | None
    eps: float
    outputs: tuple[tuple[int | None, Node | None], tuple[int | None, Node | None]]
    provider: str | None
    made: list[Node] = field(default_factory=list)
    normed: Node | None = None
    summed: Node | None = None


def open_norms(
    graph: Graph, is_reduction: Callable[[Node], bool], provider_of: Callable[[Node], str], opened: list[Norm]
) -> set[str]:
    """Spell the norms behind an all-reduce in ATen. Appends each to ``opened`` as soon as it is in the graph.

    Args:
        provider_of: the implementation that vLLM will lower a node of its IR to.
    Returns:
        The providers whose rounding is not known; their norms stay as they are.
    """
    unknown: set[str] = set()
    for node in list(graph.nodes):
        norm = read(node)
        if norm is None or norm.outputs[0][1] is None or not _behind_a_reduction(norm, is_reduction):
            continue
        provider = norm.provider or provider_of(node)
        if provider not in READS_UNROUNDED:
            unknown.add(provider)
            continue
        with graph.inserting_before(node):
            norm.normed, norm.summed = _spell(graph, norm, READS_UNROUNDED[provider])
        opened.append(norm)
        held = [(output, new) for (_, output), new in zip(norm.outputs, (norm.normed, norm.summed), strict=True)]
        for output, new in held:
            if output is not None and new is not None:
                output.replace_all_uses_with(new)
        # The operator must go at once: while it stands there, it is one more reader of the sum.
        for gone in dict.fromkeys([*(output for output, _ in held if output is not None), node]):
            graph.erase_node(gone)
    return unknown


def close_norms(graph: Graph, opened: list[Norm]) -> int:
    """Put the operators of norms that were not fused back, so that vLLM lowers them as always. Returns how many were fused."""
    fused = 0
    for norm in reversed(opened):
        if norm.normed is None or compat.is_erased(norm.normed) or not norm.normed.users:
            fused += 1
        else:
            _put_back(graph, norm)
        for node in reversed(norm.made):
            if not compat.is_erased(node) and not node.users:
                graph.erase_node(node)
    return fused


def _put_back(graph: Graph, norm: Norm) -> None:
    # What the operands are by now: a fused op may have taken the place of one.
    def narrow(operand: Any) -> Any:
        return operand.args[0] if operand in norm.made and operand.target is CAST else operand

    x, residual, weight = norm.made[0].args[0], None, None
    if norm.residual is not None:
        add = next(n for n in norm.made if n.target is aten.add.Tensor)  # the first of them adds the residual
        x, residual = map(narrow, add.args[:2])
    if norm.weight is not None:
        weight = next(n for n in norm.made if n.meta.get("tpfuse_weight")).args[1]
    now = {norm.x: x, norm.residual: residual, norm.weight: weight}

    def current(value: Any) -> Any:
        return now.get(value, value) if isinstance(value, Node) else value

    with graph.inserting_before(norm.made[0]):
        args = tuple(map(current, norm.args))
        node = graph.call_function(norm.node.target, args, {k: current(v) for k, v in norm.kwargs.items()})  # type: ignore[arg-type]
        node.meta = dict(norm.node.meta)
        for (position, output), new in zip(norm.outputs, (norm.normed, norm.summed), strict=True):
            if output is None or new is None or compat.is_erased(new):
                continue
            back = node if position is None else graph.call_function(getitem, (node, position))
            if back is not node:
                back.meta = dict(output.meta)
            new.replace_all_uses_with(back)


def read(node: Node) -> Norm | None:
    """The norm that a node is, in either of vLLM's spellings; None for any other node, and for a norm of a part of the row."""
    if node.op != "call_function":
        return None
    if node.target is compat.auto_functionalized():
        named, k = str(node.args[0]), node.kwargs
        if named == "_C.fused_add_rms_norm.default":  # outputs: None, then the mutated arguments in order
            return _norm(node, k["input"], k["residual"], k["weight"], k["epsilon"], (1, 2), "vllm_c")
        if named == "_C.rms_norm.default":
            return _norm(node, k["input"], None, k["weight"], k["epsilon"], (1, None), "vllm_c")
        return None
    named = str(node.target)
    if named not in ("vllm_ir.fused_add_rms_norm.default", "vllm_ir.rms_norm.default"):
        return None
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("variance_size") is not None:
        return None  # the statistic of a part of the row: no flavour has it
    x, weight, eps = (given.get(name) for name in ("x", "weight", "epsilon"))
    if named == "vllm_ir.rms_norm.default":
        return _norm(node, x, None, weight, eps, (None, None))
    return _norm(node, x, given.get("x_residual"), weight, eps, (0, 1))


def _norm(
    node: Node,
    x: Any,
    residual: Any,
    weight: Any,
    eps: Any,
    positions: tuple[int | None, int | None],
    provider: str | None = None,
) -> Norm | None:
    adds = positions[1] is not None
    known = isinstance(x, Node) and isinstance(eps, float | int) and isinstance(residual, Node) == adds
    if not known or not (weight is None or isinstance(weight, Node)):
        return None
    values = [n.meta.get("val") for n in (x, residual, weight) if n is not None]
    if not all(isinstance(v, torch.Tensor) for v in values) or x.meta["val"].dtype not in DTYPES:
        return None
    if adds and residual.meta["val"].dtype != x.meta["val"].dtype:
        return None  # the op adds in one dtype
    first = node if positions[0] is None else _item(node, positions[0])
    second = None if positions[1] is None else _item(node, positions[1])
    outputs = ((positions[0], first), (positions[1], second))
    return Norm(node, node.args, dict(node.kwargs), x, residual, weight, float(eps), outputs, provider)


def _item(node: Node, index: int) -> Node | None:
    return next((u for u in node.users if u.target is getitem and u.args[1] == index), None)


def _behind_a_reduction(norm: Norm, is_reduction: Callable[[Node], bool]) -> bool:
    """Whether an operand is an all-reduce's result, perhaps reshaped, scaled or added to something."""
    seen = [n for n in (norm.x, norm.residual) if n is not None]
    for _ in range(REACH):
        if any(is_reduction(node) for node in seen):
            return True
        seen = [n for node in seen if node.target in BETWEEN for n in node.all_input_nodes]
    return any(is_reduction(node) for node in seen)


def _spell(graph: Graph, norm: Norm, unrounded: bool) -> tuple[Node, Node | None]:
    """(normalized value, residual sum) in ATen, in the rounding order of vLLM's implementation.

    The residual sum is rounded in any case. The norm reads it before that (``unrounded``) or after. A weight of the stream's
    dtype multiplies the rounded value; a wider one (Gemma's fp32 ``1 + w``) multiplies before the one rounding. The result
    has the dtype of ``x`` in all cases.
    """
    x = norm.x.meta["val"]
    statistic = (*x.shape[:-1], 1)

    def call(op: Any, *args: Any, shape: Any = x.shape, dtype: torch.dtype = torch.float32) -> Node:
        new = graph.call_function(op, args)
        new.meta = {k: v for k, v in norm.node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        new.meta["val"] = x.new_empty(shape, dtype=dtype)
        norm.made.append(new)
        return new

    def to(value: Node, dtype: torch.dtype) -> Node:
        return value if value.meta["val"].dtype == dtype else call(CAST, value, dtype, dtype=dtype)

    wide = torch.promote_types(x.dtype, torch.float32)
    summed = None
    if norm.residual is None:
        h = to(norm.x, torch.float32)
    elif unrounded and x.dtype != wide:
        h = call(aten.add.Tensor, to(norm.x, wide), to(norm.residual, wide))
        summed = to(h, x.dtype)
    else:
        summed = call(aten.add.Tensor, norm.x, norm.residual, dtype=x.dtype)
        h = to(summed, torch.float32)
    mean = call(aten.mean.dim, call(aten.pow.Tensor_Scalar, h, 2), [-1], True, shape=statistic)
    root = call(aten.rsqrt.default, call(aten.add.Tensor, mean, norm.eps, shape=statistic), shape=statistic)
    out = call(aten.mul.Tensor, h, root)
    if norm.weight is not None:
        weight = norm.weight.meta["val"].dtype
        out = to(out, weight)
        out = call(aten.mul.Tensor, out, norm.weight, dtype=weight)
        out.meta["tpfuse_weight"] = True
    return to(out, x.dtype), summed
