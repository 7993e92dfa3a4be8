"""``tpfuse::reduce_rows_add_rms_norm_gather``: each rank sums, adds and norms the rows of its block; all ranks get all norms.

What sequence parallelism does between two matrix products: reduce-scatter, residual add, norm, all-gather. The rows of ``x``
are one block for each rank. A rank may keep fewer rows than a block holds, down to none: it keeps the first ones, and in
their place the norms of the others are zeros on every rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tpfuse import compat

from . import gather_schedule, paths, rows_schedule
from .flavour import LLAMA, Flavour
from .op import library as registry
from .operands import Operands
from .plane import Plane
from .prepare import Prepared
from .rows_call import Rows, fake, gathered, on_a_cpu
from .rows_cuda import by_library, by_reference, launch, prepared_of

NAME = "reduce_rows_add_rms_norm_gather"
SCHEMA = (
    f"{NAME}(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float scale, str flavour, bool post_norm, "
    "str group_name, str collective) -> (Tensor normed, Tensor residual_out)"
)
registry.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def _asked(*args: Any) -> Rows:
    *operands, collective = args
    return Rows.of(Operands, NAME, *operands, 0, collective)


def _gathered(asked: Rows, normed: Tensor, block: int) -> Tensor:
    """The norms of all ranks in the shape of ``x``, from those of the rows that this rank keeps."""
    return gathered(normed, block, asked.blocks, asked.group_name).view(asked.x.shape)


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    return on_a_cpu_gathered(_asked(*args))


def on_a_cpu_gathered(asked: Rows) -> tuple[Tensor, Tensor]:
    """A call on a CPU: the normed rows of all ranks in the shape of ``x``, and residual_out."""
    normed, residual_out = on_a_cpu(asked)
    return _gathered(asked, normed, asked.counts()[0]), residual_out


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    return fake_gathered(_asked(*args))


def fake_gathered(asked: Rows) -> tuple[Tensor, Tensor]:
    """What :func:`on_a_cpu_gathered` returns, without values; sizes may be symbols."""
    normed, residual_out = fake(asked)
    return normed.new_empty(asked.x.shape), residual_out


def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return run(_asked(*args))


def run(asked: Rows) -> tuple[Tensor, Tensor]:
    """A call on a CUDA device."""
    asked.refuse_gradients()
    x = asked.x
    index = x.device.index
    if compat.current_device() != index:
        with torch.cuda.device(index):  # launches and the vote go to the current device
            return run(asked)
    block, kept = asked.counts()
    prepared, given = prepared_of(asked, asked.like(kept), partial(_load, asked.blocks))
    c, p, dtype = prepared.constants, prepared.path.plane, prepared.normed_dtype
    if c is None:
        normed, residual_out = by_reference(asked, given, block, kept)
        return _gathered(asked, normed, block), residual_out
    residual_out = x.new_empty(asked.shape, dtype=prepared.residual_dtype)
    if block == 0:  # on every rank of the group: nothing to exchange
        return x.new_empty(x.shape, dtype=dtype), residual_out
    if p is not None:
        normed = x.new_empty(x.shape, dtype=dtype)
        outputs = normed.view(-1, c.hidden), residual_out
        if launch(
            prepared,
            p,
            x,
            given,
            outputs,
            block,
            kept,
            partial(gather_schedule.of_prepared, asked.blocks),
            gathers=True,
        ):
            return normed, residual_out
    own = x.new_empty((block, c.hidden), dtype=dtype)
    outputs = own[:kept], residual_out
    # Blocks that are too large for a kernel that gathers may still be small enough for one that does the rest.
    if p is None or not launch(
        *(prepared, p, x, given, outputs, block, kept, partial(rows_schedule.of_prepared, asked.blocks)),
        schedules=prepared.without_gather,
    ):
        by_library(asked, prepared, given, outputs, block, kept)
    own[kept:].zero_()
    return _gathered(asked, own, block), residual_out


def _load(blocks: int, prepared: Prepared, p: Plane, dtype: torch.dtype) -> None:
    gather_schedule.load(prepared, p, dtype, blocks)
    rows_schedule.load(prepared, p, dtype, blocks)


registry.impl(NAME, _cpu, "CPU")
registry.impl(NAME, _cuda, "CUDA")
torch.library.register_fake(f"tpfuse::{NAME}", _fake, lib=registry)


def reduce_rows_add_rms_norm_gather(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    scale: float = 1.0,
    flavour: Flavour | str = LLAMA,
    post_norm: bool = False,
    group: torch.distributed.ProcessGroup | str | None = None,
    collective: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum ``x`` over the ranks of ``group``, add and normalize the rows of this rank's block, and gather the normed rows of all.

    Args:
        x: ``(N, ..., H)`` fp32, bf16, fp16 or fp64: this rank's partial sum of the rows of all blocks, a block for each rank in
            the order of the group; the group's size divides ``N``. Every rank passes the same shape and dtype.
        residual, weight, bias, eps, scale, flavour, post_norm: as in :func:`reduce_rows_add_rms_norm`, of the rows that this rank
            keeps.
        group: a process group or its name; None is the default group.
        collective: what sums where no kernel does: ``"reduce_scatter"`` (the default) or ``"all_reduce"``.
    Returns:
        ``(normed, residual_out)``: the normed rows of all ranks in the shape of ``x``, zeros in place of rows that a rank does
        not keep; and the residual sum of the rows that this rank keeps.
    Raises:
        ValueError: a shape, dtype or count does not fit; the message names the argument.
        RuntimeError: autograd would have to record the op.
    """
    name = paths.group_name_of(group)
    given = (x, residual, weight, bias, eps, scale, str(flavour), post_norm, name, collective or "")
    return torch.ops.tpfuse.reduce_rows_add_rms_norm_gather(*given)
