"""Schema, checks, fake and CPU implementation of ``tpfuse::all_reduce_add_rms_norm``.

The op is functional: it never writes its inputs and never returns one of them. The choice of algorithm happens inside
it, so a compiled graph is the same whatever path the group takes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpfuse import compat

from . import invariant, reference
from .flavour import LLAMA, Flavour

SCHEMA = (
    "all_reduce_add_rms_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float scale, "
    "str flavour, bool post_norm, str group_name) -> (Tensor normed, Tensor residual_out)"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

library = torch.library.Library("tpfuse", "DEF")
library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    flavour: Flavour,
    post_norm: bool,
    same: Callable[[Any, Any], bool] = operator.eq,
) -> None:
    """Raise ``ValueError`` naming the argument, what it is and what the op takes.

    Args:
        same: compares two shapes; another one than ``==`` where sizes may be symbols.
    """
    if x.dim() < 1:
        raise ValueError("all_reduce_add_rms_norm: x is a scalar; expected a tensor of shape (..., H)")
    if x.dtype not in DTYPES:
        raise ValueError(f"all_reduce_add_rms_norm: x has dtype {x.dtype}; expected one of {DTYPES}")
    hidden = x.shape[-1]
    if residual is not None and (residual.dtype != x.dtype or not same(residual.shape, x.shape)):
        raise ValueError(
            f"all_reduce_add_rms_norm: residual is {residual.dtype} {tuple(residual.shape)}; expected the dtype and "
            f"shape of x, {x.dtype} {tuple(x.shape)}"
        )
    if post_norm and residual is None:
        raise ValueError("all_reduce_add_rms_norm: post_norm=True needs a residual to add to; residual is None")
    if (weight is None) != (flavour.gain == "none"):
        given = "None" if weight is None else f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(
            f"all_reduce_add_rms_norm: weight is {given}, but the flavour's gain is {flavour.gain!r}; pass a weight of "
            "shape (H,) exactly when the gain is not 'none'"
        )
    if weight is not None and not same(tuple(weight.shape), (hidden,)):
        raise ValueError(f"all_reduce_add_rms_norm: weight has shape {tuple(weight.shape)}; expected ({hidden},)")
    if bias is not None and (
        bias.dtype != x.dtype or not same(tuple(bias.shape), (hidden,) if bias.dim() == 1 else tuple(x.shape))
    ):
        raise ValueError(
            f"all_reduce_add_rms_norm: bias is {bias.dtype} {tuple(bias.shape)}; expected {x.dtype} of shape "
            f"({hidden},) or {tuple(x.shape)}"
        )


def _same_sizes(a: Any, b: Any) -> bool:
    """Whether two shapes are equal. Sizes known at run time only are asserted to be, which the compiled graph then checks."""
    if len(a) != len(b):
        return False
    for one, other in zip(a, b, strict=True):
        if compat.known_at_run_time_only(one) or compat.known_at_run_time_only(other):
            torch._check(
                one == other,
                lambda: f"all_reduce_add_rms_norm: operands that must have one shape have {tuple(a)} and {tuple(b)}",
            )
        elif one != other:
            return False
    return True


def refuse_gradients(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise ``RuntimeError`` where autograd would record the op: it has no gradient, and a silent zero would be worse.

    Asked in every implementation and not by an autograd kernel, which would cost each call a further dispatch.
    """
    if torch.is_grad_enabled():
        for name, tensor in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"all_reduce_add_rms_norm is for inference only and has no gradient, but {name} requires grad; call it under "
                    "torch.no_grad() or torch.inference_mode(), or detach its operands"
                )


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
    elif invariant.batch_invariant():
        invariant.agree(group_name)
        reduced = invariant.sum_in_rank_order(x, group_name)
        return invariant.add_rms_norm(reduced, residual, weight, bias, eps, scale, flavour, post_norm)
    else:
        invariant.remember(group_name)
        reduced = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group_name)
        reduced = torch.ops._c10d_functional.wait_tensor(reduced)
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
    check(x, residual, weight, bias, parsed, post_norm, _same_sizes)
    normed_dtype = reference.output_dtype(x.dtype, None if weight is None else weight.dtype, parsed)
    residual_dtype = torch.promote_types(x.dtype, normed_dtype) if post_norm else x.dtype
    return x.new_empty(x.shape, dtype=normed_dtype), x.new_empty(x.shape, dtype=residual_dtype)


library.impl("all_reduce_add_rms_norm", _cpu, "CPU")
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
