"""The exact reference: what ``tpfuse::all_reduce_add_rms_norm`` computes, written with the ATen ops that models use.

On a CPU this is the implementation, and its result equals the unfused graph bit for bit; elsewhere it is what the
kernels are compared with. Every op below is the one that eager mode would run for the same step, in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .flavour import Flavour

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of partial sums
NARROW = (torch.bfloat16, torch.float16)


def sum_dtype(partial: Tensor, residual: Tensor | None) -> torch.dtype:
    """The dtype to which a sum over ranks is rounded: that of the partial sums, or of a 16-bit residual beside fp32 ones."""
    narrows = residual is not None and partial.dtype == torch.float32 and residual.dtype in NARROW
    return residual.dtype if residual is not None and narrows else partial.dtype


def rms_norm(
    h: Tensor, weight: Tensor | None, eps: float, flavour: Flavour, input_dtype: torch.dtype | None = None
) -> Tensor:
    """RMSNorm of ``h`` over its last dimension in the rounding order of ``flavour``.

    Args:
        h: ``(..., H)``, any floating dtype.
        weight: ``(H,)``, or None exactly when ``flavour.gain`` is ``"none"``.
        eps: added to the mean of squares.
        input_dtype: what the flavour calls ``input``, where ``h`` is wider: a sum that was not rounded. Default: ``h``'s dtype.
    Returns:
        ``(..., H)`` in the dtype that ``flavour.out`` names.
    """
    compute = torch.float32 if flavour.compute == "float32" else input_dtype or h.dtype
    c = h.to(compute)
    squares = c * c
    mean = squares.mean(-1, keepdim=True) if flavour.mean == "mean" else squares.sum(-1, keepdim=True) / h.shape[-1]
    return scaled_by_mean(c, mean, weight, eps, flavour, input_dtype or h.dtype)


def scaled_by_mean(
    c: Tensor, mean: Tensor, weight: Tensor | None, eps: float, flavour: Flavour, input_dtype: torch.dtype
) -> Tensor:
    """The steps of an RMSNorm behind the mean of squares, which may be that of a wider row than ``c``.

    Args:
        c: ``(..., H)``, what is normed, in the dtype in which the flavour computes.
        mean: ``(..., 1)``, in the same dtype.
        weight, eps, flavour: as for :func:`rms_norm`.
        input_dtype: what the flavour calls ``input``.
    Returns:
        ``(..., H)`` in the dtype that ``flavour.out`` names.
    """
    v = mean + eps
    if flavour.root == "rsqrt":
        normed = c * torch.rsqrt(v)
    elif flavour.root == "div_sqrt":
        normed = c / torch.sqrt(v)
    elif flavour.root == "mul_recip_sqrt":
        normed = c * torch.reciprocal(torch.sqrt(v))
    else:
        normed = c * torch.pow(v, -0.5)
    normed = normed.to(torch.float32 if flavour.normed == "float32" else input_dtype)
    if flavour.gain != "none":
        if weight is None:
            raise ValueError(f"flavour {flavour} multiplies by a weight, but weight is None; pass weight of shape (H,)")
        if flavour.gain_dtype == "float32":
            weight = weight.to(torch.float32)
        elif flavour.gain_dtype == "input":
            weight = weight.to(input_dtype)
        normed = normed * (weight + 1.0 if flavour.gain == "one_plus_weight" else weight)
    if flavour.out == "input":
        normed = normed.to(input_dtype)
    elif flavour.out == "float32":
        normed = normed.to(torch.float32)
    return normed


def add_rms_norm(
    reduced: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float,
    flavour: Flavour,
    post_norm: bool,
    scale_tensor: Tensor | None = None,
    scale_first: bool = False,
    residual_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Everything after the all-reduce: bias, scale, residual add and norm. See ``docs/op.md`` for the contract.

    Args:
        reduced: ``(..., H)``, the sum over ranks, rounded to its dtype; in fp32 beside a 16-bit residual, to whose dtype it is
            rounded first.
        residual: the shape and dtype of ``reduced``, or None; with a flavour that reads the unrounded sum also fp32.
        weight: ``(H,)`` or None.
        bias: ``(H,)`` or the shape of ``reduced``, added before the scale; or None.
        eps: of the norm.
        scale: multiplied in after the bias (1.0 is no multiplication).
        flavour: the rounding order of the norm.
        post_norm: False: ``h = residual + y``, returns ``(norm(h), h)``. True: returns ``(norm(y), residual + norm(y))``.
        scale_tensor: one value in the dtype of ``reduced``, or one for each of its rows, ``(..., 1)``, in the place of
            ``scale``; or None.
        scale_first: the scale is multiplied in before the bias is added.
        residual_first: ``h = (residual + reduced) + bias``: another order of the same additions (Cohere's). With a residual,
            without a scale, post-norm or an unrounded sum.

    With a flavour that reads the unrounded sum the norm is that of ``residual + y`` in fp32; what is returned is rounded to the
    residual's dtype.
    """
    reduced = reduced.to(sum_dtype(reduced, residual))
    if residual_first and residual is not None and bias is not None:
        h = (residual + reduced) + bias
        return rms_norm(h, weight, eps, flavour), h
    y = reduced
    if bias is not None and not scale_first:
        y = y + bias
    if scale_tensor is not None:
        y = y * (scale_tensor if scale_tensor.dim() == 0 else scale_tensor.reshape(*y.shape[:-1], 1))
    elif scale != 1.0:
        y = y * scale
    if bias is not None and scale_first:
        y = y + bias
    if post_norm:
        if residual is None:
            raise ValueError("post_norm=True adds the residual after the norm, but residual is None; pass a residual")
        normed = rms_norm(y, weight, eps, flavour)
        return normed, residual + normed
    if residual is not None and flavour.reads == "unrounded":
        wide = torch.promote_types(y.dtype, torch.float32)
        unrounded = residual.to(wide) + y.to(wide)
        return rms_norm(unrounded, weight, eps, flavour, y.dtype), unrounded.to(residual.dtype)
    h = y if residual is None else residual + y
    return rms_norm(h, weight, eps, flavour), h


def output_dtype(input_dtype: torch.dtype, weight_dtype: torch.dtype | None, flavour: Flavour) -> torch.dtype:
    """The dtype of the normed output, as the steps of :func:`rms_norm` give it."""
    if flavour.out == "input":
        return input_dtype
    if flavour.out == "float32":
        return torch.float32
    normed = torch.float32 if flavour.normed == "float32" else input_dtype
    if flavour.gain == "none" or weight_dtype is None:
        return normed
    gain = {"own": weight_dtype, "float32": torch.float32, "input": input_dtype}[flavour.gain_dtype]
    return torch.promote_types(normed, gain)


def residual_dtype(
    input_dtype: torch.dtype, normed_dtype: torch.dtype, post_norm: bool, residual: torch.dtype | None = None
) -> torch.dtype:
    """The dtype of ``residual_out``: that of the residual, which is added to the normed output with post-norm."""
    residual = residual or input_dtype
    return torch.promote_types(residual, normed_dtype) if post_norm else residual
