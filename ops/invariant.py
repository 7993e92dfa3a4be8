"""Batch-invariant mode: the bits of a row depend on the row, W and dtype, and on no other row of the call.

The kernels have this property by themselves. What has not is the library path: an all-reduce may sum in an order that depends on
the size of the call, and torch's norms round the last elements of a tensor in other ways than the first. In this mode a
fused group takes its kernels for every size, and every other group gathers the rows and adds them up here, in rank order.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import compat

from . import reference, settings
from .operands import Operands
from .settings import BATCH_INVARIANT, batch_invariant

GATHERED_BYTES = 8 << 20  # of one rank's rows: what is gathered at once

# By name, with the group: torch gives the name of a destroyed group to another one.
_used: dict[str, Callable[[], Any]] = {}  # groups that have made calls
_forgotten = [0]  # how often groups were forgotten: who has remembered them once has to do it again
_votes: dict[str, tuple[Callable[[], Any], int]] = {}  # how often a group has agreed


def set_batch_invariant(on: bool) -> None:
    """Switch batch-invariant mode on or off for this process; it wins over ``TPFUSE_BATCH_INVARIANT``.

    Call it on every rank, before the first call of the op: results of one group never change their bits on the way.

    Raises:
        RuntimeError: groups have made calls in the other mode.
    """
    used = sorted(name for name in _used if _is_used(name))
    if on != batch_invariant() and used:
        now, before = ("on", "off") if on else ("off", "on")
        raise RuntimeError(
            f"tpfuse: batch_invariant cannot be switched {now}: groups {used} have made calls with it {before}. Set "
            f"it before the first call on every rank (option tpfuse.batch_invariant or {BATCH_INVARIANT}), or call "
            "tpfuse.ops.forget(group) for these groups on every rank first"
        )
    settings.asked["on"] = on


def remember(group_name: str) -> None:
    """A group makes calls in the present mode."""
    if not _is_used(group_name):
        _used[group_name] = compat.group_reference(compat.resolve_group(group_name))


def _is_used(group_name: str) -> bool:
    found = _used.get(group_name)
    return found is not None and compat.is_group(group_name, found)


def forget(group_name: str) -> None:
    _used.pop(group_name, None)
    _forgotten[0] += 1


def times_forgotten() -> int:
    """How often groups were forgotten in this process."""
    return _forgotten[0]


def agree(group_name: str) -> None:
    """Before a group's first gather: all of its ranks say that they are in this mode. For groups that do not vote (CPU).

    Through the group's store, so that ranks in the usual mode need not take part: an all-gather that meets an all-reduce would
    wait for ever.

    Raises:
        RuntimeError: a rank has not said so within the watchdog's time.
    """
    if _is_used(group_name):
        return
    from .settings import Settings

    group = compat.resolve_group(group_name)
    store = compat.group_store(group)
    voted, vote = _votes.get(group_name, (None, 0))
    if voted is None or not compat.is_group(group_name, voted):
        vote = 0  # another group, with a store of its own: its ranks may not all know the old one
    vote += 1  # what was said before `forget` does not count
    _votes[group_name] = (compat.group_reference(group), vote)
    keys = [f"tpfuse/batch_invariant/{vote}/{rank}" for rank in range(group.size())]
    store.set(keys[group.rank()], "on")
    seconds = Settings.from_environment().watchdog_seconds
    try:
        store.wait(keys, datetime.timedelta(seconds=seconds))
    except RuntimeError as error:  # DistStoreError
        ranks = dist.get_process_group_ranks(group)
        silent = [rank for rank, key in zip(ranks, keys, strict=True) if not store.check([key])]
        raise RuntimeError(
            f"tpfuse: rank {dist.get_rank()} of group {group_name!r} (ranks {ranks}) is in batch-invariant mode, and ranks "
            f"{silent} have not said within {seconds:g} s that they are: set "
            f"tpfuse.batch_invariant or {BATCH_INVARIANT} alike on all ranks"
        ) from error
    remember(group_name)


def sum_in_rank_order(x: Tensor, group_name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Sum of ``x`` over the group as the kernels take it: in fp32 from +0.0, rank 0 first, rounded once, zeros positive.

    Args:
        dtype: to which it is rounded (default: that of ``x``).

    Moves W - 1 times the bytes of ``x`` to every rank. fp64 is summed in fp64.
    """
    world = compat.resolve_group(group_name).size()
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(rows, dtype=dtype)
    step = max(1, GATHERED_BYTES // (rows.shape[1] * rows.element_size()))
    wide = torch.promote_types(x.dtype, torch.float32)
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(part, world, group_name)
        gathered = torch.ops._c10d_functional.wait_tensor(gathered).view(world, *part.shape)
        total = torch.zeros(part.shape, dtype=wide, device=x.device)
        for contribution in gathered:
            total += contribution
        out[start : start + step] = total.to(out.dtype) + 0.0
    return out.view(x.shape)


def add_rms_norm(reduced: Tensor, given: Operands) -> tuple[Tensor, Tensor]:
    """``reference.add_rms_norm``, one row at a time: each is computed exactly as if it were alone. Slow; for a CPU."""
    return row_by_row(reduced, given, reference.add_rms_norm)


def row_by_row(reduced: Tensor, given: Any, function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What a reference gives for each row alone. ``given``: the operands of any op with a residual and a bias."""
    hidden = reduced.shape[-1]

    def by_row(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.reshape(-1, hidden)

    flat, residuals, bias = by_row(reduced), by_row(given.residual), given.bias
    biases = by_row(bias) if bias is not None and bias.shape == reduced.shape and bias.dim() > 1 else None
    addends = by_row(getattr(given, "addend", None))
    assert flat is not None
    found = []
    for row in range(flat.shape[0]):
        one = slice(row, row + 1)
        alone = given._replace(
            residual=None if residuals is None else residuals[one], bias=bias if biases is None else biases[one]
        )
        if addends is not None:
            alone = alone._replace(addend=addends[one])
        factors = getattr(given, "scale_tensor", None)
        if factors is not None and factors.dim():
            alone = alone._replace(scale_tensor=factors.reshape(-1, 1)[one])
        found.append(function(flat[one], *alone.after_the_sum))
    normed, out = (torch.cat(parts).view(reduced.shape) for parts in zip(*found, strict=True))
    return normed, out
