"""A plain module with ``dist.all_reduce``: compile it, see what was fused.

torchrun --nproc-per-node 2 examples/plain_module.py
"""

import torch
import torch.distributed as dist
from torch import nn

import tpfuse

HIDDEN, LOCAL = 256, 128


class Mlp(nn.Module):
    """Row-parallel second projection: every rank holds a slice of the inner dimension and sums over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, LOCAL, bias=False)
        self.down = nn.Linear(LOCAL, HIDDEN, bias=False)
        self.norm = nn.RMSNorm(HIDDEN)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.down(nn.functional.silu(self.up(x)))
        dist.all_reduce(y)
        residual = residual + y
        return self.norm(residual), residual


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    model = Mlp().eval().requires_grad_(False)
    torch.manual_seed(0)
    x, residual = torch.randn(4, HIDDEN), torch.randn(4, HIDDEN)

    # There is no attention here: nothing proves that it shares the group, and nothing refutes it, so the sum is fused.
    options = {"tpfuse.inner": "aot_eager"}
    compiled = torch.compile(model, backend="tpfuse", options=options)
    with torch.inference_mode(), tpfuse.expect(fused=1):
        fused = compiled(x, residual)
        plain = model(x, residual)
    assert all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True))
    if dist.get_rank() == 0:
        print(tpfuse.reports()[0])
        print("fused output equals the plain module's bit for bit")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
