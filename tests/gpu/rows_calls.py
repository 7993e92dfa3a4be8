"""Calls of the ops whose rows have destinations, and of the all-reduce among them: what ``rows_on_ranks.py`` makes.

With either norm: a call of an op for LayerNorm has ``layer_norm``.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import interpreted_ranks
import on_ranks
from interpreted_ranks import Call, constants_of, expected_of_all, of_rank, ulps_apart
from tpfuse.ops import gather_schedule, layer_norm_flavour, paths, prepare, rows_schedule
from tpfuse.ops.flavour import NAMED

from tpfuse import ops

inputs = lru_cache(maxsize=4)(interpreted_ranks.inputs)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU rehearses: the op runs over gloo there
ALGORITHMS = ("auto", "one_shot", "two_shot")


def divisors(world: int) -> list[int]:
    return [n for n in range(2, world + 1) if world % n == 0]


def kept_by_block(world: int, blocks: int, counts: list[int]) -> tuple[int, ...]:
    """Rows that each rank keeps, the same on the ranks of a replica."""
    return tuple(counts[rank * blocks // world] for rank in range(world))


def edges(world: int) -> list[Call]:
    """Rows around the number of ranks, widths that lanes divide and that they do not, kept rows from none to all, every kind."""
    calls = []
    for blocks in divisors(world):
        for n, hidden in enumerate((64, 512, 2880, 4096, 5120, 7168, 8192)):
            for m, rows in enumerate((1, world + 1, 64)):
                calls.append(Call(rows, hidden, blocks=blocks, seed=1000 * blocks + 10 * n + m))
        for n, rows in enumerate((1, 2, world, 13, 300)):
            unequal = kept_by_block(world, blocks, [(b * rows) // (blocks - 1) for b in range(blocks)])
            for kept in (unequal, tuple(reversed(unequal)), (0,) * world):
                calls.append(Call(rows, 1024, blocks=blocks, kept=kept, seed=2000 * blocks + n))
        # No kernel takes the flavour input-dtype, and the ops for rows no scalar tensor and no fp32 residual beside 16 bits.
        kinds = [
            call
            for call in on_ranks.kinds()
            if call.flavour != "input-dtype"
            and not (call.scale_tensor or call.scale_first or call.scale_rows or call.wide_residual or call.wide_sum)
        ]
        calls += [replace(call, blocks=blocks) for call in kinds]
        calls += layer_norms(world, blocks)
    gathered = [replace(call, gathers=True) for call in calls if call.blocks > 1]
    wide = Call(5, 16384, blocks=world, gathers=True, weight_dtype=torch.float32, seed=77)  # the widest normed rows
    return [*calls, *gathered, wide, *(Call(0, 4096, blocks=world, gathers=g, seed=1) for g in (False, True))]


def layer_norms(world: int, blocks: int) -> list[Call]:
    """Every flavour, dtype and kind of operand of a LayerNorm, over widths that one program, several and many steps hold."""
    kinds: list[dict[str, Any]] = [
        {},
        {"mean": 20.0},
        {"special": "zeros"},
        {"special": "nonfinite"},
        {"bias": "row", "addend": True},
        {"bias": "full", "scale": 0.22},
        {"residual": False},
        {"weight_dtype": torch.float32, "flavour": "layer_norm"},
    ]
    flavours, dtypes = sorted(layer_norm_flavour.NAMED), (torch.bfloat16, torch.float16, torch.float32)
    calls = []
    for n, kind in enumerate(kinds):
        for m, (rows, hidden) in enumerate(((1, 4096), (world + 1, 72), (64, 2880), (13, 8192), (2, 16384))):
            special = "special" in kind or hidden > 8192
            more = {
                "dtype": torch.bfloat16 if special else dtypes[(n + m) % 3],
                "flavour": flavours[(n + m) % 4],
                **kind,
            }
            counts = [(b * rows) // (blocks - 1) for b in range(blocks)]
            # Without a residual nothing says how many rows are kept.
            kept = kept_by_block(world, blocks, counts) if m % 2 and more.get("residual", True) else ()
            seed = 3000 * blocks + 10 * n + m
            calls.append(Call(rows, hidden, blocks=blocks, kept=kept, layer_norm=True, eps=1e-5, seed=seed, **more))
    return calls


def some_calls(world: int, count: int, seed: int) -> list[Call]:
    """The same on every rank: both ops in turn, unequal and zero rows kept, several widths and flavours."""
    rng = random.Random(seed)
    blocks = divisors(world)
    # Each kind and width is a set of kernels to compile: few of both, many sizes.
    kinds: list[dict[str, Any]] = [
        {},
        {"dtype": torch.float32, "special": "zeros"},
        {"flavour": "gemma", "bias": "full", "scale": 0.22},
        {"layer_norm": True, "flavour": "layer_norm", "bias": "row", "addend": True},
    ]
    calls = []
    for n in range(count):
        rows, hidden = rng.choice((1, 2, 3, 7, 16, 33, 64)), rng.choice((64, 7168))
        of = rng.choice((1, *blocks, *blocks))
        counts = [rng.choice((0, 1, rows, rows)) for _ in range(of)]
        kept = kept_by_block(world, of, counts) if of > 1 else ()
        gathers = of > 1 and rng.random() < 0.6
        calls.append(Call(rows, hidden, blocks=of, kept=kept, gathers=gathers, seed=seed + n, **rng.choice(kinds)))
    return calls


@lru_cache(maxsize=1)
def _groups_of(world: int) -> dict[int, tuple[Any, Any]]:
    """Number of blocks -> the group of this rank's block, and that of the ranks at its place in each. Collective."""
    found, rank = {}, dist.get_rank()
    for blocks in divisors(world)[:-1]:
        size = world // blocks
        ours = [dist.new_group(list(range(n * size, (n + 1) * size))) for n in range(blocks)]
        across = [dist.new_group(list(range(n, world, size))) for n in range(size)]
        found[blocks] = ours[rank // size], across[rank % size]
    return found


class Made:
    """One call with its tensors on the device, and what it should give."""

    def __init__(self, call: Call, rank: int, world: int) -> None:
        everything = inputs(call, world)
        mine = of_rank(call, everything, rank, world)

        def there(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(DEVICE)

        self.call = call
        self.in_blocks = call.gathers and call.blocks < world
        x = (mine if self.in_blocks else everything).xs[rank].contiguous()
        self.given: tuple[Tensor | None, ...] = (x.to(DEVICE), there(mine.residual), there(mine.weight))
        self.options: dict[str, Any] = {"eps": call.eps, "bias": there(mine.bias), "scale": call.scale}
        if call.layer_norm:
            self.options |= {"flavour": layer_norm_flavour.NAMED[call.flavour], "addend": there(mine.addend)}
            self.given += (there(mine.shift),)
        else:
            self.options |= {"flavour": NAMED[call.flavour], "post_norm": call.post_norm}
        self.want = tuple(t.to(DEVICE) for t in expected_of_all(call, everything, rank, world))
        self.first: tuple[Tensor, Tensor] | None = None
        # The order of the sum of squares moves the root by some places of fp32; a denormal has few bits to hide that in.
        off = 16 if call.dtype == torch.float32 else 2
        self.allowed = (off, off if call.post_norm else 0)

    def __call__(self) -> tuple[Tensor, Tensor]:
        norm = "add_layer_norm" if self.call.layer_norm else "add_rms_norm"
        if self.call.blocks == 1:
            return getattr(ops, f"all_reduce_{norm}")(*self.given, **self.options)
        if self.in_blocks:
            block, across = _groups_of(dist.get_world_size())[self.call.blocks]
            groups = {"group": dist.group.WORLD, "block_group": block, "gather_group": across}
            return getattr(ops, f"all_reduce_{norm}_gather")(
                *self.given, largest=self.call.rows, **groups, **self.options
            )
        if self.call.gathers:
            return getattr(ops, f"reduce_rows_{norm}_gather")(*self.given, **self.options)
        return getattr(ops, f"reduce_rows_{norm}")(*self.given, blocks=self.call.blocks, **self.options)

    def complaint(self, got: tuple[Tensor, Tensor]) -> str:
        if self.call.layer_norm:
            return self._complaint_of_a_layer_norm(*(t.cpu() for t in got))
        apart = tuple(ulps_apart(g.cpu(), w.cpu()) for g, w in zip(got, self.want, strict=True))
        if all(a <= limit for a, limit in zip(apart, self.allowed, strict=True)):
            return ""
        return f"{self.call}: {apart} ulps from the reference, allowed {self.allowed}"

    def _complaint_of_a_layer_norm(self, normed: Tensor, residual: Tensor) -> str:
        """The residual is exact. An element of the norm may be a small difference of larger numbers: its bound is that of the
        largest of its row."""
        want, summed = (t.cpu() for t in self.want)
        if ulps_apart(residual, summed):
            return (
                f"{self.call}: residual_out is {ulps_apart(residual, summed)} ulps from the reference, which is exact"
            )
        finite = want.float().isfinite()
        size = torch.where(finite, want.float().abs(), 0.0).amax(-1, keepdim=True) + 1.0
        step = torch.finfo(self.call.dtype).eps
        allowed = size * (step * 16 * (1 + abs(self.call.mean)) if self.call.dtype == torch.float32 else step)
        apart = torch.where(finite, (normed.float() - want.float()).abs(), 0.0)
        if bool((apart > allowed).any()) or not torch.equal(normed.isnan(), want.isnan()):
            return f"{self.call}: normed is {(apart / allowed).max().item():.2f} of the bound apart"
        return ""

    def wrong(self, got: tuple[Tensor, Tensor]) -> Tensor:
        """Elements with other bits than those of the first time, counted on the device."""
        if self.first is None:
            self.first = tuple(t.clone() for t in got)  # type: ignore[assignment]
        return torch.stack([(bits(a) != bits(b)).sum() for a, b in zip(got, self.first, strict=True)]).sum()  # type: ignore[arg-type]


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int16 if t.element_size() == 2 else torch.int32)


def warm(calls: list[Call], rank: int, world: int) -> None:
    """Compile what calls of both ops need, each rank its share; then every rank loads everything, before anything runs."""
    if DEVICE == "cpu":
        return
    found: dict[int, Any] = {}
    for algorithm in ALGORITHMS:
        on_ranks.force(algorithm)
        on_ranks.warm([call for call in calls if call.blocks == 1], rank, world)
        path = paths.describe_path()
        assert path.plane is not None, path.cause
        for call in calls:
            if call.blocks == 1 or not call.rows:
                continue
            c = constants_of(call, inputs(replace(call, rows=1, kept=()), world))
            if call.gathers:
                of = gather_schedule.schedule_of(path.plane, path.settings, c, call.dtype, call.rows, call.blocks)
            else:
                of = rows_schedule.schedule_of(path.plane, path.settings, c, call.dtype, call.rows, call.blocks)
            for launch in of.launches:
                found.setdefault(id(launch.kernel), (launch.kernel, c))
    on_ranks.force("auto")
    if rank == 0:
        print(f"  {len(found)} kernels to compile for rows with destinations", flush=True)
    for mine in (True, False):
        for number, (kernel, c) in enumerate(found.values()):
            if (number % world == rank) == mine and not kernel.ready:
                kernel.compile(*prepare.samples(c, path.plane, counts=3))
        dist.barrier()
