"""How the GPUs of a group are connected: the link class, from what the ranks report of their own GPU.

Peer access alone says little: it works over PCIe too, at a fraction of NVLink's bandwidth. Each rank asks NVML about its GPU
(:func:`reach_of`), and :func:`link_class` decides from all reports, the same on every rank. What cannot be found out counts as
PCIe, under a name of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

NVLINK, PARTIAL, PCIE, UNKNOWN, SHARED = "nvlink", "partial-nvlink", "pcie", "unknown", "shared"
WORDS = {
    NVLINK: "NVLink between all GPUs",
    PARTIAL: "NVLink between some GPUs only",
    PCIE: "PCIe",
    UNKNOWN: "unknown links, taken for PCIe",
    SHARED: "one GPU shared by the ranks",
}


@dataclass(frozen=True)
class Reach:
    """What one rank knows of the NVLinks of its GPU. GPUs are named by UUID, without the prefix ``GPU-``.

    Attributes:
        gpu: this rank's.
        linked, apart: GPUs that NVML says can, and cannot, be reached over NVLink.
        switch: at least one active link ends at an NVSwitch.
        active: number of active links; None where NVML does not tell.
        seen: GPUs that NVML shows on this machine, its own included.
        problem: why nothing is known, or None.
    """

    gpu: str
    linked: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()
    switch: bool = False
    active: int | None = None
    seen: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class Links:
    """The link class of a group and, where it is not the best, the pair that decided it."""

    name: str
    detail: str = ""

    def __str__(self) -> str:
        return WORDS[self.name] + (f" ({self.detail})" if self.detail else "")


def _pair(a: Reach, b: Reach) -> bool | None:
    """Whether NVLink connects two GPUs; None where nobody can tell."""
    if b.gpu in a.linked or a.gpu in b.linked:
        return True
    if a.switch and b.switch:
        return True  # a switch connects every GPU that is on it
    if b.gpu in a.apart or a.gpu in b.apart or a.active == 0 or b.active == 0:
        return False
    if a.active and b.active and a.seen == b.seen == 2:
        return True  # both have links, and no other GPU is there for them to end at
    return None


def link_class(reaches: Sequence[Reach]) -> Links:
    """The link class of a group: that of its worst pair. Pure.

    Args:
        reaches: one a rank, in rank order. The ranks are on one machine.
    """
    if len({reach.gpu for reach in reaches}) < len(reaches):
        return Links(SHARED)
    found = {(i, j): _pair(reaches[i], reaches[j]) for i, j in combinations(range(len(reaches)), 2)}
    for (i, j), linked in found.items():
        if linked is None:
            problems = dict.fromkeys(r.problem for r in (reaches[i], reaches[j]) if r.problem)
            said = "; ".join(problems) or "NVML does not tell"
            return Links(UNKNOWN, f"ranks {i} and {j}: {said}")
    without = [pair for pair, linked in found.items() if not linked]
    if not without:
        return Links(NVLINK)
    i, j = without[0]
    return Links(PARTIAL if len(without) < len(found) else PCIE, f"no NVLink between ranks {i} and {j}")


# -- asking NVML ------------------------------------------------------------------------------------------------------


class Library(Protocol):
    """What is needed of NVML. GPUs are numbered as NVML does; a name is a UUID without its prefix."""

    def gpus(self) -> list[str]: ...
    def nvlink_between(self, a: int, b: int) -> bool | None: ...
    def link_ends(self, gpu: int) -> list[str] | None: ...


def reach_of(gpu: str, library: Library) -> Reach:
    """What NVML knows of one GPU, given by UUID."""
    gpu = bare(gpu)
    names = library.gpus()
    if gpu not in names:
        return Reach(gpu, seen=len(names), problem=f"NVML does not show the GPU {gpu}")
    me = names.index(gpu)
    between = {name: library.nvlink_between(me, n) for n, name in enumerate(names) if n != me}
    ends = library.link_ends(me)
    return Reach(
        gpu,
        linked=frozenset(name for name, linked in between.items() if linked),
        apart=frozenset(name for name, linked in between.items() if linked is False),
        switch=ends is not None and "switch" in ends,
        active=None if ends is None else len(ends),
        seen=len(names),
    )


def reach(gpu: str) -> Reach:
    """What this rank knows of its GPU. Never raises: it is part of a ballot."""
    try:
        with nvml() as library:
            return reach_of(gpu, library)
    except Exception as error:
        return Reach(bare(gpu), problem=f"NVML: {error}")


def bare(uuid: str) -> str:
    """A UUID as torch writes it: NVML has a prefix before it."""
    return str(uuid).removeprefix("GPU-").lower()


class NvmlError(RuntimeError):
    """A call of NVML failed."""


class Nvml:
    """NVML through ctypes: the driver brings the library, so nothing has to be installed."""

    MOST_LINKS = 36
    CAPABILITY_NVLINK = 2  # NVML_P2P_CAPS_INDEX_NVLINK
    STATUS_OK, STATUS_UNKNOWN = 0, 6
    ENDS = ("gpu", "ibmnpu", "switch")  # nvmlIntNvLinkDeviceType_t

    def __init__(self, library: Any) -> None:
        self._library = library

    def _call(self, name: str, *args: Any) -> None:
        error = getattr(self._library, name)(*args)
        if error:
            raise NvmlError(f"{name} failed with error {error}")

    def _handle(self, gpu: int) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(gpu), ctypes.byref(handle))
        return handle

    def gpus(self) -> list[str]:
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        names = []
        for gpu in range(count.value):
            text = ctypes.create_string_buffer(96)
            try:
                self._call("nvmlDeviceGetUUID", self._handle(gpu), text, ctypes.c_uint(96))
            except NvmlError:  # a GPU that this container may not use
                names.append(f"hidden {gpu}")
            else:
                names.append(bare(text.value.decode()))
        return names

    def nvlink_between(self, a: int, b: int) -> bool | None:
        """Whether two GPUs reach each other over NVLink, through switches or not; None where NVML cannot tell."""
        status = ctypes.c_int()
        try:
            self._call(
                "nvmlDeviceGetP2PStatus",
                self._handle(a),
                self._handle(b),
                ctypes.c_int(self.CAPABILITY_NVLINK),
                ctypes.byref(status),
            )
        except (NvmlError, AttributeError):
            return None
        return None if status.value == self.STATUS_UNKNOWN else status.value == self.STATUS_OK

    def link_ends(self, gpu: int) -> list[str] | None:
        """What is at the other end of each active link of a GPU: ``gpu``, ``switch``, ``unknown``; None without an answer.

        A GPU without NVLink answers that it does not support the question: it has no active link.
        """
        handle = self._handle(gpu)
        ends = []
        for link in range(self.MOST_LINKS):
            active, kind = ctypes.c_int(), ctypes.c_int(255)
            error = self._library.nvmlDeviceGetNvLinkState(handle, ctypes.c_uint(link), ctypes.byref(active))
            if error in (2, 3):  # no such link; no NVLink at all
                break
            if error:
                return None
            if active.value:
                # Newer than the rest, and refused in some virtual machines.
                with contextlib.suppress(NvmlError, AttributeError):
                    self._call("nvmlDeviceGetNvLinkRemoteDeviceType", handle, ctypes.c_uint(link), ctypes.byref(kind))
                ends.append(self.ENDS[kind.value] if kind.value < len(self.ENDS) else "unknown")
        return ends


@contextlib.contextmanager
def nvml() -> Iterator[Nvml]:
    """NVML, started and stopped. Raises ``OSError`` where it is not installed, :class:`NvmlError` where it does not start."""
    library = ctypes.CDLL("libnvidia-ml.so.1")
    found = Nvml(library)
    found._call("nvmlInit_v2")
    try:
        yield found
    finally:
        library.nvmlShutdown()
