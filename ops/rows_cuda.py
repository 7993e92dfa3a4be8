"""Calls whose rows have destinations on a CUDA device: what was prepared, the launches, and the way without kernels of ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tpfuse import compat

from . import library, paths
from .arguments import check
from .cuda import aligned
from .kernels.variant import Constants
from .layer_norm_operands import LayerNormOperands
from .operands import Operands
from .plane import Plane
from .prepare import PREPARED, LayerNormKind, Prepared, prepare_once
from .rows_call import Rows
from .schedule import Launch, Schedule


def prepared_of(asked: Rows, like: Tensor, load: Callable[..., None]) -> tuple[Prepared, Operands | LayerNormOperands]:
    """What was prepared for calls of this kind, and the operands behind the sum, checked.

    Args:
        like: see :meth:`Rows.like`.
        load: compiles and loads the kernels of such calls.
    """
    if asked.kind is LayerNormOperands:
        return _prepared_with_layer_norm(asked, like, load)
    x, name = asked.x, asked.group_name
    residual, weight, bias, eps, scale, flavour, post_norm, _ = asked.after_x
    key = (
        *(name, asked.name, asked.blocks, x.dtype, x.shape[-1], flavour, scale != 1.0, residual is None),
        *(None if weight is None else weight.dtype, 0 if bias is None else bias.dim(), like.dim(), post_norm),
        *(x.device.index, paths.current_stream_class()),
    )
    prepared = PREPARED.get(key)
    if prepared is None or not paths.is_current(name, prepared.held):
        prepared = prepare_once(key, like, residual, weight, bias, scale, flavour, post_norm, name, load)
    else:
        check(like, residual, weight, bias, prepared.flavour, post_norm)
    return prepared, Operands(like, residual, weight, bias, eps, scale, prepared.flavour, post_norm, name)


def _prepared_with_layer_norm(
    asked: Rows, like: Tensor, load: Callable[..., None]
) -> tuple[Prepared, LayerNormOperands]:
    """:func:`prepared_of` for the operands of a LayerNorm."""
    given = LayerNormOperands.of(like, *asked.after_x)
    weight, shift = (None if t is None else t.dtype for t in (given.weight, given.norm_bias))
    bias, name = given.bias, given.group_name
    key = (
        *(name, asked.name, asked.blocks, like.dtype, like.shape[-1], str(given.flavour), given.scale != 1.0),
        *(given.residual is None, weight, shift, 0 if bias is None else bias.dim(), given.addend is None, like.dim()),
        *(like.device.index, paths.current_stream_class()),
    )
    prepared = PREPARED.get(key)
    if prepared is None or not paths.is_current(name, prepared.held):
        kind = LayerNormKind(given.flavour, shift, given.addend is not None)
        scaling = str(given.flavour.scaling)
        prepared = prepare_once(
            key, like, given.residual, given.weight, bias, given.scale, scaling, False, name, load, kind
        )
    return prepared, given


def by_reference(asked: Rows, given: Operands | LayerNormOperands, block: int, kept: int) -> tuple[Tensor, Tensor]:
    """``(normed, residual_out)`` of the rows that this rank keeps, for calls that no kernel takes."""
    reduced = asked.summed(block, kept, False).reshape(asked.shape)
    normed, residual_out = given.reference(reduced, *given.after_the_sum)
    return normed.contiguous(), residual_out.contiguous()


def by_library(
    asked: Rows,
    prepared: Prepared,
    given: Operands | LayerNormOperands,
    outputs: tuple[Tensor, Tensor],
    block: int,
    kept: int,
) -> None:
    """The group's own collective, then add and norm in one kernel, into ``outputs``: normed and residual_out of the kept rows."""
    c = prepared.constants
    assert c is not None
    reduced = asked.summed(block, kept, prepared.path.settings.batch_invariant)
    if kept:
        norm_rows(reduced, given, outputs, c)


def norm_rows(
    reduced: Tensor, given: Operands | LayerNormOperands, outputs: tuple[Tensor, Tensor], c: Constants
) -> None:
    """Add and norm of rows that a library has summed, in one kernel, into ``outputs``: normed and residual_out."""
    operands = (aligned(given.residual), aligned(given.weight), aligned(given.bias))
    behind = tuple(aligned(t) for t in _behind(given))
    library.add_norm(aligned(reduced), *operands, *outputs, given.eps, given.scale, c, behind)  # type: ignore[arg-type]


def _behind(given: Operands | LayerNormOperands) -> tuple[Tensor | None, ...]:
    """What a kernel with a LayerNorm takes behind its outputs: what is added behind the weight, and the addend."""
    return (given.norm_bias, given.addend) if isinstance(given, LayerNormOperands) else ()


def launch(
    prepared: Prepared,
    p: Plane,
    x: Tensor,
    given: Operands | LayerNormOperands,
    outputs: tuple[Tensor, Tensor],
    block: int,
    kept: int,
    schedule_of: Callable[[Prepared, Plane, torch.dtype, int], Schedule],
    gathers: bool = False,
    schedules: dict[int, Schedule] | None = None,
) -> bool:
    """Start the kernels of a call; False where it takes the library path.

    Args:
        outputs: normed, ``(rows, H)``, and residual_out.
        schedule_of: what calls with so many rows of a block do.
        gathers: ``outputs[0]`` has the rows of all blocks.
        schedules: what was found so far; None is ``prepared.schedules``.
    """
    c = prepared.constants
    assert c is not None
    if p.seen[0]:
        p.raise_if_failed()
    schedules = prepared.schedules if schedules is None else schedules
    schedule = schedules.get(block)
    if schedule is None:
        schedule = schedules.setdefault(block, schedule_of(prepared, p, x.dtype, block))
    if not schedule.launches:
        return False
    stream = compat.current_stream_handle(x.device.index)
    if stream != p.streams.last:
        p.on_another_stream(stream)
    flat = aligned(x).view(-1, c.hidden)  # type: ignore[union-attr]
    weight, bias = aligned(given.weight), aligned(given.bias)
    full = bias if c.bias == "full" else None
    behind = tuple(aligned(t) for t in _behind(given))  # of a LayerNorm: a vector, and rows
    of_rows = (aligned(given.residual), full, outputs[1], *behind[1:])
    by_row = [None if t is None else t.view(kept, c.hidden) for t in of_rows]
    for part in schedule.launches:
        mine = slice(part.start, part.start + part.rows)
        # A rank that keeps nothing of a launch reads and writes none of these.
        residual, addend, h, *more = (None if t is None else t[mine] for t in by_row)
        out = outputs[0][part.start :] if gathers else outputs[0][mine]
        tensors = (flat[part.start :], residual, weight, bias if full is None else addend, out, h, *behind[:1], *more)
        _start(part, stream, p, prepared, tensors, max(0, min(part.rows, kept - part.start)), block, given)
    return True


def _start(
    launch: Launch,
    stream: int,
    p: Plane,
    prepared: Prepared,
    tensors: tuple[Tensor | None, ...],
    kept: int,
    block: int,
    given: Operands | LayerNormOperands,
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
