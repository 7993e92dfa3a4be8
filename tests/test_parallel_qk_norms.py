"""Norms of q and k over all heads, where a rank holds some of them: models equal one unsharded process, in one collective a layer."""

import copy

import pytest
import torch
from models import known, unsharded
from ranks import RankPool
from test_parallel_models import LAYERS, difference_from, prefill_and_decode, tokens_of

import tpfuse
from tpfuse.parallel import Architecture, ConfigError, ParallelConfig, Projection, layout_of, parallelize

pytestmark = pytest.mark.ranks

POST_NORM = ["olmo2", "olmo3", "flex_olmo"]
WIDE = [*POST_NORM, "minimax_m2", "olmoe"]
MODES = ["gather", "reduce"]


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


@torch.no_grad()
def differences(rank, world_size, cases):
    """Largest difference of prefill and decode from the unsharded model, for each (model, changes, mode)."""
    config = ParallelConfig(world_size)
    found = []
    for name, changes, mode in cases:
        reference = unsharded(name, **LAYERS, **changes)
        model = parallelize(copy.deepcopy(reference), config, qk_norm=mode)
        assert layout_of(model).qk_norm == mode
        prompt, token = tokens_of(rank, config, (2,), 5, 0), tokens_of(rank, config, (2,), 1, 1)
        found.append(difference_from(reference, prompt, token, prefill_and_decode(model, prompt, token)))
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kv_heads", [2, 1])  # one: both ranks hold the same
def test_logits_equal_one_unsharded_process(pool, mode, kv_heads):
    cases = [(name, {"num_key_value_heads": kv_heads}, mode) for name in WIDE if known(name)]
    for found in pool.run(differences, cases):
        assert max(found) < 1e-5, dict(zip(WIDE, found, strict=True))
