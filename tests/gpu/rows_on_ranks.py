"""Rows with destinations on GPUs, for ``test_kernels_gpu.py`` and by hand:

    python tests/gpu/rows_on_ranks.py --ranks 4
    python tests/gpu/rows_on_ranks.py --ranks 8 --only random --count 10000 --seconds 300

With fewer GPUs than ranks they share the first one. It says how far it is, ends by itself, and exits with 1 if anything is
wrong. What a rank runs returns complaints: empty means all was well.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import on_ranks
from interpreted_ranks import Call
from rows_calls import ALGORITHMS, DEVICE, Made, bits, divisors, edges, kept_by_block, some_calls, warm
from tpfuse.ops import (
    all_reduce_add_rms_norm,
    prepare,
    raise_if_failed,
    reduce_rows_add_layer_norm,
    reduce_rows_add_layer_norm_gather,
    reduce_rows_add_rms_norm,
    reduce_rows_add_rms_norm_gather,
)


def _settled() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        raise_if_failed()


def _begin(rank: int, world: int) -> None:
    Made(Call(1, 64), rank, world)()  # builds the plane
    if DEVICE == "cuda":
        on_ranks.grow_the_cache()


def edge_list(rank: int, world: int) -> list[str]:
    """Every edge in one-shot and in two-shot, against the reference and against each other."""
    prepare.LOAD_AHEAD = False
    _begin(rank, world)
    calls, complaints, began = edges(world), [], time.monotonic()
    warm(calls, rank, world)
    for number, call in enumerate(calls):
        made, bits_of = Made(call, rank, world), []
        for algorithm in ALGORITHMS[1:]:  # the kernels take every size: the group's own all-reduce sums in other orders
            if DEVICE == "cuda":
                on_ranks.force(algorithm)
            got = made()
            _settled()
            complaints += [f"{algorithm}: {text}"] if (text := made.complaint(got)) else []
            bits_of.append(got)
        if call.special != "nonfinite" and any(int((bits(a) != bits(b)).sum()) for a, b in zip(*bits_of, strict=True)):
            complaints.append(f"{call}: two-shot has other bits than one-shot")
        if rank == 0 and number % 50 == 49:
            print(f"  {number + 1} of {len(calls)} edges, {time.monotonic() - began:.0f} s", flush=True)
    return [*complaints[:10], *_left_over()]


def _left_over() -> list[str]:
    left = on_ranks.leftovers() if DEVICE == "cuda" else 0
    return [f"{left} words left in the planes"] if left else []


def random_calls(rank: int, world: int, count: int, seconds: float, seed: int = 5, kinds: int = 60) -> list[str]:
    """``count`` calls of all three ops on one plane, eager and replayed, or as many as ``seconds`` allow.

    Each of ``kinds`` calls is held against the reference once, and then against its own first bits. Nothing synchronizes the
    ranks between some hundred calls.
    """
    rng, began = random.Random(seed), time.monotonic()
    prepare.LOAD_AHEAD = False
    _begin(rank, world)
    calls = some_calls(world, kinds, seed)
    warm(calls, rank, world)
    sites, complaints = [Made(call, rank, world) for call in calls], []
    for site in sites:
        got = site()
        _settled()
        complaints += [text] if (text := site.complaint(got)) else []
        site.wrong(got)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    # Of normed rows that several ranks have, by what they receive; 0: those of a gather.
    sums = {n: torch.zeros((), dtype=torch.int64, device=DEVICE) for n in (0, 1, *divisors(world))}

    def check(site: Made, got: tuple[Tensor, Tensor]) -> None:
        wrong.add_(site.wrong(got))
        sums[0 if site.call.gathers else site.call.blocks].add_(bits(got[0]).sum(dtype=torch.int64)).mul_(31)

    graphs = [_captured(rng.sample(sites, rng.randrange(1, 6))) for _ in range(20)] if DEVICE == "cuda" else []
    made, turn, start = 0, 0, time.monotonic()
    while made < count:
        for _ in range(200):
            if graphs and rng.random() < 0.3:
                graph, members, outs = rng.choice(graphs)
                graph.replay()
                for site, got in zip(members, outs, strict=True):
                    check(site, got)
                made += len(members)
            else:
                site = rng.choice(sites)
                check(site, site())
                made += 1
            if made % 97 == 0:
                time.sleep(rng.random() * 0.002 * rank)  # the ranks drift apart
        _settled()
        turn += 1
        if DEVICE == "cuda":
            on_ranks.force(ALGORITHMS[turn % 3])
        late = torch.tensor(int(time.monotonic() - began > seconds))
        dist.broadcast(late, 0)  # rank 0's clock decides for all
        if rank == 0 and (turn % 10 == 0 or late):
            print(f"  {made} of {count} calls, {time.monotonic() - start:.0f} s", flush=True)
        if late and made < count:
            complaints.append(f"{made} of {count} calls in {seconds:.0f} s; give more --seconds")
            break
    if int(wrong):
        complaints.append(f"{int(wrong)} elements of {made} calls have other bits than the first time")
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, {n: int(total) for n, total in sums.items()})
    for n in sums:
        first = rank * n // world * (world // n) if n else 0  # of those that receive what this rank does
        if everyone[rank][n] != everyone[first][n]:
            complaints.append(f"ranks {first} and {rank} receive one of {n} blocks, and have other bits")
    return [*complaints[:10], *_left_over()]


def _captured(members: list[Made]) -> Any:
    """A CUDA graph of these calls. Ranks that share a GPU wait in cudaMalloc for the kernels of all: they meet around it."""
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(capture_error_mode="thread_local")
        outs = [site() for site in members]
        graph.capture_end()
    torch.cuda.synchronize()
    dist.barrier()
    return graph, members, outs


def replays(rank: int, world: int) -> list[str]:
    """A CUDA graph of all three ops, two of them with either norm, replayed with other inputs, between eager calls."""
    g = torch.Generator(device="cuda").manual_seed(rank)
    x = torch.randn(8, 4096, generator=g, device="cuda").bfloat16()
    same = torch.Generator(device="cuda").manual_seed(99)
    residual = torch.randn(4, 4096, generator=same, device="cuda").bfloat16()
    weight = torch.rand(4096, generator=same, device="cuda").bfloat16()

    def step() -> tuple[Tensor, Tensor]:
        _, h = reduce_rows_add_rms_norm(x, residual, weight, blocks=2)
        z, h = reduce_rows_add_layer_norm(x, h, weight, weight, blocks=2)
        y, own = reduce_rows_add_rms_norm_gather(x[: 8 // world * world], h[: 8 // world], weight)
        v, own = reduce_rows_add_layer_norm_gather(x[: 8 // world * world], own, weight, weight)
        return all_reduce_add_rms_norm(x[:4], y[:4] + v[:4] + z + own.sum(0), weight)

    step()
    graph, _, (out,) = _captured([step])  # type: ignore[list-item]
    complaints = []
    for n in range(20):
        x.copy_(torch.randn(8, 4096, generator=g, device="cuda"))
        graph.replay()
        found = [t.clone() for t in out]
        for name, a, b in zip(("normed", "residual"), found, step(), strict=True):
            if not torch.equal(a, b):
                complaints.append(f"replay {n}: {name} differs from an eager call")
    _settled()
    return complaints


def dead_rank(rank: int, world: int, killed: bool, most: float, name: str) -> list[str]:
    """The last rank leaves, or is killed; the others call on: NaN, an error within ``most`` seconds, no hang.

    The first replica keeps no row: it has nothing to turn to NaN, and must say so all the same. Calls with
    either norm take turns.
    """
    blocks = world if name == "dead-gather" or world == 2 else 2
    kept = kept_by_block(world, blocks, [0, *(3,) * (blocks - 1)]) if world > 2 else (3, 3)
    call = Call(3, 7168, blocks=blocks, kept=kept, gathers=name != "dead", seed=5)
    sites = [Made(of, rank, world) for of in (call, replace(call, layer_norm=True, flavour="layer_norm"))]
    for _ in range(3):
        for site in sites:
            site()
    _settled()
    dist.barrier()
    if rank == world - 1:
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    began, outs, text = time.monotonic(), [], ""
    try:
        for n in range(20):  # the ones queued behind the first must not wait again
            outs.append(sites[n % 2]())
        torch.cuda.synchronize()
        raise_if_failed()
    except RuntimeError as error:
        text = str(error)
    spent = time.monotonic() - began
    torch.cuda.synchronize()
    complaints = [] if "gave up" in text and f"rank {rank}" in text else [f"the error is {text!r}"]
    # In the first of these calls a rank of the dead one's block may still get the other block's norms, which lack nothing.
    good = sum(int((~t.isnan()).sum()) for pair in outs[int(name == "dead-block") :] for t in pair)
    if good:
        complaints.append(f"{good} elements are not NaN after the death")
    if not outs or spent > most:
        complaints.append(f"{len(outs)} calls began, and it took {spent:.1f} s of {most:.0f} s")
    return complaints


PARTS = ("edges", "random", "replays", "dead", "dead-gather", "dead-block")


def part(name: str, world: int, count: int = 10_000, seconds: float = 300.0) -> list[str]:
    """Run one of ``PARTS`` on ``world`` ranks; complaints of all of them."""
    from tpfuse.measure.ranks import gpu_count, run_ranks

    # A watchdog of 8 s: a call that hangs is named long before the end.
    limits: dict[str, Any] = {"timeout": seconds + 120, "env": {"TPFUSE_WATCHDOG_SECONDS": "8"}}
    if name == "edges":
        answers = run_ranks(edge_list, world, **limits)
    elif name == "random":
        answers = run_ranks(random_calls, world, count, seconds, **limits)
    elif name == "replays":
        answers = run_ranks(replays, world, **limits)
    else:
        limits["env"]["TPFUSE_WATCHDOG_SECONDS"] = "3"
        # A killed client of MPS takes its neighbors' kernels with it: there it leaves by itself.
        killed = gpu_count() >= world
        answers = run_ranks(dead_rank, world, killed, 8.0, name, may_die=(world - 1,), **limits)
    return [f"rank {rank}: {line}" for rank, lines in enumerate(answers) for line in lines or ()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--count", type=int, default=10_000, help="random calls")
    parser.add_argument("--seconds", type=float, default=300.0, help="for each part")
    args = parser.parse_args()
    from tpfuse.measure.ranks import RankFailed, gpu_count, why_not

    missing = why_not(args.ranks)
    if missing or args.ranks < 2:
        parser.exit(2, f"rows_on_ranks.py: {missing or 'give at least 2 ranks'}\n")
    where = f"{args.ranks} ranks on " + ("GPUs of their own" if gpu_count() >= args.ranks else "one GPU")
    failed = False
    for name in args.only:
        began = time.monotonic()
        print(f"{name}, {where}", flush=True)
        try:
            complaints = part(name, args.ranks, args.count, args.seconds)
        except RankFailed as error:
            complaints = [str(error)[-3000:]]
        failed = failed or bool(complaints)
        print("\n".join(complaints[:20]) or f"{name}: all well", f"({time.monotonic() - began:.0f} s)", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
