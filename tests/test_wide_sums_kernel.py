"""Partial sums in fp32 beside a 16-bit residual, interpreted: the sum is rounded once, with the bits of the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreted_ranks import Call, Outcome, run

pytestmark = pytest.mark.ranks
slow = pytest.mark.slow
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def wide(rows: int, hidden: int = 72, **more: Any) -> Call:
    return Call(rows, hidden, **{"wide_sum": True, **more})


def layer(rows: int, hidden: int = 72, **more: Any) -> Call:
    return wide(rows, hidden, **{"layer_norm": True, "flavour": "layer_norm", "eps": 1e-5, **more})


def agree(outcomes: list[Outcome], ranks: int) -> None:
    assert len(outcomes) == ranks
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert outcome.mistakes == []
        assert (outcome.leftover, outcome.record) == (0, (0, 0, 0, 0))
        assert outcome.digests == outcomes[0].digests


CALLS = [
    wide(3, seed=1),
    wide(2, dtype=FP16, flavour="gemma", scale=0.22, seed=2),
    wide(2, bias="row", scale=2.5, scale_tensor=True, scale_first=True, seed=3),
    wide(2, flavour="olmo2", post_norm=True, weight_dtype=FP32, seed=4),
    wide(2, flavour="sglang", bias="full", seed=5),
    wide(2, 1032, flavour="weightless", seed=6),
    wide(3, special="zeros", seed=7),
    wide(3, special="negative_zeros", seed=8),
    wide(2, special="nonfinite", seed=9),
    wide(2, dtype=FP16, special="denormals", seed=10),  # sums that round to zeros
    Call(3, 72, seed=11),  # a narrow one on the same plane
    wide(0, seed=12),
    layer(3, bias="row", seed=13),
    layer(2, dtype=FP16, flavour="cohere", addend=True, seed=14),
]


@pytest.mark.parametrize(("world", "step"), [(2, 3), *(pytest.param(*of, marks=slow) for of in ((2, 1), (3, 1)))])
def test_the_bits_are_those_of_the_reference_in_both_algorithms(world: int, step: int) -> None:
    calls = [replace(call, algorithm=a) for call in CALLS[::step] for a in ("one_shot", "two_shot")]
    outcomes = run(world, calls, delay=0.01)
    agree(outcomes, world)
    assert outcomes[0].digests[::2] == outcomes[0].digests[1::2]


def test_the_sum_is_taken_in_fp32_in_rank_order_and_rounded_once() -> None:
    """Sums that depend on their order, of values that 16 bits do not hold: rounding each part first gives other bits."""
    calls = [wide(3, 64, special="order", seed=5), Call(3, 64, special="order", seed=5)]
    calls += [wide(3, 64, seed=5), Call(3, 64, seed=5), wide(3, 64, algorithm="two_shot", special="order", seed=5)]
    outcomes = run(3, calls)
    agree(outcomes, 3)
    digests = outcomes[0].digests
    assert digests[2] != digests[3] and digests[0] == digests[4]


@pytest.mark.parametrize("algorithm", ["one_shot", pytest.param("two_shot", marks=slow)])
def test_programs_that_share_a_row_exchange_the_squares_of_the_rounded_sum(algorithm: str) -> None:
    calls = [wide(1, 1032, algorithm=algorithm, steps=1, programs=2, seed=1)]
    calls += [layer(1, 1032, algorithm=algorithm, steps=1, programs=2, seed=2)]
    split = run(2, calls, split=True)
    whole = run(2, [replace(call, steps=None, programs=1) for call in calls])
    agree(whole, 2)
    for outcome in split:
        assert not outcome.error, outcome.error
        assert (outcome.mistakes, outcome.leftover) == ([], 0)
        assert outcome.digests == whole[0].digests


@slow
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_a_dead_rank_leaves_nan_and_a_record(algorithm: str) -> None:
    calls = [wide(2, algorithm=algorithm, seed=n, programs=1) for n in range(3)]
    outcomes = run(3, calls, dies=(1, 2), watchdog=300_000)
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert outcome.mistakes == []
        assert outcome.rows == ["rr", "rr", "nn"]
        assert outcome.records[2][0] == 1
