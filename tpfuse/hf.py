"""Hugging Face models: load or shard under a :class:`~tpfuse.parallel.ParallelConfig`, compile, generate.

model = tpfuse.hf.from_pretrained(path, ParallelConfig(tp_size=4, attn_dp_size=2, moe_dense_tp_size=2))
model = tpfuse.hf.compile(model)
model.generate(**inputs, cache_implementation="static")
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tpfuse import compat, hf_agreement
from tpfuse.hf_arguments import ASKED_FOR_WHOLE, check_model, check_options, tell_of_a_whole_model
from tpfuse.hf_generate import generate, install, release
from tpfuse.hf_local import localize
from tpfuse.hf_plan import one_group, transformers_shards
from tpfuse.hf_source import agree_on_source
from tpfuse.hf_unseen import hidden_norms, tell_when_generate_compiles_nothing
from tpfuse.load import load
from tpfuse.load.shares import progress_of_rank_0
from tpfuse.parallel import ConfigError, ParallelConfig, exchange_rows
from tpfuse.parallel import parallelize as _parallelize
from tpfuse.parallel.config import check_config
from tpfuse.parallel.model import ATTRIBUTE, LARGEST, token_shape, without_adapter_wrapper
from tpfuse.parallel.qk_norms import GATHER, check_mode

__all__ = ["compile", "from_pretrained", "generate", "hidden_norms", "localize", "one_group", "parallelize", "release"]


def from_pretrained(
    path: Any,
    config: ParallelConfig,
    *,
    auto_class: Any = None,
    progress: bool | None = None,
    vocabulary: bool | None = None,
    gather_logits: bool = True,
    qk_norm: str | None = None,
    **kwargs: Any,
) -> Any:
    """Load a causal language model on every rank, sharded under ``config``. Collective.

    Each rank reads its share of the weights. Where attention and everything else share one group, transformers' own tensor
    parallelism loads it. Otherwise (attention DP, ``moe_dense_tp_size=1``, expert parallelism, an attention whose heads
    transformers does not shard, such as OLMo 2's, or a LoRA adapter) tpfuse cuts the empty model and reads slices for it,
    under NCCL into the memory of this rank's current CUDA device. What cannot be read in slices is loaded whole and then cut,
    with a warning that says why.

    Args:
        path: folder or Hub name, as for transformers.
        config: the sizes; ``config.world_size`` ranks.
        auto_class: transformers class to load with; ``AutoModelForCausalLM`` if None.
        progress: whether rank 0 shows a progress bar and the time it took; None leaves that to
            ``transformers.utils.logging``.
        vocabulary, gather_logits: as for :func:`tpfuse.parallel.parallelize`; with transformers' own tensor parallelism its plan
            decides, and these must be left as they are.
        qk_norm: how q and k are normed over all heads, as for :func:`tpfuse.parallel.parallelize`; None is its default.
        kwargs: for the class's ``from_pretrained``, e.g. ``dtype=torch.bfloat16``.
    Returns:
        The model in eval mode, without gradients. ``tpfuse.load.loading_of(model)`` says what was read.
    Raises:
        ImportError: transformers is not installed.
        TypeError: ``config`` is no :class:`~tpfuse.parallel.ParallelConfig`.
        FileNotFoundError: ``path`` is no folder, and no name on the Hub either, or a folder on some ranks only.
        ConnectionError: a Hub name, the Hub cannot be reached, and a rank has not cached it.
        ConfigError: see :func:`tpfuse.parallel.parallelize`; or a quantization whose weights cannot be cut, or an argument for
            transformers that contradicts the sizes.
    """
    transformers = _transformers()
    auto_class = auto_class or transformers.AutoModelForCausalLM
    check_mode(qk_norm or GATHER)
    check_config(config)
    if config.world_size > 1 and not dist.is_initialized():
        raise ConfigError(
            f"no default process group for {config.world_size} ranks; call torch.distributed.init_process_group first, "
            "e.g. under torchrun"
        )
    # Where the default group has more ranks than the config, the others may not load: then each rank finds out alone.
    together = config.world_size > 1 and dist.get_world_size() == config.world_size
    kwargs = agree_on_source(path, kwargs, several=together)
    if config.world_size == 1:
        with progress_of_rank_0(progress):
            model = auto_class.from_pretrained(path, **kwargs)
        setattr(without_adapter_wrapper(model), ASKED_FOR_WHOLE, True)
    elif transformers_shards(transformers, path, config, qk_norm, kwargs):
        if dist.get_world_size() != config.tp_size:
            raise ConfigError(
                f"transformers' tensor parallelism spans all {dist.get_world_size()} ranks of the default group, but "
                f"tp_size={config.tp_size}; start as many processes as tp_size"
            )
        if vocabulary is not None or not gather_logits:
            raise ConfigError(
                "vocabulary= and gather_logits= are for layouts that tpfuse cuts; here attention, MLP and experts share one "
                "group and transformers' plan cuts embedding and head. Leave them out, or use tpfuse.hf.parallelize"
            )
        distributed = transformers.distributed.DistributedConfig(tp_size=config.tp_size, tp_plan="auto")
        with progress_of_rank_0(progress):
            model = auto_class.from_pretrained(path, distributed_config=distributed, **kwargs)
    else:
        device = None if "device_map" in kwargs else _gpu()

        def cut(whole: nn.Module) -> nn.Module:
            return _parallelize(
                whole, config, vocabulary=vocabulary, gather_logits=gather_logits, qk_norm=qk_norm or GATHER
            )

        model = load(auto_class, path, cut, progress, device, kwargs)
    tell_when_generate_compiles_nothing(model)
    localize(model.eval())
    if config.world_size > 1:
        hf_agreement.install(without_adapter_wrapper(model))
    return model.requires_grad_(False)


def parallelize(model: nn.Module, config: ParallelConfig, **kwargs: Any) -> nn.Module:
    """Shard a loaded transformers model in place, for inference. Collective.

    Args:
        model: a causal language model with whole weights, equal on all ranks.
        config: the sizes.
        kwargs: as for :func:`tpfuse.parallel.parallelize`.
    Returns:
        ``model``, in eval mode, without gradients.
    Raises:
        ImportError: transformers is not installed.
        TypeError, ConfigError, PairingError: as :func:`tpfuse.parallel.parallelize`.
    """
    _transformers()
    check_model(model)
    model = _parallelize(model, config, **kwargs)
    hf_agreement.install(without_adapter_wrapper(model))
    tell_when_generate_compiles_nothing(model)
    return model


def compile(
    model: nn.Module,
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
) -> Any:
    """Compile the whole model with ``backend="tpfuse"``, for direct calls and for ``generate``.

    The whole model, because reductions cross layers: compiled layer by layer, a graph ends before the norm that reads its
    last sum. ``generate(..., cache_implementation="static")`` compiles its decode step with the same backend, on a CPU as
    well, and decodes as :func:`generate` does: on a GPU a step is one CUDA graph. DTensor parameters of transformers' own
    tensor parallelism become plain ones, see :func:`localize`; the model is changed in place. A call may compile for as many
    shapes as a server's batches have (64), past Dynamo's own limit of 8.

    Args:
        model: a transformers model in eval mode, sharded or not.
        mode, options, fullgraph, dynamic: as in ``torch.compile``; options may have ``tpfuse.*`` keys, and mode and options
            may be given together. ``generate`` compiles prefills on GPUs, unless ``dynamic`` is False, and on a CPU where it
            is True.
    Returns:
        The compiled model; attributes and ``generate`` are the model's own.
    Raises:
        ImportError: transformers is not installed.
        TypeError: the model is no module.
        OptionError: an unknown option or value.
    """
    transformers = _transformers()
    check_model(model)
    chosen = check_options(mode, options)
    model = getattr(model, "_orig_mod", model)  # compiled before: the new settings hold
    if mode is not None and options is not None:
        # torch.compile takes one of the two.
        mode, options = None, {**options, "tpfuse.mode": mode}
    for note in hidden_norms(model):
        warnings.warn(note, stacklevel=2)
    tell_of_a_whole_model(model, chosen.policy)
    localize(model)
    settings: dict[str, Any] = {"mode": mode, "options": options, "fullgraph": fullgraph, "dynamic": dynamic}
    compiled: Any = torch.compile(model, backend="tpfuse", **settings)
    compiled.forward = compat.with_room_for_recompiles(compiled.forward)
    if getattr(model, "generation_config", None) is not None:
        config = transformers.CompileConfig(backend="tpfuse", **settings)
        if mode is None and options is None:
            config.options = {}  # transformers' continuous batching looks into one of the two
        # transformers compiles on accelerators only unless told so.
        config._compile_all_devices = True
        model.generation_config.compile_config = config  # type: ignore[union-attr]
        install(model)
        if hasattr(model, "get_compiled_call"):  # the decode step of transformers' own loop
            setattr(model, "get_compiled_call", types.MethodType(_get_compiled_call, model))  # noqa: B010
    tell_when_generate_compiles_nothing(model)
    parallelized = getattr(model, ATTRIBUTE, None)
    if parallelized is not None and parallelized.plan.gathers_blocks:
        _exchange_before(compiled, model)
    return compiled


def _gpu() -> str | None:
    """Where a group with NCCL puts a model. Its name does not tell: a default group is ``cpu:gloo,cuda:nccl``."""
    on_gpu = torch.cuda.is_available() and "cuda:nccl" in dist.get_backend_config()
    return f"cuda:{torch.cuda.current_device()}" if on_gpu else None


def _get_compiled_call(model: Any, compile_config: Any) -> Callable[..., Any]:
    """transformers' own, with room for recompiles; a bound method of the model, so that a copy of the model compiles itself."""
    return compat.with_room_for_recompiles(type(model).get_compiled_call(model, compile_config))


def _exchange_before(compiled: Any, model: Any) -> None:
    """Let the blocks agree on their row counts before every compiled call: inside, it would break the graph.

    The count is an argument of the call, so it may change without a new graph.
    """

    def with_count(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        batch, length = token_shape(args, kwargs)
        return {**kwargs, LARGEST: exchange_rows(model, batch * length)}

    compiled.register_forward_pre_hook(lambda _, args, kwargs: (args, with_count(args, kwargs)), with_kwargs=True)
    decode_step = model.get_compiled_call

    def get_compiled_call(compile_config: Any) -> Callable[..., Any]:
        step = decode_step(compile_config)
        return lambda *args, **kwargs: step(*args, **with_count(args, kwargs))

    model.get_compiled_call = get_compiled_call


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("tpfuse.hf needs transformers, which is not installed; pip install 'tpfuse[hf]'") from error
    return transformers
