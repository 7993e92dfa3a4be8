"""Run a plan on integers: every rank of a stage in lockstep, next to the same model on one rank.

The arithmetic is modulo a prime, so sums over ranks are exact in any order and any mistake of rows, group or residual
changes the result. The model is small but has what matters: attention mixes the rows of a block, the norm is not linear,
each rank holds some of the units (heads, columns, experts), and a residual runs past every sublayer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tpfuse.parallel.config import ParallelConfig
from tpfuse.parallel.layout import Boundary, Op, Plan, Step, mlp_group

PRIME = 10_007
Values = list[int]  # one integer for each row


@dataclass
class _Rank:
    """What a rank holds between two steps."""

    y: Values
    residual: Values


def simulate(plan: Plan, blocks: Sequence[Sequence[int]]) -> list[Values]:
    """Execute the plan on every rank of the first stage.

    Args:
        plan: from :func:`tpfuse.parallel.plan`.
        blocks: the embedded rows of each of ``config.row_blocks`` blocks, in block order; any number of rows, also none.
    Returns:
        For each rank, the normed rows of its block at the exit.
    """
    config = plan.config
    block_of = [rank // config.attn_tp_size for rank in range(config.tp_size)]
    ranks = [_Rank([], list(blocks[block_of[rank]])) for rank in range(config.tp_size)]
    stage = _Stage(config, [len(block) for block in blocks], ranks)
    for number, boundary in enumerate(plan.boundaries):
        for step in boundary.steps:
            stage.run(step)
        if boundary.enters != "exit":
            stage.sublayer(boundary, number)
    return [rank.y for rank in ranks]


def unsharded(plan: Plan, block: Sequence[int]) -> Values:
    """The same stack on one rank, for the rows of one block."""
    residual = list(block)
    every = range(plan.config.tp_size)
    for number, boundary in enumerate(plan.boundaries):
        y = [_norm(value) for value in residual]
        if boundary.enters == "exit":
            return y
        y = _sublayer(boundary.enters, number, y, every, every, len(every))
        residual = [(a + b) % PRIME for a, b in zip(residual, y, strict=True)]
    raise AssertionError("a plan ends with its exit")


class _Stage:
    """The ranks of a stage and the steps they take together."""

    def __init__(self, config: ParallelConfig, counts: list[int], ranks: list[_Rank]):
        self.config = config
        self.counts = counts  # rows of each block
        self.largest = max(counts)
        self.ranks = ranks

    def run(self, step: Step) -> None:
        {
            Op.ALL_REDUCE: self._all_reduce,
            Op.REDUCE_SCATTER: self._reduce_scatter,
            Op.SLICE_ROWS: self._slice_rows,
            Op.GATHER_RESIDUAL: self._gather_residual,
            Op.SLICE_RESIDUAL: self._slice_residual,
            Op.ADD: self._add,
            Op.NORM: self._norm,
            Op.ALL_GATHER: self._all_gather,
            Op.GATHER_BLOCKS: self._gather_blocks,
        }[step.op](step.group)

    def sublayer(self, boundary: Boundary, number: int) -> None:
        """Every rank computes with the units it holds."""
        for index, rank in enumerate(self.ranks):
            if boundary.enters == "attention":
                units, experts = self._share("attn_tp", index), range(0)
            elif boundary.enters == "dense":
                units, experts = self._share(mlp_group(self.config, "dense"), index), range(0)
            else:
                units, experts = self._share("moe_tp", index), self._share("moe_ep", index)
            rank.y = _sublayer(boundary.enters, number, rank.y, units, experts, self.config.tp_size)

    def _share(self, group: str, rank: int) -> range:
        """The units of a rank: they are dealt out evenly, in order, over its group."""
        members = self.config.group_of(group, rank)
        each = self.config.tp_size // len(members)
        first = members.index(rank) * each
        return range(first, first + each)

    def _peers(self, group: str, rank: int) -> list[_Rank]:
        return [self.ranks[peer] for peer in self.config.group_of(group, rank)]

    def _each(self, new: Callable[[int], Values], where: str) -> None:
        """All ranks compute their new value from the old ones of all, then all change together."""
        values = [new(rank) for rank in range(len(self.ranks))]
        for rank, value in zip(self.ranks, values, strict=True):
            setattr(rank, where, value)

    def _all_reduce(self, group: str) -> None:
        self._each(lambda rank: _sum([peer.y for peer in self._peers(group, rank)]), "y")

    def _reduce_scatter(self, group: str) -> None:
        self._each(lambda rank: self._own_share(_sum([peer.y for peer in self._peers(group, rank)]), rank), "y")

    def _own_share(self, values: Values, rank: int) -> Values:
        size = self.config.attn_tp_size
        each = -(-len(values) // size)
        padded = values + [0] * (each * size - len(values))
        index = rank % size
        return padded[index * each : (index + 1) * each]

    def _slice_rows(self, group: str) -> None:
        self._each(lambda rank: self._own_block(self.ranks[rank].y, rank), "y")

    def _own_block(self, values: Values, rank: int) -> Values:
        block = rank // self.config.attn_tp_size
        start = block * self.largest
        return values[start : start + self.counts[block]]

    def _gather_residual(self, group: str) -> None:
        self._each(lambda rank: self._joined([peer.residual for peer in self._peers(group, rank)], rank), "residual")

    def _all_gather(self, group: str) -> None:
        self._each(lambda rank: self._joined([peer.y for peer in self._peers(group, rank)], rank), "y")

    def _joined(self, shares: list[Values], rank: int) -> Values:
        count = self.counts[rank // self.config.attn_tp_size]
        return [value for share in shares for value in share][:count]

    def _slice_residual(self, group: str) -> None:
        self._each(lambda rank: self._own_share(self.ranks[rank].residual, rank), "residual")

    def _gather_blocks(self, group: str) -> None:
        """Blocks are padded to the largest one; a second gather finds them padded already."""
        self._each(lambda rank: [v for peer in self._peers(group, rank) for v in self._padded(peer.y)], "y")

    def _padded(self, values: Values) -> Values:
        return values + [0] * (self.largest - len(values))

    def _add(self, group: str) -> None:
        self._each(lambda rank: _sum([self.ranks[rank].residual, self.ranks[rank].y]), "residual")

    def _norm(self, group: str) -> None:
        self._each(lambda rank: [_norm(value) for value in self.ranks[rank].residual], "y")


def _sum(values: list[Values]) -> Values:
    return [sum(row) % PRIME for row in zip(*values, strict=True)]


def _norm(value: int) -> int:
    return (value * value + 3 * value + 1) % PRIME


def _sublayer(kind: str, number: int, rows: Values, units: range, experts: range, num_experts: int) -> Values:
    """The part of a sublayer's output that comes from some of its units; all units together give the whole."""
    if kind == "attention":
        mixed, seen = [], 0
        for value in rows:  # causal: a row reads itself and the rows before it
            seen = (2 * seen + value) % PRIME
            mixed.append(seen)
        return [sum(_unit(number, unit, value) for unit in units) % PRIME for value in mixed]
    if kind == "dense":
        return [sum(_unit(number, unit, value) for unit in units) % PRIME for value in rows]
    # The router sends a row to two experts by its value; a rank computes only the experts it holds.
    return [
        sum(
            _unit(number + 31 * expert, unit, value)
            for expert in ((value + shift) % num_experts for shift in (0, 1))
            if expert in experts
            for unit in units
        )
        % PRIME
        for value in rows
    ]


def _unit(number: int, unit: int, value: int) -> int:
    inner = (value * (7 * number + unit + 2) + 1) % PRIME
    return inner * inner * (unit + 3 * number + 1)
