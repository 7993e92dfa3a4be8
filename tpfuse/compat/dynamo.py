"""Dynamo: sources, frames, recompiles, and what is run or written while it traces."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
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
