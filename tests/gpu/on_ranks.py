"""What the GPU tests run on every rank. Each function returns a list of complaints: empty means all was well."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import interpreted_ranks
from interpreted_ranks import Call, constants_of, expected, layer_norm_flavour, ulps_apart
from tpfuse.ops import all_reduce_add_rms_norm, geometry, paths, prepare, raise_if_failed, reset, schedule
from tpfuse.ops.flavour import NAMED
from tpfuse.ops.geometry import Part
from tpfuse.ops.kernels.variant import supports

from tpfuse.measure import bench

inputs = lru_cache(maxsize=None)(interpreted_ranks.inputs)  # the same calls are made by every algorithm


def _to_gpu(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.cuda()


def make_call(call: Call, rank: int, world: int, group: Any = None) -> tuple[Tensor, Tensor]:
    given = inputs(call, world)
    return all_reduce_add_rms_norm(
        given.xs[rank].cuda(),
        _to_gpu(given.residual),
        _to_gpu(given.weight),
        eps=call.eps,
        bias=_to_gpu(given.bias),
        scale=_to_gpu(call.scale_value) if isinstance(call.scale_value, Tensor) else call.scale_value,
        scale_first=call.scale_first,
        flavour=NAMED[call.flavour],
        post_norm=call.post_norm,
        group=group,
    )


def force(algorithm: str) -> None:
    """Make every further call of every group take this algorithm, as ``TPFUSE_ALGORITHM`` would."""
    for key, (path, group) in list(paths._paths.items()):
        paths._paths[key] = (replace(path, settings=replace(path.settings, algorithm=algorithm)), group)
    prepare.PREPARED.clear()


_OWN = geometry.parts
SPLITTING = {  # other ways than the op's own to share rows out: rows of so many groups -> parts, best first
    "narrow": lambda groups: (Part(128, groups),),
    "wide": lambda groups: (Part(1024, -(-groups // 8)),),
    "pairs": lambda groups: (Part(128, 2), Part(128, 4), Part(256, -(-groups // 2))),
    "wide pairs": lambda groups: (Part(256, 1), Part(256, 2), Part(512, 1), Part(512, -(-groups // 4))),
}


def share_rows(how: str = "") -> None:
    """Share rows out over programs in one of the ways of ``SPLITTING``, or in the op's own."""
    geometry.parts = (lambda room, rows, groups: SPLITTING[how](groups)) if how else _OWN
    prepare.PREPARED.clear()


def same_on_all_ranks(*tensors: Tensor) -> bool:
    hashes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, bench.output_hash(*tensors))
    return len(set(hashes)) == 1


def leftovers() -> int:
    """Words that a finished call left in any plane of this rank."""
    torch.cuda.synchronize()
    dist.barrier()
    from tpfuse.ops.kernels.state import PARTIALS, RECORD

    total = 0
    for path, _ in paths._paths.values():
        if path.plane is not None:
            total += int((path.plane.memory != 0).sum())
            total += int((path.plane.state[PARTIALS:] != 0).sum()) + int(path.plane.state[RECORD] != 0)
    return total


def shapes(world: int) -> list[Call]:
    """Rows and H of the interpreter tests and more."""
    out = []
    for n, rows in enumerate((1, world - 1, world, world + 1, 13, 64)):
        for m, hidden in enumerate((64, 512, 2880, 4096, 5120, 7168, 8192)):
            out.append(Call(rows, hidden, seed=100 + 10 * n + m))
    return [*out, Call(300, 1024, seed=601), Call(0, 4096, seed=602)]


def kinds() -> list[Call]:
    """Special values, dtypes, flavours and epilogues."""
    out = []
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for n, special in enumerate(("zeros", "negative_zeros", "nonfinite", "denormals")):
        for m, dtype in enumerate(dtypes):
            out.append(Call(5, 2880, dtype=dtype, special=special, seed=1300 + 10 * n + m))
    for n, flavour in enumerate(("llama", "gemma", "olmo2", "gemma4", "weightless", "input-dtype", "vllm", "sglang")):
        for m, dtype in enumerate(dtypes if flavour in ("llama", "gemma", "input-dtype", "vllm") else dtypes[:1]):
            out.append(Call(3, 1024, dtype=dtype, flavour=flavour, seed=1400 + 10 * n + m))
        if flavour != "weightless":
            out.append(Call(3, 1024, flavour=flavour, weight_dtype=torch.float32, seed=1500 + 10 * n))
    for n, bias in enumerate(("none", "row", "full")):
        for m, post in enumerate((False, True)):
            out.append(Call(4, 4096, bias=bias, post_norm=post, scale=0.22, seed=1600 + 2 * n + m))
    for n, dtype in enumerate(dtypes):
        out.append(Call(3, 4096, dtype=dtype, residual=False, scale=45.2548, scale_tensor=True, seed=1650 + n))
        out.append(Call(3, 4096, dtype=dtype, bias="full", scale=2.5, scale_first=True, seed=1660 + n))
    out.append(Call(3, 5120, bias="row", post_norm=True, flavour="gemma", seed=1700))
    out.append(Call(4, 4096, residual=False, seed=1800))
    for n, dtype in enumerate(dtypes[:2]):
        out.append(
            Call(3, 4096, dtype=dtype, flavour="sglang", weight_dtype=torch.float32, wide_residual=True, seed=1750 + n)
        )
        out.append(Call(70, 8192, dtype=dtype, flavour="vllm", wide_residual=True, seed=1760 + n))
    # Sums that are taken in fp32 and rounded first, and a factor for each row.
    for n, dtype in enumerate(dtypes[:2]):
        for m, special in enumerate(("none", "zeros", "negative_zeros", "nonfinite")):
            out.append(Call(5, 2880, dtype=dtype, wide_sum=True, special=special, seed=2100 + 10 * n + m))
        out += [
            Call(rows, hidden, dtype=dtype, wide_sum=True, flavour=flavour, seed=2200 + rows + hidden)
            for rows, hidden, flavour in ((1, 8192, "llama"), (70, 4096, "gemma"), (70, 16384, "vllm"))
        ]
        out.append(
            Call(4, 4096, dtype=dtype, wide_sum=True, bias="row", post_norm=True, flavour="olmo2", seed=2300 + n)
        )
        out.append(Call(70, 2880, dtype=dtype, scale_rows=True, bias="full", scale_first=True, seed=2310 + n))
    # Rows that are held unrounded: split over programs, and in several steps a program.
    out += [
        Call(rows, hidden, flavour="vllm", seed=1900 + rows + hidden) for rows in (1, 70) for hidden in (8192, 16384)
    ]
    return out


def warm(calls: list[Call], rank: int, world: int, group: Any = None) -> None:
    """Compile what the calls need, each rank its share; then every rank loads everything, before anything runs."""
    path = paths.describe_path(group)
    assert path.plane is not None, path.cause
    found: dict[int, Any] = {}
    for call in calls:
        flavour = layer_norm_flavour(call).scaling if call.layer_norm else NAMED[call.flavour]
        weight = None if call.flavour == "weightless" else call.weight_dtype or call.dtype
        if not call.rows or supports(call.dtype, weight, call.hidden, flavour):
            continue
        c = constants_of(call, interpreted_ranks.inputs(replace(call, rows=1, pool=0), world))
        for one in schedule.schedule_of(path.plane, path.settings, c, call.dtype, call.rows).launches:
            found.setdefault(id(one.kernel), (one.kernel, c))
    for mine in (True, False):
        for number, (kernel, c) in enumerate(found.values()):
            if (number % world == rank) == mine and not kernel.ready:
                kernel.compile(*prepare.samples(c, path.plane))
        dist.barrier()


def correctness(rank: int, world: int) -> list[str]:
    """Every case: reference, ranks, one-shot against two-shot, split rows against whole rows, all bit for bit."""
    complaints = []
    first: dict[Call, str] = {}
    make_call(Call(1, 64), rank, world)  # builds the plane
    prepare.LOAD_AHEAD = False
    modes = ["one_shot", "two_shot", *(f"{name} {how}" for name in ("one_shot", "two_shot") for how in SPLITTING)]
    for mode in modes:
        share_rows(mode.partition(" ")[2])
        force(mode.split()[0])
        calls = shapes(world)
        if mode in ("one_shot", "two_shot"):
            calls += kinds()
        else:  # what depends on the sharing of rows: compiling everything again would take most of the test's time
            calls = [call for call in calls if call.rows in (1, world + 1, 64) and call.hidden in (2880, 5120, 8192)]
        warm(calls, rank, world)
        for call in calls:
            normed, h = make_call(call, rank, world)
            torch.cuda.synchronize()
            raise_if_failed()
            if not call.rows:
                continue
            mine = bench.output_hash(normed, h)
            if first.setdefault(call, mine) != mine and call.special != "nonfinite":
                complaints.append(f"{mode}: {call}: other bits than one_shot")
            if not same_on_all_ranks(normed, h):
                complaints.append(f"{mode}: {call}: ranks differ")
            if mode != "one_shot":
                continue
            want = expected(call, inputs(call, world))
            apart = ulps_apart(normed.cpu(), want[0]), ulps_apart(h.cpu(), want[1])
            if call.flavour == "input-dtype" and call.dtype != torch.float32:
                continue  # the group's own all-reduce sums in its own order, and no kernel takes this flavour
            # The order of the sum of squares and the GPU's rsqrt move the root by some fp32 places; a denormal result
            # has few bits to hide that in.
            # Where the norm is rounded before the weight, the next value there may be two away behind it.
            form = NAMED[call.flavour]
            twice = form.normed == "input" and form.gain != "none"
            allowed = 16 if call.dtype == torch.float32 else 2 if twice or call.special == "denormals" else 1
            near = apart[1] <= (allowed if call.post_norm else 0)
            if call.wide_sum and call.post_norm:  # a small difference of residual and norm, which is a rounding apart
                bound = 2 * torch.finfo(call.dtype).eps * (want[0].float().abs() + want[1].float().abs())
                near = not bool(((h.cpu().float() - want[1].float()).abs() > bound).any())
            if apart[0] > allowed or not near:
                complaints.append(f"{mode}: {call}: {apart} ulps from the reference, allowed {allowed}")
    share_rows()
    force("auto")
    rows = 64
    big = Call(rows, 8192, seed=700)
    given = inputs(big, world)
    normed, h = make_call(big, rank, world)
    for row in (0, 17, 63):
        one, one_h = all_reduce_add_rms_norm(
            given.xs[rank][row : row + 1].cuda(),
            given.residual[row : row + 1].cuda(),  # type: ignore[index]
            given.weight.cuda(),
            eps=big.eps,  # type: ignore[union-attr]
        )
        if bench.output_hash(one, one_h) != bench.output_hash(normed[row], h[row]):
            complaints.append(f"row {row} alone has other bits than among {rows} rows")
    complaints += in_place(rank, world)
    left = leftovers()
    if left:
        complaints.append(f"{left} words left in the planes")
    return complaints


def in_place(rank: int, world: int) -> list[str]:
    """Outputs that the caller gives, the residual and x themselves among them: the bits of outputs of their own."""
    complaints = []
    for rows, hidden, algorithm in (
        (1, 8192, "one_shot"),
        (64, 4096, "one_shot"),
        (300, 8192, "two_shot"),
        (7, 2880, "library"),
    ):
        force(algorithm)
        call = Call(rows, hidden, seed=800 + rows)
        given = inputs(call, world)
        x, residual, weight = given.xs[rank].cuda(), given.residual.cuda(), given.weight.cuda()  # type: ignore[union-attr]
        want = all_reduce_add_rms_norm(x, residual, weight, eps=call.eps)
        for how in ("in buffers", "in place"):
            out = (
                (x, residual)
                if how == "in place"
                else (torch.full_like(x, float("nan")), torch.full_like(x, float("nan")))
            )
            all_reduce_add_rms_norm(x, residual, weight, eps=call.eps, out=out)
            torch.cuda.synchronize()
            if not (torch.equal(out[0], want[0]) and torch.equal(out[1], want[1])):
                complaints.append(f"{algorithm}, {rows} rows of {hidden}, {how}: other bits than outputs of their own")
    force("auto")
    return complaints


class _Site:
    """One call with fixed inputs, made eagerly or captured, and a count of wrong elements kept on the device."""

    def __init__(
        self, rows: int, hidden: int, offset: int, pools: list[Tensor], ranks: list[int], rank: int, group: Any
    ):
        size = rows * hidden
        self.xs = [pools[r][offset : offset + size].view(rows, hidden) for r in ranks]
        self.x = pools[rank][offset : offset + size].view(rows, hidden)
        self.residual = pools[-1][offset : offset + size].view(rows, hidden)
        self.weight = pools[-1][:hidden]
        self.group = group

    def __call__(self) -> tuple[Tensor, Tensor]:
        return all_reduce_add_rms_norm(self.x, self.residual, self.weight, group=self.group)

    def wrong(self, normed: Tensor, h: Tensor) -> Tensor:
        total = torch.zeros(self.x.shape, device="cuda")
        for x in self.xs:
            total += x
        want_h = self.residual + (total.bfloat16() + 0.0)
        c = want_h.float()
        want = self.weight * (c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
        # The kernel adds the squares in another order: that may move the normed value by one place of bf16, and rounding
        # its product with the weight by one more.
        apart = (normed.view(torch.int16).int() - want.view(torch.int16).int()).abs()
        return (h != want_h).sum() + (apart > 2).sum()


def grow_the_cache() -> None:
    """Allocate now what a test will need. On a shared GPU cudaMalloc waits for the kernels of all ranks, also for one
    that waits for the rank which is allocating."""
    large = [torch.empty(1 << 28, dtype=torch.uint8, device="cuda") for _ in range(4)]
    small = [torch.empty(1 << 19, dtype=torch.uint8, device="cuda") for _ in range(128)]
    del large, small
    torch.cuda.synchronize()
    dist.barrier()


def random_calls(rank: int, world: int, count: int, seed: int, replays: bool = True) -> list[str]:
    """``count`` random calls: sizes, algorithms, groups, eager and graph replay mixed. Every result is checked.

    Nothing synchronizes the ranks for long stretches: each runs ahead as far as its launch queue takes it, with torch's
    kernels for the checks between the calls.
    """
    rng = random.Random(seed)
    began = time.monotonic()
    pools = [
        torch.randn(1 << 22, generator=torch.Generator(device="cuda").manual_seed(r), device="cuda").bfloat16()
        for r in range(world + 1)
    ]
    pools[0][::5] = 0.0
    groups: list[tuple[list[int], Any]] = [(list(range(world)), None)]
    half = world // 2 if world >= 4 else world
    for _ in range(2):
        mine = None
        for start in range(0, world, half):
            ranks = list(range(start, start + half))
            group = dist.new_group(ranks)
            if rank in ranks:
                mine = (ranks, group)
        assert mine is not None
        groups.append(mine)
    hiddens = (64, 2880, 8192)
    row_counts = (1, 1, 2, 3, world, world + 1, 8, 13, 32, 64, 130)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    sums = torch.zeros((), dtype=torch.int64, device="cuda")
    graphs: list[tuple[torch.cuda.CUDAGraph, list[_Site], list[tuple[Tensor, Tensor]]]] = []

    def site() -> _Site:
        hidden = rng.choice(hiddens)
        rows = rng.choice(row_counts)
        offset = rng.randrange(0, (1 << 22) - rows * hidden) // 8 * 8
        ranks, group = groups[rng.choice((0, 0, 0, 1, 2))]
        return _Site(rows, hidden, offset, pools, ranks, rank, group)

    def check(s: _Site, normed: Tensor, h: Tensor) -> None:
        wrong.add_(s.wrong(normed, h))
        if s.group is None:
            sums.add_(normed.view(torch.int16).sum(dtype=torch.int64)).mul_(31)

    prepare.LOAD_AHEAD = False
    for name in ("one_shot", "two_shot"):  # every plane and kernel before the first graph
        for group in groups[:2]:
            paths.describe_path(group[1])
            force(name)
            warm([Call(r, h) for r in row_counts for h in hiddens], rank, world, group[1])
    force("auto")
    for group in groups:
        for hidden in hiddens:
            _Site(2, hidden, 0, pools, group[0], rank, group[1])()
    capturing = torch.cuda.Stream()
    grow_the_cache()
    biggest = _Site(max(row_counts), max(hiddens), 0, pools, groups[0][0], rank, None)
    check(biggest, *biggest())  # loads every torch kernel that the checks need
    torch.cuda.synchronize()
    dist.barrier()
    warmed = time.monotonic()
    made = 0
    algorithms = ("auto", "one_shot", "two_shot")
    try:
        while made < count:
            if made % 500 == 0:
                # The same sequence of choices on every rank.
                for key, (path, group) in list(paths._paths.items()):
                    settings = replace(path.settings, algorithm=algorithms[made // 500 % 3])
                    paths._paths[key] = (replace(path, settings=settings), group)
                prepare.PREPARED.clear()
                for group in groups:
                    for hidden in hiddens:
                        _Site(2, hidden, 0, pools, group[0], rank, group[1])()
            choice = rng.random()
            if replays and choice < 0.03 and len(graphs) < 40:
                sites = [site() for _ in range(rng.randrange(1, 6))]
                for s in sites:
                    s()  # warm
                # Ranks that share a GPU: cudaMalloc and cudaFree of one wait for the kernels of all. So nobody may start a
                # kernel that waits for a rank which is still capturing (torch.cuda.graph also empties the cache: not here).
                torch.cuda.synchronize()
                dist.barrier()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.stream(capturing):
                    graph.capture_begin(capture_error_mode="thread_local")
                    outs = [s() for s in sites]
                    graph.capture_end()
                torch.cuda.synchronize()
                dist.barrier()
                graphs.append((graph, sites, outs))
                made += len(sites)
            elif choice < 0.4 and graphs:
                graph, sites, outs = rng.choice(graphs)
                graph.replay()
                for s, (normed, h) in zip(sites, outs, strict=True):
                    check(s, normed, h)
                made += len(sites)
            else:
                s = site()
                check(s, *s())
                made += 1
            if made % 97 == 0:
                time.sleep(rng.random() * 0.002 * rank)  # the ranks drift apart
        torch.cuda.synchronize()
        raise_if_failed()
    except RuntimeError as error:
        return [f"after {made} calls had been queued: {error}"]
    complaints = []
    if int(wrong):
        complaints.append(f"{int(wrong)} elements of {made} calls are wrong")
    checks: list[Any] = [None] * world
    dist.all_gather_object(checks, int(sums))
    if len(set(checks)) != 1:
        complaints.append(f"ranks differ: checksums {checks}")
    left = leftovers()
    if left:
        complaints.append(f"{left} words left in the planes")
    if rank == 0:
        spent = f"{warmed - began:.0f} s to warm up, {time.monotonic() - warmed:.0f} s for {made} calls, {len(graphs)} graphs"
        print(f"random calls on {world} ranks: {spent}", flush=True)
    return complaints


def two_streams(rank: int, world: int, count: int) -> list[str]:
    """Two stream classes on two streams at once, no order between them."""
    pools = [
        torch.randn(1 << 20, device="cuda", generator=torch.Generator(device="cuda").manual_seed(r)).bfloat16()
        for r in range(world + 1)
    ]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
    grow_the_cache()
    for name in ("", "a", "b"):
        with paths.stream_class(name):
            for hidden in (4096, 1024):
                s = _Site(1, hidden, 0, pools, list(range(world)), rank, None)
                s.wrong(*s())
    torch.cuda.synchronize()
    dist.barrier()
    for n in range(count):
        for name, stream, bad in zip(("a", "b"), streams, wrong, strict=True):
            with torch.cuda.stream(stream), paths.stream_class(name):
                s = _Site(1 + n % 9, 4096 if n % 3 else 1024, 8 * n, pools, list(range(world)), rank, None)
                bad.add_(s.wrong(*s()))
    torch.cuda.synchronize()
    raise_if_failed()
    return [f"stream {i}: {int(w)} wrong elements" for i, w in enumerate(wrong) if int(w)]


def link_class_found(rank: int, world: int) -> list[str]:
    """What the vote found out about the links, and which algorithms follow."""
    path = paths.describe_path()
    assert path.plane is not None, path.cause
    sizes = {
        rows: schedule.select(path.plane.architecture, world, torch.bfloat16, 4096, rows).algorithm for rows in (1, 64)
    }
    return [str(path.links), path.plane.architecture, *sizes.values()]


def streams_in_turn(rank: int, world: int, count: int) -> list[str]:
    """One plane on several streams that the caller does not order: eager in turn, around captures, and twice inside one."""
    pools = [
        torch.randn(1 << 20, device="cuda", generator=torch.Generator(device="cuda").manual_seed(r)).bfloat16()
        for r in range(world + 1)
    ]
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]

    def site(n: int) -> _Site:
        return _Site(1 + n % 9, 4096 if n % 3 else 1024, 8 * n, pools, list(range(world)), rank, None)

    grow_the_cache()
    for n in range(2):
        site(n).wrong(*site(n)())
    torch.cuda.synchronize()
    dist.barrier()
    for n in range(count):
        which = n % 7 % 3
        with torch.cuda.stream(streams[which]):
            s = site(n)
            wrong[which].add_(s.wrong(*s()))
    torch.cuda.synchronize()
    dist.barrier()
    complaints = [f"stream {i}: {int(w)} wrong elements" for i, w in enumerate(wrong) if int(w)]
    said = "nothing"
    graphs = []
    for twice in (False, True):
        s, graph = site(1), torch.cuda.CUDAGraph()
        with torch.cuda.stream(streams[1]):
            graph.capture_begin(capture_error_mode="thread_local")
            outs = s()
            if twice:
                streams[2].wait_stream(streams[1])
                with torch.cuda.stream(streams[2]):
                    try:
                        s()
                    except RuntimeError as error:
                        said = str(error)
                streams[1].wait_stream(streams[2])
            graph.capture_end()
        graphs.append((graph, s, outs))
        torch.cuda.synchronize()
        dist.barrier()
    if "stream_class" not in said:
        complaints.append(f"two streams of one graph: {said}")
    for n in range(20):
        graph, s, outs = graphs[n % 2]
        graph.replay()
        wrong[0].add_(s.wrong(*outs))
        with torch.cuda.stream(streams[0]):
            eager = site(n)
            wrong[0].add_(eager.wrong(*eager()))
    torch.cuda.synchronize()
    if int(wrong[0]):
        complaints.append(f"replays and eager calls: {int(wrong[0])} wrong elements")
    raise_if_failed()
    return complaints


def dead_rank(rank: int, world: int) -> tuple[float, str] | None:
    """The last rank leaves; the others call on. Returns how long until the error, and its text."""
    call = Call(4, 4096, seed=5)
    for _ in range(3):
        make_call(call, rank, world)
    torch.cuda.synchronize()
    dist.barrier()
    if rank == world - 1:
        os._exit(0)
    start = time.monotonic()
    try:
        for _ in range(20):  # the ones queued behind the first must not wait again
            make_call(call, rank, world)
        torch.cuda.synchronize()
        raise_if_failed()
    except RuntimeError as error:
        return time.monotonic() - start, str(error)
    return time.monotonic() - start, ""


def killed_during_replay(rank: int, world: int) -> list[str]:
    """The last rank is killed while a CUDA graph of several calls is replayed: the others get NaN, and an error that names it.

    The calls: one row split over programs, rows of a program each, more rows than programs, and two-shot.
    """
    pools = [
        torch.randn(1 << 22, generator=torch.Generator(device="cuda").manual_seed(r), device="cuda").bfloat16()
        for r in range(world + 1)
    ]
    shapes = (
        (1, 8192, "one_shot"),
        (4, 4096, "one_shot"),
        (300, 8192, "one_shot"),
        (1, 8192, "two_shot"),
        (7, 4096, "two_shot"),
    )
    sites = []
    for rows, hidden, algorithm in shapes:
        sites.append((_Site(rows, hidden, 0, pools, list(range(world)), rank, None), algorithm))

    def calls() -> list[tuple[Tensor, Tensor]]:
        outs = []
        for site, algorithm in sites:
            force(algorithm)
            outs.append(site())
        return outs

    prepare.LOAD_AHEAD = False
    calls()
    for (site, _), outs in zip(sites, calls(), strict=True):
        site.wrong(*outs)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(capture_error_mode="thread_local")
        captured = calls()
        graph.capture_end()
    torch.cuda.synchronize()
    dist.barrier()
    graph.replay()
    complaints = [
        f"{site.x.shape} {algorithm}: wrong before anybody died"
        for (site, algorithm), outs in zip(sites, captured, strict=True)
        if int(site.wrong(*outs))
    ]
    raise_if_failed()
    dist.barrier()
    if rank == world - 1:
        for _ in range(50):
            graph.replay()
        os.kill(os.getpid(), signal.SIGKILL)
    for turn in ("the replays that it died in", "a later replay"):
        start = time.monotonic()
        for _ in range(200 if turn.startswith("the") else 1):
            graph.replay()
        torch.cuda.synchronize()
        spent = time.monotonic() - start
        for (site, algorithm), outs in zip(sites, captured, strict=True):
            for name, out in zip(("normed", "residual_out"), outs, strict=True):
                good = int((~out.isnan()).sum())
                if good:
                    complaints.append(f"{turn}: {site.x.shape} {algorithm}: {good} elements of {name} are not NaN")
        if spent > (8 if turn.startswith("the") else 1):
            complaints.append(f"{turn} took {spent:.1f} s with a watchdog of 2 s")
        try:
            raise_if_failed()
            complaints.append(f"{turn}: no error")
        except RuntimeError as error:
            if f"rank {world - 1}: its rows" not in str(error) and "the owner" not in str(error):
                complaints.append(f"{turn}: the error does not name the rank: {error}")
    return complaints


def batch_invariance(rank: int, world: int, vote: str) -> list[str]:
    """Rows among others against the same rows alone, in a group that takes the kernels or one that votes for the library."""
    if vote == "library":
        vote._problem = lambda *anything: "pretended"  # type: ignore[assignment]
    hidden, rows = 4096, 2500  # 20 MiB: above the sizes that would go to the library for more than two ranks
    g = torch.Generator(device="cuda").manual_seed(3)
    values = torch.tensor([2.0**24, 1.0, -(2.0**24), 3.0], device="cuda")
    choice = torch.rand(rows, hidden, world, device="cuda", generator=g).argsort(-1)[:, :, rank] % 4
    x = values[choice].bfloat16()
    residual = torch.randn(rows, hidden, device="cuda", generator=g).bfloat16()
    weight = torch.randn(hidden, device="cuda", generator=g).bfloat16()
    kind = paths.describe_path().kind
    complaints = [] if kind == ("fused" if vote == "fused" else "library") else [f"the group is {kind}"]
    whole = all_reduce_add_rms_norm(x, residual, weight)
    for count in (1, 2, 7, 64, 300, 2100):
        first = rows - count
        part = all_reduce_add_rms_norm(x[first:], residual[first:], weight)
        for name, a, b in zip(("normed", "residual_out"), part, whole, strict=True):
            if not torch.equal(a, b[first:]):
                complaints.append(f"{name}: {count} rows have other bits than among {rows}")
    for row in (0, 1, 63, 64, 299, 1023, 1024, rows - 1):
        alone = all_reduce_add_rms_norm(x[row : row + 1], residual[row : row + 1], weight)
        if not all(torch.equal(a[0], b[row]) for a, b in zip(alone, whole, strict=True)):
            complaints.append(f"row {row} alone has other bits than among {rows}")
    try:
        all_reduce_add_rms_norm(x[:2, :12].contiguous(), None, weight[:12])
        complaints.append("H = 12 was not refused")
    except RuntimeError as error:
        if "no kernel takes this call" not in str(error):
            complaints.append(f"the refusal says {error}")
    torch.cuda.synchronize()
    raise_if_failed()
    return complaints


def diverged_then_reset(rank: int, world: int) -> list[str]:
    """Rank 0 makes a call that the others do not; after a reset all is well again."""
    call = Call(4, 4096, seed=5)
    make_call(call, rank, world)
    torch.cuda.synchronize()
    dist.barrier()
    complaints = []
    if rank == 0:
        make_call(call, rank, world)
        torch.cuda.synchronize()
        try:
            raise_if_failed()
            complaints.append("no error after a call that only rank 0 made")
        except RuntimeError:
            pass
    dist.barrier()
    reset()
    for seed in range(6):
        call = Call(5, 4096, seed=seed)
        normed, h = make_call(call, rank, world)
        want = expected(call, inputs(call, world))
        if ulps_apart(normed.cpu(), want[0]) > 1 or ulps_apart(h.cpu(), want[1]):
            complaints.append(f"call {seed} after the reset is wrong")
    return complaints


def host_cost(rank: int, world: int) -> dict[str, float]:
    """CPU microseconds of one eager call: the op, and the bare Triton launch of the same kernel."""
    x = torch.randn(8, 4096, device="cuda").bfloat16()
    residual, weight = torch.randn_like(x), torch.randn(4096, device="cuda").bfloat16()
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    all_reduce_add_rms_norm(x, residual, weight)
    prepared = next(iter(prepare.PREPARED.values()))
    p = prepared.path.plane
    assert p is not None
    one = prepared.schedules[8].launches[0]
    normed, h = torch.empty_like(x), torch.empty_like(x)
    args = (
        x,
        residual,
        weight,
        x,
        normed,
        h,
        p.peers,
        p.state,
        p.rank,
        8,
        p.phase_bytes,
        prepared.limit,
        1e-6,
        1.0,
        *one.kernel.constexprs,
    )
    options = {"num_warps": 4, "enable_fp_fusion": False, **one.kernel.options}

    def bare() -> None:
        one.kernel.function[(one.programs,)](*args, **options)

    def allocating() -> None:
        torch.empty_like(x)
        torch.empty_like(x)
        one.kernel.function[(one.programs,)](*args, **options)

    def op() -> None:
        torch.ops.tpfuse.all_reduce_add_rms_norm(
            x, residual, weight, None, 1e-6, 1.0, str(prepared.flavour), False, name
        )

    def public() -> None:
        all_reduce_add_rms_norm(x, residual, weight)

    def direct() -> None:
        one.kernel(one.programs, torch._C._cuda_getCurrentRawStream(0), *args[:14])

    contenders = {
        "bare": bare,
        "bare + 2 empty_like": allocating,
        "op": op,
        "public function": public,
        "direct launch": direct,
    }
    taken: dict[str, list[float]] = {label: [] for label in contenders}
    for turn in range(45):
        for label, fn in contenders.items():  # in turn: whatever else the machine does meets all of them
            torch.cuda.synchronize()
            dist.barrier()
            start = time.perf_counter()
            for _ in range(40):
                fn()
            if turn >= 5:
                taken[label].append((time.perf_counter() - start) * 1e6 / 40)
    torch.cuda.synchronize()
    return {label: sorted(times)[len(times) // 2] for label, times in taken.items()}


def compiled(rank: int, world: int) -> list[str]:
    """Inductor and mode="reduce-overhead": no graph break, no copy of x, right results while rows change."""
    torch._inductor.config.compile_threads = 1  # type: ignore[attr-defined]
    weight = torch.randn(4096, device="cuda", generator=torch.Generator(device="cuda").manual_seed(1)).bfloat16()

    def block(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(3):
            normed, residual = all_reduce_add_rms_norm(x * 2, residual, weight)
            x = normed * 0.5
        return x, residual

    complaints = []
    fast = torch.compile(block, fullgraph=True, mode="reduce-overhead", dynamic=False)
    for rows in (1, 4):
        for step in range(6):
            g = torch.Generator(device="cuda").manual_seed(step)
            residual = torch.randn(rows, 4096, device="cuda", generator=g).bfloat16()
            x = torch.randn(rows, 4096, device="cuda", generator=g).bfloat16() * (rank + 1)
            got = fast(x, residual)
            got = tuple(t.clone() for t in got)
            want = block(x, residual)
            if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
                complaints.append(f"rows {rows}, step {step}: compiled differs from eager")
    raise_if_failed()
    return complaints


def many_lives(rank: int, world: int, store: str) -> list[str]:
    """Five default groups one after the other, each with new groups of the same names; sums right, kernels taken each time."""
    complaints = []
    for life in range(5):
        dist.destroy_process_group()
        dist.init_process_group("nccl", store=dist.FileStore(f"{store}{life}", world), rank=rank, world_size=world)
        group = dist.new_group(list(range(world)))
        for one in (None, group):
            x = torch.full((3, 4096), float(rank + 1), device="cuda", dtype=torch.bfloat16)
            _, total = all_reduce_add_rms_norm(
                x, torch.zeros_like(x), torch.ones(4096, device="cuda", dtype=torch.bfloat16), group=one
            )
            torch.cuda.synchronize()
            wanted = world * (world + 1) / 2
            if not bool((total == wanted).all()):
                complaints.append(f"life {life}: sum is {total[0, 0].item()}, expected {wanted}")
            path = paths.describe_path(one)
            if path.kind != "fused":
                complaints.append(f"life {life}, group {one and one.group_name}: {path.kind}: {path.cause}")
        print(f"life {life}: group {group.group_name}", flush=True)
    return complaints
