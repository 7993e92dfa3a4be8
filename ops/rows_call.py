"""One call of an op whose rows have destinations: what was asked, checked, and what it gives on a CPU."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tpfuse import compat

from . import invariant, library, settings
from .arguments import check_devices, check_residual, refuse_gradients, same_sizes
from .layer_norm_operands import LayerNormOperands
from .op import empty_results
from .operands import Operands
from .row_counts import check_on_all_ranks

COLLECTIVES = ("reduce_scatter", "all_reduce")


class Rows(NamedTuple):
    """One call, its defaults filled in.

    Attributes:
        x: partial sums of the rows of all blocks.
        after_x: what ``kind`` has behind x, up to group_name: of an RMSNorm residual, weight, bias, eps, scale, flavour (as
            text), post_norm, group_name.
        blocks, collective: never 0 or empty.
        place: the block that this rank receives.
        shape: of both results.
        name: of the op, for messages.
        kind: the operands of its norm.
    """

    x: Tensor
    after_x: tuple[Any, ...]
    blocks: int
    collective: str
    place: int
    shape: tuple[Any, ...]
    name: str
    kind: type[Operands] | type[LayerNormOperands] = Operands

    @classmethod
    def of(
        cls,
        kind: type[Operands] | type[LayerNormOperands],
        name: str,
        x: Tensor,
        residual: Tensor | None,
        *behind: Any,
    ) -> Rows:
        """From what the dispatcher gives; what does not need the number of rows is checked.

        Args:
            behind: the other operands, up to group_name; blocks, collective.
        Raises:
            ValueError: names what does not fit.
        """
        *operands, group_name, blocks, collective = behind
        check_residual(name, x, residual)
        check_devices(name, x, *(o for o in operands if isinstance(o, Tensor)))
        group = compat.resolve_group(group_name)
        world = group.size()
        blocks = blocks or world
        collective = collective or ("reduce_scatter" if blocks == world else "all_reduce")
        shape = _shape(x, residual, blocks, name)
        if blocks < 2 or world % blocks:
            raise ValueError(
                f"{name}: blocks is {blocks}; expected a divisor of the group's {world} ranks that is at least 2"
            )
        if collective not in COLLECTIVES or (collective == "reduce_scatter") > (blocks == world):
            raise ValueError(
                f"{name}: collective is {collective!r} with {blocks} blocks over {world} ranks; expected 'all_reduce', or "
                "'reduce_scatter' with as many blocks as ranks"
            )
        if shape[-1] != x.shape[-1]:
            raise ValueError(
                f"{name}: residual has shape {shape}; expected rows of {x.shape[-1]} like x, {tuple(x.shape)}"
            )
        after_x = (residual, *operands, group_name)
        return cls(x, after_x, blocks, collective, group.rank() * blocks // world, shape, name, kind)

    @property
    def group_name(self) -> str:
        return str(self.after_x[-1])

    def refuse_gradients(self) -> None:
        """Raise ``RuntimeError`` where autograd would have to record the op."""
        if self.kind is Operands:  # a LayerNorm's are asked with its other checks
            refuse_gradients(self.x, *self.after_x[:3])

    @property
    def kept(self) -> int:
        """Rows that this rank keeps."""
        return math.prod(self.shape[:-1])

    def block(self) -> int:
        """Rows of a block. Raises ``ValueError`` where the rows of ``x``, the same on every rank, are no whole blocks."""
        rows = math.prod(self.x.shape[:-1])
        if rows % self.blocks:
            raise ValueError(
                f"{self.name}: x has {rows} rows, {tuple(self.x.shape)}, which {self.blocks} blocks do not divide"
            )
        return rows // self.blocks

    def counts_on_all_ranks(self) -> tuple[int, int]:
        """:meth:`counts`, and where one rank's own do not fit, no rank makes the call. Collective: on a CPU."""
        block = self.block()
        if block == 0:
            return self.counts()  # nobody communicates, so nobody would wait for a rank that raises
        # Without a residual a rank keeps its block, which fits; but other ranks may have one, and all of them compare.
        check_on_all_ranks(self.name, "residual", self.kept, "a block of x has", block, self.group_name)
        return block, self.kept

    def counts(self) -> tuple[int, int]:
        """(rows of a block, rows that this rank keeps). Raises ``ValueError`` where they do not fit."""
        block, kept = self.block(), self.kept
        if kept > block:
            raise ValueError(
                f"{self.name}: residual has {kept} rows, but a block of x has {block}: x is {tuple(self.x.shape)}, in "
                f"{self.blocks} blocks"
            )
        return block, kept

    def like(self, kept: int) -> Tensor:
        """A tensor of the dtype of ``x`` and the shape of the results: what the operands behind the sum must fit."""
        return self.x.reshape(-1, self.shape[-1])[:kept].view(self.shape)

    def summed(self, block: int, kept: int, batch_invariant: bool) -> Tensor:
        """``(kept, H)``: what this rank keeps of the sum, by the group's own collective or added up here in rank order."""
        flat = self.x.reshape(-1, self.shape[-1]).contiguous()
        if batch_invariant:
            whole = invariant.sum_in_rank_order(flat, self.group_name)
        elif self.collective == "reduce_scatter":
            share = torch.ops._c10d_functional.reduce_scatter_tensor(flat, "sum", self.blocks, self.group_name)
            return torch.ops._c10d_functional.wait_tensor(share)[:kept]
        else:
            whole = library.all_reduce(flat, self.group_name)
        return whole[self.place * block : self.place * block + kept]


def _shape(x: Tensor, residual: Tensor | None, blocks: int, name: str) -> tuple[Any, ...]:
    """The shape of both results: that of the residual, or without one a block of ``x``."""
    if x.dim() < 2:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}; expected (rows, ..., H), the rows of all blocks")
    if residual is not None:
        return tuple(residual.shape)
    if x.shape[0] % blocks:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}, whose first dimension {blocks} blocks do not divide")
    return (x.shape[0] // blocks, *x.shape[1:])


def on_a_cpu(asked: Rows) -> tuple[Tensor, Tensor]:
    """``(normed, residual_out)`` of the rows that this rank keeps, by the group's collective and the exact reference."""
    block, kept = asked.counts_on_all_ranks()
    given = asked.kind.of(asked.like(kept), *asked.after_x)
    in_rank_order = settings.batch_invariant()
    if block == 0:  # on every rank of the group alike: all of them skip the collective
        reduced = asked.x.new_empty(asked.shape)
    else:
        if in_rank_order:
            invariant.agree(asked.group_name)
        else:
            invariant.remember(asked.group_name)
        reduced = asked.summed(block, kept, in_rank_order).reshape(asked.shape)
        if in_rank_order and kept:
            return invariant.row_by_row(reduced, given, given.reference)
    normed, residual_out = given.reference(reduced, *given.after_the_sum)
    return normed.contiguous(), residual_out.contiguous()


def fake(asked: Rows) -> tuple[Tensor, Tensor]:
    """What :func:`on_a_cpu` returns, without values; sizes may be symbols."""
    return empty_results(asked.kind.of(asked.x.new_empty(asked.shape), *asked.after_x, same=same_sizes))


def gathered(normed: Tensor, rows: int, blocks: int, group_name: str) -> Tensor:
    """``(blocks * rows, H)``: the normed rows of every rank of a group, one a block, zeros where one has fewer than ``rows``."""
    flat = normed.reshape(-1, normed.shape[-1])
    if rows == 0:  # on every rank of the group
        return flat
    if len(flat) < rows:
        flat = torch.nn.functional.pad(flat, (0, 0, 0, rows - len(flat)))
    whole = torch.ops._c10d_functional.all_gather_into_tensor(flat.contiguous(), blocks, group_name)
    return torch.ops._c10d_functional.wait_tensor(whole)
