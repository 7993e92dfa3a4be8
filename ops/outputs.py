"""The outputs that a caller gives the op to write into: what they may be, and which memory they may share."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import same_sizes
from .operands import Operands


def check_out(given: Operands, out: tuple[Tensor, Tensor], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Raise ``ValueError`` unless the two outputs have the right shape and these dtypes."""
    for name, tensor, dtype in zip(("normed", "residual_out"), out, dtypes, strict=True):
        if tensor.dtype != dtype or not same_sizes(tensor.shape, given.x.shape) or tensor.device != given.x.device:
            raise ValueError(
                f"all_reduce_add_rms_norm: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected "
                f"{dtype} {tuple(given.x.shape)} on {given.x.device}"
            )


def check_memory(given: Operands, out: tuple[Tensor, Tensor]) -> None:
    """Raise ``ValueError`` unless the call may write into the two outputs.

    A lane reads its elements of ``x`` and of the residual before it writes the same elements of an output, so ``normed`` may
    be ``x`` and ``residual_out`` may be the residual. Other memory that they share would be overwritten before it is read.
    """
    inputs = {"x": given.x, "residual": given.residual, "weight": given.weight, "bias": given.bias}
    inputs["scale_tensor"] = given.scale_tensor
    for name, tensor, may_be in (("normed", out[0], "x"), ("residual_out", out[1], "residual")):
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(f"all_reduce_add_rms_norm: {name} must be contiguous and start at a multiple of 16 bytes")
        for other_name, other in (*inputs.items(), ("normed", out[0])):
            if other is None or (other is tensor and name == other_name) or not _overlap(tensor, other):
                continue
            same = other.data_ptr() == tensor.data_ptr() and other.dtype == tensor.dtype and other.is_contiguous()
            if other_name != may_be or not same:
                raise ValueError(
                    f"all_reduce_add_rms_norm: {name} shares memory with {other_name}; normed may be x itself and "
                    "residual_out the residual itself, nothing else"
                )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the bytes between the first and the last element of two tensors on one device meet."""

    def span(t: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()

    if a.device != b.device or not a.numel() or not b.numel():
        return False
    (start, end), (other_start, other_end) = span(a), span(b)
    return start < other_end and other_start < end
