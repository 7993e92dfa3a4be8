"""Expressions, and one form for all those that give the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Expr:
    """One operation with its result's dtype. ``args`` are expressions and numbers; ``n`` is the normalized value, ``scale``
    a single number from outside, whose one argument says whether it has no dimensions (which matters for type promotion)."""

    name: str
    dtype: torch.dtype
    args: tuple[Any, ...] = ()


MAXIMA = (448.0, 57344.0)  # of e4m3 and e5m2
_WIDER = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
    # compressed-tensors widens what it has cast to fp8, and casts it again.
    torch.float8_e4m3fn: (torch.bfloat16, torch.float16, torch.float32, torch.float64),
    torch.float8_e5m2: (torch.bfloat16, torch.float16, torch.float32, torch.float64),
}


def _widens(a: torch.dtype, b: torch.dtype) -> bool:
    """Whether a cast from ``a`` to ``b`` keeps every value."""
    return a == b or b in _WIDER.get(a, ())


def exact(number: float | None, dtype: torch.dtype) -> bool:
    """Whether a dtype has this number. No bound is as good as one that it has."""
    return number is None or bool(
        torch.tensor(number, dtype=torch.float64, device="cpu").to(dtype).double().item() == number
    )


def _cast(tree: Any, have: torch.dtype, want: torch.dtype) -> Any:
    if have == want:
        return tree
    if tree[0] == "cast" and _widens(tree[2], have):  # rounded from the value before it was widened
        return _cast(tree[3], tree[2], want)
    if (have, want) == (torch.float64, torch.float32):
        inverse = _inverse_in_fp32(tree)
        if inverse is not None:
            return inverse
    return ("cast", want, have, tree)


def _inverse_in_fp32(tree: Any) -> Any:
    """``max / y`` of a statistic in fp64, rounded to fp32, as the division in fp32 that gives the same bits; else None.

    A quotient of two fp32 numbers is no midpoint of two others and at least 2**-49 of itself away from one, while fp64 is off by
    2**-52 at most, also where it multiplies ``max`` by ``1 / y``. The quotients of these numbers are normal, zero or infinite.
    """
    if tree[0] not in ("mul", "div") or len(tree) != 4:  # longer where an operand is not widened
        return None
    number, below = tree[2:]
    if tree[0] == "mul":
        below, number = sorted(tree[2:], key=lambda o: isinstance(o, float))
        if not isinstance(below, tuple) or below[0] != "div" or below[2] != 1.0:
            return None
        below = below[3]
    if number not in MAXIMA or not isinstance(below, tuple):
        return None
    low = None
    if below[0] == "clamp" and below[3] is None:
        low, below = below[2], below[4]
    if below[0] != "cast" or not _widens(below[2], torch.float32) or not _same_inverse(number, low):
        return None
    narrow = _cast(below[3], below[2], torch.float32)
    return ("div", torch.float32, number, narrow if low is None else ("clamp", torch.float32, low, None, narrow))


def _same_inverse(number: float, low: float | None) -> bool:
    """Whether a lower bound that fp32 rounds gives the same inverse, by a division as by a product with ``1 / low``."""
    if low is None:
        return True
    exact_bound = torch.tensor(low, dtype=torch.float64, device="cpu")
    rounded = exact_bound.float()
    inverse = torch.full_like(rounded, number) / rounded
    return low > 0 and all(bool(wide.float() == inverse) for wide in (number / exact_bound, number * (1 / exact_bound)))


@lru_cache(maxsize=4096)
def canonical(expr: Expr) -> Any:
    """The expression as nested tuples: equal for two programs that run the same roundings in the same order.

    Rewritten is only what changes no bit: type promotion becomes a cast; ``abs``, ``amax`` and a clamp at representable bounds
    move in front of a widening cast; bounds are merged; operands of a product are sorted; ``1 / x`` is the reciprocal.
    """
    if expr.name in ("n", "scale"):
        return (expr.name, expr.dtype)
    if expr.name in ("cast", "abs", "amax", "amin", "clamp"):
        value = expr.args[0]
        if expr.name == "cast":
            return _cast(canonical(value), value.dtype, expr.dtype)
        return _monotone(expr.name, canonical(value), value.dtype, expr.args[1:])
    if expr.name == "maximum":
        magnitude = _largest_magnitude(expr)
        if magnitude is not None:
            return canonical(magnitude)
    inner = [(canonical(a), a.dtype) if isinstance(a, Expr) else (a, None) for a in expr.args]
    if any(dtype is not None and not _widens(dtype, expr.dtype) for _, dtype in inner):
        # A number without dimensions does not widen the result. Where it is rounded then depends on the device.
        return (expr.name, expr.dtype, "unwidened", *(arg for arg, _ in inner))
    # Products and quotients of 16-bit values are computed in fp32 and rounded.
    short = expr.dtype.itemsize == 2 and expr.name in ("mul", "div", "reciprocal")
    wide = torch.float32 if short else expr.dtype
    operands = [arg if dtype is None else _cast(arg, dtype, wide) for arg, dtype in inner]
    if expr.name == "reciprocal":
        tree = ("div", wide, 1.0, operands[0])
    elif expr.name == "mul":
        rest = [o for o in operands if o != 1.0]
        tree = rest[0] if len(rest) == 1 else ("mul", wide, *sorted(rest, key=repr))
    else:
        tree = (expr.name, wide, *operands)
    return _cast(tree, wide, expr.dtype)


def _monotone(name: str, tree: Any, have: torch.dtype, rest: tuple[Any, ...]) -> Any:
    if tree[0] == "cast" and _widens(tree[2], have) and (name != "clamp" or all(exact(b, tree[2]) for b in rest)):
        return _cast(_monotone(name, tree[3], tree[2], rest), tree[2], have)
    if name == "abs" and tree[0] == "abs":
        return tree
    if name == "amax" and tree[0] == "amax":  # the largest of the largest
        return ("amax", tree[1], rest[0], tree[3])
    if (
        name == "clamp"
        and tree[0] == "clamp"
        and (tree[2] is None or rest[0] is None)
        and (tree[3] is None or rest[1] is None)
    ):
        low = tree[2] if rest[0] is None else rest[0]
        high = tree[3] if rest[1] is None else rest[1]
        if low is None or high is None or low <= high:
            return ("clamp", have, low, high, tree[4])
    if name in ("amax", "amin"):
        return (name, have, rest[0], tree)
    return ("abs", have, tree) if name == "abs" else ("clamp", have, *rest, tree)


def _largest_magnitude(expr: Expr) -> Expr | None:
    """``max(|min(x)|, |max(x)|)``, with or without a zero among the values, as ``max(|x|)``."""
    found: dict[str, tuple[Any, ...]] = {}
    bounds = {"amin": "minimum", "amax": "maximum"}
    for arg in expr.args:
        if not isinstance(arg, Expr) or arg.name != "abs":
            return None
        inner = arg.args[0]
        if inner.name in bounds.values() and 0.0 in inner.args:
            outer, inner = inner.name, next(a for a in inner.args if a != 0.0)
            if bounds.get(inner.name) != outer:
                return None
        found[inner.name] = inner.args
    if set(found) != {"amin", "amax"} or found["amin"] != found["amax"]:
        return None
    value, unit = found["amax"]
    return Expr("amax", expr.dtype, (Expr("abs", value.dtype, (value,)), unit))
