"""The exact reference of ``tpfuse::all_reduce_add_layer_norm``, written with the ATen ops that models use.

As :mod:`.reference`: on a CPU it is the implementation, and its bits are those of the unfused graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_norm_flavour import LayerNormFlavour
from .reference import sum_dtype


def layer_norm(
    h: Tensor, weight: Tensor | None, norm_bias: Tensor | None, eps: float, flavour: LayerNormFlavour
) -> Tensor:
    """LayerNorm of ``h`` over its last dimension in the rounding order of ``flavour``.

    Args:
        h: ``(..., H)``, any floating dtype.
        weight: ``(H,)``, or None exactly when ``flavour.gain`` is ``"none"``.
        norm_bias: ``(H,)``, or None exactly when ``flavour.shift`` is ``"none"``.
        eps: added to the variance.
    Returns:
        ``(..., H)`` in the dtype that ``flavour.out`` names.
    """
    c = h.to(torch.float32) if flavour.compute == "float32" else h
    gain = weight
    if gain is not None:
        gain = gain.to({"own": gain.dtype, "float32": torch.float32, "input": h.dtype}[flavour.gain_dtype])
        gain = gain + 1.0 if flavour.gain == "one_plus_weight" else gain
    if flavour.moments == "native":
        normed = torch.native_layer_norm(c, (c.shape[-1],), gain, norm_bias, eps)[0]
    else:
        normed = _spelled_out(c, h.dtype, gain, norm_bias, eps, flavour)
    if flavour.out == "promoted":
        return normed
    return normed.to(h.dtype if flavour.out == "input" else torch.float32)


def _spelled_out(
    c: Tensor, input_dtype: torch.dtype, gain: Tensor | None, norm_bias: Tensor | None, eps: float, f: LayerNormFlavour
) -> Tensor:
    if f.moments == "var_mean":
        variance, mean = torch.var_mean(c, [-1], correction=0, keepdim=True)
        centered = c - mean
    else:
        centered = c - c.mean(-1, keepdim=True)
        variance = (centered * centered).mean(-1, keepdim=True)
    v = variance + eps
    if f.root == "rsqrt":
        normed = centered * torch.rsqrt(v)
    elif f.root == "div_sqrt":
        normed = centered / torch.sqrt(v)
    elif f.root == "mul_recip_sqrt":
        normed = centered * torch.reciprocal(torch.sqrt(v))
    else:
        normed = centered * torch.pow(v, -0.5)
    normed = normed.to(torch.float32 if f.normed == "float32" else input_dtype)
    if gain is not None:
        normed = normed * gain
    return normed if norm_bias is None else normed + norm_bias


def add_layer_norm(
    reduced: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    addend: Tensor | None,
    eps: float,
    scale: float,
    flavour: LayerNormFlavour,
    addend_bias: Tensor | None = None,
    residual_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Everything after the all-reduce: bias, scale, residual add and norm, each rounded as eager mode does.

    Args:
        reduced: ``(..., H)``, the sum over ranks, rounded to its dtype; in fp32 beside a 16-bit residual, to whose dtype it is
            rounded first.
        residual: the shape and dtype of ``reduced``, or None.
        bias: ``(H,)`` or the shape of ``reduced``, added to the sum before the scale; or None.
        addend: the shape of ``reduced``, added behind the bias; or None.
        weight, norm_bias, eps, flavour: of the norm, see :func:`layer_norm`.
        addend_bias: ``(H,)``, added to the addend before anything else is; or None.
        residual_first: ``h = (residual + (reduced + bias)) + addend``, the order of Cohere; with a residual, without a scale.
    Returns:
        ``(norm(h), h)`` with ``h = residual + scale * ((reduced + bias) + (addend + addend_bias))``.
    """
    if addend is not None and addend_bias is not None:
        addend = addend + addend_bias
    h = reduced.to(sum_dtype(reduced, residual))
    if bias is not None:
        h = h + bias
    if residual_first and residual is not None:
        h, residual = residual + h, None
    if addend is not None:
        h = h + addend
    if scale != 1.0:
        h = h * scale
    if residual is not None:
        h = residual + h
    return layer_norm(h, weight, norm_bias, eps, flavour), h


def output_dtype(
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    shift_dtype: torch.dtype | None,
    flavour: LayerNormFlavour,
) -> torch.dtype:
    """The dtype of the normed output, as the steps of :func:`layer_norm` give it."""
    if flavour.out == "input":
        return input_dtype
    if flavour.out == "float32":
        return torch.float32
    if flavour.moments == "native":  # of its operand, whatever the weight is
        return torch.float32 if flavour.compute == "float32" else input_dtype
    normed = torch.float32 if flavour.normed == "float32" else input_dtype
    if weight_dtype is not None:
        gain = {"own": weight_dtype, "float32": torch.float32, "input": input_dtype}[flavour.gain_dtype]
        normed = torch.promote_types(normed, gain)
    return normed if shift_dtype is None else torch.promote_types(normed, shift_dtype)
