"""Did all ranks of a group decide alike about the graph that each of them has just compiled? What differs is not fused.

A fused op waits for the same op on every rank of its group, so ranks that decide differently would wait for ever. Each rank
therefore leaves what it decided in the store of the default group and reads the others' before anything of the graph runs
(:func:`compare`). Where two ranks of a group differ, every rank of the group leaves all ops of that group out of the graph.

Why no rank waits for ever, and none runs another op than its peers:

- *All who must act know.* The ops in question are those that exactly the ranks of the group call (``Site.callers``). All of
  these ranks read the same entries and apply the same rule to them. A rank outside calls none of these ops.
- *Nobody else must act.* The pass applies such a refusal last (:mod:`tpfuse.passes.judge`), to a site whose fate nothing else
  asks for: what other sites become, what they cost of the fuel and what proves their groups shared is as before. So other ranks,
  which know of nothing, and this one still agree about the other groups. The compile that follows is checked against that
  (:mod:`tpfuse.rollback`).
- *The order of the groups.* A rank compares its groups one after the other, the larger first, of equals by their ranks: one order
  for all ranks. Of the groups that still wait, all ranks of the first in this order have come to it, so it does not wait for
  another. An op that gathers over more ranks than it sums belongs to the larger group, which comes first; when the smaller one is
  compared, that op is already left out where it must be, and only ops of that very group are left to be refused. So each group is
  compared once, and there are no rounds.
- *Ranks that change their mind.* A rank that has something to compare waits for ranks that may be slow, 600 s. One that keeps to
  what was agreed on compares nothing, and leaves a note of the graph that it compiled: its lines, its sizes, and how often it has
  compiled it. A rank that decides otherwise about that very compile finds the note and gives up early, with an error that says
  so. Not at once: a rank that has compiled the graph once more than others, for an argument of its own, has left a note too many.
- *Ranks that compile again.* What was agreed on, or refused, is kept by structure, equally on all ranks. One rank that compiles
  a graph again, for other rows say, finds the same answer there and waits for nobody.
- *Refusals are not bound to one graph.* Replicas may run two graphs of a model at the same time, a prefill here and a decode step
  there, whose ops over all ranks wait for each other. They pair as long as graphs of one structure have one answer: with the
  prefill refused and the decode step fused, a kernel would wait for a rank that is in the library's all-reduce. Lines of code,
  functions and module classes do not tell these two graphs from those of another model, so another model with just the same
  reductions (number, dtypes, hidden sizes, ranks) stays refused as well. It runs with its own bits, and its report says why.
- *Ranks that compile two graphs in another order* compare one with the other. Where these differ, both stay unfused. Where they
  are equal crosswise, each would be fused on one rank only: an error (:mod:`.crossed`).
"""

from __future__ import annotations

import json
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist

from tpfuse import compat
from tpfuse.options import AGREEMENT_SECONDS
from tpfuse.passes import Reason
from tpfuse.passes.report import GraphReport, Site

from . import crossed, entries
from .crossed import Decided
from .decision import AgreementError, decision_of, ranks_in_words
from .disagreement import Disagreement, Ranks, difference, without

# A rank that fuses nothing is in no danger of waiting inside a kernel, and its peers may have reasons not to compile at all.
SECONDS_OF_NOTHING_FUSED = 30.0
# A rank that was seen to keep to an earlier decision about the same compile of the same graph is not expected any more. Who
# raises the limit has ranks that are slow, here too.
SECONDS_AFTER_A_NOTE = 30.0
SHARE_AFTER_A_NOTE = 0.05


@dataclass
class _History:
    """What the ranks of one group have compared so far; equal on all of them but for ``open``.

    Attributes:
        number: of the next comparison.
        agreed: (structure, context) -> the effect that was agreed on last.
        fused: structures that the group has agreed on with something fused: such graphs may be running.
        refused: structures that the group disagreed about, with how.
        open: structure -> the entry of this rank that others did not answer in time, when nothing was fused.
        given_up: ranks compile different graphs.
        compiled: how often this rank has compiled each graph, by what :func:`_place` says of it.
        decided: what each rank has decided about graphs of which lines, see :mod:`.crossed`.
    """

    number: int = 0
    agreed: dict[tuple[str, str], str] = field(default_factory=dict)
    fused: set[str] = field(default_factory=set)
    refused: dict[str, Disagreement] = field(default_factory=dict)
    open: dict[str, str] = field(default_factory=dict)
    given_up: bool = False
    compiled: Counter[str] = field(default_factory=Counter)
    decided: Decided = field(default_factory=dict)


@dataclass
class _Session:
    """The comparisons over one store; another default group has another store and starts anew."""

    store: weakref.ref[Any]
    groups: dict[Ranks, _History] = field(default_factory=dict)


_session: _Session | None = None


def has_peers() -> bool:
    """Whether there are other ranks to compare with: those of the fake backend do not exist."""
    started = dist.is_available() and dist.is_initialized()
    return started and dist.get_world_size() > 1 and dist.get_backend() != "fake"


def compare(reports: Sequence[GraphReport], context: str = "", origin: str = "") -> dict[Ranks, Disagreement]:
    """Compare what was just compiled with the other ranks of each group; called when a compile ends.

    Entry k of a group holds the k-th graph of each rank: its *structure* (dtype and hidden size of each all-reduce over the
    group, nothing about rows, names or paths) and its decisions. A graph with the decisions that were agreed on last for its
    structure and options, one compiled again for other rows say, is not compared again, so nobody waits for a rank that
    need not recompile. Neither is a graph with a structure that the group has refused and never fused: it stays refused.
    All of it comes from the report, which a compile cache supplies as well.

    Args:
        reports: of the graphs of one compile.
        context: what else may differ between ranks, for the message, e.g. the options.
        origin: what tells the graphs of one function of the model's from those of another one, such as a line.
    Returns:
        The groups whose ranks differ. The op of every site that has one of them as ``callers`` must not run.
    Raises:
        AgreementError: a rank has not compiled the graph in time (``TPFUSE_AGREEMENT_SECONDS``, 600 s), or ranks of a part differ
            about an op that more ranks have agreed on.
        ValueError: that variable is not a positive number.
    """
    refused: dict[Ranks, Disagreement] = {}
    if not has_peers():
        return refused
    for number, report in enumerate(reports):
        if any(site.reason == Reason.TRAINING.value for site in report.sites):
            continue
        groups = {group for site in report.sites for group in (site.group, site.over) if len(group) > 1}
        for group in sorted(groups - set(refused), key=lambda ranks: (-len(ranks), ranks)):
            found = _compare(group, without(report, refused), context, origin) if dist.get_rank() in group else None
            if found is not None:
                refused[group] = replace(found, graph=number)
    return refused


def agree_on(reports: Sequence[GraphReport], context: str = "") -> None:
    """:func:`compare` for those who cannot compile again: a difference is an error.

    Raises:
        AgreementError: ranks decided differently about equal graphs, or as :func:`compare` says.
    """
    for found in compare(reports, context).values():
        raise found.error()


def _compare(group: Ranks, report: GraphReport, context: str, origin: str = "") -> Disagreement | None:
    """Compare what was decided about the reductions over a group, and about those over parts of it whose op is over all of it."""
    history = _histories().setdefault(group, _History())
    sites = [site for site in report.sites if group in (site.group, site.over)]
    own = [site for site in sites if site.group == group]
    structure = entries.digest([(site.dtype, str(site.shape[-1]) if site.shape else "") for site in own])
    effect = entries.digest([_effect(site, group, report.numerics) for site in sites])
    fuses = any(site.fused and site.callers == group for site in sites)
    store = compat.default_store()
    place = _place(history, group, structure, own)
    if structure in history.open:
        _close(history, store, group, structure)
    if history.given_up:
        return None
    if history.agreed.get((structure, context)) == effect:
        entries.note(store, place, dist.get_rank(), effect)
        return None
    if structure in history.refused and structure not in history.fused:
        return history.refused[structure]
    limit = AGREEMENT_SECONDS.value()
    if not any(site.fused for site in sites):
        limit = min(limit, SECONDS_OF_NOTHING_FUSED)
    prefix = f"tpfuse/graphs/{','.join(map(str, group))}/{history.number}"
    history.number += 1
    # For the message also other reductions within the group: a part may have left its gather outside.
    within = [vars(decision_of(0, site)) for site in report.sites if set(site.group) <= set(group)]
    mine = {
        "structure": structure,
        "effect": effect,
        "outside": [site.fused and site.callers != group for site in own],
        "fused": [site.fused and site.callers == group for site in own],
        "fuses": fuses,
        "context": context,
        "lines": entries.digest([structure, origin, *([s.source, s.role, s.layer] for s in own)]),
        "decisions": within,
    }
    store.set(f"{prefix}/{dist.get_rank()}", json.dumps(mine))
    before = structure in history.fused or any(known == structure for known, _ in history.agreed)
    soon = min(limit, max(SECONDS_AFTER_A_NOTE, SHARE_AFTER_A_NOTE * limit))
    found, missing = entries.read(store, prefix, group, soon if before else limit)
    kept_to_it = entries.noted_otherwise(store, place, missing, effect) if before else []
    if missing and before and not kept_to_it:
        found, missing = entries.read(store, prefix, group, limit - soon)
    others = sorted(rank for rank, entry in found.items() if entry["structure"] != structure)
    if others:
        history.given_up = True
        warnings.warn(
            f"tpfuse: {ranks_in_words(others)} of {list(group)} compiled another graph than this rank, so their decisions cannot "
            "be compared from here on; ranks that disagree about a reduction would wait for each other",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    # A rank that is missing may be running what was agreed on before, and would not hear of a refusal.
    absent = bool(missing) and before
    if not absent and any(entry["effect"] != effect for entry in found.values()):
        if any(entry["outside"] != mine["outside"] for entry in found.values()):
            # What these ranks do not share with the rest of the op's, who have agreed on it and come to no further comparison.
            raise difference(found, group).error()
        return _refuse(history, structure, found, group)
    if kept_to_it:
        raise AgreementError(
            f"{ranks_in_words(kept_to_it)} of {list(group)} decided otherwise about it before, and kept to that when compiling "
            f"the same lines for the same sizes. This rank waited {soon:g} s for another compile, as all of them have to run "
            "the same ops. Compile with the same options and versions on all ranks; where a rank compiles more slowly, raise "
            f"{AGREEMENT_SECONDS.name} ({limit:g}), of which this is a part",
            kept_to_it,
        )
    if absent or (missing and any(site.fused for site in sites)):
        what = "decided otherwise about it before, and" if before else "compiled no graph like this one, and"
        raise AgreementError(
            f"{ranks_in_words(missing)} of {list(group)} {what} did not compile it within {limit:g} s "
            f"({AGREEMENT_SECONDS.name}), but all of them have to run the same ops. Compile with the same options and versions "
            "on all ranks; where a rank compiles more slowly, raise the limit",
            missing,
        )
    if missing:
        history.open[structure] = prefix
    else:
        _agree(history, structure, found)
    return None


def _place(history: _History, group: Ranks, structure: str, own: Sequence[Site]) -> str:
    """Where notes about this compile of this graph go: equal on ranks that compile the same lines for the same sizes as often."""
    graph = entries.digest([structure, *([s.source, s.role, s.layer, [str(n) for n in s.shape]] for s in own)])
    history.compiled[graph] += 1
    return f"tpfuse/graphs/{','.join(map(str, group))}/known/{graph}/{history.compiled[graph]}"


def _effect(site: Site, group: Ranks, numerics: str) -> list[Any] | str | None:
    """What a site means to the ranks of a group: which of their ops it is.

    Of a part's reduction also between which of the group's own it stands. In a part of one row a vector, (1, H), is another
    addend; the ops of both wait for the same.
    """
    if not site.fused:
        return None
    if site.callers != group:
        return "over more ranks"  # which have compared it
    own = site.group == group
    named = [site.pattern] if own else [site.pattern.replace("bias", "add"), "over all"]
    # Relaxed, two sums may be one reduction, of half of the bytes.
    sums = [numerics] if _has_two_sums(site.pattern) else []
    return [*named, site.flavour, site.eps, site.lowered, site.quantizer, *sums]


def _has_two_sums(pattern: str) -> bool:
    first, *rest = pattern.split("+")
    return bool(rest) and rest[0].split("*")[0] == first


def _agree(history: _History, structure: str, found: Mapping[int, Mapping[str, Any]]) -> None:
    crossed.check(history.decided, found)
    for entry in found.values():
        history.agreed[structure, entry["context"]] = entry["effect"]
    if any(entry["fuses"] for entry in found.values()):
        history.fused.add(structure)


def _refuse(history: _History, structure: str, found: Mapping[int, Mapping[str, Any]], group: Ranks) -> Disagreement:
    for key in [key for key in history.agreed if key[0] == structure]:
        del history.agreed[key]
    history.refused[structure] = difference(found, group)
    return history.refused[structure]


def _close(history: _History, store: Any, group: Ranks, structure: str) -> None:
    """Look for the answers to an entry that came too late for the compile that left it."""
    found, missing = entries.read(store, history.open[structure], group, entries.AT_ONCE)
    effects = {entry["effect"] for entry in found.values()}
    if {entry["structure"] for entry in found.values()} != {structure}:
        return
    if len(effects) > 1:
        _refuse(history, structure, found, group)
    elif not missing:
        _agree(history, structure, found)
    else:
        return
    del history.open[structure]


def _histories() -> dict[Ranks, _History]:
    global _session  # noqa: PLW0603
    store = compat.default_store()
    if _session is None or _session.store() is not store:
        _session = _Session(weakref.ref(store))
    return _session.groups
