"""Plain local parameters in the place of DTensors, for a model that transformers' tensor parallelism has loaded.

A DTensor parameter is unwrapped on every call of a compiled graph, which costs host time that a decode step has not got. After
:func:`localize` the modules hold this rank's share as an ordinary parameter and make their sums themselves. Checkpoints do not
change: ``state_dict`` and ``save_pretrained`` see DTensors again, and ``load_state_dict`` takes them.
"""

from __future__ import annotations

import types
import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tpfuse.hf_compat import drop_gradient_hooks, hook_of
from tpfuse.hf_styles import Unconvertible, conversion
from tpfuse.unfused import FusionWarning

# Attributes of a module that was converted.
WRAPPED, CUT = "tp_wrapped", "tp_cut"


@dataclass(frozen=True)
class Wrapped:
    """How a parameter was laid out as a DTensor."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, parameter: DTensor) -> Wrapped:
        return cls(parameter.device_mesh, tuple(parameter.placements), parameter.shape, tuple(parameter.stride()))

    def wrap(self, local: Tensor) -> DTensor:
        """A DTensor over the memory of a local share."""
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )

    def share(self, value: Tensor) -> Tensor:
        """This rank's share of a DTensor or of a whole tensor; anything else as it is."""
        if isinstance(value, DTensor):
            return value.redistribute(self.mesh, self.placements).to_local()
        if value.shape == self.shape:
            return distribute_tensor(value, self.mesh, self.placements, src_data_rank=None).to_local()
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapped:
        return self  # of a mesh there is one, and its groups cannot be copied


@torch.no_grad()
def localize(model: nn.Module) -> int:
    """Put plain local parameters in the place of a model's DTensors, in place. For inference.

    The new parameters share the DTensors' memory and need no gradient. Results are the same bit for bit. A module whose style
    or class is not known keeps what it has, and a warning names it; so does the whole model in training mode.

    Args:
        model: in eval mode; a model without DTensors is left as it is.
    Returns:
        The number of parameters that are plain now and were DTensors before.
    """
    owners = [(name, module) for name, module in model.named_modules() if _wrappers(module) or _is_hooked(module)]
    if not any(_wrappers(module) for _, module in owners):
        return 0
    if model.training:
        _warn(["the model is in training mode; call model.eval() before tpfuse.hf.compile"])
        return 0
    for module in model.modules():
        drop_gradient_hooks(module)  # of no use to parameters without gradients
    plain: dict[int, nn.Parameter] = {}
    left: dict[str, list[str]] = defaultdict(list)
    count = 0
    for name, module in owners:
        try:
            count += _convert(module, plain)
        except Unconvertible as reason:
            left[str(reason)].append(name or type(model).__name__)
    if left:
        _warn([f"{names[0]}{_more(names)}: {reason}" for reason, names in left.items()])
    return count


def _wrappers(module: nn.Module) -> dict[str, DTensor]:
    return {name: p for name, p in module.named_parameters(recurse=False) if isinstance(p, DTensor)}


def _is_hooked(module: nn.Module) -> bool:
    hook = hook_of(module)
    return hook is not None and hook.known


def _convert(module: nn.Module, plain: dict[int, nn.Parameter]) -> int:
    """Convert one module; ``plain`` keeps tied parameters tied. Raises :class:`Unconvertible` before it changes anything."""
    hook, wrapped = hook_of(module), _wrappers(module)
    if hook is None:
        raise Unconvertible("it has DTensor parameters and no hook of a parallel style")
    if any(p.device_mesh.ndim != 1 for p in wrapped.values()):
        raise Unconvertible("its parameters lie on a mesh of several dimensions")
    new = conversion(module, hook)
    records = {name: Wrapped.of(parameter) for name, parameter in wrapped.items()}
    for name, parameter in wrapped.items():
        if id(parameter) not in plain:
            plain[id(parameter)] = nn.Parameter(parameter.to_local().detach(), requires_grad=False)
        setattr(module, name, plain[id(parameter)])
    if not new.keep:
        del module.forward
        if new.cut is not None:
            setattr(module, CUT, new.cut)
        if new.forward is not None:
            # A bound method and no closure: a copy of the model computes with the copy's weights.
            module.forward = types.MethodType(new.forward, module)
    if records:
        setattr(module, WRAPPED, records)
        module.register_state_dict_post_hook(_wrap_saved)
        module.register_load_state_dict_pre_hook(_unwrap_loaded)
    return len(records)


def _wrap_saved(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """What ``state_dict`` returns: DTensors, as before the conversion."""
    for name, wrapped in getattr(module, WRAPPED).items():
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and not isinstance(value, DTensor):
            state_dict[prefix + name] = wrapped.wrap(value)


def _unwrap_loaded(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """What ``load_state_dict`` is given: DTensors, whole tensors, or shares of this rank."""
    for name, wrapped in getattr(module, WRAPPED).items():
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor):
            state_dict[prefix + name] = wrapped.share(value)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _warn(reasons: list[str]) -> None:
    warnings.warn(
        "tpfuse: DTensor parameters stay, which costs host time on every call of the compiled model; results are the same. "
        + "; ".join(reasons),
        FusionWarning,
        stacklevel=4,
    )
