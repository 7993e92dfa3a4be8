"""Tuning: from timings, made up here, to a selection table. What the ranks measure needs a GPU."""

from __future__ import annotations

import datetime
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tpfuse.ops.select import KIB, MIB, TABLE, UNBOUNDED, Entry, entry, load_table, phase_bytes, save_table, select

from tpfuse.measure import ranks, tune
from tpfuse.measure.tune import Measured, Sweep, Timing, derive, generous, mean_regret, shapes

PLAN = Sweep()
LAUNCH = 8 * MIB


def model(world: int, algorithm: str, size: int) -> float:
    """Microseconds: 370 GB/s and 1.25 us a round for the kernels; a library that starts late and moves bytes faster."""
    moved = size / 370e3
    if algorithm == "one_shot":
        return 2 + 1.25 + (world - 1) * moved
    if algorithm == "two_shot":
        return 2 + 2.5 + 2 * (world - 1) / world * moved
    return 20 + 2 * (world - 1) / world * size / 500e3


def made_up(world: int, noise: float = 0.0, seed: int = 0, library: bool = True, plan: Sweep = PLAN) -> list[Timing]:
    rng = random.Random(seed)
    found = []
    for hidden, rows in shapes(plan):
        size = rows * hidden * 2
        for algorithm in ("one_shot", "two_shot", "library"):
            if (algorithm == "one_shot" and size > plan.one_shot_most(world)) or (
                algorithm == "library" and not library
            ):
                continue
            taken = model(world, algorithm, size) * (1 + rng.uniform(-noise, noise))
            found.append(Timing(world, hidden, rows, algorithm, taken, 0 if algorithm == "library" else LAUNCH))
    return found


def best_thresholds(world: int) -> tuple[int, int]:
    """The largest sizes of the plan up to which one-shot, and one of the kernels, is fastest in the model."""
    sizes = sorted({rows * hidden * 2 for hidden, rows in shapes(PLAN)})
    fastest = {s: min(("one_shot", "two_shot", "library"), key=lambda a: model(world, a, s)) for s in sizes}
    one_shot = max(s for s in sizes if fastest[s] == "one_shot")
    return one_shot, max(s for s in sizes if fastest[s] != "library")


@pytest.mark.parametrize("world", (2, 4, 8))
def test_thresholds_stand_where_the_algorithms_cross(world: int) -> None:
    found = derive(made_up(world), "sm_90", "here")
    assert (found.one_shot_bytes, found.two_shot_bytes) == best_thresholds(world)
    assert (found.architecture, found.world, found.measured) == ("sm_90", world, "here")
    assert mean_regret(found, made_up(world)) == 0.0


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("world", (2, 4, 8))
def test_noise_moves_thresholds_by_no_more_than_it_costs(world: int, seed: int) -> None:
    found = derive(made_up(world, noise=0.08, seed=seed), "sm_90", "here")
    assert 0 < found.one_shot_bytes <= found.two_shot_bytes
    # Judged by the true times: 8 % of noise cost less than 2 % on average.
    assert mean_regret(found, made_up(world)) < 0.02


def test_one_wrong_figure_changes_nothing() -> None:
    right = derive(made_up(4), "sm_90", "here")
    for algorithm, size, factor in (
        ("one_shot", 16 * KIB, 1.5),
        ("library", 64 * KIB, 0.2),
        ("two_shot", 2 * MIB, 2.0),
    ):
        timings = made_up(4)
        wrong = next(i for i, t in enumerate(timings) if t.algorithm == algorithm and t.size == size)
        timings[wrong] = replace(timings[wrong], microseconds=timings[wrong].microseconds * factor)
        assert derive(timings, "sm_90", "here") == right, (algorithm, size)


def test_a_library_that_is_always_faster_or_never() -> None:
    faster = [replace(t, microseconds=0.5) if t.algorithm == "library" else t for t in made_up(4)]
    assert derive(faster, "sm_90", "here").two_shot_bytes == 0
    slower = [replace(t, microseconds=1e6) if t.algorithm == "library" else t for t in made_up(4)]
    assert derive(slower, "sm_90", "here").two_shot_bytes == 32 * MIB  # nothing is known beyond


def test_the_library_may_follow_one_shot_at_once() -> None:
    slow = [replace(t, microseconds=1e6) if t.algorithm == "two_shot" else t for t in made_up(4)]
    found = derive(slow, "sm_90", "here")
    assert found.one_shot_bytes == found.two_shot_bytes > 0


def test_ranks_that_share_a_gpu_have_no_library_and_two_shot_has_no_end() -> None:
    found = derive(made_up(4, library=False), "sm_90-shared", "here")
    assert found.two_shot_bytes == UNBOUNDED
    assert found.one_shot_bytes == best_thresholds(4)[0]
    assert select("sm_90-shared", 4, torch.bfloat16, 8192, 10**6, table=[found]).algorithm == "two_shot"


def test_the_smallest_launch_that_is_nearly_as_fast_is_taken() -> None:
    def with_launches(cost: dict[int, float]) -> list[Timing]:
        return [t for t in made_up(4) if t.algorithm == "library"] + [
            replace(t, launch_bytes=n, microseconds=t.microseconds * (factor if t.size > n else 1.0))
            for t in made_up(4)
            if t.algorithm != "library"
            for n, factor in cost.items()
        ]

    assert derive(with_launches({2 * MIB: 1.3, 4 * MIB: 1.01, 8 * MIB: 1.0}), "a", "").launch_bytes == 4 * MIB
    assert derive(with_launches({2 * MIB: 1.01, 4 * MIB: 1.0, 8 * MIB: 1.0}), "a", "").launch_bytes == 2 * MIB
    assert derive(with_launches({2 * MIB: 1.3, 4 * MIB: 1.3, 8 * MIB: 1.0}), "a", "").launch_bytes == 8 * MIB


def test_one_shot_that_is_always_faster_is_taken_at_every_size_in_launches_like_two_shot() -> None:
    timings = [replace(t, launch_bytes=2 * MIB) if t.launch_bytes else t for t in made_up(2)]
    fast = [replace(t, microseconds=1.0) if t.algorithm == "one_shot" else t for t in timings]
    found = derive(fast, "sm_90", "here")
    assert (found.one_shot_bytes, found.two_shot_bytes, found.launch_bytes) == (32 * MIB, 32 * MIB, 2 * MIB)
    rows = found.one_shot_bytes // (4096 * 2)
    chosen = select("sm_90", 2, torch.bfloat16, 4096, rows, table=[found])
    assert (chosen.algorithm, chosen.rows_per_launch) == ("one_shot", 256)
    shared = derive([t for t in fast if t.algorithm != "library"], "sm_90-shared", "here")
    assert shared.one_shot_bytes == shared.two_shot_bytes == UNBOUNDED  # there is nothing else to take


def test_what_cannot_be_derived_says_why() -> None:
    with pytest.raises(ValueError, match="one world size"):
        derive([], "sm_90", "here")
    with pytest.raises(ValueError, match=r"one world size, not of \[2, 4\]"):
        derive([*made_up(2), *made_up(4)], "sm_90", "here")
    with pytest.raises(ValueError, match="no timings of two-shot"):
        derive([t for t in made_up(4) if t.algorithm != "two_shot"], "sm_90", "here")
    holes = [t for t in made_up(4) if (t.algorithm == "one_shot") == (t.size > MIB)]
    holes = [t for t in holes if t.algorithm != "library" or t.size > 4 * MIB]
    holes = [t for t in holes if t.algorithm != "two_shot" or t.size < 64 * KIB]
    with pytest.raises(ValueError, match="no pair of thresholds covers every measured shape"):
        derive(holes, "sm_90", "here")


@pytest.mark.parametrize("world", range(2, 9))
def test_the_generous_table_takes_every_shape_in_one_launch_on_any_architecture(world: int) -> None:
    own = Entry("sm_90", world, 1, 2, MIB, "built in")
    table = [*generous(PLAN, world, (own, *TABLE)), own, *TABLE]
    for architecture in ("sm_90", "sm_90-shared", "sm_123"):
        thresholds = entry(architecture, world, table)
        assert thresholds.measured == "generous, for tuning"
        for hidden, rows in shapes(PLAN):
            size = rows * hidden * 2
            for algorithm, most in (("one_shot", PLAN.one_shot_most(world)), ("two_shot", UNBOUNDED)):
                chosen = select(architecture, world, torch.bfloat16, hidden, rows, override=algorithm, table=table)
                if size <= min(most, max(PLAN.launches)):
                    assert chosen.rows_per_launch == rows
    assert phase_bytes(entry("sm_90", world, table)) <= 64 * MIB


def test_the_plan_has_whole_rows_of_every_hidden_size_with_the_largest_first() -> None:
    assert shapes(Sweep(hiddens=(4096, 7168), sizes=(8 * KIB, 14 * KIB, 56 * KIB))) == [
        (4096, 7),
        (4096, 1),
        (7168, 4),
        (7168, 1),
    ]


# -- the command, with ranks that are made up -----------------------------------------------------------------------


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Ranks answer at once; returns the environments that they would have had, with the tables read."""
    seen = []

    def run_ranks(fn, world, plan, timeout, env):
        assert fn is tune.measure
        seen.append({**env, "entries": load_table(Path(env["TPFUSE_TABLE"]))})
        facts = {"gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0"}
        return [Measured("sm_90", tuple(made_up(world)), facts)] * world

    monkeypatch.setattr(ranks, "run_ranks", run_ranks)
    return seen


def test_the_table_is_read_through_tpfuse_table(
    no_ranks: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, timings = tmp_path / "table.json", tmp_path / "timings.json"
    kept = Entry("sm_80", 4, 1, 2, MIB, "from another machine")
    save_table(out, [kept, Entry("sm_90", 4, 3, 4, MIB, "old")])
    said = tune.to_files(Sweep(worlds=(2, 4)), out, timings)
    assert f"TPFUSE_TABLE={out}" in said
    monkeypatch.setenv("TPFUSE_TABLE", str(out))
    from tpfuse.ops.settings import Settings

    table = Settings.from_environment().table
    for world in (2, 4):
        found = entry("sm_90", world, table)
        assert (found.one_shot_bytes, found.two_shot_bytes) == best_thresholds(world)
        assert found.measured.startswith(
            f"NVIDIA H200, {datetime.date.today().isoformat()}, torch 2.11.0, triton 3.6.0"
        )
        assert "bf16, H 4096, 8192, 8 KiB to 32 MiB" in found.measured
    assert entry("sm_80", 4, table) == kept
    assert len([e for e in table if (e.architecture, e.world) == ("sm_90", 4)]) == 1
    assert [len(r["timings"]) for r in json.loads(timings.read_text())] == [len(made_up(w)) for w in (2, 4)]
    # The ranks had room for what was measured, and no algorithm forced on them.
    assert [env["TPFUSE_ALGORITHM"] for env in no_ranks] == ["auto", "auto"]
    assert entry("sm_90", 2, no_ranks[0]["entries"]).one_shot_bytes == 32 * MIB
    assert "two-shot up to" in capsys.readouterr().err


def test_what_was_found_before_a_failure_is_kept(
    no_ranks: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = ranks.run_ranks

    def run_ranks(fn, world, plan, timeout, env):
        if world == 4:
            raise ranks.RankFailed("rank 3 of 4: died")
        return answer(fn, world, plan, timeout, env)  # type: ignore[call-arg]

    monkeypatch.setattr(ranks, "run_ranks", run_ranks)
    out = tmp_path / "table.json"
    with pytest.raises(ranks.RankFailed):
        tune.to_files(Sweep(worlds=(2, 4)), out, None)
    assert [(e.architecture, e.world) for e in tune.kept_entries(out)] == [("sm_90", 2)]


def test_files_are_judged_before_anything_is_measured(no_ranks: list, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json"):
        tune.to_files(Sweep(), broken, None)
    for out, timings in ((tmp_path / "absent" / "table.json", None), (None, tmp_path)):
        with pytest.raises(ValueError, match="cannot be written"):
            tune.to_files(Sweep(), out, timings)
    with pytest.raises(ValueError, match="whole number of rows"):
        tune.to_files(Sweep(hiddens=(4096,), sizes=(100,)), None, None)
    assert no_ranks == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.json"]


def test_the_command_writes_the_table(no_ranks: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from tpfuse.inspect.commands import app

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    out = tmp_path / "table.json"
    done = CliRunner().invoke(app, ["bench", "--tune", "--worlds", "4", "--hidden", "4096", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert entry("sm_90", 4, load_table(out)).one_shot_bytes == best_thresholds(4)[0]


def test_the_command_refuses_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from tpfuse.inspect.commands import app

    def refused(*arguments: object) -> str:
        done = CliRunner().invoke(app, ["bench", *map(str, arguments)])
        assert (done.exit_code, done.stdout) == (2, "")
        assert len(done.stderr.strip().splitlines()) == 1
        return done.stderr

    assert "give --tune too" in refused("--out", tmp_path / "t.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU is visible" in refused("--tune", "--out", tmp_path / "t.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "there is no folder" in refused("--tune", "--out", tmp_path / "absent" / "t.json")


# -- measuring, on gloo ranks with kernels that are made up ---------------------------------------------------------


def measured_on_a_cpu(rank: int, world: int, plan: Sweep, one_shot_bits: float) -> tuple[Measured, list[str]]:
    """``tune.measure`` with contenders that say what they were asked for; rank 1's clock is 3 us slow."""
    import torch.distributed as dist
    from tpfuse.ops import paths, plane, settings

    from tpfuse.measure import bench, contenders
    from tpfuse.measure.other_libraries import Unavailable

    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    cpu = torch.device("cpu")
    found = settings.Settings(table=tuple(generous(plan, world)))
    key = (name, cpu.index, "")
    none = (torch.zeros(1),) * 4
    own = plane.Plane(name, rank, world, cpu, "", "sm_90-shared", 2, 1 << 20, *none, seen=None, handle=None)  # type: ignore[arg-type]
    paths._paths[key] = (paths.GroupPath("fused", "", found, own), None)
    asked = []

    def contender(algorithm: str):
        def make(p):
            if algorithm == "library":
                raise Unavailable("NCCL refuses two ranks on one GPU")
            launch = entry("sm_90-shared", world, paths._paths[key][0].settings.table).launch_bytes
            asked.append(f"{algorithm} {p.rows} x {p.hidden} launch {launch // KIB}")
            bits = torch.full((1,), one_shot_bits if algorithm == "one_shot" else 1.0)

            def call():
                return bits, bits

            call.microseconds = model(world, algorithm, p.rows * p.hidden * 2)  # type: ignore[attr-defined]
            return call

        return make

    patch = pytest.MonkeyPatch()
    patch.setattr(paths, "describe_path", lambda group: paths._paths[key][0])
    patch.setattr(
        contenders,
        "CONTENDERS",
        {"one-shot": contender("one_shot"), "two-shot": contender("two_shot"), "library": contender("library")},
    )
    patch.setattr(bench, "time_call", lambda call, calls: [call.microseconds + 3 * rank] * 5)
    patch.setattr(paths, "raise_if_failed", lambda group: None)
    patch.setattr(torch.cuda, "synchronize", lambda: None)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    try:
        return tune.measure(rank, world, plan), asked
    finally:
        patch.undo()
        assert paths._paths.pop(key)[0].settings == found  # launches of other sizes were for one call only


SMALL = Sweep(worlds=(2,), hiddens=(64,), sizes=(8 * KIB, 64 * KIB), launches=(16 * KIB, 32 * KIB, 128 * KIB))


@pytest.mark.ranks
def test_every_rank_has_the_figures_of_rank_0() -> None:
    from ranks import run_ranks

    (first, asked), (second, also_asked) = run_ranks(measured_on_a_cpu, 2, SMALL, 1.0)
    assert first == second
    assert asked == also_asked
    # A call that two launches take whole is measured once.
    assert asked == [
        "one_shot 512 x 64 launch 16",
        "two_shot 512 x 64 launch 16",
        "one_shot 512 x 64 launch 32",
        "two_shot 512 x 64 launch 32",
        "one_shot 512 x 64 launch 128",
        "two_shot 512 x 64 launch 128",
        "one_shot 64 x 64 launch 16",
        "two_shot 64 x 64 launch 16",
    ]
    assert (first.architecture, first.facts["gpu"]) == ("sm_90-shared", "NVIDIA H200 shared by the ranks")
    assert [(t.rows, t.algorithm, t.launch_bytes) for t in first.timings] == [
        (rows, algorithm, launch)
        for rows in (512, 64)
        for launch in SMALL.launches
        for algorithm in ("one_shot", "two_shot")
    ]
    assert [t.microseconds for t in first.timings] == [model(2, t.algorithm, t.size) for t in first.timings]
    assert derive(first.timings, first.architecture, "here").two_shot_bytes == UNBOUNDED


@pytest.mark.ranks
def test_algorithms_that_differ_are_not_tuned() -> None:
    from ranks import run_ranks

    with pytest.raises(RuntimeError, match="different bits at 512 rows of 64"):
        run_ranks(measured_on_a_cpu, 2, SMALL, 2.0)
