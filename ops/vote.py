"""The vote of a group: may its ranks use the kernels? Every rank has the same ballots and reaches the same verdict."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tpfuse import compat

from . import select as selection
from . import topology
from .settings import Settings

MIN_WORLD, MAX_WORLD = 2, 8


@dataclass(frozen=True)
class Ballot:
    """What one rank tells the others before anybody allocates. ``problem`` is None when it could use the kernels."""

    problem: str | None
    host: str
    device: str
    architecture: str
    versions: str
    settings: str
    stream_class: str = ""
    reach: topology.Reach | None = None  # of this rank's GPU, over NVLink


@dataclass(frozen=True)
class Verdict:
    """The outcome of a vote, the same on every rank."""

    cause: str | None  # why the group takes the library path; None if it takes the kernels
    architecture: str  # with the class of the links, as the selection table names it
    sharers: int  # most ranks of the group on one GPU
    links: topology.Links | None = None  # None where the vote ended before that mattered


def judge(ballots: Sequence[Ballot]) -> Verdict:
    """Count the votes. Pure: every rank has the same ballots and reaches the same verdict.

    Raises ``RuntimeError`` when ranks were started with different settings or vote on different things: no path would be right
    for all.
    """
    for name in ("settings", "stream_class", "versions"):
        values = [getattr(b, name) for b in ballots]
        if len(set(values)) > 1:
            said = "; ".join(f"rank {r}: {v}" for r, v in enumerate(values))
            if name == "settings":
                raise RuntimeError(f"tpfuse: the ranks of a group have different settings ({said}); set them alike")
            if name == "stream_class":
                raise RuntimeError(
                    f"tpfuse: the ranks of a group make their first calls in different stream classes ({said}); make the "
                    "first call of each class in the same order on all ranks, from one thread"
                )
            return Verdict(f"ranks run different versions ({said})", ballots[0].architecture, 1)
    for rank, ballot in enumerate(ballots):
        if ballot.problem is not None:
            return Verdict(f"rank {rank}: {ballot.problem}", ballots[0].architecture, 1)
    architecture = ballots[0].architecture
    if len({b.architecture for b in ballots}) > 1:
        return Verdict(f"different GPUs ({', '.join(sorted({b.architecture for b in ballots}))})", architecture, 1)
    if len({b.host for b in ballots}) > 1:
        return Verdict("the group spans several hosts", architecture, 1)
    devices = [b.device for b in ballots]
    sharers = max(devices.count(d) for d in devices)
    if sharers > 1 and len(set(devices)) > 1:
        return Verdict("some ranks share a GPU and others do not", architecture, sharers)
    links = topology.link_class([b.reach or topology.Reach(b.device) for b in ballots])
    return Verdict(None, selection.key(architecture, links.name), sharers, links)


def only_library(verdict: Verdict, world: int, settings: Settings) -> str | None:
    """Why the links leave nothing to the kernels, so that no plane is needed; else None. Pure."""
    thresholds = selection.entry(verdict.architecture, world, settings.table)
    most = max(thresholds.one_shot_bytes, thresholds.two_shot_bytes)
    if most or settings.algorithm != "auto" or settings.batch_invariant:
        return None
    return f"{verdict.links}; {thresholds.measured}"


def host_identity() -> str:
    """Equal on two ranks exactly when they run under one kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


def _problem(world: int, device: torch.device) -> str | None:
    if not MIN_WORLD <= world <= MAX_WORLD:
        return f"the kernels take world sizes {MIN_WORLD} to {MAX_WORLD}, not {world}"
    if triton_version() is None:
        return "Triton is not installed (pip install 'triton>=3.6')"
    if torch.version.hip is not None:
        return "ROCm: the kernels compile but have not been run there"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than sm_80"
    missing = compat.symmetric_memory_error()
    return None if missing is None else f"torch has no symmetric memory ({missing})"


def triton_version() -> str | None:
    """The version of Triton; None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return getattr(triton, "__version__", None)  # a folder of that name on the path has none


def versions() -> str:
    from tpfuse import __version__

    return f"torch {torch.__version__}, triton {triton_version()}, tpfuse {__version__}"


def ballot_of(world: int, device: torch.device, settings: Settings, klass: str) -> Ballot:
    properties = torch.cuda.get_device_properties(device)
    gpu = str(getattr(properties, "uuid", device.index))
    return Ballot(
        problem=_problem(world, device),
        host=host_identity(),
        device=gpu,
        architecture=f"sm_{properties.major}{properties.minor}",
        versions=versions(),
        settings=settings.fingerprint(),
        stream_class=klass,
        reach=topology.reach(gpu),
    )


def everyone(mine: object, group: dist.ProcessGroup, world: int) -> list:
    everyone: list = [None] * world
    dist.all_gather_object(everyone, mine, group=group)
    return everyone
