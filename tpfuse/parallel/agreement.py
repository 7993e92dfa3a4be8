"""Do all ranks of a group see the same reductions and decide alike? Asked by hand, about all graphs so far, of any group.

Ranks that disagree can hang inside a collective, which names nobody. Here each rank leaves its decisions in the store of
the default group and reads the others' with a time limit: no collective, so nobody waits for a rank that does not come.

The backend asks the same of every graph that it has compiled, before anything of it runs: :mod:`.comparison`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from tpfuse import compat
from tpfuse.passes.report import GraphReport

from .decision import AgreementError, Decision, decision_of, first_difference, ranks_in_words, read, without_ranks

_rounds: dict[tuple[int, ...], int] = {}


def check_agreement(
    reports: Sequence[GraphReport], group: dist.ProcessGroup | None = None, timeout: float = 60.0
) -> int:
    """Raise unless all ranks of the group found the same all-reduces with the same decisions.

    Every rank of the group calls it equally often, after compiling and before it relies on the graphs. Ranks that hold
    different rows compile different graphs when one has none, so compare over ``attn_tp``, whose ranks hold the same rows.

    Args:
        reports: ``tpfuse.reports()`` of this rank.
        group: the ranks to compare; None means the default group.
        timeout: seconds to wait for the others' decisions.
    Returns:
        The number of all-reduces that were compared.
    Raises:
        AgreementError: on every rank, naming the ranks that differ and the first difference, or the ranks that did not report.
        ValueError: no process group, or this rank is not in the group.
    """
    if not dist.is_initialized():
        raise ValueError("check_agreement needs a process group; call torch.distributed.init_process_group first")
    if dist.get_rank(group) < 0:
        raise ValueError(f"global rank {dist.get_rank()} is not in the group; call check_agreement on its members only")
    members = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
    mine = [decision_of(number, site) for number, report in enumerate(reports) for site in report.sites]
    everyone = _exchange(mine, members, timeout)
    _compare_decisions(everyone)
    _compare_groups(everyone)
    return len(mine)


def _exchange(mine: list[Decision], members: tuple[int, ...], timeout: float) -> dict[int, list[Decision]]:
    """Every member's decisions, through the default group's store."""
    store = compat.default_store()
    number = _rounds.get(members, 0)
    _rounds[members] = number + 1
    prefix = f"tpfuse/agreement/{','.join(map(str, members))}/{number}"
    store.set(f"{prefix}/{dist.get_rank()}", json.dumps([vars(decision) for decision in mine]))
    found: dict[int, list[Decision]] = {}
    missing: list[int] = []
    for rank in members:
        try:
            store.wait([f"{prefix}/{rank}"], timedelta(seconds=timeout if not missing else 0.1))
        except Exception:  # a store raises RuntimeError or DistStoreError by version and kind
            missing.append(rank)
            continue
        found[rank] = [read(data) for data in json.loads(store.get(f"{prefix}/{rank}"))]
    if missing:
        raise AgreementError(
            f"no decisions from {ranks_in_words(missing)} of {list(members)} within {timeout:g} s; every rank of the group must "
            "call check_agreement",
            missing,
        )
    return found


def _compare_decisions(everyone: dict[int, list[Decision]]) -> None:
    """Group the ranks by what they decided; the largest party is taken as right, of equals the one with the lowest rank."""
    parties: dict[tuple[Any, ...], list[int]] = {}
    for rank, decisions in everyone.items():
        parties.setdefault(tuple(without_ranks(d) for d in decisions), []).append(rank)
    if len(parties) == 1:
        return
    ordered = sorted(parties.values(), key=lambda ranks: (-len(ranks), ranks))
    others = sorted(rank for ranks in ordered[1:] for rank in ranks)
    right, wrong = ordered[0][0], others[0]
    raise AgreementError(
        f"{ranks_in_words(others)} decided differently from {ranks_in_words(ordered[0])}. "
        f"{first_difference(everyone[right], everyone[wrong], right, wrong)}. Compile with the same options, versions and "
        "shapes on all ranks",
        others,
    )


def _compare_groups(everyone: dict[int, list[Decision]]) -> None:
    """A reduction over some ranks must be the same reduction on each of them."""
    for rank, decisions in everyone.items():
        for number, decision in enumerate(decisions):
            for peer in decision.ranks:
                theirs = everyone[peer][number].ranks if peer in everyone else decision.ranks
                if theirs != decision.ranks:
                    raise AgreementError(
                        f"{ranks_in_words([rank, peer])} reduce all-reduce {number} over different ranks: {decision} on rank "
                        f"{rank}, over {list(theirs)} on rank {peer}",
                        [rank, peer],
                    )
