"""Find: where a walk from a sum ended without its norm, what stands in the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from . import in_words, storages, streams, values
from .candidate import Term
from .reasons import Reason, Refusal
from .values import ADD, DIV, MUL, shape_of

SUMS = values.overloads("sum.dim_IntList")
WHERE = values.overloads("where.self")
NORMS = values.overloads("native_layer_norm.default", "_fused_rms_norm.default")
DROPOUTS = values.overloads("native_dropout.default", "dropout.default")
MASKS = values.CASTS | MUL | DIV | values.overloads("gt.Scalar", "lt.Scalar", "ge.Scalar")
MASK_DEPTH = 4
GATHERS = frozenset({"all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast"})
# The end of a detail where the pass cannot know why a graph ends; who compiles the graph puts in its place what does.
UNKNOWN_END = (
    ": the model returns it, or the graph ends there (a graph break, which TORCH_LOGS=graph_breaks shows, or layers that are "
    "compiled one by one, as by nested_compile_region)"
)


def several_readers(current: values.Aliases, terms: list[Term]) -> Refusal | None:
    """A sum with several readers and no norm among them."""
    if len(current.readers) <= 1:
        return None
    adds = [r for r in current.readers if r.target in ADD or r.target in MUL]
    others = [r for r in current.readers if r not in adds[:1]]
    if terms and any(t.kind == "full" for t in terms):
        return no_norm(current, terms)
    if any(r.op == "output" for r in others) and adds:
        return Refusal(Reason.RETURNED, f"the sum is an output of the graph besides being read by {adds[0].name}")
    if adds:
        names = ", ".join(r.name for r in others)
        return Refusal(Reason.EXTRA_READER, f"the sum is read by {names} besides {adds[0].name}")
    return no_norm(current, terms)


def no_norm(current: values.Aliases, terms: list[Term]) -> Refusal:
    """Nothing more can be followed: say what stands in the way."""
    what = "residual sum" if terms else "sum"
    for reader in current.readers:
        if reader.op == "output":
            if not terms:
                return Refusal(Reason.RETURNED, f"the sum is an output of the graph{UNKNOWN_END}")
            return Refusal(Reason.NO_NORM, f"the {what} leaves the graph before any norm reads it{UNKNOWN_END}")
    for reader in current.readers:
        name = in_words.opaque_norm(reader)
        if name is not None:
            return Refusal(
                Reason.UNKNOWN_NORM,
                f"the {what} is read by {name}, an operator that the pass cannot look into; a norm of PyTorch's operators, "
                "torch.nn.functional.rms_norm or spelled out, is seen",
            )
    for reader in current.readers:
        if not terms and in_words.gathers_again(current.root, reader):
            return Refusal(
                Reason.SPLIT_ALL_REDUCE,
                f"{reader.name} gathers the rows that the ranks summed, over the same ranks and before any norm: the two are an "
                "all-reduce in two calls, for which the pass would have to put another reduction",
            )
    for reader in current.readers:
        if number := in_words.read_too_early(reader):
            return Refusal(
                Reason.ROWS_MOVE,
                f"{reader.name} ({reader.target}) puts {number} sums side by side before they have been waited for, as "
                "torch.vmap makes of an all-reduce: the values are undefined, without tpfuse as well. Call the model on the "
                "whole batch",
            )
    for reader in current.readers:
        if reader.target in values.ROW_MOVERS or _gathers(reader):
            return Refusal(Reason.ROWS_MOVE, f"{reader.name} ({reader.target}) moves rows of the {what}")
    for reader in current.readers:
        if _adds_rows(reader):
            (source,) = reader.all_input_nodes
            return Refusal(
                Reason.ROWS_SUMMED,
                f"{reader.name} ({reader.target}) adds up rows of the {what}, {shape_of(source)} to {shape_of(reader)}; each of "
                "them was rounded when the ranks were summed, and a fused op would round their sum alone",
            )
    factors = [(r, a) for r in current.readers if r.target in MUL for a in r.all_input_nodes if a not in current]
    for reader, other in factors:
        tensor, hidden = values.value(other), values.width(current.root)
        if isinstance(other.meta.get("val"), torch.SymInt | torch.SymFloat):
            return Refusal(
                Reason.SCALE_NOT_CONSTANT,
                f"{reader.name} multiplies the {what} by {other.name}, a number that the graph was compiled without",
            )
        if tensor is not None and (tensor.dim() == 0 or values.is_vector(other, 1)):
            dims = f" of shape {tuple(tensor.shape)}" if tensor.dim() else ""
            return Refusal(Reason.SCALE_NOT_CONSTANT, f"{reader.name} multiplies the {what} by a scalar tensor{dims}")
        if isinstance(hidden, int) and values.is_vector(other, hidden):
            return Refusal(
                Reason.SCALE_NOT_CONSTANT,
                f"{reader.name} multiplies the {what} by {other.name}, one value a column{in_words.gate(other)}",
            )
    spread = streams.spread(current)
    if spread is not None:
        reader, number = spread
        return Refusal(
            Reason.STREAMS,
            f"{reader.name} ({reader.target}) spreads the {what} over {number} residual streams (hyper-connections): the fused "
            "op lacks the mixing of the streams by weights of each row, before and behind the add",
        )
    for reader, other in factors:
        if values.same_shape(reader, current.root) and not values.same_rows(other, current.root):
            return Refusal(
                Reason.SCALE_NOT_CONSTANT,
                f"{reader.name} multiplies the {what} by {other.name} of shape {shape_of(other)}{in_words.gate(other)}",
            )
    for reader in current.readers:
        if _drops_out(reader):
            return Refusal(Reason.DROPOUT, f"{reader.name} ({reader.target}) drops values of the {what} at random")
    for reader in current.readers:
        if storages.mutates(reader):
            return Refusal(
                Reason.MUTATION,
                f"{reader.name} ({reader.target}) writes the {what} in place; the pass reads functional graphs, which "
                "an exported program is after run_decompositions()",
            )
    for reader in current.readers:
        if reader.target in values.CASTS and values.moves(reader):
            return Refusal(Reason.NO_NORM, f"{reader.name} ({reader.target}) moves the {what} to another device")
        if reader.target in values.CASTS:
            cast = f"the {what} is cast from {values.dtype(current.root)} to {values.dtype(reader)}"
            late = "; the fused op rounds an fp32 sum before anything is added to it" if terms else ""
            return Refusal(Reason.DTYPE, cast + late)
    for reader in current.readers:
        sizes = reader.args[1] if reader.target in NORMS else None
        if isinstance(sizes, Sequence) and len(sizes) > 1:
            return Refusal(
                Reason.MEAN_DIM,
                f"{reader.name} ({reader.target}) normalizes the {what} over its last {len(sizes)} dimensions",
            )
    readers = ", ".join(f"{r.name} ({in_words.operator_of(r)})" for r in current.readers[:3]) or "nothing"
    return Refusal(Reason.NO_NORM, f"the {what} is read by {readers}; no norm follows")


def flattened(current: values.Aliases) -> Refusal | None:
    """A sum in one dimension that gets its rows back behind the reduction."""
    tensor = values.value(current.root)
    readers = [r for r in current.readers if r.target in values.RESHAPES]
    if tensor is None or tensor.dim() != 1 or not readers or len(readers) != len(current.readers):
        return None
    return Refusal(
        Reason.ROWS_MOVE,
        f"the sum is of a flattened tensor, and {readers[0].name} makes it {shape_of(readers[0])} again; reduce it in that shape "
        "(all_reduce(x) for all_reduce(x.view(-1))), then its rows are seen",
    )


def add_chain(kinds: Sequence[str]) -> Refusal:
    """More is added between the sum and its norm than the op takes."""
    return Refusal(
        Reason.ADD_CHAIN,
        f"the sum goes through {' then '.join(kinds)} before the norm; the fused op takes at most one addend and one scale, then "
        "one residual",
        tuple(kinds),
    )


def _drops_out(node: Node) -> bool:
    """Whether a node is dropout, or multiplies by a random mask, which is what dropout is decomposed into."""
    if node.target in DROPOUTS:
        return True
    if node.target not in MUL and node.target not in WHERE:
        return False
    stack = [(a, 0) for a in node.all_input_nodes]
    while stack:
        current, depth = stack.pop()
        target = current.target
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
            return True
        if "inductor_random" in str(target):
            return True
        if depth < MASK_DEPTH and (depth == 0 or values.dtype(current) == torch.bool or target in MASKS):
            stack.extend((a, depth + 1) for a in current.all_input_nodes)
    return False


def _adds_rows(reader: Node) -> bool:
    """Whether a reader adds up whole rows, and keeps their columns."""
    dims = reader.args[1] if reader.target in SUMS and len(reader.args) > 1 else None
    source = values.value(reader.args[0]) if reader.args else None
    if source is None or source.dim() < 2 or not isinstance(dims, Sequence) or not dims:
        return False
    return all(isinstance(d, int) and d % source.dim() != source.dim() - 1 for d in dims)


def _gathers(node: Node) -> bool:
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "") in GATHERS
