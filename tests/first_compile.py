"""What torch does only once in a process, at its first compile, done before ranks are forked: a second of each rank's time.

Imported by the fork server of ``warm``. Nothing of tpfuse, no process group and no thread, because ranks are forked afterwards;
and nothing where torch has CUDA, which a process must not have touched before it forks.
"""

from __future__ import annotations

import sys

import torch


def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    q = x.view(1, 1, -1, 8)
    h = x + torch.nn.functional.scaled_dot_product_attention(q, q, q).view(-1, 8) @ weight
    return torch.nn.functional.silu(weight[0] * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)))


def compile_once() -> None:
    """With AOTAutograd, and with Inductor a graph that has no kernel to build."""
    x, weight = torch.ones(4, 8), torch.ones(8, 8)
    with torch.no_grad():
        torch.compile(layer, backend="aot_eager")(x, weight)
        torch.compile(torch.mm, backend="inductor")(x, weight)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


if torch.version.cuda is None:
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # else its first bar, which the compiler draws, starts a thread
    try:
        compile_once()
    except Exception as error:  # ranks do without
        print(f"tests/first_compile.py: {type(error).__name__}: {error}", file=sys.stderr)
