"""Ranks that compile two graphs ahead of any call, in another order: each is compared with the other one."""

from __future__ import annotations

import warnings

import pytest
import torch
from ranks import RankPool
from test_ranks_disagree import ALL, REFUSED, first_block, inputs, norm, total, without_a_call, world

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


def other_block(group):
    """As :func:`first_block`, but each rank keeps the last rows: only rank 1 can prove that they are its own."""
    c10d = torch.ops._c10d_functional

    def step(x, residual):
        everyone = c10d.wait_tensor(c10d.all_gather_into_tensor(x, 2, group))
        rows = total(everyone.sigmoid(), group)[x.shape[0] :]
        return norm(rows + residual)

    return step


def ahead(rank, world_size, orders, width):
    """Compile two graphs in this rank's order, before either runs: what was fused of each, or the error."""
    import tpfuse

    blocks = {"first": first_block, "last": other_block}
    found = {}
    for name in orders[rank]:
        torch._dynamo.reset()
        tpfuse.clear_reports()
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.compile(blocks[name](world()), backend=without_a_call({"tpfuse.inner": "aot_eager"}))(
                    *inputs(rank, 4, width)
                )
        except Exception as error:
            found[name] = str(error)
            continue
        (report,) = tpfuse.reports()
        found[name] = [(site.fused, site.reason) for site in report.sites]
    return found


def test_two_graphs_that_are_compared_crosswise_are_an_error(pool):
    """Rank 0 fuses the first graph and rank 1 the last one, each the one that it compiles first: the entries are equal."""
    for found in pool.run(ahead, (("first", "last"), ("last", "first")), 96, timeout=200):
        (agreed,) = [what for what in found.values() if isinstance(what, list)]
        (error,) = [what for what in found.values() if isinstance(what, str)]
        assert agreed == [(True, None)]
        assert "rank 1 decided differently from rank 0 about one graph, and compared it with another one" in error
        assert "Compile in one order on all ranks" in error


def test_two_graphs_in_one_order_are_refused_each(pool):
    for found in pool.run(ahead, (("first", "last"), ("first", "last")), 104, timeout=200):
        assert found == {"first": REFUSED, "last": REFUSED}


def options_of_two(rank, world_size, orders, width):
    """Two graphs of one structure that all ranks decide alike, one fused and one not, compiled in this rank's order."""
    import tpfuse

    def fuses(x, residual):
        return norm(residual + total(x, world()))

    def keeps(x, residual):
        y = total(x, world())
        return norm(residual + y) + y.exp()

    fused, told = {}, []
    for name in orders[rank]:
        torch._dynamo.reset()
        tpfuse.clear_reports()
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.compile({"fuses": fuses, "keeps": keeps}[name], backend=without_a_call(ALL))(*inputs(rank, 4, width))
        told += [str(w.message) for w in caught if "decided differently" in str(w.message)]
        (report,) = tpfuse.reports()
        fused[name] = len(report.fused)
    return fused, told


def test_graphs_that_differ_and_are_compared_with_each_other_stay_unfused_and_the_order_is_named(pool):
    for fused, told in pool.run(options_of_two, (("fuses", "keeps"), ("keeps", "fuses")), 112, timeout=200):
        assert fused == {"fuses": 0, "keeps": 0}
        assert (
            told and "these are of other lines, so they may be two graphs: compile in one order on all ranks" in told[0]
        )


def test_two_graphs_with_two_decisions_in_one_order_are_what_they_are(pool):
    for fused, told in pool.run(options_of_two, (("fuses", "keeps"),) * 2, 120, timeout=200):
        assert (fused, told) == ({"fuses": 1, "keeps": 0}, [])


def decided(*entries):
    """Check entries one after the other: of each, rank -> (lines, effect)."""
    from tpfuse.parallel import crossed

    known: crossed.Decided = {}
    for entry in entries:
        crossed.check(known, {rank: {"lines": lines, "effect": effect} for rank, (lines, effect) in entry.items()})


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param([{0: ("a", 1), 1: ("a", 1)}, {0: ("a", 2), 1: ("a", 2)}], id="one graph with two shapes"),
        pytest.param([{0: ("a", 1), 1: ("b", 1)}, {0: ("b", 1), 1: ("a", 1)}], id="another order, decided alike"),
        pytest.param([{0: ("a", 1), 1: ("b", 1)}, {0: ("a", 2), 1: ("b", 2)}], id="lines for one rank"),
        pytest.param([{0: ("a", 1), 1: ("b", 1)}, {0: ("a", 2), 1: ("a", 2)}, {0: ("b", 1), 1: ("b", 1)}], id="later"),
    ],
)
def test_ranks_that_decided_alike_about_some_compile_of_the_lines_are_fine(entries):
    decided(*entries)


def test_lines_with_no_common_decision_name_the_ranks():
    from tpfuse.parallel.decision import AgreementError

    with pytest.raises(AgreementError, match="ranks 1, 2 decided differently from rank 0") as caught:
        decided({0: ("a", 1), 1: ("b", 1), 2: ("b", 1)}, {0: ("b", 2), 1: ("a", 2), 2: ("a", 2)})
    assert caught.value.ranks == (1, 2)


def test_an_entry_without_lines_says_nothing():
    from tpfuse.parallel import crossed

    crossed.check({}, {0: {"effect": 1}, 1: {"effect": 1}})
