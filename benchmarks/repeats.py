"""Which of torch's own parts of a decode step give other bits when they are made again on the same inputs? One GPU.

    python benchmarks/repeats.py

Whoever compares the tokens of two contenders has to know: behind many layers of random weights one bit becomes another token.

- attention: one query of each row against 256 keys and values, by what torch chooses and by each of its backends, 20 calls in a
  CUDA graph, replayed.
- fp8 product: ``torch._scaled_mm`` with a scale for each row, likewise. Widths are those of Llama-3-8B over two ranks.
- compiled norm: RMSNorm, and a linear layer behind it that torchao quantizes (skipped without torchao), compiled again with the
  settings of ``e2e.py``. Printed are the compiles whose normed rows or products differ from those of the first.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import e2e_llama
import torch
from e2e_measure import inductor_settings
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

ROWS = (1, 8, 32, 128)
CALLS, REPLAYS, COMPILES = 20, 100, 6
BACKENDS = {"torch's choice": None, "cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def others(call: Callable[[], Tensor]) -> int:
    """Of ``CALLS * REPLAYS`` calls in a CUDA graph, those that differ from one made alone."""
    alone = call().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = [call() for _ in range(CALLS)]
    found = 0
    for _ in range(REPLAYS):
        graph.replay()
        found += sum(not torch.equal(one, alone) for one in made)
    return found


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` (rows, columns) in e4m3 and the scale of each row (rows, 1) in fp32."""
    scale = x.float().abs().amax(-1, keepdim=True) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def attention(rows: int, heads: int, backend: str) -> str:
    q = torch.randn(rows, 16, 1, 128, device="cuda").bfloat16()
    k, v = torch.randn(2, rows, heads, 256, 128, device="cuda").bfloat16()

    chosen = BACKENDS[backend]

    def call() -> Tensor:
        with contextlib.nullcontext() if chosen is None else sdpa_kernel(chosen):
            return scaled_dot_product_attention(q, k, v, enable_gqa=heads < 16)

    try:
        return f"{others(call)} of {CALLS * REPLAYS} calls"
    except RuntimeError as error:
        return f"refused: {str(error)[:60]}"


def product(rows: int, columns: int, inner: int) -> str:
    a, a_scales = to_fp8(torch.randn(rows, inner, device="cuda"))
    b, b_scales = to_fp8(torch.randn(columns, inner, device="cuda"))

    def call() -> Tensor:
        return torch._scaled_mm(
            a, b.t(), scale_a=a_scales, scale_b=b_scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return f"{others(call)} of {CALLS * REPLAYS} calls"


def compiled_norm(rows: int) -> str:
    weights = e2e_llama.Weights(torch.bfloat16, 0, torch.device("cuda"))
    weight = weights.common(4096, mean=1.0)
    layer = e2e_llama.linear(weights.own(3072, 4096))
    try:
        e2e_llama.to_float8(layer)
    except RuntimeError as error:
        return str(error)
    h = torch.randn(40, rows, 4096, device="cuda").bfloat16()

    def norm(h: Tensor) -> tuple[Tensor, Tensor]:
        x = e2e_llama.rms_norm(h, weight)
        return x, layer(x)

    first: list[Tensor] = []
    differ = 0
    for _ in range(COMPILES):
        torch._dynamo.reset()
        step = torch.compile(norm, dynamic=False, fullgraph=True)
        with torch.no_grad():
            made = [part.clone() for one in h for part in step(one)]
        first = first or made
        differ += not all(torch.equal(a, b) for a, b in zip(made, first, strict=True))
    return f"{differ} of {COMPILES - 1} compiles"


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("repeats.py: no GPU is visible")
    torch.manual_seed(0)
    inductor_settings()
    facts = torch.cuda.get_device_name(), torch.__version__, torch.backends.cudnn.version()
    print("{}, torch {}, cuDNN {}; other bits:".format(*facts))
    for rows in ROWS:
        for heads in (16, 4):
            said = ", ".join(f"{name} {attention(rows, heads, name)}" for name in BACKENDS)
            print(f"{rows:4d} rows, attention, {heads:2d} heads of keys: {said}", flush=True)
        for columns, inner in ((3072, 4096), (4096, 2048), (14336, 4096), (4096, 7168)):
            print(f"{rows:4d} rows, fp8 product {inner} -> {columns}: {product(rows, columns, inner)}", flush=True)
        print(f"{rows:4d} rows, compiled norm: {compiled_norm(rows)}", flush=True)


if __name__ == "__main__":
    main()
