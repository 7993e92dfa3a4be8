"""The way of a call to its kernels on a GPU, played without one: what is launched with which arguments, and that it is right.

One process plays rank 0 of two. What the other rank would have pushed lies in its plane already, and the kernels that would be
launched run in Triton's interpreter, with the arguments that the launch would have.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreted_ranks import Call, expected, fp8_in_one_step, inputs, patch_once, round_in_one_step, same_bits
from interpreted_ranks import squares_in_kernel_order as in_kernel_order
from test_quant_kernel import answer

pytestmark = pytest.mark.ranks
SCALE = torch.tensor(0.037)


def play(calls: list[tuple[str, str, int, str, bool, bool]], conn: Any) -> None:
    """For each (way, quantizer, rows, dtype, keep_normed, post_norm) the results that are wrong."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch_once(interpreter)
    round_in_one_step(interpreter)
    fp8_in_one_step(interpreter)
    conn.send([_wrong(*call) for call in calls])


def _wrong(way: str, name: str, rows: int, dtype_name: str, keep: bool, post_norm: bool) -> list[str]:
    from dataclasses import replace

    from tpfuse.ops import library, quant_cuda
    from tpfuse.ops.flavour import LLAMA
    from tpfuse.ops.kernel import launch_plain
    from tpfuse.ops.kernels import add_norm, one_shot, quantize
    from tpfuse.ops.kernels.state import STATE_WORDS
    from tpfuse.ops.kernels.variant import Variant, constants
    from tpfuse.ops.prepare import Prepared
    from tpfuse.ops.quant_reference import quantize as reference_of
    from tpfuse.ops.quantizer import NAMED
    from tpfuse.ops.schedule import Launch, Schedule
    from tpfuse.ops.select import Selection

    for module in (add_norm, quantize):  # the interpreter's rows are Python's numbers
        module.range = lambda first, *rest: (first * 0 + n for n in range(first, *rest))  # type: ignore[attr-defined]
    dtype, hidden, quantizer = getattr(torch, dtype_name), 264, NAMED[name]
    call = Call(rows, hidden, dtype=dtype, seed=rows, post_norm=post_norm)
    given = inputs(call, 2)
    launched = []

    class Interpreted:
        """A kernel that is launched in the interpreter, on the CPU."""

        ready = True

        def __init__(self, function: Any, constexprs: tuple[Any, ...]) -> None:
            self.function, self.constexprs = function, constexprs

        def __call__(self, programs: int, stream: int, *args: Any) -> None:
            launched.append(self.function.__name__)
            # Nothing is assumed of what the kernels must not read.
            launch_plain(self.function, min(programs, 2), args, self.constexprs)

    def alone(c: Any) -> Variant:
        return Variant(world=1, lanes=128, steps=c.groups, split=1, ptx=False)

    library._kernel = lambda c: Interpreted(  # type: ignore[assignment]
        add_norm.add_norm_quant_kernel if c.quantized else add_norm.add_norm_kernel, (c, alone(c))
    )
    library.quantize_kernel_of = lambda c: Interpreted(quantize.quantize_kernel, (c, alone(c)))  # type: ignore[assignment]
    total = (given.xs[0].float() + given.xs[1].float()).to(dtype) + 0.0
    library.all_reduce = lambda x, group: total.clone()
    c = constants(dtype, dtype, hidden, LLAMA, bias="none", scaled=False, has_residual=True, post_norm=post_norm)
    words = hidden * dtype.itemsize // 4
    plane, record = torch.zeros(2, rows * 2 * words, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    other = torch.zeros_like(plane)
    peers = torch.tensor([plane.data_ptr(), other.data_ptr(), record.data_ptr()], dtype=torch.int64)
    pushed = given.xs[1].contiguous().view(torch.int32).view(rows, words)
    half = (rows + 1) // 2
    for phase, part in ((0, slice(0, half)), (1, slice(half, rows))):  # a launch each, in the two phases in turn
        count = len(pushed[part])
        slots = plane[phase, : count * 2 * words].view(count, 2, words)
        slots[:, 1] = torch.where(pushed[part] == 0, 0x8000, pushed[part])
    p = SimpleNamespace(
        seen=[0], streams=SimpleNamespace(last=0), peers=peers, state=torch.zeros(STATE_WORDS, dtype=torch.int32),
        rank=0, phase_bytes=plane.numel() * 2,
    )  # fmt: skip

    def schedule_of(p: Any, settings: Any, c: Any, dtype: Any, rows: int) -> Schedule:
        function = one_shot.one_shot_quant_kernel if c.quantized else one_shot.one_shot_kernel
        kernel = Interpreted(function, (c, Variant(2, 128, c.groups, 1, ptx=False)))
        pieces = [(0, half), (half, rows - half)]
        return Schedule(Selection("one_shot", half), tuple(Launch(kernel, n, s, n) for s, n in pieces if n))  # type: ignore[arg-type]

    quant_cuda.schedule_of = schedule_of  # type: ignore[assignment]
    quant_cuda.compat = SimpleNamespace(current_device=lambda: None, current_stream_handle=lambda index: 0)  # type: ignore[assignment]
    library.compat = quant_cuda.compat  # type: ignore[assignment]
    quant_cuda._constants = lambda c, q, keep, index: quant_cuda.quantized(c, q, keep, False)  # type: ignore[assignment]
    settings = SimpleNamespace(quant_rows=4, batch_invariant=False)
    path = SimpleNamespace(plane=None if way == "library" else p, settings=settings)
    quant_cuda.prepare_once = lambda *_: Prepared(path, LLAMA, c, None, dtype, dtype, 10**12)  # type: ignore[arg-type,assignment]
    static = SCALE if quantizer.granularity == "tensor" else None
    got = quant_cuda.run(given.xs[0], given.residual, given.weight, None, 1e-6, 1.0, str(LLAMA), post_norm, "0",
                         str(quantizer), static, keep)  # fmt: skip
    want_kernels = {
        "library": ["add_norm_quant_kernel"],
        "fused": ["one_shot_quant_kernel"] * 2,
        "behind": ["one_shot_kernel"] * 2 + ["quantize_kernel"],
    }[way]
    with in_kernel_order(replace(call)):
        normed, residual_out = expected(call, given)
    wanted = (*reference_of(normed, quantizer, static), normed if keep else normed.new_empty(0), residual_out)
    names = ("quantized", "scales", "normed", "residual_out")
    wrong = [n for n, g, w in zip(names, got, wanted, strict=True) if not same_bits(g, w) or g.stride() != w.stride()]
    wrong += [] if launched == want_kernels else [f"launched {launched}"]
    wrong += ["words left in the plane"] if way != "library" and bool(plane.any()) else []
    return wrong


def test_each_way_of_a_call_gives_the_reference_and_launches_what_it_should() -> None:
    calls = []
    for way, rows in (("fused", 3), ("behind", 5), ("library", 5)):
        for name, keep in (("vllm-token", False), ("deepgemm-ue8m0", True), ("vllm-static", False)):
            calls.append((way, name, rows, "bfloat16", keep, False))
        calls.append((way, "vllm-group128", rows, "float32", True, True))
    found = answer(play, calls)
    assert found == [[]] * len(calls), [(call, wrong) for call, wrong in zip(calls, found, strict=True) if wrong]
