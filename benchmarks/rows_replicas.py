"""Contenders of ``rows.py --replicas``: attention replicas that sum, add and norm their rows and gather those of all.

- ``tpfuse``: one op over all ranks.
- ``op + gather``: tpfuse's op over the ranks of a replica, then the gather as a collective of its own.
- the baseline: the sum over the ranks of a replica, Inductor's add and norm, the gather. ``nccl`` with a GPU for each rank.
  ``symm`` where ranks share one, which NCCL refuses: torch's one-shot all-reduce over symmetric memory, and a gather that is the
  same all-reduce of the own rows among zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tpfuse.ops import all_reduce_add_rms_norm, all_reduce_add_rms_norm_gather

from tpfuse.measure import other_libraries
from tpfuse.parallel import ParallelConfig
from tpfuse.parallel.groups import Groups, build_groups

SYMM_BLOCKS, SYMM_VALUES = 24, 512 * 8  # of torch's kernel: blocks at most, and values that each of them takes


def block_counts(world: int) -> list[int]:
    """Into how many replicas of at least two ranks a world divides."""
    return [n for n in range(2, world // 2 + 1) if world % n == 0]


def groups_of(world: int, blocks: int, largest: int, shared: bool) -> Groups:
    """The groups of so many replicas, ready for ``largest`` values gathered. Collective."""
    groups = build_groups(ParallelConfig(world, blocks))
    for name in ("attn_tp", "attn_dp") if shared else ():
        device = torch.device("cuda", torch.cuda.current_device())
        other_libraries.reserve(groups.name_of(name), largest, torch.bfloat16, device)
    return groups


def fits(values: int, world: int) -> bool:
    """Whether torch's kernels of all ranks fit on one GPU: they wait for one another in every block and have no watchdog."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return min(SYMM_BLOCKS, -(-values // SYMM_VALUES)) * world <= processors


def contenders(
    x: Tensor, residual: Tensor, weight: Tensor, groups: Groups, add_norm: Callable[..., Any], shared: bool
) -> dict[str, Callable[[], Any]]:
    """Name -> one call of a boundary with ``residual`` of shape (rows, H); the baseline may be missing on a shared GPU."""
    rows, hidden = residual.shape
    tp, block, column = (groups.name_of(name) for name in ("tp", "attn_tp", "attn_dp"))
    blocks, place = len(groups.ranks_of("attn_dp")), groups.index_in("attn_dp")
    together = x.new_zeros(blocks, rows, hidden)
    whole = torch.empty_like(x)

    def ours() -> Any:
        names = {"group": tp, "block_group": block, "gather_group": column}
        return all_reduce_add_rms_norm_gather(x, residual, weight, largest=rows, **names)

    def symmetric_sum(y: Tensor, name: str) -> Tensor:
        buffer = other_libraries.symmetric_buffer(name, y.numel())
        return torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, y.view(-1), "sum", name).view(y.shape)

    def gathered(pair: tuple[Tensor, Tensor]) -> Any:
        if shared:
            together[place] = pair[0]  # the others stay zero
            return symmetric_sum(together, column), pair[1]
        dist.all_gather_into_tensor(together.view(-1, hidden), pair[0], group=groups.group("attn_dp"))
        return together, pair[1]

    def summed() -> Tensor:
        if shared:
            return symmetric_sum(x, block)
        whole.copy_(x)  # NCCL sums in place; the partial sum of a real layer is a buffer of its own too
        dist.all_reduce(whole, group=groups.group("attn_tp"))
        return whole

    found = {"tpfuse": ours}
    if not shared or fits(together.numel(), len(groups.ranks)):
        found["op + gather"] = lambda: gathered(all_reduce_add_rms_norm(x, residual, weight, group=block))
        found["symm" if shared else "nccl"] = lambda: gathered(add_norm(summed(), residual, weight))
    return found
