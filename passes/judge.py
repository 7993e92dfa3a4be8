"""What may be rewritten of what could be: training, policy and fuel, in this order."""

from __future__ import annotations

from . import sharing
from .candidate import Candidate, Found
from .options import PassOptions
from .reasons import Reason, Refusal
from .report import LayerAudit


def judge(
    looked: list[Found],
    places: list[sharing.Place],
    audits: list[LayerAudit],
    options: PassOptions,
    training: bool,
) -> list[Found]:
    """Apply training, policy and fuel to what is legal."""
    shared = sharing.shared_groups(audits)
    by_layer = {a.layer: a for a in audits}
    judged, left = [], options.fuel
    for item, spot in zip(looked, places, strict=True):
        outcome = item.outcome
        if training:
            outcome = Refusal(Reason.TRAINING, "the graph was compiled for training (some input requires grad)")
        elif isinstance(outcome, Candidate):
            refusal = _policy(item, by_layer.get(spot.layer) if spot.layer is not None else None, shared, options)
            if refusal is not None:
                outcome = refusal
            elif left is not None and left <= 0:
                outcome = Refusal(Reason.FUEL, f"tpfuse.fuel={options.fuel} was used up by earlier rewrites")
            elif left is not None:
                left -= 1
        judged.append(Found(item.collective, outcome, item.pattern))
    return judged


def _policy(
    item: Found, layer: LayerAudit | None, shared: set[tuple[int, ...]], options: PassOptions
) -> Refusal | None:
    ranks = item.collective.ranks
    if options.policy == "all":
        return None
    block = item.outcome.block if isinstance(item.outcome, Candidate) else None
    if options.policy == "off":
        return Refusal(Reason.POLICY, "tpfuse.policy='off' rewrites nothing; 'all' would fuse it")
    if ranks in shared or block is not None:  # of a block it is proved who keeps it
        return None
    if layer is not None and layer.shared is False:
        return Refusal(Reason.GROUP_MISMATCH, f"{layer.detail}; tpfuse.policy='all' would fuse it")
    return Refusal(
        Reason.POLICY,
        f"no layer of this graph proves that attention and MLP share ranks {list(ranks)}; tpfuse.policy='all' would fuse it",
    )
