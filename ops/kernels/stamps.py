"""Times of a kernel's stages, for ``benchmarks/stages.py``: compiled in only where a variant asks for them."""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from . import state as at

MAX_PROGRAMS: tl.constexpr = tl.constexpr(at.MAX_PROGRAMS)
STAMPS: tl.constexpr = tl.constexpr(at.STAMPS)


@triton.jit
def now(S: tl.constexpr):
    """Nanoseconds of the GPU's clock, as the first warp sees it; 0 unless the variant keeps stamps."""
    if S.stamps:
        return tl.extra.cuda.globaltimer()
    else:
        return tl.full((), 0, tl.int64)


@triton.jit
def keep_stamps(state, phase, times, S: tl.constexpr):
    """Leave ``times``, see ``state.STAMP_NAMES``, behind the state."""
    if S.stamps:
        place = state.to(tl.pointer_type(tl.int64)) + STAMPS + (phase * MAX_PROGRAMS + tl.program_id(0)) * 8
        for i in tl.static_range(len(times)):
            tl.store(place + i, times[i])
