"""The hot path: one call of the op on a CUDA device, as cheaply as Python can.

Everything that does not change between calls of one site is worked out once and kept in a :class:`.prepare.Prepared`: the path of
the group, compile-time constants, compiled kernels. A call then costs one dictionary lookup, the shape checks, two
allocations and the launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpfuse import compat

from . import invariant, library, paths
from .arguments import check, check_scale, refuse_gradients
from .flavour import Flavour
from .kernels.variant import torch_dtype
from .operands import Operands
from .outputs import check_memory, check_out
from .plane import Plane
from .prepare import PREPARED, Prepared, prepare_once
from .reference import sum_dtype
from .schedule import Launch, schedule_of


def aligned(t: Tensor | None) -> Tensor | None:
    """``t`` contiguous and 16-byte aligned: what 16-byte accesses need."""
    if t is None:
        return None
    if not t.is_contiguous():
        t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float,
    flavour: str,
    post_norm: bool,
    group_name: str,
    scale_tensor: Tensor | None = None,
    scale_first: bool = False,
    partial_bias: bool = False,
    residual_first: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    refuse_gradients(x, residual, weight, bias, scale_tensor)
    index = x.device.index
    if compat.current_device() != index:
        with torch.cuda.device(index):  # launches and the vote go to the current device
            more = (group_name, scale_tensor, scale_first, partial_bias, residual_first)
            return run(x, residual, weight, bias, eps, scale, flavour, post_norm, *more, out=out)
    dims = x.dim()
    key: tuple[Any, ...] = (
        group_name,
        x.dtype,
        x.shape[-1] if dims else 0,
        flavour,
        scale != 1.0,
        residual is None,
        None if weight is None else weight.dtype,
        0 if bias is None else bias.dim(),
        dims,
        post_norm,
        index,
        paths.current_stream_class(),
        0 if scale_tensor is None else 1 + (scale_tensor.dim() > 0),
        scale_first,
        None if residual is None else residual.dtype,
    )
    if partial_bias or residual_first:
        more = (group_name, scale_tensor, scale_first, partial_bias, residual_first)
        Operands(x, residual, weight, bias, eps, scale, Flavour.parse(flavour), post_norm, *more).check_two_sums()
        key += (partial_bias, residual_first)
    prepared = PREPARED.get(key)
    if prepared is None or not paths.is_current(group_name, prepared.held):
        rest = {"scale_tensor": scale_tensor, "scale_first": scale_first}
        rest.update(partial_bias=partial_bias, residual_first=residual_first)
        prepared = prepare_once(key, x, residual, weight, bias, scale, flavour, post_norm, group_name, **rest)
    else:
        check(x, residual, weight, bias, prepared.flavour, post_norm)
        if scale_tensor is not None:
            check_scale(x, scale, scale_tensor, sum_dtype(x, residual))
    if out is None:
        normed = torch.empty_like(x, dtype=prepared.normed_dtype, memory_format=torch.contiguous_format)
        residual_out = torch.empty_like(x, dtype=prepared.residual_dtype, memory_format=torch.contiguous_format)
    else:
        more = (group_name, scale_tensor, scale_first, partial_bias, residual_first)
        operands = Operands(x, residual, weight, bias, eps, scale, prepared.flavour, post_norm, *more)
        check_out(operands, out, (prepared.normed_dtype, prepared.residual_dtype))
        check_memory(operands, out)
        normed, residual_out = out
    values = x.numel()
    rows = values // x.shape[-1] if values else 0
    if rows == 0:
        return normed, residual_out  # every rank of the group has zero rows: nothing to exchange
    c = prepared.constants
    if c is None:
        more = (group_name, scale_tensor, scale_first, partial_bias, residual_first)
        operands = Operands(x, residual, weight, bias, eps, scale, prepared.flavour, post_norm, *more)
        found = library.exact(operands)
        return found if out is None else (normed.copy_(found[0]), residual_out.copy_(found[1]))
    x, residual, weight, bias = aligned(x), aligned(residual), aligned(weight), aligned(bias)  # type: ignore[assignment]
    factor: float | Tensor = scale if scale_tensor is None else aligned(scale_tensor)  # type: ignore[assignment]
    p = prepared.path.plane
    if p is not None:
        if p.seen[0]:
            p.raise_if_failed()
        schedule = prepared.schedules.get(rows)
        if schedule is None:
            made = schedule_of(p, prepared.path.settings, c, torch_dtype(c.dtype), rows)
            schedule = prepared.schedules.setdefault(rows, made)
        if schedule.launches:
            stream = compat.current_stream_handle(index)
            if stream != p.streams.last:
                p.on_another_stream(stream)
            if len(schedule.launches) == 1:
                start(
                    schedule.launches[0],
                    stream,
                    p,
                    prepared,
                    x,
                    residual,
                    weight,
                    bias,
                    normed,
                    residual_out,
                    eps,
                    factor,
                )
            else:
                flat = [None if t is None else t.view(rows, -1) for t in (x, residual, normed, residual_out)]
                full_bias = c.bias in ("full", "partial")
                for launch in schedule.launches:
                    part = slice(launch.start, launch.start + launch.rows)
                    xs, rs, ns, hs = (None if t is None else t[part] for t in flat)
                    bs = bias.view(rows, -1)[part] if full_bias else bias  # type: ignore[union-attr]
                    by = aligned(factor.view(-1)[part]) if c.scale_by_row else factor  # type: ignore[union-attr]
                    start(launch, stream, p, prepared, xs, rs, weight, bs, ns, hs, eps, by)  # type: ignore[arg-type]
            return normed, residual_out
    # The add and norm behind it take one program a row, with the sums of the other kernels: no row sees another.
    in_order = prepared.path.settings.batch_invariant
    summed = invariant.sum_in_rank_order if in_order else library.all_reduce
    # A sum that is taken here is rounded here, its zeros made positive; another one by the kernel behind it.
    reduced = summed(x, group_name, torch_dtype(c.dtype) if in_order else None)
    if partial_bias or (in_order and c.wide_sum):
        bias, c = summed(bias, group_name) if partial_bias else bias, c.sums_known  # type: ignore[arg-type]
    library.add_norm(reduced, residual, weight, bias, normed, residual_out, eps, factor, c)
    return normed, residual_out


def start(
    launch: Launch,
    stream: int,
    p: Plane,
    prepared: Prepared,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    normed: Tensor,
    residual_out: Tensor,
    eps: float,
    scale: float | Tensor,
) -> None:
    """One launch, compiled first where it is not. Tensors are contiguous and 16-byte aligned; so is a scale that is one."""
    kernel = launch.kernel
    args = (
        x,
        x if residual is None else residual,
        x if weight is None else weight,
        x if bias is None else bias,
        normed,
        residual_out,
        p.peers,
        p.state,
        p.rank,
        launch.rows,
        p.phase_bytes,
        prepared.limit,
        eps,
        scale,
    )
    if not kernel.ready:
        kernel.compile(*args)
    kernel(launch.programs, stream, *args)
