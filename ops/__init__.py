"""The fused op: schema, exact reference, selection, symmetric memory and kernels."""

from . import environment
from .dispatch import forget, raise_if_failed, reset
from .flavour import GEMMA, GEMMA4, LLAMA, OLMO2, WEIGHTLESS, Flavour
from .invariant import batch_invariant, set_batch_invariant
from .op import all_reduce_add_rms_norm
from .plane import GroupPath, describe_path, stream_class
from .select import Selection, select

__all__ = [
    "GEMMA",
    "GEMMA4",
    "LLAMA",
    "OLMO2",
    "WEIGHTLESS",
    "Flavour",
    "GroupPath",
    "Selection",
    "all_reduce_add_rms_norm",
    "batch_invariant",
    "describe_path",
    "environment",
    "forget",
    "raise_if_failed",
    "reset",
    "select",
    "set_batch_invariant",
    "stream_class",
]
