"""Which quantizations a kernel can be compiled for, and its constants then."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from ..quantizer import GROUP, INVERSE, Quantizer
from .quant_facts import Quant
from .variant import Constants, torch_dtype

SMALLEST_NORMAL = float(torch.finfo(torch.float32).tiny)


@lru_cache(maxsize=2)
def overflow_of_the_cast(dtype: torch.dtype) -> int:
    """The code, without sign, that torch's cast makes of values that are too large: it depends on the version of torch."""
    return int(torch.tensor([1e30]).to(dtype).view(torch.uint8).item()) & 0x7F


def supports_quantizer(c: Constants, q: Quantizer) -> str | None:
    """None if the kernels can quantize what the norm of ``c`` gives with these bits, else why not. Pure."""
    narrow = torch_dtype(c.out_dtype) != torch.float32
    if q.power_of_two == "log2" and q.compute == "input" and narrow:
        return "log2 of the scale in 16 bits"
    if q.power_of_two == "log2" and q.floor / (q.largest if q.floor_at == "amax" else 1.0) < 2 * SMALLEST_NORMAL:
        return "log2 of a scale that may be denormal: no floor keeps it above"
    if 0.0 < q.floor < SMALLEST_NORMAL:
        return f"a floor of {q.floor:g}, which is denormal in fp32"
    return None


def quantized(c: Constants, q: Quantizer, keep_normed: bool, cvt: bool) -> Constants:
    """The constants of a kernel that quantizes; :func:`supports_quantizer` returned None.

    Args:
        cvt: the GPU converts fp32 to fp8 (sm_89 and newer).
    """
    out = torch_dtype(c.out_dtype)
    saturates = {"e4m3": 0x7E, "e5m2": 0x7B}[q.dtype]
    overflow = saturates if q.saturate == "clamp" else overflow_of_the_cast(q.torch_dtype)
    compute = out if q.compute == "input" else torch.float32
    return replace(
        c,
        quant=Quant(
            granularity=q.granularity,
            groups=-(-c.hidden // GROUP),
            layout=q.layout,
            rounds=compute != torch.float32,
            floor=float(torch.tensor(q.floor, dtype=compute)),
            floor_at=q.floor_at,
            derive=q.derive,
            inverts=q.derive in INVERSE,
            power_of_two=q.power_of_two,
            largest=q.largest,
            one_over_largest=float(torch.tensor(1.0 / q.largest, dtype=torch.float32)),
            # Multiplied by the reciprocal of a power of two, a value is what it is divided by that power.
            divides=q.apply == "div" and (q.power_of_two == "none" or q.floor_at == "rounded"),
            given_inverse=q.apply == "mul",
            rounds_values=q.apply_in == "input" and out != torch.float32,
            reciprocal=q.returned == "reciprocal",
            e5m2=q.dtype == "e5m2",
            overflow=overflow,
            cvt=cvt and overflow == saturates,
            keep_normed=keep_normed,
        ),
    )
