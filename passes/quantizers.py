"""Operators that quantize in one call, each with the arithmetic it is known to have, and where it takes and gives what.

The arithmetic of an operator cannot be read from the graph, so it is declared: here for operators of libraries, and by
:func:`register_quantizer`. A further argument may change the arithmetic, so a call counts only where each has the value that was
declared, else its default.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from tpfuse import compat

from ..ops.quantizer import FBGEMM_TOKEN, TORCHAO_STATIC, VLLM_STATIC, VLLM_TOKEN, Quantizer
from . import values
from .quant_expression import Known


@dataclass(frozen=True)
class QuantizerSpelling:
    """How one operator spells a quantization of the rows of a tensor.

    Attributes:
        name: of the overload, e.g. ``vllm::scaled_quant.default``.
        quantizer: its arithmetic.
        input: position or keyword of the tensor that it quantizes over its last dimension.
        static_scale: position or keyword of the scale that it is given, or None.
        quantized, scales: positions of its results; ``scales`` is None without such a result. For an operator that writes
            into its arguments they are the names of those.
        arguments: values that further arguments must have, where not their defaults.
        exact: whether it gives the quantizer's bits for every input; else it counts with relaxed numerics only.
    """

    name: str
    quantizer: Quantizer
    input: int | str = 0
    static_scale: int | str | None = None
    quantized: int | str = 0
    scales: int | str | None = 1
    arguments: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = True


@dataclass(frozen=True)
class Call:
    """One call of such an operator on the norm. ``buffers`` are made for it to write into, and for nothing else."""

    node: Node
    spelling: QuantizerSpelling
    static_scale: Node | None
    quantized: list[Node]
    scales: list[Node]
    buffers: list[Node]


BUFFERS = values.overloads("empty_like.default", "empty.memory_format", "new_empty.default")
_BUILT_IN = {
    spelling.name: spelling
    for spelling in (
        # torchao's quantization of exported models, with the scale that calibration found.
        QuantizerSpelling(
            "torchao::quantize_affine_float8_non_decomposed.default",
            TORCHAO_STATIC,
            static_scale=1,
            scales=None,
        ),
        # FBGEMM and MSLK, which torchao takes for rows on a GPU where it is installed. Triton's division is not IEEE's.
        QuantizerSpelling("triton::quantize_fp8_row.default", FBGEMM_TOKEN, exact=False),
        # vLLM's kernels (csrc/quantization/w8a8/fp8/common.cu) write into buffers. fminf and fmaxf make 448 of NaN.
        QuantizerSpelling(
            "_C::static_scaled_fp8_quant.default",
            VLLM_STATIC,
            input="input",
            static_scale="scale",
            quantized="result",
            scales=None,
            exact=False,
        ),
        QuantizerSpelling(
            "_C::dynamic_per_token_scaled_fp8_quant.default",
            replace(VLLM_TOKEN, apply="div"),
            input="input",
            quantized="result",
            scales="scale",
            exact=False,
        ),
    )
}
_registered: dict[str, QuantizerSpelling] = {}


def register_quantizer(
    op: Any,
    quantizer: Quantizer | str,
    *,
    input: int | str = 0,
    static_scale: int | str | None = None,
    quantized: int | str = 0,
    scales: int | str | None = 1,
    arguments: Mapping[str, Any] | None = None,
    exact: bool = True,
) -> None:
    """Teach the pass an operator that quantizes to fp8, so that it becomes part of the fused op.

    Args:
        op: an ``OpOverload`` (or a packet with a ``default`` overload).
        quantizer: its arithmetic, exactly: the fused op gives the bits that this describes in place of the operator's.
        input: position or keyword of the tensor whose rows, over the last dimension, it quantizes.
        static_scale: position or keyword of the scale that it is given, one fp32 value; exactly where the quantizer's granularity
            is ``tensor``.
        quantized, scales: positions of its results, None for scales that it does not return; for an operator that writes into
            its arguments, their names.
        arguments: values that further arguments must have for this arithmetic, by keyword; those not named must have their
            defaults. A call with others is left alone.
        exact: False where it gives other bits for some inputs, NaN say. It is then fused with ``tpfuse.numerics="relaxed"`` only.
    Raises:
        TypeError: ``op`` is not an operator of ``torch.ops``.
        ValueError: the quantizer is not valid, or has a static scale and no argument for it, or the reverse.
    """
    overload = getattr(op, "default", op)
    if not isinstance(overload, torch._ops.OpOverload):
        raise TypeError(
            f"register_quantizer: op is {op!r}; expected an operator such as torch.ops.mylib.quantize.default"
        )
    parsed = Quantizer.parse(quantizer) if isinstance(quantizer, str) else quantizer
    if (parsed.granularity == "tensor") != (static_scale is not None):
        raise ValueError(
            f"register_quantizer: static_scale is {static_scale!r} and the quantizer's granularity {parsed.granularity!r}; name "
            "the argument that holds the scale exactly when the granularity is 'tensor'"
        )
    names = [a.name for a in overload._schema.arguments]
    unknown = [n for n in (arguments or {}) if n not in names]
    if unknown:
        raise ValueError(f"register_quantizer: {overload} has no arguments {unknown}; it has {', '.join(names)}")
    name = _name(overload)
    _registered[name] = QuantizerSpelling(
        name, parsed, input, static_scale, quantized, scales, dict(arguments or {}), exact
    )


def unregister_quantizer(op: Any) -> None:
    """Forget what :func:`register_quantizer` registered. Unknown operators are ignored."""
    overload = getattr(op, "default", op)
    if isinstance(overload, torch._ops.OpOverload):
        _registered.pop(_name(overload), None)


def registered() -> list[QuantizerSpelling]:
    """What :func:`register_quantizer` has registered in this process."""
    return list(_registered.values())


def _name(op: torch._ops.OpOverload) -> str:
    return f"{op._schema.name}.{op._overloadname}"


def calls(normed: Node, known: dict[Node, Known]) -> Iterator[Call]:
    """The calls of known operators that quantize the norm."""
    hidden = values.width(normed)
    seen: set[Node] = set()
    for node, value in known.items():
        if value.pair or value.expr.name != "n" or not compat.statically_true(values.width(node) == hidden):
            continue
        for user in node.users:
            found = None if user in seen or user in known else _call(user, node)
            seen.add(user)
            if found is not None:
                yield found


def is_call(node: Node) -> bool:
    """Whether the node calls an operator that is known to quantize."""
    op = node.args[0] if _writes(node) else node.target
    return isinstance(op, torch._ops.OpOverload) and _spelling(op) is not None


def _writes(node: Node) -> bool:
    """Whether the node stands for an operator that writes its arguments."""
    return node.target in (compat.auto_functionalized(), compat.auto_functionalized_v2()) and bool(node.args)


def _spelling(op: torch._ops.OpOverload) -> QuantizerSpelling | None:
    return _registered.get(_name(op)) or _BUILT_IN.get(_name(op))


def _call(node: Node, source: Node) -> Call | None:
    """A node as a call of a known operator on ``source``; None where it is another one or has other arguments."""
    op = node.target
    wrapped = _writes(node)
    if wrapped:
        op = node.args[0]  # type: ignore[assignment]
    if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload):
        return None
    spelling = _spelling(op)
    if spelling is None or wrapped != isinstance(spelling.quantized, str):
        return None

    given = _arguments(op, node.args[1:] if wrapped else node.args, node.kwargs)
    names = [a.name for a in op._schema.arguments]

    def name_of(where: int | str | None) -> str | None:
        return names[where] if isinstance(where, int) else where

    scale = given.get(name_of(spelling.static_scale))
    if given.get(name_of(spelling.input)) is not source or (spelling.static_scale is not None and not _is_scale(scale)):
        return None
    spoken_for: set[Any] = {name_of(spelling.input), name_of(spelling.static_scale)}
    if wrapped:
        spoken_for |= {spelling.quantized, spelling.scales}
    for argument in op._schema.arguments:
        want = spelling.arguments.get(argument.name, argument.default_value)
        if argument.name not in spoken_for and given[argument.name] != want:
            return None
    written = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    bases = _bases(node, written, given) if wrapped else []
    results = None if bases is None else _results(node, op, spelling, bases)
    if results is None or bases is None:
        return None
    buffers = [b for _, b in bases if b.target in BUFFERS and not set(b.users) - {node}]
    return Call(node, spelling, scale, *results, buffers)


def _bases(node: Node, written: list[str], given: dict[Any, Any]) -> list[tuple[str, Node]] | None:
    """The tensors that a wrapped call writes, in the order of its results, by argument; None where it writes into views."""
    if node.target is compat.auto_functionalized():
        return [(name, given[name]) for name in written]
    bases = node.kwargs["_all_bases"]
    found: list[Any] = [None] * len(bases)  # type: ignore[arg-type]
    for name in written:
        index = node.kwargs.get(f"_{name}_base_index")
        views = [k for k in node.kwargs if k.startswith(f"_{name}_") and not k.endswith("_base_index")]
        if not isinstance(index, int) or views:
            return None
        found[index] = (name, bases[index])  # type: ignore[index]
    return None if None in found else found


def _arguments(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Any, Any]:
    """Every argument by name, defaults included."""
    schema = op._schema.arguments
    given = {a.name: a.default_value for a in schema}
    given.update(zip((a.name for a in schema), args, strict=False))
    return {**given, **kwargs}


def _is_scale(scale: Any) -> bool:
    tensor = values.value(scale)
    if tensor is None or tensor.dtype != torch.float32:
        return False
    return all(compat.statically_true(size == 1) for size in tensor.shape)


def _results(
    node: Node, op: Any, spelling: QuantizerSpelling, bases: list[tuple[str, Node]]
) -> tuple[list[Node], list[Node]] | None:
    """The nodes that hold the quantized rows and the scales; None where another result is read."""
    if not isinstance(node.meta.get("val"), tuple | list):
        return ([node], []) if spelling.scales is None and spelling.quantized == 0 else None
    # After the operator's own results (None, where it has none) come the tensors that it writes.
    positions: dict[Any, int] = {name: n + max(1, len(op._schema.returns)) for n, (name, _) in enumerate(bases)}
    found: dict[Any, list[Node]] = {spelling.quantized: [], spelling.scales: []}
    for user in node.users:
        if values.is_dead(user):
            continue
        which = next((w for w in found if w is not None and positions.get(w, w) == user.args[1]), None)
        if user.target is not operator.getitem or which is None:
            return None
        found[which].append(user)
    if not found[spelling.quantized]:
        return None
    return found[spelling.quantized], found[spelling.scales] if spelling.scales is not None else []
