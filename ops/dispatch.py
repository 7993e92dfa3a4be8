"""The CUDA implementation of the op: from arguments to launches, as cheaply as Python can.

Everything that does not change between calls of one site is worked out once and kept in a :class:`Prepared`: the path of
the group, compile-time constants, compiled kernels. A call then costs one dictionary lookup, the shape checks, two
allocations and the launch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import compat

from . import invariant, library_path, plane, reference
from .flavour import Flavour
from .kernels.constants import Constants, Variant, constants, supports, torch_dtype
from .launch import MAX_PROGRAMS, Geometry, Kernel, Part, Room, geometry, register_bound
from .op import check, library, refuse_gradients
from .plane import GroupPath, Plane
from .select import Selection, entry, select

LOAD_AHEAD = True  # tests that load what they need by themselves switch it off


@dataclass(frozen=True)
class Launch:
    """One kernel launch: rows ``[start, start + rows)`` by ``programs`` programs."""

    kernel: Kernel
    programs: int
    start: int
    rows: int


@dataclass(frozen=True)
class Plan:
    """What a call with a given number of rows does: launches, or the library path when there are none."""

    selection: Selection
    launches: tuple[Launch, ...]


@dataclass
class Prepared:
    """Everything about calls of one kind (dtype, H, flavour, optional arguments, group, stream class)."""

    path: GroupPath
    flavour: Flavour
    constants: Constants | None  # None: no kernel takes this kind of call
    why_not: str | None
    normed_dtype: torch.dtype
    residual_dtype: torch.dtype
    limit: int  # of the watchdog, nanoseconds
    held: plane.Held = None
    plans: dict[int, Plan] = field(default_factory=dict)


_prepared: dict[tuple[Any, ...], Prepared] = {}
_kernels: dict[tuple[Any, ...], Kernel] = {}


def kernel_of(algorithm: str, c: Constants, variant: Variant, attribute: bool = True) -> Kernel:
    """The kernel of a launch, not necessarily compiled yet.

    Args:
        attribute: with a ``variant.pdl``, launch it with the attribute that lets it start before its predecessor has ended.
    """
    key = (algorithm, c, variant, attribute)
    found = _kernels.get(key)
    if found is None:
        from .kernels.one_shot import one_shot_kernel
        from .kernels.two_shot import two_shot_kernel

        function = one_shot_kernel if algorithm == "one_shot" else two_shot_kernel
        options: dict[str, Any] = {
            "maxnreg": register_bound(algorithm, variant.world, Part(variant.lanes, variant.steps))
        }
        if variant.pdl != "off" and attribute:
            options["launch_pdl"] = True
        found = _kernels[key] = Kernel(function, variant.lanes, (c, variant), **options)
    return found


def plan_of(
    p: Plane,
    settings: plane.Settings,
    c: Constants,
    dtype: torch.dtype,
    rows: int,
    wait: bool = True,
    shape_of: Callable[[int], Geometry] | None = None,
) -> Plan:
    """Selection, geometry and kernels of a call. Pure apart from the cache of kernels.

    Args:
        wait: False for the benchmarks' floor: kernels that wait for nobody.
        shape_of: for experiments: rows of a launch -> its geometry, instead of :func:`tpfuse.ops.launch.geometry`.
    """
    chosen = select(
        p.architecture,
        p.world,
        dtype,
        c.hidden,
        rows,
        override=settings.algorithm,
        table=settings.table,
        batch_invariant=settings.batch_invariant,
    )
    if chosen.algorithm == "library":
        return Plan(chosen, ())
    room, pdl = _room(p, settings, chosen.algorithm), _pdl(p, settings)
    launches = []
    for start in range(0, rows, chosen.rows_per_launch):
        n = min(chosen.rows_per_launch, rows - start)
        shape = geometry(room, n, c.groups) if shape_of is None else shape_of(n)
        variant, attribute = variant_of(room, shape, pdl, wait)
        kernel = kernel_of(chosen.algorithm, c, variant, attribute)
        launches.append(Launch(kernel, shape.programs, start, n))
    return Plan(chosen, tuple(launches))


def _room(p: Plane, settings: plane.Settings, algorithm: str) -> Room:
    processors = torch.cuda.get_device_properties(p.device).multi_processor_count
    packed = settings.shared_gpu == "packed"
    return Room(algorithm, p.world, processors, p.sharers, settings.concurrent_planes, packed)


def _pdl(p: Plane, settings: plane.Settings) -> str:
    return settings.dependent_launch if torch.cuda.get_device_capability(p.device) >= (9, 0) else "off"


def variant_of(room: Room, shape: Geometry, pdl: str, wait: bool = True) -> tuple[Variant, bool]:
    """The variant of a launch of this geometry, and whether it may start before its predecessor has ended. Pure."""
    attribute = True
    if pdl == "early" and room.waiting_kernels > 1 and 2 * shape.programs > room.fits(shape.part):
        # Early launch puts two kernels of a rank side by side. Where several kernels wait on one GPU, only two small
        # ones fit for sure. A large one neither starts early nor lets its successor start before its polls are over.
        pdl, attribute = "end", False
    return Variant(room.world, shape.part.lanes, shape.part.steps, shape.split, wait=wait, pdl=pdl), attribute


def variants_needed(room: Room, most: int, groups: int, pdl: str) -> set[tuple[Variant, bool]]:
    """What launches of 1 to ``most`` rows need, whatever rows a call has. Pure.

    Beyond ``MAX_PROGRAMS`` rows, and as many as there are multiprocessors, every launch has one geometry.
    """
    same_from = max(MAX_PROGRAMS, room.multiprocessors) + 1
    counts = {*range(1, min(most, same_from) + 1), most}
    return {variant_of(room, geometry(room, n, groups), pdl) for n in counts}


def largest_launches(
    architecture: str, world: int, dtype: torch.dtype, hidden: int, settings: plane.Settings
) -> dict[str, int]:
    """Algorithm -> most rows of one launch, over calls of any number of rows. Pure."""
    thresholds = entry(architecture, world, settings.table)
    row_bytes = hidden * dtype.itemsize
    ends = {thresholds.one_shot_bytes // row_bytes, thresholds.two_shot_bytes // row_bytes}
    found: dict[str, int] = {}
    for rows in sorted({1, *(max(1, n + more) for n in ends for more in (0, 1))}):
        chosen = select(
            architecture,
            world,
            dtype,
            hidden,
            rows,
            override=settings.algorithm,
            table=settings.table,
            batch_invariant=settings.batch_invariant,
        )
        if chosen.algorithm != "library":
            found[chosen.algorithm] = max(found.get(chosen.algorithm, 0), chosen.rows_per_launch)
    return found


def kernels_needed(p: Plane, settings: plane.Settings, c: Constants, dtype: torch.dtype) -> list[Kernel]:
    """Every kernel that a call of this kind may need, whatever its rows."""
    pdl = _pdl(p, settings)
    return [
        kernel_of(algorithm, c, variant, attribute)
        for algorithm, most in largest_launches(p.architecture, p.world, dtype, c.hidden, settings).items()
        for variant, attribute in variants_needed(_room(p, settings, algorithm), most, c.groups, pdl)
    ]


def _prepare(
    key: tuple[Any, ...],
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    flavour: str,
    post_norm: bool,
    group_name: str,
) -> Prepared:
    parsed = Flavour.parse(flavour)
    check(x, residual, weight, bias, parsed, post_norm)
    weight_dtype = None if weight is None else weight.dtype
    hidden = x.shape[-1]
    path = plane.path_of(group_name, x.device)
    why_not = supports(x.dtype, weight_dtype, hidden, parsed)
    if why_not and path.settings.batch_invariant:
        raise RuntimeError(
            f"tpfuse: batch_invariant is on, and no kernel takes this call: {why_not}. The group's own all-reduce and torch's "
            "norm would give bits that depend on the number of rows. Use a dtype, H and norm that the kernels take "
            "(docs/op.md), or switch batch_invariant off on all ranks"
        )
    invariant.remember(group_name)
    normed_dtype = reference.output_dtype(x.dtype, weight_dtype, parsed)
    prepared = Prepared(
        path=path,
        flavour=parsed,
        constants=None
        if why_not
        else constants(
            x.dtype,
            weight_dtype,
            hidden,
            parsed,
            bias="none" if bias is None else "full" if bias.shape == x.shape and x.dim() > 1 else "row",
            scaled=scale != 1.0,
            has_residual=residual is not None,
            post_norm=post_norm,
        ),
        why_not=why_not,
        normed_dtype=normed_dtype,
        residual_dtype=torch.promote_types(x.dtype, normed_dtype) if post_norm else x.dtype,
        limit=int(path.settings.watchdog_seconds * 1e9),
        held=weakref.ref(compat.resolve_group(group_name)),
    )
    if prepared.constants is not None and path.plane is not None:
        _load_kernels(prepared, path.plane, x.dtype)
    _prepared[key] = prepared
    return prepared


def _load_kernels(prepared: Prepared, p: Plane, dtype: torch.dtype) -> None:
    """Compile and load the kernels for every row count before any of them runs.

    Loading a kernel may wait for the device, and the device may be busy with a kernel that waits for this rank. So all
    ranks load first and meet before the first launch. Inside CUDA-graph capture nobody runs, and nobody can meet.
    """
    assert prepared.constants is not None
    if LOAD_AHEAD:
        # In one order on all ranks: each compiles its share.
        needed = sorted(
            kernels_needed(p, prepared.path.settings, prepared.constants, dtype), key=lambda k: repr(k.constexprs)
        )
        load_together(needed, p, samples(prepared.constants, p))


def load_together(kernels: list[Kernel], p: Plane, args: tuple[Any, ...]) -> None:
    """Compile and load kernels on all ranks: each compiles its share, then all load everything from Triton's cache."""
    if torch.cuda.is_current_stream_capturing():
        for kernel in kernels:
            kernel.compile(*args)
        return
    group = dist.distributed_c10d._resolve_process_group(p.group_name)  # type: ignore[arg-type]
    for mine in (True, False):
        for number, kernel in enumerate(kernels):
            if (number % p.world == p.rank) == mine and not kernel.ready:
                kernel.compile(*args)
        plane._everyone(None, group, p.world)


def samples(c: Constants, p: Plane) -> tuple[Any, ...]:
    """Arguments of the right types to compile a kernel with; Triton takes a dtype for a pointer to aligned memory.

    No tensors: nothing has to be allocated for them.
    """
    x, weight, normed, residual_out = (torch_dtype(d) for d in (c.dtype, c.weight_dtype, c.out_dtype, c.residual_dtype))
    tables = (torch.int64, torch.int32)
    return (x, x, weight, x, normed, residual_out, *tables, p.rank, 1, p.phase_bytes, 1 << 40, 1e-6, 1.0)


def _aligned(t: Tensor | None) -> Tensor | None:
    """``t`` contiguous and 16-byte aligned: what 16-byte accesses need."""
    if t is None:
        return None
    if not t.is_contiguous():
        t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _cuda(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float,
    flavour: str,
    post_norm: bool,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    refuse_gradients(x, residual, weight, bias)
    index = x.device.index
    if torch._C._cuda_getDevice() != index:
        with torch.cuda.device(index):  # launches and the vote go to the current device
            return _cuda(x, residual, weight, bias, eps, scale, flavour, post_norm, group_name)
    key = (
        group_name,
        x.dtype,
        x.shape[-1] if x.dim() else 0,
        flavour,
        scale != 1.0,
        residual is None,
        None if weight is None else weight.dtype,
        0 if bias is None else bias.dim(),
        x.dim(),
        post_norm,
        index,
        plane.current_stream_class(),
    )
    prepared = _prepared.get(key)
    if prepared is None or not plane.is_current(prepared.held):
        with plane.lock_of(group_name):
            prepared = _prepared.get(key)
            if prepared is not None and not plane.is_current(prepared.held):
                forget(group_name)  # torch gave its name to another group
                compat.forget_symmetric_memory(group_name)
                prepared = None
            if prepared is None:
                prepared = _prepare(key, x, residual, weight, bias, scale, flavour, post_norm, group_name)
    else:
        check(x, residual, weight, bias, prepared.flavour, post_norm)
    normed = torch.empty_like(x, dtype=prepared.normed_dtype, memory_format=torch.contiguous_format)
    residual_out = torch.empty_like(x, dtype=prepared.residual_dtype, memory_format=torch.contiguous_format)
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    if rows == 0:
        return normed, residual_out  # every rank of the group has zero rows: nothing to exchange
    c = prepared.constants
    if c is None:
        return library_path.exact(x, residual, weight, bias, eps, scale, prepared.flavour, post_norm, group_name)
    x, residual, weight, bias = _aligned(x), _aligned(residual), _aligned(weight), _aligned(bias)  # type: ignore[assignment]
    p = prepared.path.plane
    if p is not None:
        if p.seen[0]:
            p.raise_if_failed()
        plan = prepared.plans.get(rows)
        if plan is None:
            plan = prepared.plans[rows] = plan_of(p, prepared.path.settings, c, x.dtype, rows)
        if plan.launches:
            stream = torch._C._cuda_getCurrentRawStream(index)
            if len(plan.launches) == 1:
                _launch(
                    plan.launches[0], stream, p, prepared, x, residual, weight, bias, normed, residual_out, eps, scale
                )
            else:
                flat = [None if t is None else t.view(rows, -1) for t in (x, residual, normed, residual_out)]
                full_bias = bias is not None and c.bias == "full"
                for launch in plan.launches:
                    part = slice(launch.start, launch.start + launch.rows)
                    xs, rs, ns, hs = (None if t is None else t[part] for t in flat)
                    bs = bias.view(rows, -1)[part] if full_bias else bias  # type: ignore[union-attr]
                    _launch(launch, stream, p, prepared, xs, rs, weight, bs, ns, hs, eps, scale)  # type: ignore[arg-type]
            return normed, residual_out
    # The add and norm behind it take one program a row, with the sums of the other kernels: no row sees another.
    summed = invariant.sum_in_rank_order if prepared.path.settings.batch_invariant else library_path.all_reduce
    reduced = summed(x, group_name)
    library_path.add_norm(reduced, residual, weight, bias, normed, residual_out, eps, scale, c)
    return normed, residual_out


def _launch(
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
    scale: float,
) -> None:
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


def raise_if_failed(group: dist.ProcessGroup | str | None = None) -> None:
    """Raise ``RuntimeError`` if a poll of the group's kernels has given up: call it after synchronising.

    Eager calls check by themselves, one call late. Replays of a CUDA graph do not pass through Python: check after them.
    """
    name = plane.group_name_of(group)
    for (found, _, _), (path, _) in list(plane._paths.items()):
        if found == name and path.plane is not None:
            path.plane.raise_if_failed()


def forget(group: dist.ProcessGroup | str) -> None:
    """Drop planes and plans of a group that is about to be destroyed."""
    name = plane.group_name_of(group)
    plane.forget(name)
    invariant.forget(name)
    for key in [k for k in _prepared if k[0] == name]:
        del _prepared[key]


def reset(group: dist.ProcessGroup | str | None = None) -> None:
    """See :func:`tpfuse.ops.plane.reset`."""
    plane.reset(group)


library.impl("all_reduce_add_rms_norm", _cuda, "CUDA")
