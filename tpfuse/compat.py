"""Every private torch API that tpfuse touches, in one place, each with the reason.

``tests/test_compat.py`` has one canary for each name: when a torch release moves one, that test says so by name.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist


def resolve_group(name: Any) -> dist.ProcessGroup:
    """The process group that a functional collective's ``group_name`` argument stands for.

    Why private: the mapping from name to group has no public reader; the name is all that a graph holds.
    Raises whatever torch raises for an unknown name.
    """
    if isinstance(name, dist.ProcessGroup):
        return name
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


def group_reference(group: Any) -> Callable[[], Any]:
    """A function that returns the group while it exists, and does not keep it alive.

    Why private: torch holds the Python object of every group that it made in ``distributed_c10d._world`` until the group is
    destroyed, so a weak reference lives exactly as long. A group that was registered in another way may have no lasting Python
    object: it is held.
    """
    from torch.distributed.distributed_c10d import _world

    return weakref.ref(group) if group in _world.pg_map else lambda: group


def is_group(name: str, reference: Callable[[], Any]) -> bool:
    """Whether a name still stands for the group that :func:`group_reference` was given: torch gives names out again.

    Asked on every eager call: 0.2 us. Why private: as for :func:`resolve_group`.
    """
    try:
        return dist.distributed_c10d._resolve_process_group(name) is reference()  # type: ignore[arg-type]
    except RuntimeError:  # no group has this name any more
        return False


def group_store(group: dist.ProcessGroup) -> Any:
    """The store of one group. Why private: torch has a public reader for none of its stores."""
    from torch.distributed.distributed_c10d import _get_process_group_store

    return _get_process_group_store(group)


def known_groups() -> list[tuple[str, tuple[int, ...]]]:
    """(name, global ranks) of this process's groups in creation order; empty without a default group.

    Why private: torch keeps the list of groups in ``distributed_c10d._world``. Creation order is the same on every rank
    of a correct program, names are not.
    """
    if not dist.is_available() or not dist.is_initialized():
        return []
    from torch.distributed.distributed_c10d import _world

    groups = []
    for group in list(_world.pg_map):
        try:
            groups.append((str(group.group_name), tuple(dist.get_process_group_ranks(group))))
        except (RuntimeError, KeyError):  # a group that is being destroyed
            continue
    return groups


def forget_symmetric_memory(group_name: str) -> None:
    """Make torch's symmetric memory meet a group of this name anew.

    Why private: torch keeps the store of a group by its name, also when the group is gone, and gives the name to another group
    after a new ``init_process_group``; its rendezvous would then go through the store of the old one.
    """
    import torch.distributed._symmetric_memory as symm_mem

    for cache in ("_group_name_to_store", "_group_name_to_workspace_tensor"):
        getattr(symm_mem, cache, {}).pop(group_name, None)


def default_store() -> Any:
    """The key-value store over which the default group was made.

    Why private: ranks compare what they decided without a collective, and no public name reaches that store.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def rank() -> int:
    """This process's global rank; 0 without a default group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def statically_true(condition: Any) -> bool:
    """Whether a possibly symbolic condition is known to hold, without adding a guard.

    Why semi-private: a plain ``bool()`` of a symbolic comparison would specialise the graph to the sizes of one call.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def follows_from_guards(condition: Any) -> bool:
    """:func:`statically_true`, or a comparison that a guard of the graph makes in other symbols.

    Why private: torch keeps what guards imply under the names that sizes had when the guard was made. Once a size is found to
    equal another one (two inputs are added, say), a question about the other one misses it.
    """
    if statically_true(condition):
        return True
    node = getattr(condition, "node", None)
    env = getattr(node, "shape_env", None)
    if node is None or env is None:
        return False
    from torch.fx.experimental.symbolic_shapes import canonicalize_bool_expr

    wanted = canonicalize_bool_expr(env.replace(node.expr))
    return any(canonicalize_bool_expr(env.replace(guard.expr)) == wanted for guard in env.guards)


def guarded(condition: Any) -> bool:
    """:func:`follows_from_guards`, or a condition that holds for the sizes of this trace and is a guard of the graph from now on.

    Why private: torch has no public way to guard on a comparison that must not raise where it has no example sizes.
    """
    if follows_from_guards(condition):
        return True
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(condition))


def number_of(size: Any) -> int | None:
    """A size that is one number, whatever the sizes of the inputs are; None for any other.

    Why private: sums of symbols may leave a number that is still a ``SymInt``, and only its node's expression tells.
    """
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else None


def known_at_run_time_only(size: Any) -> bool:
    """Whether a size is a symbol without a value at trace time (a count of non-zero elements, say).

    Why private: comparing such a size in Python raises; only its expression tells.
    """
    from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

    return not isinstance(size, int) and has_free_unbacked_symbols(size)


def size_hint(value: Any) -> int | str:
    """A size for reports: the number when it is known, else the symbol's text."""
    return int(value) if isinstance(value, int) else str(value)


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


def example_size(size: Any) -> int:
    """A number for a possibly symbolic size: the one it was traced with, or 2 where it never had one.

    Why private: only a ``SymInt``'s node holds the expression and its hint.
    """
    if isinstance(size, int):
        return size
    if size.node.hint is not None:
        return int(size.node.hint)
    expression = size.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, 2)))


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


def custom_graph_pass() -> type:
    """Inductor's base class for passes with a uuid, so that its compile caches stay usable.

    Why private: there is no public way to give a pass an identity.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


def custom_passes(setting: Any) -> tuple[Any, ...]:
    """The passes that one Inductor setting holds: none, one, or (from torch 2.13 on) a list of them."""
    if setting is None:
        return ()
    return tuple(setting) if isinstance(setting, list | tuple) else (setting,)


def wants_inference_flag(graph_pass: Any) -> bool:
    """Whether a pass is called as ``(graph, is_inference)``. Why private: the class is Inductor's own."""
    from torch._inductor import custom_graph_pass as module

    aware = getattr(module, "CustomInferenceAwareGraphPass", None)
    return aware is not None and isinstance(graph_pass, aware)


def inductor_config(name: str, default: Any = None) -> Any:
    """The current value of one Inductor setting, e.g. a pass that the user installed; ``default`` where torch lacks it."""
    from torch._inductor import config

    return getattr(config, name, default)


def inductor_settings() -> list[str]:
    """The names of all Inductor settings, to judge a user's options before compiling."""
    from torch._inductor import config

    return list(config.get_config_copy())


def compile_fx(gm: torch.fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    """Inductor on a Dynamo graph. Why private: ``torch.compile`` cannot pass a pass for one compile to its backend."""
    from torch._inductor.compile_fx import compile_fx as inductor

    return cast(Callable[..., Any], inductor(gm, inputs, config_patches=patches))


def inductor_mode_options(mode: str | None) -> dict[str, Any]:
    """The Inductor settings that a ``torch.compile`` mode stands for."""
    from torch._inductor import list_mode_options

    return list_mode_options(mode) if mode else {}


def inductor_modes() -> tuple[str, ...]:
    """The names of the modes of ``torch.compile``."""
    from torch._inductor import list_mode_options

    return tuple(list_mode_options())


def without_compile_caches() -> AbstractContextManager[Any]:
    """A context in which AOTAutograd's and FX's graph caches are neither read nor written.

    Why private: the switches are settings of ``torch._functorch`` and ``torch._inductor``.
    """
    from contextlib import ExitStack

    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    stack = ExitStack()
    stack.enter_context(functorch.patch(enable_autograd_cache=False))
    stack.enter_context(inductor.patch(fx_graph_cache=False))
    return stack


def cache_folder() -> str:
    """The folder of Inductor's caches, beside which reports are kept."""
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir
    except ImportError:  # before that module was split off
        from torch._inductor.codecache import cache_dir
    return cache_dir()


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


def source_name(source: Any) -> str:
    """Where Dynamo took a graph input from, e.g. ``L['self'].eps``.

    Why private: only Dynamo's ``Source`` knows; its ``name`` is a method before torch 2.10 and a property after.
    """
    name = source.name
    return name() if callable(name) else name


def guarded_float(symbol: torch.SymFloat) -> float:
    """The value of a symbolic float, guarded. Why private: ``float()`` of it guards too, but names no place for logs."""
    return symbol.node.guard_float(__file__, 0)


def in_compiled_module() -> bool:
    """Whether a compiled module's call is under way, also in frames that a graph break left to eager.

    Why private: ``torch.compiler.is_compiling`` is false in such frames, and nothing public tells them apart.
    """
    inside = getattr(torch._dynamo.eval_frame, "_is_in_optimized_module", None)
    return inside is not None and bool(inside())


def trace_time_call() -> Callable[[Callable[[Any], None]], None]:
    """What compiled code calls as ``call(function)`` so that Dynamo runs ``function`` while it traces that place.

    Why private: Dynamo traces a plain call into the graph; only its own ``comptime`` runs at trace time, and only when the
    traced code holds that very object. Outside of a compile the call does nothing.
    """
    from torch._dynamo.comptime import comptime

    return cast(Callable[[Callable[[Any], None]], None], comptime)


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Add a JSON document to the structured trace of ``TORCH_TRACE=DIR``. With that off, ``payload`` is called for the
    first record of a process at most.

    Why private: torch documents the trace and ``tlparse``, but its writer is ``torch._logging.trace_structured``.
    Raises whatever a torch with another signature raises.
    """
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "json"}, payload_fn=payload)


def start_fake_group(world_size: int, rank: int = 0) -> None:
    """A default process group whose collectives return at once and that has no peers.

    Why private: torch keeps its fake backend among its test helpers; importing the module registers it.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


def symmetric_memory_error() -> str | None:
    """Why torch's symmetric memory cannot be imported; None when it can. Why private: the module has no public name."""
    try:
        importlib.import_module("torch.distributed._symmetric_memory")
    except ImportError as error:
        return str(error)
    return None


def symmetric_memory() -> Any:
    """torch's symmetric memory. Why private: the module has no public name yet; what is used of it is documented."""
    return importlib.import_module("torch.distributed._symmetric_memory")


def current_device() -> int:
    """The current CUDA device. Why private: asked on every call, and the public function initialises CUDA first (0.3 us more)."""
    return torch._C._cuda_getDevice()


def current_stream_handle(index: int) -> int:
    """The driver's handle of the current stream of a device.

    Why private: asked on every call, and ``torch.cuda.current_stream`` makes a stream object first (1 us more).
    """
    return torch._C._cuda_getCurrentRawStream(index)


def compile_in_this_process() -> None:
    """Inductor starts no workers that compile beside a measurement. Why private: its settings have no public home."""
    torch._inductor.config.compile_threads = 1  # type: ignore[attr-defined]


def auto_functionalized() -> Any:
    """The operator that stands for one that writes its arguments. Why private: higher-order operators have no public home."""
    from torch._higher_order_ops.auto_functionalize import auto_functionalized as operator

    return operator


def auto_functionalized_v2() -> Any:
    """The same as torch's compiler uses by default, which knows views. Why private: as :func:`auto_functionalized`."""
    from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2 as operator

    return operator


def may_vary(tensor: torch.Tensor, dim: int) -> None:
    """Let Dynamo make one size of an input a symbol, if the code allows. Why semi-private: only the name is documented."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


ROOM = 64


@contextlib.contextmanager
def room_for_recompiles() -> Iterator[None]:
    """A context in which a function may have a graph for each of many shapes.

    Why private: past ``recompile_limit`` (8) Dynamo runs a function eagerly or, with ``fullgraph``, raises. A server's batch
    sizes are more than 8. Set by hand, for each decode step comes through here: ``config.patch`` makes a class for each call.
    """
    config: Any = torch._dynamo.config
    before = config.recompile_limit
    if before >= ROOM:
        yield
        return
    config.recompile_limit = ROOM
    try:
        yield
    finally:
        config.recompile_limit = before


def with_room_for_recompiles(call: Callable[..., Any]) -> Callable[..., Any]:
    """What ``torch.compile`` returned, called inside of :func:`room_for_recompiles`."""

    @functools.wraps(call)
    def roomy(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # part of another compiled function, whose limit counts
            return call(*args, **kwargs)
        with room_for_recompiles():
            return call(*args, **kwargs)

    return roomy


def generator_offset(generator: torch.Generator) -> int:
    """How many numbers a CUDA generator has given. Why semi-private: torch does not document it; the whole state is a copy."""
    return int(generator.get_offset())


def set_generator_offset(generator: torch.Generator, offset: int) -> None:
    """Go back to an earlier :func:`generator_offset`."""
    generator.set_offset(offset)


@contextlib.contextmanager
def tracing_through_compiled() -> Iterator[None]:
    """Inside, FX traces a function that is decorated with ``torch.compile`` as what it wraps.

    Why private: ``force_eager`` is public, but Dynamo's refusal to be traced by FX is asked first, in its settings.
    """
    import torch._dynamo

    with torch._dynamo.config.patch(error_on_nested_fx_trace=False), torch.compiler.set_stance("force_eager"):
        yield


def graph_break_of(gm: torch.fx.GraphModule) -> Any | None:
    """What ended a graph of Dynamo's: ``reason`` (text) and ``user_stack`` (``FrameSummary``, the innermost last).

    None where the traced function returned. Why private: Dynamo leaves it on the graph for its own tools alone.
    """
    cause = getattr(gm, "compile_subgraph_reason", None)
    return cause if getattr(cause, "graph_break", False) else None
