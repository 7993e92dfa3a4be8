"""What broke for users of other fusions, from their issue trackers and suites, each case written anew."""

from __future__ import annotations

import random
import time

import graphs
import pytest
import torch
import torch.distributed as dist
from graphs import all_reduce
from ranks import RankPool
from tpfuse.passes import PassOptions

H = 64


@pytest.fixture
def fake_group():
    graphs.start_fake_group(2)
    yield
    dist.destroy_process_group()


def llama(h, w):
    f = h.float()
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


def gemma(h, w):
    f = h.float()
    return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())).to(h.dtype)


def olmo(h, w):
    f = h.float()
    return (w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6))).to(h.dtype)


@pytest.mark.parametrize("norm", [llama, gemma, olmo])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vllm_48324_an_fp32_norm_weight_with_a_16_bit_stream_keeps_dtype_and_bits(norm, dtype, fake_group):
    """github.com/vllm-project/vllm/issues/48324: the fused op read the fp32 weight as bf16, and the model said "!!!!"."""

    def f(x, r, w):
        h = r + all_reduce(x)
        return norm(h, w), h

    args = torch.randn(3, H).to(dtype), torch.randn(3, H).to(dtype), torch.rand(H) + 0.5
    gm = graphs.trace(f, args)
    new, report = graphs.fused_copy(gm, PassOptions(policy="all", verify=True))
    assert [s.fused for s in report.sites] == [True]
    assert graphs.equal(graphs.run(new, *args), f(*args))


@pytest.mark.parametrize("shape", [(H,), (5, H), (2, 5, H), (1, 1, H), (2, 1, 5, H)], ids=str)
def test_vllm_45307_and_49673_activations_of_any_number_of_dimensions(shape, fake_group):
    """github.com/vllm-project/vllm/issues/45307 and 49673: the fusion took the second dimension for the hidden one."""

    def f(x, r, w):
        h = r + all_reduce(x)
        return llama(h, w), h

    args = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16(), torch.rand(H).bfloat16()
    gm = graphs.trace(f, args)
    new, report = graphs.fused_copy(gm, PassOptions(policy="all", verify=True))
    assert [s.fused for s in report.sites] == [True]
    assert graphs.equal(graphs.run(new, *args), f(*args))


# -- TensorRT-LLM, tests/unittest/_torch/multi_gpu/test_ar_residual_norm.py ------------------------------------------


class RowLinear(torch.nn.Module):
    """A linear layer cut along its input, its reduction, the add in either order, and the norm."""

    def __init__(self, rank: int, world_size: int, residual_first: bool) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(5)
        self.weight = torch.nn.Parameter((torch.randn(H, H, generator=g) / 8).chunk(world_size, 1)[rank].bfloat16())
        self.norm = torch.nn.RMSNorm(H, eps=1e-5, dtype=torch.bfloat16)
        self.norm.weight.data = (torch.rand(H, generator=g) + 0.5).bfloat16()
        self.residual_first = residual_first

    def forward(self, x, residual):
        y = torch.nn.functional.linear(x, self.weight)
        dist.all_reduce(y)
        h = residual + y if self.residual_first else y + residual
        return self.norm(h), h


def steps_with_sleeps(rank, world_size, rows, residual_first):
    import tpfuse

    torch._dynamo.reset()
    tpfuse.clear_reports()
    sleep = random.Random(rank * 100 + rows)
    model = RowLinear(rank, world_size, residual_first).requires_grad_(False)
    options = {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all"}
    compiled = torch.compile(model, backend="tpfuse", options=options)
    outputs, equal = [], []
    with torch.inference_mode():
        for step in range(4):
            g = torch.Generator().manual_seed(step)
            x, r = (torch.randn(rows, H, generator=g).bfloat16() for _ in range(2))
            mine = x.chunk(world_size, 1)[rank]
            time.sleep(sleep.random() * 0.05)
            outputs.append([t.float().tolist() for t in compiled(mine, r)])
            time.sleep(sleep.random() * 0.05)
            equal.append(graphs.equal(compiled(mine, r), model(mine, r)))
    return len(tpfuse.reports()[-1].fused), all(equal), outputs


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


@pytest.mark.ranks
@pytest.mark.parametrize("residual_first", [True, False], ids=["residual first", "sum first"])
@pytest.mark.parametrize("rows", [8, 32])
def test_ranks_that_come_late_at_random_get_the_same_numbers_in_both_add_orders(pool, rows, residual_first):
    first, second = pool.run(steps_with_sleeps, rows, residual_first)
    assert first[:2] == second[:2] == (1, True)
    assert first[2] == second[2]
