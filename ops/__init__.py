"""The fused op: schema, exact reference, selection, symmetric memory and kernels."""

from . import settings
from .flavour import GEMMA, GEMMA4, LLAMA, OLMO2, SGLANG, VLLM, WEIGHTLESS, Flavour
from .gather_blocks import all_reduce_add_rms_norm_gather
from .gather_rows import reduce_rows_add_rms_norm_gather
from .invariant import set_batch_invariant
from .layer_norm import all_reduce_add_layer_norm
from .layer_norm_flavour import COHERE, LAYER_NORM, NEMOTRON, LayerNormFlavour
from .layer_norm_gather_blocks import all_reduce_add_layer_norm_gather
from .layer_norm_gather_rows import reduce_rows_add_layer_norm_gather
from .layer_norm_rows import reduce_rows_add_layer_norm
from .op import all_reduce_add_rms_norm
from .paths import GroupPath, describe_path, raise_if_failed, reset, stream_class
from .prepare import forget
from .quant import all_reduce_add_rms_norm_quant
from .quantizer import Quantizer
from .reduce_rows import reduce_rows_add_rms_norm
from .select import Selection, select
from .settings import batch_invariant

__all__ = [
    "COHERE",
    "GEMMA",
    "GEMMA4",
    "LAYER_NORM",
    "LLAMA",
    "NEMOTRON",
    "OLMO2",
    "SGLANG",
    "VLLM",
    "WEIGHTLESS",
    "Flavour",
    "GroupPath",
    "LayerNormFlavour",
    "Quantizer",
    "Selection",
    "all_reduce_add_layer_norm",
    "all_reduce_add_layer_norm_gather",
    "all_reduce_add_rms_norm",
    "all_reduce_add_rms_norm_gather",
    "all_reduce_add_rms_norm_quant",
    "batch_invariant",
    "describe_path",
    "forget",
    "raise_if_failed",
    "reduce_rows_add_layer_norm",
    "reduce_rows_add_layer_norm_gather",
    "reduce_rows_add_rms_norm",
    "reduce_rows_add_rms_norm_gather",
    "reset",
    "select",
    "set_batch_invariant",
    "settings",
    "stream_class",
]
