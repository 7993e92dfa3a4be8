"""Compiled graphs with lowered sites: their sums are the group's own all-reduce, and stay so.

Batch-invariant mode sums in another way and is not known before a call, where the op asks. What has no op in it asks here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from tpfuse import compat
from tpfuse.ops import invariant
from tpfuse.ops.settings import BATCH_INVARIANT, batch_invariant
from tpfuse.passes import GraphReport


def guarded(compiled: Callable[..., Any], reports: Sequence[GraphReport]) -> Callable[..., Any]:
    """``compiled`` itself, or one that raises where the mode was switched on after the compile.

    Args:
        compiled: what Inductor returned.
        reports: of its graphs, made by this compile or kept beside a cache.
    """
    groups = {site.group for report in reports for site in report.sites if site.lowered}
    if not groups:
        return compiled
    remembered = [-1]  # when its groups were remembered last, in groups forgotten before

    @functools.wraps(compiled)
    def call(*args: Any) -> Any:
        if batch_invariant():
            raise RuntimeError(
                "tpfuse: batch_invariant was switched on after this graph was compiled, and its all-reduces sum in an order that "
                f"depends on the size of the call. Set it before compiling on every rank (option tpfuse.batch_invariant or "
                f"{BATCH_INVARIANT}), or call torch._dynamo.reset() to compile again"
            )
        now = invariant.times_forgotten()
        if remembered[0] != now:  # from here on the mode cannot be switched by itself, as after a call of the op
            remembered[0] = now
            for name, ranks in compat.known_groups():
                if ranks in groups:
                    invariant.remember(name)
        return compiled(*args)

    return call
