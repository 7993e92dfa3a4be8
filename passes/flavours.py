"""Where a norm casts and rounds: derive its flavour, then prove that the flavour repeats the model's bits.

The proof has two parts. By structure: the flavour runs the same operations on the same dtypes in the same order. By numbers:
both give the same bits on random rows. The first excludes differences too rare for samples, the second excludes mistakes
in the first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from ..ops import reference
from ..ops.flavour import Flavour
from ..ops.layer_norm_flavour import LayerNormFlavour
from .expression import Leaf, Ref, Step, ancestors


@dataclass(frozen=True)
class Match:
    """A program that is a norm, by positions in the program."""

    out: int
    weight: int | None  # leaf
    at_base: bool  # pass the base of the leaf's chain, not the operand
    eps: float
    flavour: Flavour | LayerNormFlavour
    exact: bool
    shift: int | None = None  # of a LayerNorm: the leaf that is added behind the weight


def derive(
    steps: tuple[Step, ...],
    leaves: tuple[Leaf, ...],
    out: int,
    s_dtype: torch.dtype,
    input_dtype: torch.dtype,
    at_base: bool,
) -> tuple[Flavour, int | None] | None:
    """The flavour that the structure suggests, and the weight's leaf. The caller proves it.

    ``input_dtype`` is what a flavour calls so; ``s_dtype`` is wider where ``s`` is a sum that was not rounded.
    """
    inside = ancestors(steps, out)

    def name(dtype: torch.dtype | None) -> str:
        return "float32" if dtype == torch.float32 else "input"

    def operand_dtype(arg: Any) -> torch.dtype | None:
        if not isinstance(arg, Ref):
            return None
        return s_dtype if arg.kind == "s" else steps[arg.index].dtype if arg.kind == "step" else leaves[arg.index].dtype

    chain = [steps[i] for i in sorted(inside)]
    out_dtype = steps[out].dtype
    fused = next((s for s in chain if s.kind == "fused"), None)
    reduction = next((s for s in chain if s.kind in ("mean", "sum")), None)
    if reduction is None and fused is None:
        return None
    weight: int | None = None
    gain, gain_dtype, normed = "none", "own", None
    if fused is not None:
        compute, mean, root = "float32" if s_dtype != torch.float64 else "input", "mean", "rsqrt"
        normed = compute
        weight = next((a.index for a in fused.args if isinstance(a, Ref) and a.kind == "leaf"), None)
        gain = "none" if weight is None else "weight"
    else:
        assert reduction is not None
        compute = name(operand_dtype(reduction.args[0]))
        mean = reduction.kind
        root = root_of(chain)
    for step in chain:
        if step.kind not in ("mul",):
            continue
        refs = [a for a in step.args if isinstance(a, Ref)]
        leaf = next((r for r in refs if r.kind == "leaf" and leaves[r.index].shape == "vector"), None)
        other = next((r for r in refs if r is not leaf), None)
        if leaf is None or other is None:
            continue
        weight, gain, normed = leaf.index, "weight", name(operand_dtype(other))
    if weight is not None and at_base:
        for what, to in leaves[weight].chain:
            if what == "plus_one":
                gain = "one_plus_weight"
            elif what == "cast" and gain == "weight":
                gain_dtype = name(to)
    if normed is None:  # no gain: rounded once, at the end
        normed = name(out_dtype)
    if input_dtype == torch.float32:
        normed = "input"
    weight_dtype = None if weight is None else leaves[weight].base if at_base else leaves[weight].dtype
    reads = "rounded" if s_dtype == input_dtype else "unrounded"
    if reads == "unrounded" and compute != "float32":
        return None
    promoted = Flavour(compute, mean, root, normed, gain, gain_dtype, "promoted", reads)
    if reference.output_dtype(input_dtype, weight_dtype, promoted) == out_dtype:
        return promoted, weight
    return replace(promoted, out="input" if out_dtype == input_dtype else "float32"), weight


def root_of(chain: list[Step]) -> str:
    """How the values are divided by the root, as :attr:`.Flavour.root` says it."""
    kinds = {s.kind for s in chain}
    if "rsqrt" in kinds:
        return "rsqrt"
    if "sqrt" not in kinds:
        return "pow"
    return "mul_recip_sqrt" if _reciprocal(chain) else "div_sqrt"


def _reciprocal(chain: list[Step]) -> bool:
    return any(
        s.kind == "reciprocal" or (s.kind == "div" and s.args and not isinstance(s.args[0], Ref) and s.args[0] == 1)
        for s in chain
    )


# -- the proof, by structure ------------------------------------------------------------------------------------------
#
# Two programs whose trees are equal run the same operations on the same dtypes in the same order, up to rewrites that
# change no bit: operands of + and * swapped, h * h for h ** 2, 1 / x for reciprocal(x), type promotion spelled as a cast.


def commuting(kind: str, a: Any, b: Any) -> tuple[Any, ...]:
    return (kind, *sorted((a, b), key=repr))


def casted(tree: Any, have: torch.dtype | None, want: torch.dtype | None) -> Any:
    return tree if have == want or have is None or want is None else ("cast", want, tree)


def tree_of(steps: tuple[Step, ...], leaves: tuple[Leaf, ...], out: int, s_dtype: torch.dtype) -> Any:
    """The program up to ``out`` as nested tuples, or None when it holds a step that no flavour has."""
    trees: dict[int, Any] = {}

    def operand(arg: Any) -> tuple[Any, torch.dtype | None]:
        if not isinstance(arg, Ref):
            return arg, None
        if arg.kind == "s":
            return "s", s_dtype
        if arg.kind == "step":
            return trees[arg.index], steps[arg.index].dtype
        leaf = leaves[arg.index]
        if leaf.shape != "vector":
            return None, None
        tree, have = ("w", arg.index), leaf.base
        for what, to in leaf.chain:
            if what == "cast":
                tree, have = casted(tree, have, to), to
            else:
                tree = commuting("add", tree, 1.0)
        return tree, leaf.dtype

    for index in sorted(ancestors(steps, out)):
        step = steps[index]
        pairs = [operand(a) for a in step.args]
        (a, have), b = pairs[0], pairs[1] if len(pairs) > 1 else (None, None)
        tree: Any
        if a is None or step.layout in ("", "part"):
            return None
        if step.kind in ("same", "part"):
            tree = a if step.kept else None
        elif step.kind == "cast":
            tree = casted(a, have, step.dtype)
        elif step.kind == "square" or (step.kind == "pow" and b[0] == 2):
            tree = ("mul", a, a)
        elif step.kind == "pow":
            tree = ("pow", a, float(cast(float, b[0])))
        elif step.kind in ("mean", "sum"):
            tree = (step.kind, a) if have == step.dtype else None
        elif step.kind in ("rsqrt", "sqrt", "reciprocal"):
            tree = (step.kind, a)
        elif step.kind == "variance":
            tree = ("var_mean", a) if step.dtype is None and step.args[1] == 0 else None
        elif step.kind == "layer_norm":
            tree = ("layer_norm", a, pairs[2][0], pairs[3][0], step.args[4])
        elif step.kind == "item":
            tree = ("item", a, step.args[1])
        elif step.kind in ("mul", "add", "sub", "div") and b[0] is not None:
            left = casted(a, have, step.dtype) if have is not None else float(cast(float, a))
            right = casted(b[0], b[1], step.dtype) if b[1] is not None else float(b[0])
            if step.kind == "div":
                tree = ("reciprocal", right) if left == 1.0 else ("div", left, right)
            elif step.kind == "sub":
                tree = ("sub", left, right)
            elif step.kind == "mul" and 1.0 in (left, right):
                tree = right if left == 1.0 else left
            else:
                tree = commuting(step.kind, left, right)
        else:
            tree = None
        if tree is None:
            return None
        trees[index] = tree
    return trees[out]


def _flavour_tree(
    flavour: Flavour,
    eps: float,
    hidden: int,
    s_dtype: torch.dtype,
    input_dtype: torch.dtype,
    weight: int | None,
    chain: list[tuple[str, Any]],
    base: Any,
) -> Any:
    """What ``reference.rms_norm`` does, as the same kind of tree."""
    compute = torch.float32 if flavour.compute == "float32" else s_dtype
    c = casted("s", s_dtype, compute)
    mean = ("mean", ("mul", c, c)) if flavour.mean == "mean" else ("div", ("sum", ("mul", c, c)), float(hidden))
    v = commuting("add", mean, eps)
    tree, have = over_root(c, v, flavour.root), compute
    want = torch.float32 if flavour.normed == "float32" else input_dtype
    tree, have = casted(tree, have, want), want
    if flavour.gain != "none":
        gain, dtype = gain_tree(flavour, input_dtype, weight, chain, base)
        result = torch.promote_types(have, dtype)
        tree, have = commuting("mul", casted(tree, have, result), casted(gain, dtype, result)), result
    final = {"input": input_dtype, "float32": torch.float32, "promoted": have}[flavour.out]
    return casted(tree, have, final)


def over_root(c: Any, v: Any, root: str) -> Any:
    """``c`` over the root of ``v``, spelled as a flavour's ``root`` says."""
    if root == "rsqrt":
        return commuting("mul", c, ("rsqrt", v))
    if root == "div_sqrt":
        return ("div", c, ("sqrt", v))
    if root == "mul_recip_sqrt":
        return commuting("mul", c, ("reciprocal", ("sqrt", v)))
    return commuting("mul", c, ("pow", v, -0.5))


def gain_tree(
    flavour: Flavour, input_dtype: torch.dtype, weight: int | None, chain: list[tuple[str, Any]], base: Any
) -> tuple[Any, Any]:
    """The gain of a flavour, and its dtype. ``chain`` is not empty only for a weight that is passed as the operand itself."""
    gain: Any = ("w", weight)
    dtype = base
    for what, to in chain:
        if what == "cast":
            gain, dtype = casted(gain, dtype, to), to
        else:
            gain = commuting("add", gain, 1.0)
    wanted = {"own": dtype, "float32": torch.float32, "input": input_dtype}[flavour.gain_dtype]
    gain, dtype = casted(gain, dtype, wanted), wanted
    return (commuting("add", gain, 1.0) if flavour.gain == "one_plus_weight" else gain), dtype


def same_order(
    steps: tuple[Step, ...],
    leaves: tuple[Leaf, ...],
    match: Match,
    s_dtype: torch.dtype,
    input_dtype: torch.dtype,
    hidden: int,
) -> bool:
    """Whether the flavour runs the model's operations in the model's order."""
    if any(steps[i].kind == "fused" for i in ancestors(steps, match.out)):
        return True  # one ATen operator: its order is its own business, and the numbers decide
    leaf = None if match.weight is None else leaves[match.weight]
    chain = [] if leaf is None or match.at_base else list(leaf.chain)
    base = None if leaf is None else leaf.base
    model = tree_of(steps, leaves, match.out, s_dtype)
    assert isinstance(match.flavour, Flavour)
    return model is not None and model == _flavour_tree(
        match.flavour, match.eps, hidden, s_dtype, input_dtype, match.weight, chain, base
    )


# -- the proof, by numbers ------------------------------------------------------------------------------------------------------
