"""When decoding stops, seen from the host without waiting for the device.

The flag that every sequence has ended is copied to the host and read one step later, while the next step runs. What that step
added is dropped. All ranks of a tensor-parallel model act on the same step's flag, never on what happens to have arrived, so
they run the same number of steps.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from tpfuse import compat
from tpfuse.hf_buffers import Buffers
from tpfuse.hf_tokens import INVALID


class Watch:
    """What the host learns of the steps.

    Args:
        buffers: of the steps.
        eos: whether a sequence can end before ``max_length``.
        streamer: takes every token, or None.
        lag: steps between a step and the look at it; 0 waits for each.
    """

    def __init__(self, buffers: Buffers, eos: bool, streamer: Any, lag: int) -> None:
        self.buffers, self.eos, self.streamer = buffers, eos, streamer
        self.device, self.lag = buffers.tokens.device, lag
        pinned = self.device.type == "cuda"
        self._free = deque(
            (
                torch.zeros((), dtype=torch.bool, pin_memory=pinned),
                torch.zeros(buffers.batch, dtype=torch.long, pin_memory=pinned),
                torch.cuda.Event() if pinned else None,
            )
            for _ in range(self.lag + 1)
        )
        # Per step under way: its slot, and the generator's state after it.
        self._pending: deque[tuple[tuple[Any, Tensor, Any], Any]] = deque()

    @property
    def idle(self) -> bool:
        """Nobody asked for anything before the end."""
        return not self.eos and self.streamer is None

    def step(self, drawn: bool) -> bool:
        """After a step: whether the step ``lag`` steps ago ended the last sequence. ``drawn``: steps use random numbers."""
        if self.idle:
            return False
        slot = self._free.popleft()
        finished, tokens, event = slot
        if self.eos:
            finished.copy_(self.buffers.finished, non_blocking=True)
        if self.streamer is not None:
            tokens.copy_(self.buffers.tokens[:, 0], non_blocking=True)
        if event is not None:
            event.record()
        self._pending.append((slot, random_state(self.device) if drawn and self.lag else None))
        return len(self._pending) > self.lag and self._look()

    def _look(self) -> bool:
        (finished, tokens, event), state = self._pending.popleft()
        if event is not None:
            event.synchronize()
        if self.streamer is not None:
            self.streamer.put(tokens.clone())
        self._free.append((finished, tokens, event))
        ended = bool(finished) if self.eos else False
        if ended and state is not None and self._pending:
            set_random_state(self.device, state)  # the steps after it never drew
        return ended

    def finish(self, ended: bool) -> int:
        """At the end: show the streamer what it has not seen, and tell how many steps came after the last one that counts."""
        if ended:
            extra = len(self._pending)
            self._pending.clear()
        else:
            extra = 0
            while self._pending:
                if self._look():
                    extra = len(self._pending)
                    self._pending.clear()
        if bool(self.buffers.invalid):
            raise RuntimeError(INVALID)
        return extra


def random_state(device: torch.device) -> Any:
    """Where the device's default generator is. On a GPU a number that the host has; the device is not asked."""
    return compat.generator_offset(_generator(device)) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Any) -> None:
    if device.type == "cuda":
        compat.set_generator_offset(_generator(device), state)
    else:
        torch.set_rng_state(state)


def _generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
