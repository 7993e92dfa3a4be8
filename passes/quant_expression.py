"""Read the arithmetic that hangs on a normalized value as expressions: what each node computes, and where it rounds.

Shapes matter only as the order in which values lie: a reshape changes nothing, and a statistic stands for a run of so many
neighboring elements, its *unit* (the hidden size for one value a row, 128 for one a group). A broadcast is understood when each
statistic meets the elements that it was taken of.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tpfuse import compat

from . import literals, values
from .quant_form import Expr, exact

MAX_NODES = 400  # seven linear layers that each quantize the value for themselves take 90
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


@dataclass(frozen=True)
class Known:
    """What a node holds.

    Attributes:
        expr: how it is computed.
        unit: how many neighboring elements one of its values stands for; 0: a single number.
        scale: the node that the expression calls ``scale``.
        pair: a node with several results, of which the first is this.
    """

    expr: Expr
    unit: int
    scale: Node | None = None
    pair: bool = False


def _table() -> dict[Any, str]:
    table = {
        "cast": values.CASTS,
        "abs": values.overloads("abs.default"),
        "amax": values.overloads("amax.default", "max.dim"),
        "amin": values.overloads("amin.default", "min.dim"),
        "maximum": values.overloads("maximum.default"),
        "minimum": values.overloads("minimum.default"),
        "clamp": values.overloads("clamp.default", "clamp.Tensor"),
        "clamp_min": values.overloads("clamp_min.default", "clamp_min.Tensor"),
        "clamp_max": values.overloads("clamp_max.default", "clamp_max.Tensor"),
        "mul": values.overloads("mul.Tensor", "mul.Scalar"),
        "div": values.overloads("div.Tensor", "div.Scalar"),
        "reciprocal": values.overloads("reciprocal.default"),
        "exp2": values.overloads("exp2.default"),
        "log2": values.overloads("log2.default"),
        "ceil": values.overloads("ceil.default"),
        "pow_base": values.overloads("pow.Scalar"),
    }
    return {op: name for name, ops in table.items() for op in ops}


OPERATORS = _table()
CLAMPS = {"clamp": ("min", "max"), "clamp_min": ("min",), "clamp_max": ("max",)}
SAME = (values.RESHAPES - values.EXPANDS) | values.IDENTITIES
SLICES = values.overloads("slice.Tensor", "narrow.default")
SCATTERS = values.overloads("slice_scatter.default")
PADS = values.overloads("constant_pad_nd.default")
FULL = values.overloads("full.default", "full_like.default", "zeros_like.default", "ones_like.default")
ZEROS = values.overloads("zeros_like.default")
RUN_AGAIN = frozenset(OPERATORS) | SAME | values.EXPANDS | values.COPIES | SLICES | SCATTERS | PADS


def read(normed: Node, order: dict[Node, int]) -> dict[Node, Known]:
    """What every node computes that reads the normalized value through arithmetic alone, the value itself included."""
    tensor = values.value(normed)
    if tensor is None or tensor.dim() == 0:
        return {}
    known = {normed: Known(Expr("n", tensor.dtype), 1)}
    queue = [(order[user], user.name, user) for user in normed.users]
    heapq.heapify(queue)
    seen: set[Node] = set()
    while queue and len(known) < MAX_NODES:
        node = heapq.heappop(queue)[2]
        if node in seen:
            continue
        seen.add(node)
        found = _read(node, known)
        if found is not None:
            known[node] = found
            for user in node.users:
                heapq.heappush(queue, (order[user], user.name, user))
    return known


def _read(node: Node, known: dict[Node, Known]) -> Known | None:
    """What a node computes from what is known, or None where that is not understood."""
    if node.op != "call_function":
        return None
    if getattr(node.target, "__name__", "") == "getitem":
        whole = known.get(node.args[0])  # type: ignore[arg-type]
        first = whole is not None and whole.pair and node.args[1] == 0
        return Known(whole.expr, whole.unit, whole.scale) if first and whole is not None else None
    source = known.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
    if source is not None and source.pair:
        return None
    new = values.value(node)
    if node.target in OPERATORS:
        return _operation(node, OPERATORS[node.target], known)
    if new is None:
        return None
    if node.target in values.COPIES or node.target in SCATTERS:
        # Both write their second operand over the first, the one wholly, the other where the slice is.
        written = known.get(node.args[1])  # type: ignore[arg-type]
        over = values.value(node.args[1])
        fits = over is not None and over.dtype == new.dtype and values.same_sizes(over.shape, new.shape)
        return written if fits and written is not None and not written.pair else None
    if source is None:
        return None
    if node.target in SAME:
        return source
    old = values.value(node.args[0])
    if old is None:
        return None
    if node.target in PADS:
        return source if not any(node.args[1]) else None  # type: ignore[arg-type]
    if node.target in SLICES:
        return source if values.same_sizes(old.shape, new.shape) else None
    if node.target in values.EXPANDS:
        run = _run(tuple(old.shape), tuple(new.shape))
        if source.unit == 0 or run is None or source.unit % run:
            return None
        return Known(source.expr, source.unit // run, source.scale)
    return None


def _operation(node: Node, name: str, known: dict[Node, Known]) -> Known | None:
    result: Any = node.meta.get("val", node.meta.get("example_value"))
    pair = isinstance(result, tuple | list)
    tensor = result[0] if pair else result
    if not isinstance(tensor, torch.Tensor):
        return None
    operands: list[Known] = []
    args: list[Any] = []
    shapes: list[tuple[Any, ...]] = []
    alone = name in ("cast", "amax", "amin") or name in CLAMPS
    for arg in node.args[: 1 if alone else None]:
        number = _constant(arg)
        if number is not None:
            args.append(number)
        elif isinstance(arg, Node):
            found = known.get(arg) or _scale(arg)
            fake = values.value(arg)
            if found is None or found.pair or fake is None:
                return None
            operands.append(found)
            shapes.append(tuple(fake.shape))
            args.append(found.expr)
        elif arg is None:
            args.append(None)
        else:
            return None
    scales = {o.scale for o in operands if o.scale is not None}
    if len(scales) > 1 or not any(arg in known for arg in node.all_input_nodes):
        return None
    scale = next(iter(scales), None)
    if name in ("amax", "amin"):
        unit = _reduced(node, operands[0].unit)
        return None if unit is None else Known(Expr(name, tensor.dtype, (args[0], unit)), unit, scale, pair)
    if name in CLAMPS:
        bounds = _bounds(node, name, tensor.dtype)
        if bounds is None or tensor.dtype != operands[0].expr.dtype or not values.same_sizes(tensor.shape, shapes[0]):
            return None
        expr = args[0] if bounds == (None, None) else Expr("clamp", tensor.dtype, (args[0], *bounds))
        return Known(expr, operands[0].unit, scale)
    if name != "cast" and set(node.kwargs) - {"dtype", "layout", "device", "pin_memory", "memory_format"}:
        return None
    unit = min((o.unit for o in operands if o.unit), default=0)
    for operand, shape in zip(operands, shapes, strict=True):
        run = 1 if operand.unit == 0 else _run(shape, tuple(tensor.shape))
        if run is None or (operand.unit and operand.unit != run * unit):
            return None
    return Known(Expr(name, tensor.dtype, tuple(args)), unit, scale)


def _constant(arg: Any) -> float | None:
    """A number, as such or as a tensor full of it."""
    if isinstance(arg, int | float) and not isinstance(arg, bool):
        return float(arg)
    if not isinstance(arg, Node) or arg.target not in FULL:
        return None
    like = float(arg.target not in ZEROS)
    number, dtype = arg.args[1] if len(arg.args) > 1 else like, values.dtype(arg)
    if not isinstance(number, int | float) or isinstance(number, bool) or dtype is None:
        return None
    return float(number) if dtype.is_floating_point and exact(float(number), dtype) else None


def _run(narrow: tuple[Any, ...], wide: tuple[Any, ...]) -> int | None:
    """How many neighboring values of a broadcast read one value of the operand; None unless it is a whole run each."""
    if len(narrow) > len(wide):
        spare = len(narrow) - len(wide)
        if not all(compat.statically_true(n == 1) for n in narrow[:spare]):
            return None
        narrow = narrow[spare:]
    narrow = (1,) * (len(wide) - len(narrow)) + narrow
    start = len(wide)
    while start > 0 and compat.statically_true(narrow[start - 1] == 1):
        start -= 1
    # Dimensions of size one on both sides belong to either part.
    if not all(compat.statically_true(a == b) for a, b in zip(narrow[:start], wide[:start], strict=True)):
        return None
    rest = [n for n in wide[start:] if not compat.statically_true(n == 1)]
    return math.prod(rest) if all(isinstance(n, int) for n in rest) else None


def _reduced(node: Node, unit: int) -> int | None:
    """The unit behind a reduction over the last dimensions."""
    tensor = values.value(node.args[0])
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", ())
    if tensor is None or unit == 0 or tensor.dim() == 0:
        return None
    listed = dims if isinstance(dims, list | tuple) else (dims,)
    if not listed or not all(isinstance(d, int) for d in listed):
        return None
    positions = sorted(d % tensor.dim() for d in listed)  # type: ignore[operator]
    kept = [n for n in range(tensor.dim()) if n not in positions and not compat.statically_true(tensor.shape[n] == 1)]
    if kept and kept[-1] > positions[0]:
        return None
    sizes = [tensor.shape[n] for n in positions]
    return unit * math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def _bounds(node: Node, name: str, dtype: torch.dtype) -> tuple[float | None, float | None] | None:
    """The bounds of a clamp as numbers; None where one is a tensor that the graph does not hold for good."""
    given = {**dict(zip(CLAMPS[name], node.args[1:], strict=False)), **node.kwargs}
    found: list[float | None] = []
    for bound, none in ((given.get("min"), -math.inf), (given.get("max"), math.inf)):
        number = literals.number(bound) if isinstance(bound, Node) else bound
        # A bound in a tensor that the dtype does not have is rounded where the device likes.
        if isinstance(bound, Node) and (number is None or not exact(number, dtype)):  # type: ignore[arg-type]
            return None
        found.append(None if number is None or number == none else float(number))  # type: ignore[arg-type]
    return found[0], found[1]


def _scale(node: Node, depth: int = 6) -> Known | None:
    """A single number from outside: what a model calls the scale, under reshapes and as its reciprocal."""
    tensor = values.value(node)
    if tensor is None or not tensor.dtype.is_floating_point:
        return None
    if not all(compat.statically_true(size == 1) for size in tensor.shape):
        return None
    bare = tensor.dim() == 0
    source = node.args[0] if node.op == "call_function" and node.args else None
    if isinstance(source, Node) and depth and tensor.dtype == torch.float32 == values.dtype(source):
        times_one = OPERATORS.get(node.target) == "mul" and node.args[1] == 1
        below = _scale(source, depth - 1) if times_one or node.target in SAME | values.CASTS else None
        if below is not None:
            return Known(_with_dims(below.expr, bare), 0, below.scale)
        if OPERATORS.get(node.target) == "reciprocal":
            below = _scale(source, depth - 1)
            if below is not None:
                return Known(Expr("reciprocal", tensor.dtype, (below.expr,)), 0, below.scale)
    return Known(Expr("scale", tensor.dtype, (bare,)), 0, node)


def _with_dims(expr: Expr, bare: bool) -> Expr:
    if expr.name == "scale":
        return Expr("scale", expr.dtype, (bare,))
    return Expr(expr.name, expr.dtype, tuple(_with_dims(a, bare) if isinstance(a, Expr) else a for a in expr.args))
