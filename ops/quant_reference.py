"""The exact reference of a quantization, written with the ATen ops that models use.

On a CPU this is the implementation, and its bytes and scales equal the unfused graph's; elsewhere it is what the kernels are
compared with. Divisions are IEEE divisions everywhere: torch on CUDA divides by a Python number as a multiplication by its
reciprocal, so the divisor is a tensor here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .quantizer import GROUP, INVERSE, Quantizer


def quantize(normed: Tensor, quantizer: Quantizer, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize rows to fp8.

    Args:
        normed: ``(..., H)`` bf16, fp16 or fp32, as the norm returns it: already rounded to its dtype.
        quantizer: the arithmetic.
        static_scale: one fp32 value, exactly with ``granularity="tensor"``.
    Returns:
        ``(quantized, scales)``: ``(..., H)`` fp8, contiguous, and the scales of :func:`scales_like`.
    """
    if quantizer.granularity == "tensor":
        assert static_scale is not None
        return _apply(normed, static_scale.to(torch.float32).reshape(()), quantizer).contiguous(), empty_scales(
            normed, quantizer
        )
    if quantizer.granularity == "token":
        blocks = normed
    else:
        columns = normed.shape[-1]
        padded = torch.nn.functional.pad(normed, (0, -columns % GROUP)) if columns % GROUP else normed
        blocks = padded.unflatten(-1, (padded.shape[-1] // GROUP, GROUP))
    factor, returned = _derive(blocks.abs().amax(-1, keepdim=True), quantizer)
    quantized = _apply(blocks, factor, quantizer)
    if quantizer.granularity == "group128":
        quantized, returned = quantized.flatten(-2)[..., : normed.shape[-1]], returned.squeeze(-1)
    scales = empty_scales(normed, quantizer)
    scales.copy_(pack_ue8m0(returned) if quantizer.layout == "ue8m0" else returned)
    return quantized.contiguous(), scales


def _derive(amax: Tensor, q: Quantizer) -> tuple[Tensor, Tensor]:
    """(what the rows are divided or multiplied by, what is returned), both fp32."""
    if q.compute == "float32":
        amax = amax.to(torch.float32)
    if q.floor and q.floor_at == "amax":
        amax = amax.clamp(min=q.floor)
    if q.derive in INVERSE:
        inverse = torch.full_like(amax, q.largest) / amax if q.derive == "inverse" else amax.reciprocal() * q.largest
        inverse = inverse.to(torch.float32)
        return inverse, inverse.reciprocal() if q.returned == "scale" else inverse
    scale = amax / torch.full_like(amax, q.largest) if q.derive == "div" else amax * (1.0 / q.largest)
    if q.floor and q.floor_at == "scale":
        scale = scale.clamp(min=q.floor)
    if q.power_of_two == "log2":
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    elif q.power_of_two == "bits":
        scale = _next_power_of_two(scale.to(torch.float32))
    if q.floor and q.floor_at == "rounded":
        scale = scale.clamp(min=q.floor)
    scale = scale.to(torch.float32)
    return scale, scale if q.returned == "scale" else scale.reciprocal()


def _apply(x: Tensor, factor: Tensor, q: Quantizer) -> Tensor:
    wide = x.to(torch.float32)
    if q.apply == "div":
        wide = wide / factor
    else:
        wide = wide * (factor.reciprocal() if q.apply == "mul_recip" else factor)
    if q.apply_in == "input":
        wide = wide.to(x.dtype)
    if q.saturate == "clamp":
        wide = wide.clamp(-q.largest, q.largest)
    return wide.to(q.torch_dtype)


def _next_power_of_two(scale: Tensor) -> Tensor:
    """The power of two that is not below each fp32 value, from the bits: normal numbers, infinity and NaN stay what they are."""
    bits = scale.view(torch.int32)
    up = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return torch.where(torch.isfinite(scale), (up << 23).view(torch.float32), scale)


def pack_ue8m0(scales: Tensor) -> Tensor:
    """``(..., n)`` fp32 powers of two to ``(..., ceil(n / 4))`` int32: exponent bytes, the first in the lowest byte, 0 for none.

    NaN and infinity have the exponent 255, which is the NaN of UE8M0.
    """
    exponents = (scales.view(torch.int32) >> 23) & 0xFF
    four = torch.nn.functional.pad(exponents, (0, -exponents.shape[-1] % 4)).reshape(
        *exponents.shape[:-1], (exponents.shape[-1] + 3) // 4, 4
    )
    low = four[..., 0] | four[..., 1] << 8 | four[..., 2] << 16
    return low | four[..., 3] << 24


def scales_like(shape: Any, q: Quantizer) -> tuple[tuple[Any, ...], tuple[Any, ...], torch.dtype]:
    """Shape, strides and dtype of the scales of rows of ``shape``, which may have symbols in it.

    ``(0,)`` for one static scale, ``(..., 1)`` per token, ``(..., ceil(H / 128))`` for groups, four of them an int32 when packed.
    In column-major layouts all rows count as one dimension, whose columns start at multiples of four values.
    """
    if q.granularity == "tensor":
        return (0,), (1,), torch.float32
    *leading, hidden = shape
    count = 1 if q.granularity == "token" else (hidden + GROUP - 1) // GROUP
    packed = q.layout == "ue8m0"
    if packed:
        count = (count + 3) // 4
    strides: list[Any] = [1] * len(leading)
    for i in range(len(leading) - 2, -1, -1):
        strides[i] = strides[i + 1] * leading[i + 1]
    rows = strides[0] * leading[0] if leading else 1
    if q.layout == "row":
        strides = [s * count for s in strides] + [1]
    else:
        strides = [*strides, (rows + 3) // 4 * 4]
    return (*leading, count), tuple(strides), torch.int32 if packed else torch.float32


def empty_scales(x: Tensor, q: Quantizer) -> Tensor:
    """Uninitialized scales for the rows of ``x``; see :func:`scales_like`."""
    shape, strides, dtype = scales_like(x.shape, q)
    return x.new_empty_strided(shape, strides, dtype=dtype)
