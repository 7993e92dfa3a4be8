"""tpfuse inside vLLM's own compilation: its all-reduce and its norm operators, fused by the pass that torch.compile uses.

    from vllm import LLM
    from vllm_pass import VllmPass

    llm = LLM(
        model,
        tensor_parallel_size=4,
        compilation_config={
            "inductor_compile_config": {"post_grad_custom_post_pass": VllmPass()},
            "pass_config": {"fuse_allreduce_rms": False},   # vLLM's own fusion would take the reductions first
        },
    )

vLLM spells the reduction ``vllm.all_reduce(x, group_name)``, and the norm as ``auto_functionalized(_C.fused_add_rms_norm)``
or, in newer releases, ``vllm_ir.fused_add_rms_norm``. The first is registered with tpfuse; the norms that read a reduction
are opened into ATen, where the pass proves them as it proves any other. A norm that reads no reduction stays vLLM's own.

Rounding: the op gives the order of vLLM's CUDA kernel (the sum is rounded, the normalised value is rounded, then weighted).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

import tpfuse
from tpfuse.backend import graph_pass

try:  # vLLM's pass manager takes its own class only
    from vllm.compilation.passes.inductor_pass import InductorPass as Base
except ImportError:
    Base = CustomGraphPass

aten = torch.ops.aten
cast = torch.ops.prims.convert_element_type.default  # the spelling of a cast after Inductor's decompositions


class VllmPass(Base):  # type: ignore[misc,valid-type]
    """A custom pass for vLLM. ``reports`` lists what was fused and why the rest was not.

    Args:
        ranks: global ranks of one of vLLM's group names, e.g. ``"tp:0"``; default asks vLLM's registry of groups.
        options: tpfuse options. All legal sites are fused by default, for vLLM uses one group for attention and MLP.
    """

    def __init__(
        self, ranks: Callable[[str], Sequence[int]] | None = None, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        tpfuse.register_collective(torch.ops.vllm.all_reduce, group="group_name", ranks=ranks or vllm_ranks)
        self.inner = graph_pass({"tpfuse.policy": "all", **(options or {})})

    def __call__(self, graph: Graph) -> None:
        open_norms(graph)
        self.inner(graph)

    def uuid(self) -> Any:
        return ("vllm_pass", self.inner.uuid())

    @property
    def reports(self) -> list[tpfuse.GraphReport]:
        return self.inner.reports


def vllm_ranks(group_name: str) -> tuple[int, ...]:
    """Global ranks of a group in vLLM's registry, which holds weak references by name."""
    from vllm.distributed import parallel_state

    return tuple(parallel_state._groups[group_name]().ranks)


def open_norms(graph: Graph) -> int:
    """Spell the norms that read an all-reduce in ATen. Returns how many."""
    opened = 0
    for node in list(graph.nodes):
        norm = read_norm(node)
        if norm is None or not reads_reduction(norm.x):
            continue
        with graph.inserting_before(node):
            normed, summed = spell(graph, norm)
        for output, new in ((norm.normed, normed), (norm.summed, summed)):
            if output is not None and new is not None:
                output.replace_all_uses_with(new)
                graph.erase_node(output)
        if not node.users:
            graph.erase_node(node)
        opened += 1
    return opened


class Norm:
    """One norm operator: its operands and the nodes that hold its outputs."""

    def __init__(
        self, x: Any, residual: Any, weight: Any, eps: float, normed: Node | None, summed: Node | None
    ) -> None:
        self.x, self.residual, self.weight, self.eps = x, residual, weight, eps
        self.normed, self.summed = normed, summed


def read_norm(node: Node) -> Norm | None:
    """The norm that a node is, in either of vLLM's spellings; None for any other node."""
    if node.op != "call_function":
        return None
    if node.target is auto_functionalized:
        named = str(node.args[0])
        k = node.kwargs
        if named == "_C.fused_add_rms_norm.default":  # outputs: None, then the mutated arguments in order
            return Norm(k["input"], k["residual"], k["weight"], k["epsilon"], item(node, 1), item(node, 2))
        if named == "_C.rms_norm.default":
            return Norm(k["input"], None, k["weight"], k["epsilon"], item(node, 1), None)
        return None
    named = str(node.target)
    if named == "vllm_ir.fused_add_rms_norm.default" and len(node.args) == 4:
        x, residual, weight, eps = node.args
        return Norm(x, residual, weight, eps, item(node, 0), item(node, 1))  # type: ignore[arg-type]
    if named == "vllm_ir.rms_norm.default" and len(node.args) == 3:
        x, weight, eps = node.args
        return Norm(x, None, weight, eps, node, None)  # type: ignore[arg-type]
    return None


def item(node: Node, index: int) -> Node | None:
    return next((u for u in node.users if u.target is operator.getitem and u.args[1] == index), None)


def reads_reduction(x: Any) -> bool:
    """Whether a value is an all-reduce's result, perhaps reshaped."""
    while isinstance(x, Node) and x.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        x = x.args[0]
    return isinstance(x, Node) and str(x.target) in ("vllm.all_reduce.default", "_c10d_functional.wait_tensor.default")


def spell(graph: Graph, norm: Norm) -> tuple[Node, Node | None]:
    """(normalised value, residual sum) in ATen, in the rounding order of vLLM's kernel."""
    x = norm.x.meta["val"]
    statistic = (*x.shape[:-1], 1)

    def call(op: Any, *args: Any, shape: Any = x.shape, dtype: torch.dtype = torch.float32) -> Node:
        new = graph.call_function(op, args)
        new.meta["val"] = x.new_empty(shape, dtype=dtype)
        return new

    summed = None if norm.residual is None else call(aten.add.Tensor, norm.x, norm.residual, dtype=x.dtype)
    h = call(cast, norm.x if summed is None else summed, torch.float32)
    mean = call(aten.mean.dim, call(aten.pow.Tensor_Scalar, h, 2), [-1], True, shape=statistic)
    root = call(aten.rsqrt.default, call(aten.add.Tensor, mean, norm.eps, shape=statistic), shape=statistic)
    rounded = call(cast, call(aten.mul.Tensor, h, root), x.dtype, dtype=x.dtype)
    weight = norm.weight.meta["val"]
    return call(aten.mul.Tensor, rounded, norm.weight, dtype=torch.promote_types(x.dtype, weight.dtype)), summed
