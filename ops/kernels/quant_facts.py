"""What a kernel that quantizes is compiled for, beside the constants of the call."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quant:
    """Compile-time facts of a quantization; see :class:`tpfuse.ops.Quantizer` for the arithmetic.

    Attributes:
        granularity: ``"tensor"``, ``"token"`` or ``"group128"``.
        groups: scales of a row.
        layout, floor_at, derive, power_of_two: as in the quantizer.
        inverts: what is derived is the reciprocal of the scale.
        rounds: the scale is derived in a dtype of 16 bits: that of the normed rows.
        floor: rounded to the dtype that the scale is derived in.
        largest, one_over_largest: of the fp8 dtype, the latter rounded to fp32.
        divides: values are divided by the scale; else multiplied by its reciprocal.
        given_inverse: a static scale is the reciprocal already.
        rounds_values: scaled values are rounded to the dtype of the normed rows.
        reciprocal: the reciprocal of the scale is what is stored.
        e5m2, overflow: see :func:`.fp8.fp8_code`.
        cvt: the GPU converts by itself, which saturates.
        keep_normed: the normed rows are stored as well.
    """

    granularity: str
    groups: int
    layout: str
    rounds: bool
    floor: float
    floor_at: str
    derive: str
    inverts: bool
    power_of_two: str
    largest: float
    one_over_largest: float
    divides: bool
    given_inverse: bool
    rounds_values: bool
    reciprocal: bool
    e5m2: bool
    overflow: int
    cvt: bool
    keep_normed: bool
