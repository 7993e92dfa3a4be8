"""Check the environment and say which path the fused op would take here. Needs neither a GPU nor a process group."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tpfuse import compat
from tpfuse.ops import settings, vote

OK, NOTE, WARN, FAIL = "ok", "note", "warn", "fail"
OLDEST, BEYOND = (2, 11), (2, 16)
OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
# What has to be equal on every rank: ranks that differ here may decide differently and then wait for each other.
AGREED = ("python", "torch", "triton", "tpfuse", "transformers", "nccl", "device")


class DoctorError(RuntimeError):
    """The checks could not run at all. The message is one line."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: ``ok``; ``note``: for information; ``warn``: works, with less than it could; ``fail``: has to be fixed.
        found: what is there.
        fix: what to do, or empty.
    """

    name: str
    status: str
    found: str
    fix: str = ""


def run(*, as_json: bool = False, timeout: float = 60.0) -> int:
    """Check, print on rank 0, and return the exit code: 1 when some check failed on some rank, else 0.

    Raises:
        DoctorError: the variables of torchrun are incomplete.
    """
    checks = [check for look in CHECKS for check in _looked(look)]
    with _Ranks(timeout) as ranks:
        checks += ranks.checks
        checks += _looked(path)
        every = ranks.gather(checks)
    failed = any(check.status == FAIL for own in every for check in own)
    if ranks.rank == 0:
        shown = [*every[0], *_elsewhere(every)]
        print(json.dumps([asdict(check) for check in shown], indent=2) if as_json else text(shown))
    return int(failed)


def text(checks: list[Check]) -> str:
    """The checks as a table, with the fixes below it."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return "\n".join(
            f"{c.status:4}  {c.name:18} {c.found}" + (f"\n      fix: {c.fix}" if c.fix else "") for c in checks
        )
    colors = {OK: "green", NOTE: "default", WARN: "yellow", FAIL: "bold red"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        found = Text(check.found)
        if check.fix:
            found.append(f"\n{check.fix}", "italic")
        table.add_row(Text(check.status, colors[check.status]), check.name, found)
    console = Console(highlight=False, file=sys.stdout)
    with console.capture() as capture:
        console.print(table)
    return capture.get().strip("\n")


# -- one function per thing to check ------------------------------------------------------------------------------


def versions() -> Iterator[Check]:
    yield Check("python", OK if sys.version_info >= (3, 10) else FAIL, platform.python_version())
    found = _release(torch.__version__)
    if OLDEST <= found < BEYOND:
        yield Check("torch", OK, torch.__version__)
    else:
        status = FAIL if found < OLDEST else WARN
        yield Check(
            "torch", status, f"{torch.__version__}, tested from 2.11 to 2.15", "pip install 'torch>=2.11,<2.16'"
        )
    triton = vote.triton_version()
    if triton is None:
        status = WARN if torch.cuda.is_available() else NOTE
        missing = "not installed" if _version("triton") is None else "installed, but it cannot be imported"
        yield Check("triton", status, missing, "pip install 'triton>=3.6,<4'; without it only the library path runs")
    elif _release(triton) < OLDEST_TRITON:
        yield Check("triton", FAIL, triton, "pip install 'triton>=3.6,<4'")
    else:
        yield Check("triton", OK, triton)
    yield Check("transformers", NOTE, _version("transformers") or "not installed; only tpfuse.hf and explain need it")


def entry_point() -> Iterator[Check]:
    """Whether torch.compile(backend="tpfuse") finds us without an import."""
    points = metadata.entry_points(group="torch_dynamo_backends")
    if any(point.name == "tpfuse" for point in points):
        yield Check("entry point", OK, "torch.compile(backend='tpfuse') needs no import")
        return
    yield Check(
        "entry point", FAIL, "torch does not know the backend 'tpfuse'",
        "install the package (pip install tpfuse, or pip install -e . in a checkout); running from a folder is not enough",
    )  # fmt: skip


def variables() -> Iterator[Check]:
    """Whether the environment's TPFUSE_ variables are known and would be accepted."""
    given = {name: value for name, value in os.environ.items() if name.startswith(settings.PREFIX)}
    if not given:
        return
    shown = ", ".join(f"{name}={value}" for name, value in sorted(given.items()))
    wrong = settings.invalid()
    if not wrong:
        try:  # each is valid alone; what contradicts another is told when all are read together
            settings.Settings.from_environment()
        except ValueError as error:
            wrong = [str(error)]
    wrong += settings.unknown()
    if wrong:
        yield Check("environment", FAIL, shown, "; ".join(wrong))
    else:
        yield Check("environment", NOTE, shown)


def compilers() -> Iterator[Check]:
    """Inductor on a CPU needs a C++ compiler."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++"))), None)
    if compiler:
        yield Check("C++ compiler", OK, compiler)
    else:
        fix = "install g++ to compile for a CPU with tpfuse.inner=inductor; aot_eager works without"
        yield Check("C++ compiler", WARN, "none found", fix)


def gpus() -> Iterator[Check]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        found = f"no GPU is visible (torch is built for {built})" if built else "this torch is built for CPUs"
        yield Check("GPU", NOTE, found)
        return
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    capability = torch.cuda.get_device_capability()
    shown = f"{len(names)} x {names[0]}" if len(set(names)) == 1 else ", ".join(names)
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    old = torch.version.cuda is not None and capability < OLDEST_CAPABILITY
    fix = "the kernels need compute capability 8.0 or newer; the library path runs instead" if old else ""
    yield Check("GPU", WARN if old else OK, f"{shown}, capability {capability[0]}.{capability[1]}, {runtime}", fix)
    yield (
        Check("NCCL", OK, _nccl())
        if _nccl()
        else Check("NCCL", WARN, "not in this torch", "install a CUDA build of torch")
    )
    yield from _peer_access(len(names))


def _peer_access(count: int) -> Iterator[Check]:
    if count < 2:
        yield Check("peer access", NOTE, "one GPU: nothing to reach")
        return
    missing = [
        f"{a}-{b}" for a in range(count) for b in range(a + 1, count) if not torch.cuda.can_device_access_peer(a, b)
    ]
    if missing:
        fix = "groups over these GPUs take the library path; check `nvidia-smi topo -p2p r` and the container's IPC settings"
        yield Check("peer access", WARN, f"missing between GPUs {', '.join(missing)}", fix)
    else:
        yield Check("peer access", OK, f"between all {count} GPUs")


def links() -> Iterator[Check]:
    """The class of the links between the visible GPUs, by which a group over all of them would be judged."""
    from tpfuse.ops import topology

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2 or torch.version.cuda is None:
        return
    found = topology.link_class([topology.reach(str(torch.cuda.get_device_properties(i).uuid)) for i in range(count)])
    shown = str(found).replace("ranks", "GPUs")
    if found.name == topology.NVLINK:
        yield Check("links", OK, shown)
    else:
        fix = "groups over them take the library path but for small calls, if any; `tpfuse bench --tune` measures this machine"
        yield Check("links", WARN, shown, fix)


def symmetric_memory() -> Iterator[Check]:
    error = compat.symmetric_memory_error()
    if error is not None:
        yield Check(
            "symmetric memory", WARN, f"not in this torch: {error}", "upgrade torch; the library path runs instead"
        )
        return
    if not torch.cuda.is_available():
        yield Check("symmetric memory", NOTE, "needs a GPU")
        return
    yield Check("symmetric memory", OK, "available")
    limit = shutil.disk_usage("/dev/shm").total >> 20 if os.path.isdir("/dev/shm") else 0
    if limit < 64:
        yield Check(
            "shared memory", WARN, f"/dev/shm has {limit} MiB", "start the container with --ipc=host or --shm-size=1g"
        )


def mps() -> Iterator[Check]:
    """NVIDIA MPS lets several ranks share one GPU."""
    folder = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    if (folder / "control").exists():
        yield Check("MPS", NOTE, f"control pipe in {folder}: ranks may share a GPU")
    elif torch.cuda.is_available():
        yield Check("MPS", NOTE, "not running: each rank needs a GPU of its own")


def path() -> Iterator[Check]:
    """Which path the op would take for the default group."""
    from tpfuse import ops

    if not torch.cuda.is_available():
        yield Check("path", OK, "library: the group's own all-reduce (gloo), then the exact add and norm on the CPU")
    elif not dist.is_initialized():
        yield Check("path", NOTE, "no process group: run `torchrun --nproc-per-node=N -m tpfuse doctor` to test one")
    elif dist.get_world_size() < 2:
        yield Check("path", NOTE, "the group has one rank: nothing to reduce")
    else:
        yield _taken(ops.describe_path(dist.group.WORLD))


def _taken(path: Any) -> Check:
    """What there is to say of a group's path (``ops.GroupPath``)."""
    from tpfuse.ops import paths

    if path.kind != "fused":
        fix = "the group's own all-reduce and one add+norm kernel run instead; remove the cause to fuse all"
        return Check("path", WARN, f"{path.kind}: {path.cause}", fix)
    found = f"fused, over {path.links}" if path.links else "fused"
    most = paths.small_calls_only(path)
    if most is None:
        return Check("path", OK, found)
    fix = "nothing was measured for these links: larger calls take the library path until `tpfuse bench --tune` has measured them"
    return Check("path", WARN, f"{found}, up to {most >> 10} KiB of x", fix)


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    versions, entry_point, variables, compilers, gpus, links, symmetric_memory, mps,
)  # fmt: skip


# -- ranks --------------------------------------------------------------------------------------------------------


class _Ranks:
    """The other ranks under torchrun: joins them, compares facts, leaves again. Alone it is rank 0 of 1."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.rank = int(os.environ.get("RANK", "0"))
        self.checks: list[Check] = []
        self.joined = False

    def __enter__(self) -> _Ranks:
        if dist.is_initialized():
            self.rank = dist.get_rank()
        elif "WORLD_SIZE" in os.environ:
            self._join()
        if dist.is_initialized():
            self.checks.append(Check("process group", OK, f"{dist.get_world_size()} ranks, {dist.get_backend()}"))
            self.checks += _agreement(self.gather(facts()))
        else:
            self.checks.append(Check("process group", NOTE, "none: not started by torchrun"))
        return self

    def __exit__(self, *_: object) -> None:
        if self.joined:
            dist.destroy_process_group()

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in rank order."""
        if not dist.is_initialized():
            return [value]
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, value)
        return every

    def _join(self) -> None:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise DoctorError(
                f"WORLD_SIZE is set, but {', '.join(missing)} is not; start with torchrun or unset WORLD_SIZE"
            )
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        alone = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        backend = "cpu:gloo,cuda:nccl" if alone else "gloo"
        try:
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=self.timeout))
        except Exception as error:  # torch raises several kinds, all of them meaning that the ranks did not meet
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise DoctorError(f"the ranks did not meet at {where} within {self.timeout:g} s: {error}") from error
        self.joined = True


def facts() -> dict[str, str]:
    """What :data:`AGREED` names, of this rank."""
    device = "cpu"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()} {torch.cuda.get_device_capability()}"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": vote.triton_version() or "none",
        "tpfuse": _version("tpfuse") or "none",
        "transformers": _version("transformers") or "none",
        "nccl": _nccl(),
        "device": device,
        **{name: value for name, value in os.environ.items() if name.startswith("TPFUSE_")},
    }


def _agreement(every: list[dict[str, str]]) -> list[Check]:
    """One failed check per fact on which ranks differ, or one good one."""
    names = list(dict.fromkeys([*AGREED, *(name for one in every for name in one)]))
    wrong = []
    for name in names:
        values: dict[str, list[int]] = {}
        for rank, one in enumerate(every):
            values.setdefault(one.get(name, "unset"), []).append(rank)
        if len(values) > 1:
            found = "; ".join(f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in values.items())
            wrong.append(Check(f"{name} differs", FAIL, found, "make it equal on all ranks"))
    return wrong or [Check("ranks agree", OK, f"{len(every)} ranks have equal versions, devices and TPFUSE variables")]


def _elsewhere(every: list[list[Check]]) -> Iterator[Check]:
    """What failed on other ranks and not on rank 0."""
    own = {(check.name, check.found) for check in every[0]}
    for rank, checks in enumerate(every[1:], start=1):
        for check in checks:
            if check.status == FAIL and (check.name, check.found) not in own:
                yield Check(f"{check.name} (rank {rank})", FAIL, check.found, check.fix)


def _looked(look: Callable[[], Iterator[Check]]) -> list[Check]:
    """A check that breaks is itself a finding."""
    try:
        return list(look())
    except Exception as error:
        return [Check(look.__name__.replace("_", " "), FAIL, f"{type(error).__name__}: {error}")]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    parts = version.split("+", maxsplit=1)[0].split(".")[:2]
    return tuple(int(part) for part in parts if part.isdigit())


def _nccl() -> str:
    if not torch.cuda.is_available() or not dist.is_nccl_available():
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))
