"""Graphs for tests of the pass: traced on a fake process group in this process, no ranks needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from functorch.compile import aot_function, make_boxed_func
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.functional_utils import has_data_mutation
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from tpfuse.passes import GraphReport, PassOptions, fuse

OP = torch.ops.tpfuse.all_reduce_add_rms_norm.default
ALL = PassOptions(policy="all")


def start_fake_group(world_size: int = 4, rank: int = 0) -> None:
    """A default group whose collectives return at once, for tracing only. Replaces an existing default group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def world() -> str:
    return dist.group.WORLD.group_name


def all_reduce(x: torch.Tensor, op: str = "sum", group: str | None = None) -> torch.Tensor:
    """The functional all-reduce with its wait."""
    started = torch.ops._c10d_functional.all_reduce(x, op, group or world())
    return torch.ops._c10d_functional.wait_tensor(started)


def trace(f: Callable[..., Any], args: Sequence[Any], dynamic: Sequence[int] = ()) -> GraphModule:
    """The functional ATen graph of ``f``, as AOTAutograd hands it to the pass.

    ``dynamic`` names the dimensions of 3-D inputs that become symbolic.
    """
    if not dynamic and (at_once := traced_at_once(f, args)) is not None:
        return at_once
    return traced_by_aot(f, args, dynamic)


def traced_at_once(f: Callable[..., Any], args: Sequence[Any]) -> GraphModule | None:
    """AOTAutograd's graph without AOTAutograd's analysis of ``f``, which traces it once more: half of the time.

    None where ``f`` writes into an argument: of that the graph alone does not know. ``test_graphs.py`` holds the two against
    each other.
    """
    wrote = False
    flat, shape = pytree.tree_flatten([a.clone() if isinstance(a, torch.Tensor) else a for a in args])

    def flattened(*given: Any) -> tuple[Any, ...]:
        nonlocal wrote
        out = pytree.tree_leaves(f(*pytree.tree_unflatten(given, shape)))
        wrote = any(has_data_mutation(a) for a in given if isinstance(a, torch.Tensor))
        return tuple(out)

    with torch.no_grad(), enable_python_dispatcher():
        functional = dispatch_functionalize(flattened, FunctionalTensorMode())
        gm = make_fx(functional, tracing_mode="fake")(*flat)
    if wrote:
        return None
    if gm.graph.eliminate_dead_code():
        gm.recompile()
    return gm


def traced_by_aot(f: Callable[..., Any], args: Sequence[Any], dynamic: Sequence[int] = ()) -> GraphModule:
    """The same by AOTAutograd itself; with ``dynamic``, through ``torch.compile``."""
    captured: list[GraphModule] = []

    def keep(gm: GraphModule, _: Any) -> Callable[..., Any]:
        captured.append(gm)
        return make_boxed_func(gm.forward)

    args = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    with torch.no_grad():
        if dynamic:
            torch._dynamo.reset()
            for a in args:
                for dim in dynamic if a.dim() == 3 else ():
                    torch._dynamo.mark_dynamic(a, dim)
            torch.compile(f, backend=aot_autograd(fw_compiler=keep))(*args)
        else:
            aot_function(f, fw_compiler=keep)(*args)
    return captured[0]


def trace_as_written(f: Callable[..., Any], args: Sequence[Any]) -> GraphModule:
    """The graph of ``f`` with its in-place writes left in, which no mount produces but a hand-made graph may hold."""
    with torch.no_grad():
        return make_fx(f, tracing_mode="fake")(*args)


def run(gm: GraphModule, *args: Any) -> Any:
    """Call a graph on copies of the arguments."""
    return gm(*[a.clone() if isinstance(a, torch.Tensor) else a for a in args])


def fused_copy(gm: GraphModule, options: PassOptions = ALL, **kw: Any) -> tuple[GraphModule, GraphReport]:
    """A rewritten copy of ``gm`` and the report."""
    new = copy.deepcopy(gm)
    report = fuse(new, options, **kw)
    return new, report


def count(gm: GraphModule, target: Any = OP) -> int:
    return sum(1 for n in gm.graph.nodes if n.target is target)


def all_reduces_left(gm: GraphModule) -> int:
    return sum("all_reduce" in str(n.target) and not str(n.target).startswith("tpfuse.") for n in gm.graph.nodes)


def equal(a: Any, b: Any) -> bool:
    """Bitwise equality of nested outputs, dtypes included."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
