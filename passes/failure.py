"""What becomes of an exception inside the pass: a refusal with reason ``internal``, and one warning."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

from torch.fx import Graph

from . import collectives, sharing
from .candidate import Found
from .options import PassOptions
from .reasons import Reason, Refusal
from .report import Site
from .site_of import site_of

log = logging.getLogger("tpfuse")
_warned: set[str] = set()


def internal(error: Exception) -> Refusal:
    """The refusal for an exception of the pass itself; warns once for each."""
    text = f"{type(error).__name__}: {error}"
    if text not in _warned:
        _warned.add(text)
        warnings.warn(
            f"tpfuse: the pass failed and left the graph as it was: {text}. This is a bug in tpfuse; the model runs unfused "
            "there. options={'tpfuse.verify': True} raises the exception with its traceback.",
            RuntimeWarning,
            stacklevel=3,
        )
    log.debug("the pass failed", exc_info=error)
    return Refusal(Reason.INTERNAL, text)


def guarded(c: collectives.Collective, options: PassOptions, look: Callable[[collectives.Collective], Found]) -> Found:
    """One all-reduce that the pass stumbles over must not cost the others their fusion."""
    try:
        return look(c)
    except Exception as error:
        if options.verify:
            raise
        return Found(c, internal(error), c.kind)


def kept(g: Graph, error: Exception) -> list[Site]:
    """One site for every all-reduce of a graph that was left as it was, without the part that failed."""
    refusal = internal(error)
    try:
        nowhere = sharing.Place("other", None, "")
        return [site_of(Found(c, refusal, c.kind), nowhere, []) for c in collectives.find(g)]
    except Exception:
        nodes = [n for n in g.nodes if collectives.spelling_of(n) is not None]
        reason = refusal.reason.value
        return [Site(False, reason, refusal.detail, "all_reduce", "other", None, (), None, "", [n.name]) for n in nodes]


def noted(g: Graph, look: Callable[[Graph], list[str]]) -> list[str]:
    """Notes about a graph for its report; what fails in looking for them hurts nothing."""
    try:
        return look(g)
    except Exception as error:
        log.debug("looking for notes failed", exc_info=error)
        return []
