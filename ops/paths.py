"""Which path a group takes, kept for each (group, device, stream class): voted on at the first call, dropped with the group."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tpfuse import compat

from . import select as selection
from . import topology
from .plane import Plane, allocate, connect, on_device
from .settings import Settings
from .vote import Ballot, ballot_of, everyone, host_identity, judge, only_library, versions


@dataclass(frozen=True)
class GroupPath:
    """Which path a group takes and why.

    Attributes:
        kind: ``"fused"`` or ``"library"``.
        cause: for ``"library"``, what stands in the way; ``""`` for ``"fused"``.
        plane: the plane of a fused group.
        links: how its GPUs are connected; None where the vote ended before that mattered.
    """

    kind: str
    cause: str
    settings: Settings
    plane: Plane | None = None
    links: topology.Links | None = None


# Of a group, which it does not keep alive: torch gives the name of a destroyed group to another one. None: not compared (tests,
# experiments).
Held = Callable[[], Any] | None


_lock = threading.Lock()
_group_locks: dict[str, threading.RLock] = {}
_paths: dict[tuple[str, int, str], tuple[GroupPath, Held]] = {}
_classes = threading.local()


@contextlib.contextmanager
def stream_class(name: str) -> Iterator[None]:
    """Use planes of their own for the calls inside, so that they may overlap with calls on other streams.

    Collective in effect: all ranks must enter the same class for the same calls. Set ``TPFUSE_CONCURRENT_PLANES`` to the
    number of classes that run at the same time, so that the kernels leave room for each other.
    """
    before = current_stream_class()
    _classes.name = name
    try:
        yield
    finally:
        _classes.name = before


def current_stream_class() -> str:
    return getattr(_classes, "name", "")


def lock_of(group_name: str) -> threading.RLock:
    """The lock under which a group is voted on. One a group: threads that vote on several may come in another order elsewhere."""
    with _lock:
        return _group_locks.setdefault(group_name, threading.RLock())


def is_current(group_name: str, held: Held) -> bool:
    """Whether a name still stands for the group that was voted on. Asked on every call."""
    return held is None or compat.is_group(group_name, held)


def forget_the_gone() -> None:
    """Drop the planes of groups that were destroyed, and of no other. Captured graphs that used them must not run again.

    Ranks differ in what they have of destroyed groups, so nothing that a vote depends on may go with it.
    """
    for key, (path, held) in list(_paths.items()):
        if is_current(key[0], held):
            continue
        if path.plane is not None and path.plane.device.type == "cuda":
            torch.cuda.synchronize(path.plane.device)  # its last kernels may still write the failure record
        _paths.pop(key, None)
        compat.forget_symmetric_memory(key[0])


def path_of(group_name: str, device: torch.device) -> GroupPath:
    """The path of a group on this device, voted on at its first call.

    Collective at the first call of a (group, device, stream class), which must not be inside CUDA-graph capture.
    """
    key = (group_name, device.index, current_stream_class())
    found = _paths.get(key)
    if found is not None and is_current(group_name, found[1]):
        return found[0]
    with lock_of(group_name):
        found = _paths.get(key)
        if found is not None and is_current(group_name, found[1]):
            return found[0]  # another thread voted meanwhile
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"tpfuse: group {group_name!r} is used for the first time inside CUDA-graph capture, where nothing may be "
                "allocated; make one call on every rank before capturing (a warm-up step does)"
            )
        forget_the_gone()
        try:
            group = compat.resolve_group(group_name)
        except RuntimeError as error:
            raise RuntimeError(
                f"tpfuse: there is no process group {group_name!r}: it was destroyed, or never made. Make the group again, and "
                "compile again what was compiled for the old one"
            ) from error
        with on_device(device):
            path = _vote(group_name, group, device, key[2])
        _paths[key] = (path, compat.group_reference(group))
        said = _warning(path)
        if said is not None:
            ranks = dist.get_process_group_ranks(group)
            warnings.warn(f"tpfuse: group {group_name!r} (ranks {ranks}) {said}", stacklevel=2)
        return path


def may_be_asked(group_name: str, device: torch.device) -> bool:
    """Whether :func:`path_of` has an answer: not for a group that would be voted on inside of CUDA-graph capture."""
    found = _paths.get((group_name, device.index, current_stream_class()))
    known = found is not None and is_current(group_name, found[1])
    return known or not torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def another(group_name: str, device: torch.device, path: GroupPath) -> Iterator[None]:
    """Inside, the group takes this path; for experiments."""
    key = (group_name, device.index, current_stream_class())
    before = _paths[key]
    _paths[key] = (path, before[1])
    try:
        yield
    finally:
        _paths[key] = before


def _warning(path: GroupPath) -> str | None:
    """What a user should know of a group's path: the library, or links that leave small calls only to the kernels."""
    if path.kind == "library":
        return f"takes the library path: {path.cause}"
    most = small_calls_only(path)
    if most is None:
        return None
    return (
        f"takes the library path for more than {most >> 10} KiB of x: {path.links}, for which nothing was measured; "
        "`tpfuse bench --tune` measures this machine"
    )


def small_calls_only(path: GroupPath) -> int | None:
    """The most bytes of ``x`` that take the kernels where the links are not NVLink and nobody measured them; else None."""
    if path.plane is None or path.links is None or path.links.name not in (topology.PCIE, topology.UNKNOWN):
        return None
    if path.settings.algorithm != "auto" or path.settings.batch_invariant:
        return None
    thresholds = selection.entry(path.plane.architecture, path.plane.world, path.settings.table)
    if not thresholds.architecture.startswith("any-"):
        return None  # measured here, or on a machine like this
    return max(thresholds.one_shot_bytes, thresholds.two_shot_bytes)


def _vote(group_name: str, group: dist.ProcessGroup, device: torch.device, klass: str) -> GroupPath:
    world = group.size()
    settings: Settings | None = None
    wrong: Exception | None = None
    try:
        settings = Settings.from_environment()
        ballot = ballot_of(world, device, settings, klass)
    except Exception as error:
        # The others are about to vote and would wait for this rank, so it votes too.
        wrong = error
        said = f"not valid: {error}" if settings is None else settings.fingerprint()
        ballot = Ballot(f"{type(error).__name__}: {error}", host_identity(), "", "", versions(), said, klass)
    ballots = everyone(ballot, group, world)
    verdict = judge(ballots)  # raises on all ranks where only some have settings that are not valid
    if settings is None:
        assert wrong is not None
        raise wrong
    cause = verdict.cause or only_library(verdict, world, settings)
    if cause is not None:
        return GroupPath("library", cause, settings, links=verdict.links)
    parts: dict[str, Any] = {}
    # A vote behind each step: a rank that cannot allocate must not leave its peers in the rendezvous.
    steps: tuple[Callable[[], None], ...] = (
        lambda: parts.update(allocation=allocate(world, device, verdict, settings)),
        lambda: parts.update(plane=connect(parts["allocation"], group_name, group, device, klass, verdict, settings)),
    )
    for step in steps:
        problem = _attempt(step, device)
        for other, said in enumerate(everyone(problem, group, world)):
            if said is not None:
                return GroupPath("library", f"rank {other}: {said}", settings, links=verdict.links)
    return GroupPath("fused", "", settings, parts["plane"], verdict.links)


def _attempt(step: Callable[[], None], device: torch.device) -> str | None:
    """Run a step of building; what went wrong, for the others must hear of it: they are about to vote.

    In a thread of its own: torch's rendezvous allocates small tables with the caching allocator, which may be in a CUDA graph's
    pool for this thread (Inductor warms up there), and what lives in such a pool may not outlast the run.
    """
    problem: list[str] = []

    def run() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            step()
        except Exception as error:
            problem.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run, name="tpfuse-plane")
    thread.start()
    thread.join()
    return problem[0] if problem else None


def group_name_of(group: dist.ProcessGroup | str | None, op: str = "") -> str:
    """The name of a group, of the default group where none is given.

    Args:
        op: for messages, ``"op: "`` or nothing.
    Raises:
        ValueError: there is no default group.
        TypeError: it is neither a group nor a name.
    """
    if isinstance(group, str):
        return group
    if group is None:
        group = dist.group.WORLD
        if group is None:
            raise ValueError(
                f"{op}no process group is initialized; call torch.distributed.init_process_group first or pass group="
            )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{op}group is {group!r}, of type {type(group).__name__}; give a process group, its name, or None for the default "
            "group; of a DeviceMesh that is mesh.get_group()"
        )
    return group.group_name


def describe_path(group: dist.ProcessGroup | str | None = None, device: torch.device | int | None = None) -> GroupPath:
    """Which path a group takes and why. Collective at the first use of the group: call it on every rank.

    On a machine without a GPU the answer is the library path, without any communication.

    Args:
        group: a process group of which this rank is a member, or its name; None is the default group.
        device: of the calls; None is the current CUDA device.
    Returns:
        ``kind`` is ``"fused"`` or ``"library"``, ``cause`` says why, ``links`` how the GPUs are connected.
    Raises:
        ValueError: there is no default group, or a ``TPFUSE_`` variable is not valid.
        RuntimeError: there is no such group, its ranks have different settings, or it is used for the first time inside
            CUDA-graph capture.
    """
    if not torch.cuda.is_available():
        return GroupPath("library", "no CUDA device", Settings.from_environment())
    if device is None:
        index = torch.cuda.current_device()
    else:
        index = device if isinstance(device, int) else device.index
    return path_of(group_name_of(group), torch.device("cuda", index))


def raise_if_failed(group: dist.ProcessGroup | str | None = None) -> None:
    """Raise ``RuntimeError`` if a poll of the group's kernels has given up: call it after synchronizing.

    Eager calls check by themselves, one call late. Replays of a CUDA graph do not pass through Python: check after them.
    """
    name = group_name_of(group)
    for (found, _, _), (path, _) in list(_paths.items()):
        if found == name and path.plane is not None:
            path.plane.raise_if_failed()


def reset(group: dist.ProcessGroup | str | None = None) -> None:
    """Bring every plane of a group back to its initial state: zeros, phase 0, no failure.

    Collective: call it on every rank of the group, after an error of the watchdog or when a step was abandoned, outside
    CUDA-graph capture. Captured graphs stay valid: addresses do not change.
    """
    name = group_name_of(group)
    planes = [path.plane for (n, _, _), (path, _) in sorted(_paths.items()) if n == name and path.plane is not None]
    if not planes:
        return
    owner = compat.resolve_group(name)
    for step in ("stop", "clear", "done"):
        for plane in planes:
            torch.cuda.synchronize(plane.device)
            if step == "clear":
                plane.memory.zero_()
                plane.state.zero_()
                plane.record.zero_()
                torch.cuda.synchronize(plane.device)
        everyone(step, owner, planes[0].world)


def forget(group: dist.ProcessGroup | str) -> None:
    """Drop the planes of a group that is about to be destroyed. Captured graphs that used them must not run again.

    Raises ``TypeError`` for what is neither a group nor a name. A group that has made no calls has nothing to drop.
    """
    name = group_name_of(group)
    for key in [k for k in list(_paths) if k[0] == name]:
        _paths.pop(key, None)
