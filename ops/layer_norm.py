"""``tpfuse::all_reduce_add_layer_norm``: the op whose norm is a LayerNorm, from schema to the implementation on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import invariant, layer_norm_cuda, paths, settings
from .arguments import same_sizes
from .layer_norm_flavour import LAYER_NORM, LayerNormFlavour
from .layer_norm_operands import NAME, LayerNormOperands
from .library import exact_layer_norm
from .op import empty_results
from .op import library as registry

SCHEMA = (
    f"{NAME}(Tensor x, Tensor? residual, Tensor? weight, Tensor? norm_bias, Tensor? bias, Tensor? addend, float eps, "
    "float scale, str flavour, str group_name, bool partial_addend=False, Tensor? addend_bias=None, "
    "bool residual_first=False) -> (Tensor normed, Tensor residual_out)"
)
registry.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    given = LayerNormOperands.of(*args)
    if given.x.numel() == 0:
        # Every rank of the group has the same (zero) number of rows, so all of them skip the collective.
        return empty_results(given)
    if settings.batch_invariant():
        invariant.agree(given.group_name)
        return invariant.row_by_row(*given.reduced(invariant.sum_in_rank_order), given.reference)
    invariant.remember(given.group_name)
    return exact_layer_norm(given)


def _fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return empty_results(LayerNormOperands.of(*args, same=same_sizes, **kwargs))


registry.impl(NAME, _cpu, "CPU")
registry.impl(NAME, layer_norm_cuda.run, "CUDA")
torch.library.register_fake(f"tpfuse::{NAME}", _fake, lib=registry)


def all_reduce_add_layer_norm(
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
    partial_addend: bool = False,
    addend_bias: Tensor | None = None,
    residual_first: bool = False,
    group: torch.distributed.ProcessGroup | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum ``x`` over the ranks of ``group``, add the residual and take the LayerNorm, in one op.

    Args:
        x: ``(..., H)`` fp32, bf16, fp16 or fp64: this rank's partial sum. Every rank passes the same shape and dtype.
        residual: ``x``'s shape and dtype, or None for the variant without a residual. Beside fp32 ``x`` it may be bf16 or fp16:
            the sum is taken in fp32 and rounded once to that dtype, which everything behind it has.
        weight: ``(H,)``, or None exactly with a flavour whose gain is ``"none"``.
        norm_bias: ``(H,)``, added behind the weight, or None exactly with a flavour whose shift is ``"none"``.
        eps: added to the biased variance.
        bias: ``(H,)`` or ``x``'s shape, added to the sum before scale and residual, or None.
        addend: ``x``'s shape and dtype, added behind the bias, or None: the sum of the other of two parallel sublayers.
        scale: multiplied into the sum after both.
        partial_addend: the addend is this rank's partial sum as well: what is added is its sum over the ranks, rounded as that
            of ``x`` is. The same as ``addend=`` with its all-reduce, in the same kernel.
        addend_bias: with ``partial_addend``: ``(H,)``, added to that sum before it is added (a bias of the other sublayer).
        residual_first: with ``partial_addend``: ``h = (residual + (sum + bias)) + addend``, without a scale (Cohere).
        flavour: how mean and variance are taken and where the norm rounds; see :class:`tpfuse.ops.LayerNormFlavour`.
        group: a process group or its name; None is the default group.
    Returns:
        ``(layer_norm(h), h)`` where ``h = residual + scale * (sum + bias + addend)``.
    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
        RuntimeError: autograd would have to record the op, or no process group is initialized.
    """
    given = (x, residual, weight, norm_bias, bias, addend, eps, scale, str(flavour), paths.group_name_of(group))
    return torch.ops.tpfuse.all_reduce_add_layer_norm(*given, partial_addend, addend_bias, residual_first)
