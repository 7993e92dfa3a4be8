"""Cut the weights of a decoder to this rank's share, and record over which ranks each was cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import Architecture, Projection
from .config import ConfigError
from .groups import Groups
from .layout import mlp_group


@dataclass(frozen=True)
class Shard:
    """A weight that was cut.

    Attributes:
        layer: index of the decoder layer.
        role: ``attention`` or ``mlp``.
        path: of the weight within the layer, e.g. ``self_attn.o_proj.weight``.
        kind: ``column`` (split by output), ``row`` (split by input, leaves partial sums) or ``expert`` (whole experts).
        group: name of the group it was cut over.
        ranks: global ranks of that group.
    """

    layer: int
    role: str
    path: str
    kind: str
    group: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class _Share:
    """This rank's place in the group that a module is cut over."""

    layer: int
    role: str
    group: str
    ranks: tuple[int, ...]
    index: int

    @property
    def size(self) -> int:
        return len(self.ranks)

    def record(self, path: str, kind: str) -> Shard:
        return Shard(self.layer, self.role, path, kind, self.group, self.ranks)


def kind_of(layer: nn.Module, names: Architecture) -> str:
    """``moe`` for a layer whose MLP holds routed experts, else ``dense``."""
    return "moe" if hasattr(getattr(layer, names.mlp), names.experts) else "dense"


@torch.no_grad()
def shard_layer(layer: nn.Module, number: int, config: Any, names: Architecture, groups: Groups) -> list[Shard]:
    """Replace the weights of one decoder layer by this rank's share of them.

    Args:
        layer: a decoder layer with whole weights; it is changed.
        number: its index, for messages and the record.
        config: has ``num_attention_heads`` and ``num_key_value_heads``.
        names: where attention, MLP and experts are.
        groups: this rank's groups.
    Returns:
        One record for each weight that was cut; none where the group has one rank.
    Raises:
        ConfigError: a width does not divide by the group's size.
    """
    shards = _shard_attention(layer, number, config, names, groups)
    mlp = getattr(layer, names.mlp)
    if kind_of(layer, names) == "dense":
        share = _share(groups, number, "mlp", mlp_group(groups.config, "dense"))
        return shards + _shard_mlp(mlp, names.mlp, names, share)
    shards += _shard_experts(mlp, names, groups, number)
    if names.shared_experts and getattr(mlp, names.shared_experts, None) is not None:
        # Every rank adds a part of the shared experts to its routed experts: one partial sum, so one reduction.
        share = _share(groups, number, "mlp", mlp_group(groups.config, "moe"))
        path = f"{names.mlp}.{names.shared_experts}"
        shards += _shard_mlp(getattr(mlp, names.shared_experts), path, names, share)
    return shards


def _share(groups: Groups, layer: int, role: str, group: str) -> _Share:
    return _Share(layer, role, group, groups.ranks_of(group), groups.index_in(group))


def _shard_attention(layer: nn.Module, number: int, config: Any, names: Architecture, groups: Groups) -> list[Shard]:
    share = _share(groups, number, "attention", "attn_tp")
    if share.size == 1:
        return []
    attention = getattr(layer, names.attention)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    counts = {"heads": heads, "kv_heads": kv_heads}
    shards = list(_cut_all(attention, names.attention, names.attention_columns, "column", share, counts))
    shards += _cut_all(attention, names.attention, names.attention_rows, "row", share, counts)
    if hasattr(attention, "num_key_value_groups") and any(p.units == "kv_heads" for p in names.attention_columns):
        attention.num_key_value_groups = (heads // share.size) // max(1, kv_heads // share.size)
    return shards


def _shard_mlp(mlp: nn.Module, path: str, names: Architecture, share: _Share) -> list[Shard]:
    if share.size == 1:
        return []
    shards = list(_cut_all(mlp, path, names.mlp_columns, "column", share, {}))
    return shards + list(_cut_all(mlp, path, names.mlp_rows, "row", share, {}))


def _cut_all(
    module: nn.Module, path: str, projections: tuple[Projection, ...], kind: str, share: _Share, counts: dict[str, int]
) -> Iterator[Shard]:
    for projection in projections:
        linear = getattr(module, projection.name, None)
        if linear is None:
            continue
        where = f"{path}.{projection.name}.weight"
        dim = 0 if kind == "column" else 1
        units = counts.get(projection.units, linear.weight.shape[dim])
        mine = _own_units(units, projection.units, share, where)
        linear.weight = _parameter(_take_units(linear.weight, dim, units, mine))
        if linear.bias is not None:
            linear.bias = _parameter(_own_bias(linear.bias, kind, units, mine, share))
        _set_features(linear)
        yield share.record(where, kind)


def _own_units(units: int, what: str, share: _Share, where: str) -> range:
    """The units of this rank; key/value heads are repeated where there are fewer of them than ranks."""
    if units % share.size == 0:
        each = units // share.size
        return range(share.index * each, (share.index + 1) * each)
    if what == "kv_heads" and share.size % units == 0:
        head = share.index * units // share.size
        return range(head, head + 1)
    raise ConfigError(
        f"layer {share.layer}: {where} has {units} {what}, which do not split over the {share.size} ranks of "
        f"{share.group} {list(share.ranks)}; use a size that divides {units}"
    )


def _take_units(weight: Tensor, dim: int, units: int, mine: range) -> Tensor:
    width = weight.shape[dim] // units
    return weight.narrow(dim, mine.start * width, len(mine) * width)


def _own_bias(bias: Tensor, kind: str, units: int, mine: range, share: _Share) -> Tensor:
    """A column's bias is cut with it. A row's bias is added once: by the first rank of the sum."""
    if kind == "column":
        return _take_units(bias, 0, units, mine)
    return bias if share.index == 0 else torch.zeros_like(bias)


def _set_features(linear: nn.Module) -> None:
    if isinstance(linear, nn.Linear):
        linear.out_features, linear.in_features = linear.weight.shape


def _parameter(value: Tensor) -> nn.Parameter:
    # A copy, so that the whole weight can be freed.
    return nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)


def _shard_experts(moe: nn.Module, names: Architecture, groups: Groups, number: int) -> list[Shard]:
    """Whole experts over moe_ep, and the width of each expert over moe_tp."""
    experts = getattr(moe, names.experts)
    whole = _share(groups, number, "mlp", "moe_ep")
    width = _share(groups, number, "mlp", "moe_tp")
    shards = []
    for name in (*names.experts_columns, *names.experts_rows):
        path = f"{names.mlp}.{names.experts}.{name}"
        weight = getattr(experts, name)
        if whole.size > 1:
            mine = _own_units(weight.shape[0], "experts", whole, path)
            weight = weight[mine.start : mine.stop]
            shards.append(whole.record(path, "expert"))
        if width.size > 1 and name in names.experts_columns:
            half = weight.shape[1] // 2
            mine = _own_units(half, "columns", width, path)
            weight = torch.cat([part[:, mine.start : mine.stop] for part in weight.split(half, dim=1)], dim=1)
            shards.append(width.record(path, "column"))
        elif width.size > 1:
            mine = _own_units(weight.shape[2], "columns", width, path)
            weight = weight[:, :, mine.start : mine.stop]
            shards.append(width.record(path, "row"))
        setattr(experts, name, _parameter(weight))
    if whole.size > 1:
        _run_own_experts(experts, whole.index)
    return shards


def _run_own_experts(experts: Any, index: int) -> None:
    """Let the experts' forward compute only the rows routed to this rank's experts; the others add nothing."""
    whole = experts.forward
    local = next(parameter.shape[0] for parameter in experts.parameters())
    experts.num_experts = local
    # Where transformers' expert kernels know ids to skip (num_experts or more), rows of other ranks cost nothing. Older ones
    # would index out of bounds: there such rows go to some expert of this rank, with weight 0.
    skips = hasattr(experts, "_is_expert_parallel")
    if skips:
        experts._is_expert_parallel = True

    def forward(rows: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """rows (n, hidden), expert_ids and weights (n, k) with ids among all experts -> (n, hidden), this rank's part."""
        elsewhere = (expert_ids // local) != index
        own_ids = expert_ids % local
        if skips:
            own_ids = own_ids.masked_fill(elsewhere, local)
        return whole(rows, own_ids, weights.masked_fill(elsewhere, 0.0))

    experts.forward = forward
