"""The kernels themselves, interpreted, one process a rank: sums, norms, sentinels, phases.

The portable bodies of push, poll and rounding run here; everything else is what a GPU runs. bf16 is rounded by integer
arithmetic in the kernels, because the interpreter's own cast rounds half away from zero. In every dtype both outputs must equal
bit for bit the reference that adds the squares in the kernels' own fixed order; and the one in torch's order within one
rounding (fp32: four units in the last place), the residual bit for bit.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import warm
from interpreted_ranks import Call, Outcome, rounded_both_ways, run

pytestmark = pytest.mark.ranks
# The interpreter takes about 50 ms for a row on each rank: more ranks and more calls are for the slow tests.
slow = pytest.mark.slow


def test_the_short_cut_of_the_interpreter_rounds_as_the_kernels_do() -> None:
    generator = np.random.default_rng(0)
    halves = generator.integers(0, 1 << 16, 1 << 11, dtype=np.uint32) << 16
    ties = halves | np.uint32(0x8000)
    some = generator.integers(0, 1 << 32, 1 << 11, dtype=np.uint32)
    odd = np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 0x477FF000, 0x33000001, 1], np.uint32)
    bits = np.concatenate([halves, ties, some, np.resize(odd, 1 << 11)])
    context = warm.context(interpret=True)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=rounded_both_ways, args=(bits, send))
    process.start()
    assert receive.poll(300)
    for in_steps, at_once in receive.recv():
        assert (in_steps == at_once).all()
    process.join()


def _agree(outcomes: list[Outcome], ranks: int) -> None:
    """Every rank finished, equals the reference, equals the others bit for bit, and left its plane empty."""
    assert len(outcomes) == ranks
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes[:5]
        assert outcome.leftover == 0
        assert outcome.record == (0, 0, 0, 0)
        assert outcome.digests == outcomes[0].digests


def _special(pairs: bool, algorithms: tuple[str, ...] = ("one_shot", "two_shot")) -> list[Call]:
    """Every special value in every dtype, or in one of them (zeros, which are sentinels as well, in all)."""
    calls = []
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for n, special in enumerate(("zeros", "negative_zeros", "nonfinite", "denormals")):
        for dtype in dtypes if n == 0 or not pairs else (dtypes[n - 1],):
            for algorithm in algorithms:
                calls.append(Call(3, 64, algorithm, dtype, special=special, seed=len(calls) // len(algorithms)))
    return calls


@pytest.mark.parametrize(
    ("world", "pairs"), ((3, True), *(pytest.param(world, False, marks=slow) for world in (2, 3, 4)))
)
def test_zero_words_negative_zeros_nonfinite_values_and_denormals(world: int, pairs: bool) -> None:
    outcomes = run(world, _special(pairs))
    _agree(outcomes, world)
    one, two = outcomes[0].digests[::2], outcomes[0].digests[1::2]
    assert one == two, "one-shot and two-shot give different bits"


@pytest.mark.parametrize("world", (pytest.param(2, marks=slow), 3, pytest.param(4, marks=slow)))
def test_rows_around_the_world_size(world: int) -> None:
    calls = [
        Call(rows, 64, algorithm, seed=rows)
        for rows in (0, 1, world - 1, world, world + 1, 2 * world + 1)
        for algorithm in ("one_shot", "two_shot")
    ]
    outcomes = run(world, calls)
    _agree(outcomes, world)
    assert outcomes[0].digests[::2] == outcomes[0].digests[1::2]


def test_widths_that_are_no_power_of_two_and_rows_of_several_groups() -> None:
    both = (torch.bfloat16, torch.float32)
    calls = [
        Call(2, hidden, algorithm, dtype, seed=hidden)
        for hidden, dtypes in ((72, both), (576, both[:1]), (1032, both), (2880, both[:1]))
        for dtype in dtypes
        for algorithm in ("one_shot", "two_shot")
    ]
    outcomes = run(2, calls)
    _agree(outcomes, 2)
    assert outcomes[0].digests[::2] == outcomes[0].digests[1::2]


def test_outputs_over_the_inputs_get_the_same_bits() -> None:
    kinds = [{}, {"post_norm": True}, {"bias": "row", "scale": 0.5}, {"rows": 9}, {"hidden": 1160}]
    calls = [
        Call(**{"rows": 5, "hidden": 192, "algorithm": algorithm, "seed": 900 + n, "in_place": True, **kind})  # type: ignore[arg-type]
        for algorithm in ("one_shot", "two_shot")
        for n, kind in enumerate(kinds)
    ]
    _agree(run(2, calls, delay=0.01), 2)


@pytest.mark.parametrize("step", (4, pytest.param(1, marks=slow)))
def test_flavours_and_epilogues(step: int) -> None:
    """Every combination where slow tests run, else every fourth: each value of each column."""
    calls = [
        Call(2, 72, flavour=f, dtype=d)
        for f in ("llama", "gemma", "olmo2", "gemma4", "weightless", "vllm", "sglang")
        for d in (torch.bfloat16, torch.float16, torch.float32)
    ][::step]
    calls += [
        Call(2, 72, flavour=f, weight_dtype=torch.float32) for f in ("llama", "gemma", "olmo2", "gemma4", "sglang")
    ]
    calls += [
        Call(2, 72, algorithm, bias=bias, scale=scale, post_norm=post, flavour=flavour, seed=9)
        for algorithm in ("one_shot", "two_shot")
        for bias in ("none", "row", "full")
        for scale in (1.0, 0.22)
        for post, flavour in ((False, "llama"), (True, "olmo2"), (False, "vllm"))
    ][::step]
    calls += [
        Call(2, 72, algorithm, dtype=dtype, scale=45.2548, scale_tensor=True, residual=False, seed=9)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for algorithm in ("one_shot", "two_shot")
    ]
    calls += [
        Call(2, 72, algorithm, bias=bias, scale=2.5, scale_tensor=tensor, scale_first=True, seed=9)
        for bias, tensor in (("row", True), ("full", False))
        for algorithm in ("one_shot", "two_shot")
    ]
    calls += [Call(2, 72, residual=False), Call(2, 72, residual=False, algorithm="two_shot", bias="row")]
    _agree(run(2, calls), 2)


def test_a_norm_of_the_unrounded_sum_has_the_bits_of_its_reference_however_a_row_is_held() -> None:
    """Several steps a program, several groups a step, over the inputs, with special values."""
    kinds = [
        {"hidden": 1160},
        {"hidden": 2880, "lanes": 256, "dtype": torch.float16},
        {"rows": 5, "hidden": 192, "in_place": True},
        {"rows": 3, "hidden": 64, "special": "zeros"},
        {"rows": 3, "hidden": 64, "special": "denormals"},
        {"hidden": 1160, "wide_residual": True, "flavour": "sglang", "weight_dtype": torch.float32},
        {"rows": 5, "hidden": 192, "wide_residual": True, "dtype": torch.float16, "bias": "row", "scale": 0.5},
        {"rows": 3, "hidden": 64, "wide_residual": True, "special": "nonfinite"},
    ]
    calls = [
        Call(**{"rows": 2, "algorithm": algorithm, "flavour": "vllm", "seed": 700 + n, **kind})  # type: ignore[arg-type]
        for n, kind in enumerate(kinds)
        for algorithm in ("one_shot", "two_shot")
    ]
    outcomes = run(2, calls)
    _agree(outcomes, 2)
    assert outcomes[0].digests[::2] == outcomes[0].digests[1::2]
    rounded = run(2, [replace(calls[0], flavour="llama", wide_residual=False)])
    _agree(rounded, 2)
    assert rounded[0].digests[0] != outcomes[0].digests[0]


@pytest.mark.parametrize(
    ("world", "count"), ((3, 14), pytest.param(2, 200, marks=slow), pytest.param(3, 200, marks=slow))
)
def test_calls_alternate_algorithm_rows_and_width_with_random_delays(world: int, count: int) -> None:
    rng = random.Random(world)
    calls = [
        Call(
            rng.choice((0, 1, world - 1, world, world + 1, 4)),
            rng.choice((64, 72, 128)),
            rng.choice(("one_shot", "two_shot")),
            rng.choice((torch.bfloat16, torch.float32)),
            special=rng.choice(("none", "zeros")),
            seed=n,
            programs=rng.choice((1, 2, 3)),
            lanes=(128, 256)[n % 2],
        )
        for n in range(count)
    ]
    _agree(run(world, calls, delay=0.003), world)


@slow
@pytest.mark.parametrize("count", (10, 200))
def test_the_same_on_four_ranks_with_wide_rows(count: int) -> None:
    rng = random.Random(4)
    calls = [
        Call(
            rng.choice((1, 3, 4, 5)),
            2880 if n % 25 == 13 else 576 if n % 5 == 3 else 64,  # the interpreter takes seconds for a wide call
            rng.choice(("one_shot", "two_shot")),
            seed=n,
            special=rng.choice(("none", "zeros")),
            programs=rng.choice((1, 2, 3)),
        )
        for n in range(count)
    ]
    _agree(run(4, calls, delay=0.003), 4)


def test_rows_split_over_programs_have_the_bits_of_whole_rows() -> None:
    """Programs of one row wait for each other, so each is a process: 2 ranks x 3 programs; then the same rows unsplit."""
    split = [
        Call(1, 2880, algorithm, steps=1, programs=3, seed=n) for n, algorithm in enumerate(("one_shot", "two_shot"))
    ]
    whole = [Call(1, 2880, algorithm, programs=1, seed=n) for n, algorithm in enumerate(("one_shot", "two_shot"))]
    pieces = run(2, split, split=True)
    for outcome in pieces:
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes
        assert outcome.digests == pieces[0].digests
    assert all(o.leftover == 0 for o in pieces)
    assert pieces[0].digests == run(2, whole)[0].digests


def test_wide_programs_split_a_row_as_well() -> None:
    """Programs of 256 lanes hold two groups a step, so each sends two sums of squares to its neighbor; H = 2880 has three."""
    calls = [
        Call(1, 2880, algorithm, lanes=256, steps=1, programs=2, seed=n)
        for n, algorithm in enumerate(("one_shot", "two_shot"))
    ]
    pieces = run(2, calls, split=True)
    for outcome in pieces:
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes
        assert outcome.leftover == 0
        assert outcome.digests == pieces[0].digests


def test_the_width_of_a_program_does_not_change_the_bits_of_a_row() -> None:
    calls = [
        Call(1, hidden, algorithm, dtype, lanes=lanes, seed=hidden)
        for hidden, dtype in ((2880, torch.bfloat16), (1160, torch.float32))
        for algorithm in ("one_shot", "two_shot")
        for lanes in (128, 256, 512)
    ]
    outcomes = run(2, calls)
    _agree(outcomes, 2)
    for first in range(0, len(calls), 6):
        assert len(set(outcomes[0].digests[first : first + 6])) == 1, calls[first]


@pytest.mark.parametrize(
    ("world", "most", "some"),
    (
        (3, 9, 2),
        pytest.param(4, 13, 3, marks=slow),
        pytest.param(3, 33, 7, marks=slow),
        pytest.param(3, 300, 64, marks=slow),
        pytest.param(4, 300, 64, marks=slow),
    ),
)
def test_a_row_has_the_same_bits_alone_and_among_up_to_three_hundred(world: int, most: int, some: int) -> None:
    """Batch invariance: order-sensitive sums, both algorithms, several grids, widths of a program and cuts into launches."""
    # (cuts into launches, algorithm, programs, lanes); every call holds the first rows of a pool.
    ways = (
        ((most,), "one_shot", 5, 128),
        ((1, most // 2, most - 1 - most // 2), "two_shot", 64, 256),
        ((some,), "two_shot", 1, 128),
        ((2,), "one_shot", 1, 512),
        ((1, 1), "two_shot", 2, 128),
    )
    calls = []
    for cuts, algorithm, programs, lanes in ways:
        start = 0
        for cut in cuts:
            given = {"programs": programs, "lanes": lanes, "pool": most, "start": start}
            calls.append(Call(cut, 64, algorithm, special="order", seed=1, **given))
            start += cut
    among = len(calls)
    alone = sorted({*range(some + 1), *range(0, most, 29), most - 1})
    calls += [Call(1, 64, "one_shot", special="order", seed=1, pool=most, start=row) for row in alone]
    outcomes = run(world, calls)
    _agree(outcomes, world)  # every row of every call has the bits of the reference, which knows no other rows
    bits = outcomes[0].row_digests
    by_itself = {row: bits[among + n][0] for n, row in enumerate(alone)}
    assert len(set(by_itself.values())) == len(by_itself)  # rows differ, so equal bits mean something
    for call, digests in zip(calls[:among], bits, strict=False):
        for row, found in enumerate(digests, call.start):
            assert by_itself.get(row, found) == found, f"row {row} of {call} has other bits than alone"


@pytest.mark.parametrize(
    ("dtype", "hidden"),  # three groups of either
    ((torch.bfloat16, 2056), pytest.param(torch.float32, 1032, marks=slow)),
)
def test_a_row_of_several_groups_has_the_same_bits_alone_and_among_others(dtype: torch.dtype, hidden: int) -> None:
    ways = ((1, "one_shot", 128), (1, "two_shot", 512), (3, "one_shot", 256), (3, "two_shot", 128))
    calls = [
        Call(rows, hidden, algorithm, dtype, special="order", seed=2, pool=3, lanes=lanes, programs=3)
        for rows, algorithm, lanes in ways
    ]
    outcomes = run(3, calls)
    _agree(outcomes, 3)
    bits = outcomes[0].row_digests
    assert {digests[0] for digests in bits} == {bits[0][0]}
    assert bits[2] == bits[3]


@pytest.mark.parametrize("algorithm", ("one_shot", pytest.param("two_shot", marks=slow)))
def test_a_dead_rank_leaves_nan_on_the_others_and_a_record_that_keeps_naming_it(algorithm: str) -> None:
    calls = [
        Call(rows, 72, algorithm, dtype, residual=residual, post_norm=post, flavour=flavour, seed=n, programs=1)
        for n, (rows, dtype, residual, post, flavour) in enumerate(
            (
                (2, torch.bfloat16, True, False, "llama"),
                (1, torch.float32, True, False, "llama"),
                (2, torch.bfloat16, True, False, "llama"),  # rank 1 is gone from here on
                (1, torch.float16, False, False, "weightless"),
                (2, torch.float32, True, True, "olmo2"),
                (1, torch.bfloat16, True, False, "gemma"),
            )
        )
    ]
    outcomes = run(3, calls, dies=(1, 2), watchdog=300_000)
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes
        assert outcome.rows == ["rr", "r", "nn", "n", "nn", "n"]
        gave_up, missing, row, phase = outcome.records[2]
        # The third call is in phase 0. Rank 1's rows are missing, or, in two-shot, the sum of a row from its owner (phase + 4).
        assert gave_up == 1 and ((missing, phase) == (1, 0) or (algorithm, missing, phase) == ("two_shot", 0, 4))
        assert row == 0 or algorithm == "two_shot"
        assert set(outcome.records[2:]) == {outcome.records[2]}, "a later call has overwritten the first cause"


@pytest.mark.parametrize(("algorithm", "late_by"), (pytest.param("one_shot", 2, marks=slow), ("two_shot", 1)))
def test_a_rank_that_comes_late_to_a_failed_plane_gets_right_rows_or_nan_and_a_reset_repairs_all(
    algorithm: str, late_by: int
) -> None:
    """Rank 0 gives up in call 2 and makes ``late_by`` more calls before rank 1 makes its call 2, in the same phases."""
    shapes = [(2, 72), (4, 64), (4, 72), (4, 72), (3, 72), (2, 64), (5, 72), (2, 72)]
    calls = [Call(rows, hidden, algorithm, seed=n, programs=1) for n, (rows, hidden) in enumerate(shapes)]
    late, early = run(
        2, calls, waits={(0, 2): (1, 3 + late_by)}, reset_before=6, watchdog=300_000
    )  # rank 0 is the late one
    for outcome in (late, early):
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes
        assert outcome.rows[:2] == ["rr", "rrrr"]
        assert outcome.rows[3:6] == ["nnnn", "nnn", "nn"]
        assert outcome.rows[6:] == ["rrrrr", "rr"]
        assert outcome.leftover == 0
        assert outcome.records[5][0] == 1
    assert early.rows[2] == "nnnn"
    assert set(early.records[2:6]) == {(1, 0, early.records[2][2], early.records[2][3])}
    # What the early rank pushed in call 2 is right: all rows of one-shot, in two-shot those that the late rank owns.
    assert late.rows[2] == ("rrrr" if algorithm == "one_shot" else "rnrn")


def test_a_program_whose_sibling_gave_up_stores_nan_in_both_outputs() -> None:
    """A row split over two programs: one of rank 1 is gone, so a part of the row never reaches rank 0."""
    calls = [Call(1, 1032, steps=1, programs=2, seed=n) for n in range(3)]
    pieces = run(2, calls, split=True, dies=(1, 1, 1), watchdog=200_000)
    assert len(pieces) == 3
    for piece in pieces:
        assert not piece.error, piece.error
        assert not piece.mistakes, piece.mistakes
        assert piece.rows[0] == "r"
        assert piece.record[0] == 1
    for piece in [piece for piece in pieces if piece.rank == 0]:
        assert piece.rows == ["r", "n", "n"]
        assert piece.records[1] == (1, 1, 0, 1) == piece.records[2]
