"""``tpfuse::reduce_rows_add_layer_norm_gather``: :mod:`.gather_rows` with a LayerNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gather_rows, paths
from .layer_norm_flavour import LAYER_NORM, LayerNormFlavour
from .layer_norm_operands import LayerNormOperands
from .op import library as registry
from .rows_call import Rows

NAME = "reduce_rows_add_layer_norm_gather"
SCHEMA = (
    f"{NAME}(Tensor x, Tensor? residual, Tensor? weight, Tensor? norm_bias, Tensor? bias, Tensor? addend, float eps, "
    "float scale, str flavour, str group_name, str collective) -> (Tensor normed, Tensor residual_out)"
)
registry.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def _asked(*args: Any) -> Rows:
    *operands, collective = args
    return Rows.of(LayerNormOperands, NAME, *operands, 0, collective)


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    return gather_rows.on_a_cpu_gathered(_asked(*args))


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    return gather_rows.fake_gathered(_asked(*args))


def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return gather_rows.run(_asked(*args))


registry.impl(NAME, _cpu, "CPU")
registry.impl(NAME, _cuda, "CUDA")
torch.library.register_fake(f"tpfuse::{NAME}", _fake, lib=registry)


def reduce_rows_add_layer_norm_gather(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    scale: float = 1.0,
    flavour: LayerNormFlavour | str = LAYER_NORM,
    group: torch.distributed.ProcessGroup | str | None = None,
    collective: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum ``x`` over the ranks of ``group``, add and take the LayerNorm of the rows of this rank's block, and gather that of all.

    Args:
        x, group, collective: as in :func:`reduce_rows_add_rms_norm_gather`.
        residual, weight, norm_bias, eps, bias, addend, scale, flavour: as in :func:`reduce_rows_add_layer_norm`, of the rows that
            this rank keeps.
    Returns:
        ``(normed, residual_out)``: the normed rows of all ranks in the shape of ``x``, zeros in place of rows that a rank does
        not keep; and the residual sum of the rows that this rank keeps.
    Raises:
        ValueError: a shape, dtype or count does not fit; the message names the argument.
        RuntimeError: autograd would have to record the op.
    """
    name = paths.group_name_of(group)
    given = (x, residual, weight, norm_bias, bias, addend, eps, scale, str(flavour), name, collective or "")
    return torch.ops.tpfuse.reduce_rows_add_layer_norm_gather(*given)
