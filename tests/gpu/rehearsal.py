"""One process plays one rank of a group whose other ranks have already spoken: what compute-sanitizer can hold.

The tool serializes kernels, so kernels that wait for each other would never end under it. Here every slot that the rank
will poll is filled beforehand with what its peers would have pushed, so each kernel runs through without waiting; its own
pushes go to buffers that stand for the peers' planes. Every rank is played in turn and the outputs must agree.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from interpreted_ranks import Call, expected, inputs, ulps_apart
from tpfuse.ops import schedule
from tpfuse.ops.flavour import NAMED
from tpfuse.ops.geometry import Part
from tpfuse.ops.kernels.state import STATE_WORDS
from tpfuse.ops.kernels.variant import GROUP_LANES, Variant, constants


def _marked(t: torch.Tensor) -> torch.Tensor:
    words = t.contiguous().view(torch.int32).clone()
    words[words == 0] = 0x8000
    return words


def play(call: Call, world: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    given = inputs(call, world)
    device = torch.device("cuda")
    c = constants(
        call.dtype,
        call.dtype,
        call.hidden,
        NAMED[call.flavour],
        bias="none",
        scaled=False,
        has_residual=True,
        post_norm=False,
    )
    words = call.hidden * call.dtype.itemsize // 4
    capacity = (call.rows + world) * 2 * world * words
    planes = [torch.zeros(2, capacity, dtype=torch.int32, device=device) for _ in range(world)]
    mine = planes[rank][0]
    if call.algorithm == "one_shot":
        slots = mine[: call.rows * world * words].view(call.rows, world, words)
        for r in range(world):
            if r != rank:
                slots[:, r] = _marked(given.xs[r]).to(device).view(call.rows, words)
    else:
        owned = -(-call.rows // world)
        scatter = mine[: owned * world * words].view(owned, world, words)
        gather = mine[owned * world * words :][: call.rows * words].view(call.rows, words)
        total = sum(x.float() for x in given.xs).to(call.dtype)  # type: ignore[union-attr]
        for row in range(call.rows):
            if row % world != rank:
                gather[row] = _marked(total[row]).to(device)
                continue
            for r in range(world):
                if r != rank:
                    scatter[row // world, r] = _marked(given.xs[r][row]).to(device)
    record = torch.zeros(4, dtype=torch.int32, pin_memory=True)
    peers = torch.tensor([p.data_ptr() for p in planes] + [record.data_ptr()], dtype=torch.int64, device=device)
    state = torch.zeros(STATE_WORDS, dtype=torch.int32, device=device)
    x, residual, weight = (t.to(device) for t in (given.xs[rank], given.residual, given.weight))  # type: ignore[union-attr]
    normed, h = torch.empty_like(x), torch.empty_like(x)
    part = Part(call.lanes, call.steps or -(-c.groups * GROUP_LANES // call.lanes))
    split = -(-c.groups // part.groups)
    kernel = schedule.kernel_of(call.algorithm, c, Variant(world, part.lanes, part.steps, split))
    args = (x, residual, weight, x, normed, h, peers, state, rank, call.rows, capacity * 4, 2_000_000_000, 1e-6, 1.0)
    kernel.compile(*args)
    kernel(call.rows * split, torch.cuda.current_stream().cuda_stream, *args)
    torch.cuda.synchronize()
    assert int(record[0]) == 0, f"the watchdog fired: {record.tolist()}"
    assert int((mine != 0).sum()) == 0, "words left in the plane"
    return normed.cpu(), h.cpu()


def main() -> None:
    for world in (2, 4, 8):
        for algorithm in ("one_shot", "two_shot"):
            for hidden, lanes, steps in (
                (4096, 128, None),
                (4096, 128, 1),
                (2880, 128, 2),
                (2880, 512, 1),
                (7168, 256, 2),
            ):
                call = Call(3, hidden, algorithm=algorithm, lanes=lanes, steps=steps, seed=hidden)
                want = expected(call, inputs(call, world))
                for rank in (0, world - 1):
                    normed, h = play(replace(call), world, rank)
                    apart = ulps_apart(normed, want[0]), ulps_apart(h, want[1])
                    assert apart[0] <= 1 and apart[1] == 0, f"{call} rank {rank} of {world}: {apart} ulps"
    print("rehearsal: all calls equal the reference")


if __name__ == "__main__":
    main()
