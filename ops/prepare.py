"""The first call of a kind: the path of its group, compile-time constants, and every kernel that a later call may need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import compat

from . import invariant, layer_norm_reference, paths, reference, vote
from .arguments import check, check_scale
from .flavour import Flavour
from .kernel import Kernel
from .kernels.variant import Constants, centered, constants, supports, torch_dtype
from .layer_norm_flavour import LayerNormFlavour
from .paths import GroupPath
from .plane import Plane
from .quant_reference import scales_like
from .quantizer import Quantizer
from .schedule import Schedule, kernels_needed

LOAD_AHEAD = True  # tests that load what they need by themselves switch it off


class LayerNormKind(NamedTuple):
    """What a call with a LayerNorm asks for besides what one with an RMSNorm does.

    Attributes:
        shift: the dtype of what is added behind the weight.
        addend, partial, addend_bias: whether there is an addend, whether it is a partial sum, and whether that has a vector.
    """

    flavour: LayerNormFlavour
    shift: torch.dtype | None
    addend: bool
    partial: bool = False
    addend_bias: bool = False


@dataclass
class Prepared:
    """Everything about calls of one kind (dtype, H, flavour, optional arguments, group, stream class)."""

    path: GroupPath
    flavour: Flavour  # of a LayerNorm: what scales alike
    constants: Constants | None  # None: no kernel takes this kind of call
    why_not: str | None
    normed_dtype: torch.dtype
    residual_dtype: torch.dtype
    limit: int  # of the watchdog, nanoseconds
    held: paths.Held = None
    schedules: dict[int, Schedule] = field(default_factory=dict)
    without_gather: dict[int, Schedule] = field(default_factory=dict)  # of blocks too large for a kernel that gathers


PREPARED: dict[tuple[Any, ...], Prepared] = {}


def prepare_once(key: tuple[Any, ...], *arguments: Any, **more: Any) -> Prepared:
    """:func:`prepare`, unless another thread did meanwhile: it votes, so each rank must do it as often as the others."""
    group_name = key[0]
    with paths.lock_of(group_name):
        prepared = PREPARED.get(key)
        if prepared is None or not paths.is_current(group_name, prepared.held):
            forget_the_gone()
            prepared = prepare(key, *arguments, **more)
        return prepared


def prepare(
    key: tuple[Any, ...],
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    flavour: str,
    post_norm: bool,
    group_name: str,
    load: Callable[[Prepared, Plane, torch.dtype], None] | None = None,
    layer_norm: LayerNormKind | None = None,
    *,
    scale_tensor: Tensor | None = None,
    scale_first: bool = False,
    partial_bias: bool = False,
    residual_first: bool = False,
) -> Prepared:
    """Everything about calls like this one; votes on the group's path where nobody has.

    Args:
        load: compiles and loads the kernels of such calls; None is for the kernels of the all-reduce.
        layer_norm: of calls with a LayerNorm; ``flavour`` is then that of the same scaling.
    """
    parsed = Flavour.parse(flavour)
    check(x, residual, weight, bias, parsed, post_norm)
    dtype = reference.sum_dtype(x, residual)
    check_scale(x, scale, scale_tensor, dtype)
    weight_dtype = None if weight is None else weight.dtype
    hidden = x.shape[-1]
    path = paths.path_of(group_name, x.device)
    why_not = supports(dtype, weight_dtype, hidden, parsed)
    if why_not is None and layer_norm is not None and layer_norm.shift not in (None, dtype, torch.float32):
        why_not = f"a {layer_norm.shift} norm_bias with {dtype} activations"
    if why_not and path.settings.batch_invariant:
        raise RuntimeError(
            f"tpfuse: batch_invariant is on, and no kernel takes this call: {why_not}. The group's own all-reduce and torch's "
            "norm would give bits that depend on the number of rows. Use a dtype, H and norm that the kernels take "
            "(docs/op.md), or switch batch_invariant off on all ranks"
        )
    invariant.remember(group_name)
    normed_dtype = reference.output_dtype(dtype, weight_dtype, parsed)
    wide = residual is not None and residual.dtype != dtype
    prepared = Prepared(
        path=path,
        flavour=parsed,
        constants=None
        if why_not
        else constants(
            dtype,
            weight_dtype,
            hidden,
            parsed,
            bias=_bias_of(x, bias, partial_bias),
            scaled=scale != 1.0 or scale_tensor is not None,
            has_residual=residual is not None,
            post_norm=post_norm,
            scale_loaded=scale_tensor is not None,
            scale_by_row=scale_tensor is not None and scale_tensor.dim() > 0,
            scale_first=scale_first,
            wide_residual=wide,
            residual_first=residual_first,
            wide_sum=x.dtype != dtype,
        ),
        why_not=why_not,
        normed_dtype=normed_dtype,
        residual_dtype=reference.residual_dtype(
            dtype, normed_dtype, post_norm, None if residual is None else residual.dtype
        ),
        limit=int(path.settings.watchdog_seconds * 1e9),
        held=compat.group_reference(compat.resolve_group(group_name)),
    )
    if layer_norm is not None:
        kind, shift, *addend = layer_norm
        prepared.normed_dtype = layer_norm_reference.output_dtype(dtype, weight_dtype, shift, kind)
        if prepared.constants is not None:
            prepared.constants = centered(prepared.constants, shift, prepared.normed_dtype, *addend)
    if prepared.constants is not None and path.plane is not None:
        (load or _load_kernels)(prepared, path.plane, dtype)
    PREPARED[key] = prepared
    return prepared


def _bias_of(x: Tensor, bias: Tensor | None, partial: bool) -> str:
    """What the bias is to a kernel."""
    if bias is None:
        return "none"
    if partial:
        return "partial"
    return "full" if bias.shape == x.shape and x.dim() > 1 else "row"


def _load_kernels(prepared: Prepared, p: Plane, dtype: torch.dtype) -> None:
    """Compile and load the kernels for every row count before any of them runs.

    Loading a kernel may wait for the device, and the device may be busy with a kernel that waits for this rank. So all
    ranks load first and meet before the first launch. Inside CUDA-graph capture nobody runs, and nobody can meet.
    """
    assert prepared.constants is not None
    load_ahead(kernels_needed(p, prepared.path.settings, prepared.constants, dtype), p, samples(prepared.constants, p))


def load_ahead(kernels: list[Kernel], p: Plane, args: tuple[Any, ...]) -> None:
    """:func:`load_together` in one order on all ranks, for each compiles its share; nothing where tests load by themselves."""
    if LOAD_AHEAD:
        load_together(sorted(kernels, key=lambda k: repr(k.constexprs)), p, args)


def load_together(kernels: list[Kernel], p: Plane, args: tuple[Any, ...]) -> None:
    """Compile and load kernels on all ranks: each compiles its share, then all load everything from Triton's cache."""
    if torch.cuda.is_current_stream_capturing():
        for kernel in kernels:
            kernel.compile(*args)
        return
    group = compat.resolve_group(p.group_name)
    for mine in (True, False):
        for number, kernel in enumerate(kernels):
            if (number % p.world == p.rank) == mine and not kernel.ready:
                kernel.compile(*args)
        vote.everyone(None, group, p.world)


def samples(c: Constants, p: Plane, counts: int = 1, quantizer: Quantizer | None = None) -> tuple[Any, ...]:
    """Arguments of the right types to compile a kernel with; Triton takes a dtype for a pointer to aligned memory.

    No tensors: nothing has to be allocated for them.

    Args:
        counts: how many numbers of rows the kernel takes.
        quantizer: of a kernel that quantizes.
    """
    x, own, normed, residual_out = (torch_dtype(d) for d in (c.x_in, c.dtype, c.out_dtype, c.residual_dtype))
    tables = (torch.int64, torch.int32)
    # What there is not, x stands for.
    shift, addend = torch_dtype(c.shift_dtype or c.x_in), own if c.has_addend else x
    more: tuple[Any, ...] = (shift, addend) if c.centered else ()
    more += (x,) if c.partial_addend else ()
    if quantizer is not None:
        more = (torch.uint8, scales_like((1, c.hidden), quantizer)[2], torch.float32, 1)
    return (
        x,
        torch_dtype(c.residual_in) if c.has_residual else x,
        torch_dtype(c.weight_dtype) if c.has_weight else x,
        own if c.bias != "none" else x,
        normed,
        residual_out,
        *more,
        *tables,
        p.rank,
        *(1,) * counts,
        p.phase_bytes,
        1 << 40,
        1e-6,
        own if c.scale_loaded else 1.0,
    )


def forget(group: dist.ProcessGroup | str) -> None:
    """Drop planes and plans of a group that is about to be destroyed."""
    name = paths.group_name_of(group)
    paths.forget(name)
    invariant.forget(name)
    for key in [k for k in list(PREPARED) if k[0] == name]:
        PREPARED.pop(key, None)


def forget_the_gone() -> None:
    """Drop what was prepared for groups that were destroyed, and for no other."""
    for key, prepared in list(PREPARED.items()):
        if not paths.is_current(key[0], prepared.held):
            PREPARED.pop(key, None)
