"""For layers written by hand: all-reduce, residual add and norm in one call, with the norm module that the layer has.

    from tpfuse.engines.layers import fused_allreduce_rms_norm

    hidden, residual = fused_allreduce_rms_norm(hidden, residual, self.post_attention_layernorm, group=tp_group)

is ``norm(all_reduce(hidden), residual)``. Three arguments and their order are those of vLLM's function of this name; the group
is named, because a group that is guessed sums the wrong ranks in silence. Where the norm rounds is not guessed either: at the
first call it is traced and proved as the pass does with a model's graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter, getitem
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from tpfuse import compat
from tpfuse.ops import Flavour, all_reduce_add_rms_norm
from tpfuse.passes import PassOptions, fuse

from . import vllm_compat, vllm_norms

__all__ = ["Rounding", "fused_allreduce_rms_norm", "rounding_of"]

OP = torch.ops.tpfuse.all_reduce_add_rms_norm.default
EPS = ("variance_epsilon", "eps", "epsilon")
ROWS = 3  # of the trace; the rounding of a row depends on no other


@dataclass(frozen=True)
class Rounding:
    """A norm as the op takes it.

    Attributes:
        flavour: its rounding order, as text.
        eps: added to the mean of squares.
        weight: the attribute of the module that holds the weight, or None.
    """

    flavour: str
    eps: float
    weight: str | None


_known: WeakKeyDictionary[nn.Module, dict[tuple[int, torch.dtype, bool, torch.dtype | None], Rounding]] = (
    WeakKeyDictionary()
)


def fused_allreduce_rms_norm(
    hidden_states: Tensor,
    residual: Tensor | None,
    norm: nn.Module,
    *,
    group: Any,
    flavour: Flavour | str | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """``norm(all_reduce(hidden_states), residual)`` in one op, with the norm's own rounding.

    Args:
        hidden_states: ``(..., H)``, bf16, fp16, fp32 or fp64: this rank's partial sum, from a projection that does not reduce.
        residual: its shape and dtype, or None for the first norm of a model.
        norm: called as ``norm(x, residual) -> (normed, residual)``, or as ``norm(x)`` where it takes one tensor; then the
            residual is added in the dtype of ``x``. Its weight is read at each call, its eps and rounding at the first.
        group: the process group to reduce over, or its name.
        flavour: the norm's rounding order, where the norm is a kernel and cannot be traced, or under ``torch.compile``.
        in_place: write the norm over ``hidden_states`` and the residual sum over ``residual``, and allocate nothing.
    Returns:
        ``(normed, residual sum)``. Without a residual the second is the sum itself.
    Raises:
        ValueError: a shape or dtype does not fit, the norm is none that the op repeats, or ``in_place`` without a residual.
        RuntimeError: the rounding is not known inside ``torch.compile``, or autograd would have to record the op.
    """
    if in_place and residual is None:
        raise ValueError("fused_allreduce_rms_norm: in_place=True writes the residual sum over residual, which is None")
    name = group if isinstance(group, str) else group.group_name
    if _one_rank(group):
        return _alone(hidden_states, residual, norm, in_place)
    if residual is not None and residual.dtype != hidden_states.dtype:
        # The op takes fp32 beside 16 bits and keeps it, a norm may round it: its trace had the dtype of the rows.
        raise ValueError(
            f"fused_allreduce_rms_norm: residual is {residual.dtype}, hidden_states {hidden_states.dtype}; expected one dtype. "
            "Cast the residual, or call tpfuse.ops.all_reduce_add_rms_norm, which keeps an fp32 residual beside 16-bit rows"
        )
    if flavour is None:
        found = _rounding(norm, hidden_states, residual is not None, name)
    else:
        found = _given(norm, str(flavour))
    return all_reduce_add_rms_norm(
        hidden_states,
        residual,
        None if found.weight is None else attrgetter(found.weight)(norm),
        eps=found.eps,
        flavour=found.flavour,
        group=name,
        out=(hidden_states, residual) if in_place and residual is not None else None,
    )


def _one_rank(group: Any) -> bool:
    if not isinstance(group, str):
        return group.size() == 1
    # Dynamo cannot look a name up; the op takes a group of one rank as well.
    return not torch.compiler.is_compiling() and compat.resolve_group(group).size() == 1


def _alone(x: Tensor, residual: Tensor | None, norm: nn.Module, in_place: bool) -> tuple[Tensor, Tensor]:
    """A group of one rank has nothing to sum."""
    normed, summed = _call(norm, _takes_a_residual(norm), x, residual)
    if in_place and residual is not None:
        # A norm may have done so by itself.
        normed = normed if normed is x else x.copy_(normed)
        summed = summed if summed is residual else residual.copy_(summed)
    return normed, summed


def _call(
    norm: Callable[..., Any], takes_a_residual: bool, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    if residual is None:
        found = norm(x)
        return (found[0], x) if isinstance(found, tuple) else (found, x)
    if takes_a_residual:
        found = norm(x, residual)
        if not isinstance(found, tuple) or len(found) != 2:  # a tensor of two rows could be taken apart as well
            raise ValueError(
                "fused_allreduce_rms_norm: called as norm(x, residual), the norm gave "
                f"{type(found).__name__}, expected (normed, residual); its second argument is no residual, a gate for example"
            )
        return found
    summed = residual + x
    return norm(summed), summed


def _takes_a_residual(norm: nn.Module) -> bool:
    parameters = inspect.signature(norm.forward).parameters.values()
    several = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return several or len([p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) > 1


def _given(norm: nn.Module, flavour: str) -> Rounding:
    eps = next((getattr(norm, name) for name in EPS if getattr(norm, name, None) is not None), None)
    if eps is None:
        raise ValueError(f"fused_allreduce_rms_norm: {type(norm).__name__} has none of the attributes {', '.join(EPS)}")
    # Read as text: Dynamo does not trace the parser, and the op checks it.
    return Rounding(flavour, float(eps), None if "none" in flavour.split("/") else "weight")


def _rounding(norm: nn.Module, x: Tensor, residual: bool, group: str) -> Rounding:
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "fused_allreduce_rms_norm: inside torch.compile the rounding order of the norm has to be given: pass flavour=, which "
            "tpfuse.engines.layers.rounding_of(norm, hidden_size, dtype, group=group).flavour finds beforehand"
        )
    weight = getattr(norm, "weight", None)  # a model may have been cast since the last call
    key = (x.shape[-1], x.dtype, residual, None if weight is None else weight.dtype)
    known = _known.get(norm)
    found = None if known is None else known.get(key)
    if found is None:
        found = rounding_of(norm, x.shape[-1], x.dtype, group=group, residual=residual)
        _known.setdefault(norm, {})[key] = found
    return found


def rounding_of(
    norm: nn.Module, hidden_size: int, dtype: torch.dtype, *, group: Any, residual: bool = True
) -> Rounding:
    """What a norm module computes after an all-reduce: traced, then proved by the pass, structure and numbers.

    Args:
        hidden_size, dtype: of the rows.
        group: any group of more than one rank that this process is in.
        residual: whether a residual is added.
    Raises:
        ValueError: the norm cannot be traced, or is none that the op repeats; the message says why.
    """
    what = f"fused_allreduce_rms_norm: {type(norm).__name__} for rows of {hidden_size} {dtype}"
    advice = "If it is a kernel whose rounding you know, pass flavour="
    name = group if isinstance(group, str) else group.group_name
    try:
        graph, held = _trace(norm, hidden_size, dtype, residual, name)
        vllm_norms.open_norms(graph.graph, lambda node: True, vllm_compat.norm_provider, [])
    except Exception as error:
        raise ValueError(f"{what} cannot be traced: {type(error).__name__}: {error}. {advice}") from error
    (site,) = fuse(graph, PassOptions(policy="all")).sites
    if not site.fused:
        raise ValueError(f"{what} is not what the op computes: {site.reason}: {site.detail}. {advice}")
    if "layer_norm" in site.pattern:
        raise ValueError(
            f"{what} is not what the op computes: it is a LayerNorm, whose op is tpfuse.ops.all_reduce_add_layer_norm. {advice}"
        )
    return _read(graph, held, residual, f"{what} does more than reduce, add and normalize. {advice}")


def _trace(
    norm: nn.Module, hidden_size: int, dtype: torch.dtype, residual: bool, group: str
) -> tuple[GraphModule, list[str]]:
    """The graph of all-reduce and norm, and the names of the norm's tensors, which are its inputs after the rows."""
    held: dict[str, Tensor] = dict([*norm.named_parameters(), *norm.named_buffers()])
    device = next((t.device for t in held.values()), torch.device("cpu"))
    adds = _takes_a_residual(norm)
    rows = [torch.zeros(ROWS, hidden_size, dtype=dtype, device=device) for _ in range(1 + residual)]

    def layer(*inputs: Tensor) -> Any:
        x = torch.ops._c10d_functional.all_reduce(inputs[0], "sum", group)
        x = torch.ops._c10d_functional.wait_tensor(x)
        tensors = dict(zip(held, inputs[len(rows) :], strict=True))
        return _call(lambda *a: functional_call(norm, tensors, a), adds, x, inputs[1] if residual else None)

    inputs = (*rows, *held.values())
    with torch.no_grad(), compat.tracing_through_compiled():
        written = make_fx(layer, tracing_mode="fake")(*inputs)
        # In a second step: what torch's own operators write in place shows in the first graph only.
        return make_fx(functionalize(written), tracing_mode="fake")(*inputs), list(held)


def _read(graph: GraphModule, held: list[str], residual: bool, otherwise: str) -> Rounding:
    """The arguments of the fused op, where the graph is that op and nothing else."""
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    op = next((n for n in graph.graph.nodes if n.target is OP), None)
    if op is None:  # fused in another op: a norm that quantizes
        raise ValueError(otherwise)
    x, added, weight, bias, eps, scale, flavour, post, _, *scales = cast(Any, op.args)
    outputs: list[Node] = []
    map_arg(graph.graph.output_node().args, outputs.append)
    picked = [tuple(n.args) if n.target is getitem else None for n in outputs]
    plain = bias is None and scale == 1.0 and not scales and not post
    plain = plain and x is inputs[0] and added is (inputs[1] if residual else None)
    names = dict(zip(inputs[1 + residual :], held, strict=True))
    if not plain or picked != [(op, 0), (op, 1)] or not (weight is None or weight in names):
        raise ValueError(otherwise)
    return Rounding(flavour, eps, None if weight is None else names[weight])
