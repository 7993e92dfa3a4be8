"""Every name of vLLM that tpfuse touches and that vLLM does not document, in one place, each with the reason.

``tests/matrix/vllm_canaries.py`` has one canary for each: ``make test-vllm`` runs them with each version of vLLM.
Nothing here imports vLLM before it is called.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.fx.node import map_arg

from tpfuse import compat

POST_PASS = "post_grad_custom_post_pass"
_WRAPPED = "_wrapped_by_tpfuse"


def pass_base() -> type:
    """The class that vLLM's pass manager asserts of a custom pass; Inductor's own where vLLM is not installed.

    Why private: no other class passes the assertion in ``VllmBackend.configure_post_pass``.
    """
    try:
        return importlib.import_module("vllm.compilation.passes.inductor_pass").InductorPass
    except ImportError:
        return compat.custom_graph_pass()


def all_reduce() -> Any:
    """vLLM's all-reduce operator. Importing the module registers it."""
    importlib.import_module("vllm.distributed.parallel_state")
    return torch.ops.vllm.all_reduce


def group_ranks(name: str) -> tuple[int, ...]:
    """Global ranks of one of vLLM's groups.

    Why private: the name, e.g. ``tp:0``, is all that a graph holds, and vLLM's registry (weak references by name) has no
    public reader.
    """
    group = importlib.import_module("vllm.distributed.parallel_state")._groups[name]()
    if group is None:
        raise KeyError(f"vLLM's group {name} was destroyed")
    return tuple(group.ranks)


def group_names() -> list[str]:
    """Names of vLLM's groups of more than one rank in this process; empty before vLLM has made its groups."""
    module = sys.modules.get("vllm.distributed.parallel_state")
    groups = {} if module is None else module._groups
    alive = ((name, reference()) for name, reference in list(groups.items()))
    return sorted(name for name, group in alive if group is not None and len(group.ranks) > 1)


def pass_key() -> str:
    """The Inductor setting under which vLLM takes a custom pass. Why private: it belongs to the platform class."""
    platform = importlib.import_module("vllm.platforms").current_platform
    return str(getattr(platform, "pass_key", POST_PASS))


def norm_provider(node: Any) -> str:
    """The implementation that vLLM will lower a node of its IR to: ``native``, ``vllm_c``, or one that came later.

    Why private: vLLM chooses when it lowers (``VllmIRLoweringPass``), after all other passes, from the priorities in force and
    the node's operands. This asks the same question with the same operands.
    """
    registry = importlib.import_module("vllm.ir.op").IrOp.registry
    name = str(node.target).removeprefix("vllm_ir.").removesuffix(".default")
    operands = map_arg(node.args, lambda operand: operand.meta["val"])
    return str(registry[name].dispatch(*operands, **node.kwargs).provider)


def platform_can_fuse() -> bool:
    """Whether the fused op runs on vLLM's platform: CUDA, or a CPU for tests."""
    platform = importlib.import_module("vllm.platforms").current_platform
    return bool(platform.is_cuda() or platform.is_cpu())


def cache_root() -> Path:
    """vLLM's cache folder. Why private: ``vllm.envs`` documents the variable, not the reader."""
    return Path(importlib.import_module("vllm.envs").VLLM_CACHE_ROOT)


def version() -> str:
    """vLLM's version."""
    return str(importlib.import_module("vllm").__version__)


def logger() -> logging.Logger:
    """A logger that vLLM's logging shows, in the user's process and in the workers: the name is below ``vllm``."""
    return logging.getLogger("vllm.tpfuse")


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace ``owner.name`` by ``around(original, *args, **kwargs)``, once.

    Why: vLLM has no hook for a config that is about to be checked, nor for what its compile caches supplied.
    Raises ``AttributeError`` where this vLLM lacks the name.
    """
    original = getattr(owner, name)
    if getattr(original, _WRAPPED, False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapped, _WRAPPED, True)
    setattr(owner, name, wrapped)


def on_config(around: Callable[..., Any]) -> None:
    """Call ``around(original, config)`` whenever a ``VllmConfig`` is checked: in the user's process and again in the engine's."""
    wrap(importlib.import_module("vllm.config").VllmConfig, "__post_init__", around)


def on_model(around: Callable[..., Any]) -> None:
    """Call ``around(original, backend, graph, inputs)`` when a model is compiled piece by piece (``VllmBackend``)."""
    wrap(importlib.import_module("vllm.compilation.backends").VllmBackend, "__call__", around)


def on_piece(around: Callable[..., Any]) -> None:
    """Call ``around(original, manager, graph, ...)`` for each piece, also one that a cache supplies (``CompilerManager``)."""
    wrap(importlib.import_module("vllm.compilation.backends").CompilerManager, "compile", around)


def on_load(around: Callable[..., Any]) -> None:
    """Call ``around(original, model, path)`` when a model is looked for in vLLM's ahead-of-time cache."""
    wrap(importlib.import_module("vllm.compilation.decorators"), "_try_load_aot_compiled_fn", around)


def artifact_key(manager: Any, compiled: Any) -> str | None:
    """The cache key under which a ``CompilerManager`` holds what it has just returned; None when it caches nothing.

    Equal pieces of a model share one artifact and one key. Ranks that share Inductor's cache have the same key.
    """
    for key, held in manager.loaded_artifacts.items():
        if held is compiled:
            return str(key)
    return None


def place(config: Any) -> tuple[int, int]:
    """(number of this worker among all, how many there are), over the replicas of data parallelism.

    Why private: replicas of a dense model are engines of their own, each with ranks from 0.
    """
    parallel = config.parallel_config
    size, rank = int(parallel.world_size), int(getattr(parallel, "rank", 0))
    replicas = int(getattr(parallel, "data_parallel_size", 1))
    return int(getattr(parallel, "data_parallel_index", 0)) * size + rank, size * replicas
