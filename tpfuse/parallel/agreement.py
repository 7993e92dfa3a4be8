"""Do all ranks of a group see the same reductions and decide alike?

Ranks that disagree can hang inside a collective, which names nobody. Here each rank leaves its decisions in the store of
the default group and reads the others' with a time limit: no collective, so nobody waits for a rank that does not come.

The backend compares every graph when it has compiled it (:func:`agree_on`), before anything of it runs; a call costs nothing.
:func:`check_agreement` is the same question asked by hand about all graphs so far, of any group.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from tpfuse import compat
from tpfuse.options import AGREEMENT_SECONDS
from tpfuse.passes.report import GraphReport, Site

# A rank that fuses nothing is in no danger of waiting inside a kernel, and its peers may have reasons not to compile at all.
SECONDS_OF_NOTHING_FUSED = 30.0

_rounds: dict[tuple[int, ...], int] = {}


class AgreementError(RuntimeError):
    """Ranks decided differently, or did not report in time. ``ranks`` has their global ranks."""

    def __init__(self, message: str, ranks: Sequence[int]):
        super().__init__(message)
        self.ranks = tuple(ranks)


@dataclass(frozen=True)
class Decision:
    """What a rank decided about one all-reduce, without anything that may differ between ranks, like names and shapes."""

    graph: int
    role: str
    layer: int | None
    pattern: str
    flavour: str | None
    fused: bool
    reason: str | None
    ranks: tuple[int, ...]
    lowered: bool = False
    quantizer: str | None = None
    over: tuple[int, ...] = ()

    def __str__(self) -> str:
        place = self.role if self.layer is None else f"{self.role} of layer {self.layer}"
        what = ("lowered" if self.lowered else "fused") if self.fused else f"kept ({self.reason})"
        return f"{place}: {self.pattern} {what} over {list(self.over or self.ranks)}"


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
    mine = [_decision(number, site) for number, report in enumerate(reports) for site in report.sites]
    everyone = _exchange(mine, members, timeout)
    _compare_decisions(everyone)
    _compare_groups(everyone)
    return len(mine)


def _decision(graph: int, site: Site) -> Decision:
    return Decision(
        graph,
        site.role,
        site.layer,
        site.pattern,
        site.flavour,
        site.fused,
        site.reason,
        tuple(site.group),
        site.lowered,
        site.quantizer,
        site.over,
    )


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
        found[rank] = [_read(data) for data in json.loads(store.get(f"{prefix}/{rank}"))]
    if missing:
        raise AgreementError(
            f"no decisions from {_ranks(missing)} of {list(members)} within {timeout:g} s; every rank of the group must call "
            "check_agreement",
            missing,
        )
    return found


def _read(data: dict[str, Any]) -> Decision:
    return Decision(**{**data, "ranks": tuple(data["ranks"]), "over": tuple(data["over"])})


def _compare_decisions(everyone: dict[int, list[Decision]]) -> None:
    """Group the ranks by what they decided; the largest party is taken as right, of equals the one with the lowest rank."""
    parties: dict[tuple[Any, ...], list[int]] = {}
    for rank, decisions in everyone.items():
        parties.setdefault(tuple(_without_ranks(d) for d in decisions), []).append(rank)
    if len(parties) == 1:
        return
    ordered = sorted(parties.values(), key=lambda ranks: (-len(ranks), ranks))
    others = sorted(rank for ranks in ordered[1:] for rank in ranks)
    right, wrong = ordered[0][0], others[0]
    raise AgreementError(
        f"{_ranks(others)} decided differently from {_ranks(ordered[0])}. "
        f"{_first_difference(everyone[right], everyone[wrong], right, wrong)}. Compile with the same options, versions and "
        "shapes on all ranks",
        others,
    )


def _without_ranks(decision: Decision) -> tuple[Any, ...]:
    return tuple(value for name, value in vars(decision).items() if name not in ("ranks", "over"))


def _first_difference(right: list[Decision], wrong: list[Decision], a: int, b: int) -> str:
    for number, (one, two) in enumerate(zip(right, wrong, strict=False)):
        if _without_ranks(one) != _without_ranks(two):
            return f"All-reduce {number} on rank {a}: {one}; on rank {b}: {two}"
    return f"Rank {a} found {len(right)} all-reduces, rank {b} found {len(wrong)}"


def _compare_groups(everyone: dict[int, list[Decision]]) -> None:
    """A reduction over some ranks must be the same reduction on each of them."""
    for rank, decisions in everyone.items():
        for number, decision in enumerate(decisions):
            for peer in decision.ranks:
                theirs = everyone[peer][number].ranks if peer in everyone else decision.ranks
                if theirs != decision.ranks:
                    raise AgreementError(
                        f"{_ranks([rank, peer])} reduce all-reduce {number} over different ranks: {decision} on rank {rank}, "
                        f"over {list(theirs)} on rank {peer}",
                        [rank, peer],
                    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


# -- one graph at a time, by the backend ------------------------------------------------------------------------------


@dataclass
class _Compared:
    """What the ranks of one group have compared so far, from this rank's point of view."""

    number: int = 0
    # (structure, context) -> the effect that was agreed on last
    agreed: dict[tuple[str, str], str] = field(default_factory=dict)
    given_up: bool = False


@dataclass
class _Session:
    """The comparisons over one store; another default group has another store and starts anew."""

    store: weakref.ref[Any]
    groups: dict[tuple[int, ...], _Compared] = field(default_factory=dict)


_session: _Session | None = None


def agree_on(reports: Sequence[GraphReport], context: str = "") -> None:
    """Compare what was just compiled with the other ranks of each group; called when a compile ends.

    Entry k of a group holds the k-th graph of each rank: its *structure* (dtype and hidden size of each all-reduce over the
    group, nothing about rows, names or paths) and its decisions. A graph with the decisions that were agreed on last for its
    structure and options, one compiled again for other rows say, is not compared again, so nobody waits for a rank that
    need not recompile.
    All of it comes from the report, which a compile cache supplies as well.

    Args:
        reports: of the graphs, in the order of compilation.
        context: what else may differ between ranks, for the error, e.g. the options.
    Raises:
        AgreementError: ranks decided differently about equal graphs, or a rank has not compiled the graph in time
            (``TPFUSE_AGREEMENT_SECONDS``, 600 s).
        ValueError: that variable is not a positive number.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if dist.get_backend() == "fake":
        return  # its other ranks do not exist
    for report in reports:
        groups = dict.fromkeys(site.group for site in report.sites if len(site.group) > 1)
        # The largest first: where one of many ranks differs all of them are told, and none waits for those that gave up.
        for group in sorted(groups, key=len, reverse=True):
            if dist.get_rank() in group and all(site.reason != "training" for site in report.sites):
                _agree(group, report, context)


def _agree(group: tuple[int, ...], report: GraphReport, context: str) -> None:
    """Compare what was decided about the reductions over a group, and about those over parts of it whose op is over all of it."""
    compared = _comparisons().setdefault(group, _Compared())
    sites = [site for site in report.sites if group in (site.group, site.over)]
    decisions = [_decision(0, site) for site in sites]
    own = [site.group == group for site in sites]
    structure = _digest(
        [(site.dtype, str(site.shape[-1]) if site.shape else "") for site, mine in zip(sites, own, strict=True) if mine]
    )
    effect = _digest(
        [
            # Of a part's reduction also between which of the group's own it stands. In a part of one row a vector, (1, H), is
            # another addend; the ops of both wait for the same.
            (
                *((d.pattern,) if own[n] else (d.pattern.replace("bias", "add"), "over all")),
                *(d.flavour, site.eps, d.lowered, d.quantizer),
            )
            # Relaxed, two sums may be one reduction, of half of the bytes.
            + ((report.numerics,) if _has_two_sums(d.pattern) else ())
            if d.fused
            else None
            for n, (d, site) in enumerate(zip(decisions, sites, strict=True))
        ]
    )
    if compared.given_up or compared.agreed.get((structure, context)) == effect:
        return
    limit = AGREEMENT_SECONDS.value()
    if not any(site.fused for site in sites):
        limit = min(limit, SECONDS_OF_NOTHING_FUSED)
    prefix = f"tpfuse/graphs/{','.join(map(str, group))}/{compared.number}"
    compared.number += 1
    store = compat.default_store()
    # For the message also what was decided about other reductions within the group: a part may have left its gather outside.
    within = [vars(_decision(0, site)) for site in report.sites if set(site.group) <= set(group)]
    mine = {"structure": structure, "effect": effect, "context": context, "decisions": within}
    store.set(f"{prefix}/{dist.get_rank()}", json.dumps(mine))
    found, missing = _entries(store, prefix, group, limit)
    if any(entry["structure"] != structure for entry in found.values()):
        compared.given_up = True
        others = sorted(rank for rank, entry in found.items() if entry["structure"] != structure)
        warnings.warn(
            f"tpfuse: {_ranks(others)} of {list(group)} compiled another graph than this rank, so their decisions cannot be "
            "compared from here on; ranks that disagree about a reduction would wait for each other",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    if any(entry["effect"] != effect for entry in found.values()):
        raise _disagreement(found)
    before = any(known == structure for known, *_ in compared.agreed)
    if missing and (before or any(site.fused for site in sites)):
        what = "decided otherwise about it before, and" if before else "compiled no graph like this one, and"
        raise AgreementError(
            f"{_ranks(missing)} of {list(group)} {what} did not compile it within {limit:g} s "
            f"({AGREEMENT_SECONDS.name}), but all of them have to run the same ops. Compile with the same options and versions "
            "on all ranks; where a rank compiles more slowly, raise the limit",
            missing,
        )
    if not missing:
        compared.agreed[structure, context] = effect


def _has_two_sums(pattern: str) -> bool:
    first, *rest = pattern.split("+")
    return bool(rest) and rest[0].split("*")[0] == first


def _comparisons() -> dict[tuple[int, ...], _Compared]:
    global _session  # noqa: PLW0603
    store = compat.default_store()
    if _session is None or _session.store() is not store:
        _session = _Session(weakref.ref(store))
    return _session.groups


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _entries(
    store: Any, prefix: str, group: tuple[int, ...], limit: float
) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """(what each rank left in time, the ranks that left nothing)"""
    deadline = time.monotonic() + limit
    found: dict[int, dict[str, Any]] = {}
    missing: list[int] = []
    for rank in group:
        try:
            left = max(0.01, deadline - time.monotonic())
            store.wait([f"{prefix}/{rank}"], timedelta(seconds=left))
        except Exception:  # a store raises RuntimeError or DistStoreError by version and kind
            missing.append(rank)
            continue
        found[rank] = json.loads(store.get(f"{prefix}/{rank}"))
    return found, missing


def _of_both(decisions: list[Decision], others: list[Decision]) -> list[Decision]:
    places = {(d.role, d.layer) for d in others}
    return [d for d in decisions if (d.role, d.layer) in places]


def _disagreement(found: dict[int, dict[str, Any]]) -> AgreementError:
    parties: dict[str, list[int]] = {}
    for rank, entry in found.items():
        parties.setdefault(entry["effect"], []).append(rank)
    ordered = sorted(parties.values(), key=lambda ranks: (-len(ranks), ranks))
    others = sorted(rank for ranks in ordered[1:] for rank in ranks)
    a, b = ordered[0][0], others[0]
    right, wrong = ([_read(data) for data in found[rank]["decisions"]] for rank in (a, b))
    if len(right) != len(wrong):  # a replica without rows has fewer
        right, wrong = _of_both(right, wrong), _of_both(wrong, right)
    said = [found[rank]["context"] for rank in (a, b)]
    why = f" ({said[0]} on rank {a}, {said[1]} on rank {b})" if said[0] != said[1] else ""
    return AgreementError(
        f"{_ranks(others)} decided differently from {_ranks(ordered[0])} about one graph, and would wait for each other. "
        f"{_first_difference(right, wrong, a, b)}{why}. Compile with the same options and versions on all ranks",
        others,
    )
