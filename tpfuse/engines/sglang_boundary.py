"""Where the op goes into SGLang 0.5.23: its layer boundaries ask for kernels that complete a sum, and this is one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import sglang as shared

LAYERS = "sglang.srt.layers"
BOUNDARY = f"{LAYERS}.layer_boundary"


def arguments_hook() -> shared.Hook:
    """The check of the server arguments, which the engine's first process makes."""
    check = "sglang.srt.arg_groups.validation_hook.check_server_args"
    return shared.Hook(check, _check_server_args, ("server_args",))


def hooks() -> list[shared.Hook]:
    """The functions of 0.5.23 that the hook goes around where models run."""
    linear = f"{LAYERS}.linear"
    return [
        shared.Hook(f"{BOUNDARY}.fusions.allreduce.ffn_input_fusions", _ffn_input_fusions, ("plan",)),
        shared.Hook(f"{BOUNDARY}.fusions.allreduce.attn_input_fusions", _attn_input_fusions, ("plan", "read")),
        shared.Hook(f"{BOUNDARY}.factories._resolve_ffn", _resolve_ffn, ("variant",)),
        shared.Hook(f"{BOUNDARY}.exit.exit_facts", _exit_facts, ("kind", "plan", "variant", "path")),
        shared.Hook(f"{linear}.ColumnParallelLinear.__init__", _column, ("self", "input_size")),
        shared.Hook(f"{linear}.MergedColumnParallelLinear.__init__", _column, ("self", "input_size")),
        shared.Hook(f"{linear}.RowParallelLinear.__init__", _row, ("self", "input_size")),
    ]


# The two sites.


def _ffn_input_fusions(original: Callable[..., Any], plan: Any) -> Any:
    """After attention: ours first, SGLang's where ours does not take the batch."""
    from sglang.srt.layers.layer_boundary import FfnInputFusion, SumGroup

    ours = FfnInputFusion(completes=SumGroup.ATTN_TP, run=partial(_after_attention, plan))
    return (ours, *original(plan))


def _after_attention(
    plan: Any, hidden_states: Tensor, residual: Tensor, forward_batch: Any
) -> tuple[Tensor, Tensor] | None:
    return shared.fused("after attention", plan.norm, hidden_states, residual)


def _attn_input_fusions(original: Callable[..., Any], plan: Any, *args: Any, **kwargs: Any) -> Any:
    """After an MLP that left its sum to the next layer."""
    return (partial(_after_mlp, plan), *original(plan, *args, **kwargs))


def _after_mlp(
    plan: Any, owed: Any, residual: Tensor, forward_batch: Any, post_residual_addition: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    from sglang.srt.layers.layer_boundary import UnreducedOutput

    if not isinstance(owed, UnreducedOutput) or owed.complete_sum is not None or post_residual_addition is not None:
        return None
    if owed.reduce_to_dp_local is not None or not shared.is_attention_group(owed.group):
        return None
    return shared.fused("after mlp", plan.norm, owed.partial, residual)


# The dense MLP over the attention TP group.


def _check_server_args(original: Callable[..., Any], server_args: Any) -> Any:
    """SGLang asserts None, 1 or tp_size; all its other checks stay."""
    import msgspec
    from sglang.srt.arg_groups.model_override_base import resolving_view

    cfg = resolving_view(server_args)
    asked = server_args.moe_dense_tp_size
    if cfg.moe_dense_tp_size != asked or not shared.shares(cfg.tp_size, cfg.attn_dp_size, cfg.attn_cp_size, asked):
        return original(server_args)
    msgspec.Struct.__setattr__(server_args, "moe_dense_tp_size", None)
    try:
        return original(server_args)
    finally:
        msgspec.Struct.__setattr__(server_args, "moe_dense_tp_size", asked)


def _resolve_ffn(original: Callable[..., Any], variant: Any, **declared: Any) -> Any:
    """A dense FFN that declares no width computes on the rows of its attention replica."""
    if not declared.get("sparse") and declared.get("dense_tp_size") is None and shared.sharing():
        declared["dense_tp_size"] = shared.parallel().attn_tp_size
    return original(variant, **declared)


def _exit_facts(original: Callable[..., Any], kind: Any, plan: Any, variant: Any, path: Any) -> Any:
    """Let such an FFN leave its sum to the next layer under attention DP: no rows move, so nothing else has to happen first."""
    import msgspec
    from sglang.srt.layers.layer_boundary import BatchVariant, StageKind, SumGroup
    from sglang.srt.layers.layer_boundary.exit import _sum_deferral_allowed
    from sglang.srt.layers.layer_boundary.ops import keep_output

    facts = original(kind, plan, variant, path)
    output = path.output
    if (
        facts.may_defer_sum
        or kind is not StageKind.FFN
        or plan.finishes_directly
        or plan.terminal
        or variant is not BatchVariant.ORDINARY
        or output.group is not SumGroup.ATTN_TP
        or not output.may_defer_to_next
        or not output.update.is_plain_add
        or path.returns_over_dp
        or path.writes_at_handoff
        or path.output_move is not keep_output
        or not shared.sharing()
        or not _sum_deferral_allowed(plan, output, scattered=False)
    ):
        return facts
    return msgspec.structs.replace(facts, may_defer_sum=True, single_sum=True)


def _column(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    return shared.cut(original, self, *args, change=_over_attention, **kwargs)


def _row(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    return shared.cut(original, self, *args, change=_over_attention, sums=True, **kwargs)


def _over_attention(arguments: dict[str, Any]) -> None:
    if arguments.get("parallel_group") in (None, "tp"):
        arguments["parallel_group"] = "attn_tp"


def is_shared_layer(module: torch.nn.Module) -> bool:
    """Whether a module is a layer whose dense FFN owes its sum over the attention TP group."""
    from sglang.srt.layers.layer_boundary import BatchVariant, StageKind, SumGroup
    from sglang.srt.layers.layer_boundary.stage import StageBoundary

    for boundary in vars(module).values():
        if not isinstance(boundary, StageBoundary) or boundary.kind is not StageKind.FFN:
            continue
        declared = boundary.declaration
        if not declared.sparse and declared.dense_tp_size is None:
            return boundary.plan.paths[BatchVariant.ORDINARY].output.group is SumGroup.ATTN_TP
    return False


def ranks_of(linear: Any) -> int:
    """Over how many ranks a linear layer is cut."""
    from sglang.srt.layers.linear import get_group_rank_size

    return get_group_rank_size(linear.tp_group)[1]
