"""The one way in for what measures: calls of the kernels with some of the choices fixed that a call of the op leaves open.

``tpfuse.measure`` and ``benchmarks/`` use this and public names; nothing else does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import cuda, library, op, paths, prepare, schedule
from .flavour import LLAMA
from .geometry import Geometry, Part, forced_geometry, resident_programs
from .kernels.state import MAX_PROGRAMS, STAMP_WORDS, STATE_WORDS
from .kernels.variant import constants
from .plane import Plane
from .prepare import Prepared


class Unavailable(Exception):
    """Why a call cannot be made as asked, at this shape on this machine."""


@dataclass(frozen=True)
class Experiment:
    """A call that is compiled and loaded on all ranks.

    Attributes:
        call: makes it; returns ``(normed, residual_out)``. Kernels that do not wait give meaningless results, and leave words
            in the plane: :func:`tpfuse.ops.reset` it afterwards.
        algorithm: ``"one_shot"`` or ``"two_shot"``.
        launches: in order.
        state: with stamps, the state of the plane with the stamps behind it.
    """

    call: Callable[[], tuple[Tensor, Tensor]]
    algorithm: str
    launches: tuple[schedule.Launch, ...]
    state: Tensor | None = None


def prepared_call(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    group_name: str,
    *,
    algorithm: str | None = None,
    dependent_launch: str | None = None,
    wait: bool = True,
    part: Part | None = None,
    share: int = 2,
    stamps: bool = False,
) -> Experiment:
    """One call in Llama's rounding order. Collective: every rank of the group asks for the same.

    Args:
        x, residual: ``(rows, H)``, one dtype; weight: ``(H,)`` of that dtype.
        algorithm, dependent_launch: None leaves them to selection and settings.
        wait: False makes kernels that wait for nobody.
        part: what a program holds of a row; None leaves it to :func:`tpfuse.ops.geometry.geometry`.
        share: with ``part``, the kernel takes one part in ``share`` of what its ranks may have in flight on a GPU.
        stamps: the kernels leave the times of their stages in ``state``; one launch only.
    Raises:
        Unavailable: the group takes the library path, or the geometry does not fit.
    """
    # The op itself prepares the group, and loads what auto needs.
    op.all_reduce_add_rms_norm(x, residual, weight, eps=eps, group=group_name)
    path = paths.path_of(group_name, x.device)
    plane = path.plane
    if plane is None:
        raise Unavailable(path.cause)
    kind = _prepared_for(x, group_name)
    c = kind.constants
    assert c is not None
    chosen = replace(
        path.settings,
        algorithm=algorithm or path.settings.algorithm,
        dependent_launch=dependent_launch or path.settings.dependent_launch,
    )
    shape_of = None if part is None else forced(algorithm or "one_shot", part, share, c.groups, plane)
    found = schedule.schedule_of(plane, chosen, c, x.dtype, x.shape[0], wait, shape_of)
    if not found.launches:
        raise Unavailable("selection takes the library path here")
    launches, state = found.launches, None
    if stamps:
        if len(launches) != 1:
            raise Unavailable(f"{x.shape[0]} rows take {len(launches)} launches; stamps are kept for one")
        # A state of its own, with room for the stamps; every rank begins it at phase 0, and the plane is empty between calls.
        state = torch.zeros(STATE_WORDS + STAMP_WORDS, dtype=torch.int32, device=x.device)
        plane = replace(plane, state=state)
        kernel = launches[0].kernel
        variant = replace(kernel.constexprs[1], stamps=True)
        attribute = bool(kernel.options.get("launch_pdl"))
        stamped = schedule.kernel_of(found.selection.algorithm, c, variant, attribute)
        launches = (replace(launches[0], kernel=stamped),)
    prepare.load_together([launch.kernel for launch in launches], plane, prepare.samples(c, plane))

    def call() -> tuple[Tensor, Tensor]:
        normed, h = torch.empty_like(x), torch.empty_like(x)
        stream = torch.cuda.current_stream().cuda_stream
        for launch in launches:
            rows = slice(launch.start, launch.start + launch.rows)
            given = (x[rows], residual[rows], weight, None, normed[rows], h[rows])
            cuda.start(launch, stream, plane, kind, *given, eps, 1.0)
        return normed, h

    return Experiment(call, found.selection.algorithm, launches, state)


def _prepared_for(x: Tensor, group_name: str) -> Prepared:
    """What the op has kept of a call in Llama's order with a residual."""
    return next(
        kind
        for key, kind in prepare.PREPARED.items()
        if key[0] == group_name and key[2] == x.shape[-1] and kind.flavour == LLAMA and key[1] == x.dtype and not key[5]
    )


def forced(algorithm: str, part: Part, share: int, groups: int, plane: Plane) -> Callable[[int], Geometry]:
    """Rows of a launch -> its geometry with this part a program; raises :class:`Unavailable` where it does not fit."""
    most = resident(algorithm, part, plane) // share

    def shape_of(rows: int) -> Geometry:
        found = forced_geometry(rows, groups, part, most)
        if found is None:
            raise Unavailable(f"{rows} rows of {groups} groups, {part} a program, need more than {most} programs")
        return found

    return shape_of


def resident(algorithm: str, part: Part, plane: Plane) -> int:
    """Programs of one rank that its registers leave room for, with the other ranks of the GPU beside it."""
    processors = torch.cuda.get_device_properties(plane.device).multi_processor_count
    return min(MAX_PROGRAMS, processors * resident_programs(algorithm, plane.world, part) // plane.sharers)


def library_call(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group_name: str
) -> Callable[[], tuple[Tensor, Tensor]]:
    """The library path at any size: the group's own all-reduce, then our add and norm. Arguments as for :func:`prepared_call`."""
    c = constants(x.dtype, x.dtype, x.shape[-1], LLAMA, bias="none", scaled=False, has_residual=True, post_norm=False)

    def call() -> tuple[Tensor, Tensor]:
        normed, h = torch.empty_like(x), torch.empty_like(x)
        reduced = library.all_reduce(x, group_name)
        library.add_norm(reduced, residual, weight, None, normed, h, eps, 1.0, c)
        return normed, h

    return call


@contextlib.contextmanager
def launches_of(launch_bytes: int, group_name: str, device: torch.device) -> Iterator[None]:
    """Inside, calls that are prepared are cut into launches of this many bytes. The plane stays as it is."""
    path = paths.path_of(group_name, device)
    table = tuple(replace(e, launch_bytes=launch_bytes) for e in path.settings.table)
    with paths.another(group_name, device, replace(path, settings=replace(path.settings, table=table))):
        yield
