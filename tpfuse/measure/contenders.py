"""The contenders of the benchmark by name: the op, its kernels with something fixed, and what others do."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor

from tpfuse.ops import experiment
from tpfuse.ops.experiment import Unavailable
from tpfuse.ops.geometry import Part
from tpfuse.ops.kernels.state import MAX_GROUPS

from . import other_libraries
from .other_libraries import Call, Problem


def _forced(
    algorithm: str | None, pdl: str | None = None, wait: bool = True, part: Part | None = None, share: int = 2
) -> Callable[[Problem], Call]:
    """Our kernels with some of the settings fixed: see :func:`tpfuse.ops.experiment.prepared_call`."""

    def make(p: Problem) -> Call:
        return experiment.prepared_call(
            p.x,
            p.residual,
            p.weight,
            p.eps,
            p.group_name,
            algorithm=algorithm,
            dependent_launch=pdl,
            wait=wait,
            part=part,
            share=share,
        ).call

    return make


def named_geometry(name: str) -> tuple[str, Part, int] | None:
    """(algorithm, part, share) of a name such as ``one-shot:512x2:full``; None for other names."""
    parsed = re.fullmatch(r"(one|two)-shot:(128|256|512|1024)x([1-9]\d?)(:full)?", name)
    if not parsed or int(parsed[3]) > MAX_GROUPS:
        return None
    return f"{parsed[1]}_shot", Part(int(parsed[2]), int(parsed[3])), 1 if parsed[4] else 2


def _library(p: Problem) -> Call:
    """The library path at any size: the group's NCCL all-reduce, then our add+norm kernel."""
    if p.shared:
        raise Unavailable("NCCL refuses two ranks on one GPU, and gloo cannot be captured")
    return experiment.library_call(p.x, p.residual, p.weight, p.eps, p.group_name)


def _op(p: Problem) -> Call:
    from tpfuse.ops import op

    def call() -> tuple[Tensor, Tensor]:
        return op.all_reduce_add_rms_norm(p.x, p.residual, p.weight, eps=p.eps, group=p.group_name)

    return call


CONTENDERS: dict[str, Callable[[Problem], Call]] = {
    "tpfuse": _op,
    "tpfuse no pdl": _forced(None, pdl="off"),
    "tpfuse end pdl": _forced(None, pdl="end"),
    "one-shot": _forced("one_shot"),
    "two-shot": _forced("two_shot"),
    "library": _library,
    "floor": _forced(None, wait=False),
    "symm one-shot": other_libraries.symm_one_shot,
    "symm two-shot": other_libraries.symm_two_shot,
    "flashinfer": other_libraries.flashinfer(pdl=False),
    "flashinfer pdl": other_libraries.flashinfer(pdl=True),
    "nccl": other_libraries.nccl,
}
LEAVES_WORDS = ("floor",)  # pushes that nobody waits for: the plane must be reset afterwards


def contender(name: str) -> Callable[[Problem], Call]:
    """What a name stands for: one of :data:`CONTENDERS`, or a geometry.

    ``one-shot:512x2`` is one-shot by programs of 512 threads that hold two steps of a row, on half of the GPU;
    ``two-shot:128x4:full`` is two-shot by programs of 128 threads and four steps, on all of it.

    Raises:
        ValueError: the name is neither; the message lists the valid ones.
    """
    if name in CONTENDERS:
        return CONTENDERS[name]
    found = named_geometry(name)
    if found is not None:
        algorithm, part, share = found
        return _forced(algorithm, part=part, share=share)
    raise ValueError(
        f"{name!r} is no contender; they are {', '.join(CONTENDERS)}, and geometries such as one-shot:512x2 or "
        "two-shot:128x4:full (threads of a program x steps that it takes over a row)"
    )
