"""Do the numbers of rows that the ranks bring to one call fit? On a CPU all ranks learn it, and refuse together.

A rank that refused alone would leave the others waiting in the call's collectives. It costs one more small collective a call.
On a GPU a call does not wait for the host, so there that rank refuses alone, and the others stop at the watchdog.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from tpfuse import compat


def check_on_all_ranks(name: str, what: str, rows: int, limit: str, most: int, group_name: str) -> None:
    """Raise ``ValueError`` on every rank of a group unless no rank has more rows than fit. Collective.

    Args:
        name: of the op.
        what: has the rows, for the message.
        rows: of this rank.
        limit: what they must not exceed, with its verb, for the message.
        most: that number, the same on every rank.
        group_name: over which the ranks compare.
    """
    ranks = dist.get_process_group_ranks(compat.resolve_group(group_name))
    mine = torch.tensor([rows, most])
    whole = torch.ops._c10d_functional.all_gather_into_tensor(mine, len(ranks), group_name)
    found = torch.ops._c10d_functional.wait_tensor(whole).view(-1, 2).tolist()
    for rank, (_, at_most) in zip(ranks, found, strict=True):
        if at_most != most:
            raise ValueError(
                f"{name}: {limit} {at_most} on rank {rank} and {most} on rank {dist.get_rank()}; pass the same number on every "
                "rank"
            )
    for rank, (theirs, _) in zip(ranks, found, strict=True):
        if theirs > most:
            raise ValueError(
                f"{name}: {what} has {theirs} rows, but {limit} {most}, on rank {rank}; no rank of {ranks} may have more rows"
            )
