"""The fused op inside SGLang: a plugin that SGLang loads, off unless ``TPFUSE_SGLANG=1``, and undone by one call.

SGLang finds :func:`register` through the entry-point group ``sglang.srt.plugins``, in the engine and in every scheduler
process. What is hooked depends on the version: ``sglang_communicator.py`` for 0.5.17, ``sglang_boundary.py`` for 0.5.23. This
file holds what both share: the switch, the vote of the ranks, the warm-up of the group, the choice of a norm's rounding order,
and :func:`undo`.

Nothing here decides from what only one rank knows. The hooks go in or stay out by the version and the environment; calls are
fused once all ranks of a stage have voted that their hooks are in place and that the first call of the group worked. Until
then, and where one rank cannot, every hook hands on to SGLang's own function.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import pkgutil
import re
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpfuse.ops import GEMMA, SGLANG, VLLM, Flavour, all_reduce_add_rms_norm, batch_invariant, raise_if_failed, settings

SUPPORTED = ("0.5.17", "0.5.23")
# SGLang's RMSNorm reads the residual sum before it is rounded, multiplies in fp32 and rounds once, unless it is asked to round
# before the weight.
ROUND_ONCE, ROUND_TWICE = SGLANG, VLLM
# A process that runs models has imported this by the time it loads plugins; in the others, which check the arguments or turn
# tokens into text, the modules of the layers are not imported for us.
SCHEDULER = "sglang.srt.managers.scheduler"
# A dense MLP's projections by the name that SGLang's models give them; experts and shared experts are one level deeper.
DENSE_MLP = re.compile(r"(^|\.)layers\.\d+\.mlp\.\w+$")


@dataclass(frozen=True)
class Hook:
    """One function of SGLang and what goes around it.

    Attributes:
        target: dotted path, as ``HookRegistry.register`` takes it.
        around: ``(original, *args, **kwargs) -> result``.
        parameters: what the function takes first, in this order: the canary for a version that differs.
    """

    target: str
    around: Callable[..., Any]
    parameters: tuple[str, ...]


@dataclass
class _State:
    # (hook, owner, attribute, what stood there)
    installed: list[tuple[Hook, Any, str, Any]] = field(default_factory=list)
    # SGLang's name of a group that voted for the op -> torch's name of it.
    ready: dict[str, str] = field(default_factory=dict)
    # MLPs that were taught to skip a batch without rows.
    guarded: list[torch.nn.Module] = field(default_factory=list)


_state = _State()
# Fused calls by site since the process started, eager ones only: a replayed CUDA graph does not pass through Python.
calls: Counter[str] = Counter()


def register() -> None:
    """The plugin: register the hooks with SGLang if ``TPFUSE_SGLANG`` is on. On any failure warn, and leave SGLang as it is."""
    try:
        if settings.SGLANG.value() and not _state.installed:
            _install(_hooks(_version()))
    except Exception as error:
        warnings.warn(
            f"tpfuse: not active in SGLang, which runs as without it: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


def undo() -> None:
    """Take every hook out. Call it on all ranks between the same two steps; may be called twice.

    Objects that SGLang has built keep references to the hooks, which from now on hand everything to SGLang's own functions.
    A dense MLP that was loaded over the attention TP group stays so, and is reduced over that group by SGLang. CUDA graphs that
    captured fused calls still make them: capture again.
    """
    _state.ready.clear()
    for module in _state.guarded:
        module.__dict__.pop("forward", None)
    _state.guarded.clear()
    installed, _state.installed = _state.installed, []
    for hook, owner, name, raw in reversed(installed):
        _restore(hook, owner, name, raw)


def active() -> list[str]:
    """The attention TP groups, by SGLang's name, whose calls are fused in this process."""
    return sorted(_state.ready)


def _version() -> str:
    found = importlib.metadata.version("sglang")
    release = re.match(r"\d+\.\d+\.\d+", found)
    if release is None or release.group() not in SUPPORTED:
        raise RuntimeError(f"SGLang {found} is not supported; supported are {', '.join(SUPPORTED)}")
    return release.group()


def _hooks(version: str) -> list[Hook]:
    if version == "0.5.17":
        from . import sglang_communicator as seams
    else:
        from . import sglang_boundary as seams  # type: ignore[no-redef]
    if SCHEDULER not in sys.modules:
        return [seams.arguments_hook()]
    runner = "sglang.srt.model_executor.model_runner.ModelRunner"
    return [
        seams.arguments_hook(),
        *seams.hooks(),
        Hook(f"{runner}.load_model", _load_model, ("self",)),
        Hook(f"{runner}.forward", _forward, ("self", "forward_batch")),
    ]


def _install(hooks: Sequence[Hook]) -> None:
    """Register all hooks or, where one function is not what it should be, none."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    found = []
    for hook in hooks:
        path, _, name = hook.target.rpartition(".")
        owner = pkgutil.resolve_name(path)
        raw = vars(owner).get(name)
        if raw is None:
            raise RuntimeError(f"{hook.target} does not exist")
        takes = tuple(inspect.signature(_function(raw)).parameters)
        if takes[: len(hook.parameters)] != hook.parameters:
            raise RuntimeError(f"{hook.target} takes ({', '.join(takes)}), not ({', '.join(hook.parameters)}, ...)")
        found.append((hook, owner, name, raw))
    for hook, *_ in found:
        HookRegistry.register(hook.target, hook.around, HookType.AROUND)
    _state.installed = found


def _function(raw: Any) -> Any:
    return raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw


def _chain(function: Any, end: Any) -> int | None:
    """How many wrappers lie around ``end``; None where ``function`` does not lead there."""
    depth = 0
    while function is not end:
        function = getattr(function, "__wrapped__", None)
        depth += 1
        if function is None:
            return None
    return depth


def _restore(hook: Hook, owner: Any, name: str, raw: Any) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    registered = HookRegistry._hooks.get(hook.target, [])
    others = [entry for entry in registered if entry[1] is not hook.around]
    current = vars(owner).get(name)
    if current is not raw:
        if _chain(_function(current), _function(raw)) != len(registered):
            return  # somebody has wrapped it by hand since; our own function hands on
        setattr(owner, name, raw)
        _rebind(_function(current), _function(raw))
        HookRegistry._patched.discard(hook.target)
    if others:
        HookRegistry._hooks[hook.target] = others
        if current is not raw:
            HookRegistry.apply_hooks()
    else:
        HookRegistry._hooks.pop(hook.target, None)


def _rebind(old: Any, new: Any) -> None:
    """What SGLang's registry did for modules that had imported the function by name, backwards."""
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType):
            for name, value in list(vars(module).items()):
                if value is old:
                    setattr(module, name, new)


def _applied() -> str:
    """Why the hooks are not all in place, or nothing."""
    if not _state.installed:
        return "no hooks"
    missing = [
        hook.target
        for hook, owner, name, raw in _state.installed
        if not _chain(_function(vars(owner).get(name)), _function(raw))
    ]
    return f"SGLang did not apply {', '.join(missing)}" if missing else ""


# Sizes.


def parallel() -> Any:
    """SGLang's ``get_parallel()``: sizes, ranks and groups of this process."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel()


def shares(tp_size: int, attn_dp_size: int, attn_cp_size: int, moe_dense_tp_size: int | None) -> bool:
    """Whether the sizes ask for the layout that SGLang itself does not admit: dense MLPs over the attention TP group.

    Not so where that group is all of TP, which SGLang calls None, nor with context parallelism.
    """
    if attn_cp_size != 1 or tp_size % attn_dp_size:
        return False
    attn_tp_size = tp_size // attn_dp_size
    return moe_dense_tp_size == attn_tp_size and moe_dense_tp_size not in (1, tp_size)


def sharing() -> bool:
    """:func:`shares` for the sizes of this process, while the hooks are in."""
    if not _state.installed:
        return False
    now = parallel()
    return shares(now.tp_size, now.attn_dp_size, now.attn_cp_size, now.moe_dense_tp_size)


# The vote and the first call.


def _everyone(said: str) -> dict[int, str]:
    """What the ranks of this stage said, but for those that said nothing. Collective over SGLang's TP group."""
    group = parallel().tp_group
    heard: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(heard, said, group=group.cpu_group)
    return {rank: text for rank, text in zip(group.ranks, heard, strict=True) if text}


def _load_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Vote, and make the group's first call, which may not be inside a capture: SGLang captures its graphs after this."""
    result = original(self, *args, **kwargs)
    if _state.installed:
        prepare(self.model, self.model_config.hidden_size, self.dtype, torch.device(self.device))
    return result


def _forward(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Before a step, raise if a kernel of an earlier one gave up waiting for a peer: a replay raises nothing by itself."""
    for name in _state.ready.values():
        raise_if_failed(name)
    return original(self, *args, **kwargs)


def prepare(model: torch.nn.Module, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Check a loaded model and start fusing if all ranks can. Collective over SGLang's TP group; outside CUDA-graph capture.

    Raises:
        RuntimeError: a dense MLP that has to share the attention TP group is not cut over it. On all ranks: it would add up
            rows of different replicas.
    """
    now = parallel()
    shared = sharing()
    problem = _unpaired(model) if shared else ""
    problems = _everyone(problem)
    if problems:
        rank, text = next(iter(problems.items()))
        raise RuntimeError(f"tpfuse: moe_dense_tp_size={now.moe_dense_tp_size} is not possible: rank {rank}: {text}")
    if shared:
        _skip_empty(model)
    if now.attn_tp_size == 1:
        return
    group = now.attn_tp_group
    causes = _everyone(_applied()) or _everyone(_first_calls(model, group, hidden_size, dtype, device))
    if causes:
        rank, text = next(iter(causes.items()))
        if now.tp_rank == 0:
            warnings.warn(
                f"tpfuse: not active in SGLang, which runs as without it: rank {rank}: {text}",
                RuntimeWarning,
                stacklevel=2,
            )
        return
    _state.ready[group.unique_name] = group.device_group.group_name


def _first_calls(model: torch.nn.Module, group: Any, hidden_size: int, dtype: torch.dtype, device: torch.device) -> str:
    """Make a call for each kind of norm in the model, at least one; what went wrong, or nothing."""
    try:
        kinds = {(str(ROUND_ONCE), dtype): torch.ones(hidden_size, dtype=dtype, device=device)}
        norms: list[Any] = list(model.modules())
        for norm in norms:
            flavour = rounding(norm, dtype)
            if flavour is not None and norm.weight.numel() == hidden_size:
                kinds[str(flavour), norm.weight.dtype] = norm.weight.detach()
        row = torch.zeros(1, hidden_size, dtype=dtype, device=device)
        with torch.no_grad():
            for (flavour_text, _), weight in kinds.items():
                all_reduce_add_rms_norm(
                    row, row.clone(), weight, flavour=flavour_text, group=group.device_group.group_name
                )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# The layout that SGLang does not admit.


def cut(
    original: Callable[..., Any],
    self: Any,
    *args: Any,
    change: Callable[[dict[str, Any]], None],
    sums: bool = False,
    **kwargs: Any,
) -> Any:
    """Around the constructor of a parallel linear layer: one of a dense MLP is cut over the attention TP group.

    Args:
        change: names the group in the constructor's arguments.
        sums: the layer makes partial sums, and is to sum them over that group as well.
    """
    bound = inspect.signature(original).bind(self, *args, **kwargs)
    if sharing() and DENSE_MLP.search(bound.arguments.get("prefix") or ""):
        change(bound.arguments)
        if sums:
            bound.arguments["use_dp_attention_reduce"] = True
        result = original(*bound.args, **bound.kwargs)
        self.tpfuse_shared = True
        return result
    return original(self, *args, **kwargs)


def _linears(layer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    from sglang.srt.layers.linear import ColumnParallelLinear, RowParallelLinear

    return {n: m for n, m in layer.named_modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)}


def _unpaired(model: torch.nn.Module) -> str:
    """What in a dense layer is cut over other ranks than its boundary reduces over, or nothing."""
    from . import sglang_boundary, sglang_communicator

    seams = sglang_communicator if _version() == "0.5.17" else sglang_boundary
    try:
        dense = {n: m for n, m in model.named_modules() if seams.is_shared_layer(m)}
        for name, layer in dense.items():
            linears = _linears(layer)
            if not any(getattr(linear, "tpfuse_shared", False) for linear in linears.values()):
                return f"{name} ({type(layer).__name__}) has no MLP of the name mlp that could be cut"
            for inner, linear in linears.items():
                ranks = seams.ranks_of(linear)
                if ranks not in (1, parallel().attn_tp_size):
                    return f"{name}.{inner} is cut over {ranks} ranks, attention over {parallel().attn_tp_size}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _skip_empty(model: torch.nn.Module) -> None:
    """Let a dense MLP of a replica without rows return at once: over all of TP it always had rows, and kernels rely on that."""
    parents = {name.rpartition(".")[0] for name, m in model.named_modules() if getattr(m, "tpfuse_shared", False)}
    for name in sorted(parents):
        mlp = model.get_submodule(name)
        if "forward" in vars(mlp):
            continue  # somebody else's, or ours of an earlier call
        mlp.forward = _unless_empty(mlp.forward)  # type: ignore[method-assign]
        _state.guarded.append(mlp)


def _unless_empty(forward: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Tensor) and x.shape[0] == 0:
            return x
        return forward(x, *args, **kwargs)

    return guarded


# The call.


def is_attention_group(group: Any) -> bool:
    """Whether a group of SGLang is of the ranks of this rank's attention TP group. Decided by the rank lists."""
    return group is not None and list(group.ranks) == list(parallel().attn_tp_group.ranks)


def is_ready() -> bool:
    """Whether calls of this rank's attention TP group may be fused: the same on all of its ranks."""
    return bool(_state.ready) and parallel().attn_tp_group.unique_name in _state.ready


def rounding(norm: Any, dtype: torch.dtype) -> Flavour | None:
    """The rounding order of one of SGLang's norms after an add, or None where the op does not compute what it computes."""
    from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNorm

    if type(norm) is GemmaRMSNorm:
        return GEMMA
    if type(norm) is not RMSNorm or not norm.has_weight or norm.variance_size_override is not None:
        return None
    if norm.fp32_residual or norm.override_orig_dtype not in (None, dtype) or getattr(norm, "x_pad_to_multiple", 0):
        return None
    return ROUND_TWICE if norm.cast_x_before_out_mul else ROUND_ONCE


def takes(norm: Any, dtype: torch.dtype) -> bool:
    """Whether the op stands in for this rank's attention TP group and this norm. Nothing here depends on the rows."""
    from sglang.srt.batch_invariant_ops import is_batch_invariant_mode_enabled
    from sglang.srt.runtime_context import get_exec

    return (
        is_ready()
        and rounding(norm, dtype) is not None
        and not get_exec().comm.enable_quant_communications
        and not _quantizes(norm)
        and (batch_invariant() or not is_batch_invariant_mode_enabled())
    )


def _quantizes(norm: Any) -> bool:
    """Whether the norm also quantizes for the layer after it (0.5.23)."""
    linear = getattr(norm, "_quant_linear", None)
    if linear is None:
        return False
    from sglang.srt.layers.layernorm import _fp8_static_input_scale

    return _fp8_static_input_scale(linear) is not None


def fused(site: str, norm: Any, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Sum over the attention TP group, residual add and norm as one op; None, with nothing touched, where it does not apply."""
    if residual is None or not takes(norm, x.dtype) or x.dtype != residual.dtype:
        return None
    if x.shape != residual.shape or x.shape[0] == 0:
        return None
    if not torch.compiler.is_compiling():
        calls[site] += 1
    return all_reduce_add_rms_norm(
        x,
        residual,
        norm.weight,
        eps=norm.variance_epsilon,
        flavour=rounding(norm, x.dtype) or ROUND_ONCE,
        group=_state.ready[parallel().attn_tp_group.unique_name],
    )
