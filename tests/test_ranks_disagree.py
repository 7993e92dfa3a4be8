"""Ranks that decide differently about a graph leave the ops in question out, all of them, and it runs with its own bits."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import pytest
import torch
from ranks import RankPool

pytestmark = pytest.mark.ranks
ALL = {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all"}


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def four():
    with RankPool(4) as pool:
        yield pool


def norm(h):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


def total(x, group):
    c10d = torch.ops._c10d_functional
    return c10d.wait_tensor(c10d.all_reduce(x, "sum", group))


def world():
    import torch.distributed as dist

    return dist.group.WORLD.group_name


def first_block(group):
    """Each rank keeps the first rows of the sum, as many as it has: rank 0 proves that they are its own block, rank 1 cannot."""
    c10d = torch.ops._c10d_functional

    def step(x, residual, tag="a"):
        everyone = c10d.wait_tensor(c10d.all_gather_into_tensor(x, 2, group))
        rows = total(everyone.sigmoid(), group)[0 : x.shape[0]]
        return norm(rows + residual) if tag == "a" else (norm(rows + residual), tag)[0]

    return step


@torch.no_grad()
def ran(step, calls, options, like=None):
    """(bits of ``like``, eager if None, in all calls?, [(fused, reason)] of each graph, tpfuse's warnings)."""
    import tpfuse
    from tpfuse import unfused

    torch._dynamo.reset()
    tpfuse.clear_reports()
    unfused.forget()
    wanted = [step(*call) if like is None else torch.compile(step, backend=like)(*call) for call in calls]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        compiled = torch.compile(step, backend="tpfuse", options=options, fullgraph=True)
        got = [compiled(*call) for call in calls]
    same = all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))
    sites = [[(site.fused, site.reason) for site in report.sites] for report in tpfuse.reports()]
    return same, sites, [str(w.message) for w in told if "tpfuse" in str(w.message)]


def inputs(rank, rows, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rank)
    return tuple(torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))


REFUSED = [(False, "ranks-disagree")]


def blocks(rank, world_size, inner, width, rows=(4,), tags=("a", "a")):
    # In fp32 Inductor leaves the model's own nodes in any case, on a CPU.
    dtype, like = (torch.float32, None) if inner == "aot_eager" else (torch.bfloat16, inner)
    calls = [(*inputs(rank, n, width, dtype), tag) for n in rows for tag in ("a", tags[rank])]
    return ran(first_block(world()), calls, {"tpfuse.inner": inner}, like)


@pytest.mark.parametrize(("inner", "width"), [("aot_eager", 16), ("inductor", 24)])
def test_what_one_rank_proves_and_the_other_cannot_runs_as_it_was(pool, inner, width):
    for same, sites, told in pool.run(blocks, inner, width):
        assert same
        assert sites == [REFUSED]
        (only,) = told
        assert "rank 1 decided differently from rank 0 about one graph: All-reduce 0 on rank 0" in only
        assert "fused over [0, 1]; on rank 1: " in only and "kept (rows-move)" in only


def dumped(rank, world_size, folder, width):
    import tpfuse
    from tpfuse.inspect import load

    ran(first_block(world()), [inputs(rank, 4, width)], {"tpfuse.inner": "aot_eager", "tpfuse.dump": folder})
    (graph,) = [graph for graph in load.read(Path(folder)).graphs if graph.report.rank == rank]
    (after,) = Path(folder).glob(f"rank-{rank}/*/after.py")
    return graph.report == tpfuse.reports()[0], after.read_text().count("torch.ops.tpfuse")


def test_the_dump_shows_the_graph_that_runs(pool, tmp_path):
    assert pool.run(dumped, str(tmp_path), 80) == [(True, 0)] * 2


def test_a_graph_that_is_compiled_again_stays_refused(pool):
    """For other rows on both ranks, and for another argument on rank 1 alone, which then waits for nobody."""
    first, second = pool.run(blocks, "aot_eager", 32, (4, 6, 8), ("a", "b"), timeout=200)
    for same, sites, told in (first, second):
        assert same
        assert sites == [REFUSED] * len(sites)
        assert len(told) == 1
    assert len(second[1]) > len(first[1]) >= 2


def with_options(rank, world_size, differs, width):
    def step(x, residual):
        return norm(residual + total(x, world()))

    def both(x, residual):
        return norm(residual + (total(x, world()) + total(x * 0.5, world())))

    chosen = both if "tpfuse.numerics" in differs else step
    return ran(chosen, [inputs(rank, 4, width)], {**ALL, **(differs if rank else {})})


@pytest.mark.parametrize(
    ("differs", "width", "named", "sites"),
    [
        ({"tpfuse.policy": "off"}, 40, "policy=off", 1),
        ({"tpfuse.numerics": "relaxed"}, 48, "numerics=relaxed", 2),
        ({"tpfuse.fuel": 0}, 56, "fuel=0", 1),
    ],
    ids=["policy", "numerics", "fuel"],
)
def test_ranks_with_different_options_run_unfused_and_are_told_what_differs(pool, differs, width, named, sites):
    for same, found, told in pool.run(with_options, differs, width):
        assert same
        assert found == [REFUSED * sites]
        (only,) = told
        assert "rank 1 decided differently from rank 0" in only
        assert f"{named} " in only.split(" on rank 0, ")[1]


def with_a_broken_pass(rank, world_size, width):
    from tpfuse.passes import rewrite

    def broken(*_):
        raise ZeroDivisionError("only here")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(rewrite, "_check", broken)
        return with_options(rank, world_size, {}, width)


def test_a_pass_that_fails_on_one_rank_is_a_disagreement_too(pool):
    for rank, (same, sites, told) in enumerate(pool.run(with_a_broken_pass, 72)):
        assert same
        assert sites == [REFUSED]
        *others, last = told
        assert "on rank 1: " in last and "kept (internal)" in last
        assert len(others) == rank  # the failure itself


def names():
    from tpfuse.parallel import ParallelConfig, build_groups

    groups = build_groups(ParallelConfig(4, 2, 1, 2))
    return groups.name_of("attn_tp"), groups.name_of("tp")


def two_groups(rank, world_size, odd_about, width):
    """A sum over a pair, and one over all ranks; rank 1 reads one of the two sums elsewhere, so that it cannot be fused there."""
    pair, everyone = names()

    def step(x, residual):
        y = total(x, pair)
        residual = y + residual
        z = total(norm(residual).sigmoid() * (1 + rank), everyone)
        out = norm(z + residual)
        odd = {"pair": y, "all": z}.get(odd_about) if rank == 1 else None
        return out if odd is None else out + odd.exp()

    return ran(step, [inputs(rank // 2, 4, width)], ALL)


def test_only_the_ranks_of_the_group_leave_its_op_out(four):
    """The other pair knows of nothing and fuses both; the op over all ranks stays fused on all of them."""
    answers = four.run(two_groups, "pair", 16)
    for rank, (same, sites, told) in enumerate(answers):
        assert same
        assert sites == [[*(REFUSED if rank < 2 else [(True, None)]), (True, None)]]
        assert len(told) == (rank < 2)
    assert "rank 1 decided differently from rank 0" in answers[0][2][0]


def test_the_ops_of_parts_of_the_group_stay(four):
    for same, sites, told in four.run(two_groups, "all", 24):
        assert same
        assert sites == [[(True, None), *REFUSED]]
        (only,) = told
        assert "rank 1 decided differently from ranks 0, 2, 3" in only


def with_fuel(rank, world_size, width, fuel):
    """The second replica has no rows, and leaves the sum over its own ranks out as a layer of tpfuse's does."""
    pair, everyone = names()
    empty = rank >= 2

    def step(x, residual):
        for _ in range(2):
            if not empty:
                residual = total(x, pair) + residual
                x = norm(residual).sigmoid() * (1 + rank)
            residual = total(x, everyone) + residual
            x = norm(residual)
        return x

    return ran(step, [inputs(rank // 2, 4, width)], {**ALL, "tpfuse.fuel": fuel})


def test_fuel_that_a_replica_without_rows_counts_otherwise(four):
    """Of two ops over all ranks the other replica has used up its fuel before the second one."""
    answers = four.run(with_fuel, 32, 3)
    for rank, (same, sites, told) in enumerate(answers):
        assert same
        part, whole = [(True, None)], [(False, "ranks-disagree")]
        assert sites == [[*whole, *whole] if rank >= 2 else [*part, *whole, *part, *whole]]
        (only,) = told
        assert "a replica without rows makes fewer of them" in only
    for rank, (_, sites, told) in enumerate(four.run(with_fuel, 40, 0)):
        assert sites == [[(False, "fuel")] * (2 if rank >= 2 else 4)]
        assert not told


def cached(rank, world_size, folders, width):
    from torch._dynamo.utils import counters

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folders[rank]
    counters.clear()
    return *blocks(rank, world_size, "inductor", width), counters["aot_autograd"]["autograd_cache_hit"]


@pytest.mark.slow
def test_a_warm_rank_and_a_cold_rank_refuse_the_same(tmp_path):
    """The caches hold the graph with the op and the one without it, and must not take one for the other."""
    for cold in range(2):
        folders = [str(tmp_path / "warm"), str(tmp_path / f"cold{cold}")]
        with RankPool(2) as pool:
            answers = pool.run(cached, folders, 16)
        for same, sites, told, _ in answers:
            assert same
            assert sites == [REFUSED]
            assert len(told) == 1
        # Of Inductor alone, with the op, and without it.
        assert [hits for *_, hits in answers] == [3 * cold, 0], "only rank 0 of the second run is warm"


def test_ranks_whose_graphs_are_equal_do_not_take_what_is_right_on_the_other(pool, tmp_path):
    folders = [str(tmp_path / name) for name in "ab"]
    for given, hit in ((folders, 0), (folders[::-1], 1)):  # what Inductor alone compiled they do share
        for same, sites, _, hits in pool.run(cached, given, 88):
            assert same
            assert sites == [REFUSED]
            assert hits == hit


def late(rank, world_size, width):
    """Rank 1 fuses nothing, and rank 0 answers too late for its compile. When it compiles again it finds the answer."""
    import tpfuse
    from tpfuse.parallel import comparison

    marker = comparison.compat.default_store()
    if rank == 0:
        marker.wait([f"late/{width}"])
    options = ALL if rank == 0 else {**ALL, "tpfuse.policy": "off"}

    def step(x, residual, tag="a"):
        return norm(residual + (total(x, world()) if tag == "a" else total(x + 0, world())))

    def compiled(tag):
        torch._dynamo.reset()
        tpfuse.clear_reports()
        x, residual = inputs(rank, 4, width)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(comparison, "SECONDS_OF_NOTHING_FUSED", 0.5)
            torch.compile(step, backend=without_a_call(options), fullgraph=True)(x, residual, tag)
        return [(site.fused, site.reason) for report in tpfuse.reports() for site in report.sites]

    first = compiled("a")
    marker.set(f"late/{width}", "now")
    if rank == 1:
        marker.wait([f"late/{width}/answered"])
    started = time.monotonic()
    second = compiled("b") if rank == 1 else None
    marker.set(f"late/{width}/answered", "now")
    return first, second, time.monotonic() - started


def without_a_call(options):
    """The backend, but what it compiles is not called: it would wait for the other rank in the sum."""
    import tpfuse.backend

    def backend(gm, given):
        tpfuse.backend.tpfuse(gm, given, options=options)
        return lambda *args: tuple(torch.empty(node.meta["example_value"].shape) for node in outputs(gm))

    return backend


def outputs(gm):
    return next(node for node in gm.graph.nodes if node.op == "output").args[0]


def test_a_rank_that_did_not_wait_learns_of_the_disagreement_later(pool):
    (first, _, _), (kept, later, seconds) = pool.run(late, 64)
    assert first == REFUSED
    assert kept == [(False, "policy")]
    assert later == REFUSED
    assert seconds < 20
