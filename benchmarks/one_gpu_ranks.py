"""Start several ranks on one GPU: the launcher lives in ``tpfuse.measure.ranks``; this shows how to use it.

python benchmarks/one_gpu_ranks.py 4
"""

from __future__ import annotations

import sys

from tpfuse.measure.ranks import run_ranks


def one_call(rank: int, world: int) -> str:
    """What a rank does: any function at the top of a module."""
    import torch

    from tpfuse import ops

    x = torch.full((4, 4096), float(rank + 1), device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    _, h = ops.all_reduce_add_rms_norm(x, torch.zeros_like(x), weight)
    return f"rank {rank} of {world}: path {ops.describe_path().kind}, sum {h[0, 0].item()}"


if __name__ == "__main__":
    for line in run_ranks(one_call, int(sys.argv[1]) if len(sys.argv) > 1 else 2):
        print(line)
