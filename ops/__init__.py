"""The fused op: schema, exact reference, selection, symmetric memory and kernels."""

from .flavour import GEMMA, GEMMA4, LLAMA, OLMO2, WEIGHTLESS, Flavour
from .op import all_reduce_add_rms_norm

__all__ = ["GEMMA", "GEMMA4", "LLAMA", "OLMO2", "WEIGHTLESS", "Flavour", "all_reduce_add_rms_norm"]
