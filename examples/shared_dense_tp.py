"""The dense MLP shares the attention TP group, under attention DP: both reductions of every dense layer fuse.

    python examples/shared_dense_tp.py

Four ranks on the CPU run a tiny DeepSeek-V3 (two dense and two MoE layers, random weights) as (tp, attention DP, CP, dense TP) =
(4, 2, 1, 2). Attention has two replicas, ranks 0-1 and ranks 2-3, with different prompts; the dense MLP is split over the same
two ranks, the experts over all four. It prints the plan, the groups, the report of rank 0 and whether every rank's logits
equal those of one process with the whole model. Needs ``pip install tpfuse[hf]``.
"""

from __future__ import annotations

import copy
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import tpfuse
import tpfuse.hf
from tpfuse.inspect.table import plain
from tpfuse.parallel import GROUP_NAMES, ParallelConfig, check_agreement, layout_of

CONFIG = ParallelConfig(tp_size=4, attn_dp_size=2, attn_cp_size=1, moe_dense_tp_size=2)
SEQUENCES = (1, 2)  # of each attention replica


def tiny_deepseek() -> torch.nn.Module:
    """Random weights, the same in every process."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        first_k_dense_replace=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        initializer_range=0.2,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def print_groups() -> None:
    for name in GROUP_NAMES:
        print(f"  {name:<9}{CONFIG.groups(name)}")
    print(f"  dense MLP shares the attention group: {CONFIG.dense_shares_attention}")


@torch.no_grad()
def run(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    world_size = CONFIG.world_size
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)

    whole = tiny_deepseek()
    model = tpfuse.hf.parallelize(copy.deepcopy(whole), CONFIG)
    compiled = tpfuse.hf.compile(model, options={"tpfuse.inner": "aot_eager"}, fullgraph=True)

    replica = rank // CONFIG.attn_tp_size
    prompt = torch.randint(1, 128, (SEQUENCES[replica], 6), generator=torch.Generator().manual_seed(replica))
    logits, expected = compiled(prompt).logits, whole(prompt).logits

    report = tpfuse.reports()[-1]
    check_agreement([report], layout_of(model).groups.group("attn_tp"))
    if rank == 0:
        print("\nPlan, as rank 0 sees it")
        print(layout_of(model).plan.table(rank=0))
        print("\nGroups")
        print_groups()
        print("\nReport of rank 0")
        print(plain(report))

    equal = torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
    over = ", ".join(str(list(ranks)) for ranks in sorted({site.group for site in report.fused}))
    line = (
        f"  rank {rank}: {len(report.fused)} of {len(report.sites)} all-reduces fused, over {over}; logits "
        f"{'equal' if equal else 'DIFFERENT'}, largest difference {(logits - expected).abs().max().item():.1e}"
    )
    lines: list[str | None] = [None] * world_size
    dist.all_gather_object(lines, line)
    if rank == 0:
        print("\nLogits against one process with the whole model")
        print("\n".join(line for line in lines if line))
    dist.destroy_process_group()
    if not equal:
        sys.exit(1)


if __name__ == "__main__":
    print(f"Starting {CONFIG.world_size} ranks; compiling takes some seconds each", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, args=(f"{folder}/store",), nprocs=CONFIG.world_size)
