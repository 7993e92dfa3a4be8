"""``generate`` whose decode step is one CUDA graph on a GPU, with transformers' arguments and results.

transformers prepares the call (inputs, masks, processors, criteria) and hands it to :func:`decode` through its own seam,
``generate(custom_generate=...)``. What :func:`decode` cannot do goes back to transformers' own loop, which reaches the compiled
model as well.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor

from tpfuse import hf_agreement, hf_compat, unfused
from tpfuse.hf_buffers import Pool, holds_full_attention_only
from tpfuse.hf_loop import Call, run
from tpfuse.hf_step import Forward, plain_mode
from tpfuse.parallel.model import ATTRIBUTE

DECODER = "tpfuse_decoder"
# What generate may prepare for a text decoder; anything else (images, token types) changes from step to step in ways of its own.
KNOWN_INPUTS = {"attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "logits_to_keep"}
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
# The attentions whose mask says, at every position, what may be read. The others read lengths off a mask's shape.
MASKED_ATTENTION = ("eager", "sdpa", None)


class Decoder:
    """What a model keeps between calls of ``generate``: caches, graphs and compiled forwards."""

    def __init__(self) -> None:
        self.pool = Pool()
        self._forwards: dict[str, Forward] = {}

    def forward(self, model: Any, settings: dict[str, Any] | None) -> Forward:
        key = repr(settings)
        if key not in self._forwards:
            self._forwards[key] = Forward(model, settings)
        return self._forwards[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoder:
        return Decoder()  # a copy of the model has weights of its own, so graphs of its own

    def __reduce__(self) -> Any:
        return Decoder, ()


def generate(model: Any, inputs: Tensor | None = None, *, cuda_graph: bool = True, **kwargs: Any) -> Any:
    """transformers' ``model.generate`` with the decode step as one CUDA graph.

    Greedy search and sampling run in a loop of tpfuse's own: it keeps the static cache between calls, so a call of another length
    needs no new graph, and it asks the device for nothing but what a streamer or a stopping criterion needs. Everything else
    (beams, assisted generation, encoder-decoder models, caches of your own, returned attentions) runs in transformers' loop.
    On a CPU the same loop runs without graphs.

    Args:
        model: a transformers model, compiled by :func:`tpfuse.hf.compile` or not.
        inputs: as for transformers, shape (batch, length).
        cuda_graph: capture the step on a GPU.
        kwargs: as for transformers. Without a cache in them it is ``cache_implementation="static"``, but for assisted
            generation, which takes tokens back out of its cache.
    Returns:
        What transformers returns: the same tokens, with the same random numbers.
    Raises:
        ValueError: ranks that share a replica were called with different prompts or random numbers.
    """
    model = getattr(model, "_orig_mod", model)
    config = kwargs.get("generation_config") or model.generation_config
    chosen = kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)
    assisted = any(kwargs.get(name, getattr(config, name, None)) is not None for name in ASSISTED)
    if chosen is None and hf_compat.cache_name(kwargs) is None and kwargs.get("use_cache", True) and not assisted:
        kwargs["cache_implementation"] = "static"
    return _generate(model, inputs, cuda_graph, **kwargs)


def release(model: Any) -> None:
    """Give back the caches and CUDA graphs that :func:`generate` keeps for later calls. The next call makes new ones.

    Args:
        model: the model or what :func:`tpfuse.hf.compile` made of it; one that keeps nothing is left as it is.
    """
    decoder = getattr(getattr(model, "_orig_mod", model), DECODER, None)
    if decoder is not None:
        decoder.pool.kept.clear()


def install(model: Any) -> None:
    """Let ``model.generate`` decode this way where it was going to compile. Pipelines call it too."""
    model.generate = types.MethodType(_compiled_generate, model)
    if hasattr(model, "init_continuous_batching"):
        model.init_continuous_batching = types.MethodType(_tell_of_continuous_batching, model)


def _compiled_generate(model: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
    """``model.generate`` after :func:`install`: as transformers documents it."""
    if args:  # by position, as few call it: transformers sorts them out
        hf_agreement.check_call(model, inputs, kwargs)
        return type(model).generate(model, inputs, *args, **hf_agreement.in_step(model, kwargs))
    return _generate(model, inputs, True, compiled_only=True, **kwargs)


def _tell_of_continuous_batching(model: Any, *args: Any, **kwargs: Any) -> Any:
    """``model.init_continuous_batching``, through which ``generate_batch`` goes too; with a warning."""
    unfused.tell(
        "generate-batch",
        "continuous batching (generate_batch) gives the right tokens, and nothing of it is fused: transformers keeps the update "
        "of its paged cache out of torch.compile, so a graph ends inside every attention, between a sum and its norm. For "
        "batches of one length use generate(..., cache_implementation='static'); to serve many requests, vLLM or SGLang",
    )
    return type(model).init_continuous_batching(model, *args, **kwargs)


def _generate(
    model: Any,
    inputs: Any,
    cuda_graph: bool,
    *,
    compiled_only: bool = False,
    streamer: Any = None,
    custom_generate: Any = None,
    **kwargs: Any,
) -> Any:
    hf_agreement.check_call(model, inputs, kwargs)
    original = type(model).generate
    kwargs = {**kwargs, "streamer": streamer} if streamer is not None else kwargs
    foreign = custom_generate is not None or kwargs.get("assistant_model") is not None or kwargs.get("synced_gpus")
    if foreign or not _is_ours(model, kwargs):
        synced = kwargs if custom_generate is not None else hf_agreement.in_step(model, kwargs)
        return original(model, inputs, custom_generate=custom_generate, **synced)
    loop = functools.partial(_decode, streamer=streamer, cuda_graph=cuda_graph, compiled_only=compiled_only)
    return original(model, inputs, custom_generate=loop, **kwargs)


def _is_ours(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call is a greedy search or sampling that ``generate`` can hand to a callable with all it needs."""
    rest = {key: value for key, value in kwargs.items() if key not in ("generation_config", "streamer", "tokenizer")}
    config = hf_compat.completed(model, kwargs.get("generation_config"), rest)
    if config.stop_strings is not None or config.token_healing:
        return False  # both need the tokenizer, which generate gives to its own loops only
    return config.get_generation_mode().value in ("greedy_search", "sample")


def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    streamer: Any = None,
    cuda_graph: bool = True,
    compiled_only: bool = False,
    **model_kwargs: Any,
) -> Any:
    """Decode as ``generate`` prepared it: here, or in transformers' own loop where this one would not give the same."""
    compiles = hf_compat.may_compile(model, model_kwargs, generation_config)
    refusal = why_not(model, input_ids, generation_config, model_kwargs)
    if refusal is not None or (compiled_only and not compiles):
        if refusal is not None and not compiled_only:
            unfused.tell("generate-loop", f"tpfuse.hf.generate ran in transformers' own loop: {refusal}")
        loop = hf_compat.own_decoding(model)
        synced = {"synced_gpus": hf_agreement.replicas_meet(model), "streamer": streamer, **model_kwargs}
        return loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **synced)
    decoder = getattr(model, DECODER, None)
    if decoder is None:
        decoder = Decoder()
        setattr(model, DECODER, decoder)
    config = generation_config.compile_config
    forward = decoder.forward(model, plain_mode(config.to_dict()) if compiles and config is not None else None)
    call = Call(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, streamer)
    return run(model, decoder.pool, forward, call, cuda_graph and model.device.type == "cuda")


def why_not(model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> str | None:
    """Why the loop of this module would not do what transformers' own does; None when it would."""
    from transformers import GenerationMixin, StaticCache

    name = hf_compat.cache_name(model_kwargs)
    cache = model_kwargs.get(name) if name else None
    given = {key for key, value in model_kwargs.items() if value is not None}
    positions, attention = model_kwargs.get("position_ids"), hf_compat.attention_of(model)
    if model.config.is_encoder_decoder:
        return "the model is an encoder-decoder"
    if not isinstance(cache, StaticCache) or not model_kwargs.get("use_cache", True):
        return "the cache is not static; pass cache_implementation='static'"
    if getattr(cache, "_is_user_defined", False):
        return "the call brings a cache of its own, whose contents it continues"
    if getattr(cache, "offloading", False):
        return "the cache is offloaded to the CPU"
    if not holds_full_attention_only(cache):
        return "some layers keep something other than keys and values, or count their tokens on the host"
    if attention not in MASKED_ATTENTION:
        return f"attention is {attention}; load the model with attn_implementation='sdpa'"
    if generation_config.output_attentions or generation_config.output_hidden_states:
        return "attentions or hidden states are asked for"
    if given - KNOWN_INPUTS:
        return f"the model is given {', '.join(sorted(given - KNOWN_INPUTS))} as well"
    if input_ids.dim() != 2 or (positions is not None and positions.dim() != 2):
        return "ids or positions have more than two dimensions"
    if generation_config.prefill_chunk_size is not None:
        return "the prefill is in chunks"
    for method in ("_sample", "_prefill", "_update_model_kwargs_for_generation"):
        if getattr(type(model), method, None) is not getattr(GenerationMixin, method, None):
            return f"{type(model).__name__} has a {method} of its own"
    if hf_compat.is_remote(model):
        return "the model's code is not transformers' own"
    parallelized = getattr(model, ATTRIBUTE, None)
    if parallelized is not None and parallelized.plan.gathers_blocks:
        return "blocks of ranks agree on their row counts before every step"
    return None
