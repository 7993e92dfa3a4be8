"""What stands in for a checkpoint tensor while transformers loads: asked for everything, it gives this rank's part."""

from __future__ import annotations

from types import EllipsisType
from typing import Any, Protocol

from torch import Tensor

from tpfuse.parallel.cut import Cut


class Stored(Protocol):
    """A tensor of a checkpoint that has not been read: safetensors' slice, or a memory-mapped tensor behind :class:`Mapped`."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: Any) -> Tensor: ...


class Mapped:
    """A tensor of a pickled checkpoint with the methods of safetensors' slices."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return str(self.tensor.dtype)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor[index]


class Meter:
    """Bytes that this rank has read. Threads may add at once: appending to a list is atomic."""

    def __init__(self) -> None:
        self._read: list[int] = []

    def add(self, tensor: Tensor) -> None:
        self._read.append(tensor.nbytes)

    @property
    def bytes(self) -> int:
        return sum(self._read)


class Piece:
    """This rank's part of one checkpoint tensor.

    Args:
        stored: the whole tensor.
        cut: what is kept of it.
        meter: counts what is read.
    """

    def __init__(self, stored: Stored, cut: Cut, meter: Meter):
        self.stored, self.cut, self.meter = stored, cut, meter

    def get_shape(self) -> list[int]:
        return list(self.cut.shape(self.stored.get_shape()))

    def get_dtype(self) -> str:
        return self.stored.get_dtype()

    def __getitem__(self, index: EllipsisType) -> Tensor:
        """Read it. transformers asks for ``[...]`` alone."""
        part = self.cut.take(self.stored, self.stored.get_shape())
        self.meter.add(part)
        return part[index]


class Deferred:
    """A checkpoint tensor that a conversion needs whole. It is read when the conversion runs, and not before.

    transformers reads ahead in threads; whole tensors read ahead would be the whole checkpoint.
    """

    def __init__(self, stored: Stored, meter: Meter):
        self.stored, self.meter = stored, meter
        self._to: dict[str, Any] = {}

    def get_shape(self) -> list[int]:
        return self.stored.get_shape()

    def get_dtype(self) -> str:
        return self.stored.get_dtype()

    def __getitem__(self, index: EllipsisType) -> Deferred:
        return self

    def to(self, device: Any = None, dtype: Any = None) -> Deferred:
        """Remember where the tensor is wanted, and in which dtype."""
        self._to = {"device": device, "dtype": dtype}
        return self

    def read(self) -> Tensor:
        whole = self.stored[...]
        self.meter.add(whole)
        return whole.to(**self._to) if self._to else whole
