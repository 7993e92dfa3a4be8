"""What may be rewritten of what could be: training, policy, fuel and what ranks disagree about, in this order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from . import sharing
from .candidate import Candidate, Found
from .options import PassOptions
from .reasons import Reason, Refusal
from .report import LayerAudit

# Which rule admitted a site, as the report says it.
SHARED_LAYER = "shared-layer"  # attention and MLP of some layer reduce over just these ranks
NOT_REFUTED = "not-refuted"  # nothing in the graph shows these ranks to be those of one of the two alone
ROWS = "rows-proved"  # it is proved who keeps which rows of the sum
POLICY = "policy-all"


def judge(
    looked: list[Found],
    places: list[sharing.Place],
    audits: list[LayerAudit],
    refuted: Mapping[tuple[int, ...], str],
    options: PassOptions,
    training: bool,
) -> list[Found]:
    """Apply training, policy, fuel and ``options.refused`` to what is legal.

    The last comes last: what ranks disagree about has cost its fuel, and nothing else here depends on it. So the decisions about
    all other ranks' ops are those of a compile without it.

    Args:
        refuted: rank lists that the graph shows to be those of attention or of the MLP alone, with what shows it.
    """
    shared = sharing.shared_groups(audits)
    by_layer = {a.layer: a for a in audits}
    judged, left = [], options.fuel
    for item, spot in zip(looked, places, strict=True):
        outcome, rule = item.outcome, None
        over: tuple[int, ...] = ()
        if training:
            outcome = Refusal(Reason.TRAINING, "the graph was compiled for training (some input requires grad)")
        elif isinstance(outcome, Candidate):
            layer = by_layer.get(spot.layer) if spot.layer is not None else None
            cost = 1 if outcome.merged is None else 2  # sites, as reports count them
            admitted = _policy(item, layer, shared, refuted, options)
            if isinstance(admitted, Refusal):
                outcome = admitted
            elif left is None or left >= cost:
                rule = admitted
                left = None if left is None else left - cost
                said = options.refused.get(outcome.over or item.collective.ranks)
                if said is not None:
                    rule, over = None, outcome.over
                    outcome = Refusal(Reason.RANKS_DISAGREE, said)
            else:
                left = 0
                outcome = Refusal(Reason.FUEL, f"tpfuse.fuel={options.fuel} was used up by earlier rewrites")
        judged.append(replace(item, outcome=outcome, admitted=rule, over=over))
    return judged


def _policy(
    item: Found,
    layer: LayerAudit | None,
    shared: set[tuple[int, ...]],
    refuted: Mapping[tuple[int, ...], str],
    options: PassOptions,
) -> Refusal | str:
    """The rule that admits a site, or the refusal. Asks about the rank list alone, so that the ranks of a list agree."""
    ranks = item.collective.ranks
    if options.policy == "all":
        return POLICY
    outcome = item.outcome if isinstance(item.outcome, Candidate) else None
    if options.policy == "off":
        return Refusal(Reason.POLICY, "tpfuse.policy='off' rewrites nothing; 'all' would fuse it")
    # Of replicas, each would ask about ranks of its own, and all of them must decide alike.
    if outcome is not None and (outcome.block is not None or outcome.over):
        return ROWS
    if ranks in shared:
        return SHARED_LAYER
    if options.policy == "shared":
        if ranks not in refuted:
            return NOT_REFUTED
        return Refusal(Reason.GROUP_MISMATCH, f"{refuted[ranks]}; tpfuse.policy='all' would fuse it")
    if layer is not None and layer.shared is False:
        return Refusal(Reason.GROUP_MISMATCH, f"{layer.detail}; tpfuse.policy='all' would fuse it")
    return Refusal(
        Reason.POLICY,
        f"no layer of this graph proves that attention and MLP share ranks {list(ranks)}; tpfuse.policy='all' would fuse it",
    )
