"""Whole models whose reductions give each rank some rows: fused equals unfused, bit for bit, on four gloo ranks.

Replicas with equal and unequal rows and with none; prefill and a decode step behind it.
"""

from __future__ import annotations

import copy

import pytest
import torch
from models import unsharded
from ranks import RankPool
from test_parallel_models import prefill_and_decode, tokens_of

from tpfuse.parallel import Op, ParallelConfig, layout_of

pytestmark = pytest.mark.ranks
slow = pytest.mark.slow

MIXED = {"num_hidden_layers": 2, "initializer_range": 0.2, "first_k_dense_replace": 1}  # a dense layer, then experts
MODELS = {"deepseek_v3": MIXED, "glm4_moe": MIXED, "qwen3_moe": {"num_hidden_layers": 2, "initializer_range": 0.2}}
OF_LAYER_NORMS = {"starcoder2": {"num_hidden_layers": 2, "initializer_range": 0.2}}
# tp, dp, cp, k; sequences of each replica
QUICK = [((4, 2, 1, 2), (0, 2)), ((4, 2, 1, 1), (1, 2)), ((4, 4, 1, 1), (2, 0, 1, 2))]
ROWS = {2: [(2, 2), (1, 2), (2, 0)], 4: [(1, 1, 1, 1), (0, 1, 2, 3)]}


@pytest.fixture(scope="module")
def pool():
    with RankPool(4) as pool:
        yield pool


@torch.no_grad()
def both_ways(rank, world_size, name, sizes, dtype, choices, decode):
    """For each choice of rows, whether logits are equal with fusion and without; and what was fused, in both.

    Without ``decode`` the model in eager mode stands for the compiled one without fusion, and counts nothing.
    """
    import tpfuse.hf

    config = ParallelConfig(*sizes)
    model = tpfuse.hf.parallelize(copy.deepcopy(unsharded(name, **(MODELS | OF_LAYER_NORMS)[name])).to(dtype), config)
    results, fused = [], []
    for policy in ("off", "shared") if decode else (None, "shared"):
        torch._dynamo.reset()
        tpfuse.clear_reports()
        options = {"tpfuse.inner": "aot_eager", "tpfuse.policy": policy}
        compiled = model
        if policy is not None:
            compiled = tpfuse.hf.compile(
                model, options=options, fullgraph=True
            )  # the replicas exchange their row counts
        logits = []
        for seed, sequences in enumerate(choices):
            prompt, token = (tokens_of(rank, config, sequences, n, more + seed)[:, :n] for n, more in ((5, 0), (1, 50)))
            if decode:
                logits += prefill_and_decode(compiled, prompt, token)
            else:
                logits.append(compiled(prompt, use_cache=False).logits)
        results.append(logits)
        counts = [sum(site.pattern.endswith("all_gather") for site in r.sites) for r in tpfuse.reports()]
        fused.append([(len(r.fused), len(r.sites), n) for r, n in zip(tpfuse.reports(), counts, strict=True)])
    planned = sum(r.fuses for r in layout_of(model).plan.reductions())
    same = [torch.equal(a, b) and a.dtype == dtype for a, b in zip(*results, strict=True)]
    boundaries = layout_of(model).plan.boundaries
    gathers = sum(b.reduction is not None and any(s.op is Op.GATHER_BLOCKS for s in b.after_norm) for b in boundaries)
    return same, fused, (planned, gathers), [tuple(t.shape[:2]) for t in results[0]]


def _right(outcomes, embedding, choices, lengths):
    for rank, (same, (unfused, fused), (planned, gathers), shapes) in enumerate(outcomes):
        assert all(same), f"rank {rank}: {same}"
        replica = rank * len(choices[0]) // 4
        # A replica without rows skips what only it would sum, if nothing is gathered behind it; graphs are in the order of the
        # choices of rows.
        wanted = planned + embedding if choices[0][replica] else 1 + gathers
        assert not unfused or (unfused[0][0] == 0 and unfused[0][1] >= wanted)
        assert fused[0][0] == fused[0][1] >= wanted and all(n == sites for n, sites, _ in fused), (fused, planned)
        # The rows of all replicas come out of the op behind attention, whatever the number of this one's rows.
        assert all(n == gathers for _, _, n in fused) and not any(n for _, _, n in unfused), (fused, gathers)
        assert shapes == [(sequences[replica], n) for sequences in choices for n in lengths]


@pytest.mark.parametrize(
    ("sizes", "sequences"), [QUICK[0], *(pytest.param(*case, marks=slow) for case in QUICK[1:])], ids=str
)
def test_logits_are_the_bits_of_the_unfused_model(pool, sizes, sequences):
    outcomes = pool.run(both_ways, "deepseek_v3", sizes, torch.bfloat16, [sequences], False)
    _right(outcomes, int(sizes[1] < 4), [sequences], (5,))


@slow
@pytest.mark.parametrize(("sizes", "sequences"), [((4, 2, 1, 4), (1, 2)), QUICK[1]], ids=str)
def test_a_dense_model_with_layer_norms_has_the_bits_of_the_unfused_model(pool, sizes, sequences):
    """Its MLP over all ranks, from whose sum each replica takes its rows, or over none, in front of which rows are scattered."""
    outcomes = pool.run(both_ways, "starcoder2", sizes, torch.bfloat16, [sequences], False)
    _right(outcomes, 1, [sequences], (5,))


@slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [sizes for sizes, _ in QUICK], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_decode_are_the_bits_of_the_unfused_model(pool, name, sizes, dtype):
    choices = ROWS[sizes[1]]
    outcomes = pool.run(both_ways, name, sizes, dtype, choices, True)
    _right(outcomes, int(sizes[1] < 4), choices, (5, 1))
