"""Quantizers: how normed rows become fp8 values and scales, and where that rounds.

Two implementations of "divide by the largest value of the row" mean the same and still give different bytes: torchao derives the
scale in bf16 and divides by it, vLLM derives it in fp32 and multiplies by its reciprocal. A :class:`Quantizer` records those
choices, as a :class:`tpfuse.ops.Flavour` records those of a norm, and travels through the op's schema as text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache

import torch

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
GRANULARITY = ("tensor", "token", "group128")
LAYOUT = ("row", "column", "ue8m0")
COMPUTE = ("input", "float32")
FLOOR_AT = ("amax", "scale", "rounded")
DERIVE = ("div", "mul_recip", "inverse", "inverse_recip")
INVERSE = DERIVE[2:]  # what gives the reciprocal of the scale
POWER_OF_TWO = ("none", "log2", "bits")
APPLY = ("div", "mul_recip", "mul")
APPLY_IN = ("float32", "input")
RETURNED = ("scale", "reciprocal")
SATURATE = ("clamp", "none")
GROUP = 128  # columns of a group


@dataclass(frozen=True)
class Quantizer:
    """The arithmetic of one fp8 quantization. ``input`` always means the dtype of the normed rows.

    The *scale* is what a quantized value is multiplied by to get the value back: the largest absolute value (*amax*) of a row or
    group over the largest of the fp8 dtype (``max``: 448 or 57344).

    Attributes:
        dtype: ``"e4m3"`` (``torch.float8_e4m3fn``) or ``"e5m2"`` (``torch.float8_e5m2``).
        granularity: ``"tensor"``: one static scale, given; ``"token"``: one a row; ``"group128"``: one for each 128 columns of
            a row, the last of which may have fewer.
        layout: of the scales. ``"row"``: row-major fp32; ``"column"``: column-major fp32, a column every ``ceil(rows / 4) * 4``
            values, as TMA wants it; ``"ue8m0"``: four exponents of powers of two an int32, column-major likewise (DeepGEMM).
        compute: dtype in which amax is bounded and the scale derived. ``"input"`` rounds the scale to the input dtype.
        floor: lower bound; 0 is none, and a row of zeros then has the scale 0 and is 0 / 0, as in the model.
        floor_at: what is bounded: ``"amax"``, ``"scale"`` (before it becomes a power of two) or ``"rounded"`` (after).
        derive: ``"div"``: ``amax / max``; ``"mul_recip"``: ``amax * (1 / max)``; ``"inverse"``: ``max / amax``, which is the
            reciprocal of the scale; ``"inverse_recip"``: ``(1 / amax) * max``, which is what torch makes of a Python number
            divided by a tensor.
        power_of_two: ``"none"``; ``"log2"``: the scale becomes ``exp2(ceil(log2(scale)))``, where ``log2`` rounds, so that a
            scale just above a power of two becomes that power; ``"bits"``: the next power of two that is not below it.
        apply: ``"div"``: ``x / scale``; ``"mul_recip"``: ``x * (1 / scale)``; ``"mul"``: ``x`` times the reciprocal as derived
            or, with a static scale, as given.
        apply_in: dtype to which that is rounded before it is clamped and cast.
        returned: ``"scale"``, or ``"reciprocal"``: what the op returns beside the quantized rows.
        saturate: ``"clamp"``: values beyond ``max`` become ``max``; ``"none"``: they become what torch's cast makes of them:
            infinity in e5m2, and in e4m3 ``max`` or NaN, depending on the version of torch.
    """

    dtype: str = "e4m3"
    granularity: str = "token"
    layout: str = "row"
    compute: str = "float32"
    floor: float = 0.0
    floor_at: str = "amax"
    derive: str = "div"
    power_of_two: str = "none"
    apply: str = "div"
    apply_in: str = "float32"
    returned: str = "scale"
    saturate: str = "clamp"

    def __post_init__(self) -> None:
        for name, valid in _VALID.items():
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(f"quantizer {name}={value!r} is not valid; valid values are {', '.join(valid)}")
        if not isinstance(self.floor, (int, float)) or not 0 <= self.floor < math.inf:
            raise ValueError(f"quantizer floor={self.floor!r} is not valid; expected a number of at least 0")
        object.__setattr__(self, "floor", float(self.floor))
        for wrong, message in _contradictions(self):
            if wrong:
                raise ValueError(f"quantizer {message}")

        # Written here and not in __str__: Dynamo makes a symbol of a float that it reads.
        values = (getattr(self, f.name) for f in fields(self))
        object.__setattr__(self, "_text", "/".join(repr(v) if isinstance(v, float) else v for v in values))

    def __str__(self) -> str:
        return self._text  # type: ignore[attr-defined,no-any-return]

    @classmethod
    def parse(cls, text: str) -> Quantizer:
        """The quantizer that ``str(quantizer)`` wrote, or that :data:`NAMED` has under this name.

        Raises ``ValueError`` naming the field that is wrong.
        """
        return _parse(text)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the quantized rows."""
        return DTYPES[self.dtype]

    @property
    def largest(self) -> float:
        """The largest value of the dtype."""
        return float(torch.finfo(self.torch_dtype).max)

    def describe(self) -> str:
        """The arithmetic in words, for reports."""
        apply = {"div": "x / scale", "mul_recip": "x * (1 / scale)", "mul": "x * (1 / scale) as given"}[self.apply]
        end = ("" if self.apply_in == "float32" else ", rounded to the input dtype") + (
            ", clamped" if self.saturate == "clamp" else ", not clamped"
        )
        if self.granularity == "tensor":
            return f"fp8 {self.dtype}, one static scale: {apply}{end}"
        per = "row" if self.granularity == "token" else f"{GROUP} columns"
        top = f"{self.largest:g}"
        scale = {"div": f"amax / {top}", "mul_recip": f"amax * (1 / {top})", "inverse": f"1 / ({top} / amax)",
                 "inverse_recip": f"1 / ((1 / amax) * {top})"}[self.derive]  # fmt: skip
        where = "fp32" if self.compute == "float32" else "the input dtype"
        if self.power_of_two != "none":
            scale += ", rounded up to a power of two" + (" by log2" if self.power_of_two == "log2" else "")
        bound = f", {self.floor_at.replace('rounded', 'rounded scale')} at least {self.floor:g}" if self.floor else ""
        stored = {"row": "row-major", "column": "column-major", "ue8m0": "packed ue8m0"}[self.layout]
        what = "scales" if self.returned == "scale" else "reciprocal scales"
        apply = apply.replace("as given", "as derived")
        return f"fp8 {self.dtype}, a scale per {per} = {scale} in {where}{bound}; {apply}{end}; {stored} {what}"


_VALID = {
    "dtype": tuple(DTYPES),
    "granularity": GRANULARITY,
    "layout": LAYOUT,
    "compute": COMPUTE,
    "floor_at": FLOOR_AT,
    "derive": DERIVE,
    "power_of_two": POWER_OF_TWO,
    "apply": APPLY,
    "apply_in": APPLY_IN,
    "returned": RETURNED,
    "saturate": SATURATE,
}
_OF_THE_SCALE = ("compute", "floor", "floor_at", "derive", "power_of_two", "returned")


def _contradictions(q: Quantizer) -> tuple[tuple[bool, str], ...]:
    """Fields that do not go together: (whether they are there, what to say)."""
    derived = [f.name for f in fields(q) if f.name in _OF_THE_SCALE and getattr(q, f.name) != f.default]
    static = q.granularity == "tensor"
    return (
        (
            static and bool(derived),
            f"granularity='tensor' takes a static scale, so nothing is derived: leave {', '.join(derived)} at the default",
        ),
        (
            q.layout != "row" and q.granularity != "group128",
            f"layout={q.layout!r} with granularity={q.granularity!r}: only scales of groups have such a layout; use "
            "layout='row' or granularity='group128'",
        ),
        (
            q.layout == "ue8m0" and (q.power_of_two == "none" or q.returned != "scale" or q.floor_at == "rounded"),
            "layout='ue8m0' packs powers of two: use power_of_two='log2' or 'bits', returned='scale' and floor_at='amax' or "
            "'scale'",
        ),
        (
            q.floor_at != "amax" and not q.floor,
            f"floor_at={q.floor_at!r} with floor=0: nothing is bounded; leave floor_at at 'amax'",
        ),
        (
            q.floor_at == "rounded" and q.power_of_two == "none",
            "floor_at='rounded' without a power_of_two: use floor_at='scale'",
        ),
        (
            not static and (q.derive in INVERSE) != (q.apply == "mul"),
            f"derive={q.derive!r} with apply={q.apply!r}: {' and '.join(INVERSE)} derive the factor that 'mul' multiplies by; "
            "use one with the other or neither",
        ),
        (
            q.derive in INVERSE and (q.power_of_two != "none" or q.floor_at != "amax"),
            f"derive={q.derive!r} goes with power_of_two='none' and floor_at='amax'",
        ),
    )


@lru_cache(maxsize=256)
def _parse(text: str) -> Quantizer:
    if text.lower() in NAMED:
        return NAMED[text.lower()]
    parts = text.split("/")
    names = [f.name for f in fields(Quantizer)]
    if len(parts) != len(names):
        raise ValueError(
            f"quantizer {text!r} is none of {', '.join(NAMED)}, and has {len(parts)} fields; expected {len(names)}: "
            f"{'/'.join(names)}, as str(quantizer) writes them"
        )
    given = dict(zip(names, parts, strict=True))
    try:
        floor = float(given.pop("floor"))
    except ValueError:
        raise ValueError(f"quantizer {text!r}: floor is not a number") from None
    return Quantizer(floor=floor, **given)


VLLM_FLOOR = 1.0 / (448.0 * 512.0)

# The arithmetic of the libraries that most checkpoints run with, each with where it is written down.

TORCHAO_STATIC = Quantizer(granularity="tensor")
"""torchao 0.18, ``_quantize_affine_float8`` with a calibrated scale: ``(x.float() / scale).clamp().to(fp8)``."""

TORCHAO_ROWWISE = Quantizer(compute="input")
"""torchao 0.18, ``Float8Tensor.from_hp`` with ``PerRow()`` and torch's kernel: ``_choose_scale_float8`` divides amax by ``max``
in the input dtype, ``_quantize_affine_float8`` divides in fp32. (Its per-tensor dynamic scale is the amax of all rows, which no
program that norms one row can know: it has no quantizer.)"""

VLLM_STATIC = Quantizer(granularity="tensor", apply="mul_recip")
"""vLLM, ``QuantFP8.forward_native`` with a static scale, and its ``scaled_fp8_quant`` kernel: ``x.float() * (1 / scale)``."""

VLLM_TOKEN = Quantizer(floor=VLLM_FLOOR, floor_at="scale", apply="mul_recip")
"""vLLM, ``QuantFP8.forward_native`` per token: ``scale = (amax.float() / 448).clamp(min=1 / (448 * 512))``."""

VLLM_GROUP128 = Quantizer(granularity="group128", floor=VLLM_FLOOR, floor_at="scale")
"""vLLM, ``QuantFP8._quantize_group_native`` with fp32 scales; pads the last group with zeros."""

VLLM_GROUP128_KERNEL = Quantizer(granularity="group128", floor=1e-10, derive="mul_recip")
"""vLLM's and SGLang's Triton kernel ``_per_token_group_quant_fp8``: ``max(amax, 1e-10) * (1 / 448)``."""

DEEPGEMM_UE8M0 = Quantizer(granularity="group128", layout="ue8m0", floor=1e-10, derive="mul_recip", power_of_two="log2")
"""The same with scales that are powers of two, ``exp2(ceil(log2(scale)))``, four of them packed for DeepGEMM."""

DEEPSEEK_GROUP128 = Quantizer(granularity="group128")
"""DeepSeek-V3, ``inference/kernel.py``, ``act_quant``: ``s = max(abs(x)) / 448``, ``x / s``; no floor, so a group of zeros is
NaN. It does not clamp, but ``x / s`` rounds to 448 at most, and the clamp changes nothing."""

DEEPSEEK_UE8M0 = Quantizer(granularity="group128", floor=1e-4, derive="mul_recip", power_of_two="bits")
"""DeepSeek-V3.2, ``inference/kernel.py``, ``act_quant`` with ``round_scale``: ``max(amax, 1e-4) * (1 / 448)``, then
``fast_round_scale``, which reads the exponent from the bits. fp32 scales."""

TRANSFORMERS_FP8LINEAR = DEEPSEEK_GROUP128
"""transformers, ``FP8Linear`` with a dynamic activation scheme: DeepSeek's ``act_quant``. Where the Hub's kernel quantizes inside
its matrix product there is nothing in the graph to fuse."""

FBGEMM_TOKEN = Quantizer(floor=1e-12, derive="inverse", apply="mul")
"""FBGEMM, ``_kernel_quantize_fp8_row`` without ``scale_ub``: ``r = 448 / max(amax, 1e-12)``, ``x * r``, returns ``1 / r``."""

COMPRESSED_TENSORS_TOKEN = Quantizer(
    compute="input", floor=float(torch.finfo(torch.float32).eps), floor_at="scale", apply_in="input"
)
"""compressed-tensors, ``calculate_qparams`` and ``quantize`` with the token strategy: everything in the input dtype. (In 0.20 it
has no lower bound, and puts the eps of its dtype in the place of a scale of 0: that has no quantizer.)"""

NAMED: dict[str, Quantizer] = {
    "torchao-static": TORCHAO_STATIC,
    "torchao-rowwise": TORCHAO_ROWWISE,
    "vllm-static": VLLM_STATIC,
    "vllm-token": VLLM_TOKEN,
    "vllm-group128": VLLM_GROUP128,
    "vllm-group128-kernel": VLLM_GROUP128_KERNEL,
    "deepgemm-ue8m0": DEEPGEMM_UE8M0,
    "deepseek-group128": DEEPSEEK_GROUP128,
    "deepseek-ue8m0": DEEPSEEK_UE8M0,
    "fbgemm-token": FBGEMM_TOKEN,
    "compressed-tensors-token": COMPRESSED_TENSORS_TOKEN,
}
