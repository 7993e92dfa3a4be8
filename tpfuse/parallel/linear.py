"""How a linear layer is cut, with the adapters that peft may have put around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .config import ConfigError
from .cut import Cut

# What peft's LoRA layer holds beside its base layer, and that a plain LoRA leaves empty.
LORA = ("lora_A", "lora_B")
OTHER_ADAPTERS = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def is_lora(linear: nn.Module) -> bool:
    """Whether peft has put a LoRA adapter around a linear layer."""
    return hasattr(linear, "base_layer") and all(hasattr(linear, name) for name in LORA)


def check_plain(module: nn.Module, where: str, names: Sequence[str] = ("weight", "bias")) -> None:
    """Raise a ConfigError unless a module holds plain floating-point tensors under these names and nothing else.

    A quantized weight has packed values or scales of its own, which a cut by rows and columns would tear apart.
    """
    if hasattr(module, "base_layer"):
        _check_lora(module, where)
        return
    held: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    held.update(module.named_buffers(recurse=False))
    for name, value in held.items():
        plain = type(value) in (nn.Parameter, Tensor) and value.is_floating_point()
        if name not in names or not plain:
            raise ConfigError(
                f"{where} is a {type(module).__name__} whose {name} is {type(value).__name__} of {value.dtype}: only plain "
                f"floating-point {' and '.join(names)} can be cut. A quantized model is cut first and quantized after, see "
                "docs/models.md"
            )


def _check_lora(module: nn.Module, where: str) -> None:
    if not is_lora(module):
        raise ConfigError(
            f"{where} has an adapter of kind {type(module).__name__}; LoRA can be cut. Merge another one first "
            "(merge_and_unload)"
        )
    base: Any = module.base_layer
    check_plain(base, f"{where}.base_layer")
    used = [name for name in OTHER_ADAPTERS if len(getattr(module, name, ()))]
    variants = getattr(module, "lora_variant", None) or {}
    if used or any(variants.values()) or any(getattr(module, "use_dora", {}).values()):
        raise ConfigError(
            f"{where} has a LoRA variant ({', '.join(used) or 'DoRA or another'}) that is not a sum of products, so its parts "
            "cannot be summed over ranks; merge it first (merge_and_unload)"
        )


def linear_cuts(linear: nn.Module, kind: str, kept: tuple[range, ...], first: bool) -> Iterator[tuple[str, Cut]]:
    """The parameters of a linear layer that are cut, by name within it, and what this rank keeps of each.

    Args:
        linear: an ``nn.Linear``, or peft's LoRA around one.
        kind: ``column`` (split by output) or ``row`` (split by input).
        kept: the outputs or inputs of this rank, ascending.
        first: whether this rank is the first of the sum: a row's bias is added once.
    """
    lora = is_lora(linear)
    base: Any = linear.base_layer if lora else linear
    prefix = "base_layer." if lora else ""
    side = Cut({0 if kind == "column" else 1: kept})
    bias = Cut({0: kept}) if kind == "column" else Cut({}, zeros=not first)
    yield f"{prefix}weight", side
    if base.bias is not None:
        yield f"{prefix}bias", bias
    if not lora:
        return
    # y = W x + B (A x): outputs split B as they split W, inputs split A, and the partial sums of both are one sum.
    for name, adapter in linear.lora_B.named_children():  # type: ignore[union-attr, operator]
        if kind == "column":
            yield f"lora_B.{name}.weight", side
        if getattr(adapter, "bias", None) is not None:
            yield f"lora_B.{name}.bias", bias
    if kind == "row":
        for name, _ in linear.lora_A.named_children():  # type: ignore[union-attr, operator]
            yield f"lora_A.{name}.weight", side
