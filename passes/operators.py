"""The operators that norms are made of, each by its kind: a new spelling of an operator goes into this table.

A new *kind* also needs its meaning (``symbolic.py``) and how it is run again (``replay.py``).
"""

from __future__ import annotations

import operator
from typing import Any

from . import values


def _kinds() -> dict[Any, str]:
    table = {
        "cast": values.CASTS,
        "same": values.IDENTITIES | values.RESHAPES,
        "pow": values.overloads("pow.Tensor_Scalar"),
        "square": values.overloads("square.default"),
        "mul": values.overloads("mul.Tensor", "mul.Scalar"),
        "div": values.overloads("div.Tensor", "div.Scalar"),
        "add": values.overloads("add.Tensor", "add.Scalar"),
        "sub": values.overloads("sub.Tensor", "sub.Scalar"),
        "rsqrt": values.overloads("rsqrt.default"),
        "sqrt": values.overloads("sqrt.default"),
        "reciprocal": values.overloads("reciprocal.default"),
        "mean": values.overloads("mean.dim"),
        "sum": values.overloads("sum.dim_IntList"),
        "norm2": values.overloads("linalg_vector_norm.default"),
        "variance": values.overloads("var_mean.correction", "var.correction"),
        "layer_norm": values.overloads("native_layer_norm.default"),
        "fused": values.overloads("_fused_rms_norm.default", "rms_norm.default"),
        "part": values.overloads("slice.Tensor", "narrow.default"),
        "item": frozenset({operator.getitem}),
    }
    return {op: kind for kind, ops in table.items() for op in ops}


KINDS = _kinds()
SLICES = values.overloads("slice.Tensor", "narrow.default")
REDUCTIONS = ("mean", "sum", "norm2", "variance", "layer_norm", "fused")
