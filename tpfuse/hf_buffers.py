"""The tensors of a decode step, which keep their addresses between steps and between calls of ``generate``.

A CUDA graph reads and writes the memory it was captured with, and a compiled graph is guarded on its static cache. So both are
kept for each batch size, and calls whose length fits use them again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tpfuse import hf_compat
from tpfuse.hf_tokens import Choice

# Capacities are multiples of this: a few more tokens need no new cache, hence no new graph.
STEP = 256
# How many batch sizes keep their caches and graphs.
KEPT = 4


class Buffers:
    """Cache and inputs for one batch size.

    Attributes:
        batch, capacity: sequences, and tokens that the cache holds of each.
        cache: transformers' ``StaticCache``, with every layer in full length.
        ids: (batch, capacity + 1), prompt and chosen tokens. ``column``: (1,), where the next token goes.
        tokens, positions: (batch, 1), what the next step reads.
        mask: (batch, capacity), 0 on padding.
        unfinished: (batch,), 1 until a sequence has ended. ``finished``: a flag, all have.
        invalid: a flag, see :func:`tpfuse.hf_tokens.draw`.
        graphs: captured steps, by what is fixed in them; they share one pool of memory.
        warm: how many steps of a kind have run without a graph.
    """

    def __init__(self, model: Any, name: str, batch: int, capacity: int) -> None:
        device = model.device
        self.batch, self.capacity, self.name = batch, capacity, name
        self.cache = static_cache(model, capacity)
        self.ids = torch.zeros(batch, capacity + 1, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.mask = torch.ones(batch, capacity, dtype=torch.long, device=device)
        self.unfinished = torch.ones(batch, dtype=torch.long, device=device)
        self.finished = torch.zeros((), dtype=torch.bool, device=device)
        self.invalid = torch.zeros((), dtype=torch.bool, device=device)
        self.pad = torch.zeros((), dtype=torch.long, device=device)
        self.eos: dict[int, Tensor] = {}
        self.graphs: dict[Any, Any] = {}
        self.warm: Counter[Any] = Counter()
        self._weights = weights(model)
        self._allocate(model)

    def _allocate(self, model: Any) -> None:
        """Let the layers allocate: only the model's own forward knows the shapes, on this rank and in this architecture."""
        model(
            input_ids=self.tokens,
            position_ids=self.positions,
            use_cache=True,
            return_dict=True,
            **{self.name: self.cache},
        )

    def forget_stale_graphs(self, model: Any) -> None:
        """A CUDA graph reads the memory in which the weights were; a model that was cast or reloaded has them elsewhere."""
        if (now := weights(model)) != self._weights:
            self._weights = now
            self.graphs.clear()
            self.warm.clear()

    def start(self, ids: Tensor, mask: Tensor | None) -> None:
        """Begin with prompts (batch, length), and their mask of the same shape or None."""
        length = ids.shape[1]
        self.cache.reset()
        self.ids[:, :length] = ids
        self.column.fill_(length)
        self.mask.fill_(1)
        if mask is not None:
            self.mask[:, :length] = mask
        self.unfinished.fill_(1)
        self.finished.fill_(False)
        self.invalid.fill_(False)

    def fix(self, choice: Choice) -> Choice:
        """The choice with its tensors at addresses that later calls of its kind use again."""
        eos, pad = choice.eos, choice.pad
        if eos is not None:
            self.eos.setdefault(eos.numel(), torch.empty_like(eos, device=self.tokens.device)).copy_(eos)
            choice = replace(choice, eos=self.eos[eos.numel()])
        if pad is not None:
            choice = replace(choice, pad=self.pad.copy_(pad.reshape(())))
        return choice

    def append(self, tokens: Tensor, ended: Tensor | None) -> None:
        """Take the tokens (batch,) that were chosen, and make them the next step's input."""
        self.tokens.copy_(tokens[:, None])
        self.ids.index_copy_(1, self.column, self.tokens)
        self.column.add_(1)
        if ended is not None:
            self.unfinished.mul_(~ended)
            torch.eq(self.unfinished.max(), 0, out=self.finished)


def weights(model: Any) -> tuple[Any, ...]:
    """Where the model's parameters and buffers are. About 0.1 ms for a model of 32 layers."""
    return (model.training, *(p.data_ptr() for p in model.parameters()), *(b.data_ptr() for b in model.buffers()))


def static_cache(model: Any, capacity: int) -> Any:
    """A static cache for so many tokens in every layer.

    Layers that attend in a window count in Python, which a CUDA graph would not repeat. In full length they need no count:
    the mask, which is made for absolute positions, keeps the window.
    """
    from transformers import StaticCache

    full, window = hf_compat.static_layers()
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=capacity)
    cache.layers = [full(max_cache_len=capacity) if type(layer) is window else layer for layer in cache.layers]
    return cache


def holds_full_attention_only(cache: Any) -> bool:
    """Whether :func:`static_cache` can stand for this cache of ``generate``: attention layers that count on the device."""
    kinds = hf_compat.static_layers()
    return all(
        type(layer) in kinds and isinstance(getattr(layer, "cumulative_length", None), Tensor)
        for layer in getattr(cache, "layers", [None])
    )


class Pool:
    """The buffers of one model, for the batch sizes that were used last."""

    def __init__(self) -> None:
        self.kept: dict[int, Buffers] = {}

    def take(self, model: Any, name: str, batch: int, length: int) -> Buffers:
        """Buffers for ``length`` tokens of ``batch`` sequences: those of an earlier call if they are large enough."""
        found = self.kept.pop(batch, None)
        if found is None or found.capacity < length or found.tokens.device != model.device:
            capacity = -(-length // STEP) * STEP
            found = None  # free its memory before the larger one is allocated
            # The buffers outlive the call: tensors made under inference_mode could not be written outside of it.
            with torch.inference_mode(False), torch.no_grad():
                found = Buffers(model, name, batch, capacity)
        found.forget_stale_graphs(model)
        self.kept[batch] = found
        while len(self.kept) > KEPT:
            del self.kept[next(iter(self.kept))]
        return found

    def drop(self, buffers: Buffers) -> None:
        """Give the buffers away: the next call makes new ones."""
        if self.kept.get(buffers.batch) is buffers:
            del self.kept[buffers.batch]
