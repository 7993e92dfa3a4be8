"""Sizes of a tensor-parallel deployment, and the rank lists of every group that follow from them.

This is the one place where ranks are computed. The axes, from the fastest-varying to the slowest:

    attention      rank = (dp_rank * attn_cp_size + cp_rank) * attn_tp_size + attn_tp_rank
    dense MLP      rank = block * dense_tp_size + dense_tp_rank
    experts        rank = (moe_dp_rank * ep_size + ep_rank) * moe_tp_size + moe_tp_rank

all of them inside one pipeline stage, whose ranks start at ``stage * tp_size``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

GROUP_NAMES = ("tp", "attn_tp", "attn_dp", "attn_cp", "dense_tp", "moe_tp", "moe_ep", "moe_dp", "pp")


class ConfigError(ValueError):
    """Sizes that do not fit together, or a group or rank that does not exist."""


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel axes of one deployment. All ranks build the same config.

    Args:
        tp_size: ranks of one pipeline stage; every other axis of the stage divides it.
        attn_dp_size: replicas of attention, each with rows (tokens) of its own.
        attn_cp_size: context-parallel ranks of one replica.
        moe_dense_tp_size: ranks that share one dense MLP: None or ``tp_size`` (all of the stage), ``attn_tp_size`` (the
            ranks that share attention) or 1 (every rank holds the whole MLP).
        ep_size: ranks (or groups of ``moe_tp_size`` ranks) that hold different experts.
        moe_dp_size: replicas of the experts.
        pp_size: pipeline stages.
    Raises:
        ConfigError: a size is not a positive integer or does not divide; the message lists what is valid.
    """

    tp_size: int
    attn_dp_size: int = 1
    attn_cp_size: int = 1
    moe_dense_tp_size: int | None = None
    ep_size: int = 1
    moe_dp_size: int = 1
    pp_size: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "moe_dense_tp_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{field.name}={value!r} is not a size; give an integer of at least 1")
        if self.tp_size % (self.attn_dp_size * self.attn_cp_size):
            raise ConfigError(
                f"attn_dp_size * attn_cp_size = {self.attn_dp_size} * {self.attn_cp_size} does not divide "
                f"tp_size={self.tp_size}; the replicas of attention split the ranks of a stage evenly"
            )
        if self.tp_size % (self.ep_size * self.moe_dp_size):
            raise ConfigError(
                f"ep_size * moe_dp_size = {self.ep_size} * {self.moe_dp_size} does not divide tp_size={self.tp_size}; "
                "the experts split the ranks of a stage evenly"
            )
        if self.moe_dense_tp_size not in (None, 1, self.attn_tp_size, self.tp_size):
            raise ConfigError(self._dense_error())

    def _dense_error(self) -> str:
        k = self.moe_dense_tp_size
        why = ""
        if self.attn_cp_size > 1 and k == self.tp_size // self.attn_dp_size:
            why = (
                f" ({k} is tp_size / attn_dp_size, but attn_cp_size={self.attn_cp_size} splits those ranks further, so "
                "attention does not reduce over them)"
            )
        valid = {
            "None": "the same as tp_size",
            "1": "every rank holds the whole dense MLP",
            str(self.attn_tp_size): "attn_tp_size: shared with attention",
            str(self.tp_size): "tp_size: all ranks of the stage",
        }
        return (
            f"moe_dense_tp_size={k} is not possible with attn_tp_size={self.attn_tp_size} and tp_size={self.tp_size}{why}; "
            f"valid are {', '.join(f'{size} ({meaning})' for size, meaning in valid.items())}"
        )

    @property
    def attn_tp_size(self) -> int:
        """Ranks that share the heads of one attention."""
        return self.tp_size // (self.attn_dp_size * self.attn_cp_size)

    @property
    def dense_tp_size(self) -> int:
        """Ranks that share one dense MLP; ``tp_size`` where ``moe_dense_tp_size`` is None."""
        return self.tp_size if self.moe_dense_tp_size is None else self.moe_dense_tp_size

    @property
    def moe_tp_size(self) -> int:
        """Ranks that share one expert."""
        return self.tp_size // (self.ep_size * self.moe_dp_size)

    @property
    def row_blocks(self) -> int:
        """Blocks of rows in a stage: one for each attention DP replica, split further by context parallelism."""
        return self.attn_dp_size * self.attn_cp_size

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    def groups(self, name: str) -> list[list[int]]:
        """Rank lists of all groups of that name, ascending by their first rank; together they hold every rank once.

        Raises:
            ConfigError: the name is none of ``GROUP_NAMES``.
        """
        if name not in GROUP_NAMES:
            raise ConfigError(f"unknown group {name!r}; valid names are {', '.join(GROUP_NAMES)}")
        if name == "pp":
            return _strided(0, self.world_size, self.tp_size, self.pp_size)
        size, stride = {
            "tp": (self.tp_size, 1),
            "attn_tp": (self.attn_tp_size, 1),
            "attn_cp": (self.attn_cp_size, self.attn_tp_size),
            "attn_dp": (self.attn_dp_size, self.attn_tp_size * self.attn_cp_size),
            "dense_tp": (self.dense_tp_size, 1),
            "moe_tp": (self.moe_tp_size, 1),
            "moe_ep": (self.ep_size, self.moe_tp_size),
            "moe_dp": (self.moe_dp_size, self.moe_tp_size * self.ep_size),
        }[name]
        stages = (stage * self.tp_size for stage in range(self.pp_size))
        return [group for start in stages for group in _strided(start, self.tp_size, stride, size)]

    def group_of(self, name: str, rank: int) -> list[int]:
        """The rank list of the group of that name that ``rank`` is in.

        Raises:
            ConfigError: unknown name, or a rank outside ``range(world_size)``.
        """
        for group in self.groups(name):
            if rank in group:
                return group
        raise ConfigError(f"rank {rank} does not exist; this config has ranks 0 to {self.world_size - 1}")

    @property
    def dense_shares_attention(self) -> bool:
        """Whether dense MLP and attention reduce over the same ranks, more than one. Decided by the rank lists."""
        return self.attn_tp_size > 1 and self.groups("dense_tp") == self.groups("attn_tp")

    def requires_attn_tp_gather(self, moe_a2a: bool) -> bool:
        """Whether an engine must be ready to gather attention's input over ``attn_tp``, because rows may arrive scattered.

        Args:
            moe_a2a: the experts exchange tokens with an all-to-all.
        """
        if not moe_a2a and self.moe_dense_tp_size is None:
            return False
        return self.attn_dp_size == 1 or self.attn_tp_size > 1


def check_config(config: object) -> None:
    """Raises ``TypeError`` for what is no :class:`ParallelConfig`, such as the number of ranks."""
    if not isinstance(config, ParallelConfig):
        raise TypeError(
            f"the config is {config!r}, of type {type(config).__name__}; give a tpfuse.parallel.ParallelConfig, e.g. "
            "ParallelConfig(tp_size=2)"
        )


def _strided(start: int, count: int, stride: int, size: int) -> list[list[int]]:
    """Split ``range(start, start + count)`` into lists of ``size`` ranks that are ``stride`` apart."""
    firsts = (rank for rank in range(count) if rank // stride % size == 0)
    return [[start + first + i * stride for i in range(size)] for first in firsts]
