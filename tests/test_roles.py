"""Same graph, same decision: whatever the spelling of the reduction, the inner compiler and the names of the modules."""

from __future__ import annotations

import itertools

import graphs
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.nn import functional as F

import tpfuse

H, HEADS, LAYERS = 32, 2, 2


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(2)
    yield
    dist.destroy_process_group()


def in_place(y: Tensor) -> Tensor:
    dist.all_reduce(y)
    return y


def functional(y: Tensor) -> Tensor:
    return funcol.all_reduce(y, "sum", dist.group.WORLD)


SPELLINGS = {"in place": in_place, "functional": functional}


class Mixer(nn.Module):
    def __init__(self, reduce, names) -> None:
        super().__init__()
        self.reduce, self.names = reduce, names
        for name in names[:2]:
            setattr(self, name, nn.Linear(H, 3 * H if name == names[0] else H, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = getattr(self, self.names[0])(x).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.reduce(getattr(self, self.names[1])(y))


class Gated(nn.Module):
    def __init__(self, reduce, names) -> None:
        super().__init__()
        self.reduce, self.names = reduce, names
        for name in names:
            setattr(self, name, nn.Linear(H, H, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        up, gate, down = (getattr(self, name) for name in self.names)
        return self.reduce(down(F.silu(gate(x)) * up(x)))


class Block(nn.Module):
    def __init__(self, reduce, names) -> None:
        super().__init__()
        self.names = names
        setattr(self, names["attention"], Mixer(reduce, names["attention linears"]))
        setattr(self, names["mlp"], Gated(reduce, names["mlp linears"]))
        for name in names["norms"]:
            setattr(self, name, nn.RMSNorm(H, eps=1e-6))

    def forward(self, h: Tensor) -> Tensor:
        first, second = (getattr(self, n) for n in self.names["norms"])
        h = h + getattr(self, self.names["attention"])(first(h))
        return h + getattr(self, self.names["mlp"])(second(h))


class Model(nn.Module):
    def __init__(self, reduce, names) -> None:
        super().__init__()
        self.names = names
        setattr(self, names["layers"], nn.ModuleList(Block(reduce, names) for _ in range(LAYERS)))
        self.last = nn.RMSNorm(H, eps=1e-6)
        self.eval().requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        for layer in getattr(self, self.names["layers"]):
            h = layer(h)
        return self.last(h)


NAMES = {
    "usual names": {
        "layers": "layers",
        "attention": "self_attn",
        "mlp": "mlp",
        "attention linears": ("qkv_proj", "o_proj"),
        "mlp linears": ("up_proj", "gate_proj", "down_proj"),
        "norms": ("input_norm", "post_norm"),
    },
    "a, b, c": {
        "layers": "a",
        "attention": "b",
        "mlp": "c",
        "attention linears": ("d", "e"),
        "mlp linears": ("f", "g", "i"),
        "norms": ("j", "k"),
    },
}


@pytest.mark.parametrize(
    ("names", "spelling", "inner"),
    [
        pytest.param(
            *case,
            inner,
            marks=[] if inner == "aot_eager" else pytest.mark.slow,  # the quick run has Inductor's in test_caches.py
            id="-".join((*case, inner)),
        )
        for case in itertools.product(NAMES, SPELLINGS)
        for inner in ("aot_eager", "inductor")
    ],
)
def test_roles_and_decisions_do_not_depend_on_spelling_names_or_inner_compiler(names, spelling, inner):
    torch._dynamo.reset()
    model = Model(SPELLINGS[spelling], NAMES[names])
    with torch.inference_mode():
        torch.compile(model, backend="tpfuse", options={"tpfuse.inner": inner})(torch.randn(1, 5, H))
    sites = tpfuse.reports()[-1].sites
    assert [(s.fused, s.role, s.layer) for s in sites] == [
        (True, role, layer) for layer in range(LAYERS) for role in ("attention", "mlp")
    ]


def test_a_head_that_is_cut_by_rows_is_no_embedding():
    """DeepSpeed's ``LmHeadLinearAllreduce``: only the residual comes from the embedding."""

    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(16, H), nn.Linear(H // 2, 16, bias=False)
            self.eval().requires_grad_(False)

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.a(tokens)
            return self.b((h + functional(h))[..., : H // 2])

    torch._dynamo.reset()
    model = Headed()
    run = torch.compile(
        lambda tokens: F.rms_norm(in_place(model(tokens)), (16,)),
        backend="tpfuse",
        options={"tpfuse.inner": "aot_eager"},
    )
    with torch.inference_mode():
        run(torch.arange(5)[None])
    assert [s.role for s in tpfuse.reports()[-1].sites] == ["embedding", "other"]
