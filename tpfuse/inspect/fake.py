"""A process group that exists only by name: one process plays one rank of a world of any size, without peers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


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
    # torch keeps its fake backend among its test helpers; importing the module registers it.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
