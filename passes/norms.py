"""Recognize a norm by what it computes, not by how it is spelled.

From a value ``s`` onward, the arithmetic nodes are read into a short program (``expression``, whose operators are listed in
``operators``), the program is interpreted over sympy symbols (``symbolic``), and it is a norm exactly when some step equals
``s * g / sqrt(mean(s**2) + eps)`` with ``g`` one of 1, w, 1 + w. Where it casts becomes a :class:`~tpfuse.ops.Flavour`, and
that the flavour repeats the model's bits is proved (``flavours`` by structure, ``replay`` by numbers). A model's layers all
look alike, so each program is analyzed once. What is no RMSNorm may be a LayerNorm: see ``layer_norms``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Node

from ..ops.flavour import Flavour
from ..ops.layer_norm_flavour import LayerNormFlavour
from . import layer_norms, values
from .expression import Leaf, Step, ancestors, closed, read
from .flavours import Match, derive, same_order
from .operators import REDUCTIONS
from .reasons import Reason, Refusal
from .replay import prove
from .symbolic import Meaning


@dataclass(frozen=True)
class NormForm:
    """A norm found in the graph: an RMSNorm, or a LayerNorm.

    Attributes:
        out: the node that holds the normalized value.
        weight: the node to pass as weight, or None.
        eps: added to the mean of squares or to the variance.
        flavour: its rounding order.
        exact: whether the flavour repeats the model's bits (False only with relaxed numerics).
        steps: nodes between ``s`` and ``out``, both not counted, in graph order.
        shift: of a LayerNorm, the node to pass as what is added behind the weight, or None.
    """

    out: Node
    weight: Node | None
    eps: float
    flavour: Flavour | LayerNormFlavour
    exact: bool
    steps: tuple[Node, ...]
    shift: Node | None = None

    @property
    def kind(self) -> str:
        """``rms_norm`` or ``layer_norm``, as patterns have it."""
        return "layer_norm" if isinstance(self.flavour, LayerNormFlavour) else "rms_norm"


@lru_cache(maxsize=512)
def _analyze(
    steps: tuple[Step, ...],
    leaves: tuple[Leaf, ...],
    s_dtype: torch.dtype,
    input_dtype: torch.dtype,
    hidden: int,
    relaxed: bool,
) -> Match | Refusal | None:
    """What a program is. Pure, so that a model's layers, which all look alike, share one answer."""
    meaning = Meaning(steps, leaves, hidden)
    gains: dict[int, Any] = {}
    for index, expr in enumerate(meaning.exprs):
        found = meaning.gain(expr)
        if found is not None and steps[index].dtype is not None and steps[index].layout == "rows":
            gains[index] = found
    gains = {i: g for i, g in gains.items() if not (steps[i].kind == "fused" and _is_tuple(steps[i]))}
    if not gains:
        return layer_norms.analyze(meaning, steps, leaves, s_dtype, input_dtype, relaxed) or meaning.miss()
    # One norm at a time: where several norms read s, the first one is fused and the others read its residual sum.
    first = min(gains)
    candidates = [i for i in sorted(gains, reverse=True) if steps[i].kind != "same" and first in ancestors(steps, i)]
    complete = [i for i in candidates if closed(steps, i, ancestors(steps, i))]
    failed: Flavour | None = None
    close: Match | None = None
    for out in complete or candidates[-1:]:
        g, eps = gains[out]
        for at_base in (True, False):
            derived = derive(steps, leaves, out, s_dtype, input_dtype, at_base)
            if derived is None or (g == 1) != (derived[1] is None):
                continue
            flavour, weight = derived
            proof = prove(steps, leaves, out, s_dtype, input_dtype, hidden, flavour, weight, at_base, float(eps))
            match = Match(out, weight, at_base, float(eps), flavour, exact=False)
            if proof.equal and same_order(steps, leaves, match, s_dtype, input_dtype, hidden):
                return replace(match, exact=True)
            failed = failed or flavour
            if proof.close and close is None:
                close = match
    if relaxed and close is not None:
        return close
    seen = tuple(dict.fromkeys(s.kind for s in steps if s.kind not in ("same", "item")))
    nearest = f"; the nearest flavour, {failed}, gives other bits" if failed else ""
    return Refusal(
        Reason.UNKNOWN_FLAVOUR, f"an RMSNorm in {input_dtype} whose casts the fused op does not repeat{nearest}", seen
    )


def _is_tuple(step: Step) -> bool:
    return step.target in values.overloads("_fused_rms_norm.default")


def match(
    source: values.Aliases,
    order: dict[Node, int],
    relaxed: bool = False,
    input_dtype: torch.dtype | None = None,
) -> NormForm | Refusal | None:
    """The norm that reads ``source``, a refusal naming what is nearly one, or None when no norm reads it.

    Args:
        source: the value ``s`` under all its names.
        order: node positions.
        relaxed: accept a flavour that changes rounding.
        input_dtype: the dtype to which ``source`` is rounded for the residual, where it is wider. Default: its own.
    """
    hidden = values.width(source.root)
    dtype = values.dtype(source.root)
    if dtype is None or hidden is None:
        return None
    if not isinstance(hidden, int):
        return Refusal(Reason.DYNAMIC_WIDTH, f"the last dimension is {hidden}")
    program = read(source, order, hidden)
    if not any(step.kind in REDUCTIONS for step in program.steps):
        return None
    found = _analyze(tuple(program.steps), tuple(program.leaves), dtype, input_dtype or dtype, hidden, relaxed)
    if not isinstance(found, Match):
        return found
    inside = ancestors(tuple(program.steps), found.out)
    weight = None if found.weight is None else program.leaf_nodes[found.weight][1 if found.at_base else 0]
    shift = None if found.shift is None else program.leaf_nodes[found.shift][0]
    for name, vector in (("weight", weight), ("bias behind it", shift)):
        tensor = None if vector is None else values.value(vector)
        if vector is not None and (tensor is None or tensor.dim() != 1):
            return Refusal(Reason.WEIGHT_SHAPE, f"the {name} is {None if tensor is None else tuple(tensor.shape)}")
    steps = tuple(program.nodes[i] for i in sorted(inside) if i != found.out)
    return NormForm(program.nodes[found.out], weight, found.eps, found.flavour, found.exact, steps, shift)


def forget() -> None:
    """Empty the memo (for tests and benchmarks)."""
    _analyze.cache_clear()
