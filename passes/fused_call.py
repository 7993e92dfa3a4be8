"""Build: the call of the fused op that will stand for a candidate, with what brings its operands and results into shape.

Which op it is, and which of its arguments the candidate's terms become. Every step runs on the graph's fake tensors.
"""

from __future__ import annotations

import math
import operator
from typing import Any, cast

import torch
from torch.fx import Node

from tpfuse import compat

from . import values
from .candidate import Candidate
from .quantization import Quantization
from .reasons import Reason, Refusal
from .replacement import (
    GATHER,
    LAYER_NORM,
    LAYER_NORM_GATHER,
    LAYER_NORM_REPLICAS,
    LAYER_NORM_ROWS,
    OP,
    QUANT,
    REPLICAS,
    ROWS,
    Misfit,
    Replacement,
    Value,
)
from .values import ADD, MUL

aten = torch.ops.aten


def build(candidate: Candidate) -> Replacement | Refusal:
    """The replacement of a candidate, type-checked, or why there is none. Changes nothing."""
    c = candidate.collective
    fakes = [values.value(n) for n in (c.value, c.x, *candidate.operands)]
    for node, fake in zip(candidate.operands, fakes[2:], strict=True):
        if fake is not None and fake.dim() and fakes[1] is not None and fake.device != fakes[1].device:
            return Refusal(Reason.LAYOUT, f"{node.name} is on {fake.device}, the sum on {fakes[1].device}")
    new = Replacement(candidate, compat.fake_mode_of(fakes))
    try:
        _build(new)
    except Misfit as error:
        return Refusal(Reason.ROWS_MOVE, str(error))
    for node, ref in new.outputs:
        have, want = new._fake(ref), values.value(node)
        if want is None or have.dtype != want.dtype or not values.same_sizes(have.shape, want.shape):
            return Refusal(
                Reason.ROWS_MOVE, f"{node.name} is {_text(want)}; the fused op would put {_text(have)} in its place"
            )
        if have.device != want.device:
            return Refusal(Reason.LAYOUT, f"{node.name} is on {want.device}, the fused op gives it on {have.device}")
        if _strides_differ(have, want):
            return Refusal(
                Reason.LAYOUT,
                f"{node.name} has strides {tuple(want.stride())}, the fused op writes contiguous rows, {tuple(have.stride())}",
            )
    return new


def _build(new: Replacement) -> None:
    candidate = new.candidate
    c, norm, block = candidate.collective, candidate.norm, candidate.block
    post = candidate.post_add is not None
    bias: Node | Value | None = candidate.bias
    if bias is not None and any(t.kind == "full" and t.operand is bias for t in candidate.terms):
        bias = _added(new, bias)
    elif bias is not None and len(new.shape(bias)) != 1:
        bias = new.call(aten.view.default, bias, [values.width(candidate.h.root)])
    addend: Node | Value | None = candidate.addend
    if addend is not None:
        addend = _added(new, addend)
    given: Node | Value = c.x if candidate.factor is None else new.call(aten.mul.Tensor, c.x, candidate.factor)
    x = given if block is not None else _followed(new, given, 0)
    merged = candidate.merged
    if merged is not None and not merged.exact:
        x = new.call(aten.add.Tensor, x, _other(new))
        if merged.bias is not None:
            bias = merged.bias if bias is None else new.call(aten.add.Tensor, merged.bias, bias)
    residual: Node | Value | None = candidate.residual
    if residual is not None and merged is not None and merged.order != "together":
        residual = _first_residual(new)
    elif residual is not None:
        residual = new.fit(residual, x if block is None else candidate.post_add or candidate.terms[-1].node)
    elif block is not None and block.nodes:
        raise Misfit("without a residual nothing says how many rows of the block are kept")
    arguments = (norm.eps, candidate.scale, str(norm.flavour), post, c.group_name)
    quantization = candidate.quantization
    try:
        if quantization is not None:
            more = str(quantization.quantizer), quantization.static_scale, quantization.keep_normed
            new.fused = new.call(QUANT, x, residual, norm.weight, bias, *arguments, *more)
        elif merged is not None and merged.exact:
            new.fused = _two_sums(new, x, residual, bias)
        elif norm.kind == "layer_norm":
            new.fused = _layer_norm(new, x, residual, norm.weight, norm.shift, bias, addend)
        elif candidate.over:
            new.fused = new.call(REPLICAS, x, residual, norm.weight, bias, *arguments[:-1], *_replicas(new, x))
        elif block is None:
            scaled = candidate.scale_tensor is not None or candidate.scale_first
            scales = (candidate.scale_tensor, candidate.scale_first) if scaled else ()
            new.fused = new.call(OP, x, residual, norm.weight, bias, *arguments, *scales)
        elif candidate.gather is not None:
            new.fused = new.call(GATHER, x, residual, norm.weight, bias, *arguments, c.kind)
        else:
            new.fused = new.call(ROWS, x, residual, norm.weight, bias, *arguments, block.blocks, c.kind)
    except ValueError as error:
        raise Misfit(f"the fused op does not take these operands: {error}") from error
    first = 0 if quantization is None else 2
    result = new.call(operator.getitem, new.fused, first)
    normed: Node | Value = result
    summed: Node | Value = new.call(operator.getitem, new.fused, first + 1)
    if block is not None and residual is None:
        normed = _followed(new, normed, 0) if candidate.gather is None else result
        summed = _followed(new, summed, 0)
    if candidate.gather is not None:
        for node in candidate.gather.results:
            have, want = new._fake(result), values.value(node)
            if want is None or not compat.statically_true(math.prod(have.shape) == math.prod(want.shape)):
                # A view would add a guard, which may make a number of rows a constant of the graph.
                raise Misfit(f"{node.name} is {_text(want)}, which is not proved to hold the rows of {_text(have)}")
        # The nodes that start it too, which may be asked for their size.
        _placed(new, result, (*candidate.gather.starts, *candidate.gather.results))
    elif quantization is None or quantization.keep_normed:
        out = normed if post else new.repeat(candidate.reshapes, normed)
        new.outputs.append((norm.out, cast(Value, new.fit(out, norm.out))))
    for node in candidate.outputs[1:]:
        path = [] if candidate.rounded is None else candidate.h.path(cast(Node, node.args[0]))
        new.outputs.append((node, cast(Value, new.repeat(tuple(path), summed))))
    if quantization is not None:
        _quantized(new, quantization)


def _layer_norm(new: Replacement, *operands: Node | Value | None) -> Value:
    """The op whose norm is a LayerNorm, for the rows that the candidate keeps and gathers."""
    candidate = new.candidate
    c, norm, block = candidate.collective, candidate.norm, candidate.block
    given = *operands, norm.eps, candidate.scale, str(norm.flavour)
    if candidate.over:
        x = operands[0]
        assert x is not None
        return new.call(LAYER_NORM_REPLICAS, *given, *_replicas(new, x))
    if block is None:
        return new.call(LAYER_NORM, *given, c.group_name)
    if candidate.gather is not None:
        return new.call(LAYER_NORM_GATHER, *given, c.group_name, c.kind)
    return new.call(LAYER_NORM_ROWS, *given, c.group_name, block.blocks, c.kind)


def _replicas(new: Replacement, x: Node | Value) -> tuple[Any, ...]:
    """The last arguments of the op that gathers the rows of replicas: its groups, and the rows of the largest one."""
    candidate = new.candidate
    assert candidate.gather is not None and candidate.gather.replicas is not None
    replicas = candidate.gather.replicas
    largest: Any = replicas.largest
    if largest is None:
        largest = 1
        for dim, size in enumerate(new.shape(x)[:-1]):
            factor = size if isinstance(size, int) else new.call(aten.sym_size.int, x, dim)
            largest = factor if largest == 1 else new.call(operator.mul, largest, factor)
        if replicas.missing != 0:
            largest = new.call(operator.add, largest, replicas.missing)
    return replicas.group_name, candidate.collective.group_name, replicas.gather_group, largest


def _quantized(new: Replacement, quantization: Quantization) -> None:
    """The quantized rows and their scales in the shapes that the model gives them, in the places where it computes them: only
    there is every size known that such a shape may have."""
    results = new.call(operator.getitem, new.fused, 0), new.call(operator.getitem, new.fused, 1)
    for nodes, result in zip((quantization.quantized, quantization.scales), results, strict=True):
        _placed(new, result, nodes)


def _placed(new: Replacement, result: Value, nodes: tuple[Node, ...]) -> None:
    """``result`` in place of each of ``nodes``, in its shape and at its place."""
    for node in nodes:
        tensor = values.value(node)
        if tensor is None:
            raise Misfit(f"{node.name} has no fake value")
        new.at = node
        new.outputs.append((node, new.reshaped(result, tuple(tensor.shape))))
    new.at = None


def _two_sums(new: Replacement, own: Node | Value, residual: Node | Value | None, vector: Node | Value | None) -> Value:
    """The op that reduces both partial sums, each for itself.

    Args:
        own: the partial sum of the candidate's own reduction; residual: in its shape.
        vector: what is added to the own sum.
    """
    candidate, merged, norm = new.candidate, new.candidate.merged, new.candidate.norm
    assert merged is not None
    pair: list[tuple[Any, Any]] = [(own, vector), (_other(new), merged.bias)]
    scale, tensor, scale_first = candidate.scale, candidate.scale_tensor, candidate.scale_first
    alone = merged.factor is not None  # of the other sum alone, which the op has as its first then
    if isinstance(merged.factor, Node):
        tensor, scale_first = merged.factor, True
    elif merged.factor is not None:
        scale, scale_first = merged.factor, True
    if merged.order == "other_first" or alone:
        pair.reverse()
    (x, first), (second, second_vector) = pair
    residual_first = merged.order != "together"
    group = candidate.collective.group_name
    if norm.kind == "layer_norm":
        operands = x, residual, norm.weight, norm.shift, first, second
        arguments = norm.eps, scale, str(norm.flavour), group
        return new.call(LAYER_NORM, *operands, *arguments, True, second_vector, residual_first)
    post = candidate.post_add is not None
    more = norm.eps, scale, str(norm.flavour), post, group, tensor, scale_first
    return new.call(OP, x, residual, norm.weight, second, *more, True, residual_first)


def _other(new: Replacement) -> Node | Value:
    """The partial sum of the other reduction, in the shape of the own one."""
    candidate, merged = new.candidate, new.candidate.merged
    assert merged is not None
    c = merged.collective
    if candidate.block is not None and not merged.nodes:  # all rows of it, of which the sum has some
        return new.fit(c.x, candidate.collective.x)
    other = _along(new, new.fit(c.x, c.value), merged.nodes)
    return new.fit(other, candidate.collective.x) if candidate.block is not None else _added(new, other, merged.operand)


def _first_residual(new: Replacement) -> Node | Value:
    """The residual of ``(residual + one sum) + the other``, in the shape of the norm's input."""
    candidate, merged = new.candidate, new.candidate.merged
    assert merged is not None and candidate.residual is not None
    residual: Node | Value = candidate.residual
    if merged.order == "own_first":
        return _added(new, residual)
    add = next(n for n, node in enumerate(merged.nodes) if candidate.residual in node.all_input_nodes)
    return _added(new, _along(new, residual, merged.nodes[add:]), merged.operand)


def _along(new: Replacement, value: Node | Value, nodes: tuple[Node, ...]) -> Node | Value:
    """``value`` through the changes of shape and the factor of what leads from the other sum to where the two meet."""
    for node in nodes:
        if node.target in MUL:
            merged = new.candidate.merged
            assert merged is not None
            if merged.exact:  # the op scales the sum
                continue
            value = new.call(aten.mul.Tensor, value, merged.factor)
        elif node.target in ADD:  # what it adds is an operand of its own
            value = new.fit(value, node)
        else:
            value = new.repeat((node,), value)
    return value


def _added(new: Replacement, value: Node | Value, operand: Node | None = None) -> Node | Value:
    """``value``, which a term adds or which stands for its ``operand``, in the shape that the sum has at the end."""
    terms = new.candidate.terms
    place = next(n for n, t in enumerate(terms) if t.operand is (operand or value))
    return _followed(new, new.fit(value, terms[place].node), place + 1)


def _followed(new: Replacement, value: Node | Value, start: int) -> Node | Value:
    """``value`` in the shape that the sum has at the end: through the changes of shape from step ``start`` on."""
    candidate = new.candidate
    if start == 0 and candidate.narrowed:
        value = new.fit(new.repeat(candidate.narrowed, value), candidate.narrowed[-1])
    for term in candidate.terms[start:]:
        value = new.fit(new.repeat(term.path, value), term.node)
    if candidate.post_add is not None:
        value = new.fit(new.fit(new.repeat(candidate.reshapes, value), candidate.norm.out), candidate.post_add)
    return value


def _text(tensor: torch.Tensor | None) -> str:
    return "unknown" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


def _strides_differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two values of one shape certainly lie differently in memory; strides of dimensions of size one mean nothing."""
    return any(
        not compat.statically_true(size == 1) and compat.statically_true(m != n)
        for size, m, n in zip(a.shape, a.stride(), b.stride(), strict=True)
    )
