"""A process group that exists only by name: one process plays one rank of a world of any size, without peers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from tpfuse import compat


class WorldError(RuntimeError):
    """The process has a process group already."""


@contextmanager
def fake_world(world_size: int, rank: int = 0) -> Iterator[None]:
    """Play one rank: groups have their real rank lists, and every collective returns at once.

    Raises:
        WorldError: a default group exists already; it would be replaced.
    """
    if dist.is_initialized():
        raise WorldError("this process has a process group already; run this in a process of its own")
    compat.start_fake_group(world_size, rank)
    try:
        yield
    finally:
        dist.destroy_process_group()
