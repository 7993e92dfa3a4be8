"""Shard a model under a config and let its layers follow the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpfuse import compat

from . import layers as layer_forwards
from .architecture import Architecture, architecture_of
from .config import ConfigError, ParallelConfig, check_config
from .cut import Cut
from .cut_model import refuse_what_needs_the_whole
from .groups import Groups, build_groups, small_tensor_device
from .layout import Plan
from .layout import plan as make_plan
from .pairing import check_shards
from .qk_norms import GATHER, check_mode
from .shard import Shard, apply_cuts, kind_of, layer_cuts, replace_parameter
from .steps import Batch
from .vocabulary import Vocabulary, gather_parts, install_vocabulary, plan_vocabulary

ATTRIBUTE = "tpfuse_parallel"
LARGEST = "largest_block"  # keyword of a call: rows of the largest block


@dataclass(frozen=True)
class Parallelized:
    """What :func:`parallelize` did to a model; ``layout_of(model)`` returns it.

    Attributes:
        config: the sizes.
        groups: this rank's groups.
        plan: the boundaries that the layers follow.
        shards: every weight of a layer that was cut.
        vocabulary: how embedding and head are laid out.
        cuts: path of every parameter that was cut -> what this rank keeps of it.
        qk_norm: how q and k are normed over the heads of all ranks, ``gather`` or ``reduce``; empty where nothing is.
    """

    config: ParallelConfig
    groups: Groups
    plan: Plan
    shards: tuple[Shard, ...]
    vocabulary: Vocabulary
    cuts: dict[str, Cut]
    qk_norm: str = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Parallelized:
        return self  # a copy of the model is cut alike, over the same groups, which cannot be copied


def parallelize(
    model: nn.Module,
    config: ParallelConfig,
    *,
    architecture: Architecture | None = None,
    plan: Plan | None = None,
    ranks: Sequence[int] | None = None,
    vocabulary: bool | None = None,
    gather_logits: bool = True,
    qk_norm: str = GATHER,
) -> nn.Module:
    """Shard a decoder in place for inference. Collective: all ranks of the default group call it with equal arguments.

    Attention is cut over ``attn_tp``, the dense MLP over ``dense_tp``, experts over ``moe_ep`` and ``moe_tp``, shared
    experts over ``tp``, embedding and output head over ``attn_tp``. Norms and routers stay whole. Each attention replica is
    called with rows of its own; the ranks of one replica are called with the same rows.

    Args:
        model: a causal language model with whole weights, equal on all ranks, or on the meta device; LoRA adapters of peft
            are cut with the layers that they are around.
        config: the sizes; ``attn_cp_size``, ``moe_dp_size`` and ``pp_size`` must be 1.
        architecture: names inside the model; None looks ``model.config.model_type`` up.
        plan: the boundaries; None derives them from the config.
        ranks: global ranks of the deployment; see :func:`build_groups`.
        vocabulary: whether embedding and head are cut: None where that is possible, True always, False never.
            ``layout_of(model).vocabulary`` says what was done and why.
        gather_logits: False lets the head return the logits of this rank's tokens alone, for callers that sample from parts;
            ``generate`` and losses need them all.
        qk_norm: how models norm q and k over all heads at once (OLMo 2 and 3, MiniMax-M2). ``gather``: each rank gathers both and
            norms them whole, as the model does. ``reduce``: one all-reduce of two sums of squares a row, which rounds in another
            order.
    Returns:
        ``model``, in eval mode, without gradients. After an error it is as it was.
    Raises:
        TypeError: ``config`` is no :class:`ParallelConfig`.
        ConfigError: an unknown architecture, a size that the weights do not divide by, or one that is not supported here.
        PairingError: a weight is cut over other ranks than the plan reduces over.
    """
    check_mode(qk_norm)
    check_config(config)
    _check_supported(model, config)
    inner = without_adapter_wrapper(model)
    names = architecture or architecture_of(inner)
    stack, decoder_layers = _stack(inner, names)
    kinds = [kind_of(layer, names) for layer in decoder_layers]
    plan = plan or make_plan(config, kinds)
    if plan.config != config or plan.layers != tuple(kinds):
        raise ConfigError(
            f"the plan is for {plan.config} and layers {list(plan.layers)}, but the model is parallelized under {config} and "
            f"has layers {kinds}; make the plan from both, or leave it out"
        )
    groups = build_groups(config, ranks)
    if groups.rank is None:
        raise ConfigError(
            f"global rank {dist.get_rank()} is outside the deployment {list(groups.ranks)}; "
            "call parallelize on its ranks, and only build_groups elsewhere"
        )
    text_config: Any = getattr(inner, "config", None)
    of_layers = [layer_cuts(layer, n, text_config, names, groups, qk_norm) for n, layer in enumerate(decoder_layers)]
    _check_qk_norm(qk_norm, names, inner)
    shards = [shard for found in of_layers for shard in found.shards]
    check_shards(shards, plan, groups)
    tokens = plan_vocabulary(inner, names, groups, vocabulary, gather_logits)
    cuts = dict(tokens.cuts)
    _cut_vocabulary(inner, names, tokens)
    install_vocabulary(inner, names, groups, tokens)
    for number, (layer, found) in enumerate(zip(decoder_layers, of_layers, strict=True)):
        apply_cuts(layer, found, text_config, names, groups)
        cuts.update({f"{names.layers}.{number}.{path}": cut for path, cut in found.cuts.items()})
        layer_forwards.install(layer, number, plan, names, groups)
    done = qk_norm if any(found.norms for found in of_layers) else ""
    setattr(inner, ATTRIBUTE, Parallelized(config, groups, plan, tuple(shards), tokens, cuts, done))
    stack.register_forward_pre_hook(_batch_hook(inner), with_kwargs=True)
    if cuts:
        for whole in dict.fromkeys((inner, model)):  # an adapter's wrapper saves by itself
            refuse_what_needs_the_whole(whole, bool(tokens.cuts))
    return model.eval().requires_grad_(False)


def without_adapter_wrapper(model: nn.Module) -> nn.Module:
    """The transformers model inside of a ``PeftModel``; any other model itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


@torch.no_grad()
def _cut_vocabulary(model: nn.Module, names: Architecture, tokens: Vocabulary) -> None:
    """Weights that were one parameter stay one."""
    done: list[tuple[Any, Any]] = []
    for path, kept in tokens.cuts.items():
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        whole = getattr(owner, name)
        tied = [new for old, new in done if old is whole]
        if tied:
            setattr(owner, name, tied[0])
        else:
            replace_parameter(model, path, kept)
            done.append((whole, getattr(owner, name)))
        if isinstance(owner, nn.Linear):
            owner.out_features = owner.weight.shape[0]


def layout_of(model: nn.Module) -> Parallelized:
    """What :func:`parallelize` did to this model.

    Raises:
        ConfigError: it was not parallelized.
    """
    found = getattr(model, ATTRIBUTE, None)
    if found is None:
        raise ConfigError(
            f"{type(model).__name__} is not parallelized; call tpfuse.parallel.parallelize(model, config) first"
        )
    return found


def exchange_rows(model: nn.Module, rows: int) -> int:
    """How many rows the largest block brings to the next forward. Collective over ``attn_dp`` where blocks meet.

    Eager forwards ask themselves, and so do models from ``tpfuse.hf.compile``. A forward under a plain ``torch.compile``
    cannot, for the count would have to leave the graph; give it the answer:

        compiled(tokens, largest_block=exchange_rows(model, tokens.numel()))

    Args:
        model: a parallelized model.
        rows: sequences times tokens of this rank's block; may be 0.
    Returns:
        The largest count of all blocks; ``rows`` where blocks never meet, without asking anybody.
    """
    parallelized = layout_of(model)
    if not parallelized.plan.gathers_blocks:
        return rows
    group = parallelized.groups.group("attn_dp")
    count = torch.tensor([rows], device=small_tensor_device(group))
    dist.all_reduce(count, op=dist.ReduceOp.MAX, group=group)
    return int(count.item())


def gather_logits(model: nn.Module, local: Tensor) -> Tensor:
    """The logits of all tokens, out of what a model that was parallelized with ``gather_logits=False`` returns.

    Collective over ``attn_tp``.

    Args:
        model: a parallelized model.
        local: (..., tokens of this rank); ``layout_of(model).vocabulary.own`` says which these are.
    Returns:
        (..., tokens of the whole vocabulary); ``local`` itself where the vocabulary is whole.
    """
    parallelized = layout_of(model)
    return gather_parts(local, parallelized.vocabulary, parallelized.groups.name_of("attn_tp"))


def _check_supported(model: nn.Module, config: ParallelConfig) -> None:
    for name in ("attn_cp_size", "moe_dp_size", "pp_size"):
        if getattr(config, name) > 1:
            raise ConfigError(
                f"parallelize does not support {name}={getattr(config, name)}; use 1 (plan and groups do support it, for "
                "an engine that places these itself)"
            )
    if getattr(model, ATTRIBUTE, None) is not None:
        raise ConfigError(f"{type(model).__name__} is parallelized already; load it again to use another config")


def _check_qk_norm(qk_norm: str, names: Architecture, model: nn.Module) -> None:
    if qk_norm != GATHER and not names.qk_norms:
        raise ConfigError(
            f"qk_norm={qk_norm!r}, but {type(model).__name__} norms no q and k over all heads (its architecture names no "
            "qk_norms); leave qk_norm out"
        )


def _stack(model: nn.Module, names: Architecture) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the layers, and the layers."""
    path, _, last = names.layers.rpartition(".")
    try:
        stack = model.get_submodule(path)
        decoder_layers = getattr(stack, last)
    except AttributeError as error:
        raise ConfigError(
            f"{type(model).__name__} has no {names.layers!r}; give the path of its decoder layers in "
            "Architecture(layers=...)"
        ) from error
    return stack, decoder_layers


def _in_compiled_call() -> bool:
    """Inside torch.compile, also in frames that a graph break left to eager.

    There an exchange would start on one replica alone, the one whose shapes changed, and wait for the others for ever.
    """
    return torch.compiler.is_compiling() or compat.in_compiled_module()


def token_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Sequences and tokens of a call of a transformers model."""
    tokens = next(x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
    return tokens.shape[0], tokens.shape[1]


def _batch_hook(model: nn.Module) -> Any:
    """Hand every layer the shape of this forward, by keyword through the module that runs them."""
    blocks_meet = layout_of(model).plan.gathers_blocks

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        batch, length = token_shape(args, kwargs)
        rows = batch * length
        others = {key: value for key, value in kwargs.items() if key != LARGEST}
        largest = kwargs.get(LARGEST, rows)
        if blocks_meet and LARGEST not in kwargs:
            if _in_compiled_call():
                raise ConfigError(
                    "the rows of all blocks meet in this model, and a compiled forward cannot ask how many there are; call it "
                    f"with {LARGEST}=tpfuse.parallel.exchange_rows(model, rows), or use tpfuse.hf.compile"
                )
            largest = exchange_rows(model, rows)
        if rows > largest:
            raise ConfigError(
                f"this forward has {batch} * {length} rows, more than {LARGEST}={largest}; pass the result of "
                "tpfuse.parallel.exchange_rows for these rows"
            )
        return args, {**others, layer_forwards.BATCH: Batch(batch, length, largest)}

    return hook
