"""What ranks disagree about is left out of a graph, and every other decision stays: other ranks keep theirs.

Traced on one rank of a fake group of four. A graph is fused, then fused again with the ops of some groups refused, and compared
with what the roll-back expects of that, site by site.
"""

from __future__ import annotations

import itertools

import graphs
import pytest
import torch
import torch.distributed as dist
from test_replicas import Groups, args, filled, layer
from test_rows import c10d, norm
from tpfuse.passes import PassOptions

import tpfuse
from tpfuse import rollback, store, unfused
from tpfuse.parallel import comparison
from tpfuse.parallel.disagreement import Disagreement, explained, without

WORLD, BLOCK, COLUMN = (0, 1, 2, 3), (2, 3), (1, 3)
WHY = "rank 1 decided differently from rank 0 about one graph: here"


@pytest.fixture(scope="module")
def groups():
    graphs.start_fake_group(4, 3)
    yield Groups()
    dist.destroy_process_group()


def total(x, group):
    return c10d.wait_tensor(c10d.all_reduce(x, "sum", group))


def chain(groups):
    """Sums over several groups, each in the residual of the next; the norm of one is what the next sums."""

    def f(x, r, w, e):
        for group in (groups.block, groups.column, groups.world, groups.block, groups.world):
            r = r + total(x, group)
            x = norm(r, w) @ e
        return x, r

    return f


def two_sums(groups):
    """Two sums over the block in one op, in front of one over all ranks that takes another sum as its addend."""

    def f(x, r, w, e):
        r = r + (total(x, groups.block) + total(x @ e, groups.block))
        x = norm(r, w)
        r = r + (total(x, groups.column) + total(x @ e, groups.world))
        return norm(r, w), r

    return f


def two_sums_and_a_gather(groups):
    """Relaxed, the op of the replicas makes two sums in one reduction; the second site belongs to it."""

    def f(x, r, w, e):
        h = r + (total(x, groups.block) + total(x @ e, groups.block))
        rows = c10d.wait_tensor(c10d.all_gather_into_tensor(filled(norm(h, w)), 2, groups.column))
        out = total(torch.nn.functional.silu(rows @ e), groups.world)
        return norm(out, w), h

    return f


PROGRAMS = {
    "chain": (chain, PassOptions(policy="all"), 5),
    "fuel": (chain, PassOptions(policy="all", fuel=3), 3),
    "shared": (chain, PassOptions(), 5),
    "two sums": (two_sums, PassOptions(policy="all"), 3),
    "replicas": (layer, PassOptions(policy="all"), 1),
    "relaxed": (two_sums_and_a_gather, PassOptions(policy="all", numerics="relaxed"), 3),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_others_stay_as_they_were_decided(groups, name):
    program, options, count = PROGRAMS[name]
    traced = graphs.trace(program(groups), args(3))
    _, first = graphs.fused_copy(traced, options)
    assert len(first.fused) == count, first
    lists = [ranks for n in (1, 2, 3) for ranks in itertools.combinations((WORLD, BLOCK, COLUMN), n)]
    some = 0
    for chosen in lists:
        refused = {ranks: Disagreement((1,), f"{WHY} {ranks}", (False,) * 9) for ranks in chosen}
        new, report = graphs.fused_copy(
            traced, PassOptions(**{**vars(options), "refused": {r: d.text for r, d in refused.items()}})
        )
        new.graph.lint()
        expected = without(first, refused)
        rollback._check([report], [expected], refused)
        assert [site.reason for site in explained(report, first, refused)] == [s.reason for s in expected.sites]
        for site, before in zip(explained(report, first, refused), first.sites, strict=True):
            if before.fused and not site.fused:
                assert (site.reason, site.callers) == ("ranks-disagree", before.callers)
                assert site.detail == f"{WHY} {before.callers}"
                some += 1
    assert some


def test_what_is_left_out_computes_what_it_did(groups):
    traced = graphs.trace(chain(groups), args(3, torch.float32))
    given = args(3, torch.float32)
    wanted = graphs.run(traced, *given)
    for ranks in (WORLD, BLOCK, COLUMN):
        new, report = graphs.fused_copy(traced, PassOptions(policy="all", refused={ranks: WHY}))
        assert graphs.all_reduces_left(new) == len(report.kept) == sum(site.group == ranks for site in report.sites)
        assert graphs.equal(graphs.run(new, *given), wanted)


def test_a_second_compile_that_decides_otherwise_is_an_error(groups):
    """It cannot be told to the ranks of other groups, which would wait."""
    traced = graphs.trace(chain(groups), args(3))
    _, first = graphs.fused_copy(traced, PassOptions(policy="all"))
    _, other = graphs.fused_copy(traced, PassOptions(policy="off"))
    refused = {WORLD: Disagreement((1,), WHY, (True, True))}
    with pytest.raises(rollback.AgreementError, match="all-reduce 0 is now kept, and was") as error:
        rollback.roll_back(len, [first], refused, lambda _: (len, [other]))
    assert error.value.ranks == WORLD
    with pytest.raises(rollback.AgreementError, match="0 all-reduces in 0 graphs instead of 5 in 1"):
        rollback.roll_back(len, [first], refused, lambda _: (len, []))


def test_it_has_cost_its_fuel(groups):
    """On ranks outside of the group it is fused and costs the same."""
    store.clear_reports()
    _, report = graphs.fused_copy(graphs.trace(chain(groups), args(3)), PassOptions(policy="all", refused={WORLD: WHY}))
    assert len(report.fused) == 3
    store.add(report)
    assert store.fuel_left(7) == 2
    store.clear_reports()


def test_the_report_reads_back_equal(groups):
    _, report = graphs.fused_copy(graphs.trace(layer(groups), args(3)), PassOptions(policy="all", refused={WORLD: WHY}))
    assert (report.sites[0].reason, report.sites[0].over) == ("ranks-disagree", WORLD)
    assert type(report).from_json(report.to_json()) == report


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_region_that_torch_traces_once_is_traced_again(groups, monkeypatch, inner):
    """torch keeps the graph of such a region with the compile of a frame, and the first compile has fused in it."""

    @torch.compiler.nested_compile_region
    def region(x, r):
        r = total(x, groups.world) + r
        return norm(r, w), r

    w, (x, r) = torch.ones(16), (torch.randn(4, 16), torch.randn(4, 16))

    def f(x, r):
        return region(*region(x, r))

    def refused(reports, *_):
        return {WORLD: Disagreement((1,), WHY, (True,))}

    monkeypatch.setattr(comparison, "has_peers", lambda: True)
    monkeypatch.setattr(comparison, "compare", refused)
    torch._dynamo.reset()
    store.clear_reports()
    unfused.forget()
    with torch.no_grad(), pytest.warns(tpfuse.FusionWarning, match="decided differently"):
        got = torch.compile(f, backend="tpfuse", options={"tpfuse.inner": inner, "tpfuse.policy": "all"})(x, r)
    assert [site.reason for report in store.reports() for site in report.sites] == ["ranks-disagree"]
    torch.testing.assert_close(got, f(x, r))
