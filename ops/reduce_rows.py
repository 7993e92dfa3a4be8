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

from . import paths, rows_schedule
from .flavour import LLAMA, Flavour
from .op import library as registry
from .operands import Operands
from .rows_call import Rows, fake, on_a_cpu
from .rows_cuda import by_library, by_reference, launch, prepared_of

NAME = "reduce_rows_add_rms_norm"
SCHEMA = (
    f"{NAME}(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float scale, str flavour, bool post_norm, "
    "str group_name, int blocks, str collective) -> (Tensor normed, Tensor residual_out)"
)
registry.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    return on_a_cpu(Rows.of(Operands, NAME, *args))


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    return fake(Rows.of(Operands, NAME, *args))


def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return run(Rows.of(Operands, NAME, *args))


def run(asked: Rows) -> tuple[Tensor, Tensor]:
    """A call on a CUDA device."""
    asked.refuse_gradients()
    x = asked.x
    index = x.device.index
    if compat.current_device() != index:
        with torch.cuda.device(index):  # launches and the vote go to the current device
            return run(asked)
    block, kept = asked.counts()
    prepared, given = prepared_of(asked, asked.like(kept), partial(rows_schedule.load, blocks=asked.blocks))
    normed = x.new_empty(asked.shape, dtype=prepared.normed_dtype)
    residual_out = x.new_empty(asked.shape, dtype=prepared.residual_dtype)
    if block == 0:
        return normed, residual_out  # every rank of the group has empty blocks: nothing to exchange
    c, p = prepared.constants, prepared.path.plane
    if c is None:
        return by_reference(asked, given, block, kept)
    outputs = normed.view(kept, c.hidden), residual_out
    schedule_of = partial(rows_schedule.of_prepared, asked.blocks)
    if p is not None and launch(prepared, p, x, given, outputs, block, kept, schedule_of):
        return normed, residual_out
    by_library(asked, prepared, given, outputs, block, kept)
    return normed, residual_out


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
    """Sum ``x`` over the ranks of ``group``, keep the rows of this rank's block, add the residual and normalize.

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
