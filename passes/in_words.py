"""What reads a sum, in words for a refusal."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from tpfuse import compat

from . import collectives, values

JOINS = values.overloads("stack.default", "cat.default")
TORCH = ("aten", "prims", "tpfuse")  # the operators of which the pass knows what they compute, or that are its own


def operator_of(node: Node) -> str:
    """What a node calls, also where torch's compiler has wrapped an operator that writes its arguments."""
    wrappers = (compat.auto_functionalized(), compat.auto_functionalized_v2())
    return str(node.args[0] if node.target in wrappers and node.args else node.target)


def opaque_norm(node: Node) -> str | None:
    """The name of a kernel library's operator, or of a Triton kernel, that by its name is a norm; or None."""
    kernel = compat.triton_kernel_of(node)
    name = f"the Triton kernel {kernel}" if kernel else operator_of(node)
    is_norm = any(word in name.lower() for word in ("norm", "rms"))
    return name if is_norm and name.partition(".")[0] not in TORCH else None


def gathers_again(total: Node, reader: Node) -> bool:
    """Whether a reduce-scattered sum is read by a gather over the same ranks, which makes it an all-reduce in two calls."""
    start = total.args[0] if total.target is collectives.WAIT else total
    if not isinstance(start, Node):
        return False
    spelling = collectives.spelling_of(start)
    if spelling is None or spelling.kind != "reduce_scatter" or "all_gather_into_tensor" not in str(reader.target):
        return False
    names = [[a for a in (*n.args, *n.kwargs.values()) if isinstance(a, str)] for n in (start, reader)]
    ranks = [collectives.group_ranks(found[-1])[0] if found else () for found in names]
    return bool(ranks[0]) and ranks[0] == ranks[1]


def read_too_early(reader: Node) -> int:
    """How many sums a reader puts side by side before they were waited for: what ``torch.vmap`` makes of an all-reduce."""
    parts = reader.args[0] if reader.target in JOINS and reader.args else None
    if not isinstance(parts, Sequence):
        return 0
    return len(parts) if all(isinstance(part, Node) and _is_started(part) for part in parts) else 0


def _is_started(node: Node) -> bool:
    """Whether a node is what a reduction gives at once, under any of its names."""
    while collectives.spelling_of(node) is None:
        source = values.aliased(node) if node.target is not collectives.WAIT else None
        if source is None:
            return False
        node = source
    # Functional collectives alone return before they have ended.
    return "c10d_functional" in str(node.target) and all(user.target is not collectives.WAIT for user in node.users)


def gate(node: Node) -> str:
    """What to say about a factor that is no weight: it cannot be folded into one."""
    current = node
    while current.op == "call_function":
        source = next(iter(current.all_input_nodes), None)
        kept = (
            current.target in values.CASTS or current.target in values.ROW_MOVERS or values.aliased(current) is source
        )
        if source is None or not kept:
            return ": a gate that the model computes, as diffusion transformers do (adaLN); the op has no such factor"
        current = source
    return ""
