"""A quantization behind a norm that the reader of arithmetic does not get to, in words for the report.

Nothing is decided here: the norm fuses without it either way.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from . import quantizers, values
from .quant_expression import FLOAT8, FULL, Known

MAX_LOOK = 300  # nodes behind the norm that are looked at
MATRIX = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "linear",
    "matmul",
    "_scaled_mm",
    "_scaled_grouped_mm",
    "_grouped_mm",
    "_int_mm",
    "_weight_int8pack_mm",
    "convolution",
)
INTEGERS = (torch.int8, torch.uint8)
ROUNDS = values.overloads("round.default")
WHERE = values.overloads("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
PICKS_A_RESULT = "getitem"


def quantizes(nodes: Iterable[Node]) -> bool:
    """Whether anything in a graph looks like a quantization of values; what does not is not searched behind each norm."""
    return any(n.op == "call_function" and _looks_like_one(n) for n in nodes)


def _looks_like_one(node: Node) -> bool:
    name = _name(node)
    in_one_call = "quant" in name and "quantile" not in name
    return values.dtype(node) in FLOAT8 or _is_rounded(node) or in_one_call


def _is_rounded(node: Node) -> bool:
    """Whether numbers become integers; bytes of a mask, or of what is one of them already, are no quantization."""
    if values.dtype(node) not in INTEGERS:
        return node.target in ROUNDS
    sources = (values.dtype(source) for source in node.all_input_nodes)
    return any(dtype is not None and dtype.is_floating_point for dtype in sources)


def quantization(normed: Node, known: dict[Node, Known], order: dict[Node, int]) -> str:
    """A sentence about a quantization behind the norm; empty where there is none in front of a matrix product.

    Args:
        normed: the node that holds the normalized value.
        known: what the reader understood behind it.
        order: node positions.
    """
    behind = _behind(normed)
    for node in sorted(behind, key=order.__getitem__):
        sentence = _sentence(node, normed, known, behind, order) if _looks_like_one(node) else ""
        if sentence:
            return sentence
    return ""


def _behind(normed: Node) -> set[Node]:
    """What is computed of the norm in front of the matrix products, the norm included."""
    seen, queue = {normed}, list(normed.users)
    while queue and len(seen) < MAX_LOOK:
        node = queue.pop(0)
        name = _name(node)
        if node in seen or node.op != "call_function" or node.target in FULL or values.is_dead(node):
            continue
        if name in MATRIX or name.startswith(("all_reduce", "wait_tensor", "scaled_dot", "_scaled_dot")):
            continue
        seen.add(node)
        # What an operator of a library does is not known: a product, perhaps, behind which the next layer begins.
        queue.extend(u for u in node.users if not _is_of_a_library(node) or _name(u) == PICKS_A_RESULT)
    return seen


def _sentence(node: Node, normed: Node, known: dict[Node, Known], behind: set[Node], order: dict[Node, int]) -> str:
    tensor, wide = values.value(node), values.value(normed)
    if tensor is None or wide is None or node.target in quantizers.BUFFERS or node is normed:
        return ""
    if tensor.dtype in FLOAT8:
        return f"{node.name} quantizes the norm, but {_what_stops(node, known, behind, order)}"
    if _is_rounded(node):
        return f"{node.name} quantizes the norm to integers, where the fused op quantizes to fp8 alone"
    if tensor.dim() and values.same_sizes(tensor.shape[-1:], wide.shape[-1:]):
        return (
            f"{node.name} ({node.target}) quantizes the norm in one call and gives {tensor.dtype} back, where the fused op "
            "gives fp8 values and scales"
        )
    return ""


def _what_stops(node: Node, known: dict[Node, Known], behind: set[Node], order: dict[Node, int]) -> str:
    """Why the reader did not get to a cast to fp8: the first operation on the way there that it does not understand."""
    way = _way(node, behind)
    stops = sorted(
        (n for n in way if n not in known and any(a in known for a in n.all_input_nodes)), key=order.__getitem__
    )
    scales = (n for n in sorted(way, key=order.__getitem__) if _is_narrower(n, node))
    chosen = next((n for n in scales if n.target in WHERE), None)
    if chosen is not None:
        return (
            f"{chosen.name} ({chosen.target}) puts another number in the place of some scales, where a quantizer has a lower "
            "bound: scale.clamp(min=...)"
        )
    stop = stops[0] if stops else node
    return f"{stop.name} ({stop.target}) is not understood{_declare(stop)}"


def _is_narrower(node: Node, quantized: Node) -> bool:
    """Whether a node holds fewer columns than the quantized rows: a statistic of them."""
    tensor, rows = values.value(node), values.value(quantized)
    if tensor is None or rows is None:
        return False
    return not tensor.dim() or not values.same_sizes(tensor.shape[-1:], rows.shape[-1:])


def _way(node: Node, behind: set[Node]) -> set[Node]:
    """The nodes between the norm and this one."""
    way, stack = {node}, [node]
    while stack:
        sources = [a for a in stack.pop().all_input_nodes if a in behind and a not in way]
        way.update(sources)
        stack += sources
    return way


def _name(node: Node) -> str:
    return str(getattr(getattr(node.target, "overloadpacket", node.target), "__name__", ""))


def _is_of_a_library(node: Node) -> bool:
    return getattr(node.target, "namespace", "aten") not in ("aten", "prims")


def _declare(node: Node) -> str:
    """What to do about an operator of a library, which may quantize in one call."""
    return "; where it quantizes in one call, tpfuse.register_quantizer tells how" if _is_of_a_library(node) else ""
