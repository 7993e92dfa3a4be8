"""The kernels that gather the normed rows, interpreted, one process a rank; see ``test_kernel_protocol.py``."""

from __future__ import annotations

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
        assert set("".join(outcome.rows)) <= {"r", "n", "|"}  # n: of inputs that are not finite
        assert outcome.leftover == 0
        assert outcome.record == (0, 0, 0, 0)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=slow), pytest.param(4, marks=slow)])
def test_every_rank_gets_the_normed_rows_of_all(world: int) -> None:
    """Unequal and zero rows on some ranks, flavours, addends and signs of zeros, and one plane for all ops."""

    def gathered(rows: int, hidden: int, **more: object) -> Call:
        return Call(rows, hidden, blocks=world, gathers=True, **more)  # type: ignore[arg-type]

    calls = [
        gathered(3, 64, seed=1),
        gathered(2, 72, seed=2, kept=tuple(min(2, n) for n in range(world)), dtype=torch.float32),
        Call(3, 64, "two_shot", seed=3),
        gathered(1, 1160, seed=4, kept=(0,) * world),
        gathered(4, 64, seed=5, kept=tuple(4 - n for n in range(world)), bias="full", scale=0.22, programs=3),
        Call(2, 72, blocks=world, seed=6),
        gathered(2, 72, seed=7, dtype=torch.float16, flavour="gemma", bias="row"),
        gathered(2, 72, seed=8, flavour="olmo2", post_norm=True, special="negative_zeros"),
        gathered(2, 64, seed=9, residual=False, special="nonfinite", lanes=256),
        gathered(2, 64, seed=10, weight_dtype=torch.float32, special="zeros"),  # fp32 rows of a bf16 sum
    ]
    outcomes = run(world, calls, delay=0.003)
    _right(outcomes, world)
    for n, call in enumerate(calls):
        assert call.special == "nonfinite" or "n" not in outcomes[0].rows[n]
        if call.gathers:  # every rank holds the same bits of every row
            assert len({tuple(outcome.row_digests[n]) for outcome in outcomes}) == 1


def test_a_row_has_the_bits_of_the_all_reduce_and_does_not_see_others() -> None:
    """Batch invariance, and across the ops: a row of a block, whatever rows are kept, and the same row summed for everybody."""
    calls = [
        Call(6, 64, seed=1),
        *(Call(3, 64, blocks=2, gathers=True, seed=1, kept=kept) for kept in ((3, 3), (1, 2))),
        Call(3, 64, blocks=2, gathers=True, seed=1, programs=1, lanes=256),
    ]
    outcomes = run(2, calls)
    _right(outcomes, 2)
    for outcome in outcomes:
        everybody, whole, some, wide = outcome.normed_digests
        assert whole == everybody == wide and len(set(everybody)) == 6
        assert [some[n] == everybody[n] for n in range(6)] == [True, False, False, True, True, False]


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=slow)])
def test_rows_split_over_programs(world: int) -> None:
    """A row of the block of each rank is shared by three programs; the first rank keeps none in the second call."""
    kept = ((1,) * world, (0, *(1,) * (world - 1)))
    calls = [Call(1, 2880, blocks=world, gathers=True, steps=1, programs=3, seed=n, kept=k) for n, k in enumerate(kept)]
    pieces = run(world, calls, split=True)
    assert len(pieces) == 3 * world
    for piece in pieces:
        assert not piece.error, piece.error
        assert not piece.mistakes, piece.mistakes
        assert piece.leftover == 0
        assert piece.rows == ["r" * world + "|r", "r" * world + ("|" if piece.rank == 0 else "|r")]


@pytest.mark.parametrize(
    ("rows", "kept"), [(1, (0, 1)), *(pytest.param(2, kept, marks=slow) for kept in ((2, 2, 2), (0, 2, 1)))]
)
def test_a_dead_rank_leaves_nan_in_all_rows(rows: int, kept: tuple[int, ...]) -> None:
    """Nobody can sum a row without the dead rank, so nobody norms or pushes one; who keeps no row says so all the same."""
    world = len(kept)
    calls = [Call(rows, 72, blocks=world, gathers=True, seed=n, kept=kept, programs=1) for n in range(4)]
    outcomes = run(world, calls, dies=(1, 2), watchdog=300_000)
    assert len(outcomes) == world - 1
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes
        mine = kept[outcome.rank]
        assert outcome.rows == [letter * rows * world + "|" + letter * mine for letter in "rrnn"]
        gave_up, missing, _, phase = outcome.records[2]
        # For the dead rank's part of a sum, or for normed rows that another one could not make.
        assert gave_up == 1 and phase in (0, 8) and missing != outcome.rank and (phase == 8 or missing == 1)
        assert set(outcome.records[2:]) == {outcome.records[2]}


def test_a_late_rank_finds_what_was_pushed_for_its_call() -> None:
    """Rank 1 ends a call and pushes for the next one before rank 0 begins it, in one phase and then in the other."""
    calls = [Call(2, 64, blocks=2, gathers=True, seed=n, kept=(n % 3, 2)) for n in range(5)]
    outcomes = run(2, calls, waits={(0, 1): (1, 1), (0, 3): (1, 3)})
    _right(outcomes, 2)


# -- blocks of several ranks: attention replicas


def blocks(rows: int, hidden: int, *kept: int, **more: object) -> Call:
    """A call of four ranks in two blocks."""
    more["kept"] = tuple(n for n in kept or (rows, rows) for _ in range(2))
    return Call(rows, hidden, blocks=2, gathers=True, **more)  # type: ignore[arg-type]


def test_blocks_of_several_ranks_get_the_normed_rows_of_all() -> None:
    calls = [
        blocks(3, 64, seed=1),
        blocks(2, 72, 2, 1, seed=2, dtype=torch.float32),
        Call(3, 64, "two_shot", seed=3),
        blocks(1, 1160, 0, 1, seed=4),
        blocks(4, 64, 1, 4, seed=5, bias="full", scale=0.22, programs=3),
        Call(2, 64, blocks=4, gathers=True, seed=6),
        blocks(2, 72, seed=7, flavour="olmo2", post_norm=True, special="negative_zeros"),
        blocks(1, 64, 0, 0, seed=8),
        blocks(2, 64, seed=9, weight_dtype=torch.float32, special="zeros"),
    ]
    outcomes = run(4, calls, delay=0.003)
    _right(outcomes, 4)
    for n, call in enumerate(calls):
        if call.gathers:
            assert len({tuple(outcome.row_digests[n]) for outcome in outcomes}) == 1


@slow
def test_rows_of_blocks_split_over_programs() -> None:
    calls = [blocks(1, 2880, 1, kept, steps=1, programs=3, seed=kept) for kept in (1, 0)]
    for piece in run(4, calls, split=True):
        assert not piece.error, piece.error
        assert not piece.mistakes, piece.mistakes
        assert piece.leftover == 0
        assert piece.rows == ["rr|r", "rr|r" if piece.rank < 2 else "rr|"]


@slow
@pytest.mark.parametrize("dead", [1, 2])
def test_a_dead_rank_of_a_block_leaves_nan_in_all_rows_of_it(dead: int) -> None:
    """Its own block lacks sums, the other block the norms: nobody ends the call with a number in a row that lacks something."""
    calls = [blocks(1, 72, 1, kept, programs=1, seed=n) for n, kept in enumerate((1, 0, 1, 1))]
    outcomes = run(4, calls, dies=(dead, 2), watchdog=300_000)
    assert len(outcomes) == 3
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes
        assert outcome.rows[:2] == ["rr|r", "rr|r" if outcome.rank < 2 else "rr|"]
        assert outcome.rows[3] == "nn|n"
        # A rank of the dead one's block may still have got the norms of the other block; these lack nothing.
        mine, lost = outcome.rank // 2, dead // 2
        assert outcome.rows[2] in ({"nn|n", ("nr|n", "rn|n")[lost]} if mine == lost else {"nn|n"})
        gave_up, missing, first, phase = outcome.records[2]
        # A part of a sum of the own block, or the norms of the other one.
        assert gave_up == 1 and ((phase == 10 and first == 2 * mine) or (phase == 8 and missing != mine))
        assert set(outcome.records[2:]) == {outcome.records[2]}
