"""LayerNorm over rows with destinations, and with the gather behind it, on gloo ranks: the bits of the unfused steps.

The three ops share all but the norm with those of an RMSNorm (``test_reduce_rows.py``, ``test_gather_rows.py``,
``test_gather_blocks.py``), so this asks what the norm adds: its operands, its spellings, its messages.
"""

from __future__ import annotations

import pytest
import torch
from ranks import RankPool
from test_layer_norm import steps

pytestmark = pytest.mark.ranks
H = 24
GROUPS = {}


@pytest.fixture(scope="module")
def pool():
    with RankPool(4) as pool:
        pool.run(make_groups)
        yield pool


def make_groups(rank, world):
    """Two replicas of two ranks, and the ranks at one place of each."""
    import torch.distributed as dist

    blocks, across = ([dist.new_group(ranks) for ranks in lists] for lists in (([0, 1], [2, 3]), ([0, 2], [1, 3])))
    GROUPS.update(group=dist.group.WORLD, block_group=blocks[rank // 2], gather_group=across[rank % 2])


def operands(number, rank, world, rows, kept, dtype, flavour):
    """x of all rows; of the kept ones residual, weight and norm_bias, and a vector, an addend and a scale in front of the add."""
    own, same = (torch.Generator().manual_seed(seed) for seed in (10 * number + rank, 100 + number))
    x = torch.randn(rows, H, generator=own).to(dtype)
    residual, addend = ((torch.randn(rows, H, generator=same) + 4).to(dtype)[kept] for _ in range(2))
    weight, norm_bias, vector = (torch.randn(H, generator=same).to(dtype) for _ in range(3))
    affine = None if flavour.gain == "none" else weight, None if flavour.shift == "none" else norm_bias
    return x, residual, affine, {"bias": vector, "addend": addend, "scale": 0.22}


def right(got, own, residual, affine, more, name, around=lambda normed: normed):
    """Whether results are those of the steps behind the own rows of the sum."""
    h = residual + (((own + more["bias"]) + more["addend"]) * more["scale"] if more else own)
    pairs = zip(got, (around(steps(name, h, *affine)), h), strict=True)
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def rows_of(rank, world, dtype, blocks, collective):
    """Calls whose results are not those of the group's collective, own rows, add and norm."""
    from tpfuse.ops import reduce_rows_add_layer_norm
    from tpfuse.ops.layer_norm_flavour import NAMED

    c10d, group = torch.ops._c10d_functional, torch.distributed.group.WORLD.group_name
    place, wrong = rank * blocks // world, []
    for number, ((name, flavour), block) in enumerate(zip(NAMED.items(), (1, 3, 5, 2), strict=True)):
        for kept in (0, block - place % 2, block):
            mine = slice(place * block, place * block + kept)
            x, residual, affine, more = operands(number, rank, world, blocks * block, mine, dtype, flavour)
            if collective == "reduce_scatter":
                own = c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", blocks, group))[:kept]
            else:
                own = c10d.wait_tensor(c10d.all_reduce(x, "sum", group))[mine]
            for extra in ({}, more):
                options = {"blocks": blocks, "collective": collective, "flavour": flavour, **extra}
                got = reduce_rows_add_layer_norm(x, residual, *affine, **options)
                if not right(got, own, residual, affine, extra, name) or got[0].shape != (kept, H):
                    wrong.append((name, block, kept, sorted(extra)))
    return wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("blocks", "collective"), [(4, "reduce_scatter"), (2, "all_reduce")])
def test_each_rank_has_the_bits_of_its_rows(pool, dtype, blocks, collective):
    assert pool.run(rows_of, dtype, blocks, collective) == [[]] * 4


def gathered(rank, world, dtype):
    """The same with the group's all-gather behind it, of all ranks and of replicas."""
    from tpfuse.ops import all_reduce_add_layer_norm_gather, reduce_rows_add_layer_norm_gather
    from tpfuse.ops.layer_norm_flavour import NAMED

    c10d, wrong = torch.ops._c10d_functional, []
    names = {name: group.group_name for name, group in GROUPS.items()}

    def all_of(normed, rows, ranks, group):
        filled = torch.zeros(rows, H, dtype=normed.dtype)
        filled[: len(normed)] = normed
        return c10d.wait_tensor(c10d.all_gather_into_tensor(filled, ranks, group))

    block, kept = 3, 3 - rank % 3
    for number, (name, flavour) in enumerate(NAMED.items()):
        mine = slice(rank * block, rank * block + kept)
        x, residual, affine, more = operands(number, rank, world, world * block, mine, dtype, flavour)
        own = c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", world, names["group"]))[:kept]
        for extra in ({}, more):
            got = reduce_rows_add_layer_norm_gather(x, residual, *affine, flavour=flavour, **extra)
            if not right(got, own, residual, affine, extra, name, lambda n: all_of(n, block, world, names["group"])):
                wrong.append(("rows", name, sorted(extra)))
        rows = (4, 1)[rank // 2]
        x, residual, affine, more = operands(number, rank, world, rows, slice(None), dtype, flavour)
        own = c10d.wait_tensor(c10d.all_reduce(x, "sum", names["block_group"]))
        for extra in ({}, more):
            options = {"largest": 5, "flavour": flavour, **GROUPS, **extra}
            got = all_reduce_add_layer_norm_gather(x, residual, *affine, **options)
            if not right(got, own, residual, affine, extra, name, lambda n: all_of(n, 5, 2, names["gather_group"])):
                wrong.append(("blocks", name, sorted(extra)))
    return wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_rank_has_the_bits_of_all_normed_rows(pool, dtype):
    assert pool.run(gathered, dtype) == [[]] * 4


def compiled(rank, world):
    """One compile of each op for every number of rows: how many graphs, and which results are not those of a call."""
    import torch._dynamo
    from tpfuse.ops import (
        all_reduce_add_layer_norm_gather,
        reduce_rows_add_layer_norm,
        reduce_rows_add_layer_norm_gather,
    )

    w, b = torch.ones(H), torch.full((H,), 0.5)
    names = {name: group.group_name for name, group in GROUPS.items()}
    ops = {
        "rows": lambda x, r, like: reduce_rows_add_layer_norm(x, r, w, b, blocks=2),
        "gather": lambda x, r, like: reduce_rows_add_layer_norm_gather(x, r, w, b, addend=r),
        "blocks": lambda x, r, like: all_reduce_add_layer_norm_gather(r, r, w, b, largest=like.shape[0], **names),
    }
    found = []
    for name, op in ops.items():
        torch._dynamo.reset()
        frames, wrong = [], []

        def keep(gm, inputs, frames=frames):
            frames.append(gm)
            return gm.forward

        run = torch.compile(op, backend=keep, dynamic=True, fullgraph=True)
        for rows, kept, largest in ((8, 2, 7), (12, 3, 8), (20, 5, 9)):
            x, r = (torch.randn(n, H, generator=torch.Generator().manual_seed(rank)) for n in (rows, kept))
            given = x, r, torch.empty(largest)
            with torch.no_grad():
                same = [torch.equal(a, b) for a, b in zip(run(*given), op(*given), strict=True)]
            wrong += [] if all(same) else [rows]
        found.append((name, len(frames), wrong))
    return found


def test_one_compile_takes_every_number_of_rows(pool):
    assert pool.run(compiled) == [[("rows", 1, []), ("gather", 1, []), ("blocks", 1, [])]] * 4


def checked(rank, world):
    """Of each op: whether schema and fake hold what the op does, with rows and without."""
    from tpfuse.ops.layer_norm_flavour import LAYER_NORM

    names = [GROUPS[name].group_name for name in ("group", "block_group", "gather_group")]
    found = []
    for kept in (2, 0):
        x, r, v = torch.ones(4 * kept, H), torch.ones(kept, H), torch.ones(H)
        behind = (v, v, v, r, 1e-5, 1.0, str(LAYER_NORM))
        calls = {
            "reduce_rows_add_layer_norm": (x, r, *behind, names[0], 4, ""),
            "reduce_rows_add_layer_norm_gather": (x, None, *behind[:3], None, *behind[4:], names[0], ""),
            "all_reduce_add_layer_norm_gather": (r, None, *behind, *names, 3),
        }
        for name, args in calls.items():
            op = getattr(torch.ops.tpfuse, name).default
            tests = torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
            found += [name] if set(tests.values()) != {"SUCCESS"} else []
    return found


def test_schemas_and_fakes_hold_what_the_ops_do(pool):
    assert pool.run(checked) == [[]] * 4


def in_rank_order(rank, world):
    """In batch-invariant mode: calls in which a row has other bits than alone."""
    from tpfuse.ops import forget, reduce_rows_add_layer_norm, set_batch_invariant

    group = torch.distributed.group.WORLD
    for used in GROUPS.values():
        forget(used)
    set_batch_invariant(True)
    try:
        x = torch.randn(world * 6, H, generator=torch.Generator().manual_seed(rank)).bfloat16()
        r, a = (torch.randn(6, H, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (50, 51))
        w = torch.ones(H).bfloat16()
        whole = reduce_rows_add_layer_norm(x, r, w, w, addend=a, group=group)
        firsts = x.view(world, 6, H)[:, :1].reshape(-1, H)
        alone = reduce_rows_add_layer_norm(firsts, r[:1], w, w, addend=a[:1], group=group)
        return [torch.equal(one[0], many[0]) for one, many in zip(alone, whole, strict=True)]
    finally:
        forget(group)
        set_batch_invariant(False)


def test_a_row_does_not_see_the_others(pool):
    assert pool.run(in_rank_order) == [[True, True]] * 4


def refusals(rank, world):
    from tpfuse.ops import all_reduce_add_layer_norm_gather as of_blocks
    from tpfuse.ops import reduce_rows_add_layer_norm as op
    from tpfuse.ops import reduce_rows_add_layer_norm_gather as gather

    x, w, r = torch.ones(8, H), torch.ones(H), torch.ones(2, H)
    calls = {
        "too many rows": lambda: op(x, torch.ones(3, H), w, w),
        "blocks": lambda: op(x, torch.ones(1, H), w, w, blocks=3),
        "dtype": lambda: op(x, torch.ones(1, H).bfloat16(), w, w),
        "addend": lambda: op(x, r, w, w, addend=torch.ones(3, H)),
        "norm_bias": lambda: op(x, r, w),
        "gradient": lambda: op(x, r, w, w.clone().requires_grad_()),
        "gather": lambda: gather(x[:6], None, w, w),
        "largest": lambda: of_blocks(x, x, w, w, largest=2, **GROUPS),
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
        assert "reduce_rows_add_layer_norm: residual has 3 rows, but a block of x has 2" in messages["too many rows"]
        assert "blocks is 3; expected a divisor of the group's 4 ranks" in messages["blocks"]
        assert "residual is torch.bfloat16" in messages["dtype"]
        assert "addend is torch.float32 (3, 24); expected torch.float32 of shape (2, 24)" in messages["addend"]
        assert "norm_bias is None, but the flavour's shift is 'bias'" in messages["norm_bias"]
        assert "norm_bias requires grad" in messages["gradient"]
        assert "reduce_rows_add_layer_norm_gather: x has shape (6, 24)" in messages["gather"]
        assert "all_reduce_add_layer_norm_gather: x has 8 rows" in messages["largest"]
