"""Which quantizer an expression is: derived from its form, then proved as a norm's rounding order is.

By structure: the op's reference is traced and read by the same reader; its canonical expressions must be the model's. By
numbers: the model's own operations and the reference give the same bytes on rows of every kind, zeros and NaN among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch

from tpfuse import compat

from ..ops import quant_reference
from ..ops.quantizer import DTYPES, GROUP, Quantizer
from . import quant_expression
from .quant_form import Expr, canonical

ROWS = 3  # of traced examples: neither the hidden size nor a number of groups of most models


@dataclass(frozen=True)
class Scheme:
    """A proved quantizer.

    Attributes:
        quantizer: what the fused op is told.
        scales: the canonical expression of the scales that it returns; None with a static scale.
    """

    quantizer: Quantizer
    scales: Any


class Different(Exception):
    """The arithmetic is not that of any quantizer; the text says where."""


@lru_cache(maxsize=512)
def scheme_of(expr: Expr, normed: torch.dtype, hidden: int) -> Scheme | str:
    """The proved quantizer of an expression that ends in fp8, or in words why there is none."""
    try:
        quantizer = _derive(canonical(expr), normed, hidden)
    except Different as error:
        return str(error)
    except ValueError as error:  # fields that contradict one another
        return f"no quantizer has this arithmetic: {error}"
    if quantizer.granularity == "group128" and hidden % GROUP:
        return f"the hidden size {hidden} is not a multiple of {GROUP}"
    quantized, scales = reference_forms(quantizer, normed, hidden)
    if quantized != canonical(expr):
        return f"it rounds in an order that no quantizer repeats; the nearest is {quantizer.describe()}"
    if not _same_numbers(expr, quantizer, normed, hidden):
        return f"{quantizer.describe()} gives other bytes"
    return Scheme(quantizer, scales)


def forget() -> None:
    """Empty the memos (for tests and benchmarks)."""
    scheme_of.cache_clear()
    reference_forms.cache_clear()


# -- derived from the form ---------------------------------------------------------------------------------------------


def _derive(tree: Any, normed: torch.dtype, hidden: int) -> Quantizer:
    """The quantizer that the form suggests; the caller proves it."""
    fp8, have, tree = tree[1:]
    name = next((name for name, dtype in DTYPES.items() if dtype == fp8), None)
    if name is None:
        raise Different(f"it casts to {fp8}")
    largest = float(torch.finfo(fp8).max)
    saturate = tree[0] == "clamp" and tree[2:4] == (-largest, largest)
    if saturate:
        tree = tree[4]
    narrow = have == normed and normed != torch.float32
    if narrow:
        if tree[:3] != ("cast", normed, torch.float32):
            raise Different(_narrow(tree, normed))
        tree = tree[3]
    value: Any = ("n", normed)
    value = value if normed == torch.float32 else ("cast", torch.float32, normed, value)
    if tree[0] not in ("div", "mul") or value not in tree[2:]:
        raise Different("the cast to fp8 is not of the normalized value times or over a scale")
    factor: Any = tree[3] if tree[2] == value else tree[2]
    if not isinstance(factor, tuple):
        raise Different(f"the scale is the number {factor}")
    apply = "div" if tree[0] == "div" else "mul"
    if apply == "div" and tree[2] != value:
        raise Different("the scale is divided by the normalized value")
    if apply == "mul" and factor[0] == "div" and factor[2] == 1.0:
        apply, factor = "mul_recip", factor[3]
    common: dict[str, Any] = {
        "dtype": name,
        "apply": apply,
        "apply_in": "input" if narrow else "float32",
        "saturate": "clamp" if saturate else "none",
    }
    if factor[0] == "cast" and factor[3][0] == "scale":
        raise Different(f"its static scale is of {factor[2]}; expected torch.float32")
    if factor == ("scale", torch.float32):
        return Quantizer(granularity="tensor", **common)
    return _dynamic(factor, common, largest, normed, hidden)


def _narrow(tree: Any, normed: torch.dtype) -> str:
    """Why values of 16 bits are not over or times a scale that is rounded once."""
    if tree[2:3] == ("unwidened",):
        return (
            f"it is computed in {normed} with a scale of more bits and no dimensions, which each device rounds in its own place; "
            "use x.float() / scale"
        )
    return f"it is computed in {normed}"


def _dynamic(tree: Any, common: dict[str, Any], largest: float, normed: torch.dtype, hidden: int) -> Quantizer:
    """From the expression of a derived scale: bounds, power of two and division are peeled off from the outside."""
    found: dict[str, Any] = {"compute": "float32"}
    bounds: list[tuple[str, float]] = []
    where = "rounded"
    while tree[0] != "amax":
        if tree[0] == "cast":
            if tree[1] == normed and normed != torch.float32:
                found["compute"] = "input"
            tree = tree[3]
        elif tree[0] == "clamp":
            if tree[2] is None or tree[3] is not None:
                raise Different(f"a statistic is clamped between {tree[2]} and {tree[3]}; expected a lower bound alone")
            bounds.append((where, tree[2]))
            tree = tree[4]
        elif tree[0] == "exp2" and tree[2][0] == "ceil" and tree[2][2][0] == "log2":
            found["power_of_two"], where, tree = "log2", "scale", tree[2][2][2]
        elif tree[0] == "div" and tree[3] == largest:
            found["derive"], where, tree = "div", "amax", tree[2]
        elif tree[0] == "div" and tree[2] == largest:
            found["derive"], where, tree = "inverse", "amax", tree[3]
        elif tree[0] == "mul" and any(isinstance(o, float) for o in tree[2:]):
            number, rest = sorted(tree[2:], key=lambda o: not isinstance(o, float))
            if number != 1.0 / largest:
                raise Different(f"the largest value is multiplied by {number}; expected 1 / {largest:g}")
            found["derive"], where, tree = "mul_recip", "amax", rest
        else:
            raise Different(f"{tree[0]} stands between the largest value and the scale")
    if "derive" not in found:
        raise Different(f"the scale is not the largest value over {largest:g}")
    if tree[3][0] != "abs" or tree[3][2] != ("n", normed):
        raise Different("the scale is not that of the normalized value's largest magnitude")
    if len(bounds) > 1:
        raise Different("the scale has more than one lower bound")
    if bounds:
        place, floor = bounds[0]
        place = "scale" if place == "rounded" and "power_of_two" not in found else place
        found |= {"floor_at": place, "floor": floor}
    if tree[2] == hidden:
        return Quantizer(granularity="token", **common, **found)
    if tree[2] == GROUP:
        return Quantizer(granularity="group128", **common, **found)
    if tree[2] > hidden:
        raise Different("its scale is taken of several rows together, and the fused op norms them one by one")
    raise Different(f"a scale is taken of {tree[2]} values; expected a row of {hidden} or a group of {GROUP}")


# -- the proof ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def reference_forms(quantizer: Quantizer, normed: torch.dtype, hidden: int) -> tuple[Any, Any]:
    """The canonical expressions of what the op's reference gives: the quantized rows and, unless static, the scales."""
    static = quantizer.granularity == "tensor"

    def run(x: torch.Tensor, scale: torch.Tensor) -> Any:
        return quant_reference.quantize(x, quantizer, scale if static else None)

    with compat.without_fake_mode():
        examples = torch.zeros(ROWS, hidden, dtype=normed, device="cpu"), torch.ones((), device="cpu")
    graph = compat.traced_apart(run, *examples)
    order = {node: n for n, node in enumerate(graph.nodes)}
    known = quant_expression.read(next(n for n in graph.nodes if n.op == "placeholder"), order)
    quantized, scales = cast(Any, graph.output_node().args[0])
    if quantized not in known:
        return None, None
    return canonical(known[quantized].expr), canonical(known[scales].expr) if scales in known else None


def _same_numbers(expr: Expr, quantizer: Quantizer, normed: torch.dtype, hidden: int) -> bool:
    """Whether the model's operations and the reference give the same bytes on rows of every kind."""
    with compat.without_fake_mode(), torch.no_grad():
        for x, scale in _samples(normed, hidden):
            static = scale if quantizer.granularity == "tensor" else None
            unit = hidden if quantizer.granularity == "token" else GROUP if static is None else 1
            model = _run(expr, x.reshape(-1, unit), scale).reshape(x.shape)
            ours, _ = quant_reference.quantize(x, quantizer, static)
            if not same_bytes(model, ours):
                return False
    return True


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise equality; one NaN is as good as another."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.contiguous().view(bits) == b.contiguous().view(bits)
    return bool((same | (a.isnan() & b.isnan()) if a.dtype.is_floating_point else same).all())


def _samples(dtype: torch.dtype, hidden: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator("cpu").manual_seed(17)
    rows = torch.randn(8, hidden, generator=generator, dtype=torch.float64, device="cpu")
    for row, magnitude in enumerate((1.0, 30.0, 1e-3, 1e3, 0.0, 1e-30, 1.0, 1.0)):
        rows[row] *= magnitude
    rows[6, ::7] = float("nan")
    rows[7, ::5] = float("inf")
    return [(rows.to(dtype), torch.tensor(scale, device="cpu")) for scale in (0.037, 1.0, 3e-5)]


def _run(expr: Expr, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The operations themselves, on rows as long as a unit."""
    if expr.name == "n":
        return x
    if expr.name == "scale":
        return scale if expr.args[0] else scale.reshape(1, 1)
    args = [_run(a, x, scale) if isinstance(a, Expr) else a for a in expr.args]
    first = args[0]
    if expr.name == "cast":
        return first.to(expr.dtype)
    if expr.name in ("amax", "amin"):
        return getattr(first, expr.name)(-1, keepdim=True)
    if expr.name == "clamp":
        return first.clamp(min=args[1], max=args[2])
    two: dict[str, Any] = {
        "mul": torch.mul,
        "div": torch.div,
        "pow_base": torch.pow,
        "maximum": torch.maximum,
        "minimum": torch.minimum,
    }
    if expr.name in two:
        if expr.name in ("maximum", "minimum"):
            args = [a if isinstance(a, torch.Tensor) else torch.full_like(first, a) for a in args]
        return two[expr.name](*args)
    return getattr(torch, expr.name)(first)
