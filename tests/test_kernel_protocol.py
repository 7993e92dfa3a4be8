"""The kernels themselves, interpreted, one process a rank: sums, norms, sentinels, phases.

The portable bodies of push, poll and rounding run here; everything else is what a GPU runs. bf16 is rounded by integer
arithmetic in the kernels, because the interpreter's own cast rounds half away from zero. In every dtype both outputs must equal
bit for bit the reference that adds the squares in the kernels' own fixed order; and the one in torch's order within one
rounding (fp32: four units in the last place), the residual bit for bit.
"""

from __future__ import annotations

import random

import pytest
import torch
from interpreted_ranks import Call, Outcome, run

pytestmark = pytest.mark.ranks


def _agree(outcomes: list[Outcome], ranks: int) -> None:
    """Every rank finished, equals the reference, equals the others bit for bit, and left its plane empty."""
    assert len(outcomes) == ranks
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes[:5]
        assert outcome.leftover == 0
        assert outcome.record == (0, 0, 0, 0)
        assert outcome.digests == outcomes[0].digests


def _special(algorithms: tuple[str, ...] = ("one_shot", "two_shot")) -> list[Call]:
    calls = []
    for special in ("zeros", "negative_zeros", "nonfinite", "denormals"):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for algorithm in algorithms:
                calls.append(Call(3, 64, algorithm, dtype, special=special, seed=len(calls) // len(algorithms)))
    return calls


@pytest.mark.parametrize("world", (2, 3, 4))
def test_zero_words_negative_zeros_nonfinite_values_and_denormals(world: int) -> None:
    outcomes = run(world, _special())
    _agree(outcomes, world)
    one, two = outcomes[0].digests[::2], outcomes[0].digests[1::2]
    assert one == two, "one-shot and two-shot give different bits"


@pytest.mark.parametrize("world", (2, 3, 4))
def test_rows_around_the_world_size(world: int) -> None:
    calls = [
        Call(rows, 64, algorithm, seed=rows)
        for rows in (0, 1, world - 1, world, world + 1, 13)
        for algorithm in ("one_shot", "two_shot")
    ]
    outcomes = run(world, calls)
    _agree(outcomes, world)
    assert outcomes[0].digests[::2] == outcomes[0].digests[1::2]


def test_widths_that_are_no_power_of_two_and_rows_of_several_groups() -> None:
    calls = [
        Call(2, hidden, algorithm, dtype, seed=hidden)
        for hidden in (64, 72, 576, 1032, 2880)
        for dtype in (torch.bfloat16, torch.float32)
        for algorithm in ("one_shot", "two_shot")
    ]
    outcomes = run(2, calls)
    _agree(outcomes, 2)
    assert outcomes[0].digests[::2] == outcomes[0].digests[1::2]


def test_flavours_and_epilogues() -> None:
    calls = [
        Call(2, 72, flavour=f, dtype=d)
        for f in ("llama", "gemma", "olmo2", "gemma4", "weightless")
        for d in (torch.bfloat16, torch.float16, torch.float32)
    ]
    calls += [Call(2, 72, flavour=f, weight_dtype=torch.float32) for f in ("llama", "gemma", "olmo2", "gemma4")]
    calls += [
        Call(2, 72, algorithm, bias=bias, scale=scale, post_norm=post, flavour=flavour, seed=9)
        for bias in ("none", "row", "full")
        for scale in (1.0, 0.22)
        for post, flavour in ((False, "llama"), (True, "olmo2"))
        for algorithm in ("one_shot", "two_shot")
    ]
    calls += [Call(2, 72, residual=False), Call(2, 72, residual=False, algorithm="two_shot", bias="row")]
    _agree(run(2, calls), 2)


@pytest.mark.parametrize("world", (2, 3))
def test_two_hundred_calls_alternate_algorithm_rows_and_width_with_random_delays(world: int) -> None:
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
        for n in range(200)
    ]
    _agree(run(world, calls, delay=0.003, timeout=280), world)


@pytest.mark.timeout(600)
def test_the_same_two_hundred_calls_on_four_ranks_with_wide_rows() -> None:
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
        for n in range(200)
    ]
    _agree(run(4, calls, delay=0.003, timeout=580), 4)


def test_rows_split_over_programs_have_the_bits_of_whole_rows() -> None:
    """Programs of one row wait for each other, so each is a process: 2 ranks x 3 programs; then the same rows unsplit."""
    split = [
        Call(1, 2880, algorithm, steps=1, programs=3, seed=n)
        for n, algorithm in enumerate(("one_shot", "two_shot", "one_shot"))
    ]
    whole = [
        Call(1, 2880, algorithm, programs=1, seed=n) for n, algorithm in enumerate(("one_shot", "two_shot", "one_shot"))
    ]
    pieces = run(2, split, split=True)
    for outcome in pieces:
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes
        assert outcome.digests == pieces[0].digests
    assert all(o.leftover == 0 for o in pieces)
    assert pieces[0].digests == run(2, whole)[0].digests


def test_wide_programs_split_a_row_as_well() -> None:
    """Programs of 256 lanes hold two groups a step, so each sends two sums of squares to its neighbour; H = 2880 has three."""
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
        Call(3, hidden, algorithm, dtype, lanes=lanes, seed=hidden)
        for hidden in (576, 2880)
        for dtype in (torch.bfloat16, torch.float32)
        for algorithm in ("one_shot", "two_shot")
        for lanes in (128, 256, 512)
    ]
    outcomes = run(2, calls)
    _agree(outcomes, 2)
    for first in range(0, len(calls), 6):
        assert len(set(outcomes[0].digests[first : first + 6])) == 1, calls[first]


def test_a_row_has_the_same_bits_whatever_the_other_rows_are() -> None:
    """Batch invariance: the first row of one call equals the first row of another with the same seed and one row."""
    calls = [
        Call(rows, 128, algorithm, seed=3, special="none") for rows in (1, 1) for algorithm in ("one_shot", "two_shot")
    ]
    digests = run(2, calls)[0].digests
    assert len(set(digests)) == 1


def test_a_dead_rank_ends_the_others_with_a_record_that_names_it() -> None:
    calls = [Call(1, 64, seed=n) for n in range(4)]
    outcomes = run(3, calls, dies=(1, 2), watchdog=300_000)
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        gave_up, missing, row, phase = outcome.record
        assert (gave_up, missing, row) == (1, 1, 0)
        assert phase == 0  # the third call is in phase 0
