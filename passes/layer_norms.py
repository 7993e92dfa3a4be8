"""Recognize a LayerNorm in a program: what :mod:`.norms` and :mod:`.flavours` are for RMSNorm.

A step is one exactly when it equals ``(s - mean(s)) * g / sqrt(var(s) + eps) + b`` with ``g`` one of 1, w, 1 + w, and ``b`` 0 or
a vector. The flavour that its structure suggests is proved as any flavour is, by structure and by numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..ops import layer_norm_reference
from ..ops.layer_norm_flavour import LayerNormFlavour
from .expression import Leaf, Ref, Step, ancestors, closed
from .flavours import Match, casted, commuting, gain_tree, over_root, root_of, tree_of
from .reasons import Reason, Refusal
from .replay import compare
from .symbolic import Meaning

AROUND = 3.0  # the mean of the rows of the proof, in their standard deviations


def analyze(
    meaning: Meaning,
    steps: tuple[Step, ...],
    leaves: tuple[Leaf, ...],
    s_dtype: torch.dtype,
    input_dtype: torch.dtype,
    relaxed: bool,
) -> Match | Refusal | None:
    """The LayerNorm of a program, or why what means one is none for the fused op; None when no step means one."""
    found: dict[int, Any] = {}
    for index, expr in enumerate(meaning.exprs):
        affine = meaning.affine(expr)
        if affine is not None and steps[index].dtype is not None and steps[index].layout == "rows":
            found[index] = affine
    if not found:
        return None
    seen = tuple(dict.fromkeys(s.kind for s in steps if s.kind not in ("same", "item")))
    if s_dtype != input_dtype:
        detail = f"a LayerNorm reads the residual sum before it is rounded to {input_dtype}"
        return Refusal(Reason.LAYER_NORM, detail, seen)
    first = min(found)
    candidates = [i for i in sorted(found, reverse=True) if steps[i].kind != "same" and first in ancestors(steps, i)]
    complete = [i for i in candidates if closed(steps, i, ancestors(steps, i))]
    if not complete:
        detail = "mean, variance or a value in the middle of a LayerNorm is read elsewhere too"
        return Refusal(Reason.LAYER_NORM, detail, seen)
    close: Match | None = None
    failed: LayerNormFlavour | None = None
    for out in complete:
        gain, eps, bias = found[out]
        for at_base in (True, False):
            match = derive(steps, leaves, out, s_dtype, at_base, float(eps))
            if match is None or (gain == 1) != (match.weight is None) or (bias == 0) != (match.shift is None):
                continue
            flavour = match.flavour
            assert isinstance(flavour, LayerNormFlavour)
            proof = _prove(steps, leaves, match, s_dtype, meaning.hidden)
            if proof.equal and _same_order(steps, leaves, match, s_dtype):
                return replace(match, exact=True)
            failed = failed or flavour
            close = close or (match if proof.close else None)
    if relaxed and close is not None:
        return close
    nearest = f"; the nearest flavour, {failed}, gives other bits" if failed else ""
    detail = f"a LayerNorm in {input_dtype} whose arithmetic the fused op does not repeat{nearest}"
    return Refusal(Reason.UNKNOWN_FLAVOUR, detail, seen)


def derive(
    steps: tuple[Step, ...], leaves: tuple[Leaf, ...], out: int, dtype: torch.dtype, at_base: bool, eps: float
) -> Match | None:
    """The match that the structure suggests, not proved yet. ``dtype`` is that of ``s``."""
    chain = [steps[i] for i in sorted(ancestors(steps, out))]

    def name(of: torch.dtype | None) -> str:
        return "float32" if of == torch.float32 else "input"

    def dtype_of(arg: Any) -> torch.dtype | None:
        return dtype if arg.kind == "s" else steps[arg.index].dtype if arg.kind == "step" else leaves[arg.index].dtype

    native = next((s for s in chain if s.kind == "layer_norm"), None)
    reduction = next((s for s in chain if s.kind in ("mean", "variance")), None)
    weight: int | None = None
    shift: int | None = None
    if native is not None:
        leaf = [a.index if isinstance(a, Ref) and a.kind == "leaf" else None for a in native.args[2:4]]
        weight, shift = leaf
        read = dtype_of(native.args[0])
        compute = "float32" if read != dtype and read == torch.float32 else "input"
        moments, root, normed = "native", "rsqrt", "float32"
    elif reduction is not None:
        compute = name(dtype_of(reduction.args[0]))
        moments, root = ("var_mean" if reduction.kind == "variance" else "squares"), root_of(chain)
        normed = ""
        for step in chain:
            refs = [a for a in step.args if isinstance(a, Ref)]
            vector = next((r for r in refs if r.kind == "leaf" and leaves[r.index].shape == "vector"), None)
            other = next((r for r in refs if r is not vector), None)
            if step.kind not in ("mul", "add") or vector is None or other is None:
                continue
            normed = normed or name(dtype_of(other))
            if step.kind == "mul":
                weight = vector.index
            else:
                shift = vector.index
        normed = normed or name(steps[out].dtype)
    else:
        return None
    gain, gain_dtype = "none" if weight is None else "weight", "own"
    if weight is not None and at_base:
        for what, to in leaves[weight].chain:
            if what == "plus_one":
                gain = "one_plus_weight"
            elif gain == "weight":
                gain_dtype = name(to)
    end = steps[out].dtype
    result = "input" if end == dtype else "float32" if end == torch.float32 else "promoted"
    if moments == "native" and compute == "input" and result == "float32":
        return None  # the operator rounds before that cast, which stays outside
    with_shift = "none" if shift is None else "bias"
    flavour = LayerNormFlavour(moments, compute, root, normed, gain, gain_dtype, with_shift, result)
    return Match(out, weight, at_base, eps, flavour, exact=False, shift=shift)


def _prove(steps: tuple[Step, ...], leaves: tuple[Leaf, ...], match: Match, dtype: torch.dtype, hidden: int) -> Any:
    flavour = match.flavour
    assert isinstance(flavour, LayerNormFlavour)

    def fused(s: torch.Tensor, bases: list[Any], operands: list[Any]) -> torch.Tensor:
        weights = bases if match.at_base else operands
        w = None if match.weight is None else weights[match.weight]
        b = None if match.shift is None else operands[match.shift]
        return layer_norm_reference.layer_norm(s, w, b, match.eps, flavour)

    return compare(steps, leaves, match.out, dtype, dtype, hidden, fused, AROUND)


def _same_order(steps: tuple[Step, ...], leaves: tuple[Leaf, ...], match: Match, dtype: torch.dtype) -> bool:
    """Whether the flavour runs the model's operations in the model's order."""
    model = tree_of(steps, leaves, match.out, dtype)
    return model is not None and model == _flavour_tree(leaves, match, dtype)


def _flavour_tree(leaves: tuple[Leaf, ...], match: Match, dtype: torch.dtype) -> Any:
    """What :func:`tpfuse.ops.layer_norm_reference.layer_norm` does, as a tree of :func:`.flavours.tree_of`."""
    flavour = match.flavour
    assert isinstance(flavour, LayerNormFlavour)
    have = torch.float32 if flavour.compute == "float32" else dtype
    c = casted("s", dtype, have)
    gain: Any = None
    gain_dtype: Any = None
    if match.weight is not None:
        leaf = leaves[match.weight]
        chain = [] if match.at_base else list(leaf.chain)
        gain, gain_dtype = gain_tree(flavour.scaling, dtype, match.weight, chain, leaf.base)
    shift: Any = None
    shift_dtype: Any = None
    if match.shift is not None:
        leaf = leaves[match.shift]
        shift, shift_dtype = ("w", match.shift), leaf.base
        for what, to in leaf.chain:
            shift = casted(shift, shift_dtype, to) if what == "cast" else commuting("add", shift, 1.0)
            shift_dtype = to if what == "cast" else shift_dtype
    mean: Any
    variance: Any
    if flavour.moments == "native":
        tree: Any = ("item", ("layer_norm", c, gain, shift, match.eps), 0)
    else:
        if flavour.moments == "var_mean":
            moments = ("var_mean", c)
            mean, variance = ("item", moments, 1), ("item", moments, 0)
        else:
            mean, variance = ("mean", c), None
        centered = ("sub", c, mean)
        variance = variance or ("mean", ("mul", centered, centered))
        tree = over_root(centered, commuting("add", variance, match.eps), flavour.root)
        normed = torch.float32 if flavour.normed == "float32" else dtype
        tree, have = casted(tree, have, normed), normed
        for kind, operand, of in (("mul", gain, gain_dtype), ("add", shift, shift_dtype)):
            if operand is not None:
                result = torch.promote_types(have, of)
                tree = commuting(kind, casted(tree, have, result), casted(operand, of, result))
                have = result
    return casted(tree, have, {"input": dtype, "float32": torch.float32, "promoted": have}[flavour.out])
