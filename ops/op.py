"""Schema, checks, fake and CPU implementation of ``tpfuse::all_reduce_add_rms_norm``.

The op is functional: it never writes its inputs and never returns one of them. The choice of algorithm happens inside
it, so a compiled graph is the same whatever path the group takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cuda, invariant, paths, settings
from .arguments import same_sizes
from .flavour import LLAMA, Flavour
from .layer_norm_operands import LayerNormOperands
from .library import exact
from .operands import Operands
from .outputs import check_memory, check_out

SCHEMA = (
    "all_reduce_add_rms_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float scale, "
    "str flavour, bool post_norm, str group_name, Tensor? scale_tensor=None, bool scale_first=False, "
    "bool partial_bias=False, bool residual_first=False) -> "
    "(Tensor normed, Tensor residual_out)"
)

# The same with the outputs given, for engines that hold buffers: the residual may be updated in place.
SCHEMA_OUT = (
    SCHEMA.partition(" -> ")[0]
    .replace("all_reduce_add_rms_norm(", "all_reduce_add_rms_norm_out(")
    .replace("str group_name,", "str group_name, Tensor(a!) normed, Tensor(b!) residual_out,")
    + " -> ()"
)
BEFORE_OUT = 9  # arguments before the outputs

library = torch.library.Library("tpfuse", "DEF")
for schema in (SCHEMA, SCHEMA_OUT):
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    return on_a_cpu(Operands.of(*args))


def on_a_cpu(given: Operands) -> tuple[Tensor, Tensor]:
    if given.x.numel() == 0:
        # Every rank of the group has the same (zero) number of rows, so all of them skip the collective.
        normed, residual_out = given.reference(given.x.clone(), *given.after_the_sum)
        return normed.contiguous(), residual_out.contiguous()
    if settings.batch_invariant():
        invariant.agree(given.group_name)
        return invariant.add_rms_norm(*given.reduced(invariant.sum_in_rank_order))
    invariant.remember(given.group_name)
    return exact(given)


def _fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return empty_results(Operands.of(*args, same=same_sizes, **kwargs))


def empty_results(given: Operands | LayerNormOperands) -> tuple[Tensor, Tensor]:
    """Two tensors of the shape of ``x`` in the dtypes of the results."""
    normed_dtype, residual_dtype = given.result_dtypes
    x = given.x
    return x.new_empty(x.shape, dtype=normed_dtype), x.new_empty(x.shape, dtype=residual_dtype)


def _cpu_out(*args: Any) -> None:
    before, out, behind = _parts(args)
    given = Operands.of(*before, *behind)
    check_out(given, out, given.result_dtypes)
    check_memory(given, out)
    for tensor, value in zip(out, on_a_cpu(given), strict=True):
        tensor.copy_(value)


def _parts(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor], tuple[Any, ...]]:
    """What is given to the op with outputs: the arguments before them, the outputs, the arguments behind."""
    normed, residual_out, *behind = args[BEFORE_OUT:]
    return args[:BEFORE_OUT], (normed, residual_out), tuple(behind)


def _cuda_out(*args: Any) -> None:
    before, out, behind = _parts(args)
    cuda.run(*before, *behind, out=out)  # type: ignore[misc]


def _fake_out(*args: Any, normed: Tensor | None = None, residual_out: Tensor | None = None, **kwargs: Any) -> None:
    if normed is None or residual_out is None:
        args, (normed, residual_out), behind = _parts(args)
        args += behind
    given = Operands.of(*args, same=same_sizes, **kwargs)
    check_out(given, (normed, residual_out), given.result_dtypes)


library.impl("all_reduce_add_rms_norm", _cpu, "CPU")
library.impl("all_reduce_add_rms_norm", cuda.run, "CUDA")
torch.library.register_fake("tpfuse::all_reduce_add_rms_norm", _fake, lib=library)
library.impl("all_reduce_add_rms_norm_out", _cpu_out, "CPU")
library.impl("all_reduce_add_rms_norm_out", _cuda_out, "CUDA")
torch.library.register_fake("tpfuse::all_reduce_add_rms_norm_out", _fake_out, lib=library)


def all_reduce_add_rms_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    flavour: Flavour | str = LLAMA,
    post_norm: bool = False,
    scale_first: bool = False,
    partial_bias: bool = False,
    residual_first: bool = False,
    group: torch.distributed.ProcessGroup | str | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum ``x`` over the ranks of ``group``, add the residual and normalize, in one op.

    Args:
        x: ``(..., H)`` fp32, bf16, fp16 or fp64: this rank's partial sum. Every rank passes the same shape and dtype.
        residual: ``x``'s shape and dtype, or None for the variant without a residual. Beside 16-bit ``x`` it may be fp32, with a
            flavour that has ``reads="unrounded"`` (autocast): it stays fp32, and so does ``residual_out``. Beside fp32 ``x`` it
            may be bf16 or fp16: the sum is taken in fp32 and rounded once to that dtype, which everything behind it has.
        weight: ``(H,)``, or None with a flavour whose gain is ``"none"``.
        eps: added to the mean of squares.
        bias: ``(H,)`` or ``x``'s shape, added to the sum before scale and residual, or None.
        scale: multiplied into the sum after the bias (Granite's residual multiplier): a number, or a tensor without dimensions
            of ``x``'s dtype, whose value each rank reads in each call; or one value for each row, ``(..., 1)`` (a gate).
        flavour: the rounding order of the norm; see :class:`tpfuse.ops.Flavour`.
        post_norm: normalize the sum and add the residual after it (Gemma2, OLMo2).
        scale_first: multiply by ``scale`` before the bias is added (Laguna).
        partial_bias: ``bias``, of ``x``'s shape, is this rank's partial sum as well: what is added is its sum over the ranks,
            rounded as that of ``x`` is. The same as ``bias=`` with its all-reduce, in the same kernel (a MoE layer and its
            shared experts, attention and MLP side by side).
        residual_first: with ``partial_bias``: ``h = (residual + sum) + sum of bias``, without a scale (Cohere).
        group: a process group or its name; None is the default group.
        out: ``(normed, residual_out)`` to write into, of the shape of ``x``, contiguous and 16-byte aligned. ``residual_out`` may
            be ``residual`` itself, and ``normed`` may be ``x`` itself; they share no other memory. None allocates both.
    Returns:
        ``(normed, residual_out)``: with ``post_norm=False`` ``(norm(h), h)`` where ``h = residual + scale * (sum + bias)``;
        with ``post_norm=True`` ``(norm(y), residual + norm(y))`` where ``y = scale * (sum + bias)``, or with ``scale_first``
        ``scale * sum + bias``.
    Raises:
        ValueError: a shape, dtype or device does not fit, or there is no group; the message names the argument.
        TypeError: ``group`` is neither a group nor a name.
        RuntimeError: autograd would have to record the op.
    """
    name = paths.group_name_of(group, "all_reduce_add_rms_norm: ")
    number, tensor = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
    given = (x, residual, weight, bias, eps, number, str(flavour), post_norm, name)
    if out is None:
        return torch.ops.tpfuse.all_reduce_add_rms_norm(*given, tensor, scale_first, partial_bias, residual_first)
    if len(out) != 2:
        raise ValueError(f"all_reduce_add_rms_norm: out has {len(out)} tensors; expected (normed, residual_out)")
    torch.ops.tpfuse.all_reduce_add_rms_norm_out(*given, *out, tensor, scale_first, partial_bias, residual_first)
    return out
