"""The pass inside plain Inductor: ``backend="inductor"`` stays, tpfuse is mounted as one of its graph passes.

torchrun --nproc-per-node 2 examples/inductor_pass.py
"""

import torch
import torch.distributed as dist
from plain_module import HIDDEN, Mlp

import tpfuse
from tpfuse.backend import graph_pass


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    model = Mlp().eval().requires_grad_(False)
    torch.manual_seed(0)
    x, residual = torch.randn(4, HIDDEN), torch.randn(4, HIDDEN)
    mounted = graph_pass({"tpfuse.policy": "all"})
    compiled = torch.compile(model, backend="inductor", options={"post_grad_custom_pre_pass": mounted})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, residual), model(x, residual))
    if dist.get_rank() == 0:
        print(tpfuse.reports()[0] if tpfuse.reports() else "taken from a compile cache: the pass did not run")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
