"""Schema, checks, fake and CPU implementation of ``tpfuse::all_reduce_add_rms_norm``.

The op is functional: it never writes its inputs and never returns one of them. The choice of algorithm happens inside
it, so a compiled graph is the same whatever path the group takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cuda, invariant, reference, settings
from .arguments import Operands, same_sizes
from .flavour import LLAMA, Flavour
from .library import exact

SCHEMA = (
    "all_reduce_add_rms_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float scale, "
    "str flavour, bool post_norm, str group_name) -> (Tensor normed, Tensor residual_out)"
)

library = torch.library.Library("tpfuse", "DEF")
library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    given = Operands.of(*args)
    if given.x.numel() == 0:
        # Every rank of the group has the same (zero) number of rows, so all of them skip the collective.
        normed, residual_out = reference.add_rms_norm(given.x.clone(), *given.after_the_sum)
        return normed.contiguous(), residual_out.contiguous()
    if settings.batch_invariant():
        invariant.agree(given.group_name)
        return invariant.add_rms_norm(invariant.sum_in_rank_order(given.x, given.group_name), given)
    invariant.remember(given.group_name)
    return exact(given)


def _fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    given = Operands.of(*args, same=same_sizes, **kwargs)
    x, weight = given.x, given.weight
    normed_dtype = reference.output_dtype(x.dtype, None if weight is None else weight.dtype, given.flavour)
    residual_dtype = reference.residual_dtype(x.dtype, normed_dtype, given.post_norm)
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
