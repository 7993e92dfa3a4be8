"""Process groups, their stores and torch's symmetric memory."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def resolve_group(name: Any) -> dist.ProcessGroup:
    """The process group that a functional collective's ``group_name`` argument stands for.

    Why private: the mapping from name to group has no public reader; the name is all that a graph holds.
    Raises whatever torch raises for an unknown name.
    """
    if isinstance(name, dist.ProcessGroup):
        return name
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


def group_reference(group: Any) -> Callable[[], Any]:
    """A function that returns the group while it exists, and does not keep it alive.

    Why private: torch holds the Python object of every group that it made in ``distributed_c10d._world`` until the group is
    destroyed, so a weak reference lives exactly as long. A group that was registered in another way may have no lasting Python
    object: it is held.
    """
    from torch.distributed.distributed_c10d import _world

    return weakref.ref(group) if group in _world.pg_map else lambda: group


def is_group(name: str, reference: Callable[[], Any]) -> bool:
    """Whether a name still stands for the group that :func:`group_reference` was given: torch gives names out again.

    Asked on every eager call: 0.2 us. Why private: as for :func:`resolve_group`.
    """
    try:
        return dist.distributed_c10d._resolve_process_group(name) is reference()  # type: ignore[arg-type]
    except RuntimeError:  # no group has this name any more
        return False


def group_store(group: dist.ProcessGroup) -> Any:
    """The store of one group. Why private: torch has a public reader for none of its stores."""
    from torch.distributed.distributed_c10d import _get_process_group_store

    return _get_process_group_store(group)


def known_groups() -> list[tuple[str, tuple[int, ...]]]:
    """(name, global ranks) of this process's groups in creation order; empty without a default group.

    Why private: torch keeps the list of groups in ``distributed_c10d._world``. Creation order is the same on every rank
    of a correct program, names are not.
    """
    if not dist.is_available() or not dist.is_initialized():
        return []
    from torch.distributed.distributed_c10d import _world

    groups = []
    for group in list(_world.pg_map):
        try:
            groups.append((str(group.group_name), tuple(dist.get_process_group_ranks(group))))
        except (RuntimeError, KeyError):  # a group that is being destroyed
            continue
    return groups


def forget_symmetric_memory(group_name: str) -> None:
    """Make torch's symmetric memory meet a group of this name anew.

    Why private: torch keeps the store of a group by its name, also when the group is gone, and gives the name to another group
    after a new ``init_process_group``; its rendezvous would then go through the store of the old one.
    """
    import torch.distributed._symmetric_memory as symm_mem

    for cache in ("_group_name_to_store", "_group_name_to_workspace_tensor"):
        getattr(symm_mem, cache, {}).pop(group_name, None)


def default_store() -> Any:
    """The key-value store over which the default group was made.

    Why private: ranks compare what they decided without a collective, and no public name reaches that store.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def rank() -> int:
    """This process's global rank; 0 without a default group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def start_fake_group(world_size: int, rank: int = 0) -> None:
    """A default process group whose collectives return at once and that has no peers.

    Why private: torch keeps its fake backend among its test helpers; importing the module registers it.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


def symmetric_memory_error() -> str | None:
    """Why torch's symmetric memory cannot be imported; None when it can. Why private: the module has no public name."""
    try:
        importlib.import_module("torch.distributed._symmetric_memory")
    except ImportError as error:
        return str(error)
    return None


def symmetric_memory() -> Any:
    """torch's symmetric memory. Why private: the module has no public name yet; what is used of it is documented."""
    return importlib.import_module("torch.distributed._symmetric_memory")
