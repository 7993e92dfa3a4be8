"""Schema, checks, fake and CPU implementation of ``tpfuse::all_reduce_add_rms_norm``.

The op is functional: it never writes its inputs and never returns one of them. The choice of algorithm happens inside
it, so a compiled graph is the same whatever path the group takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda, invariant, reference, settings
from .arguments import check, refuse_gradients, same_sizes
from .flavour import LLAMA, Flavour
from .library import exact

SCHEMA = (
    "all_reduce_add_rms_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float scale, "
    "str flavour, bool post_norm, str group_name) -> (Tensor normed, Tensor residual_out)"
)

library = torch.library.Library("tpfuse", "DEF")
library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


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
) -> tuple[Tensor, Tensor]:
    refuse_gradients(x, residual, weight, bias)
    parsed = Flavour.parse(flavour)
    check(x, residual, weight, bias, parsed, post_norm)
    return reference_all_reduce_add_rms_norm(x, residual, weight, bias, eps, scale, parsed, post_norm, group_name)


def reference_all_reduce_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float,
    flavour: Flavour,
    post_norm: bool,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    """The op on any device: the group's own all-reduce, then the exact reference."""
    if x.numel() == 0:
        # Every rank of the group has the same (zero) number of rows, so all of them skip the collective.
        reduced = x.clone()
    elif settings.batch_invariant():
        invariant.agree(group_name)
        reduced = invariant.sum_in_rank_order(x, group_name)
        return invariant.add_rms_norm(reduced, residual, weight, bias, eps, scale, flavour, post_norm)
    else:
        invariant.remember(group_name)
        return exact(x, residual, weight, bias, eps, scale, flavour, post_norm, group_name)
    normed, residual_out = reference.add_rms_norm(reduced, residual, weight, bias, eps, scale, flavour, post_norm)
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
) -> tuple[Tensor, Tensor]:
    refuse_gradients(x, residual, weight, bias)
    parsed = Flavour.parse(flavour)
    check(x, residual, weight, bias, parsed, post_norm, same_sizes)
    normed_dtype = reference.output_dtype(x.dtype, None if weight is None else weight.dtype, parsed)
    residual_dtype = reference.residual_dtype(x.dtype, normed_dtype, post_norm)
    return x.new_empty(x.shape, dtype=normed_dtype), x.new_empty(x.shape, dtype=residual_dtype)


library.impl("all_reduce_add_rms_norm", _cpu, "CPU")
library.impl("all_reduce_add_rms_norm", cuda.run, "CUDA")
torch.library.register_fake("tpfuse::all_reduce_add_rms_norm", _fake, lib=library)


def all_reduce_add_rms_norm(
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
) -> tuple[Tensor, Tensor]:
    """Sum ``x`` over the ranks of ``group``, add the residual and normalise, in one op.

    Args:
        x: ``(..., H)`` fp32, bf16, fp16 or fp64: this rank's partial sum. Every rank passes the same shape and dtype.
        residual: ``x``'s shape and dtype, or None for the variant without a residual.
        weight: ``(H,)``, or None with a flavour whose gain is ``"none"``.
        eps: added to the mean of squares.
        bias: ``(H,)`` or ``x``'s shape, added to the sum before scale and residual, or None.
        scale: multiplied into the sum after the bias (Granite's residual multiplier).
        flavour: the rounding order of the norm; see :class:`tpfuse.ops.Flavour`.
        post_norm: normalise the sum and add the residual after it (Gemma2, OLMo2).
        group: a process group or its name; None is the default group.
    Returns:
        ``(normed, residual_out)``: with ``post_norm=False`` ``(norm(h), h)`` where ``h = residual + scale * (sum + bias)``;
        with ``post_norm=True`` ``(norm(y), residual + norm(y))`` where ``y = scale * (sum + bias)``.
    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
        RuntimeError: autograd would have to record the op.
    """
    if group is None:
        group = torch.distributed.group.WORLD
        if group is None:
            raise ValueError(
                "all_reduce_add_rms_norm: no process group is initialised; call torch.distributed.init_process_group "
                "first or pass group="
            )
    name = group if isinstance(group, str) else group.group_name
    return torch.ops.tpfuse.all_reduce_add_rms_norm(
        x, residual, weight, bias, eps, scale, str(flavour), post_norm, name
    )
