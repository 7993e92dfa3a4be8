"""The link decides, not the architecture: classes of made-up topologies, and what each of them takes."""

from __future__ import annotations

import dataclasses
import warnings
from types import SimpleNamespace

import pytest
import torch
from tpfuse.ops import paths, select, topology
from tpfuse.ops.select import KIB, TABLE, Entry, key
from tpfuse.ops.settings import Settings
from tpfuse.ops.topology import NVLINK, PARTIAL, PCIE, UNKNOWN, Nvml, link_class, reach_of
from tpfuse.ops.vote import Ballot, judge, only_library

from tpfuse.inspect import doctor


class Machine:
    """A made-up NVML: GPUs, pairs with NVLink, and GPUs on switches.

    Args:
        pairs: GPUs that a bridge connects.
        switched: all GPUs are on NVSwitches, and their links end there.
        mute: the question for a pair is not answered, as in some virtual machines.
        nameless: what is at the end of a link is not told either.
    """

    def __init__(self, count: int, pairs=(), switched=False, mute=False, nameless=False) -> None:
        self.names = [f"gpu-{i}" for i in range(count)]
        self.pairs = {frozenset(pair) for pair in pairs}
        self.switched, self.mute, self.nameless = switched, mute, nameless

    def gpus(self) -> list[str]:
        return self.names

    def nvlink_between(self, a: int, b: int) -> bool | None:
        return None if self.mute else self.switched or frozenset((a, b)) in self.pairs

    def link_ends(self, gpu: int) -> list[str] | None:
        ends = ["switch"] * 18 if self.switched else ["gpu"] * 4 * sum(gpu in pair for pair in self.pairs)
        return ["unknown"] * len(ends) if self.nameless else ends

    def group(self, *gpus: int) -> list[topology.Reach]:
        return [reach_of(self.names[gpu], self) for gpu in gpus]


BRIDGED = Machine(4, pairs=((0, 1), (2, 3)))


@pytest.mark.parametrize(
    ("machine", "gpus", "name"),
    [
        (Machine(8, switched=True), range(8), NVLINK),
        (Machine(8, switched=True), (2, 5), NVLINK),
        (Machine(8, switched=True, mute=True), range(8), NVLINK),  # the switches are told, the pairs are not
        (BRIDGED, range(4), PARTIAL),
        (BRIDGED, (1, 2, 3), PARTIAL),
        (BRIDGED, (0, 1), NVLINK),
        (BRIDGED, (0, 2), PCIE),
        (Machine(2, pairs=((0, 1),)), (0, 1), NVLINK),
        (Machine(4), range(4), PCIE),
        (Machine(4, mute=True), range(4), PCIE),  # no active link at all says enough
        (Machine(2, switched=True, mute=True, nameless=True), (0, 1), NVLINK),  # links, and nowhere else to go
        (Machine(8, switched=True, mute=True, nameless=True), range(8), UNKNOWN),
        (Machine(4, pairs=((0, 1), (2, 3)), mute=True), range(4), UNKNOWN),
    ],
    ids=lambda value: None if isinstance(value, Machine) else str(value),  # the same in every process of pytest-xdist
)
def test_the_worst_pair_of_the_group_decides_the_class(machine, gpus, name):
    assert link_class(machine.group(*gpus)).name == name


def test_the_pair_that_decided_is_named():
    assert (
        str(link_class(BRIDGED.group(0, 1, 2, 3))) == "NVLink between some GPUs only (no NVLink between ranks 0 and 2)"
    )
    assert str(link_class(Machine(2).group(0, 1))) == "PCIe (no NVLink between ranks 0 and 1)"


def test_ranks_that_see_only_their_own_gpu_know_nothing():
    alone = [reach_of(f"gpu-{i}", SimpleNamespace(gpus=lambda: ["gpu-9"])) for i in range(2)]
    found = link_class(alone)
    assert found.name == UNKNOWN and "NVML does not show the GPU gpu-0" in found.detail


def test_where_one_rank_can_tell_its_word_counts():
    first, second = Machine(2, pairs=((0, 1),)).group(0, 1)
    blind = topology.Reach("gpu-1", problem="NVML: missing")
    assert link_class([first, second]).name == link_class([first, blind]).name == NVLINK
    assert link_class([topology.Reach("gpu-0", problem="NVML: missing"), blind]).name == UNKNOWN


def test_without_nvml_the_class_is_unknown_and_says_why(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(topology.ctypes, "CDLL", missing)
    reach = topology.reach("GPU-0A1b")
    assert reach.gpu == "0a1b" and "libnvidia-ml.so.1" in str(reach.problem)
    assert "libnvidia-ml.so.1" in str(link_class([reach, topology.Reach("other")]))


class FakeLibrary:
    """NVML's C interface over a :class:`Machine`, as far as it is called."""

    def __init__(self, machine: Machine, refused: int = 0) -> None:
        self.machine, self.refused = machine, refused

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = len(self.machine.names)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetUUID(self, handle, text, size):
        text.value = f"GPU-{self.machine.names[handle.value - 1]}".encode()
        return 0

    def nvmlDeviceGetP2PStatus(self, a, b, capability, status):
        assert capability.value == 2
        linked = self.machine.nvlink_between(a.value - 1, b.value - 1)
        status._obj.value = {True: 0, False: 5, None: 6}[linked]
        return self.refused

    def nvmlDeviceGetNvLinkState(self, handle, link, active):
        ends = self.machine.link_ends(handle.value - 1)
        if not ends:
            return 3  # not supported
        active._obj.value = int(link.value < len(ends))
        return 2 if link.value >= 18 else 0

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle, link, kind):
        kind._obj.value = {"gpu": 0, "switch": 2}[self.machine.link_ends(handle.value - 1)[link.value]]
        return 0


@pytest.mark.parametrize(
    "machine", [Machine(8, switched=True), BRIDGED, Machine(2)], ids=["switches", "bridges", "pcie"]
)
def test_what_nvml_answers_is_read_as_the_topology_that_it_is(machine):
    library = Nvml(FakeLibrary(machine))
    assert library.gpus() == machine.names
    count = range(len(machine.names))
    assert [reach_of(machine.names[i], library) for i in count] == machine.group(*count)
    refused = Nvml(FakeLibrary(machine, refused=3))
    assert refused.nvlink_between(0, 1) is None


def ballots(reaches):
    plain = Ballot(None, "host", "", "sm_90", "torch 2.11", "algorithm=auto")
    return [dataclasses.replace(plain, device=reach.gpu, reach=reach) for reach in reaches]


def algorithms(verdict, world, sizes, **given):
    return [select(verdict.architecture, world, torch.bfloat16, 4096, n // 8192, **given).algorithm for n in sizes]


SIZES = (8 * KIB, 32 * KIB, 40 * KIB, 1024 * KIB)


def test_eight_gpus_on_switches_take_the_measured_table():
    verdict = judge(ballots(Machine(8, switched=True).group(*range(8))))
    assert (verdict.cause, verdict.architecture) == (None, "sm_90")
    assert algorithms(verdict, 8, SIZES) == ["one_shot", "one_shot", "one_shot", "two_shot"]
    assert only_library(verdict, 8, Settings()) is None


@pytest.mark.parametrize("world", range(2, 9))
def test_over_pcie_only_small_calls_take_the_kernels(world):
    verdict = judge(ballots(Machine(8).group(*range(world))))
    assert (verdict.cause, verdict.architecture) == (None, "sm_90-pcie")
    assert algorithms(verdict, world, SIZES) == ["one_shot", "one_shot", "library", "library"]
    assert "library" not in algorithms(verdict, world, SIZES, batch_invariant=True)


def test_what_nobody_can_tell_is_treated_as_pcie_and_called_unknown():
    verdict = judge(ballots([topology.Reach(f"gpu-{i}", problem="NVML: missing") for i in range(4)]))
    assert (verdict.cause, verdict.architecture) == (None, "sm_90-unknown")
    assert algorithms(verdict, 4, SIZES) == ["one_shot", "one_shot", "library", "library"]


def test_with_nvlink_between_some_gpus_everything_takes_the_library_until_it_is_measured():
    verdict = judge(ballots(BRIDGED.group(0, 1, 2, 3)))
    assert verdict.architecture == "sm_90-partial-nvlink"
    cause = only_library(verdict, 4, Settings())
    assert cause is not None and "no NVLink between ranks 0 and 2" in cause and "tpfuse bench --tune" in cause
    assert set(algorithms(verdict, 4, SIZES)) == {"library"}
    measured = (Entry("sm_90-partial-nvlink", 4, 64 * KIB, 64 * KIB, 1 << 20, "here"), *TABLE)
    assert only_library(verdict, 4, Settings(table=measured)) is None
    assert algorithms(verdict, 4, SIZES, table=measured) == ["one_shot"] * 3 + ["library"]
    assert only_library(verdict, 4, Settings(batch_invariant=True)) is None


def test_ranks_that_share_a_gpu_keep_their_own_class():
    verdict = judge(ballots([topology.Reach("gpu-0")] * 4))
    assert (verdict.architecture, verdict.links.name) == (key("sm_90", "shared"), "shared")


def path(links, architecture="sm_90-pcie", **settings):
    own = SimpleNamespace(architecture=architecture, world=4)
    return paths.GroupPath("fused", "", Settings(**settings), own, links)  # type: ignore[arg-type]


def test_the_warning_and_the_doctor_say_what_the_links_cost():
    links = link_class(Machine(4).group(*range(4)))
    said = paths._warning(path(links))
    assert said is not None and "more than 32 KiB of x: PCIe (no NVLink between ranks 0 and 1)" in said
    check = doctor._taken(path(links))
    assert check.status == doctor.WARN and check.found.endswith("up to 32 KiB of x") and "PCIe" in check.found
    measured = (Entry("sm_90-pcie", 4, 1 << 20, 1 << 20, 1 << 20, "here"), *TABLE)
    assert paths._warning(path(links, table=measured)) is None
    nvlink = link_class(Machine(4, switched=True).group(*range(4)))
    assert paths._warning(path(nvlink, "sm_90")) is None
    assert doctor._taken(path(nvlink, "sm_90")) == doctor.Check(
        "path", doctor.OK, "fused, over NVLink between all GPUs"
    )


def test_the_doctor_shows_the_class_of_the_visible_gpus(monkeypatch):
    machine = Machine(4, pairs=((0, 1), (2, 3)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=machine.names[i]))
    monkeypatch.setattr(topology, "reach", lambda uuid: reach_of(uuid, machine))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    (check,) = doctor.links()
    assert check.status == doctor.WARN
    assert check.found == "NVLink between some GPUs only (no NVLink between GPUs 0 and 2)"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (check,) = doctor.links()
    assert (check.status, check.found) == (doctor.OK, "NVLink between all GPUs")


def test_a_group_over_pcie_warns_once_at_its_vote(monkeypatch):
    class Group:
        pass

    group = Group()
    found = path(link_class(Machine(4).group(*range(4))))
    monkeypatch.setattr(paths, "_paths", {})
    monkeypatch.setattr(paths, "_vote", lambda *_: found)
    monkeypatch.setattr(paths.compat, "resolve_group", lambda _: group)
    monkeypatch.setattr(paths.compat, "is_group", lambda *_: True)
    monkeypatch.setattr(paths.dist, "get_process_group_ranks", lambda _: [0, 1, 2, 3])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(
        UserWarning, match=r"group 'g' \(ranks \[0, 1, 2, 3\]\) takes the library path for more than 32 KiB"
    ):
        paths.path_of("g", torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paths.path_of("g", torch.device("cpu")) is found
