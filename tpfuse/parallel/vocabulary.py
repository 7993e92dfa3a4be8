"""Embedding and output head, cut over the vocabulary.

They are cut over ``attn_tp``: under attention data parallelism these are the ranks that are called with the same tokens and
make logits of the same rows. Over more ranks, one would look up tokens that it was not given.

Each rank looks up the tokens of its part, all others are zero, and a sum over the group puts them together. The head makes the
logits of the rank's part, which are gathered unless the caller wants its part alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architecture import Architecture
from .config import ConfigError
from .cut import Cut
from .groups import Groups
from .steps import all_reduce, c10d


@dataclass(frozen=True)
class Vocabulary:
    """How embedding and head of a model are laid out on this rank.

    Attributes:
        size: tokens of the whole vocabulary; 0 where the model's embedding is not known.
        own: the tokens whose embeddings and logits this rank has.
        ranks: global ranks that the vocabulary is cut over; one where it is whole.
        gathered: whether the head returns the logits of all tokens.
        whole_because: why it is not cut; empty where it is.
        cuts: path of a parameter in the model -> what this rank keeps of it.
    """

    size: int
    own: range
    ranks: tuple[int, ...]
    gathered: bool
    whole_because: str
    cuts: dict[str, Cut]


def plan_vocabulary(
    model: nn.Module, names: Architecture, groups: Groups, wanted: bool | None, gather: bool
) -> Vocabulary:
    """Decide whether the vocabulary is cut, from shapes alone.

    Args:
        model: with whole weights, maybe on the meta device; it is not changed.
        names: where embedding and head are.
        groups: this rank's groups.
        wanted: True: cut it or raise; None: cut it where that is possible; False: leave it whole.
        gather: whether the head is to return the logits of all tokens.
    Raises:
        ConfigError: it is wanted and cannot be cut.
    """
    embedding, head = _module(model, names.embedding), _module(model, names.head)
    size = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else 0
    ranks = groups.ranks_of("attn_tp")
    why = "it was not asked for" if wanted is False else _obstacle(embedding, head, len(ranks))
    if why:
        if wanted:
            raise ConfigError(f"the vocabulary cannot be cut over attn_tp {list(ranks)}: {why}; pass vocabulary=None")
        return Vocabulary(size, range(size), ranks[:1], True, why, {})
    each = -(-size // len(ranks))
    start = groups.index_in("attn_tp") * each
    own = range(start, min(size, start + each))
    cut = Cut({0: (own,)})
    cuts = {f"{names.embedding}.weight": cut}
    if head is not None:
        cuts[f"{names.head}.weight"] = cut
        if head.bias is not None:
            cuts[f"{names.head}.bias"] = cut
    return Vocabulary(size, own, ranks, gather or head is None, "", cuts)


def _module(model: nn.Module, path: str) -> Any:
    if not path:
        return None
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _obstacle(embedding: Any, head: Any, size: int) -> str:
    """Why the vocabulary cannot be cut without changing what the model computes; empty where it can."""
    if size == 1:
        return "the group has one rank"
    if not isinstance(embedding, nn.Embedding):
        return f"the embedding is {_kind(embedding)}, not an nn.Embedding"
    if embedding.max_norm is not None or embedding.sparse or embedding.scale_grad_by_freq:
        return "the embedding renormalizes its rows or has gradients of a special kind"
    # A subclass may do more to rows that it looked up (Gemma scales them), but has one table of its own.
    for module, kind in ((embedding, nn.Embedding), (head, nn.Linear)):
        if module is None:
            continue
        if "forward" in vars(module):
            return f"the forward of {_kind(module)} was replaced, so what it does with its weight is not known"
        held = dict(module.named_parameters())
        if set(held) - {"weight", "bias"} or type(module.weight) is not nn.Parameter:
            return f"{_kind(module)} holds more than a plain weight ({', '.join(held)}: {_kind(module.weight)})"
        if not module.weight.is_floating_point():
            return f"the weight of {_kind(module)} is {module.weight.dtype}"
        if kind is nn.Linear and type(module) is not nn.Linear:
            return f"the head is {_kind(module)}, not an nn.Linear"
    tokens = embedding.num_embeddings
    if head is not None and head.out_features != tokens:
        return f"the embedding has {tokens} tokens and the head {head.out_features}"
    if -(-tokens // size) * (size - 1) >= tokens:
        return f"{tokens} tokens leave a rank of {size} without any"
    return ""


def _kind(value: Any) -> str:
    return type(value).__name__


def install_vocabulary(model: nn.Module, names: Architecture, groups: Groups, vocabulary: Vocabulary) -> None:
    """Let embedding and head work on their part. Their weights have been cut."""
    if vocabulary.whole_because:
        return
    group = groups.name_of("attn_tp")
    embedding = model.get_submodule(names.embedding)
    head = _module(model, names.head)
    embedding.num_embeddings = len(vocabulary.own)  # type: ignore[assignment]
    embedding.padding_idx = None  # type: ignore[assignment] # matters for gradients only, and may be another rank's token
    # Methods, so that a copy of the model calls the copy's own weights.
    embedding.forward = MethodType(_lookup(vocabulary, group), embedding)  # type: ignore[method-assign]
    if head is not None and vocabulary.gathered:
        head.forward = MethodType(_logits(vocabulary, group), head)


def _lookup(vocabulary: Vocabulary, group: str) -> Callable[..., Tensor]:
    size, own = vocabulary.size, vocabulary.own

    def forward(embedding: nn.Embedding, ids: Tensor) -> Tensor:
        """ids (batch, length) -> (batch, length, hidden), the same on all ranks of the group."""
        # An id outside of the vocabulary stays out of bounds, on every rank: an error, as of the whole embedding.
        elsewhere = (ids >= 0) & (ids < size) & ((ids < own.start) | (ids >= own.stop))
        rows = type(embedding).forward(embedding, (ids - own.start).masked_fill(elsewhere, 0))
        return all_reduce(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), group)

    return forward


def _logits(vocabulary: Vocabulary, group: str) -> Callable[..., Tensor]:
    def forward(head: nn.Linear, hidden: Tensor) -> Tensor:
        """hidden (batch, length, hidden) -> (batch, length, vocabulary)."""
        return gather_parts(F.linear(hidden, head.weight, head.bias), vocabulary, group)

    return forward


def gather_parts(local: Tensor, vocabulary: Vocabulary, group: str) -> Tensor:
    """The logits of all tokens, from the part of each rank.

    Args:
        local: (..., tokens of this rank).
        vocabulary: how it is cut.
        group: torch's name of the group that it is cut over.
    Returns:
        (..., tokens of the whole vocabulary), the same on all ranks of the group.
    """
    size, ranks = vocabulary.size, len(vocabulary.ranks)
    if ranks == 1:
        return local
    each = -(-size // ranks)
    rows = local.reshape(-1, local.shape[-1])
    if rows.shape[0] == 0:  # then no rank of the group has any
        return local.new_empty(*local.shape[:-1], size)
    rows = F.pad(rows, (0, each - rows.shape[1])).contiguous()
    parts = c10d.wait_tensor(c10d.all_gather_into_tensor(rows, ranks, group))
    whole = parts.view(ranks, rows.shape[0], each).transpose(0, 1).reshape(rows.shape[0], ranks * each)
    return torch.narrow(whole, 1, 0, size).reshape(*local.shape[:-1], size)
