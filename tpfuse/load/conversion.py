"""Which part of which checkpoint tensor makes a rank's part of a parameter, through transformers' renaming and conversion."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tpfuse.parallel.cut import WHOLE, Cut

from . import transformers_compat as compat
from .pieces import Deferred, Meter, Piece, Stored


@dataclass
class _Merge:
    """The checkpoint tensors that a converter makes one parameter of: pattern -> (key, tensor), in order."""

    converter: Any
    members: dict[str, list[tuple[str, Stored]]] = field(default_factory=lambda: defaultdict(list))

    def all(self) -> Iterator[tuple[str, Stored]]:
        for tensors in self.members.values():
            yield from tensors


@dataclass(frozen=True)
class Reading:
    """How a checkpoint is to be read.

    Attributes:
        state: checkpoint key -> what transformers gets for it. Tensors that this rank keeps nothing of are absent.
        weight_mapping: transformers' renamings and conversions, for these.
    """

    state: dict[str, Piece | Deferred]
    weight_mapping: list[Any]


def plan_reading(
    stored: Mapping[str, Stored],
    weight_mapping: Sequence[Any] | None,
    prefix: str,
    whole: Mapping[str, Tensor],
    cuts: Mapping[str, Cut],
    meter: Meter,
) -> Reading:
    """Decide for each checkpoint tensor what is read of it.

    Args:
        stored: the checkpoint, not read.
        weight_mapping: transformers' renamings and conversions of this model.
        prefix: the model's ``base_model_prefix``.
        whole: the model's parameters and buffers before it was cut, on the meta device.
        cuts: parameter -> what this rank keeps of it.
        meter: counts what is read.
    """
    # A parameter that no cut names is read whole; so is a key that belongs to no parameter, if it is read at all.
    state: dict[str, Piece | Deferred] = {key: Piece(tensor, WHOLE, meter) for key, tensor in stored.items()}
    merges: dict[str, _Merge] = {}
    mapping = list(weight_mapping or ())
    by_pattern = {pattern: c for c in compat.converters_of(mapping) for pattern in c.source_patterns}
    for key, name, pattern in compat.targets(list(stored), copy.deepcopy(mapping), prefix, whole):
        if pattern is None:
            state[key] = Piece(stored[key], cuts.get(name, WHOLE), meter)
        else:
            merge = merges.setdefault(name, _Merge(by_pattern[pattern]))
            merge.members[pattern].append((key, stored[key]))
    deferring: set[int] = set()
    for name, merge in merges.items():
        kept = _own_experts(merge, whole[name].shape, cuts.get(name, WHOLE))
        if kept is None:
            deferring.add(id(merge.converter))
            state.update({key: Deferred(tensor, meter) for key, tensor in merge.all()})
            continue
        for key, tensor in merge.all():
            if key in kept:
                state[key] = Piece(tensor, kept[key], meter)
            else:
                del state[key]
    return Reading(state, [_deferred(entry, whole, cuts) if id(entry) in deferring else entry for entry in mapping])


def _own_experts(merge: _Merge, shape: Sequence[int], cut: Cut) -> dict[str, Cut] | None:
    """What is read of each expert's tensor where experts are stacked to (experts, rows, columns); None where it is not that.

    The stacks of several patterns stand side by side in the rows (gate, then up), so the rows that are kept of the parameter
    fall on one tensor or the other.
    """
    patterns = merge.converter.source_patterns
    if not compat.merges_experts(merge.converter) or set(merge.members) != set(patterns) or len(shape) != 3:
        return None
    heights = [merge.members[pattern][0][1].get_shape()[0] for pattern in patterns]
    whole = {(pattern, (height, shape[2])) for pattern, height in zip(patterns, heights, strict=True)}
    found = {(p, tuple(tensor.get_shape())) for p, tensors in merge.members.items() for _, tensor in tensors}
    counts = {len(tensors) for tensors in merge.members.values()}
    if found != whole or sum(heights) != shape[1] or counts != {shape[0]} or cut.zeros:
        return None
    kept: dict[str, Cut] = {}
    start = 0
    experts = [expert for r in cut.ranges.get(0, (range(shape[0]),)) for expert in r]
    for pattern, height in zip(patterns, heights, strict=True):
        rows = _within(cut.ranges.get(1, (range(shape[1]),)), start, height)
        if not rows:
            return None
        ranges = {0: rows, **({1: cut.ranges[2]} if 2 in cut.ranges else {})}
        kept.update({merge.members[pattern][expert][0]: Cut(ranges) for expert in experts})
        start += height
    return kept


def _within(ranges: Sequence[range], start: int, size: int) -> tuple[range, ...]:
    """The parts of ranges that fall into ``start ... start + size``, counted from its start."""
    parts = (range(max(r.start, start) - start, min(r.stop, start + size) - start) for r in ranges)
    return tuple(part for part in parts if len(part))


def _deferred(converter: Any, whole: Mapping[str, Tensor], cuts: Mapping[str, Cut]) -> Any:
    """A copy of a converter that reads whole tensors when it runs, converts them, and keeps this rank's part."""
    changed = copy.deepcopy(converter)
    changed.operations = [_convert_then_cut(converter.operations, whole, cuts)]
    return changed


def _convert_then_cut(operations: Sequence[Any], whole: Mapping[str, Tensor], cuts: Mapping[str, Cut]) -> Any:
    class ConvertThenCut(compat.conversion_base()):  # type: ignore[misc]
        """One group of tensors at a time: whole, converted, cut and freed."""

        # By this transformers knows that tensors are unpacked here, and leaves their dtype alone.
        hf_quantizer = next((op.hf_quantizer for op in operations if getattr(op, "hf_quantizer", None)), None)

        def convert(
            self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **others: Any
        ) -> Any:
            tensors: Any = {pattern: [_read(t) for t in held] for pattern, held in input_dict.items()}
            for operation in operations:
                tensors = operation.convert(
                    tensors, full_layer_name=full_layer_name, model=_Whole(model, whole), **others
                )
            names = _full_names(full_layer_name, list(tensors))
            return {key: _keep(value, cuts.get(names[key], WHOLE)) for key, value in tensors.items()}

        def __deepcopy__(self, memo: Any) -> Any:
            return self  # transformers copies a converter for each parameter; this has nothing of its own

        @property
        def reverse_op(self) -> Any:
            raise NotImplementedError("a model that was cut while it was read cannot be written in its first format")

    return ConvertThenCut()


def _read(tensor: Any) -> Tensor:
    return tensor.read() if isinstance(tensor, Deferred) else tensor


def _keep(value: Any, cut: Cut) -> Tensor:
    tensor = value[0] if isinstance(value, list) else value
    return cut.take(tensor, tensor.shape)


def _full_names(layer_name: str, keys: Sequence[str]) -> dict[str, str]:
    """Results of a conversion carry the patterns of their targets; the parameter's name has more around. As transformers does."""
    name = layer_name.replace("*.", "0.")
    prefix, suffix = next(((name.partition(k)[0], name.partition(k)[2]) for k in keys if k in name), ("", ""))
    return {key: prefix + key + suffix for key in keys}


class _Whole:
    """A model that answers with the sizes its parameters had before it was cut: conversions split by them."""

    def __init__(self, model: Any, whole: Mapping[str, Tensor]):
        self._model, self._parameters = model, whole

    def get_parameter(self, name: str) -> Tensor:
        return self._parameters[name]

    get_parameter_or_buffer = get_parameter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
