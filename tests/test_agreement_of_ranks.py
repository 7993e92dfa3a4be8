"""Each graph is compared once, before anything of it runs. A rank that does not come is named within a limit; nothing hangs.

What becomes of ranks that decide differently: test_ranks_disagree.py.
"""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import layers
import pytest
import torch
import torch.distributed as dist
from browser import sample
from ranks import RankPool, run_ranks

OPTIONS = {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all"}


def compiled(rank, world_size, options_of_rank, calls=((1, 5),), environment_of_rank=({}, {})):
    """What rank ``rank`` saw: the seconds of the first call and the error's text, or the number of fused sites of each graph."""
    import tpfuse

    torch._dynamo.reset()
    tpfuse.clear_reports()
    os.environ.update(environment_of_rank[rank])
    started, before = time.perf_counter(), compared_so_far()
    model = layers.Decoder(1)
    try:
        step = torch.compile(model, backend="tpfuse", options=options_of_rank[rank])
        with torch.inference_mode():
            for rows, columns in calls:
                step(layers.tokens(rows, columns))
    except Exception as error:
        return time.perf_counter() - started, f"{type(error).__name__}: {error}"
    finally:
        for name in environment_of_rank[rank]:
            del os.environ[name]
    return [len(r.fused) for r in tpfuse.reports()], compared_so_far() - before


def compared_so_far():
    from tpfuse.parallel import comparison

    return comparison._histories().setdefault((0, 1), comparison._History()).number


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


pytestmark = pytest.mark.ranks


def test_equal_ranks_compare_once_and_other_rows_compare_nothing(pool):
    first, second = pool.run(compiled, (OPTIONS, OPTIONS), ((1, 5), (2, 5)))
    assert first == second
    fused, compared = first
    assert len(fused) >= 2 and set(fused) == {2}
    assert compared == 1


def test_two_sums_that_are_one_reduction_on_all_ranks(pool):
    assert pool.run(with_two_sums) == [[2], [2]]


@torch.no_grad()
def with_two_sums(rank, world_size):
    import torch.distributed._functional_collectives as funcol

    import tpfuse

    def block(a, b, r):
        h = r + (funcol.all_reduce(a, "sum", [0, 1]) + funcol.all_reduce(b, "sum", [0, 1]))
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)

    torch._dynamo.reset()
    tpfuse.clear_reports()
    torch.compile(block, backend="tpfuse", options={**OPTIONS, "tpfuse.numerics": "relaxed"})(*torch.ones(3, 2, 24))
    return [len(r.fused) for r in tpfuse.reports()]


def test_a_rank_that_never_compiles_is_named_within_the_limit():
    first, second = run_ranks(one_rank_only, 2)
    assert (
        "rank 1 of [0, 1] compiled no graph like this one, and did not compile it within 2 s (TPFUSE_AGREEMENT_SECONDS)"
        in first
    )
    assert second == "nothing"


def one_rank_only(rank, world_size):
    if rank == 1:
        return "nothing"
    limit = {"TPFUSE_AGREEMENT_SECONDS": "2"}
    return compiled(rank, world_size, (OPTIONS, OPTIONS), environment_of_rank=(limit, limit))[1]


def test_a_rank_that_changes_its_mind_about_a_graph_is_told():
    """The other rank has nothing new to compare, so it cannot know; this one must not go on alone."""
    first, second = run_ranks(changes_its_mind, 2)
    assert first == "fine"
    assert "rank 0 of [0, 1] decided otherwise about it before" in second, second


def changes_its_mind(rank, world_size):
    fused = compiled(rank, world_size, (OPTIONS, OPTIONS))
    if rank == 0:
        return "fine" if fused[0] == [2] else str(fused)
    limits = ({}, {"TPFUSE_AGREEMENT_SECONDS": "1"})
    off = {**OPTIONS, "tpfuse.policy": "off"}
    return compiled(rank, world_size, (off, off), environment_of_rank=limits)[1]


def test_each_of_two_decisions_was_agreed_on_before_and_ranks_take_one_each():
    """The rank whose decision is not that of the last time compares, and is told that the other one does not."""
    first, second = run_ranks(one_of_two_decisions_each, 2)
    assert "AgreementError" in first and "rank 1 of [0, 1] decided otherwise about it before" in first, first
    assert second == "fine", second


def one_of_two_decisions_each(rank, world_size):
    import tpfuse
    from tpfuse.parallel.comparison import agree_on

    compiled(rank, world_size, (OPTIONS, OPTIONS))
    (fused,) = tpfuse.reports()
    other = replace(fused, sites=[replace(site, eps=0.5) for site in fused.sites])
    os.environ["TPFUSE_AGREEMENT_SECONDS"] = "1"
    for report in (fused, other):
        agree_on([report])
    try:
        agree_on([fused if rank == 0 else other])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def graphs_of(width):
    """Reports of a graph over both ranks: with one eps, with another, and with the first for other sizes."""
    (site,) = sample.report(layers=1).fused[:1]
    made = replace(sample.report(layers=1), sites=[replace(site, group=(0, 1), over=(), shape=(1, 5, width))])
    changed = ({}, {"eps": 0.5}, {"shape": (2, 5, width)})
    return [replace(made, sites=[replace(site, **change) for site in made.sites]) for change in changed]


def told(report, share=0.0):
    """Seconds until a rank has compared, and the error."""
    from tpfuse.parallel import comparison

    started, error = time.perf_counter(), ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "SECONDS_AFTER_A_NOTE", 0.5)
        patch.setattr(comparison, "SHARE_AFTER_A_NOTE", share)
        try:
            comparison.agree_on([report])
        except comparison.AgreementError as raised:
            error = str(raised)
    return time.perf_counter() - started, error


def keeps_to_it(rank, world_size):
    """The second time rank 1 decides otherwise. In between rank 0 compiles for other sizes, which is another graph."""
    from tpfuse.parallel import comparison

    one, other, wider = graphs_of(40)
    answers = [told(report) for report in ([one, wider, one] if rank == 0 else [one, other])]
    assert all(error == "" for _, error in answers[:-1]), answers
    if rank == 0:  # the comparison that rank 1 was alone in counts for both, so that later tests compare the same ones
        comparison._histories()[(0, 1)].number += 1
    return answers[-1]


def test_a_rank_that_was_seen_to_keep_to_its_decision_is_not_waited_for(pool):
    first, (seconds, error) = pool.run(keeps_to_it)
    assert first[1] == ""
    assert "rank 0 of [0, 1] decided otherwise about it before, and kept to that when compiling the same lines" in error
    assert seconds < 60, "the limit is 600 s"


def is_slow(rank, world_size):
    """Rank 0 compiles the graph of the first decision once more, and comes late to that of the second, as its limit allows."""
    one, other, _ = graphs_of(64)
    answers = [told(one), *([told(one)] if rank == 0 else [])]
    if rank == 0:
        time.sleep(3)
    return [error for _, error in (*answers, told(other, share=0.05))]


def test_who_waits_longer_for_slow_ranks_waits_longer_here_too(pool):
    """5 % of 600 s are 30 s: the rank that comes after 3 s, with a note too many, is waited for."""
    assert pool.run(is_slow) == [["", "", ""], ["", ""]]


def comes_later(rank, world_size):
    one, other, _ = graphs_of(48)
    answers = [told(one)]
    if rank == 0:
        time.sleep(2)
    return [error for _, error in (*answers, told(one), told(other))]


def test_a_note_about_another_compile_changes_nothing(pool):
    """Rank 0 is slow: it compiles the graph of the first decision once more, as rank 1 has done, and then that of the second."""
    assert pool.run(comes_later) == [["", "", ""]] * 2


def three_eps(width):
    """The same graph over three ranks with three eps."""
    report = graphs_of(width)[0]
    sites = [replace(site, group=(0, 1, 2)) for site in report.sites]
    return [replace(report, sites=[replace(site, eps=eps) for site in sites]) for eps in (0.25, 0.5, 1.0)]


@pytest.mark.parametrize("third", ["keeps to it", "does not come"])
def test_two_that_change_their_mind_in_two_ways_do_not_go_on_without_the_third(monkeypatch, third):
    """They would refuse the graph, of which a rank that keeps to what was agreed on hears nothing and waits for theirs."""
    from tpfuse import compat
    from tpfuse.parallel import comparison

    agreed, first, second = three_eps(56)
    store, who = dist.HashStore(), threading.local()
    histories = [{(0, 1, 2): comparison._History()} for _ in range(3)]
    monkeypatch.setattr(compat, "default_store", lambda: store)
    monkeypatch.setattr(dist, "get_rank", lambda: who.rank)
    monkeypatch.setattr(comparison, "_histories", lambda: histories[who.rank])

    def compare(rank, report):
        who.rank = rank
        try:
            return report and comparison._compare((0, 1, 2), report, "")
        except comparison.AgreementError as error:
            return str(error)

    with ThreadPoolExecutor(3) as ranks:
        monkeypatch.setenv("TPFUSE_AGREEMENT_SECONDS", "60")
        assert list(ranks.map(compare, range(3), [agreed] * 3)) == [None] * 3
        monkeypatch.setenv("TPFUSE_AGREEMENT_SECONDS", "1")
        again = agreed if third == "keeps to it" else None
        *told, kept = ranks.map(compare, range(3), [first, second, again])
    assert kept is None
    for error in told:
        assert "rank 2 of [0, 1, 2] decided otherwise about it before" in str(error)


def test_an_eps_that_differs_is_named():
    """The op with another eps is another op, also where everything else is equal."""
    from tpfuse.parallel.decision import decision_of, first_difference, read, without_ranks

    one, other = ([decision_of(0, report.sites[0])] for report in graphs_of(72)[:2])
    assert without_ranks(one[0]) != without_ranks(other[0])
    assert "(eps 0.5) fused over [0, 1]" in first_difference(one, other, 0, 1)
    assert read(json.loads(json.dumps(vars(other[0])))) == other[0]


@pytest.mark.slow
def test_a_warm_rank_and_a_cold_rank_agree(tmp_path):
    options = {"tpfuse.policy": "all"}
    for number in range(2):
        # The caches of rank 0 stay, rank 1 gets new ones.
        caches = {rank: str(tmp_path / (f"warm{rank}" if rank == 0 else f"cold{number}")) for rank in range(2)}
        with RankPool(2) as pool:
            first, second = pool.run(with_caches, caches, options)
        assert first[0] == second[0] == [2]
        assert (first[1], second[1]) == (number == 1, False), "only rank 0 of the second run is warm"


def with_caches(rank, world_size, caches, options):
    import tpfuse

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches[rank]
    fused, _ = compiled(rank, world_size, (options, options))
    return fused, tpfuse.reports()[-1].from_cache
