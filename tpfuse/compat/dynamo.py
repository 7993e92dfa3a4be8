"""Dynamo: sources, frames, recompiles, and what is run or written while it traces."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch


def source_name(source: Any) -> str:
    """Where Dynamo took a graph input from, e.g. ``L['self'].eps``.

    Why private: only Dynamo's ``Source`` knows; its ``name`` is a method before torch 2.10 and a property after.
    """
    name = source.name
    return name() if callable(name) else name


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


def may_vary(tensor: torch.Tensor, dim: int) -> None:
    """Let Dynamo make one size of an input a symbol, if the code allows. Why semi-private: only the name is documented."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


ROOM = 64


@dataclass
class _Room:
    """Who is inside of :func:`room_for_recompiles`.

    Attributes:
        lock: around every change of these and of the limit.
        relying: threads inside that found their limit raised, by another thread that is inside or by the user.
        owed: the limit to go back to, left by a thread that raised it and went while others relied on it; or None.
        mine: per thread, how often it is inside.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    relying: int = 0
    owed: int | None = None
    mine: threading.local = field(default_factory=threading.local)


_room = _Room()


@contextlib.contextmanager
def room_for_recompiles() -> Iterator[None]:
    """A context in which a function may have a graph for each of many shapes, also while other threads enter and leave it.

    Why private: past ``recompile_limit`` (8) Dynamo runs a function eagerly or, with ``fullgraph``, raises. A server's batch
    sizes are more than 8. Set by hand, for each decode step comes through here: ``config.patch`` makes a class for each call.
    In torch 2.11 the setting is one for all threads: a thread that put it back would take it from those inside, so the last of
    them does. In torch 2.13 each thread has its own.
    """
    depth = getattr(_room.mine, "depth", 0)
    before = _enter() if depth == 0 else None
    _room.mine.depth = depth + 1
    try:
        yield
    finally:
        _room.mine.depth = depth
        if depth == 0:
            _leave(before)


def _limit_is_per_thread() -> bool:
    """Whether torch keeps settings in context variables, as 2.13 does, which other threads do not see."""
    settings = getattr(torch._dynamo.config, "_config", {})
    return isinstance(getattr(settings.get("recompile_limit"), "user_override", None), contextvars.ContextVar)


def _enter() -> int | None:
    """Make room. Returns the limit that was there, or None where there was room."""
    config: Any = torch._dynamo.config
    with _room.lock:
        before: int = config.recompile_limit
        if before >= ROOM:
            _room.relying += not _limit_is_per_thread()
            return None
        config.recompile_limit = ROOM
        return before


def _leave(before: int | None) -> None:
    config: Any = torch._dynamo.config
    with _room.lock:
        if before is None:
            if _limit_is_per_thread():
                return
            _room.relying -= 1
            before, _room.owed = (None, _room.owed) if _room.relying else (_room.owed, None)
        elif _room.relying:
            before, _room.owed = None, before
        if before is not None:
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


def graph_end_of(gm: torch.fx.GraphModule) -> Any | None:
    """What ended a graph of Dynamo's: ``reason`` (text), ``user_stack`` (``FrameSummary``, the innermost last) and
    ``graph_break`` (False where the traced function returned).

    Why private: Dynamo leaves it on the graph for its own tools alone.
    """
    return getattr(gm, "compile_subgraph_reason", None)


def graph_break_of(gm: torch.fx.GraphModule) -> Any | None:
    """:func:`graph_end_of` where a graph break ended it, else None."""
    cause = graph_end_of(gm)
    return cause if getattr(cause, "graph_break", False) else None


def is_entry_of_compiled(code: types.CodeType) -> bool:
    """Whether a frame of the call stack is where a function that ``torch.compile`` made is entered.

    Why private: nothing else on the stack tells what Dynamo was given from who called it.
    """
    return code.co_name in ("compile_wrapper", "_fn") and code.co_filename == torch._dynamo.eval_frame.__file__


@dataclass(frozen=True)
class GivenUp:
    """What Dynamo gave up, and runs without a graph.

    Attributes:
        backend: the name that ``torch.compile`` was given, or the backend function's.
        name, place: of the function; ``place`` is ``file:line`` of what Dynamo could not trace, or where the function begins.
        reason: Dynamo's, in its first line.
        transformed: whether a transform of ``torch.func`` is under way.
    """

    backend: str
    name: str
    place: str
    reason: str
    transformed: bool


def at_compile_end(call: Callable[[], None]) -> None:
    """Call a function when Dynamo is done with a function of the user's, whether or not there is a graph; at most once.

    Why private: ``torch._dynamo`` has this hook for its own tools. ``torch._dynamo.reset`` takes it away again.
    """
    from torch._dynamo.callback import callback_handler

    # A method of the object that was registered before is equal to it, where two functions would not be.
    hook = _CompileEnd(call)
    if hook not in callback_handler.end_callbacks:
        callback_handler.register_end_callback(hook)


@dataclass(frozen=True)
class _CompileEnd:
    call: Callable[[], None]

    def __call__(self, _: Any) -> None:
        self.call()


def given_up() -> GivenUp | None:
    """Inside of :func:`at_compile_end`: what Dynamo has just given up; None where it made a graph, had nothing to do, or raises.

    Why private: the hook is not told for which backend Dynamo works, nor how it ended. The first is a local of Dynamo's frame
    on the call stack, the second is the exception that is being handled.
    """
    error = sys.exc_info()[1]
    if not isinstance(error, torch._dynamo.exc.Unsupported):
        return None
    frame, within = sys._getframe(1), []
    while frame is not None and not (frame.f_code.co_name == "_compile" and "compiler_fn" in frame.f_locals):
        within.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or frame.f_locals.get("one_graph"):  # with fullgraph the user gets the exception
        return None
    if all(passed not in within for passed, _ in traceback.walk_tb(error.__traceback__)):
        return None  # it is of an earlier compile: the user handles it, and compiles this meanwhile
    backend = torch._dynamo.eval_frame.innermost_backend(frame.f_locals["compiler_fn"])
    code = frame.f_locals["code"]
    stack = getattr(error, "real_stack", None)
    last = stack[-1] if stack else None
    return GivenUp(
        str(getattr(backend, "compiler_name", getattr(backend, "__name__", ""))),
        code.co_name,
        f"{last.filename}:{last.lineno}" if last else f"{code.co_filename}:{code.co_firstlineno}",
        str(error).strip().partition("\n")[0],
        torch._C._functorch.peek_interpreter_stack() is not None,
    )
