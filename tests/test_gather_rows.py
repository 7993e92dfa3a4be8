"""``tpfuse::reduce_rows_add_rms_norm_gather`` on gloo ranks: exact, unequal and no rows, and errors that name the argument."""

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


def against_the_steps(rank, world, dtype, collective, flavours):
    """Whether results are the bits of the group's collective, add, norm and all-gather; each rank keeps another count."""
    from tpfuse.ops import reduce_rows_add_rms_norm_gather, reference
    from tpfuse.ops.flavour import NAMED

    c10d = torch.ops._c10d_functional
    group = torch.distributed.group.WORLD.group_name
    found = []
    for number, (name, block) in enumerate(zip(flavours, (1, 3, 5), strict=True)):
        x = torch.randn(world * block, H, generator=torch.Generator().manual_seed(10 * number + rank)).to(dtype)
        shared = torch.Generator().manual_seed(100 + number)
        residual = torch.randn(world * block, H, generator=shared).to(dtype)
        weight = torch.rand(H, generator=shared)
        weight = weight.to(dtype) if number else weight  # an fp32 weight makes fp32 rows of 16-bit sums
        if collective == "reduce_scatter":
            own = c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", world, group))
        else:
            own = c10d.wait_tensor(c10d.all_reduce(x, "sum", group))[rank * block : (rank + 1) * block]
        for kept in (block, max(0, block - rank), 0):
            mine = residual[rank * block :][:kept]
            got = reduce_rows_add_rms_norm_gather(x, mine, weight, flavour=NAMED[name], collective=collective)
            normed, h = reference.add_rms_norm(own[:kept], mine, weight, None, 1e-6, 1.0, NAMED[name], False)
            filled = torch.zeros(block, H, dtype=normed.dtype)
            filled[:kept] = normed
            whole = c10d.wait_tensor(c10d.all_gather_into_tensor(filled, world, group))
            found.append(
                [torch.equal(a, b) and a.dtype == b.dtype for a, b in ((got[0], whole), (got[1], h))]
                + [got[0].shape == x.shape and got[1].shape == (kept, H)]
            )
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("collective", ["reduce_scatter", "all_reduce"])
def test_every_rank_has_the_bits_of_all_normed_rows(pool, dtype, collective):
    for found in pool.run(against_the_steps, dtype, collective, ("llama", "gemma", "vllm")):
        assert len(found) == 9 and all(all(three) for three in found), found


def compiled_and_empty(rank, world):
    """Sequence first, a residual of three dimensions; one compile for every number of rows, and no rows at all."""
    import torch._dynamo
    from tpfuse.ops import reduce_rows_add_rms_norm, reduce_rows_add_rms_norm_gather

    frames = []

    def keep(gm, inputs):
        frames.append(gm)
        return gm.forward

    weight = torch.rand(H, generator=torch.Generator().manual_seed(9))
    run = torch.compile(lambda *a: reduce_rows_add_rms_norm_gather(*a), backend=keep, dynamic=True, fullgraph=True)
    equal = []
    with torch.no_grad():
        for rows, kept in ((8, 2), (12, 3), (20, 5)):
            x = torch.randn(rows, 3, H, generator=torch.Generator().manual_seed(rank + rows))
            r = torch.randn(kept, 3, H, generator=torch.Generator().manual_seed(rank))
            normed, h = run(x, r, weight)
            own, again = reduce_rows_add_rms_norm(x, r, weight)
            equal += [torch.equal(normed[rank * kept : (rank + 1) * kept], own), torch.equal(h, again)]
        none = reduce_rows_add_rms_norm_gather(torch.ones(0, H), torch.ones(0, H), torch.ones(H))
    return equal, len(frames), [tuple(t.shape) for t in none]


def test_one_compile_takes_every_number_of_rows_and_none_asks_nobody(pool):
    for equal, frames, shapes in pool.run(compiled_and_empty):
        assert all(equal) and frames == 1 and shapes == [(0, H), (0, H)]


def in_rank_order(rank, world):
    """In batch-invariant mode a row has the same bits whatever else is in the call."""
    from tpfuse.ops import forget, reduce_rows_add_rms_norm_gather, set_batch_invariant

    group = torch.distributed.group.WORLD
    forget(group)
    set_batch_invariant(True)
    try:
        x = torch.randn(world * 6, H, generator=torch.Generator().manual_seed(rank)).bfloat16()
        r, w = (
            torch.randn(6, H, generator=torch.Generator().manual_seed(50 + rank)).bfloat16(),
            torch.ones(H).bfloat16(),
        )
        whole = reduce_rows_add_rms_norm_gather(x, r, w, group=group)[0].view(world, 6, H)
        firsts = x.view(world, 6, H)[:, :1].reshape(-1, H)
        return torch.equal(reduce_rows_add_rms_norm_gather(firsts, r[:1], w, group=group)[0], whole[:, 0])
    finally:
        forget(group)
        set_batch_invariant(False)


def test_a_row_does_not_see_the_others(pool):
    assert pool.run(in_rank_order) == [True] * 4


def refusals(rank, world):
    from tpfuse.ops import reduce_rows_add_rms_norm_gather as op

    x, w = torch.ones(8, H), torch.ones(H)
    calls = {
        "too many rows": lambda: op(x, torch.ones(3, H), w),
        "collective": lambda: op(x, torch.ones(2, H), w, collective="broadcast"),
        "width": lambda: op(x, torch.ones(1, H - 8), w),
        "division": lambda: op(x[:6], None, w),
        "dtype": lambda: op(x, torch.ones(1, H).bfloat16(), w),
        "gradient": lambda: op(x.clone().requires_grad_(), torch.ones(2, H), w),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, RuntimeError) as error:
            messages[name] = str(error)
    return messages


def test_what_does_not_fit_is_named_before_anybody_communicates(pool):
    for messages in pool.run(refusals):
        assert "_gather: residual has 3 rows, but a block of x has 2" in messages["too many rows"]
        assert "_gather: collective is 'broadcast' with 4 blocks over 4 ranks" in messages["collective"]
        assert "_gather: residual has shape" in messages["width"] and "rows of 24" in messages["width"]
        assert "_gather: x has shape (6, 24)" in messages["division"]
        assert "residual is torch.bfloat16" in messages["dtype"]
        assert "no gradient" in messages["gradient"]
