"""The fused op without the compiler, for engine code that already knows what it wants to fuse.

torchrun --nproc-per-node 2 examples/op_alone.py
"""

import torch
import torch.distributed as dist
from tpfuse.ops import LLAMA, all_reduce_add_rms_norm


def main() -> None:
    dist.init_process_group("gloo")
    rank, hidden = dist.get_rank(), 128
    partial = torch.full((3, hidden), float(rank + 1))  # what this rank's row-parallel projection gives
    residual, weight = torch.ones(3, hidden), torch.linspace(0.5, 1.5, hidden)

    normed, residual = all_reduce_add_rms_norm(partial, residual, weight, eps=1e-5, flavour=LLAMA)

    world = dist.get_world_size()
    expected = 1 + world * (world + 1) / 2  # the residual and the sum over ranks
    assert torch.equal(residual, torch.full((3, hidden), expected))
    torch.testing.assert_close(
        normed, weight.expand(3, hidden), rtol=1e-4, atol=1e-4
    )  # every value equals the root mean square
    if rank == 0:
        print(f"residual {residual[0, 0].item()}, normed {normed[0, 0].item():.3f} .. {normed[0, -1].item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
