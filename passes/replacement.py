"""What will stand for a region: a short program over the graph's nodes, built and type-checked before anything is edited.

Building runs every operator on the fake tensors of the graph, the fused op's own checks included, so a region whose
replacement does not fit is known while the graph is still whole.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import tpfuse.ops  # noqa: F401  (registers the op)
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from tpfuse import compat

from ..ops import layer_norm_reference, quant_reference, reference
from ..ops.flavour import Flavour
from ..ops.layer_norm_flavour import LayerNormFlavour
from ..ops.quantizer import Quantizer
from . import values
from .candidate import Candidate
from .legality import ADD, MUL
from .quantization import Quantization
from .reasons import Reason, Refusal

OP = torch.ops.tpfuse.all_reduce_add_rms_norm.default
ROWS = torch.ops.tpfuse.reduce_rows_add_rms_norm.default
GATHER = torch.ops.tpfuse.reduce_rows_add_rms_norm_gather.default
REPLICAS = torch.ops.tpfuse.all_reduce_add_rms_norm_gather.default
QUANT = torch.ops.tpfuse.all_reduce_add_rms_norm_quant.default
LAYER_NORM = torch.ops.tpfuse.all_reduce_add_layer_norm.default
OP_TAIL = (None, False, False, False)  # defaults of OP: scale_tensor, scale_first, partial_bias, residual_first
aten = torch.ops.aten


class Misfit(Exception):
    """Two values that should hold the same rows do not."""


@dataclass(frozen=True)
class Value:
    """The result of one step of a :class:`Replacement`."""

    index: int


@dataclass(frozen=True)
class Step:
    """One node to come. ``args`` hold nodes of the graph and :class:`Value` objects; ``fake`` is the result's fake value. It goes
    in front of ``at``, or with the rest of the region."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fake: Any
    at: Node | None = None


@dataclass
class Replacement:
    """The steps that stand for one candidate.

    Attributes:
        steps: in order.
        fused: the fused op.
        outputs: for each of :attr:`Candidate.outputs` what its readers read: the norm, then the residual sum (with post-norm:
            the add behind the norm); then for each node of a quantization. In place of a norm that is gathered: its gathers.
        at: where the next steps go.
    """

    candidate: Candidate
    mode: Any
    steps: list[Step] = field(default_factory=list)
    fused: Value = Value(-1)
    outputs: list[tuple[Node, Value]] = field(default_factory=list)
    at: Node | None = None

    # -- building

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Value:
        """Append a step; runs it on fake values at once."""
        fakes = _resolve(args, self._fake), _resolve(kwargs, self._fake)
        with self.mode, torch.no_grad():
            result = target(*fakes[0], **fakes[1])
        self.steps.append(Step(target, args, kwargs, result, self.at))
        return Value(len(self.steps) - 1)

    def _fake(self, ref: Node | Value) -> Any:
        if isinstance(ref, Value):
            return self.steps[ref.index].fake
        found = ref.meta.get("val", ref.meta.get("example_value"))
        if isinstance(found, torch.Tensor) and not compat.is_fake(found):
            return self.mode.from_tensor(found)
        if found is None:
            raise Misfit(f"{ref.name} has no fake value")
        return found

    def shape(self, ref: Node | Value) -> tuple[Any, ...]:
        return tuple(self._fake(ref).shape)

    def repeat(self, steps: tuple[Node, ...], start: Node | Value) -> Node | Value:
        """Apply the reshapes among ``steps`` to another value of the same rows."""
        current = start
        for step in steps:
            if step.target in values.RESHAPES:
                current = self.call(step.target, current, *step.args[1:], **step.kwargs)
        return current

    def fit(self, ref: Node | Value, like: Node | Value) -> Node | Value:
        """``ref`` in the shape of ``like``, from which it may differ by leading dimensions of size one only."""
        want = self.shape(like)
        while len(self.shape(ref)) < len(want):
            ref = self.call(aten.unsqueeze.default, ref, 0)
        while len(self.shape(ref)) > len(want) and compat.statically_true(self.shape(ref)[0] == 1):
            ref = self.call(aten.squeeze.dim, ref, 0)
        if not values.same_sizes(self.shape(ref), want):
            raise Misfit(f"a value of shape {self.shape(ref)} does not hold the rows of {want}")
        return ref

    def reshaped(self, ref: Value, want: tuple[Any, ...]) -> Value:
        """``ref``, whose values stay in their order, in a shape that may have symbols in it."""
        have = self.shape(ref)
        if values.same_sizes(have, want):
            return ref
        sizes: list[Any] = list(want)
        symbols = [n for n, size in enumerate(want) if not isinstance(size, int)]
        for n in symbols if len(symbols) > 1 else ():
            dim = next((d for d, size in enumerate(have) if compat.statically_true(size == want[n])), None)
            if dim is not None:
                sizes[n] = self.call(aten.sym_size.int, ref, dim)
        left = [n for n in symbols if not isinstance(sizes[n], Value)]
        if len(left) > 1:
            raise Misfit(f"a value of shape {have} cannot be given the shape {want}")
        for n in left:
            sizes[n] = -1
        return self.call(aten.view.default, ref, sizes)

    # -- inserting and running

    def insert(self, graph: Graph, before: Node, moved: dict[Node, Node]) -> list[Node]:
        """Insert the steps in front of ``before``; operands in ``moved`` are exchanged for what stands for them now."""
        made: list[Node] = []

        def actual(ref: Node | Value) -> Node:
            return made[ref.index] if isinstance(ref, Value) else moved.get(ref, ref)

        start = self.candidate.collective.node
        for step in self.steps:
            with graph.inserting_before(step.at or before):
                node = graph.call_function(step.target, _resolve(step.args, actual), _resolve(step.kwargs, actual))
            node.meta["val"] = step.fake
            for key in ("stack_trace", "nn_module_stack"):
                if key in start.meta:
                    node.meta[key] = start.meta[key]
            made.append(node)
        return made

    def run(self, value_of: Callable[[Node], Any]) -> list[Any]:
        """The steps on real values, without the all-reduce: the fused op's exact reference takes ``x`` for the sum."""
        results: list[Any] = []

        def actual(ref: Node | Value) -> Any:
            return results[ref.index] if isinstance(ref, Value) else value_of(ref)

        for step in self.steps:
            args, kwargs = _resolve(step.args, actual), _resolve(step.kwargs, actual)
            if step.target in (OP, ROWS, GATHER):
                x, residual, weight, bias, eps, scale, flavour, post, _, *more = args
                if self.candidate.block is not None:
                    x = self.candidate.block.of(x, kept_shape(self.candidate) if residual is None else residual.shape)
                args = (x, residual, weight, bias, eps, scale, Flavour.parse(flavour), post)
                scale_tensor, scale_first, _, residual_first = (
                    (*more, *OP_TAIL[len(more) :]) if step.target is OP else OP_TAIL
                )
                normed, summed = reference.add_rms_norm(*args, scale_tensor, scale_first, residual_first)
                if step.target is GATHER:
                    normed = self.gathered(normed)
                results.append((normed, summed))
            elif step.target is REPLICAS:
                x, residual, weight, bias, eps, scale, flavour, post, *_, largest = args
                args = (x, residual, weight, bias, eps, scale, Flavour.parse(flavour), post)
                normed, summed = reference.add_rms_norm(*args)
                results.append((self.gathered(normed, largest), summed))
            elif step.target is LAYER_NORM:
                given, (flavour, _, *more) = args[:8], args[8:]
                results.append(layer_norm_reference.add_layer_norm(*given, LayerNormFlavour.parse(flavour), *more[1:]))
            elif step.target is QUANT:
                x, residual, weight, bias, eps, scale, flavour, post, _, quantizer, static_scale, keep = args
                args = (x, residual, weight, bias, eps, scale, Flavour.parse(flavour), post)
                normed, summed = reference.add_rms_norm(*args)
                quantized = quant_reference.quantize(normed, Quantizer.parse(quantizer), static_scale)
                results.append((*quantized, normed if keep else normed.new_empty(0), summed))
            else:
                results.append(step.target(*args, **kwargs))
        return results

    def gathered(self, rows: torch.Tensor, largest: int | None = None) -> torch.Tensor:
        """What the gather gives as if every rank had these rows, filled up with zeros to the largest replica's number."""
        gather = self.candidate.gather
        assert gather is not None
        if largest is None or gather.replicas is None:
            blocks = len(self.candidate.collective.ranks) if gather.replicas is None else gather.replicas.blocks
            return torch.cat([rows] * blocks)
        flat = rows.reshape(-1, rows.shape[-1])
        filled = torch.nn.functional.pad(flat, (0, 0, 0, largest - len(flat)))
        return torch.cat([filled] * gather.replicas.blocks)


def kept_shape(candidate: Candidate) -> tuple[int, ...]:
    """The shape, in example sizes, in which the graph holds the rows that this rank keeps."""
    tensor = values.value(candidate.kept)
    assert tensor is not None
    return tuple(compat.example_size(n) for n in tensor.shape)


def _resolve(tree: Any, actual: Callable[[Any], Any]) -> Any:
    """A tree of arguments with every node and value in it exchanged."""
    if isinstance(tree, Node | Value):
        return actual(tree)
    if isinstance(tree, tuple | list):
        return type(tree)(_resolve(t, actual) for t in tree)
    if isinstance(tree, dict):
        return {k: _resolve(v, actual) for k, v in tree.items()}
    return map_arg(tree, actual) if isinstance(tree, slice) else tree


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
            given_last = norm.eps, candidate.scale, str(norm.flavour), c.group_name
            new.fused = new.call(LAYER_NORM, x, residual, norm.weight, norm.shift, bias, addend, *given_last)
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
    scale, scale_first = candidate.scale, candidate.scale_first
    if isinstance(merged.factor, float):  # of the other sum alone, which the op has as its first then
        scale, scale_first = merged.factor, True
    if merged.order == "other_first" or isinstance(merged.factor, float):
        pair.reverse()
    (x, first), (second, second_vector) = pair
    residual_first = merged.order != "together"
    group = candidate.collective.group_name
    if norm.kind == "layer_norm":
        operands = x, residual, norm.weight, norm.shift, first, second
        arguments = norm.eps, scale, str(norm.flavour), group
        return new.call(LAYER_NORM, *operands, *arguments, True, second_vector, residual_first)
    post = candidate.post_add is not None
    more = norm.eps, scale, str(norm.flavour), post, group, candidate.scale_tensor, scale_first
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
