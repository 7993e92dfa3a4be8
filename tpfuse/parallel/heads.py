"""How many heads an attention has, and how many of them a rank has."""

from __future__ import annotations

from typing import Any

from torch import nn


def head_counts(config: Any) -> tuple[int, int]:
    """Heads of queries, and of keys and values, of a whole attention."""
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def count_own_heads(attention: nn.Module, config: Any, size: int) -> None:
    """Let an attention that splits a packed projection by the numbers of heads know its own numbers.

    Args:
        attention: takes them from ``num_key_value_heads`` of its own, and from its ``config``.
        config: of the whole model; it is not changed.
        size: number of ranks over which the heads are cut.
    """
    heads, kv_heads = head_counts(config)
    own = OwnHeads(config, heads // size, max(1, kv_heads // size))
    attention.config = own  # type: ignore[assignment]
    if hasattr(attention, "num_key_value_heads"):
        attention.num_key_value_heads = own.num_key_value_heads  # type: ignore[assignment]


class OwnHeads:
    """A model's config as it is at any time, but for the numbers of heads."""

    def __init__(self, config: Any, heads: int, kv_heads: int):
        self._config = config
        self.num_attention_heads, self.num_key_value_heads = heads, kv_heads

    def __getattr__(self, name: str) -> Any:
        if name == "_config" or name.startswith("__"):  # while a copy is made, before it has attributes
            raise AttributeError(name)
        return getattr(self._config, name)
