"""Why a graph ends before the norm that reads a sum, said of that sum.

The pass sees a sum become an output of its graph, and no more. Dynamo knows whether it broke the graph there, and the call stack
whether a larger module goes on behind it: with a layer that is compiled by itself, or one whose hooks Dynamo does not trace, the
sum of the MLP and the next layer's norm are in two graphs.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from torch import nn
from torch.fx import GraphModule

from tpfuse import compat, store, unfused
from tpfuse.passes import GraphReport, Reason, Site, dead_ends, fusion, source

log = logging.getLogger("tpfuse")
RESUMED = re.compile(r"^torch_dynamo_resume_in_(.+)_at_\d+$")
JUMP = "generic_jump"  # Dynamo's word for a branch that depends on a tensor's values
CALL = getattr(nn.Module.__call__, "__code__", None)
FSDP = ("FSDPModule", "FullyShardedDataParallel")


@dataclass(frozen=True)
class End:
    """What ends a graph.

    Attributes:
        text: a clause for the detail of a site.
        cut: whether the model goes on behind it, so that the norm may be there.
    """

    text: str
    cut: bool


REGION = End(
    "this graph is a region inside of another one (nested_compile_region, torch.cond), which gives the sum to that one. End "
    "such regions behind a norm, or compile the model without them",
    cut=True,
)


def look(reports: Sequence[GraphReport], gm: GraphModule, policy: str, fuel: int | None) -> None:
    """Say of each sum that leaves a graph what ends it, and warn once where a model loses half of its fusions so.

    Called while the graph is compiled, for the call stack tells who called it.

    Args:
        reports: of one Dynamo graph and the graphs inside of it.
        gm: that Dynamo graph.
        policy, fuel: as in :func:`tpfuse.unfused.look`.
    """
    if not any(_leaves(site) for report in reports for site in report.sites):
        return
    end = _end_of(gm)
    outer = _outer(reports, gm)
    for report in reports:
        here = end if report is outer or outer is None else REGION
        if here is None:
            continue
        leaving = [site for site in report.sites if _leaves(site)]
        report.sites = [_explained(site, here) if _leaves(site) else site for site in report.sites]
        if here.cut and leaving and policy != "off" and fuel is None:
            _warn(report, len(leaving), here)


def _outer(reports: Sequence[GraphReport], gm: GraphModule) -> GraphReport | None:
    """Which report is of the graph that holds the others; None where no graph is inside of another one."""
    if not any(isinstance(module, GraphModule) for module in gm.modules() if module is not gm):
        return None
    named = [report for report in reports if any(note.startswith(fusion.INSIDE) for note in report.notes)]
    # Without a name: Inductor runs passes over the graphs inside first, and passes do not see them.
    return named[0] if named else reports[-1]


def _end_of(gm: GraphModule) -> End | None:
    """:func:`end_of`, or None: on the call stack are objects of anyone's making, and a word in a report is worth no compile."""
    try:
        return end_of(gm)
    except Exception as error:
        log.debug("what ends a graph was not found out: %s: %s", type(error).__name__, error)
        return None


def end_of(gm: GraphModule) -> End | None:
    """What ends a Dynamo graph that is being compiled; None where nothing is known."""
    cause = compat.graph_end_of(gm)
    if cause is None or not cause.user_stack:
        return None
    if cause.graph_break:
        return End(f"a graph break ends the graph at {place_of_break(cause)} ({why_of_break(cause)})", cut=True)
    outermost = cause.user_stack[0]
    where = f"{outermost.filename}:{outermost.lineno}"
    resumed = RESUMED.match(outermost.name)
    name = resumed[1] if resumed else outermost.name
    inside, caller = _modules(name if resumed else None)
    what = f"{type(inside).__name__}.{name}" if inside is not None and name == "forward" else name
    if caller is None:
        return End(f"the compiled function {what} returns it ({where})", cut=False)
    goes_on = f"{type(caller.module).__name__}.{caller.name}, which goes on at {caller.place}"
    if caller.apart:
        return End(f"{what} is compiled by itself, and returns it ({where}) to {goes_on}", cut=True)
    hooks = f"; the hooks of FSDP around {what} are not traced, so serve without FSDP" if _is_sharded(inside) else ""
    return End(
        f"the graph ends where {what} returns ({where}), for Dynamo did not trace its caller, {goes_on} "
        f"(TORCH_LOGS=graph_breaks shows why{hooks})",
        cut=True,
    )


def origin_of(gm: GraphModule) -> str:
    """``file.py:line`` where a Dynamo graph ends in the compiled function, without its folder; empty where nothing is known."""
    cause = compat.graph_end_of(gm)
    stack = getattr(cause, "user_stack", None)
    return source.short(f"{stack[0].filename}:{stack[0].lineno}") if stack else ""


def place_of_break(cause: Any) -> str:
    """``file:line`` of a graph break; torch's own lines are of no use to the model's owner, unless there are no others."""
    mine = [frame for frame in cause.user_stack if not source.is_library(frame.filename)] or cause.user_stack
    return f"{mine[-1].filename}:{mine[-1].lineno}"


def why_of_break(cause: Any) -> str:
    """Dynamo's reason for a graph break, in its first line."""
    why: str = cause.reason.strip().partition("\n")[0]
    return f"a branch on values of a tensor, {why}" if why.startswith(JUMP) else why


def _leaves(site: Site) -> bool:
    return not site.fused and site.detail.endswith(dead_ends.UNKNOWN_END)


def _explained(site: Site, end: End) -> Site:
    # Where the model goes on, the sum is no output that its owner asked for.
    reason = Reason.NO_NORM.value if end.cut else site.reason
    return replace(site, reason=reason, detail=f"{site.detail.removesuffix(dead_ends.UNKNOWN_END)}: {end.text}")


def _warn(report: GraphReport, leaving: int, end: End) -> None:
    """Where nothing at all was fused, :mod:`tpfuse.unfused` speaks."""
    if unfused.alone() or 2 * leaving < len(report.sites) or not any(report.fused for report in store.reports()):
        return
    site = next(site for site in report.sites if site.detail.endswith(end.text))
    unfused.tell(
        "graph-end",
        f"{leaving} of the {len(report.sites)} reductions of {report.graph_id} not fused ({site.source}): {site.detail}. "
        f"{site.remedy} Other graphs may end so too: print(*tpfuse.reports())",
    )


@dataclass(frozen=True)
class Caller:
    """A module whose own code waits for what is being compiled.

    Attributes:
        module: itself.
        name: of its method, mostly ``forward``.
        place: ``file:line`` of the call.
        apart: whether the compiled function begins behind it. If not, Dynamo was given this method too and left it out.
    """

    module: nn.Module
    name: str
    place: str
    apart: bool


def _modules(resumed: str | None) -> tuple[nn.Module | None, Caller | None]:
    """(the module that is being compiled, the innermost one whose own code has called it), from the call stack.

    Variables are read in torch's frame alone, which calls a module. Before Python 3.13 a frame of the user's would keep what it
    held when asked for its variables until it ends, and the dictionary that ``locals()`` gave it would change.

    Args:
        resumed: name of the function whose rest is compiled: behind a graph break it is on the stack itself, and no caller.
    """
    inside: nn.Module | None = None
    apart = False
    own: tuple[FrameType, bool] | None = None  # the outermost frame so far of the module that the next call is of
    for frame in _stack():
        apart = apart or compat.is_entry_of_compiled(frame.f_code)
        if frame.f_code is CALL:
            module = frame.f_locals["self"]
            if own is not None:
                return inside, _caller(module, *own)
            inside = module if inside is None else inside
        elif not source.is_library(frame.f_code.co_filename):
            if resumed is not None and _function(frame) == resumed:
                # The rest of a function is called by the function, perhaps through other rests.
                resumed = None if frame.f_code.co_name == resumed else resumed
            else:
                own = frame, apart
    return inside, None


def _caller(module: nn.Module, frame: FrameType, apart: bool) -> Caller:
    return Caller(module, _function(frame), f"{frame.f_code.co_filename}:{frame.f_lineno}", apart)


def _function(frame: FrameType) -> str:
    return RESUMED.sub(r"\1", frame.f_code.co_name)


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_sharded(module: nn.Module | None) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = tuple(kind for name in FSDP if (kind := getattr(fsdp, name, None)) is not None)
    return isinstance(module, kinds)
