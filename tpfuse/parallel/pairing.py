"""Column/row pairing: a weight that is cut over some ranks leaves partial sums, and just those ranks must sum them.

Cut over one group and reduced over another, the model still runs and adds up rows of different replicas, or only some of
the parts. So this is an error before the first token.
"""

from __future__ import annotations

from collections.abc import Sequence

from .config import ConfigError
from .groups import Groups
from .layout import Plan
from .shard import Shard


class PairingError(ConfigError):
    """A weight is cut over other ranks than its partial sums are reduced over."""


def check_shards(shards: Sequence[Shard], plan: Plan, groups: Groups) -> None:
    """Compare what was cut with what the plan reduces, by rank lists.

    Args:
        shards: every weight that was cut on this rank.
        plan: its reductions.
        groups: this rank's groups.
    Raises:
        PairingError: names layer, weight and both rank lists.
    """
    reduced: dict[tuple[int, str], tuple[int, ...]] = {}
    for reduction in plan.reductions():
        place = (reduction.layer, reduction.role)
        if place in reduced:
            raise PairingError(f"layer {place[0]}: the {place[1]} is reduced twice; one partial sum has one reduction")
        reduced[place] = groups.ranks_of(reduction.group)
    for place in sorted({(shard.layer, shard.role) for shard in shards} | set(reduced)):
        _check_place(place, [shard for shard in shards if (shard.layer, shard.role) == place], reduced.get(place))


def _check_place(place: tuple[int, str], shards: list[Shard], reduced: tuple[int, ...] | None) -> None:
    layer, role = place
    if not shards:
        raise PairingError(
            f"layer {layer}: the {role} is reduced over {_text(reduced)}, but none of its weights is cut: the sum would "
            f"count every row {len(reduced or ())} times. Cut it over those ranks, or drop the reduction"
        )
    if reduced is None:
        raise PairingError(
            f"layer {layer}: {shards[0].path} is cut over {shards[0].group} {list(shards[0].ranks)}, but the {role} is not "
            "reduced. Reduce it over those ranks"
        )
    for shard in shards:
        # Routed experts are cut twice, whole over one group and in width over another.
        routed = shard.group in ("moe_ep", "moe_tp")
        fits = set(shard.ranks) <= set(reduced) if routed else shard.ranks == reduced
        if not fits:
            raise PairingError(
                f"layer {layer}: {shard.path} is cut over {shard.group} {list(shard.ranks)}, but the {role} is reduced over "
                f"{list(reduced)}: rows of different replicas would be summed, or parts left out. Cut and reduce over the "
                "same ranks; moe_dense_tp_size sets both"
            )
    _check_experts_cover(layer, [s for s in shards if s.group in ("moe_ep", "moe_tp")], reduced)


def _check_experts_cover(layer: int, shards: list[Shard], reduced: tuple[int, ...]) -> None:
    sizes = {shard.group: len(shard.ranks) for shard in shards}
    product = 1
    for size in sizes.values():
        product *= size
    if shards and product != len(reduced):
        raise PairingError(
            f"layer {layer}: the experts are cut over {sizes}, which are {product} parts, but reduced over {list(reduced)}; "
            "every part must be summed once"
        )


def _text(ranks: tuple[int, ...] | None) -> str:
    return str(list(ranks or ()))
