"""The kernel behind somebody else's all-reduce, interpreted: the second half of the library path, bit for bit."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import warm
from interpreted_ranks import Call, expected, inputs, squares_in_kernel_order, take_short_cuts, ulps_apart


def work(calls: list[Call], conn: Any) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from tpfuse.ops.flavour import NAMED
    from tpfuse.ops.kernel import launch_plain
    from tpfuse.ops.kernels import add_norm
    from tpfuse.ops.kernels.variant import GROUP_LANES, Variant, constants, torch_dtype
    from triton.runtime import interpreter

    take_short_cuts(interpreter)
    # The interpreter's rows are Python's numbers; the compiler's are values of the language.
    add_norm.range = lambda first, *rest: (first * 0 + n for n in range(first, *rest))  # type: ignore[attr-defined]
    found = []
    for call in calls:
        given = inputs(call, 2)
        c = constants(
            call.dtype, call.dtype, call.hidden, NAMED[call.flavour], bias=call.bias, scaled=call.scale != 1.0,
            has_residual=call.residual, post_norm=call.post_norm,
            scale_loaded=call.scale_tensor, scale_first=call.scale_first, wide_residual=call.wide_residual,
        )  # fmt: skip
        reduced = (given.xs[0].float() + given.xs[1].float()).to(call.dtype) + 0.0
        outputs = [torch.empty(reduced.shape, dtype=torch_dtype(d)) for d in (c.out_dtype, c.residual_dtype)]
        operands = [reduced if t is None else t for t in (given.residual, given.weight, given.bias)]
        variant = Variant(world=1, lanes=GROUP_LANES, steps=c.groups, split=1, ptx=False)
        scale = torch.tensor(call.scale, dtype=call.dtype) if call.scale_tensor else call.scale
        arguments = (reduced, *operands, *outputs, call.rows, call.eps, scale)
        launch_plain(add_norm.add_norm_kernel, 2, arguments, (c, variant))
        with squares_in_kernel_order(call):
            want = expected(call, given)
        found.append([ulps_apart(a, b) for a, b in zip(outputs, want, strict=True)])
    conn.send(found)


@pytest.mark.ranks
def test_it_has_the_bits_of_the_reference():
    calls = [
        Call(3, hidden, dtype=dtype, flavour=flavour, seed=hidden)
        for hidden in (72, 2056)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for flavour in ("llama", "olmo2", "vllm", "sglang")
    ]
    calls += [Call(2, 72, bias="row", scale=0.22, flavour=flavour) for flavour in ("llama", "vllm")]
    calls += [Call(2, 72, bias="full", scale=0.22, scale_tensor=True, scale_first=first) for first in (False, True)]
    calls += [
        Call(3, hidden, dtype=dtype, flavour=flavour, wide_residual=True)
        for hidden, dtype, flavour in ((72, torch.bfloat16, "sglang"), (2056, torch.float16, "vllm"))
    ]
    # Values of a row that are not finite spoil its norm, and of its residual themselves alone.
    calls += [Call(3, 2056, special="nonfinite", seed=n) for n in (1, 2)]
    calls += [Call(2, 72, residual=False, flavour="vllm"), Call(2, 72, post_norm=True, flavour="olmo2")]
    context = warm.context(interpret=True)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(calls, send), daemon=True)
    process.start()
    send.close()
    try:
        assert receive.poll(120), "no answer within 120 s"
        assert receive.recv() == [[0, 0]] * len(calls)
    finally:
        process.kill()
        process.join()
