"""Where rows and residual lie in a stack of layers, and what each boundary between two sublayers must do.

A *block* is the rows (tokens) of one attention replica. Each rank's rows are, at any point, one of

    SCATTERED  its share of the block's rows: the block is split over ``attn_tp``
    REPLICA    all rows of its block
    FULL       the rows of all blocks of the stage

Attention always reads REPLICA. What the MLP reads decides the boundary; see :func:`plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from .config import ConfigError, ParallelConfig, check_config


class Rows(str, Enum):
    """Which rows a rank holds."""

    SCATTERED = "scattered"
    REPLICA = "replica"
    FULL = "full"

    def __str__(self) -> str:
        return self.value


class Op(str, Enum):
    """One action at a boundary; ``y`` is the output of the sublayer before it."""

    ALL_REDUCE = "all_reduce"  # y: sum over the group
    REDUCE_SCATTER = "reduce_scatter"  # y: sum over the group, of which each rank keeps its share of the rows
    SLICE_ROWS = "slice_rows"  # y: the rows of the own block out of all blocks; no communication
    GATHER_RESIDUAL = "gather_residual"  # residual: the shares of the group put together
    SLICE_RESIDUAL = "slice_residual"  # residual: the own share of the rows; no communication
    ADD = "add"  # residual + y, the new residual
    NORM = "norm"  # y: the norm of the residual
    ALL_GATHER = "all_gather"  # y: the shares of the group put together
    GATHER_BLOCKS = "gather_blocks"  # y: the blocks of the group put together

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Step:
    """An action and the name of the group it runs over; no group means that it is local."""

    op: Op
    group: str = ""

    def __str__(self) -> str:
        return f"{self.op}({self.group})" if self.group else str(self.op)


@dataclass(frozen=True)
class Reduction:
    """A sum that a boundary takes over several ranks: the report must show an all-reduce just like it.

    Attributes:
        layer: the layer whose sublayer is reduced.
        role: ``attention`` or ``mlp``.
        op: ``ALL_REDUCE`` or ``REDUCE_SCATTER``.
        group: name of the group.
        fuses: whether residual add and norm follow at once, so that one op can do all three.
    """

    layer: int
    role: str
    op: Op
    group: str
    fuses: bool


@dataclass(frozen=True)
class Boundary:
    """What lies between two sublayers.

    Attributes:
        layer: index of the layer that is entered, or the number of layers at the exit.
        leaves: the sublayer before: ``embedding | attention | dense | moe``.
        enters: the sublayer after: ``attention | dense | moe | exit``; the norm is that sublayer's own.
        y: rows of the sublayer's output before and of the next one's input after.
        residual: rows of the residual before and after.
        steps: in order; exactly one of them is the norm. An architecture without a norm there does nothing in its place; one that
            norms what a sublayer puts out does so at the add.
    """

    layer: int
    leaves: str
    enters: str
    y: tuple[Rows, Rows]
    residual: tuple[Rows, Rows]
    steps: tuple[Step, ...]

    @property
    def before_norm(self) -> tuple[Step, ...]:
        return self.steps[: self._norm]

    @property
    def after_norm(self) -> tuple[Step, ...]:
        return self.steps[self._norm + 1 :]

    @property
    def _norm(self) -> int:
        return self.steps.index(Step(Op.NORM))

    @property
    def reduction(self) -> Step | None:
        """The step that sums partial outputs, or None where the sublayer before leaves none."""
        return next((s for s in self.steps if s.op in (Op.ALL_REDUCE, Op.REDUCE_SCATTER)), None)

    @property
    def fuses(self) -> str:
        """``yes``, ``first part`` (the rows are gathered over two axes after the norm), ``no``, or ``-``: nothing is summed."""
        ops = [step.op for step in self.steps]
        start = next((n for n, op in enumerate(ops) if op in (Op.ALL_REDUCE, Op.REDUCE_SCATTER)), None)
        if start is None:
            return "-"
        between = ops[start + 1 : self._norm + 1]
        if between not in ([Op.ADD, Op.NORM], [Op.SLICE_ROWS, Op.ADD, Op.NORM]):
            return "no"
        # The op has one gather, over the counterparts of the ranks of its sum.
        gathered = [step.op for step in self.after_norm]
        return "yes" if gathered in ([], [Op.GATHER_BLOCKS]) else "first part"


@dataclass(frozen=True)
class Plan:
    """The boundaries of a stack of layers under a config: from the embedding to the final norm.

    Attributes:
        config: the sizes.
        layers: the kind of each layer's MLP, ``dense`` or ``moe``.
        boundaries: ``2 * len(layers) + 1`` of them; number ``2 * i`` enters the attention of layer ``i``, ``2 * i + 1`` its MLP.
    """

    config: ParallelConfig
    layers: tuple[str, ...]
    boundaries: tuple[Boundary, ...]

    @property
    def gathers_blocks(self) -> bool:
        """Whether some layer reads the rows of all blocks, so that all blocks must agree on how many rows there are."""
        return any(step.op is Op.GATHER_BLOCKS for b in self.boundaries for step in b.steps)

    def reductions(self) -> list[Reduction]:
        """Every sum over more than one rank, in order."""
        found = []
        for boundary in self.boundaries:
            step = boundary.reduction
            if step is not None:
                attention = boundary.leaves == "attention"
                layer = boundary.layer if attention else boundary.layer - 1
                role = "attention" if attention else "mlp"
                fuses = boundary.fuses in ("yes", "first part")
                found.append(Reduction(layer, role, step.op, step.group, fuses))
        return found

    def table(self, rank: int = 0) -> str:
        """The plan as text, with the rank lists as ``rank`` sees them."""
        rows = [("layer", "into", "rows", "residual", "steps", "fuses")]
        for b in self.boundaries:
            steps = " → ".join(self._step_text(step, rank) for step in b.steps)
            layer = "" if b.enters == "exit" else str(b.layer)
            rows.append((layer, b.enters, _moved(b.y), _moved(b.residual), steps, b.fuses))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def _step_text(self, step: Step, rank: int) -> str:
        if not step.group:
            return str(step.op)
        ranks = ",".join(map(str, self.config.group_of(step.group, rank)))
        return f"{step.op}({step.group} [{ranks}])"


def _moved(rows: tuple[Rows, Rows]) -> str:
    return str(rows[0]) if rows[0] == rows[1] else f"{rows[0]} → {rows[1]}"


def mlp_rows(config: ParallelConfig, kind: str) -> Rows:
    """Which rows the MLP of a ``dense`` or ``moe`` layer reads."""
    if kind == "moe" or config.dense_tp_size == config.tp_size:
        return Rows.FULL if config.row_blocks > 1 and config.tp_size > 1 else Rows.REPLICA
    if config.dense_tp_size == 1 and config.attn_tp_size > 1:
        return Rows.SCATTERED
    return Rows.REPLICA


def mlp_group(config: ParallelConfig, kind: str) -> str:
    """Name of the group that shares one MLP."""
    return "tp" if kind == "moe" else "dense_tp"


def plan(config: ParallelConfig, layers: Sequence[str]) -> Plan:
    """The boundaries for a stack of layers.

    Args:
        config: the sizes.
        layers: ``dense`` or ``moe`` for each layer.
    Raises:
        TypeError: ``config`` is no :class:`ParallelConfig`, or ``layers`` is one word and no list.
        ConfigError: an unknown kind of layer, or replicated experts (``moe_dp_size > 1``), for which no plan is known.
    """
    check_config(config)
    if isinstance(layers, str):
        raise TypeError(f"layers is {layers!r}; give the kind of each layer, e.g. [{layers!r}] * 32")
    for kind in layers:
        if kind not in ("dense", "moe"):
            raise ConfigError(f"unknown kind of layer {kind!r}; valid are 'dense' and 'moe'")
    if "moe" in layers and config.moe_dp_size > 1:
        raise ConfigError(
            f"moe_dp_size={config.moe_dp_size}: no plan is known for replicated experts; use moe_dp_size=1 and a larger "
            "ep_size, or build the groups alone"
        )
    boundaries = []
    residual = Rows.REPLICA
    before = "embedding"
    for layer, kind in enumerate(layers):
        boundaries.append(_into_attention(config, layer, before, residual))
        entered = _into_mlp(config, layer, kind, residual)
        boundaries.append(entered)
        residual, before = entered.residual[1], kind
    boundaries.append(_exit(config, len(layers), before, residual))
    return Plan(config, tuple(layers), tuple(boundaries))


def _into_attention(config: ParallelConfig, layer: int, before: str, residual: Rows) -> Boundary:
    """The residual stays where it is; attention's input is gathered after the norm if it is scattered."""
    rows, steps = _leave(config, before)
    steps += [Step(Op.NORM)]
    if residual is Rows.SCATTERED:
        steps += [Step(Op.ALL_GATHER, "attn_tp")]
    return Boundary(layer, before, "attention", (rows, Rows.REPLICA), (residual, residual), tuple(steps))


def _into_mlp(config: ParallelConfig, layer: int, kind: str, residual: Rows) -> Boundary:
    """Attention leaves partial sums of the block's rows on each rank of ``attn_tp``."""
    rows = mlp_rows(config, kind)
    steps: list[Step] = []
    if rows is Rows.SCATTERED:
        if residual is Rows.REPLICA:
            steps += [Step(Op.SLICE_RESIDUAL)]
        steps += [Step(Op.REDUCE_SCATTER, "attn_tp")]
        after = Rows.SCATTERED
    else:
        if residual is Rows.SCATTERED:
            # Adding a share to the whole block would broadcast or fail: the residual has to be put together first. It
            # comes before the sum, so that sum, add and norm stay next to each other.
            steps += [Step(Op.GATHER_RESIDUAL, "attn_tp")]
        if config.attn_tp_size > 1:
            steps += [Step(Op.ALL_REDUCE, "attn_tp")]
        after = Rows.REPLICA
    steps += [Step(Op.ADD), Step(Op.NORM)]
    if rows is Rows.FULL:
        # Context-parallel blocks are the inner axis, so this order gives all ranks the blocks in one order.
        sizes = (("attn_cp", config.attn_cp_size), ("attn_dp", config.attn_dp_size))
        steps += [Step(Op.GATHER_BLOCKS, name) for name, size in sizes if size > 1]
    return Boundary(layer, "attention", kind, (Rows.REPLICA, rows), (residual, after), tuple(steps))


def _exit(config: ParallelConfig, layer: int, before: str, residual: Rows) -> Boundary:
    """After the last layer each rank has all rows of its block, and the final norm reads them."""
    rows, steps = _leave(config, before)
    if residual is Rows.SCATTERED:
        steps += [Step(Op.GATHER_RESIDUAL, "attn_tp")]
    steps += [Step(Op.NORM)]
    return Boundary(layer, before, "exit", (rows, Rows.REPLICA), (residual, Rows.REPLICA), tuple(steps))


def _leave(config: ParallelConfig, before: str) -> tuple[Rows, list[Step]]:
    """Rows of the output of an MLP, and the steps that add it to the residual."""
    if before == "embedding":
        return Rows.REPLICA, []
    rows = mlp_rows(config, before)
    group = mlp_group(config, before)
    steps = []
    if len(config.group_of(group, 0)) > 1:
        steps += [Step(Op.ALL_REDUCE, group)]
    if rows is Rows.FULL:
        steps += [Step(Op.SLICE_ROWS)]
    return rows, [*steps, Step(Op.ADD)]
