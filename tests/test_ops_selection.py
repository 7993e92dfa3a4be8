"""Selection, votes, geometry and settings: everything about the fused path that needs no GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tpfuse.ops import paths, plane, select
from tpfuse.ops.geometry import Part, Room, geometry, register_bound
from tpfuse.ops.select import TABLE, Entry, entry, load_table, phase_bytes, save_table, two_shot_rows
from tpfuse.ops.settings import Settings
from tpfuse.ops.topology import Reach
from tpfuse.ops.vote import Ballot, judge


def _ballot(**changes: object) -> Ballot:
    plain = Ballot(None, "host-a", "gpu-0", "sm_90", "torch 2.11", "algorithm=auto")
    found = dataclasses.replace(plain, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(found, reach=Reach(found.device, frozenset(("gpu-0", "gpu-1"))))


def test_small_calls_take_one_shot_medium_ones_two_shot_and_large_ones_the_library() -> None:
    chosen = [select("sm_90", 8, torch.bfloat16, 8192, rows).algorithm for rows in (1, 4, 5, 128, 1024, 1025, 8192)]
    assert chosen == ["one_shot", "one_shot", "two_shot", "two_shot", "two_shot", "library", "library"]


def test_the_choice_is_nowhere_slower_than_the_library_in_what_was_measured() -> None:
    from tpfuse.measure import tables

    results = tables.load(Path(__file__).parents[1] / "benchmarks" / "results" / "h100-nvlink-w2.json")
    times = {(r.contender, r.hidden, r.rows): r.median for r in results if r.median}
    name = {"one_shot": "one-shot", "two_shot": "two-shot", "library": "library"}
    chosen = set()
    for contender, hidden, rows in times:
        if contender == "library":
            algorithm = select("sm_90", 2, torch.bfloat16, hidden, rows).algorithm
            chosen.add(algorithm)
            assert times[name[algorithm], hidden, rows] <= 1.01 * times["library", hidden, rows], (hidden, rows)
            best = min(times[n, hidden, rows] for n in name.values())
            assert times[name[algorithm], hidden, rows] <= 1.08 * best, (hidden, rows)
    assert chosen == {"one_shot"}
    assert select("sm_90", 2, torch.bfloat16, 8192, 4097).algorithm == "library"


def test_thresholds_that_were_not_measured_follow_from_what_was_measured_between_two_gpus() -> None:
    from statistics import median

    from tpfuse.measure import links, tables

    path = Path(__file__).parents[1] / "benchmarks" / "results" / "h100-nvlink-w2.json"
    times = {(r.contender, r.hidden, r.rows): r.median for r in tables.load(path) if r.median and r.rows <= 8}
    second_round = median(
        times["two-shot", hidden, rows] - t for (name, hidden, rows), t in times.items() if name == "one-shot"
    )
    model = links.Links(**{**json.loads(path.read_text())["links"][0], "latency": second_round})
    assert f"{second_round:.2f} us" in entry("sm_90", 8).measured
    assert f"{model.bandwidth / 1000:.0f} GB/s" in entry("sm_90", 8).measured
    for world in range(3, 9):
        assert entry("sm_90", world).one_shot_bytes == pytest.approx(links.crossing(model, world), rel=0.05)


def test_the_choice_depends_on_bytes_alone() -> None:
    assert select("sm_90", 4, torch.float32, 2048, 8).algorithm == select("sm_90", 4, torch.bfloat16, 4096, 8).algorithm


@pytest.mark.parametrize("thresholds", TABLE, ids=lambda e: f"{e.architecture}-{e.world}")
@pytest.mark.parametrize("row_bytes", (16, 128, 5760, 8192, 16384, 32768))
@pytest.mark.parametrize("sums", (1, 2))
def test_every_launch_fits_its_phase(thresholds: Entry, row_bytes: int, sums: int) -> None:
    phase = phase_bytes(thresholds)
    hidden = row_bytes // 2
    for rows in (1, 2, 7, 64, 1000, 100_000):
        for override in ("auto", "one_shot", "two_shot"):
            chosen = select(
                "sm_90" + thresholds.architecture[3:],
                thresholds.world,
                torch.bfloat16,
                hidden,
                rows,
                override=override,
                sums=sums,
            )
            n = min(rows, chosen.rows_per_launch)
            if chosen.algorithm == "one_shot":
                assert sums * n * thresholds.world * row_bytes <= phase
            elif chosen.algorithm == "two_shot":
                assert sums * (-(-n // thresholds.world) * thresholds.world + n) * row_bytes <= phase


def test_two_sums_of_a_row_count_as_twice_its_bytes_except_for_the_library_which_reduces_both_too() -> None:
    def algorithms(**more: int) -> list[str]:
        return [
            select("sm_90", 4, torch.bfloat16, 4096, rows, **more).algorithm for rows in (15, 16, 31, 32, 2048, 2049)
        ]

    assert algorithms() == ["one_shot", "one_shot", "one_shot", "two_shot", "two_shot", "library"]
    assert algorithms(sums=2) == ["one_shot", "two_shot", "two_shot", "two_shot", "two_shot", "library"]


@pytest.mark.parametrize("world", range(2, 9))
def test_two_sums_of_the_widest_row_fit_a_plane_for_the_smallest_launches(world: int) -> None:
    tiny = Entry("sm_90", world, 0, 1 << 20, 1 << 10, "none")
    chosen = select("sm_90", world, torch.float32, 8192, 3, table=[tiny], sums=2)
    bytes_of_a_slot = 2 * chosen.rows_per_launch * 8192 * 4
    if chosen.algorithm == "one_shot":
        assert world * bytes_of_a_slot <= phase_bytes(tiny)
    else:
        assert two_shot_rows(phase_bytes(tiny), world, 2 * 8192 * 4) >= chosen.rows_per_launch


def test_two_shot_rows_is_the_most_that_fits() -> None:
    for world in range(2, 9):
        for phase, row in ((1 << 20, 8192), (3 << 20, 14336), (1 << 21, 32768)):
            n = two_shot_rows(phase, world, row)
            assert (-(-n // world) * world + n) * row <= phase


def test_every_world_size_has_an_entry_with_and_without_a_shared_gpu() -> None:
    for world in range(2, 9):
        assert entry("sm_100", world).measured
        assert entry("sm_90-shared", world).architecture == "any-shared"
    with pytest.raises(ValueError, match="world sizes 2 to 8"):
        entry("sm_90", 9)


def test_a_saved_table_comes_first_and_a_broken_one_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    mine = Entry("sm_90", 4, 123, 456, 1 << 20, "here")
    path = tmp_path / "table.json"
    save_table(path, [mine])
    assert entry("sm_90", 4, load_table(path)) == mine
    assert entry("sm_90", 8, load_table(path)).architecture == "any"
    path.write_text('[{"world": 4}]')
    with pytest.raises(ValueError, match=r"table\.json: entry 0"):
        load_table(path)


def test_a_vote_without_objections_enables_the_kernels() -> None:
    verdict = judge([_ballot(device="gpu-0"), _ballot(device="gpu-1")])
    assert (verdict.cause, verdict.architecture, verdict.sharers) == (None, "sm_90", 1)
    shared = judge([_ballot(), _ballot()])
    assert (shared.cause, shared.architecture, shared.sharers) == (None, "sm_90-shared", 2)


@pytest.mark.parametrize(
    "odd, cause",
    [
        ({"problem": "the GPU is older than sm_80"}, "rank 1: the GPU is older than sm_80"),
        ({"host": "host-b"}, "several hosts"),
        ({"architecture": "sm_80"}, "different GPUs"),
        ({"versions": "torch 2.12"}, "different versions"),
    ],
)
def test_one_objection_sends_everybody_to_the_library_with_the_cause(odd: dict[str, str], cause: str) -> None:
    verdict = judge([_ballot(device="gpu-0"), _ballot(device="gpu-1", **odd)])
    assert verdict.cause is not None
    assert cause in verdict.cause


def test_some_ranks_on_one_gpu_and_others_not_is_refused() -> None:
    verdict = judge([_ballot(), _ballot(), _ballot(device="gpu-1")])
    assert verdict.cause is not None and "share a GPU" in verdict.cause


def test_different_settings_are_an_error_on_every_rank() -> None:
    with pytest.raises(RuntimeError, match="rank 1: algorithm=library"):
        judge([_ballot(), _ballot(settings="algorithm=library")])


def test_settings_come_from_the_environment_and_wrong_values_name_the_valid_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TPFUSE_ALGORITHM", "two_shot")
    monkeypatch.setenv("TPFUSE_WATCHDOG_SECONDS", "2.5")
    settings = Settings.from_environment()
    assert (settings.algorithm, settings.watchdog_seconds) == ("two_shot", 2.5)
    monkeypatch.setenv("TPFUSE_ALGORITHM", "fastest")
    with pytest.raises(ValueError, match="valid values are auto, one_shot, two_shot, library"):
        Settings.from_environment()
    monkeypatch.setenv("TPFUSE_ALGORITHM", "auto")
    monkeypatch.setenv("TPFUSE_WATCHDOG_SECONDS", "soon")
    with pytest.raises(ValueError, match="TPFUSE_WATCHDOG_SECONDS='soon'"):
        Settings.from_environment()


def test_rows_are_split_only_while_all_parts_are_resident() -> None:
    for room in _rooms():
        for groups in range(1, 17):
            for rows in (1, 3, 12, 13, 25, 26, 50, 51, 128, 5000):
                shape = geometry(room, rows, groups)
                assert shape.part.groups * shape.split >= groups > shape.part.groups * (shape.split - 1)
                assert shape.programs <= min(room.fits(shape.part), rows * shape.split)
                if shape.split > 1:
                    assert shape.programs == rows * shape.split


def _kernels() -> list[tuple[str, int, Part]]:
    parts = [Part(lanes, steps) for lanes in (128, 256, 512, 1024) for steps in range(1, 17)]
    return [
        (algorithm, world, part) for algorithm in ("one_shot", "two_shot") for world in range(2, 9) for part in parts
    ]


def _rooms() -> list[Room]:
    return [
        Room(algorithm, world, 132, sharers, packed=packed)
        for algorithm in ("one_shot", "two_shot")
        for world in (2, 4, 8)
        for sharers, packed in ((1, False), (world, False), (world, True))
    ]


def test_all_programs_of_all_ranks_on_a_shared_gpu_are_resident_together() -> None:
    for algorithm, world, part in _kernels():
        programs = Room(algorithm, world, 132, sharers=world, packed=True).fits(part)
        registers = register_bound(algorithm, world, part) * part.lanes
        assert programs >= 1
        assert world * programs <= 132 * min(16, 65536 // registers, 2048 // part.lanes)


def test_waiting_programs_leave_multiprocessors_to_the_kernels_they_wait_for() -> None:
    """Eight free in one of at most eight processing clusters, for a thread block cluster of eight: 7 * 8 + 1."""
    for algorithm, world, part in _kernels():
        for kernels in range(2, 17):
            for sharers, concurrent in ((kernels, 1), (1, kernels), (2, kernels // 2)):
                programs = Room(algorithm, world, 132, sharers, concurrent).fits(part)
                assert programs >= 1
                assert sharers * concurrent * programs <= 132 - 57
        alone = Room(algorithm, world, 132).fits(part)  # nobody else waits on this GPU
        assert 128 <= alone <= (132 - 4) * 2048 // part.lanes


def test_a_failure_record_names_group_rank_phase_and_row() -> None:
    import numpy as np

    p = plane.Plane(
        "tp",
        0,
        4,
        torch.device("cpu"),
        "",
        "sm_90",
        1,
        1 << 20,
        *(torch.zeros(1),) * 4,
        seen=np.array([1, 2, 7, 1]),
        handle=None,
        ranks=(4, 5, 6, 7),
    )
    with pytest.raises(RuntimeError, match=r"rank 4 of group 'tp' .* waiting for rank 6: its rows, row 7, phase 1"):
        p.raise_if_failed()
    owner = dataclasses.replace(p, seen=np.array([1, 0, 7, 5]))
    with pytest.raises(RuntimeError, match=r"the owner, rank 7: the sum of a row"):
        owner.raise_if_failed()
    dataclasses.replace(p, seen=np.zeros(4, int)).raise_if_failed()


def test_without_a_gpu_the_path_is_the_library_and_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    path = paths.describe_path()
    assert (path.kind, path.cause, path.plane) == ("library", "no CUDA device", None)


@pytest.mark.parametrize("name", ("one-shot:128x2", "two-shot:512x1:full", "tpfuse", "floor"))
def test_a_benchmark_takes_contenders_and_geometries_by_name(name: str) -> None:
    from tpfuse.measure import contenders

    assert callable(contenders.contender(name))


@pytest.mark.parametrize(
    "name",
    (
        "one-shot:0",
        "one-shot:128x0",
        "one-shot:100x1",
        "one-shot:128x17",
        "one-shot:128x2:half",
        "library:128x2",
        "nothing",
    ),
)
def test_a_contender_that_does_not_exist_is_named_with_the_valid_ones(name: str) -> None:
    from tpfuse.measure import bench

    with pytest.raises(ValueError, match="is no contender") as raised:
        bench.run(bench.Survey(contenders=("tpfuse", name)))
    assert name in str(raised.value) and "flashinfer" in str(raised.value)


def test_a_forced_geometry_covers_every_group_and_fits() -> None:
    from tpfuse.ops.geometry import forced_geometry

    for groups in range(1, 17):
        for part in (Part(lanes, steps) for lanes in (128, 512) for steps in range(1, 17)):
            for rows in (1, 7, 128, 4096):
                shape = forced_geometry(rows, groups, part, 264)
                if shape is None:
                    assert rows * -(-groups // part.groups) > 264
                    continue
                assert 1 <= shape.programs <= 264
                assert part.groups * shape.split >= groups > part.groups * (shape.split - 1)
                assert shape.programs == rows * shape.split if shape.split > 1 else shape.programs <= rows


def test_compiling_ahead_finds_the_kernels_of_a_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import compile_ahead

    found = compile_ahead.kernels((2, 8), (4096,), (1, 64, 2048), ("tpfuse", "one-shot:256x2"), gpus=2)
    del sys.modules["compile_ahead"]
    assert {(stand.world, stand.sharers) for _, _, stand in found} == {(2, 1), (8, 8)}
    assert {kernel.function.__name__ for kernel, _, _ in found} == {"one_shot_kernel", "two_shot_kernel"}
    variants = [kernel.constexprs[1] for kernel, _, _ in found]
    assert {variant.wait for variant in variants} == {True, False}  # the floor is among them
    assert (256, 2) in {(variant.lanes, variant.steps) for variant in variants}
    assert len({id(kernel) for kernel, _, _ in found}) == len(found)
