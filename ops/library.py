"""The library path: the group's own all-reduce, then add and norm in one kernel.

For large sizes, several hosts, GPUs without peer access, and every call that the kernels do not take. The all-reduce is
NCCL's (or gloo's), so it sums in its own order: equal on all ranks, but not bit for bit the kernels' sum.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tpfuse import compat

from . import layer_norm_reference, reference
from .kernel import Kernel
from .kernels.variant import GROUP_LANES, Constants, Variant, torch_dtype
from .layer_norm_operands import LayerNormOperands
from .operands import Operands
from .quant_reference import scales_like
from .quantizer import Quantizer

MOST_PROGRAMS = 1 << 16


def all_reduce(x: Tensor, group_name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Sum of ``x`` over the group, by its own backend, rounded to ``dtype`` (default: that of ``x``)."""
    reduced = torch.ops._c10d_functional.all_reduce(x, "sum", group_name)
    return torch.ops._c10d_functional.wait_tensor(reduced).to(dtype or x.dtype)


@lru_cache(maxsize=512)
def _kernel(constants: Constants) -> Kernel:
    from .kernels.add_norm import add_norm_kernel, add_norm_layer_norm_kernel, add_norm_quant_kernel

    function = {
        "rms_norm": add_norm_kernel,
        "quant": add_norm_quant_kernel,
        "layer_norm": add_norm_layer_norm_kernel,
    }[constants.kind]
    return Kernel(function, GROUP_LANES, (constants, alone(constants)))


def alone(constants: Constants) -> Variant:
    """The variant of kernels that wait for nobody: one program a row."""
    return Variant(world=1, lanes=GROUP_LANES, steps=constants.groups, split=1)


def add_norm(
    reduced: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    normed: Tensor,
    residual_out: Tensor,
    eps: float,
    scale: float | Tensor,
    constants: Constants,
    behind: tuple[Tensor | None, ...] = (),
) -> None:
    """Bias, scale, residual add and norm of reduced rows in one kernel. Tensors are contiguous and 16-byte aligned.

    Args:
        reduced: in the dtype of the partial sums; the kernel rounds it where the residual is narrower.
        behind: of a LayerNorm: what it adds behind its weight, and the addend behind the bias.
    """
    kernel = _kernel(constants)
    rows = reduced.numel() // constants.hidden
    args = (
        reduced,
        reduced if residual is None else residual,
        reduced if weight is None else weight,
        reduced if bias is None else bias,
        normed,
        residual_out,
        *(reduced if t is None else t for t in behind),
        rows,
        eps,
        scale,
    )
    _start(kernel, rows, reduced, args)


def add_norm_quant(
    reduced: Tensor,
    given: Operands,
    outputs: tuple[Any, ...],
    static_scale: Tensor | None,
    constants: Constants,
    scales: Tensor,
) -> None:
    """:func:`add_norm` that quantizes.

    Args:
        outputs: normed (or None), residual_out, quantized and scales of all rows.
        scales: the same scales in the op's layout.
    """
    normed, residual_out, quantized, flat = outputs
    rows = reduced.numel() // constants.hidden
    operands = (given.residual, given.weight, given.bias, normed)
    args = (
        reduced,
        *(reduced if t is None else t for t in operands),
        *(residual_out, quantized, flat, reduced if static_scale is None else static_scale, scales.stride(-1)),
        *(rows, given.eps, given.scale),
    )
    _start(_kernel(constants), rows, reduced, args)


@lru_cache(maxsize=512)
def quantize_kernel_of(constants: Constants) -> Kernel:
    """The kernel that quantizes rows in memory, not necessarily compiled yet."""
    from .kernels.quantize import quantize_kernel

    return Kernel(quantize_kernel, GROUP_LANES, (constants, alone(constants)))


def quantize_samples(constants: Constants, quantizer: Quantizer) -> tuple[Any, ...]:
    """Arguments of the right types to compile that kernel with; see :func:`tpfuse.ops.prepare.samples`."""
    out = torch_dtype(constants.out_dtype)
    return (out, torch.uint8, scales_like((1, constants.hidden), quantizer)[2], torch.float32, 1, 1)


def quantize_rows(outputs: tuple[Any, ...], static_scale: Tensor | None, constants: Constants, scales: Tensor) -> None:
    """Quantize rows that a kernel has normed. Arguments as for :func:`add_norm_quant`; normed is read."""
    normed, _, quantized, flat = outputs
    args = (normed, quantized, flat, normed if static_scale is None else static_scale, scales.stride(-1), len(normed))
    _start(quantize_kernel_of(constants), len(normed), normed, args)


def _start(kernel: Kernel, rows: int, on: Tensor, args: tuple[Any, ...]) -> None:
    if not kernel.ready:
        kernel.compile(*args)
    kernel(min(rows, MOST_PROGRAMS), compat.current_stream_handle(on.device.index), *args)


def exact(given: Operands) -> tuple[Tensor, Tensor]:
    """The group's all-reduce and the exact reference: on a CPU, and for calls that no kernel takes."""
    reduced, given = given.reduced(all_reduce)
    normed, residual_out = reference.add_rms_norm(reduced, *given.after_the_sum)
    return normed.contiguous(), residual_out.contiguous()


def exact_layer_norm(given: LayerNormOperands) -> tuple[Tensor, Tensor]:
    """:func:`exact` of the op whose norm is a LayerNorm."""
    reduced, given = given.reduced(all_reduce)
    normed, residual_out = layer_norm_reference.add_layer_norm(reduced, *given.after_the_sum)
    return normed.contiguous(), residual_out.contiguous()
