"""How the ranks of a group differ about a graph, and what its report says when the ops in question are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tpfuse.passes import Reason
from tpfuse.passes.report import GraphReport, Site

from .decision import AgreementError, Decision, first_difference, ranks_in_words, read, without_ranks

Ranks = tuple[int, ...]
FUEL = (
    "tpfuse.fuel counts the rewrites of each rank, and a replica without rows makes fewer of them, so that it has fuel left "
    "where others have none; give every replica rows"
)


@dataclass(frozen=True)
class Disagreement:
    """How the ranks of a group differ about a graph.

    Attributes:
        ranks: the global ranks that are not of the largest party.
        text: one sentence about who decided what.
        fused: of each reduction over the group, in graph order, whether some rank fused it.
        graph: which one it is of those that were compiled together.
    """

    ranks: Ranks
    text: str
    fused: tuple[bool, ...]
    graph: int = 0

    def error(self) -> AgreementError:
        return AgreementError(
            f"{self.text}, and would wait for each other. Compile with the same options and versions on all ranks",
            self.ranks,
        )


def without(report: GraphReport, refused: Mapping[Ranks, Disagreement]) -> GraphReport:
    """The report of a graph when the ops of these groups are left out of it."""
    sites = [_kept(site, refused[site.callers]) if _is_in(site, refused) else site for site in report.sites]
    return replace(report, sites=sites)


def explained(
    report: GraphReport, first: GraphReport, refused: Mapping[Ranks, Disagreement], graph: int = 0
) -> list[Site]:
    """The sites of a graph, with what ranks disagree about as the reason of those that are fused on some rank.

    Args:
        report: of the graph as it runs.
        first: of the graph as it was compiled before anything was refused.
        graph: which one it is of those that were compiled together.
    """
    sites: list[Site] = []
    seen: Counter[Ranks] = Counter()
    for site, before in zip(report.sites, first.sites, strict=True):
        number, found = seen[site.group], refused.get(site.group)
        seen[site.group] += 1
        if _is_in(before, refused):
            sites.append(_kept(replace(site, over=before.over), refused[before.callers]))
        elif found is not None and found.graph == graph and not site.fused and found.fused[number]:
            detail = f"{found.text}. On this rank: {site.detail} ({site.reason})"
            sites.append(replace(_kept(site, found), detail=detail))
        else:
            sites.append(site)
    return sites


def _is_in(site: Site, refused: Mapping[Ranks, Disagreement]) -> bool:
    return site.fused and site.callers in refused


def _kept(site: Site, why: Disagreement) -> Site:
    return replace(
        site,
        fused=False,
        reason=Reason.RANKS_DISAGREE.value,
        detail=why.text,
        lowered=False,
        replaced_by=None,
        admitted=None,
        quantizer=None,
        note="",
    )


def _of_both(decisions: list[Decision], others: list[Decision], group: Ranks) -> tuple[list[Decision], list[Decision]]:
    """What two ranks of different replicas decided about reductions that both have: one without rows has fewer.

    Those over the whole group, where the difference is among them. Else those at the same places of the model.
    """
    shared = [[d for d in both if d.ranks == group] for both in (decisions, others)]
    if any(without_ranks(a) != without_ranks(b) for a, b in zip(*shared, strict=False)):
        return shared[0], shared[1]
    places = [{(d.role, d.layer) for d in both} for both in (others, decisions)]
    common = [[d for d in both if (d.role, d.layer) in p] for both, p in zip((decisions, others), places, strict=True)]
    return common[0], common[1]


def difference(found: Mapping[int, Mapping[str, Any]], group: Ranks) -> Disagreement:
    """The largest party is taken as right, of equals the one with the lowest rank.

    Args:
        found: what each rank of ``group`` has left for the others, see :mod:`.comparison`.
    """
    parties: dict[str, list[int]] = {}
    for rank, entry in found.items():
        parties.setdefault(entry["effect"], []).append(rank)
    ordered = sorted(parties.values(), key=lambda ranks: (-len(ranks), ranks))
    others = sorted(rank for ranks in ordered[1:] for rank in ranks)
    a, b = ordered[0][0], others[0]
    right, wrong = ([read(data) for data in found[rank]["decisions"]] for rank in (a, b))
    if len(right) != len(wrong):
        right, wrong = _of_both(right, wrong, group)
    said = [found[rank]["context"] for rank in (a, b)]
    why = f" ({said[0]} on rank {a}, {said[1]} on rank {b})" if said[0] != said[1] else ""
    if not why and any(decision.reason == Reason.FUEL.value for decision in (*right, *wrong)):
        why = f" ({FUEL})"
    if found[a].get("lines") != found[b].get("lines"):
        why += "; these are of other lines, so they may be two graphs: compile in one order on all ranks"
    text = f"{ranks_in_words(others)} decided differently from {ranks_in_words(ordered[0])} about one graph"
    return Disagreement(
        tuple(others),
        f"{text}: {first_difference(right, wrong, a, b)}{why}",
        tuple(any(flags) for flags in zip(*(entry["fused"] for entry in found.values()), strict=True)),
    )
