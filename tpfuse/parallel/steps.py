"""The steps of a boundary on tensors.

Functional collectives with the group's name as a constant: torch.compile captures them without a graph break, and between
a sum and its residual add there is nothing that moves rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cut_model import for_inference
from .groups import Groups
from .layout import Op, Step

c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class Batch:
    """Shape of this forward's rows.

    Attributes:
        batch: sequences of this rank's block.
        length: tokens of each.
        largest: rows of the largest block; equal to the own rows where blocks never meet.
    """

    batch: int
    length: int
    largest: int

    @property
    def rows(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True)
class BoundStep:
    """A step with this rank's group resolved.

    Attributes:
        op: what to do.
        group: torch's name of the group; empty for a local step.
        size: ranks of the group (for a slice: of ``attn_tp``).
        index: this rank's position in it (for ``slice_rows``: the number of its block).
        blocks_meet: of a sum, whether the norm behind it is gathered over blocks. One op may do all of that, which every rank
            calls, those of a block without rows too.
    """

    op: Op
    group: str
    size: int
    index: int
    blocks_meet: bool = False


def bind(step: Step, groups: Groups) -> BoundStep:
    """Resolve a step's group for this rank."""
    if step.op is Op.SLICE_ROWS:
        assert groups.rank is not None
        block = groups.rank % groups.config.tp_size // groups.config.attn_tp_size
        return BoundStep(step.op, "", groups.config.row_blocks, block)
    if step.op in (Op.ADD, Op.NORM):
        return BoundStep(step.op, "", 1, 0)
    # Shares of rows are always shares over attention TP.
    name = step.group or "attn_tp"
    return BoundStep(step.op, groups.name_of(name), len(groups.ranks_of(name)), groups.index_in(name))


def run(
    steps: tuple[BoundStep, ...],
    y: Tensor,
    residual: Tensor,
    batch: Batch,
    before_add: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Execute steps other than the norm.

    Args:
        steps: in order.
        y: output of the sublayer before: ``(batch, length, H)`` for the rows of a replica, else ``(1, rows, H)``.
        residual: ``(batch, length, H)``, or ``(1, share, H)`` where it is scattered.
        batch: shape of this forward.
        before_add: done to the sublayer's whole sum, row by row, right before it is added: a norm, a scale.
    Returns:
        ``(y, residual)``; after an ``ADD`` both are the new residual.
    """
    y = for_inference(y)
    for step in steps:
        if step.op is Op.ADD:
            residual = residual + (y if before_add is None else before_add(y))
            y = residual
        elif step.op is Op.ALL_REDUCE:
            # Kept for the compiler alone: eager ranks without rows have nothing to sum.
            needed = step.blocks_meet and batch.largest > 0 and torch.compiler.is_compiling()
            y = all_reduce(y, step.group, needed)
        elif step.op is Op.REDUCE_SCATTER:
            y = _reduce_scatter(y, step)
        elif step.op is Op.ALL_GATHER:
            y = _all_gather(y, step, batch)
        elif step.op is Op.GATHER_RESIDUAL:
            residual = _all_gather(residual, step, batch)
        elif step.op is Op.SLICE_RESIDUAL:
            residual = _own_share(residual, step)
        elif step.op is Op.GATHER_BLOCKS:
            y = _gather_blocks(y, step, batch)
        elif step.op is Op.SLICE_ROWS:
            y = _own_block(y, step, batch)
    return y, residual


def all_reduce(y: Tensor, group: str, without_rows: bool = False) -> Tensor:
    """The sum of y (batch, length, H) over a group, given by torch's name for it.

    ``without_rows`` keeps the collective where there are none; backends take empty tensors (NCCL does nothing then).
    """
    # Skipped only when there are no rows: then no rank of the group has any, since they hold the same blocks.
    if y.shape[0] * y.shape[1] == 0 and not without_rows:
        return y
    return c10d.wait_tensor(c10d.all_reduce(y.contiguous(), "sum", group))


def _reduce_scatter(y: Tensor, step: BoundStep) -> Tensor:
    y = _padded(y, step.size)
    if y.shape[1] == 0:
        return y
    share = c10d.reduce_scatter_tensor(y[0], "sum", step.size, step.group)
    return c10d.wait_tensor(share).unsqueeze(0)


def _own_share(x: Tensor, step: BoundStep) -> Tensor:
    x = _padded(x, step.size)
    share = x.shape[1] // step.size
    return x[:, step.index * share : (step.index + 1) * share]


def _padded(x: Tensor, size: int) -> Tensor:
    """``(1, rows, H)`` with rows filled up with zeros to a multiple of ``size``."""
    x = x.reshape(1, -1, x.shape[-1])
    return F.pad(x, (0, 0, 0, -x.shape[1] % size)).contiguous()


def _all_gather(x: Tensor, step: BoundStep, batch: Batch) -> Tensor:
    if batch.rows > 0:
        x = c10d.wait_tensor(c10d.all_gather_into_tensor(x[0].contiguous(), step.size, step.group))
    return x.reshape(-1, x.shape[-1])[: batch.rows].reshape(batch.batch, batch.length, x.shape[-1])


def _gather_blocks(y: Tensor, step: BoundStep, batch: Batch) -> Tensor:
    """``(1, blocks * largest, H)``: blocks with fewer rows are filled up with zeros."""
    y = y.reshape(batch.rows, y.shape[-1])
    if batch.largest == 0:
        return y.unsqueeze(0)
    y = F.pad(y, (0, 0, 0, batch.largest - batch.rows)).contiguous()
    return c10d.wait_tensor(c10d.all_gather_into_tensor(y, step.size, step.group)).unsqueeze(0)


def _own_block(y: Tensor, step: BoundStep, batch: Batch) -> Tensor:
    start = step.index * batch.largest
    return y[0, start : start + batch.rows].reshape(batch.batch, batch.length, y.shape[-1])
