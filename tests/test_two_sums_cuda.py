"""The way of a call with two partial sums, or a wide one, to its kernel on a GPU, played without one: what is prepared,
launched and summed.

One process plays rank 0 of two; what rank 1 would have pushed of both rows of words lies in the plane already.
"""

from __future__ import annotations

import os
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreted_ranks import Call, expected, inputs, layer_norm_flavour, patch_once, round_in_one_step, same_bits
from interpreted_ranks import squares_in_kernel_order as in_kernel_order
from test_quant_kernel import answer
from test_two_sums_kernel import layer, two
from test_wide_sums_kernel import layer as wide_layer
from test_wide_sums_kernel import wide

pytestmark = pytest.mark.ranks
ROWS, HIDDEN, WORLD = 3, 72, 2
CALLS = [
    two(ROWS, seed=1),
    two(ROWS, residual_first=True, seed=2),
    two(ROWS, flavour="gemma", scale=2.5, scale_tensor=True, scale_first=True, seed=3),
    layer(ROWS, seed=4),
    layer(ROWS, bias="row", addend_bias=True, seed=5),
    layer(ROWS, flavour="cohere", bias="row", addend_bias=True, residual_first=True, seed=6),
    two(ROWS, scale_rows=True, scale_first=True, seed=10),
    wide(ROWS, seed=7),
    wide(ROWS, dtype=torch.float16, flavour="olmo2", post_norm=True, bias="row", scale=2.5, scale_tensor=True, seed=8),
    wide_layer(ROWS, addend=True, seed=9),
]


def play(calls: list[tuple[str, Call]], conn: Any) -> None:
    """For each (way, call) what is wrong."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch_once(interpreter)
    round_in_one_step(interpreter)
    conn.send([_wrong(*call) for call in calls])


def _wrong(way: str, call: Call) -> list[str]:
    from tpfuse.ops import cuda, layer_norm_cuda, library, paths, prepare, schedule
    from tpfuse.ops.kernel import launch_plain
    from tpfuse.ops.kernels import add_norm
    from tpfuse.ops.kernels.state import STATE_WORDS
    from tpfuse.ops.kernels.variant import Variant
    from tpfuse.ops.schedule import Launch, Schedule
    from tpfuse.ops.select import Selection

    from tpfuse import compat

    add_norm.range = lambda first, *rest: (first * 0 + n for n in range(first, *rest))  # type: ignore[attr-defined]
    given = inputs(call, WORLD)
    with in_kernel_order(call):
        wanted = expected(call, given, spelled_out=True)
    done: list[str] = []

    class Interpreted:
        """A kernel that is launched in the interpreter, on the CPU."""

        ready = True

        def __init__(self, function: Any, constexprs: tuple[Any, ...]) -> None:
            self.function, self.constexprs = function, constexprs

        def __call__(self, programs: int, stream: int, *args: Any) -> None:
            done.append(self.function.__name__)
            launch_plain(self.function, min(programs, 2), args, self.constexprs)

    words = HIDDEN * 2 // 4
    mine, theirs = (torch.zeros(2, 2 * WORLD * ROWS * words, dtype=torch.int32) for _ in range(2))
    record = torch.zeros(4, dtype=torch.int32)
    for phase, part in ((0, slice(0, 2)), (1, slice(2, ROWS))):  # a launch each, in the two phases in turn
        count = part.stop - part.start
        slots = mine[phase, : 2 * WORLD * count * words].view(count, 2, WORLD, words)
        if call.wide_sum:  # of eight values the first four, then the other four
            halves = given.xs[1].view(ROWS, HIDDEN // 8, 2, 4).transpose(1, 2).reshape(ROWS, 2, words)
            pushes, mark = halves.contiguous().view(torch.int32).unbind(1), -(2**31)
        else:
            both_sums = given.xs[1], given.seconds[1]
            pushes, mark = tuple(s.contiguous().view(torch.int32).view(ROWS, words) for s in both_sums), 0x8000
        for which, pushed in enumerate(pushes):
            slots[:, which, 1] = torch.where(pushed[part] == 0, mark, pushed[part])
    plane = SimpleNamespace(
        seen=[0],
        streams=SimpleNamespace(last=0),
        peers=torch.tensor([t.data_ptr() for t in (mine, theirs, record)]),
        state=torch.zeros(STATE_WORDS, dtype=torch.int32),
        rank=0,
        phase_bytes=mine.numel() * 2,
    )

    def schedule_of(p: Any, settings: Any, c: Any, dtype: torch.dtype, rows: int) -> Schedule:
        variant = Variant(WORLD, 128, 1, 1, ptx=False)
        kernel = Interpreted(schedule.kernel_of("one_shot", c, variant).function, (c, variant))
        return Schedule(Selection("one_shot", 2), (Launch(kernel, 2, 0, 2), Launch(kernel, 1, 2, 1)))  # type: ignore[arg-type]

    def all_reduce(x: torch.Tensor, group_name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        both = {"x": given.xs, "second": given.seconds} if given.seconds else {"x": given.xs}
        name = next(n for n, ranks in both.items() if torch.equal(x, ranks[0]))
        done.append(f"all-reduce of {name}")
        return (both[name][0].float() + both[name][1].float()).to(dtype or x.dtype) + 0.0

    def group() -> None: ...

    settings = SimpleNamespace(batch_invariant=False, watchdog_seconds=1e4)
    path = SimpleNamespace(plane=plane if way == "kernel" else None, settings=settings)
    compat.current_device, compat.current_stream_handle = (lambda: None), (lambda index: 0)  # type: ignore[assignment]
    compat.resolve_group, compat.group_reference = (lambda name: group), weakref.ref  # type: ignore[assignment]
    paths.is_current, paths.path_of = (lambda *_: True), (lambda *_: path)  # type: ignore[assignment]
    prepare._load_kernels = lambda *_: None  # type: ignore[assignment]
    prepare.PREPARED.clear()
    cuda.schedule_of = layer_norm_cuda.schedule_of = schedule_of  # type: ignore[assignment]
    library.all_reduce = all_reduce
    kernels = {"rms_norm": add_norm.add_norm_kernel, "layer_norm": add_norm.add_norm_layer_norm_kernel}
    library._kernel = lambda c: Interpreted(  # type: ignore[assignment]
        kernels[c.kind], (c, Variant(world=1, lanes=128, steps=c.groups, split=1, ptx=False))
    )
    x, second = given.xs[0].clone(), given.seconds[0].clone() if given.seconds else given.bias
    if call.layer_norm:
        addend = second if call.two_sums else given.addend
        got = layer_norm_cuda.run(
            *(x, given.residual, given.weight, given.shift, given.bias, addend, call.eps, call.scale),
            *(str(layer_norm_flavour(call)), "0", call.two_sums, given.addend_bias, call.residual_first),
        )
    else:
        from tpfuse.ops.flavour import NAMED

        tensor = call.scale_value if isinstance(call.scale_value, torch.Tensor) else None
        out = (torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))) if call.seed == 2 else None
        got = cuda.run(
            *(x, given.residual, given.weight, second, call.eps, 1.0, str(NAMED[call.flavour]), call.post_norm, "0"),
            *(tensor, call.scale_first, call.two_sums, call.residual_first),
            out=out,
        )
        if out is not None and (got[0] is not out[0] or got[1] is not out[1]):
            done.append("not into the given outputs")
    wrong = [n for n, g, w in zip(("normed", "residual"), got, wanted, strict=True) if not same_bits(g, w)]
    if not torch.equal(x, given.xs[0]) or (given.seconds and not torch.equal(second, given.seconds[0])):
        wrong.append("an operand was written")
    if way == "library":
        behind = "add_norm_layer_norm_kernel" if call.layer_norm else "add_norm_kernel"
        sums = ["all-reduce of x", "all-reduce of second"][: 1 + call.two_sums]
        return wrong + ([] if done == [*sums, behind] else [f"done {done}"])
    of_two = "_of_two" if call.two_sums else ""
    name = f"one_shot_layer_norm{of_two}_kernel" if call.layer_norm else "one_shot_kernel"
    wrong += [] if done == [name] * 2 else [f"done {done}"]
    wrong += ["words left in the plane"] if bool(mine.any()) else []
    sent = int((theirs.view(-1, words) != 0).any(-1).sum())
    return wrong + ([] if sent == 2 * ROWS else [f"pushed {sent} rows"])


@pytest.mark.parametrize("way", ["kernel", "library"])
def test_a_call_gives_the_reference_and_does_what_it_should(way: str) -> None:
    calls = [(way, call) for call in CALLS]
    found = answer(play, calls)
    assert found == [[]] * len(calls), [(call, wrong) for call, wrong in zip(calls, found, strict=True) if wrong]
