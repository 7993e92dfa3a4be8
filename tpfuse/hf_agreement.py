"""Do the ranks that share one replica make the same call of ``generate``, and do replicas that meet stay in step?

They decode one sequence together, each with a part of the model, and choose every token on their own. Ranks that are given other
prompts, or draw from another state of the random number generator, choose other tokens: what they make together is no text,
and a rank that finishes early leaves the others waiting. Asked once a call, before anything runs.

Replicas have prompts of their own and end at different steps. Where their rows meet in every step, one that has ended goes on
with steps whose tokens are dropped, until all have: transformers' ``synced_gpus``.
"""

from __future__ import annotations

import hashlib
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpfuse.hf_local import WRAPPED
from tpfuse.parallel.decision import ranks_in_words
from tpfuse.parallel.model import ATTRIBUTE

ASKED = ("the prompt", "whether tokens are drawn", "the state of the random number generator")


def install(model: nn.Module) -> None:
    """Let transformers' own ``model.generate`` ask first."""
    if hasattr(type(model), "generate"):
        model.generate = types.MethodType(_generate, model)  # type: ignore[assignment]


def _generate(model: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
    check_call(model, inputs, kwargs)
    return type(model).generate(model, inputs, *args, **in_step(model, kwargs))


def replicas_meet(model: Any) -> bool:
    """Whether all ranks of the default group must take equally many steps. transformers asks over that group."""
    parallelized = getattr(model, ATTRIBUTE, None)
    if parallelized is None or not parallelized.plan.gathers_blocks:
        return False
    return bool(dist.get_world_size() == parallelized.config.world_size)


def in_step(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` with which replicas that meet stay in step, unless the caller or another loop decides."""
    chosen = ("synced_gpus", "custom_generate", "assistant_model")  # what assists has loops of its own, which refuse it
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    lookup = kwargs.get("prompt_lookup_num_tokens", getattr(config, "prompt_lookup_num_tokens", None))
    if lookup is not None or any(kwargs.get(name) is not None for name in chosen) or not replicas_meet(model):
        return kwargs
    return {**kwargs, "synced_gpus": True}


def check_call(model: Any, inputs: Any, kwargs: dict[str, Any]) -> None:
    """Raise on all ranks of a replica unless they are about to choose the same tokens. Collective over these ranks.

    Args:
        model: a transformers model; one that is not cut is not asked about.
        inputs, kwargs: of ``generate``. A prompt that is not a tensor of ids is not compared.
    Raises:
        ValueError: names the ranks and what differs.
    """
    group = _replica(model)
    if group is None or dist.get_world_size(group) == 1 or dist.get_backend(group) == "fake":
        return
    config = kwargs.get("generation_config") or model.generation_config
    asked = kwargs.get("do_sample")
    draws = bool(config.do_sample if asked is None else asked)
    prompt = inputs if isinstance(inputs, Tensor) else kwargs.get("input_ids")
    ids = prompt if isinstance(prompt, Tensor) and not prompt.is_floating_point() else None
    mine = (
        None if ids is None else _digest(ids, tuple(ids.shape)),
        draws,
        _digest(_random_state(model.device)) if draws else None,
    )
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)  # on the device that the group's backend has
    ranks = dist.get_process_group_ranks(group)
    for number, what in enumerate(ASKED):
        others = [rank for rank, row in zip(ranks, found, strict=True) if row[number] != found[0][number]]
        if others:
            raise ValueError(
                f"generate: {what} on {ranks_in_words(others)} is not that of rank {ranks[0]}, and ranks {list(ranks)} decode "
                "the tokens of one replica together. Give all of them the same prompts and settings, and call torch.manual_seed "
                "with one number on each before do_sample=True"
            )


def _replica(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that are called with the same rows; None where the model is whole."""
    parallelized = getattr(model, ATTRIBUTE, None)
    if parallelized is not None:
        return parallelized.groups.group("attn_tp")
    records = next((held for m in model.modules() if (held := vars(m).get(WRAPPED))), None)
    return next(iter(records.values())).mesh.get_group() if records else None


def _random_state(device: torch.device) -> Tensor:
    """Of the generator that tokens on a device are drawn from."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _digest(values: Tensor, shape: tuple[int, ...] = ()) -> str:
    data = values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(repr(shape).encode() + data).hexdigest()[:16]
