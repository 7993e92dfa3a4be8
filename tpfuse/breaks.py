"""Graph breaks, said in reports: the pass sees no reduction that runs between two graphs.

Where Dynamo cannot trace the code around an all-reduce, every graph ends before one, and all of them look as if the model had
none. Meta's Llama with fairscale's layers does that: their ``autograd.Function`` calls ``ctx.mark_dirty``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch.fx import GraphModule

from tpfuse import compat, ends, store, unfused
from tpfuse.passes import GraphReport

# Not functools.reduce, scatter_reduce and the like, which one rank does alone.
REDUCES = re.compile(
    r"all_?reduce|reduce_?scatter|reduce_from|(?<!functools\.)\breduce\b|(?<!scatter)(?<!index)(?<!segment)_reduce\b",
    re.IGNORECASE,
)
FRAMES = 5  # the innermost ones: the caller of a layer is no evidence that the break lies in its reduction


def look(reports: Sequence[GraphReport], gm: GraphModule, policy: str) -> None:
    """Add a note to the reports of a graph that a graph break ends, and warn where the break seems to hide a reduction.

    Args:
        reports: of one Dynamo graph.
        gm: that graph.
        policy: as in :func:`tpfuse.unfused.look`.
    """
    found = compat.graph_break_of(gm)
    if found is None or not found.user_stack:
        return
    why, place, stack = ends.why_of_break(found), ends.place_of_break(found), found.user_stack
    for report in reports:
        report.notes.append(
            f"a graph break ends this graph at {place} ({why}); the pass sees nothing of what runs there"
        )
    if policy == "off" or unfused.alone() or any(report.sites for report in store.reports()):
        return
    if not REDUCES.search(" ".join([found.reason, *(f"{frame.name} {frame.line}" for frame in stack[-FRAMES:])])):
        return
    names = " -> ".join(frame.name for frame in stack[-FRAMES:])
    unfused.tell(
        "graph-break",
        f"no graph has a reduction so far, and a graph break at {place} lies in code that seems to reduce over ranks ({names}): "
        f"{why}. A reduction between two graphs cannot be fused. Call torch.distributed.all_reduce where Dynamo can trace it, "
        "without the code named here; fullgraph=True raises an error until that is so",
    )
