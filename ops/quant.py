"""``tpfuse::all_reduce_add_rms_norm_quant``: the op with a quantized output, from schema to implementation.

What :mod:`tpfuse.ops.op` computes, and then an fp8 quantization of the normed rows, which were rounded to their dtype before.
The normed rows are returned as well when somebody reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import op, paths, quant_cuda
from .arguments import check_residual, same_sizes
from .flavour import LLAMA, Flavour
from .operands import Operands
from .quant_reference import empty_scales
from .quantization import NAME, Quantization, Results
from .quantizer import Quantizer

SCHEMA = (
    f"{NAME}(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float scale, str flavour, bool post_norm, "
    "str group_name, str quantizer, Tensor? static_scale, bool keep_normed) -> "
    "(Tensor quantized, Tensor scales, Tensor normed, Tensor residual_out)"
)
op.library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def _cpu(*args: Any) -> Results:
    check_residual(NAME, *args[:2])
    asked = Quantization.of(args[0], *args[9:])
    return asked.results(*op.on_a_cpu(Operands.of(*args[:9])))


def _fake(*args: Any, **kwargs: Any) -> Results:
    asked = Quantization.of(
        kwargs["x"] if "x" in kwargs else args[0],
        *args[9:],
        **{name: kwargs.pop(name) for name in ("quantizer", "static_scale", "keep_normed") if name in kwargs},
    )
    given = Operands.of(*args[:9], same=same_sizes, **kwargs)
    check_residual(NAME, given.x, given.residual)
    normed, residual_out = op.empty_results(given)
    quantized = normed.new_empty(normed.shape, dtype=asked.quantizer.torch_dtype)
    scales = empty_scales(normed, asked.quantizer)
    return quantized, scales, normed if asked.keep_normed else normed.new_empty(0), residual_out


op.library.impl(NAME, _cpu, "CPU")
op.library.impl(NAME, quant_cuda.run, "CUDA")
torch.library.register_fake(f"tpfuse::{NAME}", _fake, lib=op.library)


def all_reduce_add_rms_norm_quant(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    quantizer: Quantizer | str,
    static_scale: Tensor | None = None,
    keep_normed: bool = False,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    scale: float = 1.0,
    flavour: Flavour | str = LLAMA,
    post_norm: bool = False,
    group: torch.distributed.ProcessGroup | str | None = None,
) -> Results:
    """Sum ``x`` over the ranks of ``group``, add the residual, normalize and quantize to fp8, in one op.

    Args:
        x, residual, weight, eps, bias, scale, flavour, post_norm, group: as in :func:`all_reduce_add_rms_norm`, without fp64.
        quantizer: the arithmetic of the quantization; see :class:`tpfuse.ops.Quantizer`.
        static_scale: one fp32 value on the device of ``x``, exactly with ``granularity="tensor"``.
        keep_normed: return the normed rows as well, for readers that are not quantized.
    Returns:
        ``(quantized, scales, normed, residual_out)``: ``quantized`` has the shape of ``x`` in fp8; ``scales`` is ``(..., 1)``
        fp32 per token, ``(..., ceil(H / 128))`` fp32 per group (in the layout ``ue8m0`` ``(..., ceil(H / 512))`` int32), and
        ``(0,)`` with a static scale; ``normed`` is ``(0,)`` unless ``keep_normed``; ``residual_out`` as in
        :func:`all_reduce_add_rms_norm`.
    Raises:
        ValueError: a shape, dtype or the quantizer does not fit; the message names the argument.
        RuntimeError: autograd would have to record the op.
    """
    given = (x, residual, weight, bias, eps, scale, str(flavour), post_norm, paths.group_name_of(group))
    return torch.ops.tpfuse.all_reduce_add_rms_norm_quant(*given, str(quantizer), static_scale, keep_normed)
