"""What the pass never sees of a Hugging Face model: norms that are opaque calls, and calls of ``generate`` that run eagerly."""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from tpfuse import unfused

NORM_LIBRARIES = ("liger_kernel", "kernels")
_CRITERIA = "_valid_auto_compile_criteria"


def hidden_norms(model: nn.Module) -> list[str]:
    """What hides the RMSNorms of this model from a graph pass: one sentence each, empty when nothing does."""
    notes = []
    if getattr(model, "use_kernels", False):
        notes.append(
            "the model was loaded with use_kernels=True: Hub kernels replace its RMSNorm by an opaque call, so no reduction "
            "before it can be fused. Load it with use_kernels=False"
        )
    replaced = sorted({name for name in map(_norm_library, model.modules()) if name is not None})
    if replaced:
        notes.append(
            f"the model's norms come from {', '.join(replaced)}: the graph shows them as an opaque call, so no reduction "
            "before them can be fused. Do not patch the model's RMSNorm"
        )
    return notes


def _norm_library(module: nn.Module) -> str | None:
    if "norm" not in type(module).__name__.lower():
        return None
    forward = getattr(module.forward, "__func__", module.forward)
    for source in (type(module).__module__, getattr(forward, "__module__", "")):
        library = str(source).partition(".")[0]
        if library in NORM_LIBRARIES:
            return library
    return None


def tell_when_generate_compiles_nothing(model: Any) -> None:
    """Warn when ``generate`` was to use tpfuse and runs eagerly: it compiles with a static cache only, and says so in a log.

    ``generate`` asks a method of the model whether to compile; a release of transformers without that method loses the
    warning and nothing else.
    """
    if hasattr(type(model), _CRITERIA):
        setattr(model, _CRITERIA, types.MethodType(_valid_auto_compile_criteria, model))


def _valid_auto_compile_criteria(model: Any, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
    """transformers' own answer; a bound method of the model, so that a copy of the model asks about itself."""
    compiles = bool(getattr(type(model), _CRITERIA)(model, model_kwargs, generation_config))
    config = getattr(generation_config, "compile_config", None)
    if compiles or getattr(generation_config, "disable_compile", False) or getattr(config, "backend", None) != "tpfuse":
        return compiles
    if model.device.type == "cpu" and not getattr(config, "_compile_all_devices", False):
        unfused.tell(
            "generate-cpu",
            "generate() ran eagerly, so nothing was fused: transformers compiles on accelerators only. Leave compile_config out "
            "of the call after tpfuse.hf.compile(model), which compiles on a CPU as well",
        )
    elif not _static(model_kwargs.get("cache", model_kwargs.get("past_key_values"))):
        unfused.tell(
            "generate-cache",
            "generate() ran eagerly, so nothing was fused: transformers compiles its decode step only with a static cache. Call "
            "generate(..., cache_implementation='static'), or set model.generation_config.cache_implementation = 'static', which "
            "a pipeline uses too",
        )
    else:
        unfused.tell(
            "generate-other",
            "generate() ran eagerly, so nothing was fused: transformers does not compile this model's decode step (offloaded to "
            "CPU or disk, or quantized in a way that cannot be compiled). Call the compiled model directly",
        )
    return compiles


def _static(cache: Any) -> bool:
    """Whether ``generate`` compiles with this cache. One that grows calls itself compileable as long as it is empty."""
    return bool(getattr(cache, "is_compileable", False)) and type(cache).__name__ != "DynamicCache"
