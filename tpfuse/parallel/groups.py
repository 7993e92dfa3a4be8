"""The torch process groups of a config: created once, in one order on all ranks, one object for each rank list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from .config import GROUP_NAMES, ConfigError, ParallelConfig, check_config


@dataclass(frozen=True)
class Groups:
    """Process groups of this rank.

    Attributes:
        config: the sizes.
        ranks: global ranks of the deployment; ``ranks[i]`` plays rank ``i`` of the config.
        rank: this process's rank in the config, or None for a process outside the deployment.
        by_ranks: one process group for each distinct list of global ranks that this process is in, lists of one left out.
    """

    config: ParallelConfig
    ranks: tuple[int, ...]
    rank: int | None
    by_ranks: dict[tuple[int, ...], dist.ProcessGroup] = field(repr=False)

    def ranks_of(self, name: str) -> tuple[int, ...]:
        """Global ranks of this process's group of that name."""
        if self.rank is None:
            raise ConfigError(
                f"global rank {dist.get_rank()} is outside this deployment, which has the global ranks {list(self.ranks)}; "
                "it has no groups"
            )
        return tuple(self.ranks[rank] for rank in self.config.group_of(name, self.rank))

    def group(self, name: str) -> dist.ProcessGroup | None:
        """This process's group of that name; names with equal rank lists give one object. None for a group of one rank."""
        return self.by_ranks.get(self.ranks_of(name))

    def name_of(self, name: str) -> str:
        """torch's name for the group, as functional collectives take it; empty for a group of one rank."""
        group = self.group(name)
        return "" if group is None else group.group_name

    def index_in(self, name: str) -> int:
        """This process's position in its group of that name."""
        return self.ranks_of(name).index(dist.get_rank())


class _Created:
    """What was created under one default group. A new default group starts over."""

    def __init__(self, world: dist.ProcessGroup):
        self.world = world
        self.by_config: dict[tuple[ParallelConfig, tuple[int, ...]], Groups] = {}
        # Every list, also those this rank is not in: all ranks must decide alike whether to call new_group.
        self.by_ranks = {tuple(range(dist.get_world_size())): world}


_created: _Created | None = None


def build_groups(config: ParallelConfig, ranks: Sequence[int] | None = None) -> Groups:
    """Create the groups of a config. Collective: every rank of the default group calls it, with the same arguments.

    Args:
        config: the sizes.
        ranks: global ranks that form the deployment, in the order of the config's ranks; None means ``0..world_size-1``.
            The default group may have more ranks; those call too and get ``Groups.rank = None``.
    Returns:
        The groups of this rank. A second call with equal arguments returns the same object.
    Raises:
        TypeError: ``config`` is no :class:`ParallelConfig`.
        ConfigError: no default group, or ranks that do not fit the config or the default group.
    """
    check_config(config)
    if not dist.is_initialized():
        raise ConfigError("no default process group; call torch.distributed.init_process_group before build_groups")
    world = dist.group.WORLD
    assert world is not None
    members = tuple(range(config.world_size)) if ranks is None else tuple(ranks)
    _check_members(config, members)
    created = _created_under(world)
    key = (config, members)
    if key not in created.by_config:
        mine: dict[tuple[int, ...], dist.ProcessGroup] = {}
        # new_group is collective over the default group: every rank creates every list, in one order.
        for group_ranks in _distinct_lists(config, members):
            if group_ranks not in created.by_ranks:
                created.by_ranks[group_ranks] = dist.new_group(list(group_ranks))
            if dist.get_rank() in group_ranks:
                mine[group_ranks] = created.by_ranks[group_ranks]
        own = members.index(dist.get_rank()) if dist.get_rank() in members else None
        created.by_config[key] = Groups(config, members, own, mine)
    return created.by_config[key]


def small_tensor_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where a number that the ranks of a group exchange has to be: on the CPU where the group takes such tensors.

    A group that does not, NCCL's, may be named in several ways (``nccl``, ``cuda:nccl``). None is the default group.
    """
    if "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _created_under(world: dist.ProcessGroup) -> _Created:
    global _created  # noqa: PLW0603 - one default group a process, so one record
    if _created is None or _created.world is not world:
        _created = _Created(world)
    return _created


def _check_members(config: ParallelConfig, members: tuple[int, ...]) -> None:
    size = dist.get_world_size()
    if len(members) != config.world_size:
        raise ConfigError(
            f"{len(members)} ranks given for a config of {config.world_size} (tp_size={config.tp_size}, "
            f"pp_size={config.pp_size}); give one global rank for each"
        )
    if len(set(members)) != len(members) or not all(0 <= rank < size for rank in members):
        raise ConfigError(
            f"the deployment's global ranks {list(members)} must be distinct and below the default group's size {size}; "
            "start more processes, use smaller sizes or pass ranks="
        )


def _distinct_lists(config: ParallelConfig, members: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Global rank lists of all groups of more than one rank, each once, in the order of GROUP_NAMES."""
    lists = (tuple(members[r] for r in group) for name in GROUP_NAMES for group in config.groups(name))
    return list(dict.fromkeys(group for group in lists if len(group) > 1))
