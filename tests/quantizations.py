"""The fp8 arithmetic of other libraries, written out as their sources have it, to compare :mod:`tpfuse.ops.quantizer` with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
MAX = torch.finfo(E4M3).max
VLLM_MIN = 1.0 / (MAX * 512.0)


def torchao_static(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return (x.to(torch.float32) / scale).clamp(min=-MAX, max=MAX).to(E4M3), scale.new_empty(0)


def torchao_rowwise(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(dim=-1, keepdim=True) / MAX).to(torch.float32)
    return (x.to(torch.float32) / scale).clamp(min=-MAX, max=MAX).to(E4M3), scale


def vllm_static(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return (x.to(torch.float32) * scale.reciprocal()).clamp(-MAX, MAX).to(E4M3), scale.new_empty(0)


def vllm_token(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    x_max = x.abs().amax(dim=-1).unsqueeze(-1).to(torch.float32)
    scale = (x_max / MAX).clamp(min=VLLM_MIN)
    return (x.to(torch.float32) * scale.to(torch.float32).reciprocal()).clamp(-MAX, MAX).to(E4M3), scale


def vllm_group128(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    hidden, groups = x.shape[-1], -(-x.shape[-1] // 128)
    grouped = F.pad(x, (0, groups * 128 - hidden)).reshape(-1, groups, 128)
    absmax = grouped.abs().max(dim=-1, keepdim=True)[0].float()
    scales = (absmax / MAX).clamp(min=VLLM_MIN)
    quantized = (grouped / scales).clamp(-MAX, MAX).to(E4M3).reshape(len(grouped), groups * 128)[..., :hidden]
    return quantized.reshape(x.shape), scales.squeeze(-1).reshape(*x.shape[:-1], groups)


def vllm_group128_kernel(x: Tensor, _: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    y = F.pad(x, (0, -x.shape[-1] % 128)).unflatten(-1, (-(-x.shape[-1] // 128), 128)).to(torch.float32)
    scale = y.abs().amax(-1, keepdim=True).clamp(min=1e-10) * (1.0 / MAX)
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    quantized = (y / scale).clamp(-MAX, MAX).to(E4M3).flatten(-2)[..., : x.shape[-1]]
    return quantized, scale.squeeze(-1)


def deepgemm_ue8m0(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    quantized, scale = vllm_group128_kernel(x, _, power_of_two=True)
    exponents = (torch.log2(scale) + 127).nan_to_num(255.0, 255.0).to(torch.int64)
    exponents = F.pad(exponents, (0, -exponents.shape[-1] % 4)).unflatten(-1, (-(-exponents.shape[-1] // 4), 4))
    packed = (exponents * torch.tensor([1, 1 << 8, 1 << 16, 1 << 24])).sum(-1)
    return quantized, torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def deepseek_group128(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    y = F.pad(x, (0, -x.shape[-1] % 128)).unflatten(-1, (-(-x.shape[-1] // 128), 128)).to(torch.float32)
    scale = y.abs().amax(-1, keepdim=True) / 448.0
    return (y / scale).to(E4M3).flatten(-2)[..., : x.shape[-1]], scale.squeeze(-1)


def deepseek_ue8m0(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    y = F.pad(x, (0, -x.shape[-1] % 128)).unflatten(-1, (-(-x.shape[-1] // 128), 128)).to(torch.float32)
    mantissa, exponent = torch.frexp(y.abs().amax(-1, keepdim=True).clamp(min=1e-4) * (1.0 / 448.0))
    power = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).to(exponent.dtype))
    scale = torch.where(torch.isfinite(mantissa), power, mantissa)
    return (y / scale).clamp(-448.0, 448.0).to(E4M3).flatten(-2)[..., : x.shape[-1]], scale.squeeze(-1)


def fbgemm_token(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    a = x.to(torch.float32)
    amax = a.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    a_scale = torch.full_like(amax, MAX) / amax  # the kernel divides; torch's `MAX / amax` would multiply by 1 / amax
    return (a * a_scale).clamp(-MAX, MAX).to(E4M3), 1.0 / a_scale


def compressed_tensors_token(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    low, high = torch.min(low, torch.zeros_like(low)), torch.max(high, torch.zeros_like(high))
    scale = torch.max(low.abs(), high.abs()) / (float(2 * MAX) / 2)
    scale = scale.clamp(min=torch.finfo(torch.float32).eps)
    return (x / scale).clamp(-MAX, MAX).to(E4M3), scale.to(torch.float32)


# By the name of the quantizer in ``tpfuse.ops.quantizer.NAMED``.
THEIRS = {
    "torchao-static": torchao_static,
    "torchao-rowwise": torchao_rowwise,
    "vllm-static": vllm_static,
    "vllm-token": vllm_token,
    "vllm-group128": vllm_group128,
    "vllm-group128-kernel": vllm_group128_kernel,
    "deepgemm-ue8m0": deepgemm_ue8m0,
    "deepseek-group128": deepseek_group128,
    "deepseek-ue8m0": deepseek_ue8m0,
    "fbgemm-token": fbgemm_token,
    "compressed-tensors-token": compressed_tensors_token,
}


def hard_rows(rows: int, hidden: int, seed: int) -> Tensor:
    """fp32 rows, among them zeros, denormals, a NaN, infinities, and one whose values lie between those of fp8."""
    x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed))
    for row, fill in enumerate((0.0, 1e-41, float("nan"), float("inf"), float("-inf"))):
        if row + 3 < rows:
            x[row + 3, : hidden if row < 2 else 5] = fill
    if rows > 9:
        x[9, : hidden // 2] = 0.0  # groups of zeros beside others
        x[8] = torch.linspace(-448, 448, hidden).round() + 0.5
    return x
