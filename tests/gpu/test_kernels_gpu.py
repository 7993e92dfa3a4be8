"""The op on GPUs: ranks as processes, on one GPU through MPS or one GPU each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import on_ranks
import rows_on_ranks

from tpfuse.measure.ranks import gpu_count, run_ranks, why_not

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
WORLDS = (2, 4, 8)
HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def _gpu() -> None:
    missing = why_not(2)
    if missing:
        pytest.skip(f"needs a GPU that two ranks can share, or two GPUs: {missing}")


def _all_well(answers: list[list[str]]) -> None:
    said = [f"rank {rank}: {line}" for rank, lines in enumerate(answers) for line in lines]
    assert not said, "\n".join(said[:20])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.timeout(400)
def test_every_algorithm_equals_the_reference_and_itself_on_all_ranks(world: int) -> None:
    _all_well(run_ranks(on_ranks.correctness, world, timeout=380))


@pytest.mark.parametrize("dependent_launch", ("early", "off"))
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.timeout(200)
def test_ten_thousand_random_calls_mix_sizes_algorithms_groups_and_graphs(world: int, dependent_launch: str) -> None:
    # About half a minute. A watchdog of 8 s: a call that hangs is named long before the test ends.
    env = {"TPFUSE_PDL": dependent_launch, "TPFUSE_WATCHDOG_SECONDS": "8"}
    _all_well(run_ranks(on_ranks.random_calls, world, 10_000, 17, timeout=180, env=env))


@pytest.mark.parametrize("world", (2, 4))
def test_two_stream_classes_run_at_once(world: int) -> None:
    _all_well(run_ranks(on_ranks.two_streams, world, 300, env={"TPFUSE_CONCURRENT_PLANES": "2"}))


def test_the_class_of_the_links_is_found_and_the_kernels_are_taken_over_nvlink() -> None:
    first, second = run_ranks(on_ranks.link_class_found, 2)
    print(first)
    assert first == second
    if gpu_count() < 2:
        assert first[0] == "one GPU shared by the ranks" and first[1].endswith("-shared")
    elif shutil.which("nvidia-smi") and "NV" not in _connection():
        assert first[1].endswith(("-pcie", "-unknown"))
    else:
        assert first[:1] == ["NVLink between all GPUs"] and first[2:] == ["one_shot", "one_shot"]


def _connection() -> str:
    """What nvidia-smi calls the connection of the first two GPUs: NV18, SYS, PHB, ..."""
    lines = subprocess.run(
        ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=60, check=False
    ).stdout.splitlines()
    row = next((line.split() for line in lines if line.startswith("GPU0")), [])
    return row[2] if len(row) > 2 else "NV?"


@pytest.mark.parametrize("world", (2, 4))
def test_calls_of_one_plane_on_several_streams_are_ordered_or_refused(world: int) -> None:
    _all_well(run_ranks(on_ranks.streams_in_turn, world, 300, env={"TPFUSE_WATCHDOG_SECONDS": "20"}))


@pytest.mark.parametrize("world", (2, 4))
def test_a_dead_rank_becomes_an_error_within_the_watchdogs_time(world: int) -> None:
    answers = run_ranks(
        on_ranks.dead_rank, world, env={"TPFUSE_WATCHDOG_SECONDS": "3"}, may_die=(world - 1,), timeout=120
    )
    for rank, answer in enumerate(answers[:-1]):
        seconds, text = answer
        assert "gave up" in text, f"rank {rank}: {text!r} after {seconds:.1f} s"
        assert f"rank {rank}" in text
        assert "phase" in text
        assert seconds < 6, f"rank {rank} took {seconds:.1f} s with a watchdog of 3 s"


def test_a_rank_killed_during_replays_leaves_nan_on_the_others_and_an_error_that_names_it() -> None:
    if gpu_count() < 2:
        pytest.skip("needs two GPUs: a killed client of MPS takes its neighbors' kernels with it")
    env = {"TPFUSE_WATCHDOG_SECONDS": "2"}
    answers = run_ranks(on_ranks.killed_during_replay, 2, env=env, may_die=(1,), timeout=120)
    assert answers[0] == [] and answers[1] is None, "\n".join(answers[0])


@pytest.mark.parametrize("vote", ("fused", "library"))
@pytest.mark.parametrize("world", (2, 4))
def test_a_row_has_the_same_bits_among_any_others(world: int, vote: str) -> None:
    _all_well(run_ranks(on_ranks.batch_invariance, world, vote, env={"TPFUSE_BATCH_INVARIANT": "true"}))


def test_reset_repairs_a_group_whose_ranks_diverged() -> None:
    _all_well(run_ranks(on_ranks.diverged_then_reset, 2, env={"TPFUSE_WATCHDOG_SECONDS": "1"}))


@pytest.mark.skipif(gpu_count() < 2, reason="NCCL needs a GPU for each rank")
def test_groups_are_voted_on_anew_after_destroy_and_init(tmp_path: Path) -> None:
    _all_well(run_ranks(on_ranks.many_lives, 2, str(tmp_path / "store")))


def test_compiled_graphs_with_reduce_overhead_equal_eager() -> None:
    _all_well(run_ranks(on_ranks.compiled, 2))


def test_a_call_costs_little_more_cpu_time_than_its_launch() -> None:
    times = run_ranks(on_ranks.host_cost, 2)[0]
    print(times)
    assert times["op"] <= 2 * times["bare"]  # not so many microseconds: machines differ


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on the PATH")
@pytest.mark.timeout(300)
def test_compute_sanitizer_finds_nothing() -> None:
    done = subprocess.run(
        [
            "compute-sanitizer",
            "--tool",
            "memcheck",
            "--error-exitcode",
            "9",
            sys.executable,
            str(HERE / "rehearsal.py"),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout


@pytest.mark.parametrize("name", rows_on_ranks.PARTS)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.timeout(430)
def test_rows_with_destinations(world: int, name: str) -> None:
    missing = why_not(world)
    if missing:
        pytest.skip(missing)
    assert rows_on_ranks.part(name, world) == []


@pytest.mark.parametrize("algorithm", ("one_shot", "two_shot", "library"))
@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.timeout(400)
def test_quantized_rows_are_those_of_the_reference_on_every_way_to_them(world: int, algorithm: str) -> None:
    import quant_on_ranks

    missing = why_not(world) or (
        "NCCL needs a GPU for each rank" if algorithm == "library" and gpu_count() < world else None
    )
    if missing:
        pytest.skip(missing)
    _all_well(
        run_ranks(
            quant_on_ranks.edges, world, timeout=380, env={"TPFUSE_ALGORITHM": algorithm, "TPFUSE_QUANT_ROWS": "16"}
        )
    )


def test_graphs_of_quantized_and_plain_calls_equal_eager() -> None:
    import quant_on_ranks

    _all_well(run_ranks(quant_on_ranks.replays, 2))


def test_products_directly_behind_calls_read_what_these_have_written() -> None:
    import quant_on_ranks

    _all_well(run_ranks(quant_on_ranks.products, 2))


@pytest.mark.parametrize("algorithm", ("one_shot", "two_shot", "library"))
@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.timeout(400)
def test_layer_norms_are_those_of_the_reference_on_every_way_to_them(world: int, algorithm: str) -> None:
    import layer_norm_on_ranks

    missing = why_not(world)
    if algorithm == "library" and (world > 2 or gpu_count() < world):
        missing = "NCCL needs a GPU for each rank, and sums more than two in an order of its own"
    if missing:
        pytest.skip(missing)
    _all_well(run_ranks(layer_norm_on_ranks.edges, world, timeout=380, env={"TPFUSE_ALGORITHM": algorithm}))


@pytest.mark.timeout(400)
def test_random_layer_norms_among_rms_norms() -> None:
    import layer_norm_on_ranks

    _all_well(run_ranks(layer_norm_on_ranks.random_calls, 2, timeout=380))


def test_graphs_of_both_norms_equal_eager() -> None:
    import layer_norm_on_ranks

    _all_well(run_ranks(layer_norm_on_ranks.replays, 2))


@pytest.mark.parametrize("algorithm", ("one_shot", "two_shot", "library"))
@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.timeout(400)
def test_two_partial_sums_have_the_bits_of_the_reference_on_every_way_to_them(world: int, algorithm: str) -> None:
    import two_sums_on_ranks

    missing = why_not(world)
    if algorithm == "library" and (world > 2 or gpu_count() < world):
        missing = "NCCL needs a GPU for each rank, and sums more than two in an order of its own"
    if missing:
        pytest.skip(missing)
    _all_well(run_ranks(two_sums_on_ranks.edges, world, timeout=380, env={"TPFUSE_ALGORITHM": algorithm}))


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.timeout(400)
def test_random_calls_of_one_and_of_two_sums(world: int) -> None:
    import two_sums_on_ranks

    missing = why_not(world)
    if missing:
        pytest.skip(missing)
    _all_well(run_ranks(two_sums_on_ranks.random_calls, world, timeout=380))


def test_graphs_of_one_and_of_two_sums_equal_eager() -> None:
    import two_sums_on_ranks

    _all_well(run_ranks(two_sums_on_ranks.replays, 2))


@pytest.mark.parametrize("algorithm", ("one_shot", "two_shot", "library"))
@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.timeout(400)
def test_wide_parts_have_the_bits_of_the_reference_on_every_way_to_them(world: int, algorithm: str) -> None:
    import wide_sums_on_ranks

    missing = why_not(world)
    if algorithm == "library" and (world > 2 or gpu_count() < world):
        missing = "NCCL needs a GPU for each rank, and sums more than two in an order of its own"
    if missing:
        pytest.skip(missing)
    _all_well(run_ranks(wide_sums_on_ranks.edges, world, timeout=380, env={"TPFUSE_ALGORITHM": algorithm}))


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.timeout(400)
def test_random_calls_of_wide_and_of_narrow_parts(world: int) -> None:
    import wide_sums_on_ranks

    missing = why_not(world)
    if missing:
        pytest.skip(missing)
    _all_well(run_ranks(wide_sums_on_ranks.random_calls, world, timeout=380))


def test_graphs_of_wide_and_of_narrow_parts_equal_eager() -> None:
    import wide_sums_on_ranks

    _all_well(run_ranks(wide_sums_on_ranks.replays, 2))
