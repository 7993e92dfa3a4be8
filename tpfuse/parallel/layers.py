"""Decoder layers that follow a plan: the boundary's steps around the model's own norms, attention and MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

from torch import Tensor, nn

from .architecture import Architecture
from .config import ConfigError
from .groups import Groups
from .layout import Boundary, Op, Plan, Step
from .steps import Batch, BoundStep, bind, run

BATCH = "tpfuse_batch"  # keyword through which the model hands a forward's Batch to its layers


def install(layer: nn.Module, number: int, plan: Plan, names: Architecture, groups: Groups) -> None:
    """Replace the forward of one decoder layer. Its submodules stay as they are and are called as before."""
    enter, middle, leave = plan.boundaries[2 * number : 2 * number + 3]
    forward = layer_forward(number, names, _bound(enter, groups), _bound(middle, groups), _bound(leave, groups))
    # A method, which finds its submodules by name on the layer: graphs then know them as layers.0.self_attn and so on.
    layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]


class BoundBoundary:
    """A boundary's steps before and after its norm, bound to this rank's groups."""

    def __init__(self, before_norm: tuple[BoundStep, ...], after_norm: tuple[BoundStep, ...]):
        self.before_norm = before_norm
        self.after_norm = after_norm


def _bound(boundary: Boundary, groups: Groups) -> BoundBoundary:
    def all_of(steps: tuple[Step, ...]) -> tuple[BoundStep, ...]:
        return tuple(bind(step, groups) for step in steps)

    before, after = all_of(boundary.before_norm), all_of(boundary.after_norm)
    if any(step.op is Op.GATHER_BLOCKS for step in after):
        before = tuple(replace(step, blocks_meet=True) for step in before)
    return BoundBoundary(before, after)


def layer_forward(
    number: int, names: Architecture, enter: BoundBoundary, middle: BoundBoundary, leave: BoundBoundary
) -> Callable[..., Tensor]:
    """The forward method of a decoder layer.

    It takes and returns the residual, in the layout that the plan gives it, and does the part of the last boundary that
    comes before the norm: that norm belongs to the next layer.
    """

    def forward(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch: Batch | None = kwargs.pop(BATCH, None)
        if batch is None:
            raise ConfigError(
                f"layer {number} was called by itself: the layers of a model that parallelize cut hand each other rows in the "
                "layout of its plan. Call the model, or the module that runs its layers"
            )
        residual = hidden_states
        y = getattr(layer, names.attention_norm)(residual) if names.attention_norm else residual
        y, residual = run(enter.after_norm, y, residual, batch)
        if batch.rows > 0:  # a replica without rows has nothing to attend to, but its MLP may work for the others
            y = _first(getattr(layer, names.attention)(y, *args, **kwargs))
        y, residual = run(middle.before_norm, y, residual, batch, _before_add(layer, names, names.attention_post_norm))
        y = getattr(layer, names.mlp_norm)(residual) if names.mlp_norm else residual
        y, residual = run(middle.after_norm, y, residual, batch)
        y = _first(getattr(layer, names.mlp)(y))
        _, residual = run(leave.before_norm, y, residual, batch, _before_add(layer, names, names.mlp_post_norm))
        return residual

    return forward


def _before_add(layer: nn.Module, names: Architecture, norm: str) -> Callable[[Tensor], Tensor] | None:
    """What a layer does with a sublayer's whole sum before it adds it to the residual; None where it does nothing."""
    if names.residual_scale:
        scale = getattr(layer, names.residual_scale)
        return lambda y: (getattr(layer, norm)(y) if norm else y) * scale
    return getattr(layer, norm) if norm else None


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
