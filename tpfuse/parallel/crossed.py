"""Did ranks compare two graphs with each other, each of them a graph that the other one compiles at another time?

Entry k of a group is the k-th graph of each rank. Ranks that compile two graphs of one structure in another order, ahead of any
call, find the first of one rank beside the second of the other. Where these happen to be decided alike, and the two others as
well, all agree, and about each graph the ranks differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .decision import AgreementError, ranks_in_words

# rank -> the lines of a graph -> the effects with which the rank has agreed about graphs of these lines.
Decided = dict[int, dict[str, set[str]]]


def check(decided: Decided, found: Mapping[int, Mapping[str, Any]]) -> None:
    """Add what ranks have just agreed on.

    One graph may have several effects, one for each shape say, but then it has them on every rank. Lines that two ranks know, and
    have never agreed about with one effect, are of a graph about which they differ. Lines that one rank alone knows say nothing:
    code may be written for one rank.

    Args:
        decided: so far; equal on all ranks.
        found: the entries of all ranks, see :mod:`.comparison`; those of another version of tpfuse may lack the lines.
    Raises:
        AgreementError: on every rank: what was agreed on before may be running and cannot be taken back.
    """
    for rank, entry in found.items():
        if "lines" in entry:
            decided.setdefault(rank, {}).setdefault(entry["lines"], set()).add(entry["effect"])
    for lines in {entry["lines"] for entry in found.values() if "lines" in entry}:
        known = {rank: graphs[lines] for rank, graphs in sorted(decided.items()) if lines in graphs}
        first = next(iter(known))
        others = [rank for rank, effects in known.items() if not effects & known[first]]
        if others:
            raise AgreementError(
                f"{ranks_in_words(others)} decided differently from rank {first} about one graph, and compared it with another "
                "one: ranks compile graphs in another order. Compile in one order on all ranks, with the same options and "
                "versions",
                others,
            )
