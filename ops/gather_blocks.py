"""``tpfuse::all_reduce_add_rms_norm_gather``: replicas sum, add and norm their own rows, and every rank gets the norms of all.

Attention data parallelism in front of layers that read the rows of all replicas. The group's first ranks are the first replica,
its *block*, and so on. Three groups: all ranks, whose plane the kernel uses; the ranks of the own block, which sum; and the ranks
at the own place in each block, over which the library gathers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import compat

from . import gather_schedule, invariant, layer_norm_cuda, library, paths, settings
from .arguments import check_devices, check_residual, same_sizes
from .cuda import run
from .flavour import LLAMA, Flavour
from .gather_schedule import of_prepared
from .layer_norm_operands import LayerNormOperands
from .op import empty_results
from .op import library as registry
from .operands import Operands
from .row_counts import check_on_all_ranks
from .rows_call import Rows, gathered
from .rows_cuda import launch, norm_rows, prepared_of

NAME = "all_reduce_add_rms_norm_gather"
SCHEMA = (
    f"{NAME}(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float scale, str flavour, bool post_norm, "
    "str group_name, str block_group, str gather_group, SymInt largest) -> (Tensor normed, Tensor residual_out)"
)
registry.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def _asked(*args: Any) -> Blocks:
    return Blocks.of(Operands, NAME, *args)


class Blocks(NamedTuple):
    """A call, the names of the groups that sum and gather, and the rows of the largest block."""

    asked: Rows
    block_group: str
    gather_group: str
    largest: Any

    @classmethod
    def of(
        cls,
        kind: type[Operands] | type[LayerNormOperands],
        name: str,
        x: Tensor,
        residual: Tensor | None,
        *behind: Any,
    ) -> Blocks:
        """From what the dispatcher gives.

        Args:
            behind: the other operands, up to group_name; block_group, gather_group, largest.
        Raises:
            ValueError: names what does not fit.
        """
        *operands, group_name, block_group, gather_group, largest = behind
        group, ours, across = (
            dist.get_process_group_ranks(compat.resolve_group(n)) for n in (group_name, block_group, gather_group)
        )
        blocks, size, at = len(across), len(ours), group.index(dist.get_rank())
        if size < 2 or blocks < 2 or ours != group[at // size * size :][:size] or across != group[at % size :: size]:
            raise ValueError(
                f"{name}: block_group has ranks {ours} and gather_group {across}; expected blocks of at least 2 neighbors of "
                f"{group}, at least 2 of them, and the ranks at one place of each"
            )
        if x.dim() < 1:
            raise ValueError(f"{name}: x is a scalar; expected a tensor of shape (..., H)")
        check_residual(name, x, residual)
        check_devices(name, x, *(o for o in operands if isinstance(o, Tensor)))
        after_x = (residual, *operands, group_name)
        asked = Rows(x, after_x, blocks, "all_reduce", at // size, tuple(x.shape), name, kind)
        return cls(asked, block_group, gather_group, largest)


def _rows(asked: Rows, largest: int) -> int:
    """How many rows this rank's block has."""
    rows = asked.x.shape[:-1].numel()
    if rows > largest:
        raise ValueError(
            f"{asked.name}: x has {rows} rows, {tuple(asked.x.shape)}, but largest is {largest}; pass the rows of the largest "
            "block"
        )
    return rows


def _summed(asked: Rows, block_group: str, batch_invariant: bool) -> Tensor:
    x = asked.x.contiguous()
    if not x.numel():
        return x  # on every rank of the block alike
    return invariant.sum_in_rank_order(x, block_group) if batch_invariant else library.all_reduce(x, block_group)


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    return on_a_cpu(*_asked(*args))


def on_a_cpu(asked: Rows, block_group: str, gather_group: str, largest: int) -> tuple[Tensor, Tensor]:
    """A call on a CPU."""
    # One rank of each block compares with the others, so all of them do: ranks of a block pass the same shape.
    check_on_all_ranks(asked.name, "x", asked.x.shape[:-1].numel(), "largest is", largest, gather_group)
    given = asked.kind.of(asked.x, *asked.after_x)
    in_rank_order = settings.batch_invariant()
    if asked.x.numel():
        (invariant.agree if in_rank_order else invariant.remember)(block_group)
    reduced = _summed(asked, block_group, in_rank_order)
    if in_rank_order and reduced.numel():
        normed, residual_out = invariant.row_by_row(reduced, given, given.reference)
    else:
        normed, residual_out = given.reference(reduced, *given.after_the_sum)
    return gathered(normed, largest, asked.blocks, gather_group), residual_out.clone(
        memory_format=torch.contiguous_format
    )


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    return fake_of(*_asked(*args))


def fake_of(asked: Rows, block_group: str, gather_group: str, largest: Any) -> tuple[Tensor, Tensor]:
    """What :func:`on_a_cpu` returns, without values; sizes may be symbols."""
    normed, residual_out = empty_results(asked.kind.of(asked.x, *asked.after_x, same=same_sizes))
    return normed.new_empty((asked.blocks * largest, asked.x.shape[-1])), residual_out


def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return on_cuda(*_asked(*args))


def on_cuda(asked: Rows, block_group: str, gather_group: str, largest: int) -> tuple[Tensor, Tensor]:
    """A call on a CUDA device."""
    asked.refuse_gradients()
    x = asked.x
    index = x.device.index
    if compat.current_device() != index:
        with torch.cuda.device(index):  # launches and the vote go to the current device
            return on_cuda(asked, block_group, gather_group, largest)
    rows = _rows(asked, largest)
    prepared, given = prepared_of(asked, x, partial(gather_schedule.load, blocks=asked.blocks))
    c, p, hidden = prepared.constants, prepared.path.plane, x.shape[-1]
    residual_out = x.new_empty(x.shape, dtype=prepared.residual_dtype)
    if largest == 0:  # on every rank of the group: nothing to exchange
        return x.new_empty((0, hidden), dtype=prepared.normed_dtype), residual_out
    if c is not None and p is not None:
        normed = x.new_empty((asked.blocks * largest, hidden), dtype=prepared.normed_dtype)
        schedule_of = partial(of_prepared, asked.blocks)
        if launch(prepared, p, x, given, (normed, residual_out), largest, rows, schedule_of, gathers=True):
            return normed, residual_out
    if c is not None and paths.may_be_asked(block_group, x.device):
        # Too many rows for a kernel that gathers, but among the ranks of the block there may be one that does the rest.
        of_the_block: Callable[..., tuple[Tensor, Tensor]] = run if asked.kind is Operands else layer_norm_cuda.run
        normed, residual_out = of_the_block(x, *asked.after_x[:-1], block_group)
        return gathered(normed, largest, asked.blocks, gather_group), residual_out
    reduced = _summed(asked, block_group, prepared.path.settings.batch_invariant)
    if c is None:
        normed, residual_out = given.reference(reduced, *given.after_the_sum)
    else:
        normed = x.new_empty((rows, hidden), dtype=prepared.normed_dtype)
        if rows:
            norm_rows(reduced, given, (normed, residual_out), c)
    return gathered(normed, largest, asked.blocks, gather_group), residual_out.contiguous()


registry.impl(NAME, _cpu, "CPU")
registry.impl(NAME, _cuda, "CUDA")
torch.library.register_fake(f"tpfuse::{NAME}", _fake, lib=registry)


def all_reduce_add_rms_norm_gather(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    largest: int,
    group: dist.ProcessGroup | str,
    block_group: dist.ProcessGroup | str,
    gather_group: dist.ProcessGroup | str,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    scale: float = 1.0,
    flavour: Flavour | str = LLAMA,
    post_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum ``x`` over the ranks of this rank's block, add and normalize, and gather the normed rows of all blocks.

    Every rank of ``group`` makes the call, those of a block without rows too.

    Args:
        x: ``(..., H)`` fp32, bf16, fp16 or fp64: this rank's partial sum of the rows of its block, at most ``largest``. The ranks
            of a block pass the same shape; blocks may have different numbers of rows, none too.
        residual, weight, bias, eps, scale, flavour, post_norm: as in :func:`all_reduce_add_rms_norm`, but the residual is of the
            dtype of ``x``, and the scale a number.
        largest: rows of the largest block, the same on every rank of ``group``.
        group: all ranks, block by block.
        block_group: those of this rank's block, at least 2 neighbors in ``group``.
        gather_group: the ranks at this rank's place in each block.
    Returns:
        ``(normed, residual_out)``: ``(blocks * largest, H)``, the normed rows of all blocks, each filled up with rows of zeros;
        and the residual sum in the shape of ``x``.
    Raises:
        ValueError: a shape, dtype or group does not fit; the message names the argument. On a CPU a block with more rows than
            ``largest`` is an error on every rank, on a GPU on its own ranks.
        RuntimeError: autograd would have to record the op.
    """
    names = [paths.group_name_of(g) for g in (group, block_group, gather_group)]
    given = (x, residual, weight, bias, eps, scale, str(flavour), post_norm, *names, largest)
    return torch.ops.tpfuse.all_reduce_add_rms_norm_gather(*given)
