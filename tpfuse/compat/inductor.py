"""Inductor: its passes, settings, modes and caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch


def custom_graph_pass() -> type:
    """Inductor's base class for passes with a uuid, so that its compile caches stay usable.

    Why private: there is no public way to give a pass an identity.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


def custom_passes(setting: Any) -> tuple[Any, ...]:
    """The passes that one Inductor setting holds: none, one, or (from torch 2.13 on) a list of them."""
    if setting is None:
        return ()
    return tuple(setting) if isinstance(setting, list | tuple) else (setting,)


def wants_inference_flag(graph_pass: Any) -> bool:
    """Whether a pass is called as ``(graph, is_inference)``. Why private: the class is Inductor's own."""
    from torch._inductor import custom_graph_pass as module

    aware = getattr(module, "CustomInferenceAwareGraphPass", None)
    return aware is not None and isinstance(graph_pass, aware)


def inductor_config(name: str, default: Any = None) -> Any:
    """The current value of one Inductor setting, e.g. a pass that the user installed; ``default`` where torch lacks it."""
    from torch._inductor import config

    return getattr(config, name, default)


def inductor_settings() -> list[str]:
    """The names of all Inductor settings, to judge a user's options before compiling."""
    from torch._inductor import config

    return list(config.get_config_copy())


def compile_fx(gm: torch.fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    """Inductor on a Dynamo graph. Why private: ``torch.compile`` cannot pass a pass for one compile to its backend."""
    from torch._inductor.compile_fx import compile_fx as inductor

    return cast(Callable[..., Any], inductor(gm, inputs, config_patches=patches))


def inductor_mode_options(mode: str | None) -> dict[str, Any]:
    """The Inductor settings that a ``torch.compile`` mode stands for."""
    from torch._inductor import list_mode_options

    return list_mode_options(mode) if mode else {}


def inductor_modes() -> tuple[str, ...]:
    """The names of the modes of ``torch.compile``."""
    from torch._inductor import list_mode_options

    return tuple(list_mode_options())


def without_compile_caches() -> AbstractContextManager[Any]:
    """A context in which AOTAutograd's and FX's graph caches are neither read nor written.

    Why private: the switches are settings of ``torch._functorch`` and ``torch._inductor``.
    """
    from contextlib import ExitStack

    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    stack = ExitStack()
    stack.enter_context(functorch.patch(enable_autograd_cache=False))
    stack.enter_context(inductor.patch(fx_graph_cache=False))
    return stack


def cache_folder() -> str:
    """The folder of Inductor's caches, beside which reports are kept."""
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir
    except ImportError:  # before that module was split off
        from torch._inductor.codecache import cache_dir
    return cache_dir()


def bundle_file(name: str, data: Any) -> None:
    """Have ``torch.compiler.save_cache_artifacts`` carry a JSON file of :func:`cache_folder`, which loading writes again.

    Why private: bundles have no public door. A process that loads one before it imports tpfuse would know no artifact type of
    ours, and torch then drops the whole bundle; its own type for tuned kernels writes any JSON file below that folder.
    Raises whatever a torch without these names raises.
    """
    from torch._inductor.runtime.autotune_cache import AutotuneCacheArtifact
    from torch.compiler._cache import CacheArtifactManager

    CacheArtifactManager.record_artifact(AutotuneCacheArtifact.type(), name, data)


def compile_in_this_process() -> None:
    """Inductor starts no workers that compile beside a measurement. Why private: its settings have no public home."""
    torch._inductor.config.compile_threads = 1  # type: ignore[attr-defined]
