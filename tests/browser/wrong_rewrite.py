"""A check for ``tpfuse bisect``: 60 all-reduces, of which one, given on the command line, is rewritten wrongly.

The wrong rewrite has an eps of 1, which moves the result visibly.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from tpfuse.passes import fused_call

LAYERS, HIDDEN = 30, 16


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.proj(x)
        dist.all_reduce(y)
        return y


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Block(), Block()
        self.norm1, self.norm2 = torch.nn.RMSNorm(HIDDEN, eps=1e-6), torch.nn.RMSNorm(HIDDEN, eps=1e-6)

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = h + self.self_attn(x)
        h = h + self.mlp(self.norm1(h))
        return h, self.norm2(h)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        x = h
        for layer in self.layers:
            h, x = layer(h, x)
        return x


def plant(number: int) -> None:
    """Make the rewrite of this number (from 1) wrong."""
    original, done = fused_call._build, 0

    def wrong(new):
        nonlocal done
        done += 1
        if done == number:
            new.candidate = replace(new.candidate, norm=replace(new.candidate.norm, eps=1.0))
        return original(new)

    fused_call._build = wrong


def main() -> int:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    plant(int(sys.argv[1]))
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, HIDDEN)
    with torch.no_grad():
        expected = model(x)
        got = torch.compile(model, backend="tpfuse", options={"tpfuse.inner": "aot_eager"})(x)
    return 0 if torch.allclose(got, expected, atol=1e-5) else 3


if __name__ == "__main__":
    sys.exit(main())
