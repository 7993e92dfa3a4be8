"""What will stand for a region: a short program over the graph's nodes, built and type-checked before anything is edited.

Building runs every operator on the fake tensors of the graph, the fused op's own checks included, so a region whose
replacement does not fit is known while the graph is still whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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

OP = torch.ops.tpfuse.all_reduce_add_rms_norm.default
ROWS = torch.ops.tpfuse.reduce_rows_add_rms_norm.default
GATHER = torch.ops.tpfuse.reduce_rows_add_rms_norm_gather.default
REPLICAS = torch.ops.tpfuse.all_reduce_add_rms_norm_gather.default
QUANT = torch.ops.tpfuse.all_reduce_add_rms_norm_quant.default
LAYER_NORM = torch.ops.tpfuse.all_reduce_add_layer_norm.default
LAYER_NORM_ROWS = torch.ops.tpfuse.reduce_rows_add_layer_norm.default
LAYER_NORM_GATHER = torch.ops.tpfuse.reduce_rows_add_layer_norm_gather.default
LAYER_NORM_REPLICAS = torch.ops.tpfuse.all_reduce_add_layer_norm_gather.default
LAYER_NORMS = (LAYER_NORM, LAYER_NORM_ROWS, LAYER_NORM_GATHER, LAYER_NORM_REPLICAS)
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
                args = (self._kept_of(x, residual), residual, weight, bias, eps, scale, Flavour.parse(flavour), post)
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
            elif step.target in LAYER_NORMS:
                (x, residual, *given), (flavour, _, *more) = args[:8], args[8:]
                tail = more[1:] if step.target is LAYER_NORM else ()
                given = [self._kept_of(x, residual), residual, *given, LayerNormFlavour.parse(flavour), *tail]
                normed, summed = layer_norm_reference.add_layer_norm(*given)
                if step.target in (LAYER_NORM_GATHER, LAYER_NORM_REPLICAS):
                    normed = self.gathered(normed, more[-1] if step.target is LAYER_NORM_REPLICAS else None)
                results.append((normed, summed))
            elif step.target is QUANT:
                x, residual, weight, bias, eps, scale, flavour, post, _, quantizer, static_scale, keep = args
                args = (x, residual, weight, bias, eps, scale, Flavour.parse(flavour), post)
                normed, summed = reference.add_rms_norm(*args)
                quantized = quant_reference.quantize(normed, Quantizer.parse(quantizer), static_scale)
                results.append((*quantized, normed if keep else normed.new_empty(0), summed))
            else:
                results.append(step.target(*args, **kwargs))
        return results

    def _kept_of(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """The rows of a sum that this rank keeps: all of them without a block."""
        block = self.candidate.block
        if block is None:
            return x
        return block.of(x, kept_shape(self.candidate) if residual is None else tuple(residual.shape))

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
