"""``tpfuse::all_reduce_add_layer_norm_gather``: :mod:`.gather_blocks` with a LayerNorm."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import gather_blocks, paths
from .layer_norm_flavour import LAYER_NORM, LayerNormFlavour
from .layer_norm_operands import LayerNormOperands
from .op import library as registry

NAME = "all_reduce_add_layer_norm_gather"
SCHEMA = (
    f"{NAME}(Tensor x, Tensor? residual, Tensor? weight, Tensor? norm_bias, Tensor? bias, Tensor? addend, float eps, "
    "float scale, str flavour, str group_name, str block_group, str gather_group, SymInt largest) "
    "-> (Tensor normed, Tensor residual_out)"
)
registry.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def _asked(*args: Any) -> gather_blocks.Blocks:
    return gather_blocks.Blocks.of(LayerNormOperands, NAME, *args)


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    return gather_blocks.on_a_cpu(*_asked(*args))


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    return gather_blocks.fake_of(*_asked(*args))


def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return gather_blocks.on_cuda(*_asked(*args))


registry.impl(NAME, _cpu, "CPU")
registry.impl(NAME, _cuda, "CUDA")
torch.library.register_fake(f"tpfuse::{NAME}", _fake, lib=registry)


def all_reduce_add_layer_norm_gather(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    largest: int,
    group: dist.ProcessGroup | str,
    block_group: dist.ProcessGroup | str,
    gather_group: dist.ProcessGroup | str,
    eps: float = 1e-5,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    scale: float = 1.0,
    flavour: LayerNormFlavour | str = LAYER_NORM,
) -> tuple[Tensor, Tensor]:
    """Sum ``x`` over the ranks of this rank's block, add and take the LayerNorm, and gather the normed rows of all blocks.

    Every rank of ``group`` makes the call, those of a block without rows too.

    Args:
        x, largest, group, block_group, gather_group: as in :func:`all_reduce_add_rms_norm_gather`.
        residual, weight, norm_bias, eps, bias, addend, scale, flavour: as in :func:`all_reduce_add_layer_norm`, but the residual
            is of the dtype of ``x``, and the addend is summed already.
    Returns:
        ``(normed, residual_out)``: ``(blocks * largest, H)``, the normed rows of all blocks, each filled up with rows of zeros;
        and the residual sum in the shape of ``x``.
    Raises:
        ValueError: a shape, dtype or group does not fit; the message names the argument.
        RuntimeError: autograd would have to record the op.
    """
    names = [paths.group_name_of(g) for g in (group, block_group, gather_group)]
    given = (x, residual, weight, norm_bias, bias, addend, eps, scale, str(flavour), *names, largest)
    return torch.ops.tpfuse.all_reduce_add_layer_norm_gather(*given)
