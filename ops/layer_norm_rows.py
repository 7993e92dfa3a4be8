"""``tpfuse::reduce_rows_add_layer_norm``: :mod:`.reduce_rows` with a LayerNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import paths, reduce_rows
from .layer_norm_flavour import LAYER_NORM, LayerNormFlavour
from .layer_norm_operands import LayerNormOperands
from .op import library as registry
from .rows_call import Rows, fake, on_a_cpu

NAME = "reduce_rows_add_layer_norm"
SCHEMA = (
    f"{NAME}(Tensor x, Tensor? residual, Tensor? weight, Tensor? norm_bias, Tensor? bias, Tensor? addend, float eps, "
    "float scale, str flavour, str group_name, int blocks, str collective) -> (Tensor normed, Tensor residual_out)"
)
registry.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    return on_a_cpu(Rows.of(LayerNormOperands, NAME, *args))


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    return fake(Rows.of(LayerNormOperands, NAME, *args))


def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return reduce_rows.run(Rows.of(LayerNormOperands, NAME, *args))


registry.impl(NAME, _cpu, "CPU")
registry.impl(NAME, _cuda, "CUDA")
torch.library.register_fake(f"tpfuse::{NAME}", _fake, lib=registry)


def reduce_rows_add_layer_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    blocks: int | None = None,
    eps: float = 1e-5,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    scale: float = 1.0,
    flavour: LayerNormFlavour | str = LAYER_NORM,
    group: torch.distributed.ProcessGroup | str | None = None,
    collective: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum ``x`` over the ranks of ``group``, keep the rows of this rank's block, add the residual and take the LayerNorm.

    Args:
        x, residual, blocks, group, collective: as in :func:`reduce_rows_add_rms_norm`.
        weight, norm_bias, eps, scale, flavour: as in :func:`all_reduce_add_layer_norm`.
        bias: ``(H,)`` or the shape of the results, added to the sum before scale and residual, or None.
        addend: the shape of the results, added behind the bias, or None.
    Returns:
        ``(layer_norm(h), h)`` of the rows that this rank keeps, where ``h = residual + scale * (sum + bias + addend)``.
    Raises:
        ValueError: a shape, dtype or count does not fit; the message names the argument.
        RuntimeError: autograd would have to record the op.
    """
    name = paths.group_name_of(group)
    given = (x, residual, weight, norm_bias, bias, addend, eps, scale, str(flavour), name)
    return torch.ops.tpfuse.reduce_rows_add_layer_norm(*given, blocks or 0, collective or "")
