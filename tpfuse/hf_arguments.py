"""What a user of :mod:`tpfuse.hf` may get wrong before anything runs: no folder, no model, sizes of another kind, a model that
nobody has cut."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tpfuse import unfused
from tpfuse.hf_compat import hook_of
from tpfuse.hf_local import CUT, WRAPPED
from tpfuse.options import READERS, Options, parse
from tpfuse.parallel.model import ATTRIBUTE, without_adapter_wrapper

ASKED_FOR_WHOLE = "tpfuse_whole"  # attribute of a model that was loaded for one rank


def check_folder(path: Any) -> None:
    """A path is a folder that exists; what may be a name on the Hub is left to transformers.

    Raises:
        FileNotFoundError: the Hub would say that this is no name for a repository, and not that there is no such folder.
    """
    given = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(given, str) or Path(given).exists():
        return
    if given.startswith(("/", ".", "~")) or given.count("/") > 1:
        home = "; ~ is not expanded" if given.startswith("~") else ""
        raise FileNotFoundError(
            f"{given} does not exist{home}; give a folder with config.json and weights, or a name on the Hub, "
            "such as Qwen/Qwen3-0.6B"
        )


def check_model(model: Any) -> None:
    """Raises ``TypeError`` for what is no module, such as a name."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the model is {model!r}, of type {type(model).__name__}; give a transformers model, e.g. from "
            "tpfuse.hf.from_pretrained or AutoModelForCausalLM.from_pretrained"
        )


def check_options(mode: str | None, options: dict[str, Any] | None) -> Options:
    """The options of a compile. Raises :class:`~tpfuse.OptionError` here, and not at the model's first call."""
    if mode is not None:
        READERS["mode"]("mode", mode)
    return parse(options)


def tell_of_a_whole_model(model: nn.Module, policy: str) -> None:
    """Warn when there are several ranks and the model is whole on each of them: there will be nothing to fuse.

    Not of what was asked for: the policy ``off``, or sizes of one rank.
    """
    if policy == "off" or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    inner = without_adapter_wrapper(model)
    if getattr(inner, ATTRIBUTE, None) is not None or getattr(inner, ASKED_FOR_WHOLE, False):
        return
    # A weight that is quantized hides that it is a share, but its module has the forward of a parallel style.
    if any(isinstance(p, DTensor) for p in model.parameters()) or any(map(_shares, model.modules())):
        return
    unfused.tell(
        "whole-model",
        f"the model is not cut over the {dist.get_world_size()} ranks: each has all of its weights, and there are no sums to "
        "fuse. Load it with tpfuse.hf.from_pretrained(path, ParallelConfig(tp_size=...)) or with transformers' tp_plan='auto', "
        "or call tpfuse.hf.parallelize first",
    )


def _shares(module: nn.Module) -> bool:
    hook = hook_of(module)
    return hasattr(module, WRAPPED) or hasattr(module, CUT) or (hook is not None and hook.known)
