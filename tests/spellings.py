"""Every RMSNorm class of the installed transformers, and how to build one alone."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CLASS = re.compile(r"^class (\w*RMSNorm\w*)\(", re.MULTILINE)
T5_STYLE = re.compile(
    r"^class (\w*LayerNorm)\(nn\.Module\):(?:(?!^class ).)*?in the T5 style", re.MULTILINE | re.DOTALL
)
HIDDEN = 64
EPS = 1e-5


@dataclass(frozen=True)
class NormClass:
    """One RMSNorm class: ``llama.LlamaRMSNorm``. ``gated`` ones take a second tensor and are not plain norms."""

    model: str
    name: str
    cls: type
    gated: bool

    def __str__(self) -> str:
        return f"{self.model}.{self.name}"


def all_classes() -> list[NormClass]:
    """The classes that transformers' modeling files define themselves (imported ones are counted once, at home)."""
    import transformers

    root = Path(transformers.__file__).parent / "models"
    found = []
    for path in sorted(root.glob("*/modeling_*.py")):
        text = path.read_text()
        names = CLASS.findall(text) + T5_STYLE.findall(text)
        if not names:
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for name in names:
            cls = getattr(module, name)
            arguments = list(inspect.signature(cls.forward).parameters)[1:]
            found.append(NormClass(path.parent.name, name, cls, len(arguments) > 1))
    return found


def build(norm: NormClass, hidden: int = HIDDEN, eps: float = EPS) -> torch.nn.Module | None:
    """An instance with random weights, or None when it cannot be built from a width and an eps alone."""
    widths = {"hidden_size", "dim", "hidden_dim", "normalized_shape", "d", "input_size", "features", "embed_dim"}
    arguments: dict[str, Any] = {}
    for index, (name, parameter) in enumerate(list(inspect.signature(norm.cls.__init__).parameters.items())[1:]):
        if name in widths or (index == 0 and parameter.default is inspect.Parameter.empty):
            arguments[name] = hidden
        elif "eps" in name:
            arguments[name] = eps
    try:
        module = norm.cls(**arguments)
    except Exception:
        return None
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)
