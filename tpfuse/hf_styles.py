"""What each of transformers' tensor-parallel styles computes at inference, on plain local weights.

The functions here are ``forward`` methods. They make the sums and gathers that transformers' own hooks make, in the same order
and on the same shares, as functional collectives: results are equal bit for bit, and nothing is wrapped on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from tpfuse.hf_compat import Hook

c10d = torch.ops._c10d_functional
Forward = Callable[..., Any]


class Unconvertible(Exception):
    """A module whose style cannot be written with plain weights; the message says why."""


@dataclass(frozen=True)
class Cut:
    """How a dimension lies on the ranks of a group.

    Attributes:
        group: torch's name of the group.
        sizes: elements of the dimension on each rank.
        index: this rank's place in the group.
    """

    group: str
    sizes: tuple[int, ...]
    index: int

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.index])

    @property
    def size(self) -> int:
        return self.sizes[self.index]

    def __deepcopy__(self, memo: dict[int, Any]) -> Cut:
        return self


def cut_of(mesh: Any, length: int) -> Cut:
    """How a dimension of this length lies on the ranks of a mesh of one dimension."""
    ranks = mesh.size()
    sizes = tuple(Shard.local_shard_size_and_offset(length, ranks, rank)[0] for rank in range(ranks))
    return Cut(mesh.get_group().group_name, sizes, mesh.get_local_rank())


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of ``x`` over a group."""
    return c10d.wait_tensor(c10d.all_reduce(x, "sum", group))  # type: ignore[no-any-return]


def gather_last(x: Tensor, cut: Cut) -> Tensor:
    """The shares of the last dimension of all ranks, side by side."""
    widest = max(cut.sizes)
    if x.shape[-1] != widest:
        x = F.pad(x, (0, widest - x.shape[-1]))
    gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(x.contiguous().unsqueeze(0), len(cut.sizes), cut.group))
    return torch.cat([gathered[rank, ..., :size] for rank, size in enumerate(cut.sizes)], dim=-1)


def gathered_linear(module: Any, x: Tensor) -> Tensor:
    """x (..., in) -> (..., out): this rank's columns, then everybody's."""
    return gather_last(F.linear(x, module.weight, module.bias), module.tp_cut)


def reduced_linear(module: Any, x: Tensor) -> Tensor:
    """x (..., this rank's part of in) -> (..., out): the sum over the ranks, then the bias once."""
    y = all_reduce(F.linear(x, module.weight), module.tp_cut.group)
    return y if module.bias is None else y + module.bias


def split_reduced_linear(module: Any, x: Tensor) -> Tensor:
    """As :func:`reduced_linear`, of an input that every rank has whole."""
    return reduced_linear(module, x.narrow(-1, module.tp_cut.start, module.tp_cut.size).contiguous())


def vocabulary_embedding(module: Any, ids: Tensor) -> Tensor:
    """ids (...) -> (..., hidden): each rank looks up the ids that it holds, the others add zeros."""
    cut = module.tp_cut
    local = ids - cut.start
    elsewhere = (local < 0) | (local >= cut.size)
    rows = type(module).forward(module, local.masked_fill(elsewhere, 0))
    return all_reduce(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), cut.group)


def hidden_embedding(module: Any, ids: Tensor) -> Tensor:
    """ids (...) -> (..., hidden): this rank's part of every row, then everybody's."""
    return gather_last(type(module).forward(module, ids), module.tp_cut)


def reduced(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The sum over the ranks of what the class computes."""
    return all_reduce(type(module).forward(module, *args, **kwargs), module.tp_cut.group)


def shared_identity(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the class computes of a share of the input, for a sum that will count it once a rank."""
    return type(module).forward(module, x / len(module.tp_cut.sizes), *args, **kwargs)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Conversion:
    """What a module becomes.

    Attributes:
        forward: its new ``forward``; None for the class's own.
        cut: what ``forward`` reads as ``module.tp_cut``, or None.
        keep: leave the hook where it is: it works on local weights as well.
    """

    forward: Forward | None = None
    cut: Cut | None = None
    keep: bool = False


def conversion(module: nn.Module, hook: Hook) -> Conversion:
    """What a hooked module becomes.

    Raises:
        Unconvertible: its style, its class or its mesh is not one that is known here.
    """
    if hook.style == "EpDispatchExpertsParallel":
        return Conversion(keep=True)
    if not hook.known:
        raise Unconvertible(f"its forward was replaced by {hook.style}")
    if hook.mesh.ndim != 1:
        raise Unconvertible(f"its mesh has {hook.mesh.ndim} dimensions")
    if getattr(module, "_hf_quantized_needs_local_tp", False):
        raise Unconvertible("its weights are quantized")
    if getattr(hook.original, "__func__", None) is not type(module).forward:
        raise Unconvertible("something else replaced its forward before the style did")
    build = STYLES.get(hook.style)
    if build is None:
        raise Unconvertible(f"the style {hook.style} is not known")
    return build(module, hook)


def _column(module: nn.Module, hook: Hook) -> Conversion:
    if isinstance(module, nn.Embedding):  # transformers before 5.21
        return _embedding(module, hook, 1)
    _plain_linear(module)
    output = hook.instance.output_layouts
    if isinstance(output, Shard) and hook.instance.use_local_output:
        return Conversion()
    if not isinstance(output, Replicate) or not hook.instance.use_local_output:
        raise Unconvertible(f"the output of its style is laid out as {output}")
    return Conversion(gathered_linear, cut_of(hook.mesh, int(module.out_features)))  # type: ignore[arg-type]


def _row(module: nn.Module, hook: Hook) -> Conversion:
    if isinstance(module, nn.Embedding):
        return _embedding(module, hook, 0)
    _plain_linear(module)
    if not isinstance(hook.instance.output_layouts, Replicate) or not hook.instance.use_local_output:
        raise Unconvertible(f"the output of its style is laid out as {hook.instance.output_layouts}")
    whole = isinstance(hook.instance.input_layouts, Replicate)
    forward = split_reduced_linear if whole else reduced_linear
    return Conversion(forward, cut_of(hook.mesh, int(module.in_features)))  # type: ignore[arg-type]


def _plain_linear(module: nn.Module) -> None:
    if type(module).forward is not nn.Linear.forward:
        raise Unconvertible(f"{type(module).__name__} is no plain linear layer")


def _embedding(module: Any, hook: Hook, dim: int) -> Conversion:
    # Classes whose forward is a lookup and then something for each element, which zero rows pass unchanged.
    scaled = type(module).__name__.endswith("ScaledWordEmbedding")
    if type(module).forward is not nn.Embedding.forward and not scaled:
        raise Unconvertible(f"{type(module).__name__} is no plain embedding")
    if module.max_norm is not None:
        raise Unconvertible("its max_norm changes the weights while it runs")
    weight = module.weight
    if not isinstance(weight, DTensor) or weight.placements != (Shard(dim),):
        raise Unconvertible("its weight is not cut along one dimension")
    if weight.shape[dim] < hook.mesh.size():
        raise Unconvertible("some ranks hold nothing of its weight")
    cut = cut_of(hook.mesh, weight.shape[dim])
    return Conversion(vocabulary_embedding if dim == 0 else hidden_embedding, cut)


def _embedding_style(module: nn.Module, hook: Hook) -> Conversion:
    if not isinstance(module, nn.Embedding) or not hook.instance.use_local_output:
        raise Unconvertible(f"{type(module).__name__} is no plain embedding")
    return _embedding(module, hook, hook.instance.shard_dim)


def _experts(module: nn.Module, hook: Hook) -> Conversion:
    parameters = list(module.parameters())
    if not any(isinstance(p, DTensor) and not all(x.is_replicate() for x in p.placements) for p in parameters):
        raise Unconvertible("none of its weights is cut")
    return Conversion(reduced, cut_of(hook.mesh, 0))


def _reduce(module: nn.Module, hook: Hook) -> Conversion:
    return Conversion(reduced, cut_of(hook.mesh, 0))


def _identity(module: nn.Module, hook: Hook) -> Conversion:
    return Conversion(shared_identity, cut_of(hook.mesh, 0))


def _packed(module: nn.Module, hook: Hook) -> Conversion:
    if not hook.instance.use_local_output:
        raise Unconvertible("the output of its style stays a DTensor")
    return Conversion()


def _nothing(module: nn.Module, hook: Hook) -> Conversion:
    """Styles that do something with gradients only, or take local weights for the time of a call."""
    return Conversion()


STYLES: dict[str, Callable[[nn.Module, Hook], Conversion]] = {
    "AllReduceParallel": _reduce,
    "ColwiseParallel": _column,
    "EmbeddingParallel": _embedding_style,
    "LocalParamsParallel": _nothing,
    "MlaKvAProjParallel": _nothing,
    "MoeExpertsParallel": _experts,
    "MoeIdentityParallel": _identity,
    "PackedColwiseParallel": _packed,
    "ReplicatedWithGradAllReduce": _nothing,
    "RowwiseParallel": _row,
    "TensorParallelLayer": _nothing,
}
