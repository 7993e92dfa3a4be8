"""Find sites on which ranks that reduce together disagree.

Ranks of one group must make the same decisions, for a fused and an unfused rank would wait for each other. Ranks that
never meet in a group (two pipeline stages) may differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tpfuse.passes.report import GraphReport, Site

from . import words


@dataclass(frozen=True)
class Difference:
    """A site that some ranks decided otherwise than most of their peers.

    Attributes:
        site: index in the report.
        ranks: the ranks in the minority.
        text: what they did and what the others did.
    """

    site: int
    ranks: tuple[int, ...]
    text: str


def differences(reports: Sequence[GraphReport]) -> list[Difference]:
    """Compare the reports of one graph on several ranks."""
    found = []
    for peers in _peers(reports):
        for index in range(max(len(report.sites) for report in peers)):
            decided = {r.rank: _decision(r.sites[index]) if index < len(r.sites) else _ABSENT for r in peers}
            usual, _ = Counter(decided.values()).most_common(1)[0]
            for other in dict.fromkeys(value for value in decided.values() if value != usual):
                ranks = tuple(rank for rank, value in decided.items() if value == other)
                name = "rank" if len(ranks) == 1 else "ranks"
                text = f"{name} {words.ranks(ranks)}: {_text(other, usual)}; the others: {_text(usual, other)}"
                found.append(Difference(index, ranks, text))
    return found


_Decision = tuple[str, ...]
_ABSENT: _Decision = ("no such all-reduce",)


def _decision(site: Site) -> _Decision:
    """What must be equal on all ranks of a group, most telling first."""
    return (
        words.verdict(site),
        words.title(site),
        words.shape(site),
        site.pattern,
        f"eps {site.eps}",
        f"flavour {site.flavour}",
        "lowered" if site.lowered else "not lowered",
        f"quantizer {site.quantizer}",
    )


def _text(one: _Decision, other: _Decision) -> str:
    """The first part in which two decisions differ; the rest mostly follows from it."""
    if _ABSENT in (one, other):
        return one[0]
    return next(mine for mine, theirs in zip(one, other, strict=True) if mine != theirs)


def _peers(reports: Sequence[GraphReport]) -> list[list[GraphReport]]:
    """Reports in sets of ranks that are connected through their groups, two or more to a set."""
    by_rank = {report.rank: report for report in reports}
    root = {rank: rank for rank in by_rank}

    def find(rank: int) -> int:
        while root[rank] != rank:
            rank = root[rank]
        return rank

    for report in reports:
        for site in report.sites:
            for rank in site.group:
                if rank in root:
                    root[find(rank)] = find(report.rank)
    sets: dict[int, list[GraphReport]] = {}
    for rank in sorted(by_rank):
        sets.setdefault(find(rank), []).append(by_rank[rank])
    return [peers for peers in sets.values() if len(peers) > 1]
