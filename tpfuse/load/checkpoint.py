"""The files of a checkpoint, opened so that a rank can read parts of their tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import transformers_compat as compat
from .pieces import Mapped, Stored


class _InFile:
    """One tensor of a safetensors file.

    The file is opened for each read: what is read through a memory map counts as memory of the process as long as it is open,
    and a rank would end with its share twice.
    """

    def __init__(self, file: str, name: str, shape: list[int], dtype: str):
        self.file, self.name, self.shape, self.dtype = file, name, shape, dtype

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> Tensor:
        with _open(self.file) as opened:
            return opened.get_slice(self.name)[index]


def _open(file: str) -> Any:
    from safetensors import safe_open

    return safe_open(file, framework="pt")


def open_files(files: Sequence[str], weights_only: bool) -> dict[str, Stored]:
    """Every tensor of a checkpoint, by name, not read.

    Args:
        files: safetensors files, or pickled ones, which are memory-mapped where their format allows it.
        weights_only: for pickled files, as in ``torch.load``.
    """
    if not files[0].endswith(".safetensors"):
        return {name: Mapped(tensor) for name, tensor in compat.whole_files(files, weights_only).items()}
    found: dict[str, Stored] = {}
    for file in files:
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict: it cannot be iterated
                tensor = opened.get_slice(name)
                found[name] = _InFile(file, name, tensor.get_shape(), tensor.get_dtype())
    return found


def size_of(files: Sequence[str]) -> int:
    """Bytes of all files."""
    return sum(os.path.getsize(file) for file in files)
