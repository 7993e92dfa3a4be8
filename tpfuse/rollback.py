"""Compile a graph again without the ops that their ranks disagree about.

Such a graph is legal, and without those ops it waits for nobody: the model's own collectives stand in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tpfuse import store, unfused
from tpfuse.inspect import dump
from tpfuse.parallel.decision import AgreementError
from tpfuse.parallel.disagreement import Disagreement, Ranks, explained, without
from tpfuse.passes.report import GraphReport, Site

Compile = Callable[[dict[Ranks, str]], tuple[Callable[..., Any], list[GraphReport]]]


def roll_back(
    compiled: Callable[..., Any],
    reports: Sequence[GraphReport],
    refused: Mapping[Ranks, Disagreement],
    again: Compile,
) -> tuple[Callable[..., Any], list[GraphReport]]:
    """What runs in the place of a compiled graph about which ranks disagree, and its reports. Warns.

    Args:
        compiled, reports: of the first compile.
        refused: the groups whose ranks disagree.
        again: compiles without the ops of these groups, each with what was different.
    Raises:
        AgreementError: the second compile decided otherwise about what nobody disagreed about, so that other ranks would wait.
    """
    tell(refused)
    first = list(reports)
    expected = [without(report, refused) for report in first]
    if [_fused(report) for report in first] == [_fused(report) for report in expected]:
        new = first  # what others fused was never fused here
    else:
        store.remove(first)
        for report in first:
            dump.remove(report)
        compiled, new = again({ranks: found.text for ranks, found in refused.items()})
        _check(new, expected, refused)
    for number, (report, before) in enumerate(zip(new, first, strict=True)):
        report.sites = explained(report, before, refused, number)
        dump.correct(report)
    return compiled, new


def tell(refused: Mapping[Ranks, Disagreement]) -> None:
    """One warning for all groups of a graph, and one only for a graph that is compiled for several shapes."""
    where = " and ".join(str(list(ranks)) for ranks in refused)
    texts = dict.fromkeys(found.text for found in refused.values())
    message = (
        f"{'; '.join(texts)}. So no op over {where} is fused in this graph or in one with the same reductions: ranks that "
        "run different ops would wait for each other. Compile with the same options and versions on all ranks; "
        "tpfuse.reports() has these all-reduces with the reason ranks-disagree"
    )
    unfused.tell(f"ranks-disagree {message}", message)


def _check(new: Sequence[GraphReport], expected: Sequence[GraphReport], refused: Mapping[Ranks, Disagreement]) -> None:
    made, wanted = ([_fused(report) for report in reports] for reports in (new, expected))
    if made == wanted:
        return
    ranks = sorted({rank for group in refused for rank in group})
    raise AgreementError(
        f"the graph was compiled again because ranks {ranks} disagree about it, and this rank then decided otherwise about "
        f"other all-reduces as well: {_first(made, wanted)}. Other ranks know nothing of that and would wait. Compile with the "
        "same options and versions on all ranks, or with tpfuse.policy='off'",
        ranks,
    )


def _fused(report: GraphReport) -> list[tuple[Any, ...] | None]:
    """What other ranks rely on: the op of each site, or None."""
    return [_op(site) if site.fused else None for site in report.sites]


def _op(site: Site) -> tuple[Any, ...]:
    return site.callers, site.pattern, site.flavour, site.eps, site.lowered, site.quantizer


def _first(made: Sequence[Sequence[Any]], wanted: Sequence[Sequence[Any]]) -> str:
    for one, two in zip(made, wanted, strict=False):
        for number, (now, before) in enumerate(zip(one, two, strict=False)):
            if now != before:
                return f"all-reduce {number} is now {now or 'kept'}, and was {before or 'kept'}"
    return (
        f"{sum(map(len, made))} all-reduces in {len(made)} graphs instead of {sum(map(len, wanted))} in {len(wanted)}"
    )
