"""What a cut model cannot do any more: it is for inference, and a rank holds a part of each weight.

Here are methods that would take the part for the whole and say nothing. They are refused by name.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NoReturn

from torch import Tensor, nn

from .config import ConfigError

SAVES = ("save_pretrained", "push_to_hub")
RESIZES = "resize_token_embeddings"


def refuse_what_needs_the_whole(model: nn.Module, vocabulary_is_cut: bool) -> None:
    """Put methods that raise :class:`ConfigError` in the place of those of a transformers model that was just cut."""
    for name in SAVES:
        if hasattr(model, name):
            setattr(model, name, MethodType(_refused_to_save(name), model))
    if vocabulary_is_cut and hasattr(model, RESIZES):
        setattr(model, RESIZES, MethodType(_resize, model))


def _refused_to_save(name: str) -> Any:
    def save(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("state_dict") is not None:  # the caller has put one together
            return getattr(type(model), name)(model, *args, **kwargs)
        raise ConfigError(
            f"{name}: this rank holds a part of the weights of {type(model).__name__}, and the file would have that part under "
            "the names of the whole, written by every rank. Save before parallelize, or keep the parts, a file for each rank: "
            "torch.save(model.state_dict(), f'rank{rank}.pt')"
        )

    return save


def _resize(model: nn.Module, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    if new_num_tokens is None and not args and not any(kwargs.values()):  # this only asks for the embedding
        return getattr(type(model), RESIZES)(model)
    raise ConfigError(
        f"{RESIZES}: the vocabulary of {type(model).__name__} is cut over the ranks, and each would resize its part. Resize "
        "before parallelize, or cut with vocabulary=False"
    )


def for_inference(y: Tensor) -> Tensor:
    """``y`` itself. A backward pass that reaches it raises: sums would hand each rank the gradient of its part alone."""
    if y.requires_grad:
        y.register_hook(_refuse_gradients)
    return y


def _refuse_gradients(_: Tensor) -> NoReturn:
    raise ConfigError(
        "parallelize cuts a model for inference: a backward pass would miss what the other ranks add to each gradient. Train the "
        "whole model, or with transformers' or torch's own tensor parallelism; without training, call it under torch.no_grad()"
    )
