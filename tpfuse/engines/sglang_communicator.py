"""Where the op goes into SGLang 0.5.17: the communicator between attention and MLP, and between layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import sglang as shared

COMMUNICATOR = "sglang.srt.layers.communicator"
LINEAR = "sglang.srt.layers.linear"


def arguments_hook() -> shared.Hook:
    """The check of the server arguments, which the engine's first process makes."""
    return shared.Hook("sglang.srt.server_args.ServerArgs.check_server_args", _check_server_args, ("self",))


def hooks() -> list[shared.Hook]:
    """The functions of 0.5.17 that the hook goes around where models run."""
    modes = f"{COMMUNICATOR}.LayerScatterModes"
    step = f"{COMMUNICATOR}.CommunicateWithAllReduceAndLayerNormFn"
    layer = f"{COMMUNICATOR}.LayerCommunicator"
    given = ("hidden_states", "residual", "forward_batch", "layernorm", "context")
    return [
        shared.Hook(f"{modes}._compute_mlp_mode", _mlp_mode, ("cls", "context")),
        shared.Hook(f"{modes}._compute_middle_residual_mode", _replica_rows, ("cls", "context")),
        shared.Hook(f"{modes}._compute_layer_output_mode", _output_mode, ("cls", "context")),
        shared.Hook(f"{step}._tp_attn_all_reduce_and_layernorm", _replica_step, given),
        shared.Hook(f"{step}._gather_hidden_states_and_residual", _full_step, given),
        shared.Hook(f"{layer}.prepare_attn", _prepare_attn, ("self", "hidden_states", "residual", "forward_batch")),
        shared.Hook(f"{layer}.should_fuse_mlp_allreduce_with_next_layer", _leaves_its_sum, ("self", "forward_batch")),
        shared.Hook(f"{LINEAR}.ColumnParallelLinear.__init__", _column, ("self", "input_size")),
        shared.Hook(f"{LINEAR}.MergedColumnParallelLinear.__init__", _column, ("self", "input_size")),
        shared.Hook(f"{LINEAR}.RowParallelLinear.__init__", _row, ("self", "input_size")),
    ]


# After attention.


def _replica_step(
    original: Callable[..., Any],
    hidden_states: Tensor,
    residual: Tensor,
    forward_batch: Any,
    layernorm: Any,
    context: Any,
) -> Any:
    """``_tp_attn_all_reduce_and_layernorm``: the dense MLP shares the attention TP group."""
    if residual.shape[0] != hidden_states.shape[0]:
        # SGLang takes this step for a scattered residual too, and then adds rows of different tokens.
        from sglang.srt.layers.dp_attention import attn_tp_all_gather_into_tensor

        scattered, residual = residual, torch.empty_like(hidden_states)
        attn_tp_all_gather_into_tensor(residual, scattered)
    result = shared.fused("after attention", layernorm, hidden_states, residual)
    if result is not None:
        return result
    return original(
        hidden_states=hidden_states,
        residual=residual,
        forward_batch=forward_batch,
        layernorm=layernorm,
        context=context,
    )


def _full_step(
    original: Callable[..., Any],
    hidden_states: Tensor,
    residual: Tensor,
    forward_batch: Any,
    layernorm: Any,
    context: Any,
    **kwargs: Any,
) -> Any:
    """``_gather_hidden_states_and_residual`` without attention DP: there is nothing to gather."""
    from sglang.srt.layers.communicator import ScatterMode, get_attn_tp_context

    if (
        context.attn_dp_size == 1
        and context.attn_tp_size > 1
        and kwargs.get("residual_input_mode") != ScatterMode.SCATTERED
        and not get_attn_tp_context().input_scattered
    ):
        result = shared.fused("after attention", layernorm, hidden_states, residual)
        if result is not None:
            return result
    return original(
        hidden_states=hidden_states,
        residual=residual,
        forward_batch=forward_batch,
        layernorm=layernorm,
        context=context,
        **kwargs,
    )


# After an MLP.


def _leaves_its_sum(original: Callable[..., Any], self: Any, forward_batch: Any) -> bool:
    """Whether an MLP leaves its sum to the next layer's norm. Nothing here differs between ranks of the attention TP group."""
    if original(self, forward_batch):
        return True
    from sglang.srt.layers.communicator import (
        LayerCommunicator,
        ScatterMode,
        get_attn_tp_context,
        is_enable_moe_cp_allgather,
    )

    now = shared.parallel()
    if (
        type(self) is not LayerCommunicator
        or self.is_last_layer
        or not shared.is_ready()
        or now.pp_size > 1
        or now.attn_cp_size > 1
        or getattr(forward_batch, "can_run_tbo", False)
        or is_enable_moe_cp_allgather()
        or get_attn_tp_context().input_scattered
        or (self._speculative_algo is not None and self._speculative_algo.is_eagle() and now.attn_dp_size > 1)
        or not shared.takes(self.input_layernorm, self.input_layernorm.weight.dtype)
    ):
        return False
    mode = self.layer_scatter_modes.mlp_mode
    if mode == ScatterMode.TP_ATTN_FULL:
        return True
    # Over all of TP: only where that is the attention TP group, and the experts are not split in two dimensions.
    return mode == ScatterMode.FULL and now.attn_dp_size == 1 and now.moe_ep_size == 1 and now.moe_dp_size == 1


def _prepare_attn(
    original: Callable[..., Any],
    self: Any,
    hidden_states: Tensor,
    residual: Tensor | None,
    forward_batch: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Complete a sum that the MLP before left, together with the input norm; then what SGLang does after that norm."""
    from sglang.srt.layers.communicator import AttentionInputs, get_attn_tp_context

    if residual is None or not getattr(hidden_states, "_sglang_needs_allreduce_fusion", False):
        return original(self, hidden_states, residual, forward_batch, *args, **kwargs)
    now = shared.parallel()
    over_attention = shared.is_attention_group(now.tp_group) and now.moe_ep_size == 1 and now.moe_dp_size == 1
    if now.attn_dp_size > 1 or over_attention:
        # Under attention DP SGLang leaves no sum itself, so this one is ours and over the attention TP group.
        result = None
        added = args[1] if len(args) > 1 else kwargs.get("post_residual_addition")
        if added is None:
            result = shared.fused("after mlp", self.input_layernorm, hidden_states, residual)
        if result is not None:
            hidden_states, residual = result
            hidden_states = self._communicate_simple_fn(
                hidden_states=hidden_states, forward_batch=forward_batch, context=self._context
            )
            if self.qkv_latent_func is not None:
                inputs = AttentionInputs(hidden_states, forward_batch, self.qkv_latent_func)
                get_attn_tp_context().set_attn_inputs(inputs)
            return hidden_states, residual
        if now.attn_dp_size > 1:
            # Not by SGLang: it would sum over the experts' group.
            hidden_states._sglang_needs_allreduce_fusion = False  # type: ignore[attr-defined]
            if hidden_states.shape[0] != 0:
                hidden_states = now.attn_tp_group.all_reduce(hidden_states)
    return original(self, hidden_states, residual, forward_batch, *args, **kwargs)


# The dense MLP over the attention TP group.


def _check_server_args(original: Callable[..., Any], self: Any) -> Any:
    """SGLang asserts None, 1 or tp_size; all its other checks stay."""
    asked = self.moe_dense_tp_size
    replicas = self.dp_size if self.enable_dp_attention else 1
    if not shared.shares(self.tp_size, replicas, self.attn_cp_size, asked):
        return original(self)
    object.__setattr__(self, "moe_dense_tp_size", None)  # resolved arguments refuse a plain assignment
    try:
        return original(self)
    finally:
        object.__setattr__(self, "moe_dense_tp_size", asked)


def _dense_shares(context: Any) -> bool:
    return not context.is_layer_sparse and shared.sharing()


def _mlp_mode(original: Callable[..., Any], cls: Any, context: Any) -> Any:
    from sglang.srt.layers.communicator import ScatterMode

    return ScatterMode.TP_ATTN_FULL if _dense_shares(context) else original(cls, context)


def _replica_rows(original: Callable[..., Any], cls: Any, context: Any) -> Any:
    """The residual during an MLP that shares stays on the rows of its replica. SGLang has no such case."""
    from sglang.srt.layers.communicator import ScatterMode

    return ScatterMode.TP_ATTN_FULL if _dense_shares(context) else original(cls, context)


def _output_mode(original: Callable[..., Any], cls: Any, context: Any) -> Any:
    from sglang.srt.layers.communicator import ScatterMode

    if _dense_shares(context) and context.layer_id != context.num_layers - 1:
        return ScatterMode.TP_ATTN_FULL
    return original(cls, context)


def _column(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    return shared.cut(original, self, *args, change=_over_attention, **kwargs)


def _row(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    return shared.cut(original, self, *args, change=_over_attention, sums=True, **kwargs)


def _over_attention(arguments: dict[str, Any]) -> None:
    now = shared.parallel()
    if arguments.get("tp_size") in (None, now.tp_size):
        arguments["tp_rank"], arguments["tp_size"] = now.attn_tp_rank, now.attn_tp_size


def is_shared_layer(module: torch.nn.Module) -> bool:
    """Whether a module is a layer whose dense MLP owes its sum over the attention TP group."""
    from sglang.srt.layers.communicator import ScatterMode

    communicator = vars(module).get("layer_communicator")
    return communicator is not None and communicator.layer_scatter_modes.mlp_mode == ScatterMode.TP_ATTN_FULL


def ranks_of(linear: Any) -> int:
    """Over how many ranks a linear layer is cut."""
    return linear.tp_size
