"""Planes: the symmetric memory that a group's kernels talk through, and the vote that enables them.

A plane belongs to one (group, device, stream class). It holds two *phases* of slots in symmetric memory, all zeros while
nothing travels, and a local state: a phase word for each program, partial sums of split rows, and a failure record.
The rendezvous is the group's own, never that of the default group. Nothing is allocated after the plane is built.

Why two phases are enough
-------------------------
Call n uses phase n mod 2. Take a rank A that starts call n + 1 and pushes into phase (n + 1) mod 2 of a peer B. That
phase was last used by call n - 1, and every word pushed then was zeroed again by the lane of B that polled it. So it
must be shown that B's kernel of call n - 1 has ended before A's call n + 1 begins:

1. A's call n has ended (stream order). It could end only because it consumed words that depend on every rank having
   started call n: in one-shot A polled a slot of every peer; in two-shot A polled a row's sum, which its owner pushed
   after polling a slot of every peer, or owns every row itself and polled all peers directly.
2. B started call n, so B's kernel of call n - 1 had ended (stream order), with all its zeros written.

Hence a rank is never more than one call ahead of a peer, and its pushes meet zeros. The argument uses neither the shape
of a call nor its algorithm: *every word that a call pushes is polled and zeroed within the same call*, at whatever
address the layout of that call gives it, so a finished call leaves its phase all zeros for any other layout. Rows, H,
dtype and algorithm may change from call to call, as long as all ranks make the same sequence of calls. A call without
rows pushes nothing and takes part in nothing: all ranks skip it and no phase flips.

In memory order: B's zeros are followed by a kernel boundary, then by B's pushes of call n; A observed words that depend
on those pushes, then passed a kernel boundary before it pushed again. Each step orders what is before it with what is
after it at system scope. CUDA-graph replay keeps stream order, and phase words live on the device, so replays and eager
calls mix freely. With programmatic dependent launch the next kernel waits (``griddepcontrol.wait``) for the end of the
previous one before its first read: the same boundary.

Two streams may not use one plane at once: their kernels are not ordered. Use a :func:`stream_class` for each.

Why nothing waits for a program that is not running
---------------------------------------------------
Programs wait for peers' programs and, in a split row, for their neighbours. The grid is capped (``launch.Room.fits``) so
that all programs of all ranks that share a GPU are resident together, and so that the ordinary kernels that a peer has in
its stream before its own call find multiprocessors on which nobody waits.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import compat

from . import environment, invariant
from . import select as selection

WATCHDOG_SECONDS = 600.0  # torch's own limit for a collective
MIN_WORLD, MAX_WORLD = 2, 8
DEPENDENT_LAUNCH = ("off", "end", "early")
SHARED_GPU = ("spare", "packed")
BACKENDS = ("auto", "CUDA", "NCCL")

_ALGORITHM = environment.register(
    "TPFUSE_ALGORITHM",
    "the algorithm of every call, or auto",
    "auto",
    environment.word(("auto", *selection.ALGORITHMS)),
)
_TABLE = environment.register(
    "TPFUSE_TABLE",
    "a selection table that `tpfuse bench --tune` wrote",
    selection.TABLE,
    lambda _, text: selection.load_table(Path(text)),
)
_WATCHDOG = environment.register(
    "TPFUSE_WATCHDOG_SECONDS",
    "seconds that a kernel waits for a peer before it gives up",
    WATCHDOG_SECONDS,
    environment.number(0.001, most=environment.LONGEST),
)
_PDL = environment.register(
    "TPFUSE_PDL", "programmatic dependent launch on sm_90 and newer", "early", environment.word(DEPENDENT_LAUNCH)
)
_PLANES = environment.register(
    "TPFUSE_CONCURRENT_PLANES", "planes of one process in use at the same time", 1, environment.number(1, int)
)
_SHARED_GPU = environment.register(
    "TPFUSE_SHARED_GPU", "what waiting kernels take of a GPU that ranks share", "spare", environment.word(SHARED_GPU)
)
_BACKEND = environment.register(
    "TPFUSE_SYMM_MEM", "torch's symmetric-memory backend", "auto", environment.word(BACKENDS)
)


@dataclass(frozen=True)
class Settings:
    """What the environment asks for; equal on all ranks of a group or the group refuses to start.

    Attributes:
        algorithm: ``TPFUSE_ALGORITHM``: ``auto`` or an algorithm for every call.
        table: ``TPFUSE_TABLE``: a tuned selection table.
        watchdog_seconds: ``TPFUSE_WATCHDOG_SECONDS``: how long a poll waits for a peer.
        dependent_launch: ``TPFUSE_PDL``: programmatic dependent launch on sm_90 and newer. ``off``: the next kernel is
            launched when this one has ended; ``end``: after the last store of this one; ``early``: once the kernel
            before this one has ended. In all three the next kernel reads nothing before this one has ended.
        concurrent_planes: ``TPFUSE_CONCURRENT_PLANES``: how many planes of one process may be in use at the same time.
        shared_gpu: ``TPFUSE_SHARED_GPU``: what waiting kernels take of a GPU that ranks share. ``spare`` leaves
            multiprocessors free, so that ordinary kernels of all ranks always run; ``packed`` fills it, for ranks that
            run nothing but these kernels, as benchmarks do.
        backend: ``TPFUSE_SYMM_MEM``: torch's symmetric-memory backend; ``auto`` is torch's own choice.
        batch_invariant: ``TPFUSE_BATCH_INVARIANT`` or the option: see :mod:`tpfuse.ops.invariant`.
    """

    algorithm: str = "auto"
    table: tuple[selection.Entry, ...] = field(default=selection.TABLE, repr=False)
    watchdog_seconds: float = WATCHDOG_SECONDS
    dependent_launch: str = "early"
    concurrent_planes: int = 1
    shared_gpu: str = "spare"
    backend: str = "auto"
    batch_invariant: bool = False

    @classmethod
    def from_environment(cls) -> Settings:
        """Raises ``ValueError`` naming the variable, its value and the valid ones."""
        batch_invariant = invariant.batch_invariant()
        algorithm = _ALGORITHM.value()
        if batch_invariant and algorithm == "library":
            raise ValueError(
                "TPFUSE_ALGORITHM='library' is not valid with batch_invariant: an all-reduce of the library sums in an order "
                "that depends on the size of the call; valid are auto, one_shot, two_shot. Unset one of the two on all ranks"
            )
        return cls(
            algorithm=algorithm,
            table=_TABLE.value(),
            watchdog_seconds=_WATCHDOG.value(),
            dependent_launch=_PDL.value(),
            concurrent_planes=_PLANES.value(),
            shared_gpu=_SHARED_GPU.value(),
            backend=_BACKEND.value(),
            batch_invariant=batch_invariant,
        )

    def fingerprint(self) -> str:
        return (
            f"algorithm={self.algorithm} table={selection.fingerprint(self.table)} "
            f"watchdog={self.watchdog_seconds} pdl={self.dependent_launch} planes={self.concurrent_planes} "
            f"shared_gpu={self.shared_gpu} backend={self.backend} batch_invariant={self.batch_invariant}"
        )


@dataclass(frozen=True)
class Ballot:
    """What one rank tells the others before anybody allocates. ``problem`` is None when it could use the kernels."""

    problem: str | None
    host: str
    device: str
    architecture: str
    versions: str
    settings: str


@dataclass(frozen=True)
class Verdict:
    """The outcome of a vote, the same on every rank."""

    cause: str | None  # why the group takes the library path; None if it takes the kernels
    architecture: str
    sharers: int  # most ranks of the group on one GPU


def judge(ballots: Sequence[Ballot]) -> Verdict:
    """Count the votes. Pure: every rank has the same ballots and reaches the same verdict.

    Raises ``RuntimeError`` when ranks were started with different settings: no path would be right for all.
    """
    for name in ("settings", "versions"):
        values = [getattr(b, name) for b in ballots]
        if len(set(values)) > 1:
            said = "; ".join(f"rank {r}: {v}" for r, v in enumerate(values))
            if name == "settings":
                raise RuntimeError(f"tpfuse: the ranks of a group have different settings ({said}); set them alike")
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
    return Verdict(None, architecture + ("-shared" if sharers > 1 else ""), sharers)


@dataclass(frozen=True)
class Plane:
    """One plane. All tensors stay alive with it; captured graphs hold their addresses.

    Attributes:
        peers: int64 ``(W + 1,)`` on the device: each rank's plane, then the host's failure record.
        state: int32 local state, laid out in ``kernels/epilogue.py``.
        record: int32 ``(4,)`` in pinned host memory: (1, missing rank, row, phase) once a poll has given up.
        seen: numpy view of ``record``.
    """

    group_name: str
    rank: int
    world: int
    device: torch.device
    stream_class: str
    architecture: str
    sharers: int
    phase_bytes: int
    memory: Tensor = field(repr=False)
    peers: Tensor = field(repr=False)
    state: Tensor = field(repr=False)
    record: Tensor = field(repr=False)
    seen: np.ndarray = field(repr=False)
    handle: object = field(repr=False)
    ranks: tuple[int, ...] = ()

    def raise_if_failed(self) -> None:
        """Raise ``RuntimeError`` if a poll on this plane has given up."""
        if self.seen[0]:
            _, missing, row, phase = (int(v) for v in self.seen)
            waited = {0: "its rows", 1: "a program of the same rank (split row)", 2: "the sum of a row from its owner"}
            source = (
                f"rank {self.ranks[missing]}" if phase // 2 == 0 else f"the owner, rank {self.ranks[row % self.world]}"
            )
            if phase // 2 == 1:
                source = "a sibling program"
            raise RuntimeError(
                f"tpfuse: rank {self.ranks[self.rank]} of group {self.group_name!r} (ranks {list(self.ranks)}) gave up "
                f"waiting for {source}: {waited[phase // 2]}, row {row}, phase {phase % 2}. A peer has died, or the "
                "ranks made different calls. Results since then are invalid. Restart the group, or call "
                "tpfuse.ops.reset(group) on every rank; TPFUSE_WATCHDOG_SECONDS sets how long a poll waits."
            )


@dataclass(frozen=True)
class GroupPath:
    """Which path a group takes and why.

    Attributes:
        kind: ``"fused"`` or ``"library"``.
        cause: for ``"library"``, what stands in the way; ``""`` for ``"fused"``.
        plane: the plane of a fused group.
    """

    kind: str
    cause: str
    settings: Settings
    plane: Plane | None = None


# The group is held weakly: torch gives the name of a destroyed group to another one. None: not compared (tests, experiments).
Held = weakref.ref[dist.ProcessGroup] | None
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
    try:
        import torch.distributed._symmetric_memory as _  # noqa: F401
    except ImportError as error:
        return f"torch has no symmetric memory ({error})"
    return None


def triton_version() -> str | None:
    """The version of Triton; None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return getattr(triton, "__version__", None)  # a folder of that name on the path has none


def _ballot(world: int, device: torch.device, settings: Settings) -> Ballot:
    from tpfuse import __version__

    properties = torch.cuda.get_device_properties(device)
    return Ballot(
        problem=_problem(world, device),
        host=host_identity(),
        device=str(getattr(properties, "uuid", device.index)),
        architecture=f"sm_{properties.major}{properties.minor}",
        versions=f"torch {torch.__version__}, triton {triton_version()}, tpfuse {__version__}",
        settings=settings.fingerprint(),
    )


def _everyone(mine: object, group: dist.ProcessGroup, world: int) -> list:
    everyone: list = [None] * world
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def lock_of(group_name: str) -> threading.RLock:
    """The lock under which a group is voted on. One a group: threads that vote on several may come in another order elsewhere."""
    with _lock:
        return _group_locks.setdefault(group_name, threading.RLock())


def is_current(held: Held) -> bool:
    """Whether the group that was voted on still exists; if not, its name may stand for another one. Asked on every call."""
    if held is None:
        return True
    group = held()
    return group is not None and compat.is_registered(group)


def path_of(group_name: str, device: torch.device) -> GroupPath:
    """The path of a group on this device, voted on at its first call.

    Collective at the first call of a (group, device, stream class), which must not be inside CUDA-graph capture.
    """
    key = (group_name, device.index, current_stream_class())
    found = _paths.get(key)
    if found is not None and is_current(found[1]):
        return found[0]
    with lock_of(group_name):
        found = _paths.get(key)
        if found is not None and is_current(found[1]):
            return found[0]  # another thread voted meanwhile
        if found is not None:
            forget(group_name)
            compat.forget_symmetric_memory(group_name)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"tpfuse: group {group_name!r} is used for the first time inside CUDA-graph capture, where nothing may be "
                "allocated; make one call on every rank before capturing (a warm-up step does)"
            )
        group = compat.resolve_group(group_name)
        path = _vote(group_name, group, device, key[2])
        _paths[key] = (path, weakref.ref(group))
        if path.kind == "library":
            ranks = dist.get_process_group_ranks(group)
            warnings.warn(
                f"tpfuse: group {group_name!r} (ranks {ranks}) takes the library path: {path.cause}",
                stacklevel=2,
            )
        return path


def _vote(group_name: str, group: dist.ProcessGroup, device: torch.device, klass: str) -> GroupPath:
    settings = Settings.from_environment()
    world = group.size()
    verdict = judge(_everyone(_ballot(world, device, settings), group, world))
    if verdict.cause is not None:
        return GroupPath("library", verdict.cause, settings)
    parts: dict[str, Any] = {}
    # A vote behind each step: a rank that cannot allocate must not leave its peers in the rendezvous.
    steps: tuple[Callable[[], None], ...] = (
        lambda: parts.update(allocation=_allocate(world, device, verdict, settings)),
        lambda: parts.update(plane=_connect(parts["allocation"], group_name, group, device, klass, verdict, settings)),
    )
    for step in steps:
        problem = _attempt(step, device)
        for other, said in enumerate(_everyone(problem, group, world)):
            if said is not None:
                return GroupPath("library", f"rank {other}: {said}", settings)
    return GroupPath("fused", "", settings, parts["plane"])


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


def peer_addresses(handle: Any, own: Tensor, rank: int, world: int) -> list[int]:
    """Where the ranks of a rendezvous have the start of the tensor that is ``own`` here.

    Raises ``RuntimeError`` where one of them cannot be reached.
    """
    # get_buffer adds the offset of the tensor within its allocation, which buffer_ptrs leaves out.
    addresses = [handle.get_buffer(r, (1,), torch.int32).data_ptr() for r in range(world)]
    addresses[rank] = own.data_ptr()
    if not all(addresses):
        raise RuntimeError(f"no peer access: addresses {addresses}")
    return addresses


def _phase_bytes(world: int, verdict: Verdict, settings: Settings) -> int:
    return selection.phase_bytes(selection.entry(verdict.architecture, world, settings.table))


def _allocate(world: int, device: torch.device, verdict: Verdict, settings: Settings) -> Tensor:
    """This rank's symmetric memory: two phases, and behind them the local state."""
    import torch.distributed._symmetric_memory as symm_mem

    from .kernels.epilogue import STATE_WORDS

    if settings.backend != "auto" and symm_mem.get_backend(device) != settings.backend:
        symm_mem.set_backend(settings.backend)  # type: ignore[arg-type]
    words, table = 2 * _phase_bytes(world, verdict, settings) // 4, 2 * (world + 1)
    return symm_mem.empty(words + table + table % 4 + STATE_WORDS, dtype=torch.int32, device=device)


def _connect(
    allocation: Tensor,
    group_name: str,
    group: dist.ProcessGroup,
    device: torch.device,
    klass: str,
    verdict: Verdict,
    settings: Settings,
) -> Plane:
    """The rendezvous of the group, and the plane over what it gives."""
    import torch.distributed._symmetric_memory as symm_mem

    world, rank = group.size(), group.rank()
    phase = _phase_bytes(world, verdict, settings)
    words, table = 2 * phase // 4, 2 * (world + 1)
    handle = symm_mem.rendezvous(allocation, group_name)  # type: ignore[arg-type]
    allocation.zero_()
    memory = allocation[:words]
    peers = allocation[words : words + table].view(torch.int64)
    state = allocation[words + table + table % 4 :]
    addresses = peer_addresses(handle, allocation, rank, world)
    record = torch.zeros(4, dtype=torch.int32, pin_memory=True)
    peers.copy_(torch.tensor([*addresses, record.data_ptr()], dtype=torch.int64))
    torch.cuda.synchronize(device)  # zeros everywhere before the second vote lets anybody push
    sharers = verdict.sharers
    if sharers > 1:
        # Ranks of other groups may be on this GPU too; all of them together must fit.
        sharers = max(sharers, dist.get_world_size())
    return Plane(
        group_name=group_name,
        rank=rank,
        world=world,
        device=device,
        stream_class=klass,
        architecture=verdict.architecture,
        sharers=sharers,
        phase_bytes=phase,
        memory=memory,
        peers=peers,
        state=state,
        record=record,
        seen=record.numpy(),
        handle=handle,
        ranks=tuple(dist.get_process_group_ranks(group)),
    )


def group_name_of(group: dist.ProcessGroup | str | None) -> str:
    if isinstance(group, str):
        return group
    group = group or dist.group.WORLD
    if group is None:
        raise ValueError(
            "no process group is initialised; call torch.distributed.init_process_group first or pass group="
        )
    return group.group_name


def describe_path(group: dist.ProcessGroup | str | None = None, device: torch.device | int | None = None) -> GroupPath:
    """Which path a group takes and why. Collective at the first use of the group: call it on every rank.

    On a machine without a GPU the answer is the library path, without any communication.
    """
    if not torch.cuda.is_available():
        return GroupPath("library", "no CUDA device", Settings.from_environment())
    if device is None:
        index = torch.cuda.current_device()
    else:
        index = device if isinstance(device, int) else device.index
    return path_of(group_name_of(group), torch.device("cuda", index))


def reset(group: dist.ProcessGroup | str | None = None) -> None:
    """Bring every plane of a group back to its initial state: zeros, phase 0, no failure.

    Collective: call it on every rank of the group, after an error of the watchdog or when a step was abandoned, outside
    CUDA-graph capture. Captured graphs stay valid: addresses do not change.
    """
    name = group_name_of(group)
    planes = [path.plane for (n, _, _), (path, _) in sorted(_paths.items()) if n == name and path.plane is not None]
    if not planes:
        return
    owner = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    for step in ("stop", "clear", "done"):
        for plane in planes:
            torch.cuda.synchronize(plane.device)
            if step == "clear":
                plane.memory.zero_()
                plane.state.zero_()
                plane.record.zero_()
                torch.cuda.synchronize(plane.device)
        _everyone(step, owner, planes[0].world)


def forget(group: dist.ProcessGroup | str) -> None:
    """Drop the planes of a group that is about to be destroyed. Captured graphs that used them must not run again."""
    name = group_name_of(group)
    for key in [k for k in _paths if k[0] == name]:
        del _paths[key]
