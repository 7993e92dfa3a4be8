"""The kernel whose rows have destinations, interpreted, one process a rank; see ``test_kernel_protocol.py``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreted_ranks import Call, Outcome, run

pytestmark = pytest.mark.ranks
slow = pytest.mark.slow


def _right(outcomes: list[Outcome], ranks: int) -> None:
    """Every rank finished, has the bits of the reference, and left its plane empty."""
    assert len(outcomes) == ranks
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes[:5]
        assert set("".join(outcome.rows)) <= {"r"}
        assert outcome.leftover == 0
        assert outcome.record == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("world", "blocks", "algorithm"),
    (
        (2, 2, "one_shot"),
        (4, 2, "two_shot"),
        pytest.param(4, 2, "one_shot", marks=slow),
        pytest.param(3, 3, "one_shot", marks=slow),
        pytest.param(4, 4, "one_shot", marks=slow),
        pytest.param(6, 2, "two_shot", marks=slow),
    ),
)
def test_each_rank_gets_its_rows_among_calls_of_the_all_reduce(world: int, blocks: int, algorithm: str) -> None:
    """Unequal and zero rows on some ranks, flavours and addends, and one plane for both ops."""
    in_turn = tuple(r * blocks // world for r in range(world))  # rows kept: as many as the number of the block
    calls = [
        Call(3, 64, blocks=blocks, seed=1),
        Call(2, 72, blocks=blocks, seed=2, kept=tuple(min(2, n) for n in in_turn), dtype=torch.float32),
        Call(3, 64, "two_shot", seed=3),
        Call(1, 1160, blocks=blocks, seed=4, kept=(0,) * world),
        Call(4, 64, blocks=blocks, seed=5, kept=tuple(4 - n for n in in_turn), bias="full", scale=0.22, programs=3),
        Call(1, 72, seed=6),
        Call(2, 72, blocks=blocks, seed=7, dtype=torch.float16, flavour="gemma", bias="row"),
        Call(2, 72, blocks=blocks, seed=8, flavour="olmo2", post_norm=True, special="zeros"),
        Call(2, 64, blocks=blocks, seed=9, residual=False, special="nonfinite", lanes=256),
    ]
    calls = [call if call.blocks == 1 else replace(call, algorithm=algorithm) for call in calls]
    outcomes = run(world, calls, delay=0.003)
    _right(outcomes, world)
    receivers = world // blocks
    for rank, outcome in enumerate(outcomes):  # the ranks of a replica hold the same bits
        assert outcome.digests == outcomes[rank // receivers * receivers].digests


def test_a_row_has_the_bits_of_the_all_reduce_and_does_not_see_others() -> None:
    """Batch invariance, and across the two ops: one row of a block and the same row summed for everybody."""
    whole = Call(6, 64, "one_shot", seed=1)
    calls = [
        whole,
        Call(3, 64, blocks=2, seed=1),
        *(Call(3, 64, blocks=2, seed=1, kept=(n, n)) for n in (1, 2)),
    ]
    outcomes = run(2, calls)
    for rank, outcome in enumerate(outcomes):
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes[:5]
        everybody, *mine = outcome.row_digests
        for found in mine:
            assert found == everybody[3 * rank : 3 * rank + len(found)]
        assert len(set(everybody)) == 6


@slow  # in the quick run each has the bits of the reference
def test_two_shot_has_the_bits_of_one_shot_whatever_rows_others_keep() -> None:
    kept = ((2, 2, 1, 1), (0, 0, 3, 3))
    calls = [Call(3, 64, algorithm, blocks=2, seed=1, kept=k) for k in kept for algorithm in ("two_shot", "one_shot")]
    outcomes = run(4, calls)
    _right(outcomes, 4)
    for outcome in outcomes:
        assert outcome.row_digests[::2] == outcome.row_digests[1::2]


def test_rows_split_over_programs() -> None:
    """A row of the block of each rank is shared by three programs, one of them of a rank that keeps no row."""
    calls = [Call(1, 2880, blocks=2, steps=1, programs=3, seed=n, kept=kept) for n, kept in enumerate(((1, 1), (1, 0)))]
    pieces = run(2, calls, split=True)
    assert len(pieces) == 6
    for piece in pieces:
        assert not piece.error, piece.error
        assert not piece.mistakes, piece.mistakes
        assert piece.leftover == 0
        assert piece.rows == (["r", "r"] if piece.rank == 0 else ["r", ""])


def test_who_keeps_no_row_waits_for_a_dead_rank_too() -> None:
    calls = [
        Call(2, 72, blocks=2, seed=n, kept=kept, programs=1) for n, kept in enumerate(((2, 1), (1, 0), (1, 0), (1, 1)))
    ]
    (outcome,) = run(2, calls, dies=(0, 2), watchdog=300_000)
    assert not outcome.error, outcome.error
    assert not outcome.mistakes, outcome.mistakes
    assert outcome.rows == ["r", "", "", "n"]
    gave_up, missing, _, phase = outcome.records[2]
    assert (gave_up, missing, phase) == (1, 0, 0)
    assert set(outcome.records[2:]) == {outcome.records[2]}


@slow
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_a_dead_rank_leaves_nan_in_what_the_others_keep(algorithm: str) -> None:
    shapes = [(2, (2, 2, 2, 2)), (2, (1, 1, 2, 2)), (1, (1, 1, 0, 0)), (2, (2, 2, 1, 1))]
    calls = [
        Call(rows, 72, algorithm, blocks=2, seed=n, kept=kept, programs=1) for n, (rows, kept) in enumerate(shapes)
    ]
    outcomes = run(4, calls, dies=(1, 2), watchdog=300_000)
    assert len(outcomes) == 3
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes
        first = outcome.rank // 2 == 0
        assert outcome.rows == (["rr", "r", "n", "nn"] if first else ["rr", "rr", "", "n"])
        # A rank that keeps no row waits too: for the dead one, or for a row's sum from an owner that waits or is dead.
        gave_up, missing, row, phase = outcome.records[2]
        direct, of_owner = (missing, phase) == (1, 0), (missing, phase) == (0, 6) and row // 2 == outcome.rank // 2
        assert gave_up == 1 and (direct or (algorithm == "two_shot" and of_owner)), outcome.records[2]
        assert set(outcome.records[2:]) == {outcome.records[2]}
