"""The kernels of rows with destinations with a LayerNorm, interpreted, one process a rank: bit for bit the promised arithmetic.

What they share with the kernels of an RMSNorm is tested with these: ``test_kernel_rows.py``, ``test_kernel_gathered.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted_ranks import Call, Outcome, run

pytestmark = pytest.mark.ranks
slow = pytest.mark.slow
FP16, FP32 = torch.float16, torch.float32


def layer(rows: int, hidden: int, **more: Any) -> Call:
    return Call(rows, hidden, **{"layer_norm": True, "flavour": "layer_norm", "eps": 1e-5, **more})


def _right(outcomes: list[Outcome], ranks: int) -> None:
    """Every rank finished, has the bits of the reference, and left its plane empty."""
    assert len(outcomes) == ranks
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes[:5]
        assert outcome.leftover == 0
        assert outcome.record == (0, 0, 0, 0)


def kinds(world: int, blocks: int, **more: Any) -> list[Call]:
    """Flavours and operands, unequal and zero rows, and calls with an RMSNorm and of the all-reduce on the same plane."""
    in_turn = tuple(r * blocks // world for r in range(world))  # rows kept: as many as the number of the block
    more["blocks"] = blocks
    return [
        layer(3, 72, seed=1, **more),
        layer(2, 72, seed=2, kept=tuple(min(2, n) for n in in_turn), dtype=FP32, flavour="cohere", mean=30.0, **more),
        layer(2, 72, seed=3, algorithm="two_shot"),
        layer(1, 1160, seed=4, kept=(0,) * world, **more),
        layer(4, 72, seed=5, kept=tuple(4 - n for n in in_turn), bias="row", addend=True, scale=0.22, **more),
        Call(2, 72, seed=6, **more),
        layer(2, 72, seed=7, dtype=FP16, flavour="nemotron", bias="full", **more),
        layer(2, 72, seed=8, flavour="olmo", residual=False, special="zeros", **more),
        layer(2, 72, seed=9, weight_dtype=FP32, addend=True, special="nonfinite", lanes=256, **more),
    ]


@pytest.mark.parametrize(
    ("world", "blocks", "algorithm"),
    (
        (2, 2, "one_shot"),
        (4, 2, "two_shot"),
        pytest.param(3, 3, "one_shot", marks=slow),
        pytest.param(3, 3, "two_shot", marks=slow),
        pytest.param(4, 2, "one_shot", marks=slow),
    ),
)
def test_each_rank_gets_its_rows(world: int, blocks: int, algorithm: str) -> None:
    outcomes = run(world, kinds(world, blocks, algorithm=algorithm), delay=0.003)
    _right(outcomes, world)
    receivers = world // blocks
    for rank, outcome in enumerate(outcomes):  # the ranks of a replica hold the same bits
        assert outcome.digests == outcomes[rank // receivers * receivers].digests


@pytest.mark.parametrize(("world", "blocks"), [(2, 2), pytest.param(3, 3, marks=slow), pytest.param(4, 2, marks=slow)])
def test_every_rank_gets_the_normed_rows_of_all(world: int, blocks: int) -> None:
    calls = kinds(world, blocks, gathers=True)
    outcomes = run(world, calls, delay=0.003)
    _right(outcomes, world)
    for n, call in enumerate(calls):
        if call.gathers:
            assert len({tuple(outcome.row_digests[n]) for outcome in outcomes}) == 1


def test_a_row_has_the_bits_of_the_all_reduce_and_does_not_see_others() -> None:
    calls = [
        layer(6, 72, seed=1),
        layer(3, 72, blocks=2, seed=1),
        layer(3, 72, blocks=2, seed=1, kept=(1, 2)),
        layer(3, 72, blocks=2, seed=1, gathers=True),
    ]
    outcomes = run(2, calls)
    _right(outcomes, 2)
    for rank, outcome in enumerate(outcomes):
        everybody, whole, some, gathered = outcome.normed_digests
        assert whole == everybody[3 * rank : 3 * rank + 3] and some == whole[: len(some)] and gathered == everybody
        assert len(set(everybody)) == 6


@slow  # in the quick run those of an RMSNorm, and of a LayerNorm behind an all-reduce, are split
@pytest.mark.parametrize("gathers", [False, True])
def test_rows_split_over_programs(gathers: bool) -> None:
    """Three programs share mean and variance of a row of each rank's block; in the second call one rank keeps none."""
    more = {"blocks": 2, "gathers": gathers, "steps": 1, "programs": 3, "addend": True}
    calls = [layer(1, 2880, seed=n, kept=kept, mean=40.0 * n, **more) for n, kept in enumerate(((1, 1), (1, 0)))]
    calls.insert(1, Call(1, 2880, seed=7, **{**more, "addend": False}))  # type: ignore[arg-type]
    pieces = run(2, calls, split=True)
    _right(pieces, 6)


@pytest.mark.parametrize(
    ("world", "algorithm", "gathers"),
    [
        (2, "one_shot", False),
        pytest.param(2, "one_shot", True, marks=slow),
        pytest.param(4, "two_shot", False, marks=slow),
        pytest.param(4, "one_shot", True, marks=slow),
    ],
)
def test_a_dead_rank_leaves_nan_in_what_the_others_keep(world: int, algorithm: str, gathers: bool) -> None:
    more = {"algorithm": algorithm, "gathers": gathers, "programs": 1}
    calls = [layer(2, 72, blocks=2, seed=n, **more) for n in range(4)]
    outcomes = run(world, calls, dies=(1, 2), watchdog=300_000)
    assert len(outcomes) == world - 1
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes
        rows = outcome.rows
        assert [set(letters) - {"|"} for letters in (*rows[:2], rows[3])] == [{"r"}, {"r"}, {"n"}], rows
        # In the call of the death a rank of its block may still have got the other block's norms, which lack nothing.
        assert set(rows[2]) - {"|"} == {"n"} or (gathers and world > 2 and outcome.rank == 0), rows
        assert outcome.records[2][0] == 1 and set(outcome.records[2:]) == {outcome.records[2]}
