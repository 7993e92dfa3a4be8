"""A call of the op with a LayerNorm on a CUDA device; :mod:`.cuda` is the same for an RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from tpfuse import compat

from . import invariant, library, paths
from .cuda import aligned
from .kernels.variant import torch_dtype
from .layer_norm_flavour import LayerNormFlavour
from .layer_norm_operands import LayerNormOperands
from .plane import Plane
from .prepare import PREPARED, LayerNormKind, Prepared, prepare_once
from .schedule import Launch, schedule_of


def run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    addend: Tensor | None,
    eps: float,
    scale: float,
    flavour: str,
    group_name: str,
    partial_addend: bool = False,
    addend_bias: Tensor | None = None,
    residual_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """A call; arguments in the order of the schema."""
    index = x.device.index
    if compat.current_device() != index:
        with torch.cuda.device(index):  # launches and the vote go to the current device
            more = (group_name, partial_addend, addend_bias, residual_first)
            return run(x, residual, weight, norm_bias, bias, addend, eps, scale, flavour, *more)
    parsed = LayerNormFlavour.parse(flavour)
    more = (group_name, partial_addend, addend_bias, residual_first)
    given = LayerNormOperands(x, residual, weight, norm_bias, bias, addend, eps, scale, parsed, *more)
    given.check()
    shift = None if norm_bias is None else norm_bias.dtype
    key = (
        *(group_name, "layer_norm", x.dtype, x.shape[-1], flavour, scale != 1.0, residual is None, x.dim(), index),
        *(None if weight is None else weight.dtype, shift, 0 if bias is None else bias.dim(), addend is None),
        *(paths.current_stream_class(), partial_addend, addend_bias is None, residual_first, given.dtype),
    )
    prepared = PREPARED.get(key)
    if prepared is None or not paths.is_current(group_name, prepared.held):
        kind = LayerNormKind(parsed, shift, addend is not None, partial_addend, addend_bias is not None)
        asked = (scale, str(parsed.scaling), False, group_name, None, kind)
        prepared = prepare_once(key, x, residual, weight, bias, *asked, residual_first=residual_first)
    normed = torch.empty_like(x, dtype=prepared.normed_dtype, memory_format=torch.contiguous_format)
    residual_out = torch.empty_like(x, dtype=prepared.residual_dtype, memory_format=torch.contiguous_format)
    c, rows = prepared.constants, x.numel() // x.shape[-1] if x.numel() else 0
    if rows == 0:
        return normed, residual_out  # every rank of the group has zero rows: nothing to exchange
    if c is None:
        return library.exact_layer_norm(given)
    given = given._replace(
        x=aligned(x),  # type: ignore[arg-type]
        residual=aligned(residual),
        weight=aligned(weight),
        norm_bias=aligned(norm_bias),
        bias=aligned(bias),
        addend=aligned(addend),
        addend_bias=aligned(addend_bias),
    )
    p, settings = prepared.path.plane, prepared.path.settings
    if p is not None:
        if p.seen[0]:
            p.raise_if_failed()
        schedule = prepared.schedules.get(rows)
        if schedule is None:
            found = schedule_of(p, settings, c, torch_dtype(c.dtype), rows)
            schedule = prepared.schedules.setdefault(rows, found)
        if schedule.launches:
            _launch(schedule.launches, p, prepared, given, normed, residual_out)
            return normed, residual_out
    summed = invariant.sum_in_rank_order if settings.batch_invariant else library.all_reduce
    reduced, given = given.reduced(summed)  # rounded
    if partial_addend or c.wide_sum:
        c = c.sums_known
        if addend_bias is not None:
            given = given._replace(addend=given.addend + addend_bias)  # type: ignore[operator]
    operands = given.residual, given.weight, given.bias
    library.add_norm(reduced, *operands, normed, residual_out, eps, scale, c, (given.norm_bias, given.addend))
    return normed, residual_out


def _launch(
    launches: tuple[Launch, ...],
    p: Plane,
    prepared: Prepared,
    given: LayerNormOperands,
    normed: Tensor,
    residual_out: Tensor,
) -> None:
    """Start the kernels of a call. Tensors are contiguous and 16-byte aligned."""
    c = prepared.constants
    assert c is not None
    stream = compat.current_stream_handle(given.x.device.index)
    if stream != p.streams.last:
        p.on_another_stream(stream)
    tensors = [given.x, given.residual, normed, residual_out, given.addend, given.bias if c.bias == "full" else None]
    for launch in launches:
        x, residual, norms, sums, addend, bias = tensors
        if len(launches) > 1:
            part = slice(launch.start, launch.start + launch.rows)
            x, residual, norms, sums, addend, bias = (
                None if t is None else t.view(-1, c.hidden)[part] for t in tensors
            )
        bias = given.bias if c.bias != "full" else bias
        # Triton wants pointers of the right dtype also for what is neither read nor written.
        operands = [x, residual, given.weight, bias, norms, sums, given.norm_bias, addend]
        if c.partial_addend:
            operands.append(given.addend_bias)
        named = [x if t is None else t for t in operands]
        args = (
            *named,
            *(p.peers, p.state, p.rank, launch.rows, p.phase_bytes, prepared.limit, given.eps, given.scale),
        )
        if not launch.kernel.ready:
            launch.kernel.compile(*args)
        launch.kernel(launch.programs, stream, *args)
