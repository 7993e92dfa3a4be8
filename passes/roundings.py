"""Roundings that a compiler cannot drop: after each bf16 step of a lowered region stands arithmetic that rounds to bf16.

Between operators that it fuses, Inductor keeps bf16 values in fp32, as its default is. A model rounds there, and so does the op.
The arithmetic below works on the bits of an fp32 number and leaves one that bf16 can hold as it is. So a graph with it computes
what it computed before, operator by operator; and where operators are fused, their values are rounded all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from tpfuse import compat

from . import values
from .candidate import Candidate

aten, prims = torch.ops.aten, torch.ops.prims
LOW_BITS = 16  # of an fp32 number, which bf16 has not
HALF = 0x7FFF  # just below one half of bf16's last place
KEPT = -0x10000  # all bits but the low ones, as int32

# Nothing is computed there, so nothing is rounded.
MOVES = values.RESHAPES | values.IDENTITIES | values.COPIES


def pin(graph: Graph, candidate: Candidate) -> None:
    """Round every bf16 value of the region where the graph says that it is bf16, operands of the region included."""
    mode = compat.fake_mode_of([values.value(node) for node in (candidate.collective.value, *candidate.operands)])
    inside = set(candidate.nodes)
    moved = {
        candidate.collective.node,
        *candidate.collective.waits,
        *(candidate.block.nodes if candidate.block else ()),
    }
    for node in candidate.nodes:
        if node not in moved and _computed(node):
            _round(graph, node, mode, lambda user: True)
    for node in dict.fromkeys(candidate.operands):
        # The op reads an operand from memory, where it is rounded.
        if node not in inside and _computed(node):
            _round(graph, node, mode, inside.__contains__)


def _computed(node: Node) -> bool:
    return (
        node.op == "call_function"
        and node.target not in MOVES
        and values.dtype(node) == torch.bfloat16
        and "rounds" not in node.meta
    )


def _round(graph: Graph, node: Node, mode: Any, wanted: Callable[[Node], bool]) -> None:
    """Let the readers of ``node`` that are wanted read it rounded: to nearest, ties to even."""
    readers = [user for user in node.users if wanted(user)]

    def call(target: Any, *args: Any) -> Node:
        with mode, torch.no_grad():
            fake = target(*(a.meta["val"] if isinstance(a, Node) else a for a in args))
        new = graph.call_function(target, args)
        new.meta.update({key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta})
        new.meta.update(val=fake, rounds=True)
        return new

    def then(target: Any, *args: Any) -> Node:
        nonlocal last
        with graph.inserting_after(last):
            last = call(target, *args)
        return last

    last = node
    wide = then(prims.convert_element_type.default, node, torch.float32)
    bits = then(aten.view.dtype, wide, torch.int32)
    odd = then(aten.bitwise_and.Scalar, then(aten.bitwise_right_shift.Tensor_Scalar, bits, LOW_BITS), 1)
    up = then(aten.add.Tensor, then(aten.add.Tensor, bits, HALF), odd)
    rounded = then(aten.view.dtype, then(aten.bitwise_and.Scalar, up, KEPT), torch.float32)
    # The bits of some numbers that are none would run over into those of zero.
    kept = then(aten.where.self, then(aten.isnan.default, wide), wide, rounded)
    made = then(prims.convert_element_type.default, kept, torch.bfloat16)
    for user in readers:
        user.replace_input_with(node, made)
