"""Flavours: where an RMSNorm casts and rounds.

Two implementations of ``s * g(w) / sqrt(mean(s**2) + eps)`` mean the same and still give different bits: one rounds the
normalized value to bf16 before it multiplies by the weight (Llama), another multiplies in fp32 and rounds once (OLMo2).
A :class:`Flavour` records those choices, so that the fused op can repeat the model's own rounding order. It is the one
vocabulary that the pass, the reference and the kernels share, and it travels through the op's schema as a string.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache

COMPUTE = ("float32", "input")
MEAN = ("mean", "sum")
ROOT = ("rsqrt", "div_sqrt", "mul_recip_sqrt", "pow")
NORMED = ("float32", "input")
GAIN = ("none", "weight", "one_plus_weight")
GAIN_DTYPE = ("own", "float32", "input")
OUT = ("input", "promoted", "float32")
READS = ("rounded", "unrounded")


@dataclass(frozen=True)
class Flavour:
    """The rounding order of one RMSNorm. ``input`` always means the dtype of the sum over ranks, which the residual has too.

    Attributes:
        compute: dtype in which the square, mean, root and normalized value are computed. ``"input"`` rounds after
            every step, as eager mode does.
        mean: ``"mean"`` is one ``mean(-1)``; ``"sum"`` is ``sum(-1) / H``.
        root: ``"rsqrt"``: ``c * rsqrt(v)``; ``"div_sqrt"``: ``c / sqrt(v)``; ``"mul_recip_sqrt"``: ``c * (1 / sqrt(v))``;
            ``"pow"``: ``c * v ** -0.5``, where ``c`` is ``h`` in the compute dtype and ``v`` is ``mean + eps``.
        normed: dtype to which ``c / sqrt(v)`` is rounded before the gain is multiplied in.
        gain: ``"none"``, ``"weight"`` (Llama) or ``"one_plus_weight"`` (Gemma).
        gain_dtype: dtype to which the weight is cast before it is used (and before 1 is added): ``"own"`` is no cast.
        out: dtype of the result: ``"input"``, ``"float32"``, or ``"promoted"``: whatever multiplying the normalized
            value by the gain gives, with no cast after it.
        reads: what is normalized where a residual is added: ``"rounded"``: the residual sum as the residual keeps it;
            ``"unrounded"``: sum and residual are added in fp32, and the norm reads that value before it is rounded for the
            residual (vLLM, SGLang). Without a residual, and in fp32 and fp64, the two are the same.
    """

    compute: str = "float32"
    mean: str = "mean"
    root: str = "rsqrt"
    normed: str = "input"
    gain: str = "weight"
    gain_dtype: str = "own"
    out: str = "promoted"
    reads: str = "rounded"

    def __post_init__(self) -> None:
        for name, valid in _VALID.items():
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(f"flavour {name}={value!r} is not valid; valid values are {', '.join(valid)}")
        if self.reads == "unrounded" and self.compute != "float32":
            raise ValueError(
                f"flavour reads='unrounded' with compute={self.compute!r}: the unrounded sum is fp32, so the norm computes in "
                "fp32; use compute='float32', or reads='rounded'"
            )

    def __str__(self) -> str:
        """All fields; the last one only where it says ``unrounded``, so that texts of older versions stay what they are."""
        parts = [getattr(self, f.name) for f in fields(self)]
        return "/".join(parts if self.reads == "unrounded" else parts[:-1])

    @classmethod
    def parse(cls, text: str) -> Flavour:
        """The flavour that ``str(flavour)`` wrote, or that :data:`NAMED` has under this name.

        Raises ``ValueError`` naming the field that is wrong.
        """
        return _parse(text)

    def describe(self) -> str:
        """The rounding order in words, for reports."""
        compute = "fp32" if self.compute == "float32" else "the input dtype"
        gain = {"none": "no weight", "weight": "weight", "one_plus_weight": "1 + weight"}[self.gain]
        start = "read the sum before it is rounded; normalize" if self.reads == "unrounded" else "normalize"
        if self.gain == "none":
            return f"{start} in {compute}; {gain}"
        if self.normed == "input" and self.compute == "float32":
            order = f"round to the input dtype, then multiply by {gain}"
        else:
            order = f"multiply by {gain} in {compute}, then round"
        return f"{start} in {compute} ({self.mean}, {self.root}); {order}"


_VALID = {
    "compute": COMPUTE,
    "mean": MEAN,
    "root": ROOT,
    "normed": NORMED,
    "gain": GAIN,
    "gain_dtype": GAIN_DTYPE,
    "out": OUT,
    "reads": READS,
}


@lru_cache(maxsize=256)
def _parse(text: str) -> Flavour:
    if text.lower() in NAMED:
        return NAMED[text.lower()]
    parts = text.split("/")
    names = [f.name for f in fields(Flavour)]
    if len(parts) not in (len(names) - 1, len(names)):
        raise ValueError(
            f"flavour {text!r} is none of {', '.join(NAMED)}, and has {len(parts)} fields; expected {len(names) - 1} or "
            f"{len(names)}: {'/'.join(names)}"
        )
    return Flavour(**dict(zip(names, parts, strict=False)))


# The spellings that most models use, named after the model that made each one common.
LLAMA = Flavour()  # Llama, Mistral, Qwen2, Qwen3, ...: round to the input dtype, then multiply
GEMMA = Flavour(normed="float32", gain="one_plus_weight", gain_dtype="float32", out="input")
OLMO2 = Flavour(normed="float32", gain="weight", gain_dtype="own", out="input")
GEMMA4 = Flavour(root="pow", normed="float32", gain="weight", gain_dtype="float32", out="input")
WEIGHTLESS = Flavour(gain="none", normed="input", out="promoted")
ALL_IN_INPUT_DTYPE = Flavour(compute="input")
VLLM = replace(LLAMA, reads="unrounded")  # vLLM's and nano-vllm's own norms
SGLANG = replace(OLMO2, reads="unrounded")  # SGLang's RMSNorm, FlashInfer's kernel
NAMED: dict[str, Flavour] = {
    "llama": LLAMA,
    "gemma": GEMMA,
    "olmo2": OLMO2,
    "gemma4": GEMMA4,
    "weightless": WEIGHTLESS,
    "input-dtype": ALL_IN_INPUT_DTYPE,
    "vllm": VLLM,
    "sglang": SGLANG,
}
