"""A call of the quantized op on a CUDA device: quantized in the kernel that norms, or behind it by a kernel of its own.

A kernel that sums over the ranks has few programs, as all of them wait for peers, and quantizes with those. With many rows a
kernel behind it, which has the whole GPU, is faster: ``TPFUSE_QUANT_ROWS`` says up to how many rows it is one kernel. The library
path quantizes in the kernel that norms, whatever the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from tpfuse import compat

from . import cuda, invariant, library, paths
from .arguments import check, check_residual, refuse_gradients
from .kernels.quant_constants import quantized, supports_quantizer
from .kernels.variant import Constants
from .operands import Operands
from .plane import Plane
from .prepare import PREPARED, Prepared, load_ahead, prepare_once, samples
from .quant_reference import empty_scales
from .quantization import NAME, Quantization, Results
from .quantizer import Quantizer
from .schedule import Launch, Schedule, kernels_needed, schedule_of


@dataclass(frozen=True)
class Outputs:
    """The tensors that a call writes. ``normed`` is None where nobody asks for it and no kernel reads it."""

    quantized: Tensor
    scales: Tensor
    normed: Tensor | None
    residual_out: Tensor

    @classmethod
    def empty(cls, x: Tensor, prepared: Prepared, quantizer: Quantizer, with_normed: bool) -> Outputs:
        def like(dtype: torch.dtype) -> Tensor:
            return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)

        normed = like(prepared.normed_dtype) if with_normed else None
        return cls(like(quantizer.torch_dtype), empty_scales(x, quantizer), normed, like(prepared.residual_dtype))

    def rows(self, c: Constants, start: int, count: int) -> tuple[Any, ...]:
        """Rows ``[start, start + count)`` as the kernels take them: normed, residual_out, quantized, scales.

        The scales are only a place to begin at: rows of a column-major layout are beside each other.
        """
        part = slice(start, start + count)
        # Bytes: Triton knows fp8 types of the GPU at hand only.
        tensors = (self.normed, self.residual_out, self.quantized.view(torch.uint8))
        normed, residual_out, values = (None if t is None else t.view(-1, c.hidden)[part] for t in tensors)
        step = self.scales.shape[-1] if self.scales.stride(-1) == 1 else 1
        scales = self.scales.as_strided((max(0, self.scales.numel() - start * step),), (1,), start * step)
        return normed, residual_out, values, scales


def run(*args: Any) -> Results:
    """A call; arguments in the order of the schema."""
    x, residual, weight, bias, eps, scale, flavour, post_norm, group_name, text, static_scale, keep_normed = args
    refuse_gradients(x, residual, weight, bias)
    check_residual(NAME, x, residual)
    index = x.device.index
    if compat.current_device() != index:
        with torch.cuda.device(index):  # launches and the vote go to the current device
            return run(*args)
    asked = Quantization.of(x, text, static_scale, keep_normed)
    key = (
        *(
            group_name,
            text,
            keep_normed,
            x.dtype,
            x.shape[-1] if x.dim() else 0,
            flavour,
            scale != 1.0,
            residual is None,
        ),
        *(None if weight is None else weight.dtype, 0 if bias is None else bias.dim(), x.dim(), post_norm, index),
        paths.current_stream_class(),
    )
    prepared = PREPARED.get(key)
    if prepared is None or not paths.is_current(group_name, prepared.held):
        load = partial(_load, quantizer=asked.quantizer, keep_normed=keep_normed)
        prepared = prepare_once(key, x, residual, weight, bias, scale, flavour, post_norm, group_name, load)
    else:
        check(x, residual, weight, bias, prepared.flavour, post_norm)
    c, rows = prepared.constants, x.numel() // x.shape[-1]
    if rows == 0:  # on every rank of the group: nothing to exchange
        return _results(Outputs.empty(x, prepared, asked.quantizer, keep_normed), prepared, keep_normed)
    q = None if c is None else _constants(c, asked.quantizer, keep_normed, index)
    if c is None or q is None:  # torch's ops quantize what a kernel of ours, or the exact path, has normed
        return asked.results(*cuda.run(*args[:9]))
    t: list[Any] = [cuda.aligned(operand) for operand in (x, residual, weight, bias)]
    given = Operands(t[0], t[1], t[2], t[3], eps, scale, prepared.flavour, post_norm, group_name)
    schedule = _schedule(prepared, c, q, x.dtype, rows)
    if schedule is None:
        outputs = Outputs.empty(x, prepared, asked.quantizer, keep_normed)
        summed = invariant.sum_in_rank_order if prepared.path.settings.batch_invariant else library.all_reduce
        library.add_norm_quant(
            summed(given.x, group_name), given, outputs.rows(q, 0, rows), static_scale, q, outputs.scales
        )
        return _results(outputs, prepared, keep_normed)
    behind = rows > prepared.path.settings.quant_rows
    outputs = Outputs.empty(x, prepared, asked.quantizer, keep_normed or behind)
    _launch(schedule, prepared, given, outputs, static_scale, c if behind else q, rows)
    if behind:
        library.quantize_rows(outputs.rows(q, 0, rows), static_scale, q, outputs.scales)
    return _results(outputs, prepared, keep_normed)


def _results(outputs: Outputs, prepared: Prepared, keep_normed: bool) -> Results:
    normed = outputs.normed
    if normed is None or not keep_normed:
        normed = outputs.residual_out.new_empty(0, dtype=prepared.normed_dtype)
    return outputs.quantized, outputs.scales, normed, outputs.residual_out


@lru_cache(maxsize=512)
def _constants(c: Constants, quantizer: Quantizer, keep_normed: bool, device: int) -> Constants | None:
    """The constants of kernels that quantize, or None where they would not have the quantizer's bits."""
    if supports_quantizer(c, quantizer) is not None:
        return None
    converts = torch.cuda.get_device_capability(device) >= (8, 9)
    return quantized(c, quantizer, keep_normed, converts)


def _schedule(prepared: Prepared, c: Constants, q: Constants, dtype: torch.dtype, rows: int) -> Schedule | None:
    """The launches of a call with so many rows; None where it takes the library path."""
    p, settings = prepared.path.plane, prepared.path.settings
    if p is None:
        return None
    if p.seen[0]:
        p.raise_if_failed()
    found = prepared.schedules.get(rows)
    if found is None:
        found = schedule_of(p, settings, q if rows <= settings.quant_rows else c, dtype, rows)
        found = prepared.schedules.setdefault(rows, found)
    return found if found.launches else None


def _load(prepared: Prepared, p: Plane, dtype: torch.dtype, quantizer: Quantizer, keep_normed: bool) -> None:
    """Compile and load what calls of this kind may need: kernels that quantize for few rows, for more those that do not."""
    c, settings = prepared.constants, prepared.path.settings
    assert c is not None
    q = _constants(c, quantizer, keep_normed, p.device.index)
    load_ahead(kernels_needed(p, settings, c, dtype), p, samples(c, p))
    if q is not None:
        load_ahead(kernels_needed(p, settings, q, dtype, settings.quant_rows), p, samples(q, p, quantizer=quantizer))
        load_ahead([library.quantize_kernel_of(q)], p, library.quantize_samples(q, quantizer))


def _launch(
    schedule: Schedule,
    prepared: Prepared,
    given: Operands,
    outputs: Outputs,
    static_scale: Tensor | None,
    c: Constants,
    rows: int,
) -> None:
    """Start the kernels of a call: those that quantize where ``c`` says so, else those that only norm."""
    p = prepared.path.plane
    assert p is not None
    stream = compat.current_stream_handle(given.x.device.index)
    if stream != p.streams.last:
        p.on_another_stream(stream)
    x, residual, bias = (None if t is None else t.view(-1, c.hidden) for t in (given.x, given.residual, given.bias))
    for launch in schedule.launches:
        part = slice(launch.start, launch.start + launch.rows)
        xs, rs = x[part], None if residual is None else residual[part]  # type: ignore[index]
        bs = bias[part] if bias is not None and c.bias == "full" else given.bias
        normed, residual_out, values, scales = outputs.rows(c, launch.start, launch.rows)
        if c.quant is None:
            cuda.start(
                launch, stream, p, prepared, xs, rs, given.weight, bs, normed, residual_out, given.eps, given.scale
            )
            continue
        quantization = (values, scales, xs if static_scale is None else static_scale, outputs.scales.stride(-1))
        _start(launch, stream, p, prepared, given, (xs, rs, given.weight, bs, normed, residual_out), quantization)


def _start(
    launch: Launch,
    stream: int,
    p: Plane,
    prepared: Prepared,
    given: Operands,
    tensors: tuple[Tensor | None, ...],
    quantization: tuple[Any, ...],
) -> None:
    # Triton wants pointers of the right dtype also for what is neither read nor written.
    named = [tensors[0] if t is None else t for t in tensors]
    args = (
        *named,
        *quantization,
        *(p.peers, p.state, p.rank, launch.rows, p.phase_bytes, prepared.limit, given.eps, given.scale),
    )
    if not launch.kernel.ready:
        launch.kernel.compile(*args)
    launch.kernel(launch.programs, stream, *args)
