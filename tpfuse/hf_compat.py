"""Every private name of transformers that tpfuse touches, in one place, each with the reason.

``tests/test_hf_compat.py`` has one canary for each name: when a release of transformers moves one, that test says so by name.
transformers is imported inside functions: it is an extra.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Hook:
    """What transformers' parallelism put in the place of a module's ``forward``.

    Attributes:
        style: name of the class of the parallel style, e.g. ``RowwiseParallel``; of the function where that is not known.
        instance: the style itself, or None.
        mesh: its device mesh, or None.
        original: the ``forward`` that was there before, or None.
    """

    style: str
    instance: Any = None
    mesh: Any = None
    original: Callable[..., Any] | None = None

    @property
    def known(self) -> bool:
        return self.mesh is not None and self.original is not None


def hook_of(module: nn.Module) -> Hook | None:
    """The hook that a parallel style installed on a module; None where ``forward`` is the class's own.

    Why private: the styles replace ``forward`` by a function of their ``install_forward`` and keep no other record of it. Its
    closure holds the style, the mesh and the ``forward`` before.
    """
    forward = module.__dict__.get("forward")
    if forward is None:
        return None
    code = getattr(forward, "__code__", None)
    name = getattr(forward, "__qualname__", type(forward).__name__)
    source = str(getattr(forward, "__module__", ""))
    if code is None or not source.startswith("transformers.") or ".install_forward.<locals>." not in name:
        return Hook(name)
    cells = dict(zip(code.co_freevars, forward.__closure__ or (), strict=True))
    held = {key: cell.cell_contents for key, cell in cells.items()}
    instance = held.get("self")
    style = type(instance).__name__ if instance is not None else name.partition(".")[0]
    mesh = held.get("mesh", held.get("ep_mesh"))
    if mesh is None and "_all_reduce_grad" in held:
        # Gradients are reduced in a hook of their own, which holds the mesh.
        mesh = inspect.getclosurevars(held["_all_reduce_grad"]).nonlocals.get("mesh")
    return Hook(style, instance, mesh, held.get("original_forward"))


def drop_gradient_hooks(module: nn.Module) -> int:
    """Take the hooks off a module by which a parallel style reduces gradients; their number.

    Why private: transformers 5.17 registers them on the module (Qwen3's norms of queries and keys), where each is a graph break
    for Dynamo, and keeps no handle; torch keeps them in ``_backward_hooks``.
    """
    hooks = module._backward_hooks
    found = [
        key
        for key, hook in hooks.items()
        if str(getattr(hook, "__module__", "")).startswith("transformers.")
        and ".install_forward.<locals>." in getattr(hook, "__qualname__", "")
    ]
    for key in found:
        del hooks[key]
    return len(found)


def cache_name(model_kwargs: dict[str, Any]) -> str | None:
    """The name under which ``generate`` hands a model its cache; None when there is none.

    ``cache`` in transformers 5.24, ``past_key_values`` in 5.22.
    """
    return next((key for key in ("cache", "past_key_values") if model_kwargs.get(key) is not None), None)


def may_compile(model: Any, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
    """Whether ``generate`` would compile the decode step of this call. Why private: only this method of the model knows."""
    criteria = getattr(model, "_valid_auto_compile_criteria", None)
    return criteria is not None and bool(criteria(model_kwargs, generation_config))


def for_decode(model: Any) -> AbstractContextManager[Any]:
    """The context in which ``generate`` runs its decode steps: it picks the experts' kernels for few rows.

    Why private: ``generate`` alone is meant to enter it. A release without it needs none.
    """
    context = getattr(model, "_optimize_model_for_decode", None)
    return nullcontext() if context is None else context()


def completed(model: Any, generation_config: Any, kwargs: dict[str, Any]) -> Any:
    """The configuration that a call of ``generate`` would use, with all defaults filled in.

    Why private: ``generate`` completes its configuration inside, and ``get_generation_mode`` needs a complete one.
    """
    prepared, _ = model._prepare_generation_config(generation_config, **kwargs)
    return prepared


def own_decoding(model: Any) -> Callable[..., Any]:
    """transformers' own loop for greedy search and sampling. Why private: ``generate`` reaches it by its name."""
    method: Callable[..., Any] = type(model)._sample
    return method


def pad_token(generation_config: Any) -> Any:
    """The tensor of the token that follows a finished sequence, or None. Why private: ``generate`` keeps it there."""
    return getattr(generation_config, "_pad_token_tensor", None)


def static_layers() -> tuple[type, type]:
    """The classes of static cache layers: of full attention, and of attention in a sliding window.

    Why semi-private: the module is public, its layers are not part of transformers' documented interface.
    """
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    return StaticLayer, StaticSlidingWindowLayer


def attention_of(model: Any) -> str | None:
    """The name of the attention that the model runs. Why private: the configuration keeps what was chosen in a private field."""
    name: str | None = getattr(model.config.get_text_config(), "_attn_implementation", None)
    return name


def is_remote(model: Any) -> bool:
    """Whether the model's code came with its checkpoint. Why semi-private: the method is not documented."""
    asks = getattr(model, "is_remote_code", None)
    return asks is not None and bool(asks())
