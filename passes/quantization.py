"""Find: the fp8 quantization behind a fused norm, however many readers spell it.

Linear layers that read one norm quantize it each for itself, before or after the compiler has merged what is equal. All
quantizations that are proved equal become one; what reads the norm otherwise, a router say, keeps reading it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Node

from ..ops.quantizer import GROUP, Quantizer
from . import quantizers, unread, values
from .quant_expression import FLOAT8, OPERATORS, Known, read
from .quant_form import canonical
from .quant_scheme import Scheme, reference_forms, scheme_of


@dataclass(frozen=True)
class Quantization:
    """What the fused op does behind the norm.

    Attributes:
        quantizer: the arithmetic.
        static_scale: the node of the scale that the model gives, or None.
        quantized: nodes that hold the quantized rows.
        scales: nodes that hold the scales and are read by what stays.
        keep_normed: whether something still reads the norm itself.
        nodes: nodes that nobody needs afterwards.
        exact: whether the bits are the model's (False only with relaxed numerics).
    """

    quantizer: Quantizer
    static_scale: Node | None
    quantized: tuple[Node, ...]
    scales: tuple[Node, ...]
    keep_normed: bool
    nodes: tuple[Node, ...]
    exact: bool = True

    @property
    def words(self) -> str:
        """For the report, e.g. ``e4m3 per token``."""
        return words(self.quantizer)


def words(quantizer: Quantizer) -> str:
    """A quantizer in three words."""
    per = {"tensor": "with a static scale", "token": "per token", "group128": "per 128 columns"}[quantizer.granularity]
    return f"{quantizer.dtype} {per}"


@dataclass
class _Group:
    """Quantizations with one result.

    Attributes:
        quantized, scales: nodes that hold it.
        calls: the operators that give both at once, and the buffers that they write.
        form: the canonical expression of the scales, where they are arithmetic.
        exact: whether every bit is known to be the quantizer's.
        columns: of which a scale is taken.
    """

    quantizer: Quantizer
    static_scale: Node | None
    form: Any = None
    exact: bool = True
    quantized: list[Node] = field(default_factory=list)
    scales: list[Node] = field(default_factory=list)
    calls: list[Node] = field(default_factory=list)
    columns: int = 0

    def names_of_scales(self, known: dict[Node, Known]) -> list[Node]:
        """Every node that holds the scales."""
        if self.form is None:
            return self.scales
        unit = self.columns
        alike = (n for n, k in known.items() if not k.pair and k.unit == unit and canonical(k.expr) == self.form)
        return [*self.scales, *alike]


def find(normed: Node, order: dict[Node, int], relaxed: bool = False) -> tuple[Quantization | None, str]:
    """The quantization of a norm, and a sentence where one was seen that is not fused.

    Args:
        normed: the node that holds the normalized value, which is about to be computed by the fused op.
        order: node positions.
        relaxed: accept an operator whose bits are not always those of its quantizer.
    """
    tensor = values.value(normed)
    if tensor is None or not isinstance(tensor.shape[-1], int):
        return None, ""
    known = read(normed, order)
    groups, missed = _groups(normed, known, order, relaxed)
    if not groups:
        return None, missed or unread.quantization(normed, known, order)
    groups.sort(key=lambda g: (-len(g.quantized), min(order[n] for n in g.quantized)))
    found = _of(groups[0], normed, known, order)
    if isinstance(found, str):
        return None, found
    others = len(groups) - 1 + bool(missed)
    note = f"one of {others + 1} different quantizations of this norm is fused" if others else ""
    return found, note


def _groups(normed: Node, known: dict[Node, Known], order: dict[Node, int], relaxed: bool) -> tuple[list[_Group], str]:
    """The quantizations that are understood, equal ones together, and what is wrong with the first other one."""
    dtype, hidden = values.dtype(normed), values.width(normed)
    assert dtype is not None
    groups: dict[tuple[str, Node | None], _Group] = {}
    missed = ""
    for node, value in known.items():
        if OPERATORS.get(node.target) != "cast" or value.expr.dtype not in FLOAT8 or values.is_dead(node):
            continue
        scheme: Scheme | str = "its values do not lie as those of the norm"
        if value.unit == 1:
            scheme = scheme_of(value.expr, dtype, hidden)
        if value.scale is not None and values.depends_on(value.scale, normed, order):
            missed = missed or _of_several_rows(value.scale)
            continue
        if isinstance(scheme, str):
            missed = missed or f"{node.name} quantizes the norm, but {scheme}"
            continue
        key = (str(scheme.quantizer), value.scale)
        group = groups.setdefault(key, _Group(scheme.quantizer, value.scale))
        group.form, group.columns = scheme.scales, hidden if scheme.quantizer.granularity == "token" else GROUP
        group.quantized.append(node)
    for call in quantizers.calls(normed, known):
        quantizer = call.spelling.quantizer
        if not call.spelling.exact and not relaxed:
            name = call.spelling.name
            missed = missed or (
                f"{call.node.name} quantizes the norm with {name}, which gives other bits than the fused op for some inputs; "
                "tpfuse.numerics='relaxed' accepts that"
            )
            continue
        group = groups.setdefault((str(quantizer), call.static_scale), _Group(quantizer, call.static_scale))
        group.exact &= call.spelling.exact
        group.calls += [call.node, *call.buffers]
        group.quantized += call.quantized
        group.scales += call.scales
    return list(groups.values()), missed


def _of(group: _Group, normed: Node, known: dict[Node, Known], order: dict[Node, int]) -> Quantization | str:
    """One group as what the fused op does, or why it does not."""
    dtype, hidden = values.dtype(normed), values.width(normed)
    assert dtype is not None
    quantizer = group.quantizer
    if group.static_scale is not None and values.depends_on(group.static_scale, normed, order):
        return _of_several_rows(group.static_scale)
    scales = _live_scales(group, known)
    if quantizer.derive == "inverse" and not scales and group.form is not None:
        # Perhaps the model reads the factor itself.
        other = replace(quantizer, returned="reciprocal")
        group.form = reference_forms(other, dtype, hidden)[1]
        scales = _live_scales(group, known)
        quantizer = other if scales else quantizer
    replaced = _replaced(group, known)
    needed = _needed(known, replaced)
    statistics = [n for n, k in known.items() if k.expr.name == "amax" and n.target in OPERATORS and needed(n)]
    if quantizer.granularity != "tensor" and not scales and statistics:
        return f"{statistics[0].name} is read for scales other than those of {quantizer.describe()}"
    gone = [n for n in known if n is not normed and (n in replaced or not needed(n))]
    return Quantization(
        quantizer,
        group.static_scale,
        tuple(group.quantized),
        tuple(scales),
        needed(normed),
        tuple(dict.fromkeys([*gone, *group.quantized, *group.scales, *group.calls])),
        group.exact,
    )


def _of_several_rows(scale: Node) -> str:
    return f"its scale, {scale.name}, is taken of several rows together, and the fused op norms them one by one"


def _replaced(group: _Group, known: dict[Node, Known]) -> set[Node]:
    return {*group.quantized, *group.calls, *group.names_of_scales(known)}


def _live_scales(group: _Group, known: dict[Node, Known]) -> list[Node]:
    """The nodes that hold the scales and are read by what stays."""
    replaced = _replaced(group, known)
    needed = _needed(known, replaced)

    def is_read(node: Node) -> bool:
        others = (u for u in node.users if u not in replaced and not values.is_dead(u))
        return any(u not in known or needed(u) for u in others)

    return [n for n in group.names_of_scales(known) if is_read(n)]


def _needed(known: dict[Node, Known], replaced: set[Node]) -> Callable[[Node], bool]:
    """Whether something outside still reads a node when ``replaced`` are computed by the fused op."""
    memo: dict[Node, bool] = {}

    def needed(node: Node) -> bool:
        if node not in memo:
            memo[node] = any(
                user not in replaced and not values.is_dead(user) and (user not in known or needed(user))
                for user in node.users
            )
        return memo[node]

    return needed
