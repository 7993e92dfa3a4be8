"""Quantization in the kernels, interpreted in one process: rounding, scales and layouts bit for bit those of the reference."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import warm
from interpreted_ranks import fp8_in_one_step, round_in_one_step, same_bits, take_short_cuts
from quantizations import hard_rows
from tpfuse.ops.quantizer import NAMED, Quantizer

pytestmark = pytest.mark.ranks
MORE = {
    "e5m2 to infinity": Quantizer(dtype="e5m2", granularity="tensor", saturate="none"),
    "e5m2 by column": Quantizer(dtype="e5m2", granularity="group128", layout="column", returned="reciprocal"),
    "not clamped": Quantizer(granularity="tensor", saturate="none"),
    "given inverse, rounded": Quantizer(granularity="tensor", apply="mul", apply_in="input"),
    "reciprocal of a reciprocal": Quantizer(
        compute="input", derive="inverse_recip", apply="mul", returned="reciprocal"
    ),
    "floor behind the power": replace(NAMED["vllm-group128"], power_of_two="log2", floor_at="rounded"),
}
ALL = {**NAMED, **MORE}


def answer(target: Callable[..., None], *args: Any) -> Any:
    """What a process with Triton's interpreter sends back."""
    context = warm.context(interpret=True)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*args, send), daemon=True)
    process.start()
    send.close()
    try:
        assert receive.poll(120), "no answer within 120 s"
        return receive.recv()
    finally:
        process.kill()
        process.join()


def bytes_of(values: np.ndarray, conn: Any) -> None:
    import triton.language as tl
    from tpfuse.ops.kernels.fp8 import fp8_code
    from triton.runtime import interpreter

    given = tl.tensor(interpreter.TensorHandle(values, tl.float32), tl.block_type(tl.float32, list(values.shape)))
    codes = [(False, 0x7E), (True, 0x7B), (True, 0x7C)]
    conn.send([fp8_code(given, *(tl.constexpr(v) for v in code)).handle.data.astype(np.uint8) for code in codes])


def test_every_fp8_value_and_tie_is_rounded_as_torch_rounds_it():
    found = {}
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        codes = codes[codes.isfinite()].sort().values
        ties = (codes[1:] + codes[:-1]) / 2
        around = [torch.nextafter(t, torch.full_like(t, end)) for t in (codes, ties) for end in (-1e9, 1e9)]
        found[dtype] = torch.cat([codes, ties, *around])
    random = torch.from_numpy(
        np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32).view(np.float32).copy()
    )
    odd = torch.tensor([0.0, -0.0, 1e-41, 464.0, 465.0, 1e30, -1e30, float("inf"), float("-inf"), float("nan")])
    values = torch.cat([*found.values(), random, odd])
    values = values.repeat(2)[: 1 << (len(values) - 1).bit_length()]  # Triton's sizes are powers of two
    e4m3, e5m2, infinite = (torch.from_numpy(f) for f in answer(bytes_of, values.numpy()))
    for got, dtype, top in (
        (e4m3, torch.float8_e4m3fn, 448.0),
        (e5m2, torch.float8_e5m2, 57344.0),
        (infinite, torch.float8_e5m2, None),
    ):
        want = (values if top is None else values.clamp(-top, top)).to(dtype).view(torch.uint8)
        wrong = (got != want) & ~(values.isnan() & (got & 0x7F == 0x7F))
        assert not wrong.any(), (dtype, values[wrong][:5], got[wrong][:5], want[wrong][:5])


def powers_of(values: np.ndarray, conn: Any) -> None:
    import triton.language as tl
    from tpfuse.ops.kernels.quantize import next_power_of_two
    from triton.runtime import interpreter

    given = tl.tensor(interpreter.TensorHandle(values, tl.float32), tl.block_type(tl.float32, list(values.shape)))
    conn.send([next_power_of_two(given, tl.constexpr(log2)).handle.data for log2 in (True, False)])


def test_powers_of_two_are_those_of_torchs_log2_and_of_the_bits():
    near = torch.cat([torch.tensor([k], dtype=torch.int32) * (1 << 23) + torch.arange(-2, 40) for k in range(1, 254)])
    values = near[near >= 1 << 23].to(torch.int32).view(torch.float32).repeat(2)[: 1 << 14]
    by_log2, by_bits = (torch.from_numpy(f) for f in answer(powers_of, values.numpy()))
    assert torch.equal(by_log2, torch.exp2(torch.ceil(torch.log2(values))))
    mantissa, exponent = torch.frexp(values)
    assert torch.equal(by_bits, torch.ldexp(torch.ones_like(values), exponent - (mantissa == 0.5).int()))
    assert not torch.equal(by_log2, by_bits)


def quotients(values: np.ndarray, scales: np.ndarray, conn: Any) -> None:
    import triton.language as tl
    from tpfuse.ops.kernels.quantize import over_scale
    from triton.runtime import interpreter

    def fma(x: Any, y: Any, z: Any) -> Any:  # The interpreter of Triton 3.6 rounds twice.
        wide = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(wide.astype(np.float32), z.dtype.scalar)

    interpreter.interpreter_builder.create_fma = fma
    given = [
        tl.tensor(interpreter.TensorHandle(each, tl.float32), tl.block_type(tl.float32, list(each.shape)))
        for each in (values, scales)
    ]
    with np.errstate(all="ignore"):
        conn.send(over_scale((given[0],), given[1])[0].handle.data)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_quotients_of_a_mended_reciprocal_are_those_of_a_division(dtype: torch.dtype):
    """All significands of the dtype by random scales, bit for bit; then every kind of operand, as far as fp8 can tell."""
    draw = torch.Generator().manual_seed(0)
    count = 128 if dtype == torch.bfloat16 else 1024
    scales = (1.0 + torch.rand(1 << 20, generator=draw)) * torch.randint(-30, 30, (1 << 20,), generator=draw).exp2()
    values = (1.0 + torch.arange(count) / count).repeat((1 << 20) // count) * scales.log2().floor().exp2()
    got = torch.from_numpy(answer(quotients, values.numpy(), scales.numpy()))
    assert torch.equal(got, values / scales)

    odd = [0.0, -0.0, 1.0, -3.0, 448.0, float("inf"), float("-inf"), float("nan")]
    info = torch.finfo(dtype)
    every = torch.tensor([*odd, info.max, info.min, info.tiny, info.tiny / 128, -info.tiny * 448], dtype=dtype).float()
    least = torch.finfo(torch.float32)
    by = torch.tensor(
        [0.0, 1.0, 1e-45, 3e-42, least.tiny, 1e-30, 2.0**-60, 7e30, least.max, float("inf"), float("nan")]
    )
    spread = torch.randint(-149, 128, (40,), generator=draw).double().exp2().float() * torch.rand(40, generator=draw)
    by = torch.cat([by, spread, -by, -spread])
    values, scales = (each.flatten() for each in torch.broadcast_tensors(every[:, None], by[None]))
    pad = (1 << (len(values) - 1).bit_length()) - len(values)
    values, scales = (torch.cat([each, torch.ones(pad)]) for each in (values, scales))
    got, want = torch.from_numpy(answer(quotients, values.numpy(), scales.numpy())), values / scales
    for fp8, top in ((torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)):
        for rounding in (torch.float32, dtype):
            g, w = (each.to(rounding).float().clamp(-top, top).to(fp8).view(torch.uint8) for each in (got, want))
            assert torch.equal(g & 0x7F, w & 0x7F), (values[g != w], scales[g != w])
            assert torch.equal(g[~want.isnan()], w[~want.isnan()])


def quantize_rows(kinds: list[tuple[str, torch.dtype, int, int]], conn: Any) -> None:
    """For each (quantizer, dtype, columns, lanes) what differs between the kernel for rows in memory and the reference."""
    os.environ["TRITON_INTERPRET"] = "1"
    from tpfuse.ops.flavour import WEIGHTLESS
    from tpfuse.ops.kernel import launch_plain
    from tpfuse.ops.kernels import quantize as module
    from tpfuse.ops.kernels.quant_constants import quantized, supports_quantizer
    from tpfuse.ops.kernels.variant import GROUP_LANES, Variant, constants
    from tpfuse.ops.quant_reference import empty_scales, quantize
    from triton.runtime import interpreter

    # The interpreter's rows are Python's numbers; the compiler's are values of the language.
    take_short_cuts(interpreter)
    round_in_one_step(interpreter)
    fp8_in_one_step(interpreter)
    module.range = lambda first, *rest: (first * 0 + n for n in range(first, *rest))  # type: ignore[attr-defined]
    wrong = []
    for name, dtype, hidden, lanes in kinds:
        quantizer, x, scale = ALL[name], hard_rows(11, hidden, hidden).to(dtype), torch.tensor(0.037)
        c = constants(dtype, None, hidden, WEIGHTLESS, bias="none", scaled=False, has_residual=False, post_norm=False)
        assert supports_quantizer(c, quantizer) is None
        variant = Variant(world=1, lanes=lanes, steps=-(-c.groups * GROUP_LANES // lanes), split=1, ptx=False)
        out, scales = torch.empty_like(x, dtype=quantizer.torch_dtype), empty_scales(x, quantizer)
        arguments = (x, out, scales if scales.numel() else scale, scale, scales.stride(-1), len(x))
        launch_plain(module.quantize_kernel, 2, arguments, (quantized(c, quantizer, False, False), variant))
        want = quantize(x, quantizer, scale if quantizer.granularity == "tensor" else None)
        wrong += [(name, str(dtype), hidden, what) for what, g, w in
                  zip(("values", "scales"), (out, scales), want, strict=True) if not same_bits(g, w)]  # fmt: skip
    conn.send(wrong)


def test_rows_in_memory_get_the_bytes_and_scales_of_the_reference():
    kinds = [(name, torch.bfloat16, 264, 128) for name in ALL]
    kinds += [(name, dtype, 264, 128) for name in ALL for dtype in (torch.float16, torch.float32)]
    assert answer(quantize_rows, kinds) == []


def test_rows_of_several_steps_and_of_several_groups_a_step():
    names = ("torchao-rowwise", "vllm-group128", "deepgemm-ue8m0", "e5m2 by column", "vllm-static")
    kinds = [
        (name, dtype, 2880, lanes)
        for name in names
        for dtype in (torch.bfloat16, torch.float32)
        for lanes in (128, 256)
    ]
    assert answer(quantize_rows, kinds) == []
