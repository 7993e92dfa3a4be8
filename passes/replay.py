"""The proof by numbers: the model's own steps and a flavour's give the same bits on random rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tpfuse import compat

from ..ops import reference
from ..ops.flavour import Flavour
from . import values
from .expression import Leaf, Ref, Step, ancestors


def _operand_value(leaf: Leaf, base: torch.Tensor) -> torch.Tensor:
    for what, to in leaf.chain:
        base = base.to(to) if what == "cast" else base + 1.0
    return base


def _samples(
    s_dtype: torch.dtype, leaves: tuple[Leaf, ...], hidden: int, around: float
) -> list[tuple[torch.Tensor, list[Any]]]:
    """Random rows of several magnitudes with the weights that a model may have (near 1, near 0, negative)."""
    samples = []
    for seed in (11, 12):
        generator = torch.Generator().manual_seed(seed)
        # Never as many rows as columns: a square would hide what is broadcast along the wrong dimension.
        scales = [1.0, 30.0, 0.02, 300.0] if hidden != 4 else [1.0, 30.0, 0.02, 300.0, 1.0]
        s = torch.randn(len(scales), hidden, generator=generator, dtype=torch.float64) + around
        s *= torch.tensor(scales, dtype=torch.float64)[:, None]
        tensors = []
        for leaf in leaves:
            if leaf.base is None or not leaf.base.is_floating_point:
                tensors.append(torch.tensor(1e-6))
                continue
            shape = (hidden,) if leaf.shape == "vector" else ()
            tensors.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(leaf.base))
        samples.append((s.to(s_dtype), tensors))
    return samples


def _replay(steps: tuple[Step, ...], out: int, s: torch.Tensor, leaves: list[torch.Tensor]) -> torch.Tensor:
    """The model's own operations, one by one, on real numbers, reductions with the model's own keepdim.

    Reshapes of rows are identities: rows are rows. A statistic gains or loses its last dimension where the model's does.
    """
    inside = ancestors(steps, out)
    results: dict[int, Any] = {}

    def operand(arg: Any) -> Any:
        if isinstance(arg, Ref):
            return s if arg.kind == "s" else results[arg.index] if arg.kind == "step" else leaves[arg.index]
        return list(arg) if isinstance(arg, tuple) else arg

    def layout_of(arg: Any) -> str:
        return steps[arg.index].layout if isinstance(arg, Ref) and arg.kind == "step" else "rows"

    for index in sorted(inside):
        step = steps[index]
        args = [operand(a) for a in step.args]
        if step.kind in ("same", "part"):
            results[index] = args[0]
            if step.layout != layout_of(step.args[0]):
                results[index] = args[0].unsqueeze(-1) if step.layout == "kept" else args[0].squeeze(-1)
        elif step.kind == "cast":
            results[index] = args[0].to(step.dtype)
        elif step.kind in ("mean", "sum"):
            results[index] = getattr(args[0], step.kind)(-1, keepdim=step.keepdim, dtype=step.dtype)
        elif step.kind == "variance":
            results[index] = step.target(args[0], [-1], correction=args[1], keepdim=step.keepdim)
        elif step.kind == "norm2":
            results[index] = torch.linalg.vector_norm(args[0], 2, -1, keepdim=step.keepdim)
        elif step.kind == "item":
            results[index] = args[0][args[1]] if isinstance(args[0], tuple | list) else args[0]
        elif step.kind == "fused":
            shape, weight, eps = ([*args[1:], None, None])[:3]
            results[index] = (torch.nn.functional.rms_norm(args[0], shape, weight, eps), None)
            if step.target in values.overloads("rms_norm.default"):
                results[index] = results[index][0]
        else:
            results[index] = step.target(*args)
    return results[out]


@dataclass(frozen=True)
class Comparison:
    equal: bool
    close: bool


def prove(
    steps: tuple[Step, ...],
    leaves: tuple[Leaf, ...],
    out: int,
    s_dtype: torch.dtype,
    input_dtype: torch.dtype,
    hidden: int,
    flavour: Flavour,
    weight: int | None,
    at_base: bool,
    eps: float,
) -> Comparison:
    """Run the model's steps and the flavour's on the same random rows and compare bits (and, for relaxed, values)."""

    def fused(s: torch.Tensor, bases: list[Any], operands: list[Any]) -> torch.Tensor:
        w = None if weight is None else bases[weight] if at_base else operands[weight]
        return reference.rms_norm(s, w, eps, flavour, input_dtype)

    return compare(steps, leaves, out, s_dtype, input_dtype, hidden, fused)


def compare(
    steps: tuple[Step, ...],
    leaves: tuple[Leaf, ...],
    out: int,
    s_dtype: torch.dtype,
    input_dtype: torch.dtype,
    hidden: int,
    fused: Callable[[torch.Tensor, list[Any], list[Any]], torch.Tensor],
    around: float = 0.0,
) -> Comparison:
    """The model's steps against ``fused``, which gets the rows, and of each leaf the base of its chain and the operand.

    Args:
        around: the mean of the rows, in units of their standard deviation.
    """
    equal = close = True
    with compat.without_fake_mode(), torch.no_grad():
        for s, bases in _samples(s_dtype, leaves, hidden, around):
            operands = [_operand_value(leaf, base) for leaf, base in zip(leaves, bases, strict=True)]
            model = _replay(steps, out, s, operands)
            ours = fused(s, bases, operands)
            if model.dtype != ours.dtype or model.shape != ours.shape:
                return Comparison(False, False)
            equal = equal and torch.equal(model, ours)
            tolerance = 4 * torch.finfo(input_dtype).eps
            close = close and torch.allclose(model.double(), ours.double(), rtol=tolerance, atol=tolerance)
    return Comparison(equal, close)
