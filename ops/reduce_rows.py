"""``tpfuse::reduce_rows_add_rms_norm``: a sum of which each rank receives some rows, the residual of those rows, their norm.

The rows of ``x`` are ``blocks`` blocks of equal size, and so are the ranks of the group: the ranks at the first ``W / blocks``
places receive the first block, and so on. ``blocks = W`` is a reduce-scatter; with fewer, each block is the rows of one replica,
which all of its ranks receive. A replica may have fewer rows than a block holds, down to none: it keeps the first ones.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tpfuse import compat

from . import invariant, library, paths, reference, rows_schedule, settings
from .arguments import Operands, check, refuse_gradients
from .cuda import aligned
from .flavour import LLAMA, Flavour
from .op import library as registry
from .plane import Plane
from .prepare import PREPARED, Prepared, forget_the_gone, prepare
from .schedule import Launch

COLLECTIVES = ("reduce_scatter", "all_reduce")
NAME = "reduce_rows_add_rms_norm"
SCHEMA = (
    f"{NAME}(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float scale, str flavour, bool post_norm, "
    "str group_name, int blocks, str collective) -> (Tensor normed, Tensor residual_out)"
)
registry.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def _shape(x: Tensor, residual: Tensor | None, blocks: int) -> tuple[Any, ...]:
    """The shape of both results: that of the residual, or without one a block of ``x``."""
    if x.dim() < 2:
        raise ValueError(f"{NAME}: x has shape {tuple(x.shape)}; expected (rows, ..., H), the rows of all blocks")
    if residual is not None:
        return tuple(residual.shape)
    if x.shape[0] % blocks:
        raise ValueError(f"{NAME}: x has shape {tuple(x.shape)}, whose first dimension {blocks} blocks do not divide")
    return (x.shape[0] // blocks, *x.shape[1:])


def _count(shape: tuple[Any, ...]) -> Any:
    rows = 1
    for size in shape[:-1]:
        rows = rows * size
    return rows


def _defaults(group_name: str, blocks: int, collective: str) -> tuple[int, str]:
    """``blocks`` 0 is one a rank, no collective is the one that such blocks take."""
    world = compat.resolve_group(group_name).size()
    blocks = blocks or world
    return blocks, collective or ("reduce_scatter" if blocks == world else "all_reduce")


def _check_blocks(x: Tensor, shape: tuple[Any, ...], group_name: str, blocks: int, collective: str) -> None:
    world = compat.resolve_group(group_name).size()
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
        raise ValueError(f"{NAME}: residual has shape {shape}; expected rows of {x.shape[-1]} like x, {tuple(x.shape)}")


def _check_rows(x: Tensor, shape: tuple[int, ...], blocks: int) -> tuple[int, int]:
    """(rows of a block, rows that this rank keeps)."""
    rows, kept = _count(tuple(x.shape)), _count(shape)
    block = rows // blocks
    if rows % blocks:
        raise ValueError(f"{NAME}: x has {rows} rows, {tuple(x.shape)}, which {blocks} blocks do not divide")
    if kept > block:
        raise ValueError(
            f"{NAME}: residual has {kept} rows, but a block of x has {block}: x is {tuple(x.shape)}, in {blocks} blocks"
        )
    return block, kept


def _place(group_name: str, blocks: int) -> int:
    """The block that this rank receives."""
    group = compat.resolve_group(group_name)
    return group.rank() * blocks // group.size()


def received(x: Tensor, group_name: str, blocks: int, collective: str, kept: int) -> Tensor:
    """``(kept, H)``: the rows of the sum over the group that this rank keeps, by the group's own collective."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if collective == "reduce_scatter":
        reduced = torch.ops._c10d_functional.reduce_scatter_tensor(flat, "sum", blocks, group_name)
        return torch.ops._c10d_functional.wait_tensor(reduced)[:kept]
    start = _place(group_name, blocks) * (flat.shape[0] // blocks)
    return library.all_reduce(flat, group_name)[start : start + kept]


def _cpu(
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
) -> tuple[Tensor, Tensor]:
    blocks, collective = _defaults(group_name, blocks, collective)
    shape = _shape(x, residual, blocks)
    _check_blocks(x, shape, group_name, blocks, collective)
    block, kept = _check_rows(x, shape, blocks)
    like = x.reshape(-1, x.shape[-1])[:kept].view(shape)
    given = Operands.of(like, residual, weight, bias, eps, scale, flavour, post_norm, group_name)
    if block == 0:  # on every rank of the group alike: all of them skip the collective
        reduced = x.new_empty(shape)
    elif settings.batch_invariant():
        invariant.agree(group_name)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        start = _place(group_name, blocks) * block
        reduced = invariant.sum_in_rank_order(flat, group_name)[start : start + kept].reshape(shape)
        if kept:
            return invariant.add_rms_norm(reduced, given)
    else:
        invariant.remember(group_name)
        reduced = received(x, group_name, blocks, collective, kept).reshape(shape)
    normed, residual_out = reference.add_rms_norm(reduced, *given.after_the_sum)
    return normed.contiguous(), residual_out.contiguous()


def _fake(
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
) -> tuple[Tensor, Tensor]:
    from .arguments import same_sizes

    blocks, collective = _defaults(group_name, blocks, collective)
    shape = _shape(x, residual, blocks)
    _check_blocks(x, shape, group_name, blocks, collective)
    given = Operands.of(
        x.new_empty(shape), residual, weight, bias, eps, scale, flavour, post_norm, group_name, same=same_sizes
    )
    normed = reference.output_dtype(x.dtype, None if weight is None else weight.dtype, given.flavour)
    residual_out = reference.residual_dtype(x.dtype, normed, post_norm)
    return x.new_empty(shape, dtype=normed), x.new_empty(shape, dtype=residual_out)


def _cuda(
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
) -> tuple[Tensor, Tensor]:
    refuse_gradients(x, residual, weight, bias)
    index = x.device.index
    if compat.current_device() != index:
        with torch.cuda.device(index):  # launches and the vote go to the current device
            return _cuda(x, residual, weight, bias, eps, scale, flavour, post_norm, group_name, blocks, collective)
    blocks, collective = _defaults(group_name, blocks, collective)
    shape = _shape(x, residual, blocks)
    _check_blocks(x, shape, group_name, blocks, collective)
    block, kept = _check_rows(x, shape, blocks)
    hidden = shape[-1]
    like = x.reshape(-1, hidden)[:kept].view(shape)
    key = (
        *(group_name, NAME, blocks, x.dtype, hidden, flavour, scale != 1.0, residual is None),
        *(None if weight is None else weight.dtype, 0 if bias is None else bias.dim(), len(shape), post_norm, index),
        paths.current_stream_class(),
    )
    prepared = PREPARED.get(key)
    if prepared is None or not paths.is_current(group_name, prepared.held):
        with paths.lock_of(group_name):
            forget_the_gone()
            load = partial(rows_schedule.load, blocks=blocks)
            prepared = prepare(key, like, residual, weight, bias, scale, flavour, post_norm, group_name, load)
    else:
        check(like, residual, weight, bias, prepared.flavour, post_norm)
    given = Operands(like, residual, weight, bias, eps, scale, prepared.flavour, post_norm, group_name)
    normed = x.new_empty(shape, dtype=prepared.normed_dtype)
    residual_out = x.new_empty(shape, dtype=prepared.residual_dtype)
    if block == 0:
        return normed, residual_out  # every rank of the group has empty blocks: nothing to exchange
    c, p = prepared.constants, prepared.path.plane
    if c is None:
        reduced = received(x, group_name, blocks, collective, kept).reshape(shape)
        found = reference.add_rms_norm(reduced, *given.after_the_sum)
        return found[0].contiguous(), found[1].contiguous()
    if p is not None and _launch(prepared, p, x, given, normed, residual_out, block, kept, blocks):
        return normed, residual_out
    if prepared.path.settings.batch_invariant:
        start = _place(group_name, blocks) * block
        reduced = invariant.sum_in_rank_order(x.reshape(-1, hidden).contiguous(), group_name)[start : start + kept]
    else:
        reduced = received(x, group_name, blocks, collective, kept)
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
