"""Norms of all heads of q and of k, where a rank holds some of the heads: one collective a layer for both norms.

With ``gather`` the ranks put q and k together, norm them whole and keep their own heads: the model's own norm, and twice its
bytes a row on the wire. With ``reduce`` they sum the squares of their columns, two numbers a row, and norm what they hold. That
adds the squares up in another order, so the last bits differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from tpfuse.ops.flavour import Flavour
from tpfuse.ops.reference import scaled_by_mean
from tpfuse.passes import values
from tpfuse.passes.norms import NormForm, match

from .config import ConfigError

c10d = torch.ops._c10d_functional
GATHER, REDUCE = "gather", "reduce"
MODES = (GATHER, REDUCE)


@dataclass(frozen=True)
class Steps:
    """What an RMSNorm module computes: its rounding order, and what it adds to the mean of squares."""

    flavour: Flavour
    eps: float


@dataclass(frozen=True)
class WideNorm:
    """A norm over the columns of all ranks.

    Attributes:
        projection: attribute of attention that makes what is normed.
        norm: attribute of attention.
        own: this rank's columns among all.
        copies: how many ranks hold each column: more than one where there are fewer key/value heads than ranks.
        steps: what the norm computes, with ``reduce``; None with ``gather``.
    """

    projection: str
    norm: str
    own: range
    copies: int
    steps: Steps | None


def check_mode(mode: str) -> None:
    """Raise a ConfigError unless ``mode`` is one of :data:`MODES`."""
    if mode not in MODES:
        raise ConfigError(
            f"qk_norm={mode!r} is not valid; valid are {', '.join(map(repr, MODES))}: gather q and k and norm them whole, or "
            "reduce the sums of their squares, which changes the last bits"
        )


def read_steps(norm: nn.Module, width: int, where: str) -> Steps:
    """What an RMSNorm computes, found by meaning, as the pass does. The module may be on the meta device.

    Args:
        norm: called with (rows, width), it returns the same shape.
        where: its place, for messages.
    Raises:
        ConfigError: it is no RMSNorm, or rounds in an order that no flavour has.
    """
    weight = getattr(norm, "weight", None)
    # In 16 bits every rounding shows; what is found holds for other dtypes as well.
    dtype = weight.dtype if weight is not None and weight.dtype.itemsize == 2 else torch.bfloat16
    given = {} if weight is None else {"weight": torch.empty(width, dtype=dtype)}

    def call(x: Tensor, given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(norm, given, (x,))  # type: ignore[no-any-return]

    try:
        graph = make_fx(call, tracing_mode="fake")(torch.empty(2, width, dtype=dtype), given).graph
        order = {node: index for index, node in enumerate(graph.nodes)}
        x = next(node for node in graph.nodes if node.op == "placeholder")
        found = match(values.aliases(x, order), order)
        (result,) = graph.output_node().all_input_nodes
    except Exception as error:  # another library's norm
        raise ConfigError(
            f"{where} is a {type(norm).__name__} that cannot be traced: {error}; use qk_norm='gather'"
        ) from error
    known = isinstance(found, NormForm) and found.exact and isinstance(found.flavour, Flavour)
    if known and result in values.aliases(found.out, order):
        return Steps(found.flavour, found.eps)
    why = getattr(found, "detail", "its result is not that of an RMSNorm")
    raise ConfigError(
        f"{where} is a {type(norm).__name__}, which cannot be computed from sums of squares over ranks: {why}. "
        "Use qk_norm='gather'"
    )


def install(attention: nn.Module, norms: Sequence[WideNorm], group: str, size: int) -> None:
    """Let an attention of which this rank has some heads norm q and k over all heads.

    Args:
        attention: its projections are cut; with ``reduce`` the norms' weights as well.
        norms: of this layer.
        group: torch's name of the group over which attention is cut; ``size`` is its number of ranks.
    """
    whole = attention.forward.__func__  # type: ignore[attr-defined]
    together = _reduced if norms[0].steps is not None else _gathered

    def forward(attention: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        made = [getattr(attention, norm.projection)(hidden_states) for norm in norms]
        normed = together(attention, norms, made, group, size)
        return whole(_Prepared(attention, norms, made, normed), hidden_states, *args, **kwargs)

    attention.forward = MethodType(forward, attention)  # type: ignore[method-assign]


def check_forward(attention: nn.Module, where: str) -> None:
    """Raise a ConfigError where somebody replaced the forward of an attention by something that is no method of it."""
    if getattr(attention.forward, "__self__", None) is not attention or not hasattr(attention.forward, "__func__"):
        raise ConfigError(
            f"{where} norms q and k over all heads, and its forward was replaced by {attention.forward!r}; parallelize first "
            "and replace it after"
        )


class _Prepared:
    """An attention whose projections and norms of q and k give what has been computed; all else is the attention's own.

    Both norms take one collective, so both have to be known before the first of them is called.
    """

    def __init__(self, attention: nn.Module, norms: Sequence[WideNorm], made: list[Tensor], normed: list[Tensor]):
        self._attention = attention
        self._given = {norm.projection: _always(x) for norm, x in zip(norms, made, strict=True)}
        self._given.update({norm.norm: _always(x) for norm, x in zip(norms, normed, strict=True)})

    def __getattr__(self, name: str) -> Any:
        return self._given[name] if name in self._given else getattr(self._attention, name)


def _always(x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: x


def _gathered(
    attention: nn.Module, norms: Sequence[WideNorm], made: list[Tensor], group: str, size: int
) -> list[Tensor]:
    """Each of ``made``, (..., own columns), normed over the columns of all ranks. One all-gather."""
    message = torch.cat(made, dim=-1)
    width = message.shape[-1]
    everything = c10d.wait_tensor(c10d.all_gather_into_tensor(message.reshape(-1, width), size, group))
    parts = everything.view(size, -1, width).split([x.shape[-1] for x in made], dim=-1)
    found = []
    for norm, x, part in zip(norms, made, parts, strict=True):
        row = part[:: norm.copies].transpose(0, 1).reshape(*x.shape[:-1], -1)
        normed = getattr(attention, norm.norm)(row.to(x.dtype))
        found.append(normed[..., norm.own.start : norm.own.stop])
    return found


def _reduced(
    attention: nn.Module, norms: Sequence[WideNorm], made: list[Tensor], group: str, size: int
) -> list[Tensor]:
    """Each of ``made``, (..., own columns), normed over the columns of all ranks. One all-reduce of (..., norms) in fp32."""
    total = c10d.wait_tensor(c10d.all_reduce(square_sums(made), "sum", group))
    found = []
    for number, (norm, x) in enumerate(zip(norms, made, strict=True)):
        assert norm.steps is not None
        # Columns that several ranks hold are counted by all of them, and all columns by equally many: the mean stays.
        mean = total[..., number : number + 1] / (x.shape[-1] * size)
        found.append(norm_by_mean(x, mean, getattr(getattr(attention, norm.norm), "weight", None), norm.steps))
    return found


def square_sums(made: Sequence[Tensor]) -> Tensor:
    """The sums of squares of several values (..., columns) over their columns: (..., values), fp32 or wider."""
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in made]
    return torch.cat([(x * x).sum(-1, keepdim=True) for x in wide], dim=-1)


def norm_by_mean(x: Tensor, mean: Tensor, weight: Tensor | None, steps: Steps) -> Tensor:
    """An RMSNorm of columns ``x`` (..., H) of rows whose squares have this mean (..., 1), in the norm's own rounding order."""
    compute = torch.float32 if steps.flavour.compute == "float32" else x.dtype
    return scaled_by_mean(x.to(compute), mean.to(compute), weight, steps.eps, steps.flavour, x.dtype)
