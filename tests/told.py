"""Tests of what tpfuse tells: a process that has been told nothing, and the warnings that a piece of code gives."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import graphs
import torch

import tpfuse
from tpfuse import unfused


def start_fresh(world_size: int) -> None:
    """No compiled graphs, no reports, nothing told so far, and a fake default group of so many ranks."""
    torch._dynamo.reset()
    tpfuse.clear_reports()
    unfused.forget()
    graphs.start_fake_group(world_size)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """The texts of tpfuse's warnings within, at its end."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in caught if issubclass(w.category, tpfuse.FusionWarning)]
