"""The token that follows: processors, greedy or drawn, and which sequences it ends. No host synchronization in here.

Tokens are the ones that transformers' own loop chooses, with the same random numbers. It draws by ``torch.multinomial``, which
reads its input's validity back to the host on a GPU; :func:`draw` makes the same draw and leaves a flag on the device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Processors that look at the scores alone, and whose settings are plain numbers: they may be part of a CUDA graph.
BY_SCORES_ALONE = (
    "EpsilonLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinPLogitsWarper",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
)


@dataclass
class Choice:
    """How tokens are chosen.

    Attributes:
        processors: a transformers ``LogitsProcessorList``.
        sample: draw a token, or take the best.
        eos: the tokens that end a sequence, shape (n,), or None.
        pad: the token that follows an ended sequence, or None where sequences do not end.
    """

    processors: Any
    sample: bool
    eos: Tensor | None = None
    pad: Tensor | None = None

    @functools.cached_property
    def signature(self) -> tuple[Any, ...] | None:
        """What of this would be fixed in a CUDA graph; None where it must run outside of one."""
        found = []
        for processor in self.processors:
            settings = vars(processor)
            plain = all(isinstance(value, int | float | str | None) for value in settings.values())
            known = type(processor).__module__ == "transformers.generation.logits_process"
            if not (plain and known and type(processor).__name__ in BY_SCORES_ALONE):
                return None
            found.append((type(processor).__name__, tuple(sorted(settings.items()))))
        eos = None if self.eos is None else self.eos.numel()
        return tuple(found), self.sample, eos, self.pad is None

    def scores(self, ids: Tensor | None, logits: Tensor) -> Tensor:
        """logits (batch, vocabulary) in fp32 -> scores. ``ids`` may be None where :attr:`signature` is not."""
        return self.processors(ids, logits) if self.processors else logits

    def tokens(self, scores: Tensor, unfinished: Tensor, invalid: Tensor) -> Tensor:
        """scores (batch, vocabulary) -> tokens (batch,), padding for sequences that have ended.

        Args:
            unfinished: (batch,) of 1 and 0.
            invalid: a flag, set where nothing can be drawn from the scores.
        """
        if self.sample:
            chosen = draw(torch.nn.functional.softmax(scores, dim=-1), invalid)
        else:
            chosen = torch.argmax(scores, dim=-1)
        if self.pad is not None:
            chosen = chosen * unfinished + self.pad * (1 - unfinished)
        return chosen

    def ended(self, tokens: Tensor) -> Tensor | None:
        """Which of the tokens (batch,) end their sequence."""
        return None if self.eos is None else (tokens[:, None] == self.eos[None, :]).any(-1)


INVALID = "probability tensor contains either `inf`, `nan` or element < 0"  # torch.multinomial's own words


def draw(probabilities: Tensor, invalid: Tensor) -> Tensor:
    """One token a row: ``torch.multinomial(probabilities, 1)`` without reading anything back.

    Args:
        probabilities: (batch, vocabulary).
        invalid: a flag on the device; set where ``multinomial`` would raise.
    """
    if not draws_like_multinomial(probabilities.device):
        return torch.multinomial(probabilities, num_samples=1).squeeze(1)
    legal = (probabilities.max() < float("inf")) & (probabilities.min() >= 0) & (probabilities.sum(-1) > 0).all()
    invalid.logical_or_(~legal)
    noise = torch.empty_like(probabilities).exponential_(1)
    return torch.argmax(probabilities / noise, dim=-1)


@functools.cache
def draws_like_multinomial(device: torch.device) -> bool:
    """Whether this torch draws as :func:`draw` does. Asked once a device, on random numbers that are put back."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        probabilities = torch.rand(4, 997, device=device).softmax(-1)
        torch.manual_seed(5)
        expected = torch.multinomial(probabilities, num_samples=1).squeeze(1)
        torch.manual_seed(5)
        got = torch.argmax(probabilities / torch.empty_like(probabilities).exponential_(1), dim=-1)
        return bool((expected == got).all())
