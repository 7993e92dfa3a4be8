"""What a call of the quantized op has besides the arguments of the op without quantization, checked in one place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import refuse_gradients
from .quant_reference import quantize
from .quantizer import Quantizer

NAME = "all_reduce_add_rms_norm_quant"
Results = tuple[Tensor, Tensor, Tensor, Tensor]


class Quantization(NamedTuple):
    """What a call has besides the arguments of :class:`tpfuse.ops.operands.Operands`."""

    quantizer: Quantizer
    static_scale: Tensor | None
    keep_normed: bool

    @classmethod
    def of(cls, x: Tensor, quantizer: str, static_scale: Tensor | None, keep_normed: bool) -> Quantization:
        """From what the dispatcher gives; checked.

        Raises:
            ValueError: the quantizer or the static scale is not valid.
            RuntimeError: autograd would have to record the op.
        """
        parsed = Quantizer.parse(quantizer)
        if x.dim() and x.shape[-1] == 0:
            raise ValueError(f"{NAME}: x has shape {tuple(x.shape)}; expected at least one column to take a scale of")
        if x.dtype == torch.float64:
            raise ValueError(
                f"{NAME}: x has dtype {x.dtype}; expected torch.float32, torch.bfloat16 or torch.float16: fp8 is derived in fp32"
            )
        if (static_scale is None) != (parsed.granularity != "tensor"):
            given = "None" if static_scale is None else f"{static_scale.dtype} {tuple(static_scale.shape)}"
            raise ValueError(
                f"{NAME}: static_scale is {given}, but the quantizer's granularity is {parsed.granularity!r}; pass one fp32 "
                "value exactly when the granularity is 'tensor'"
            )
        if static_scale is not None:
            refuse_gradients(static_scale, None, None, None)
            if static_scale.dtype != torch.float32 or static_scale.numel() != 1 or static_scale.device != x.device:
                raise ValueError(
                    f"{NAME}: static_scale is {static_scale.dtype} {tuple(static_scale.shape)} on {static_scale.device}; "
                    f"expected one torch.float32 value on {x.device}"
                )
        return cls(parsed, static_scale, keep_normed)

    def results(self, normed: Tensor, residual_out: Tensor) -> Results:
        """The op's results from those of the op without quantization."""
        quantized, scales = quantize(normed, self.quantizer, self.static_scale)
        return quantized, scales, normed if self.keep_normed else normed.new_empty(0), residual_out
