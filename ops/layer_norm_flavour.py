"""Flavours of LayerNorm: how a model takes mean and variance, and where it casts and rounds.

What :mod:`.flavour` is for RMSNorm: ``(s - mean(s)) * g(w) / sqrt(var(s) + eps) + b`` means the same in torch's one operator,
in what a compiler makes of it and in a norm that a model spells out, and gives other bits in each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

from . import flavour as rms

MOMENTS = ("native", "var_mean", "squares")
SHIFT = ("none", "bias")


@dataclass(frozen=True)
class LayerNormFlavour:
    """The rounding order of one LayerNorm. ``input`` always means the dtype of the sum over ranks.

    Attributes:
        moments: ``"native"``: all of it is ``aten.native_layer_norm``; ``"var_mean"``: ``aten.var_mean`` gives mean and biased
            variance, the rest is spelled out (what Inductor makes of the operator); ``"squares"``: the variance is
            ``mean((c - mean(c)) ** 2)`` (Cohere).
        compute: dtype of the operand ``c``: ``"float32"`` casts ``h`` before anything is computed; ``"input"`` is no cast. The
            native operator takes its statistics in fp32 either way.
        root: what ``c - mean`` is scaled by, as in :class:`.Flavour`; ``"rsqrt"`` with ``moments="native"``.
        normed: dtype to which the normalized value is rounded before the gain is multiplied in.
        gain, gain_dtype: as in :class:`.Flavour`.
        shift: ``"none"`` or ``"bias"``: a vector is added behind the gain.
        out: as in :class:`.Flavour`; ``"promoted"`` is what the last step gives, with no cast after it.
    """

    moments: str = "native"
    compute: str = "input"
    root: str = "rsqrt"
    normed: str = "float32"
    gain: str = "weight"
    gain_dtype: str = "own"
    shift: str = "bias"
    out: str = "input"

    def __post_init__(self) -> None:
        for name, valid in _VALID.items():
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(
                    f"LayerNorm flavour {name}={value!r} is not valid; valid values are {', '.join(valid)}"
                )
        if self.moments == "native" and (self.root, self.normed, self.out) not in _NATIVE:
            raise ValueError(
                "LayerNorm flavour moments='native' is one operator with root='rsqrt' and normed='float32', whose result is of "
                f"the dtype of its operand; got root={self.root!r}, normed={self.normed!r}, out={self.out!r}"
            )
        if self.moments == "native" and self.compute == "input" and self.out == "float32":
            # It rounds its result to the dtype of its operand before the cast: a kernel that writes fp32 would not.
            raise ValueError(
                "LayerNorm flavour moments='native', compute='input' rounds to the input dtype, so out='float32' would be one "
                "more cast; use out='input' and cast the result"
            )

    def __str__(self) -> str:
        return "/".join(getattr(self, f.name) for f in fields(self))

    @classmethod
    def parse(cls, text: str) -> LayerNormFlavour:
        """The flavour that ``str(flavour)`` wrote, or that :data:`NAMED` has under this name.

        Raises ``ValueError`` naming the field that is wrong.
        """
        return _parse(text)

    @property
    def scaling(self) -> rms.Flavour:
        """The RMSNorm flavour that casts and rounds alike between statistics and shift."""
        compute = "float32" if self.moments == "native" else self.compute
        return rms.Flavour(compute, "mean", self.root, self.normed, self.gain, self.gain_dtype, self.out)

    def describe(self) -> str:
        """The rounding order in words, for reports."""
        gain = {"none": "no weight", "weight": "weight", "one_plus_weight": "1 + weight"}[self.gain]
        affine = f"{gain}, {'bias' if self.shift == 'bias' else 'no bias'}"
        if self.moments == "native":
            cast = " of the sum cast to fp32" if self.compute == "float32" else ""
            return f"LayerNorm by torch's operator{cast}; {affine}"
        compute = "fp32" if self.compute == "float32" else "the input dtype"
        how = "var_mean" if self.moments == "var_mean" else "mean of squared differences"
        where = (
            "round to the input dtype before" if self.normed == "input" and self.compute == "float32" else "round after"
        )
        return f"LayerNorm in {compute} ({how}, {self.root}); {affine}; {where} them"


_VALID = {
    "moments": MOMENTS,
    "compute": rms.COMPUTE,
    "root": rms.ROOT,
    "normed": rms.NORMED,
    "gain": rms.GAIN,
    "gain_dtype": rms.GAIN_DTYPE,
    "shift": SHIFT,
    "out": rms.OUT,
}
_NATIVE = {("rsqrt", "float32", out) for out in rms.OUT}


@lru_cache(maxsize=256)
def _parse(text: str) -> LayerNormFlavour:
    if text.lower() in NAMED:
        return NAMED[text.lower()]
    parts = text.split("/")
    names = [f.name for f in fields(LayerNormFlavour)]
    if len(parts) != len(names):
        raise ValueError(
            f"LayerNorm flavour {text!r} is none of {', '.join(NAMED)}, and has {len(parts)} fields; expected {len(names)}: "
            f"{'/'.join(names)}"
        )
    return LayerNormFlavour(**dict(zip(names, parts, strict=True)))


LAYER_NORM = LayerNormFlavour()  # torch.nn.LayerNorm: Starcoder2, GPT-NeoX, Phi
# Cohere, Cohere2: spelled out in fp32, no bias
COHERE = LayerNormFlavour(moments="squares", compute="float32", gain_dtype="float32", shift="none")
NEMOTRON = LayerNormFlavour(gain="one_plus_weight")  # the weight is kept as its distance from 1
OLMO = LayerNormFlavour(compute="float32", gain="none", shift="none")  # no weight and no bias
NAMED: dict[str, LayerNormFlavour] = {
    "layer_norm": LAYER_NORM,
    "cohere": COHERE,
    "nemotron": NEMOTRON,
    "olmo": OLMO,
}
