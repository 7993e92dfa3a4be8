"""FX graphs, the fake tensors in them, and AOTAutograd, which makes them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch.fx import Node


def is_erased(node: torch.fx.Node) -> bool:
    """Whether a node was erased from its graph. Why private: fx keeps the mark in ``Node._erased`` only."""
    return node._erased


def storage_of(tensor: torch.Tensor) -> int | None:
    """A number that two tensors share exactly when they share memory; None for a tensor without a storage.

    Why private: a fake tensor's storage has no address, only an identity (``_cdata``), as Inductor's own passes use it.
    """
    if not torch._C._has_storage(tensor):
        return None
    return tensor.untyped_storage()._cdata


def is_mutation(node: torch.fx.Node) -> bool:
    """Whether a node writes one of its arguments. Why private: the rule is that of Inductor's mutation regions."""
    from torch._inductor.pattern_matcher import is_mutation_op

    return bool(is_mutation_op(node))


def fake_mode_of(tensors: Sequence[Any]) -> Any:
    """The fake tensor mode that made one of the tensors, or a new one. Why private: ``torch._guards`` alone can tell."""
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensorMode

    return detect_fake_mode(list(tensors)) or FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor: Any) -> bool:
    """Whether a tensor has no data. Why private: the class of fake tensors has no public name."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def without_fake_mode() -> AbstractContextManager[Any]:
    """A context in which tensors are real although a compile is under way.

    Why private: the pass runs inside AOTAutograd's fake tensor mode, and its proof of a rounding order needs real numbers.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def traced_apart(function: Callable[..., Any], *examples: torch.Tensor) -> torch.fx.Graph:
    """The functional ATen graph of a function on static shapes, whatever compile is under way. Why private: ``make_fx`` takes its
    fake tensors from the compile around it, and makes their sizes symbols, unless it gets others."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with without_fake_mode(), torch.no_grad():
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(example, static_shapes=True) for example in examples]
        return make_fx(torch.func.functionalize(function))(*fakes).graph


def copy_of(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A Dynamo graph for a second compile: a compiler owns what it is given and may edit it. Shares parameters and constants.

    Why private: AOTAutograd asks each input of the graph for ``_dynamo_source``, which copies of a node lose.
    """
    new = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph), type(gm).__name__)
    for name, value in vars(gm).items():
        vars(new).setdefault(name, value)
    new.meta = dict(gm.meta)
    for old, copied in zip(gm.graph.nodes, new.graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            copied._dynamo_source = old._dynamo_source
    for name, child in gm.named_children():  # graphs that this one calls
        if isinstance(child, torch.fx.GraphModule) and hasattr(new, name):
            setattr(new, name, copy_of(child))
    return new


def forget_traced_regions() -> None:
    """Have regions that torch traces once a compile (``nested_compile_region``) traced again by a second one.

    Why private: torch keeps their graphs with the compile of a frame. A pass edits them in place, and a second compile of the
    same frame would be handed what the first one has made of them.
    """
    context = torch._guards.TracingContext.try_get()
    if context is not None and hasattr(context, "hop_dispatch_set_cache"):
        context.hop_dispatch_set_cache = type(context.hop_dispatch_set_cache)()


def aot_autograd(**compilers: Any) -> Callable[..., Any]:
    """AOTAutograd with our compilers. Why private: the only public entry is the experimental functorch one."""
    from torch._dynamo.backends.common import aot_autograd as aot

    return aot(**compilers)


def boxed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a callable as taking one list that it may empty, which AOTAutograd's runtime expects of a compiler."""
    from functorch.compile import make_boxed_func

    return make_boxed_func(function)


def auto_functionalized() -> Any:
    """The operator that stands for one that writes its arguments. Why private: higher-order operators have no public home."""
    from torch._higher_order_ops.auto_functionalize import auto_functionalized as operator

    return operator


def auto_functionalized_v2() -> Any:
    """The same as torch's compiler uses by default, which knows views. Why private: as :func:`auto_functionalized`."""
    from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2 as operator

    return operator


def triton_kernel_of(node: Node) -> str | None:
    """The name of the Triton kernel that a node of a compiled graph launches, or None.

    Why private: a graph holds a kernel as its number in a table that has no public reader.
    """
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    if node.target not in (wrap.triton_kernel_wrapper_functional, wrap.triton_kernel_wrapper_mutation):
        return None
    try:
        kernel: Any = wrap.kernel_side_table.get_kernel(cast(int, node.kwargs["kernel_idx"]))
    except (AssertionError, KeyError):
        return None  # a graph of another process
    while not hasattr(kernel, "__name__") and hasattr(kernel, "fn"):  # below autotuning and heuristics
        kernel = kernel.fn
    return getattr(kernel, "__name__", None)


@contextlib.contextmanager
def tracing_through_compiled() -> Iterator[None]:
    """Inside, FX traces a function that is decorated with ``torch.compile`` as what it wraps.

    Why private: ``force_eager`` is public, but Dynamo's refusal to be traced by FX is asked first, in its settings.
    """
    import torch._dynamo

    with torch._dynamo.config.patch(error_on_nested_fx_trace=False), torch.compiler.set_stance("force_eager"):
        yield
