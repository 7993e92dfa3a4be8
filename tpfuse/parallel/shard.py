"""Cut the weights of a decoder layer to this rank's share, and record over which ranks each was cut.

What is cut where is worked out first, from shapes alone, and done after: a layer that cannot be cut stays as it was, and a
checkpoint can be read by the same cuts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import Architecture, Projection
from .config import ConfigError
from .cut import Cut
from .groups import Groups
from .heads import count_own_heads, head_counts
from .layout import mlp_group
from .linear import check_plain, linear_cuts
from .qk_norms import GATHER, REDUCE, WideNorm, check_forward, read_steps
from .qk_norms import install as install_qk_norms


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
class LayerCuts:
    """How one layer is cut.

    Attributes:
        shards: one record for each weight and group.
        cuts: path of a parameter within the layer -> what this rank keeps of it.
        norms: the norms of q and k over the heads of all ranks; empty where attention has one rank or no such norms.
    """

    shards: list[Shard]
    cuts: dict[str, Cut]
    norms: list[WideNorm]


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


def layer_cuts(
    layer: nn.Module, number: int, config: Any, names: Architecture, groups: Groups, qk_norm: str = GATHER
) -> LayerCuts:
    """What this rank keeps of one decoder layer. Reads shapes only, so the layer may be on the meta device.

    Args:
        layer: a decoder layer with whole weights; it is not changed.
        number: its index, for messages and the record.
        config: has ``num_attention_heads`` and ``num_key_value_heads``.
        names: where attention, MLP and experts are.
        groups: this rank's groups.
        qk_norm: how norms of all heads are computed, ``gather`` or ``reduce``; the latter cuts their weights.
    Returns:
        The cuts; none where a group has one rank.
    Raises:
        ConfigError: a width does not divide by the group's size, or a weight is not a plain tensor.
    """
    found = LayerCuts([], {}, [])
    _cut_attention(found, layer, number, config, names, groups, qk_norm)
    mlp = getattr(layer, names.mlp)
    if kind_of(layer, names) == "dense":
        _cut_mlp(found, mlp, names.mlp, names, _share(groups, number, "mlp", mlp_group(groups.config, "dense")))
        return found
    _cut_experts(found, mlp, names, groups, number)
    if names.shared_experts and getattr(mlp, names.shared_experts, None) is not None:
        # Every rank adds a part of the shared experts to its routed experts: one partial sum, so one reduction.
        share = _share(groups, number, "mlp", mlp_group(groups.config, "moe"))
        _cut_mlp(found, getattr(mlp, names.shared_experts), f"{names.mlp}.{names.shared_experts}", names, share)
    return found


@torch.no_grad()
def apply_cuts(layer: nn.Module, found: LayerCuts, config: Any, names: Architecture, groups: Groups) -> None:
    """Replace the weights of a layer by what this rank keeps, and let its modules know their new sizes."""
    for path, cut in found.cuts.items():
        replace_parameter(layer, path, cut)
    size = len(groups.ranks_of("attn_tp"))
    attention = getattr(layer, names.attention)
    if size > 1 and any(projection.parts for projection in names.attention_columns):
        count_own_heads(attention, config, size)
    if (
        size > 1
        and hasattr(attention, "num_key_value_groups")
        and any(p.units == "kv_heads" for p in names.attention_columns)
    ):
        heads, kv_heads = head_counts(config)
        attention.num_key_value_groups = (heads // size) // max(1, kv_heads // size)
    if found.norms:
        install_qk_norms(attention, found.norms, groups.name_of("attn_tp"), size)
    mlp = getattr(layer, names.mlp)
    if kind_of(layer, names) == "moe" and len(groups.ranks_of("moe_ep")) > 1:
        _run_own_experts(getattr(mlp, names.experts), groups.index_in("moe_ep"))


def replace_parameter(module: nn.Module, path: str, cut: Cut) -> None:
    """Put what a rank keeps of a parameter in its place."""
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent)
    whole = getattr(owner, name).detach()
    setattr(owner, name, nn.Parameter(cut.take(whole, whole.shape), requires_grad=False))
    if isinstance(owner, nn.Linear) and name == "weight":
        owner.out_features, owner.in_features = owner.weight.shape


def _share(groups: Groups, layer: int, role: str, group: str) -> _Share:
    return _Share(layer, role, group, groups.ranks_of(group), groups.index_in(group))


def _cut_attention(
    found: LayerCuts, layer: nn.Module, number: int, config: Any, names: Architecture, groups: Groups, qk_norm: str
) -> None:
    share = _share(groups, number, "attention", "attn_tp")
    attention = getattr(layer, names.attention)
    heads, kv_heads = head_counts(config)
    counts = {"heads": heads, "kv_heads": kv_heads}
    _cut_all(found, attention, names.attention, names.attention_columns, "column", share, counts)
    _cut_all(found, attention, names.attention, names.attention_rows, "row", share, counts)
    if share.size > 1 and names.qk_norms:
        check_forward(attention, f"layer {number}: {names.attention}")
        _cut_norms(found, attention, names, share, counts, qk_norm)


def _cut_norms(
    found: LayerCuts, attention: nn.Module, names: Architecture, share: _Share, counts: dict[str, int], qk_norm: str
) -> None:
    """The norms of the outputs of several heads, of which a rank has some."""
    of_name = {projection.name: projection for projection in names.attention_columns}
    for name, norm_name in names.qk_norms:
        norm = getattr(attention, norm_name, None)
        if norm is None or getattr(attention, name, None) is None:
            continue
        path = f"{names.attention}.{norm_name}"
        where = f"layer {share.layer}: {path}"
        if name not in of_name:
            raise ConfigError(f"{where} norms {name}, which is none of the column projections {sorted(of_name)}")
        if of_name[name].parts:
            raise ConfigError(
                f"{where} norms {name}, which packs several projections; a norm of one projection is known alone"
            )
        width = getattr(attention, name).weight.shape[0]
        weight = getattr(norm, "weight", None)
        if weight is not None and tuple(weight.shape) != (width,):
            raise ConfigError(
                f"{where} has a weight of shape {tuple(weight.shape)}, but {name} puts out {width} columns; "
                "Architecture(qk_norms=...) is for norms of the whole output alone"
            )
        (own,) = _kept(of_name[name], width, share, counts, f"{path}.weight")
        copies = len(own) * share.size // width
        steps = None
        if qk_norm == REDUCE:
            check_plain(norm, where, ("weight",))
            steps = read_steps(norm, width, where)
            if weight is not None:
                found.cuts[f"{path}.weight"] = Cut({0: (own,)})
        found.norms.append(WideNorm(name, norm_name, own, copies, steps))


def _cut_mlp(found: LayerCuts, mlp: nn.Module, path: str, names: Architecture, share: _Share) -> None:
    _cut_all(found, mlp, path, names.mlp_columns, "column", share, {})
    _cut_all(found, mlp, path, names.mlp_rows, "row", share, {})


def _cut_all(
    found: LayerCuts,
    module: nn.Module,
    path: str,
    projections: tuple[Projection, ...],
    kind: str,
    share: _Share,
    counts: dict[str, int],
) -> None:
    if share.size == 1:
        return
    for projection in projections:
        linear = getattr(module, projection.name, None)
        if linear is None:
            continue
        where = f"{path}.{projection.name}.weight"
        prefix = f"{path}.{projection.name}"
        check_plain(linear, f"layer {share.layer}: {prefix}")
        width = linear.weight.shape[0 if kind == "column" else 1]
        kept = _kept(projection, width, share, counts, where)
        for name, cut in linear_cuts(linear, kind, kept, first=share.index == 0):
            found.cuts[f"{prefix}.{name}"] = cut
        found.shards.append(share.record(where, kind))


def _kept(projection: Projection, width: int, share: _Share, counts: dict[str, int], where: str) -> tuple[range, ...]:
    """The columns or rows of this rank: a range for each part of a projection."""
    parts = projection.parts or (projection.units,)
    numbers = [counts.get(units, width // len(parts)) for units in parts]
    each = width // sum(numbers)
    if each * sum(numbers) != width:
        raise ConfigError(
            f"layer {share.layer}: {where} has a width of {width}, which is not made of {' + '.join(parts)} "
            f"({' + '.join(map(str, numbers))}); name its parts in Projection(parts=...)"
        )
    kept, start = [], 0
    for number, units in zip(numbers, parts, strict=True):
        mine = _own_units(number, units, share, where)
        kept.append(range(start + mine.start * each, start + mine.stop * each))
        start += number * each
    return tuple(kept)


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


def _cut_experts(found: LayerCuts, moe: nn.Module, names: Architecture, groups: Groups, number: int) -> None:
    """Whole experts over moe_ep, and the width of each expert over moe_tp."""
    experts = getattr(moe, names.experts)
    whole = _share(groups, number, "mlp", "moe_ep")
    width = _share(groups, number, "mlp", "moe_tp")
    if whole.size == width.size == 1:
        return
    _check_experts(experts, names, f"layer {number}: {names.mlp}.{names.experts}")
    for name in (*names.experts_columns, *names.experts_rows):
        path = f"{names.mlp}.{names.experts}.{name}"
        shape = getattr(experts, name).shape
        ranges: dict[int, tuple[range, ...]] = {}
        if whole.size > 1:
            ranges[0] = (_own_units(shape[0], "experts", whole, path),)
            found.shards.append(whole.record(path, "expert"))
        if width.size > 1 and name in names.experts_columns:
            half = shape[1] // 2
            mine = _own_units(half, "columns", width, path)
            ranges[1] = (mine, range(half + mine.start, half + mine.stop))
            found.shards.append(width.record(path, "column"))
        elif width.size > 1:
            ranges[2] = (_own_units(shape[2], "columns", width, path),)
            found.shards.append(width.record(path, "row"))
        found.cuts[path] = Cut(ranges)


def _check_experts(experts: nn.Module, names: Architecture, where: str) -> None:
    """Every parameter of the experts must be one that is cut: a bias left whole would be summed once a rank."""
    known = (*names.experts_columns, *names.experts_rows)
    check_plain(experts, where, known)
    for name in known:
        if not hasattr(experts, name):
            held = ", ".join(key for key, _ in experts.named_parameters()) or "no parameters"
            raise ConfigError(
                f"{where} has no {name!r}, but {held}; give the names in Architecture(experts_columns=..., experts_rows=...)"
            )


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
