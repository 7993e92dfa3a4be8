"""``tpfuse::all_reduce_add_rms_norm_gather`` on gloo ranks: two replicas of two ranks, exact, with unequal and no rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from ranks import RankPool, run_ranks

pytestmark = pytest.mark.ranks
H = 24


@pytest.fixture(scope="module")
def pool():
    with RankPool(4) as pool:
        pool.run(make_groups)
        yield pool


GROUPS = {}


def make_groups(rank, world):
    """Blocks and the ranks at one place of each, made once in each process."""
    import torch.distributed as dist

    blocks, across = ([dist.new_group(ranks) for ranks in lists] for lists in (([0, 1], [2, 3]), ([0, 2], [1, 3])))
    GROUPS.update(group=dist.group.WORLD, block_group=blocks[rank // 2], gather_group=across[rank % 2])


def against_the_steps(rank, world, dtype, flavours):
    """Whether results are the bits of the block's all-reduce, add, norm, rows of zeros and all-gather."""
    from tpfuse.ops import all_reduce_add_rms_norm_gather, reference
    from tpfuse.ops.flavour import NAMED

    c10d = torch.ops._c10d_functional
    names = {name: group.group_name for name, group in GROUPS.items()}
    found = []
    for number, name in enumerate(flavours):
        for rows, largest in (((3, 3), 3), ((1, 4), 5), ((2, 0), 2), ((0, 0), 0), ((0, 0), 1)):
            mine = rows[rank // 2]
            x = torch.randn(1, mine, H, generator=torch.Generator().manual_seed(10 * number + rank)).to(dtype)
            shared = torch.Generator().manual_seed(100 + number + rank // 2)
            residual, weight = torch.randn(1, mine, H, generator=shared).to(dtype), torch.rand(H).fill_(0.7)
            weight = weight.to(dtype) if number else weight
            got = all_reduce_add_rms_norm_gather(
                x, residual, weight, largest=largest, flavour=NAMED[name], bias=torch.ones(H, dtype=dtype), **GROUPS
            )
            total = c10d.wait_tensor(c10d.all_reduce(x, "sum", names["block_group"])) if mine else x
            bias = torch.ones(H, dtype=dtype)
            normed, h = reference.add_rms_norm(total, residual, weight, bias, 1e-6, 1.0, NAMED[name], False)
            filled = torch.zeros(largest, H, dtype=normed.dtype)
            filled[:mine] = normed[0]
            whole = torch.cat([filled] * 2)
            if largest:
                whole = c10d.wait_tensor(c10d.all_gather_into_tensor(filled, 2, names["gather_group"]))
            pairs = ((got[0], whole), (got[1], h))
            found.append([torch.equal(a, b) and a.dtype == b.dtype and a.shape == b.shape for a, b in pairs])
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_rank_has_the_bits_of_all_replicas(pool, dtype):
    for found in pool.run(against_the_steps, dtype, ("llama", "vllm")):
        assert len(found) == 10 and all(all(pair) for pair in found), found


def compiled(rank, world):
    """One compile for every number of rows, of both blocks."""
    import torch._dynamo
    from tpfuse.ops import all_reduce_add_rms_norm_gather

    frames = []

    def keep(gm, inputs):
        frames.append(gm)
        return gm.forward

    names = {name: group.group_name for name, group in GROUPS.items()}

    def call(x, r, w, like):
        return all_reduce_add_rms_norm_gather(x, r, w, largest=like.shape[0], **names)

    run, equal = torch.compile(call, backend=keep, dynamic=True, fullgraph=True), []
    for rows, largest in (((2, 3), 4), ((5, 4), 7), ((6, 2), 9)):
        mine = rows[rank // 2]
        x, r = (torch.randn(mine, H, generator=torch.Generator().manual_seed(seed)) for seed in (rank, 9 + rank // 2))
        given = (x, r, torch.ones(H), torch.empty(largest))
        with torch.no_grad():
            equal += [torch.equal(a, b) for a, b in zip(run(*given), call(*given), strict=True)]
    return equal, len(frames)


def test_one_compile_takes_every_number_of_rows(pool):
    for equal, frames in pool.run(compiled):
        assert all(equal) and frames == 1


def refusals(rank, world):
    from tpfuse.ops import all_reduce_add_layer_norm_gather as with_layer_norm
    from tpfuse.ops import all_reduce_add_rms_norm_gather as op

    x, w = torch.ones(3, H), torch.ones(H)
    turned = {**GROUPS, "block_group": GROUPS["gather_group"], "gather_group": GROUPS["block_group"]}
    calls = {
        "groups": lambda: op(x, x, w, largest=3, **turned),
        "one group": lambda: op(x, x, w, largest=3, **dict.fromkeys(GROUPS, GROUPS["group"])),
        "largest": lambda: op(x, x, w, largest=2, **GROUPS),
        "residual": lambda: op(x, x[:2], w, largest=3, **GROUPS),
        "gradient": lambda: op(x.clone().requires_grad_(), x, w, largest=3, **GROUPS),
        "device": lambda: op(x, x, w.to("meta"), largest=3, **GROUPS),
        "device of a shift": lambda: with_layer_norm(x, x, w, w.to("meta"), largest=3, **GROUPS),
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
        assert "expected blocks of at least 2 neighbors of [0, 1, 2, 3]" in messages["groups"]
        assert "block_group has ranks [0, 1, 2, 3]" in messages["one group"]
        assert "x has 3 rows" in messages["largest"] and "largest is 2" in messages["largest"]
        assert "residual is torch.float32 (2, 24)" in messages["residual"]
        assert "no gradient" in messages["gradient"]
        assert "all_reduce_add_rms_norm_gather: x is on cpu, but an operand" in messages["device"]
        assert "all_reduce_add_layer_norm_gather: x is on cpu, but an operand" in messages["device of a shift"]


def one_bad_count(rank, world):
    """A block with more rows than ``largest``, and one rank with another ``largest``; then a call that fits."""
    from tpfuse.ops import all_reduce_add_rms_norm_gather as op

    messages = []
    for rows, largest in ((2 + rank // 2, 2), (1, 2 + rank // 2)):
        try:
            op(torch.ones(rows, H), None, torch.ones(H), largest=largest, **GROUPS)
        except ValueError as error:
            messages.append(str(error))
    normed, _ = op(torch.ones(1, H), None, torch.ones(H), largest=1, **GROUPS)
    return messages, tuple(normed.shape)


def test_a_count_of_one_block_that_does_not_fit_is_an_error_on_every_rank(pool):
    for rank, ((rows, largest), shape) in enumerate(pool.run(one_bad_count, timeout=60)):
        assert f"x has 3 rows, but largest is 2, on rank {2 + rank % 2}" in rows
        assert "largest is" in largest and "pass the same number on every rank" in largest
        assert shape == (2, H)


def edges_of_the_gpu_test(rank, world):
    sys.path.insert(0, str(Path(__file__).parent / "gpu"))
    import rows_on_ranks

    all_of, most = rows_on_ranks.edges, 2048
    rows_on_ranks.edges = lambda world: [c for c in all_of(world) if c.blocks == 2 and c.hidden <= most]
    return rows_on_ranks.edge_list(rank, world)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: tests/gpu runs the list there")
def test_the_list_of_edge_cases_that_gpus_run_holds_on_a_cpu():
    """Else nobody notices that a call of it is one that an op refuses, before a GPU is at hand."""
    sums_in_rank_order = {"TPFUSE_BATCH_INVARIANT": "1"}  # as kernels make them
    assert run_ranks(edges_of_the_gpu_test, 4, env=sums_in_rank_order) == [[]] * 4
