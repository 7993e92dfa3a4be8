"""A report says when every rank attends with all heads, as under transformers' plan for OLMo 2, and what to do."""

import graphs
import models
import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import nn

import tpfuse
from tpfuse import hf


class Gathered(nn.Linear):
    def forward(self, x):
        c10d, name = torch.ops._c10d_functional, dist.group.WORLD.group_name
        mine = super().forward(x).contiguous()
        return torch.cat(c10d.wait_tensor(c10d.all_gather_into_tensor(mine, 2, name)).chunk(2), -1)


class Attention(nn.Module):
    def __init__(self, projection):
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = projection(8, 4), projection(8, 4), nn.Linear(8, 8)

    def forward(self, x):
        return graphs.all_reduce(self.o_proj(torch.cat([self.q_proj(x), self.k_proj(x)], -1)[..., :8]))


class Model(nn.Module):
    def __init__(self, projection):
        super().__init__()
        self.self_attn, self.norm = Attention(projection), nn.RMSNorm(8, eps=1e-6)

    def forward(self, x):
        return self.norm(x + self.self_attn(x))


@torch.no_grad()
@pytest.mark.parametrize("projection", [Gathered, nn.Linear])
def test_gathers_behind_the_projections_of_attention_are_noted(projection):
    graphs.start_fake_group(2)
    try:
        torch._dynamo.reset()
        tpfuse.clear_reports()
        options = {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all"}
        torch.compile(Model(projection), backend="tpfuse", options=options)(torch.randn(3, 8))
        (report,) = tpfuse.reports()
    finally:
        dist.destroy_process_group()
    assert len(report.fused) == 1
    if projection is nn.Linear:
        assert report.notes == []
        return
    (note,) = report.notes
    assert note.startswith("2 all-gathers bring the heads of all ranks together behind projections of attention")
    assert "self_attn.q_proj: every rank attends with all heads" in note and "tpfuse.hf.parallelize" in note
    assert "every rank attends" in str(report)


@torch.no_grad()
def notes(rank, world_size, folder):
    torch._dynamo.reset()
    tpfuse.clear_reports()
    model = models.sharded(folder, world_size)
    hf.localize(model)
    compiled = torch.compile(model, backend="tpfuse", dynamic=False, options={"tpfuse.inner": "aot_eager"})
    compiled(torch.full((1, 5), 3), use_cache=False)
    return [note for report in tpfuse.reports() for note in report.notes]


@pytest.mark.slow
@pytest.mark.ranks
def test_a_model_under_the_plan_of_transformers(tmp_path):
    models.save("olmo2", str(tmp_path), num_hidden_layers=2)
    with RankPool(2, alone=True) as pool:
        ((note,),) = pool.run(notes, str(tmp_path))
    assert note.startswith("6 all-gathers") and "model.layers.0.self_attn.q_proj: every rank attends" in note
