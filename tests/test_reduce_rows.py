"""``tpfuse::reduce_rows_add_rms_norm`` on gloo ranks: each rank's rows of the sum, exact, and errors that name the argument."""

from __future__ import annotations

import pytest
import torch
from ranks import RankPool

pytestmark = pytest.mark.ranks
H = 24


@pytest.fixture(scope="module")
def pool():
    with RankPool(4) as pool:
        yield pool


def rows_of(rank, world, dtype, blocks, collective):
    """What differs from the model's own steps: the group's collective, own rows, add, norm. Several counts of kept rows."""
    from tpfuse.ops import LLAMA, reduce_rows_add_rms_norm, reference

    c10d = torch.ops._c10d_functional
    group = torch.distributed.group.WORLD.group_name
    place = rank * blocks // world
    found = []
    for number, block in enumerate((1, 3, 5)):
        x = torch.randn(blocks * block, H, generator=torch.Generator().manual_seed(10 * number + rank)).to(dtype)
        shared = torch.Generator().manual_seed(100 + number)
        residual, weight = (
            torch.randn(blocks * block, H, generator=shared).to(dtype),
            torch.rand(H, generator=shared).to(dtype),
        )
        if collective == "reduce_scatter":
            own = c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", blocks, group))
        else:
            own = c10d.wait_tensor(c10d.all_reduce(x, "sum", group))[place * block : (place + 1) * block]
        for kept in (0, block - place % 2, block):  # as many calls on every rank, with counts of its own
            mine = residual[place * block :][:kept]
            got = reduce_rows_add_rms_norm(x, mine, weight, blocks=blocks, collective=collective)
            want = reference.add_rms_norm(own[:kept], mine, weight, None, 1e-6, 1.0, LLAMA, False)
            found.append([torch.equal(g, w) and g.shape == (kept, H) for g, w in zip(got, want, strict=True)])
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("blocks", "collective"), [(4, "reduce_scatter"), (4, "all_reduce"), (2, "all_reduce")])
def test_each_rank_has_the_bits_of_its_rows(pool, dtype, blocks, collective):
    for found in pool.run(rows_of, dtype, blocks, collective):
        assert found and all(all(pair) for pair in found)


def without_residual(rank, world):
    """A reduce-scatter is the default; without a residual each rank keeps its block, in the shape that is left of ``x``."""
    from tpfuse.ops import all_reduce_add_rms_norm, reduce_rows_add_rms_norm

    x = torch.randn(4 * 2, 3, H, generator=torch.Generator().manual_seed(rank))
    weight = torch.rand(H, generator=torch.Generator().manual_seed(9))
    got = reduce_rows_add_rms_norm(x, None, weight)
    want = all_reduce_add_rms_norm(x, None, weight)
    compiled = torch.compile(lambda x, w: reduce_rows_add_rms_norm(x, None, w), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        again = compiled(x, weight)
    return [(a.shape, (a - b[2 * rank : 2 * rank + 2]).abs().max().item()) for a, b in zip(got, want, strict=True)], [
        torch.equal(a, b) for a, b in zip(got, again, strict=True)
    ]


def test_without_a_residual_a_rank_keeps_its_block_and_it_compiles_in_one_graph(pool):
    for pairs, equal in pool.run(without_residual):
        assert all(shape == (2, 3, H) and off < 1e-5 for shape, off in pairs)
        assert equal == [True, True]


def empty(rank, world):
    from tpfuse.ops import reduce_rows_add_rms_norm

    return [t.shape for t in reduce_rows_add_rms_norm(torch.ones(0, H), torch.ones(0, H), torch.ones(H))]


def test_no_rows_at_all_ask_nobody(pool):
    assert pool.run(empty) == [[(0, H), (0, H)]] * 4


def refusals(rank, world):
    from tpfuse.ops import reduce_rows_add_rms_norm

    x, w = torch.ones(8, H), torch.ones(H)
    calls = {
        "too many rows": lambda: reduce_rows_add_rms_norm(x, torch.ones(3, H), w),
        "blocks": lambda: reduce_rows_add_rms_norm(x, torch.ones(1, H), w, blocks=3),
        "collective": lambda: reduce_rows_add_rms_norm(x, torch.ones(1, H), w, blocks=2, collective="reduce_scatter"),
        "width": lambda: reduce_rows_add_rms_norm(x, torch.ones(1, H - 8), w),
        "division": lambda: reduce_rows_add_rms_norm(x[:6], torch.ones(1, H), w),
        "dtype": lambda: reduce_rows_add_rms_norm(x, torch.ones(1, H).bfloat16(), w),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def test_what_does_not_fit_is_named_before_anybody_communicates(pool):
    for messages in pool.run(refusals):
        assert "residual has 3 rows, but a block of x has 2" in messages["too many rows"]
        assert "blocks is 3; expected a divisor of the group's 4 ranks" in messages["blocks"]
        assert "'reduce_scatter' with 2 blocks over 4 ranks" in messages["collective"]
        assert "expected rows of 24" in messages["width"]
        assert "x has 6 rows" in messages["division"]
        assert "residual is torch.bfloat16" in messages["dtype"]


def one_bad_count(rank, world):
    """One rank keeps more rows than its block has; then a call that fits."""
    from tpfuse.ops import reduce_rows_add_rms_norm

    x, w = torch.ones(8, H), torch.ones(H)
    with pytest.raises(ValueError, match="residual has 3 rows, but a block of x has 2, on rank 1"):
        reduce_rows_add_rms_norm(x, torch.ones(3 if rank == 1 else 1, H), w)
    return [tuple(t.shape) for t in reduce_rows_add_rms_norm(x, torch.ones(rank % 3, H), w)]


def test_a_count_of_one_rank_that_does_not_fit_is_an_error_on_every_rank(pool):
    for rank, shapes in enumerate(pool.run(one_bad_count, timeout=60)):
        assert shapes == [(rank % 3, H)] * 2


def one_residual(rank, world):
    """Rank 0 keeps its block without a residual, the others have one."""
    from tpfuse.ops import reduce_rows_add_rms_norm

    x = torch.ones(8, H)
    return reduce_rows_add_rms_norm(x, torch.ones(2, H) if rank else None, torch.ones(H))[1][0, 0].item()


def test_ranks_with_and_without_a_residual_make_one_call(pool):
    assert pool.run(one_residual, timeout=60) == [4.0, 5.0, 5.0, 5.0]
