"""What one rank keeps of a weight, as ranges: the same for a tensor in memory and for a file that is read in slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """The part of a weight that one rank keeps.

    Attributes:
        ranges: dimension -> the ranges that are kept of it, ascending. Every other dimension stays whole.
        zeros: the values become zeros, so that a sum over ranks counts them once.
    """

    ranges: Mapping[int, tuple[range, ...]]
    zeros: bool = False

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of what is kept of a weight of shape ``whole``."""
        return tuple(sum(map(len, self._of(dim, size))) for dim, size in enumerate(whole))

    def take(self, source: Any, whole: Sequence[int]) -> Tensor:
        """The rank's part, contiguous and in memory of its own, so that the whole weight can be freed.

        Args:
            source: a tensor, or an object that returns a tensor when it is indexed by slices, as safetensors' ``get_slice``
                does. Of such an object only what is kept is read.
            whole: its shape.
        """
        kept = _read(source, [self._of(dim, size) for dim, size in enumerate(whole)], ())
        if self.zeros:
            return torch.zeros_like(kept, memory_format=torch.contiguous_format)
        return kept.clone(memory_format=torch.contiguous_format)

    def _of(self, dim: int, size: int) -> tuple[range, ...]:
        return self.ranges.get(dim, (range(size),))


WHOLE = Cut({})


def _read(source: Any, ranges: Sequence[tuple[range, ...]], index: tuple[slice, ...]) -> Tensor:
    dim = len(index)
    if dim == len(ranges):
        where: tuple[slice, ...] | EllipsisType = index or ...
        return source[where]
    parts = [_read(source, ranges, (*index, slice(r.start, r.stop))) for r in ranges[dim]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
