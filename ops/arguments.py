"""What the arguments of the ops may be, checked in one place for every backend."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpfuse import compat

from .flavour import Flavour
from .reference import DTYPES, NARROW, sum_dtype

NAME = "all_reduce_add_rms_norm"


def check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    flavour: Flavour,
    post_norm: bool,
    same: Callable[[Any, Any], bool] = operator.eq,
    name: str = NAME,
) -> None:
    """Raise ``ValueError`` naming the argument, what it is and what the op takes.

    Args:
        same: compares two shapes; another one than ``==`` where sizes may be symbols.
        name: of the op, for messages.
    """
    if x.dim() < 1:
        raise ValueError(f"{name}: x is a scalar; expected a tensor of shape (..., H)")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: x has dtype {x.dtype}; expected one of {DTYPES}")
    hidden = x.shape[-1]
    dtype = sum_dtype(x, residual)
    if residual is not None and residual.dtype != dtype:
        check_wide(x, residual, flavour, name)
    if residual is not None and not same(residual.shape, x.shape):
        raise ValueError(
            f"{name}: residual is {residual.dtype} {tuple(residual.shape)}; expected the dtype and "
            f"shape of x, {x.dtype} {tuple(x.shape)}"
        )
    check_devices(name, x, residual, weight, bias)
    if post_norm and residual is None:
        raise ValueError(f"{name}: post_norm=True needs a residual to add to; residual is None")
    if post_norm and flavour.reads == "unrounded":
        raise ValueError(
            f"{name}: post_norm=True adds the residual after the norm, so there is no residual sum that the norm "
            "could read unrounded; use a flavour with reads='rounded'"
        )
    if (weight is None) != (flavour.gain == "none"):
        given = "None" if weight is None else f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(
            f"{name}: weight is {given}, but the flavour's gain is {flavour.gain!r}; pass a weight of "
            "shape (H,) exactly when the gain is not 'none'"
        )
    if weight is not None and not same(tuple(weight.shape), (hidden,)):
        raise ValueError(f"{name}: weight has shape {tuple(weight.shape)}; expected ({hidden},)")
    if bias is not None and (
        bias.dtype != dtype or not same(tuple(bias.shape), (hidden,) if bias.dim() == 1 else tuple(x.shape))
    ):
        raise ValueError(
            f"{name}: bias is {bias.dtype} {tuple(bias.shape)}; expected {dtype} of shape "
            f"({hidden},) or {tuple(x.shape)}"
        )


def check_devices(name: str, x: Tensor, *others: Tensor | None) -> None:
    """Raise ``ValueError`` unless all operands are where ``x`` is: a kernel would read the address of another memory."""
    device = x.device
    for tensor in others:
        # There is one CPU: while a graph is traced, cpu:0 and cpu are its names, and differ.
        if tensor is not None and tensor.device != device and (tensor.is_cpu, device.type) != (True, "cpu"):
            raise ValueError(
                f"{name}: x is on {device}, but an operand, {tensor.dtype} {tuple(tensor.shape)}, is on {tensor.device}; move "
                f"it to the device of x: .to({str(device)!r})"
            )


def check_wide(x: Tensor, residual: Tensor, flavour: Flavour, name: str) -> None:
    """Raise ``ValueError`` unless a residual of another dtype than ``x`` is fp32, and its sum with ``x`` is normed unrounded."""
    wide = residual.dtype == torch.float32 and x.dtype in NARROW
    if not wide or flavour.reads != "unrounded":
        raise ValueError(
            f"{name}: residual is {residual.dtype} {tuple(residual.shape)}; expected the dtype and "
            f"shape of x, {x.dtype} {tuple(x.shape)}, or torch.float32 beside bf16 or fp16 with a flavour that has "
            "reads='unrounded', or bf16 or fp16 beside torch.float32"
        )


def check_partial(
    name: str,
    argument: str,
    flag: str,
    x: Tensor,
    partial: Tensor | None,
    asked: bool,
    dtype: torch.dtype,
    same: Callable[[Any, Any], bool] = operator.eq,
) -> None:
    """Raise ``ValueError`` unless an addend that is a partial sum is there, with the shape and dtype of ``x``.

    Args:
        name, argument, flag: of the op, of the addend and of what says that it is a partial sum; for messages.
        dtype: to which the sum of ``x`` is rounded.
    """
    if not asked:
        return
    if partial is None:
        raise ValueError(f"{name}: {flag}=True without {argument}: pass this rank's partial sum as {argument}")
    if dtype != x.dtype:
        raise ValueError(
            f"{name}: {flag}=True with x in {x.dtype} and a residual in {dtype}; a sum that is rounded from fp32 is made alone: "
            f"pass x in {dtype}, or all-reduce {argument} before"
        )
    if partial.dtype != x.dtype or not same(tuple(partial.shape), tuple(x.shape)):
        raise ValueError(
            f"{name}: {argument} is {partial.dtype} {tuple(partial.shape)} with {flag}=True; expected the dtype and shape of x, "
            f"{x.dtype} {tuple(x.shape)}"
        )


def check_order(name: str, flag: str, asked: bool, residual: Tensor | None, scaled: bool) -> None:
    """Raise ``ValueError`` unless two sums may be added to the residual one after the other."""
    if not asked:
        raise ValueError(f"{name}: residual_first=True is an order of two sums; it needs {flag}=True")
    if residual is None or scaled:
        what = "no residual" if residual is None else "a scale"
        raise ValueError(
            f"{name}: residual_first=True with {what}; it is (residual + sum) + other sum: pass a residual, and scale 1.0 "
            "without scale_tensor and scale_first"
        )


def check_residual(name: str, x: Tensor, residual: Tensor | None) -> None:
    """Raise ``ValueError`` where the residual has another device or dtype than ``x``, of which some ops take one only."""
    check_devices(name, x, residual)
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(
            f"{name}: residual is {residual.dtype} {tuple(residual.shape)}; expected the dtype of x, {x.dtype}"
        )


def check_scale(
    x: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    dtype: torch.dtype,
    same: Callable[[Any, Any], bool] = operator.eq,
) -> None:
    """Raise ``ValueError`` unless a scale that is a tensor has one value, or one a row, of the sum's kind, and no number is given
    beside it.

    Args:
        dtype: to which the sum of ``x`` is rounded.
        same: as for :func:`check`.
    """
    if scale_tensor is None:
        return
    rows = math.prod(x.shape[:-1])
    by_row = scale_tensor.dim() > 0
    if by_row and not (same((scale_tensor.shape[-1],), (1,)) and same((math.prod(scale_tensor.shape),), (rows,))):
        raise ValueError(
            f"all_reduce_add_rms_norm: scale_tensor is {scale_tensor.dtype} {tuple(scale_tensor.shape)} beside {rows} rows; "
            f"expected one value without dimensions, {dtype} (), or one for each row, {dtype} (..., 1) with {rows} values"
        )
    if scale_tensor.dtype != dtype or scale_tensor.device != x.device:
        raise ValueError(
            f"all_reduce_add_rms_norm: scale_tensor is {scale_tensor.dtype} {tuple(scale_tensor.shape)} on "
            f"{scale_tensor.device}; expected one value without dimensions, {dtype} () on {x.device}, or one for "
            f"each row, {dtype} (..., 1)"
        )
    if scale != 1.0:
        raise ValueError(f"all_reduce_add_rms_norm: scale is {scale} beside a scale_tensor; pass one of the two")


def same_sizes(a: Any, b: Any) -> bool:
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


def refuse_gradients(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_tensor: Tensor | None = None,
    name: str = NAME,
) -> None:
    """Raise ``RuntimeError`` where autograd would record the op: it has no gradient, and a silent zero would be worse.

    Asked in every implementation and not by an autograd kernel, which would cost each call a further dispatch.
    """
    if torch.is_grad_enabled():
        named = (("x", x), ("residual", residual), ("weight", weight), ("bias", bias), ("scale_tensor", scale_tensor))
        for operand, tensor in named:
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{name} is for inference only and has no gradient, but {operand} requires grad; call it under "
                    "torch.no_grad() or torch.inference_mode(), or detach its operands"
                )
