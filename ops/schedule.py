"""From the rows of a call to launches: selection, geometry and kernel of each. Pure apart from the cache of kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .geometry import MAX_PROGRAMS, Geometry, Part, Room, geometry, register_bound
from .kernel import Kernel
from .kernels.variant import Constants, Variant
from .plane import Plane
from .select import UNBOUNDED, Selection, entry, select
from .settings import Settings


@dataclass(frozen=True)
class Launch:
    """One kernel launch: rows ``[start, start + rows)`` by ``programs`` programs."""

    kernel: Kernel
    programs: int
    start: int
    rows: int


@dataclass(frozen=True)
class Schedule:
    """What a call with a given number of rows does: launches, or the library path when there are none."""

    selection: Selection
    launches: tuple[Launch, ...]


_kernels: dict[tuple[Any, ...], Kernel] = {}


def kernel_of(algorithm: str, c: Constants, variant: Variant, attribute: bool = True) -> Kernel:
    """The kernel of a launch, not necessarily compiled yet.

    Args:
        attribute: with a ``variant.pdl``, launch it with the attribute that lets it start before its predecessor has ended.
    """
    variant = replace(variant, gathers=algorithm.startswith("gathered"))
    key = (algorithm, c, variant, attribute)
    found = _kernels.get(key)
    if found is None:
        from .kernels.gathered_blocks import gathered_blocks_kernel, gathered_blocks_layer_norm_kernel
        from .kernels.gathered_rows import gathered_rows_kernel, gathered_rows_layer_norm_kernel
        from .kernels.one_shot import (
            one_shot_kernel,
            one_shot_layer_norm_kernel,
            one_shot_layer_norm_of_two_kernel,
            one_shot_quant_kernel,
        )
        from .kernels.received_rows import received_rows_kernel, received_rows_layer_norm_kernel
        from .kernels.received_two_shot import received_two_shot_kernel, received_two_shot_layer_norm_kernel
        from .kernels.two_shot import (
            two_shot_kernel,
            two_shot_layer_norm_kernel,
            two_shot_layer_norm_of_two_kernel,
            two_shot_quant_kernel,
        )

        function = {
            ("one_shot", "rms_norm"): one_shot_kernel,
            ("one_shot", "quant"): one_shot_quant_kernel,
            ("one_shot", "layer_norm"): one_shot_layer_norm_kernel,
            ("two_shot", "rms_norm"): two_shot_kernel,
            ("two_shot", "quant"): two_shot_quant_kernel,
            ("two_shot", "layer_norm"): two_shot_layer_norm_kernel,
            ("one_shot", "layer_norm_of_two"): one_shot_layer_norm_of_two_kernel,
            ("two_shot", "layer_norm_of_two"): two_shot_layer_norm_of_two_kernel,
            ("received_rows", "rms_norm"): received_rows_kernel,
            ("received_two_shot", "rms_norm"): received_two_shot_kernel,
            ("gathered_rows", "rms_norm"): gathered_rows_kernel,
            ("gathered_blocks", "rms_norm"): gathered_blocks_kernel,
            ("received_rows", "layer_norm"): received_rows_layer_norm_kernel,
            ("received_two_shot", "layer_norm"): received_two_shot_layer_norm_kernel,
            ("gathered_rows", "layer_norm"): gathered_rows_layer_norm_kernel,
            ("gathered_blocks", "layer_norm"): gathered_blocks_layer_norm_kernel,
        }[algorithm, c.kind]
        options: dict[str, Any] = {
            "maxnreg": register_bound(algorithm, variant.world, Part(variant.lanes, variant.steps))
        }
        if variant.pdl != "off" and attribute:
            options["launch_pdl"] = True
        # Two threads may come here at once, and both must get the one that is loaded before anybody runs it.
        found = _kernels.setdefault(key, Kernel(function, variant.lanes, (c, variant), **options))
    return found


def schedule_of(
    p: Plane,
    settings: Settings,
    c: Constants,
    dtype: torch.dtype,
    rows: int,
    wait: bool = True,
    shape_of: Callable[[int], Geometry] | None = None,
) -> Schedule:
    """Selection, geometry and kernels of a call. Pure apart from the cache of kernels.

    Args:
        wait: False for the benchmarks' floor: kernels that wait for nobody.
        shape_of: for experiments: rows of a launch -> its geometry, instead of :func:`tpfuse.ops.geometry.geometry`.
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
        sums=c.sums,
    )
    if chosen.algorithm == "library":
        return Schedule(chosen, ())
    return Schedule(chosen, launches_of(p, settings, c, chosen, rows, wait, shape_of))


def launches_of(
    p: Plane,
    settings: Settings,
    c: Constants,
    chosen: Selection,
    rows: int,
    wait: bool = True,
    shape_of: Callable[[int], Geometry] | None = None,
    blocks: int = 1,
) -> tuple[Launch, ...]:
    """The launches of a selection that takes kernels; arguments as for :func:`schedule_of`.

    Args:
        blocks: see :class:`.kernels.variant.Variant`; ``rows`` are those of one.
    """
    room, pdl = room_of(p, settings, chosen.algorithm), dependent_launch_of(p, settings)
    launches = []
    for start in range(0, rows, chosen.rows_per_launch):
        n = min(chosen.rows_per_launch, rows - start)
        shape = geometry(room, n, c.groups) if shape_of is None else shape_of(n)
        variant, attribute = variant_of(room, shape, pdl, wait)
        kernel = kernel_of(chosen.algorithm, c, replace(variant, blocks=blocks), attribute)
        launches.append(Launch(kernel, shape.programs, start, n))
    return tuple(launches)


def room_of(p: Plane, settings: Settings, algorithm: str) -> Room:
    processors = torch.cuda.get_device_properties(p.device).multi_processor_count
    packed = settings.shared_gpu == "packed"
    return Room(algorithm, p.world, processors, p.sharers, settings.concurrent_planes, packed)


def dependent_launch_of(p: Plane, settings: Settings) -> str:
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
    architecture: str,
    world: int,
    dtype: torch.dtype,
    hidden: int,
    settings: Settings,
    most: int = UNBOUNDED,
    sums: int = 1,
) -> dict[str, int]:
    """Algorithm -> most rows of one launch, over calls of up to ``most`` rows. Pure. Arguments as of :func:`.select.select`."""
    thresholds = entry(architecture, world, settings.table)
    row_bytes = sums * hidden * dtype.itemsize
    ends = {thresholds.one_shot_bytes // row_bytes, thresholds.two_shot_bytes // row_bytes}
    found: dict[str, int] = {}
    for rows in sorted({1, most, *(min(max(1, n + more), most) for n in ends for more in (0, 1))}):
        chosen = select(
            architecture,
            world,
            dtype,
            hidden,
            rows,
            override=settings.algorithm,
            table=settings.table,
            batch_invariant=settings.batch_invariant,
            sums=sums,
        )
        if chosen.algorithm != "library":
            found[chosen.algorithm] = max(found.get(chosen.algorithm, 0), chosen.rows_per_launch)
    return found


def kernels_needed(
    p: Plane, settings: Settings, c: Constants, dtype: torch.dtype, rows: int = UNBOUNDED
) -> list[Kernel]:
    """Every kernel that a call of this kind with up to ``rows`` rows may need."""
    if rows < 1:
        return []
    pdl = dependent_launch_of(p, settings)
    launches = largest_launches(p.architecture, p.world, dtype, c.hidden, settings, rows, c.sums)
    return [
        kernel_of(algorithm, c, variant, attribute)
        for algorithm, most in launches.items()
        for variant, attribute in variants_needed(room_of(p, settings, algorithm), most, c.groups, pdl)
    ]
