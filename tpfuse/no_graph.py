"""Functions that Dynamo leaves to eager altogether: no graph of them reaches the backend, so no report can say it.

A module under ``torch.vmap`` is one, and so is whatever Dynamo gives up before the first operator. The results are right, and
nothing is fused.
"""

from __future__ import annotations

import atexit
import logging

from tpfuse import compat, store, unfused
from tpfuse.passes import GraphReport

log = logging.getLogger("tpfuse")
BACKEND = "tpfuse"
_watching = False


def watch() -> None:
    """From now on, keep in mind what Dynamo was given for this backend and left to eager; at the exit, tell of it."""
    global _watching  # noqa: PLW0603
    compat.at_compile_end(_notice)
    if not _watching:
        atexit.register(look)
    _watching = True


def reports() -> list[GraphReport]:
    """The report of every graph compiled since the last :func:`tpfuse.clear_reports`, in order.

    Without any, a :class:`tpfuse.FusionWarning` says what Dynamo left to eager, if that is why.
    """
    found = store.reports()
    look()
    return found


def look() -> None:
    """Warn where Dynamo left functions to eager and made no graph for this backend."""
    left = store.abandoned()
    if left and not store.reports():
        unfused.tell(
            "no-graph",
            f"Dynamo left to eager what torch.compile(backend={BACKEND!r}) was given, and nothing of it is fused: "
            f"{'; '.join(left)}. TORCH_LOGS=graph_breaks shows more, and fullgraph=True makes it an error",
        )


def _notice() -> None:
    """Called when Dynamo is done with a function, while what made it give up is still being handled. Never raises."""
    try:
        _notice_one()
    except Exception as error:
        log.debug("what Dynamo left to eager was not noticed: %s: %s", type(error).__name__, error)


def _notice_one() -> None:
    given_up = compat.given_up()
    if given_up is None or given_up.backend != BACKEND or unfused.alone():
        return
    what = f"{given_up.name} ({given_up.place})"
    if not given_up.transformed:
        store.abandon(f"{what}: {given_up.reason}")
        return
    store.abandon(f"{what}: called by a transform of torch.func that Dynamo did not trace")
    unfused.tell(  # at once, for what is called so has no graph for sure; another function may still get one
        "no-graph",
        f"{what} is called by a transform of torch.func (vmap, grad, jvp) that Dynamo did not trace, so it is not compiled and "
        "nothing of it is fused. Give the model the whole batch in one call instead of torch.vmap, which reads the sums of "
        "functional collectives before they are there, with any backend and without one",
    )
