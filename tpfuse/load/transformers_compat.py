"""Every private name of transformers that loading touches, in one place, each with the reason.

``tests/test_load_compat.py`` has one canary for each. Where a release lacks one, :func:`missing` says so and the whole model is
loaded and then cut.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# One interception at a time in a process: two would put each other's function back.
_LOCK = threading.RLock()
_PARAMETERS = ("model", "state_dict", "checkpoint_files", "load_config")


def missing() -> str:
    """Why this transformers cannot read in slices: the name that it lacks; empty where it can."""
    import transformers

    function = getattr(transformers.PreTrainedModel, "_load_pretrained_model", None)
    if function is None or tuple(inspect.signature(function).parameters)[:4] != _PARAMETERS:
        return f"transformers {transformers.__version__} loads in another way (PreTrainedModel._load_pretrained_model)"
    try:
        from transformers import core_model_loading as core
    except ImportError:
        return f"transformers {transformers.__version__} has no core_model_loading"
    names = (
        "WeightConverter",
        "WeightRenaming",
        "MergeModulelist",
        "Concatenate",
        "ConversionOps",
        "rename_source_key",
    )
    lacking = [name for name in (*names, "dot_natural_key") if not hasattr(core, name)]
    if lacking:
        return f"transformers {transformers.__version__} has no core_model_loading.{lacking[0]}"
    if tuple(inspect.signature(core.rename_source_key).parameters)[:5] != (
        *("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"),
    ):
        return f"transformers {transformers.__version__} renames in another way (core_model_loading.rename_source_key)"
    return ""


@contextlib.contextmanager
def loading_through(load: Callable[..., Any]) -> Iterator[None]:
    """While this is open, ``from_pretrained`` of this thread fills a model through ``load(original, model, ...)``.

    Why private: ``from_pretrained`` has no public step between the model that it built and the files that it found. At this
    method the model is on the meta device, the files are resolved and downloaded, and dtype, quantizer and renamings are known.
    """
    import transformers

    base = transformers.PreTrainedModel
    thread = threading.get_ident()
    with _LOCK:
        original = base._load_pretrained_model

        def choose(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return original(*args, **kwargs)
            return load(original, *args, **kwargs)

        base._load_pretrained_model = staticmethod(choose)  # type: ignore[method-assign]
        try:
            yield
        finally:
            base._load_pretrained_model = staticmethod(original)  # type: ignore[method-assign]


def converters_of(weight_mapping: Sequence[Any] | None) -> list[Any]:
    """The entries that convert, e.g. merge experts, out of transformers' renamings and conversions."""
    from transformers.core_model_loading import WeightConverter

    return [entry for entry in weight_mapping or () if isinstance(entry, WeightConverter)]


def targets(
    keys: Sequence[str], weight_mapping: Sequence[Any] | None, prefix: str, parameters: Mapping[str, Any]
) -> Iterator[tuple[str, str, str | None]]:
    """(checkpoint key, parameter, pattern of the converter that takes it or None), in the order in which transformers loads.

    Keys that belong to no parameter are left out. Why private: renaming is not public. The rules are those of
    ``convert_and_load_state_dict_in_model``. Renamings have state, so pass a copy.
    """
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    renamings = [entry for entry in weight_mapping or () if isinstance(entry, WeightRenaming)]
    converters = converters_of(weight_mapping)
    known = dict(parameters)
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=known)
        if name in known:
            yield key, name, pattern


def merges_experts(converter: Any) -> bool:
    """Whether a converter only stacks one tensor for each expert, and puts such stacks side by side along dimension 1."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
    stack, join = (MergeModulelist, 0), (Concatenate, 1)
    if len(converter.target_patterns) != 1:
        return False
    return steps == [stack, join] or (steps == [stack] and len(converter.source_patterns) == 1)


def conversion_base() -> type:
    """The base class of transformers' conversions. Why private: a converter takes objects of it alone."""
    from transformers.core_model_loading import ConversionOps

    return ConversionOps


def whole_files(files: Sequence[str], weights_only: bool) -> dict[str, Any]:
    """The tensors of pickled checkpoints, memory-mapped where the format allows it. Why private: as transformers opens them."""
    from transformers.modeling_utils import load_state_dict

    tensors: dict[str, Any] = {}
    for file in files:
        tensors.update(load_state_dict(file, weights_only=weights_only))
    return tensors
