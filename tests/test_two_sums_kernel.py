"""Two partial sums in one kernel, interpreted: bits of two sums in rank order, sentinels, phases, both algorithms."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreted_ranks import Call, Outcome, run

pytestmark = pytest.mark.ranks
slow = pytest.mark.slow
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def two(rows: int, hidden: int = 72, **more: Any) -> Call:
    return Call(rows, hidden, **{"bias": "partial", **more})


def layer(rows: int, hidden: int = 72, **more: Any) -> Call:
    given = {"layer_norm": True, "flavour": "layer_norm", "eps": 1e-5, "partial_addend": True}
    return Call(rows, hidden, **{**given, **more})


def agree(outcomes: list[Outcome], ranks: int) -> None:
    assert len(outcomes) == ranks
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert outcome.mistakes == []
        assert (outcome.leftover, outcome.record) == (0, (0, 0, 0, 0))
        assert outcome.digests == outcomes[0].digests


CALLS = [
    two(3, seed=1),
    two(2, dtype=FP32, residual_first=True, seed=2),
    two(2, dtype=FP16, flavour="gemma", scale=0.22, seed=3),
    two(2, scale=2.5, scale_tensor=True, scale_first=True, seed=4),
    two(4, scale_rows=True, scale_first=True, programs=3, seed=20),
    two(2, dtype=FP16, scale_rows=True, flavour="olmo2", post_norm=True, seed=5),
    two(2, flavour="sglang", wide_residual=True, weight_dtype=FP32, seed=6),
    two(2, flavour="vllm", residual=False, seed=7),
    two(2, 1032, residual_first=True, seed=8),
    two(3, special="zeros", seed=9),
    two(3, dtype=FP32, special="negative_zeros", residual_first=True, seed=10),
    two(2, special="nonfinite", seed=11),
    two(5, 192, in_place=True, residual_first=True, seed=12),
    two(0, seed=13),
    layer(3, bias="row", addend_bias=True, seed=14),
    layer(2, dtype=FP32, flavour="cohere", residual_first=True, seed=15),
    layer(2, dtype=FP16, flavour="cohere", bias="row", addend_bias=True, residual_first=True, seed=16),
    layer(2, 1032, mean=20.0, addend_bias=True, scale=0.5, seed=17),
    layer(3, bias="full", special="zeros", residual=False, seed=18),
    Call(3, 72, bias="full", seed=19),  # of one sum, on the same plane
]


@pytest.mark.parametrize(
    ("world", "step"), [(2, 2), *(pytest.param(*of, marks=slow) for of in ((2, 1), (3, 1), (5, 3)))]
)
def test_both_sums_have_the_bits_of_the_reference_in_both_algorithms(world: int, step: int) -> None:
    calls = [replace(call, algorithm=a) for call in CALLS[::step] for a in ("one_shot", "two_shot")]
    outcomes = run(world, calls, delay=0.01)
    agree(outcomes, world)
    assert outcomes[0].digests[::2] == outcomes[0].digests[1::2]


def test_calls_of_one_and_of_two_sums_alternate_on_three_ranks_with_random_delays() -> None:
    rng = random.Random(3)
    calls = []
    for n in range(10):
        given: dict[str, Any] = {"algorithm": rng.choice(("one_shot", "two_shot")), "seed": n}
        given |= {
            "special": rng.choice(("none", "zeros")),
            "programs": rng.choice((1, 2, 3)),
            "lanes": (128, 256)[n % 2],
        }
        rows = rng.choice((0, 1, 2, 3, 4))
        make = rng.choice((Call, two, layer))
        if make is not Call:
            given["residual_first"] = rng.random() < 0.5
        calls.append(make(rows, rng.choice((64, 72)), **given))
    agree(run(3, calls, delay=0.003), 3)


def test_each_sum_is_rounded_and_the_order_of_additions_is_the_one_asked_for() -> None:
    """Sums that depend on the order: no two ways of adding give the same bits, and the reference has each of them."""
    kinds = [{}, {"residual_first": True}, {"bias": "full"}]
    calls = [two(3, 64, special="order", seed=5, **kind) for kind in kinds]
    outcomes = run(3, calls)
    agree(outcomes, 3)
    assert len(set(outcomes[0].digests)) == 3


@pytest.mark.parametrize("algorithm", ["one_shot", pytest.param("two_shot", marks=slow)])
def test_programs_that_share_a_row_exchange_the_squares_of_the_same_sum(algorithm: str) -> None:
    calls = [
        two(1, 1032, algorithm=algorithm, steps=1, programs=2, seed=1),
        layer(1, 1032, algorithm=algorithm, steps=1, programs=2, addend_bias=True, seed=2),
        two(1, 1032, algorithm=algorithm, steps=1, programs=2, residual_first=True, seed=3),
    ]
    split = run(2, calls, split=True)
    whole = run(2, [replace(call, steps=None, programs=1) for call in calls])
    agree(whole, 2)
    for outcome in split:
        assert not outcome.error, outcome.error
        assert (outcome.mistakes, outcome.leftover) == ([], 0)
        assert outcome.digests == whole[0].digests


@pytest.mark.parametrize("algorithm", ["one_shot", pytest.param("two_shot", marks=slow)])
def test_a_row_has_the_same_bits_alone_and_among_others(algorithm: str) -> None:
    given = {"algorithm": algorithm, "special": "order", "seed": 1, "pool": 5}
    calls = [two(5, 64, programs=3, **given), two(2, 64, lanes=256, start=3, **given)]
    calls += [two(1, 64, start=row, **given) for row in range(5)]
    outcomes = run(3, calls)
    agree(outcomes, 3)
    among, last, *alone = outcomes[0].row_digests
    assert among == [row[0] for row in alone] and last == among[3:]
    assert len(set(among)) == 5


@slow
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_a_dead_rank_leaves_nan_and_a_record(algorithm: str) -> None:
    calls = [two(2, algorithm=algorithm, seed=1, programs=1), layer(1, algorithm=algorithm, seed=2, programs=1)]
    calls += [two(3, algorithm=algorithm, residual_first=True, seed=3, programs=1), Call(2, 72, algorithm, programs=1)]
    outcomes = run(3, calls, dies=(1, 2), watchdog=300_000)
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert outcome.mistakes == []
        assert outcome.rows == ["rr", "r", "nnn", "nn"]
        assert outcome.records[2][0] == 1 and outcome.records[3] == outcome.records[2]
