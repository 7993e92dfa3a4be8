"""``tpfuse::reduce_rows_add_rms_norm``: a sum of which each rank receives some rows, the residual of those rows, their norm.

The rows of ``x`` are ``blocks`` blocks of equal size, and so are the ranks of the group: the ranks at the first ``W / blocks``
places receive the first block, and so on. ``blocks = W`` is a reduce-scatter; with fewer, each block is the rows of one replica,
which all of its ranks receive. A replica may have fewer rows than a block holds, down to none: it keeps the first ones.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tpfuse import compat

from . import invariant, library, paths, reference, rows_schedule, settings
from .arguments import Operands, check, check_one_dtype, refuse_gradients, same_sizes
from .cuda import aligned
from .flavour import LLAMA, Flavour
from .op import empty_results
from .op import library as registry
from .plane import Plane
from .prepare import PREPARED, Prepared, prepare_once
from .schedule import Launch

COLLECTIVES = ("reduce_scatter", "all_reduce")
NAME = "reduce_rows_add_rms_norm"
SCHEMA = (
    f"{NAME}(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float scale, str flavour, bool post_norm, "
    "str group_name, int blocks, str collective) -> (Tensor normed, Tensor residual_out)"
)
registry.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


class Rows(NamedTuple):
    """One call, its defaults filled in.

    Attributes:
        x: partial sums of the rows of all blocks.
        after_x: residual, weight, bias, eps, scale, flavour (as text), post_norm, group_name.
        blocks, collective: never 0 or empty.
        place: the block that this rank receives.
        shape: of both results.
    """

    x: Tensor
    after_x: tuple[Any, ...]
    blocks: int
    collective: str
    place: int
    shape: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        scale: float,
        flavour: str,
        post_norm: bool,
        group_name: str,
        blocks: int,
        collective: str,
    ) -> Rows:
        """From what the dispatcher gives; what does not need the number of rows is checked.

        Raises ``ValueError`` naming what does not fit.
        """
        check_one_dtype(NAME, x, residual)
        group = compat.resolve_group(group_name)
        world = group.size()
        blocks = blocks or world
        collective = collective or ("reduce_scatter" if blocks == world else "all_reduce")
        shape = _shape(x, residual, blocks)
        if blocks < 2 or world % blocks:
            raise ValueError(
                f"{NAME}: blocks is {blocks}; expected a divisor of the group's {world} ranks that is at least 2"
            )
        if collective not in COLLECTIVES or (collective == "reduce_scatter") > (blocks == world):
            raise ValueError(
                f"{NAME}: collective is {collective!r} with {blocks} blocks over {world} ranks; expected 'all_reduce', or "
                "'reduce_scatter' with as many blocks as ranks"
            )
        if shape[-1] != x.shape[-1]:
            raise ValueError(
                f"{NAME}: residual has shape {shape}; expected rows of {x.shape[-1]} like x, {tuple(x.shape)}"
            )
        after_x = (residual, weight, bias, eps, scale, flavour, post_norm, group_name)
        return cls(x, after_x, blocks, collective, group.rank() * blocks // world, shape)

    @property
    def group_name(self) -> str:
        return str(self.after_x[-1])

    def counts(self) -> tuple[int, int]:
        """(rows of a block, rows that this rank keeps). Raises ``ValueError`` where they do not fit."""
        rows, kept = (math.prod(shape[:-1]) for shape in (self.x.shape, self.shape))
        block = rows // self.blocks
        if rows % self.blocks:
            raise ValueError(
                f"{NAME}: x has {rows} rows, {tuple(self.x.shape)}, which {self.blocks} blocks do not divide"
            )
        if kept > block:
            raise ValueError(
                f"{NAME}: residual has {kept} rows, but a block of x has {block}: x is {tuple(self.x.shape)}, in "
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


def _shape(x: Tensor, residual: Tensor | None, blocks: int) -> tuple[Any, ...]:
    """The shape of both results: that of the residual, or without one a block of ``x``."""
    if x.dim() < 2:
        raise ValueError(f"{NAME}: x has shape {tuple(x.shape)}; expected (rows, ..., H), the rows of all blocks")
    if residual is not None:
        return tuple(residual.shape)
    if x.shape[0] % blocks:
        raise ValueError(f"{NAME}: x has shape {tuple(x.shape)}, whose first dimension {blocks} blocks do not divide")
    return (x.shape[0] // blocks, *x.shape[1:])


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    asked = Rows.of(*args)
    block, kept = asked.counts()
    given = Operands.of(asked.like(kept), *asked.after_x)
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
            return invariant.add_rms_norm(reduced, given)
    normed, residual_out = reference.add_rms_norm(reduced, *given.after_the_sum)
    return normed.contiguous(), residual_out.contiguous()


def _fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    asked = Rows.of(*args, **kwargs)
    given = Operands.of(asked.x.new_empty(asked.shape), *asked.after_x, same=same_sizes)
    return empty_results(given)


def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    x, residual, weight, bias, eps, scale, flavour, post_norm, group_name = args[:9]
    refuse_gradients(x, residual, weight, bias)
    index = x.device.index
    if compat.current_device() != index:
        with torch.cuda.device(index):  # launches and the vote go to the current device
            return _cuda(*args)
    asked = Rows.of(*args)
    block, kept = asked.counts()
    like = asked.like(kept)
    key = (
        *(group_name, NAME, asked.blocks, x.dtype, x.shape[-1], flavour, scale != 1.0, residual is None),
        *(None if weight is None else weight.dtype, 0 if bias is None else bias.dim(), like.dim(), post_norm, index),
        paths.current_stream_class(),
    )
    prepared = PREPARED.get(key)
    if prepared is None or not paths.is_current(group_name, prepared.held):
        load = partial(rows_schedule.load, blocks=asked.blocks)
        prepared = prepare_once(key, like, residual, weight, bias, scale, flavour, post_norm, group_name, load)
    else:
        check(like, residual, weight, bias, prepared.flavour, post_norm)
    given = Operands(like, residual, weight, bias, eps, scale, prepared.flavour, post_norm, group_name)
    normed = x.new_empty(asked.shape, dtype=prepared.normed_dtype)
    residual_out = x.new_empty(asked.shape, dtype=prepared.residual_dtype)
    if block == 0:
        return normed, residual_out  # every rank of the group has empty blocks: nothing to exchange
    c, p = prepared.constants, prepared.path.plane
    if c is None:
        reduced = asked.summed(block, kept, False).reshape(asked.shape)
        found = reference.add_rms_norm(reduced, *given.after_the_sum)
        return found[0].contiguous(), found[1].contiguous()
    if p is not None and _launch(prepared, p, x, given, normed, residual_out, block, kept, asked.blocks):
        return normed, residual_out
    reduced = asked.summed(block, kept, prepared.path.settings.batch_invariant)
    if kept:
        operands = (aligned(residual), aligned(weight), aligned(bias))
        library.add_norm(aligned(reduced), *operands, normed, residual_out, eps, scale, c)  # type: ignore[arg-type]
    return normed, residual_out


def _launch(
    prepared: Prepared,
    p: Plane,
    x: Tensor,
    given: Operands,
    normed: Tensor,
    residual_out: Tensor,
    block: int,
    kept: int,
    blocks: int,
) -> bool:
    """Start the kernels of a call; False where it takes the library path."""
    c = prepared.constants
    assert c is not None
    if p.seen[0]:
        p.raise_if_failed()
    schedule = prepared.schedules.get(block)
    if schedule is None:
        found = rows_schedule.schedule_of(p, prepared.path.settings, c, x.dtype, block, blocks)
        schedule = prepared.schedules.setdefault(block, found)
    if not schedule.launches:
        return False
    stream = compat.current_stream_handle(x.device.index)
    if stream != p.streams.last:
        p.on_another_stream(stream)
    flat = aligned(x).view(-1, c.hidden)  # type: ignore[union-attr]
    weight, bias = aligned(given.weight), aligned(given.bias)
    full = bias if c.bias == "full" else None
    by_row = [
        None if t is None else t.view(kept, c.hidden) for t in (aligned(given.residual), full, normed, residual_out)
    ]
    for launch in schedule.launches:
        mine = slice(launch.start, launch.start + launch.rows)
        # A rank that keeps nothing of a launch reads and writes none of these.
        residual, shift, out, h = (None if t is None else t[mine] for t in by_row)
        _start(launch, stream, p, prepared, (flat[launch.start :], residual, weight, bias if full is None else shift, out, h),
               max(0, min(launch.rows, kept - launch.start)), block, given)  # fmt: skip
    return True


def _start(
    launch: Launch,
    stream: int,
    p: Plane,
    prepared: Prepared,
    tensors: tuple[Tensor | None, ...],
    kept: int,
    block: int,
    given: Operands,
) -> None:
    x = tensors[0]
    # Triton wants pointers of the right dtype also for what this rank neither reads nor writes.
    named = [x if t is None else t for t in tensors]
    args = (
        *named,
        *(p.peers, p.state, p.rank, launch.rows, kept, block, p.phase_bytes, prepared.limit, given.eps, given.scale),
    )
    if not launch.kernel.ready:
        launch.kernel.compile(*args)
    launch.kernel(launch.programs, stream, *args)


registry.impl(NAME, _cpu, "CPU")
registry.impl(NAME, _cuda, "CUDA")
torch.library.register_fake(f"tpfuse::{NAME}", _fake, lib=registry)


def reduce_rows_add_rms_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    blocks: int | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    scale: float = 1.0,
    flavour: Flavour | str = LLAMA,
    post_norm: bool = False,
    group: torch.distributed.ProcessGroup | str | None = None,
    collective: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum ``x`` over the ranks of ``group``, keep the rows of this rank's block, add the residual and normalise.

    Args:
        x: ``(N, ..., H)`` fp32, bf16, fp16 or fp64: this rank's partial sum of the rows of all blocks, in the order of the
            blocks. Every rank passes the same shape and dtype.
        residual: ``(..., H)`` in ``x``'s dtype: the rows that this rank keeps, at most those of a block; ranks may keep different
            counts, none too. Without it each rank keeps its whole block, ``(N / blocks, ..., H)``.
        weight, eps, scale, flavour, post_norm: as in :func:`all_reduce_add_rms_norm`.
        blocks: a divisor of the group's size, at least 2, and of ``N``; None is one a rank: a reduce-scatter.
        bias: ``(H,)``, or the shape of the results.
        group: a process group or its name; None is the default group.
        collective: what sums where no kernel does: ``"reduce_scatter"`` (the default with a block a rank) or ``"all_reduce"``.
    Returns:
        ``(normed, residual_out)`` of the rows that this rank keeps; see :func:`all_reduce_add_rms_norm`.
    Raises:
        ValueError: a shape, dtype or count does not fit; the message names the argument.
        RuntimeError: autograd would have to record the op.
    """
    name = paths.group_name_of(group)
    given = (x, residual, weight, bias, eps, scale, str(flavour), post_norm, name, blocks or 0, collective or "")
    return torch.ops.tpfuse.reduce_rows_add_rms_norm(*given)
