"""A Llama block sharded by torch's own ``parallelize_module``: DTensor's reductions are found like any others.

torchrun --nproc-per-node 2 examples/dtensor_llama.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tpfuse

HIDDEN, HEADS, LAYERS = 64, 4, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(HIDDEN, 128, bias=False), nn.Linear(HIDDEN, 128, bias=False)
        self.down_proj = nn.Linear(128, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_norm, self.post_norm = nn.RMSNorm(HIDDEN, eps=1e-5), nn.RMSNorm(HIDDEN, eps=1e-5)
        self.self_attn, self.mlp = Attention(), Mlp()

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = h + self.self_attn(self.input_norm(h))
        return h + self.mlp(self.post_norm(h))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-5)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            h = layer(h)
        return self.norm(h)


PLAN = {
    **{f"self_attn.{n}_proj": ColwiseParallel() for n in "qkv"},
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    torch.manual_seed(0)
    model = Llama().eval().requires_grad_(False)
    x = torch.randn(2, 5, HIDDEN)
    with torch.no_grad():
        whole = model(x)
    for layer in model.layers:
        parallelize_module(layer, mesh, PLAN)

    compiled = torch.compile(model, backend="tpfuse", options={"tpfuse.inner": "aot_eager"})
    with torch.no_grad(), tpfuse.expect(fused=2 * LAYERS):
        sharded = compiled(x)
    torch.testing.assert_close(sharded, whole, rtol=1e-5, atol=1e-5)
    if dist.get_rank() == 0:
        print(tpfuse.reports()[0])
        print(f"largest difference to the unsharded model: {(sharded - whole).abs().max().item():.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
