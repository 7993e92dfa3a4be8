"""Architectures that parallelize knows by name: each equals one process, with biases, packed projections and scaled residuals."""

import copy

import models
import pytest
import torch
from models import DEEPSEEK, GEMMA_HEADS, LATENT, TinyModel, known, unsharded
from ranks import RankPool
from test_parallel_models import LAYERS, difference_from, prefill_and_decode, tokens_of

import tpfuse
from tpfuse.parallel import ARCHITECTURES, ConfigError, ParallelConfig, architecture_of, layout_of, parallelize
from tpfuse.parallel.architecture import UNFIT
from tpfuse.parallel.heads import OwnHeads

pytestmark = pytest.mark.ranks

HEADS = {"head_dim": 16}
# Of architectures that other tests do not run.
EXTRA = {
    "apertus": {},
    "arcee": {"mlp_bias": True},
    "cwm": HEADS,
    "deepseek_v2": {**DEEPSEEK, **LATENT},
    "dots1": {**DEEPSEEK, **HEADS},
    "ernie4_5": {**HEADS, "use_bias": True},
    "exaone4": {**HEADS, "sliding_window": 32},
    "glm": HEADS,
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "ministral": {**HEADS, "sliding_window": 32},
    "ministral3": HEADS,
    "seed_oss": HEADS,
    "smollm3": {},
    "vaultgemma": GEMMA_HEADS,
}
TIED = ("gemma", "vaultgemma")
QUICK = ("granite", "phi3", "exaone4", "glm4", "starcoder2", "qwen2_moe")
# tests/test_parallel_models.py and tests/test_parallel_qk_norms.py have the others.
MORE = sorted({*EXTRA, *QUICK, "ernie4_5_moe", "gemma", "hy_v3", "jais2", "nemotron", "olmo"})


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


def tiny(name, dtype=torch.float32, **changes):
    """A model with random weights, biases included."""
    if name in EXTRA:
        models.PATTERNS.setdefault(name, TinyModel(name, EXTRA[name]))
    tied = {"tie_word_embeddings": True} if name in TIED else {}
    model = unsharded(name, dtype, **{**LAYERS, "num_hidden_layers": 2, **tied, **changes})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("bias"):
                value.copy_(torch.rand(value.shape, generator=generator))
    return model


@torch.no_grad()
def differences(rank, world_size, names, changes):
    config = ParallelConfig(world_size)
    found = {}
    for name in names:
        reference = tiny(name, **changes)
        model = parallelize(copy.deepcopy(reference), config)
        prompt, token = tokens_of(rank, config, (2,), 5, 0), tokens_of(rank, config, (2,), 1, 1)
        found[name] = difference_from(reference, prompt, token, prefill_and_decode(model, prompt, token))
    return found


def test_logits_equal_one_unsharded_process(pool):
    for found in pool.run(differences, [name for name in QUICK if known(name)], {}):
        assert max(found.values()) < 2e-6, found


@pytest.mark.slow
def test_logits_of_all_architectures_equal_one_unsharded_process(pool):
    for found in pool.run(differences, [name for name in MORE if known(name)], {}):
        assert max(found.values()) < 2e-6, found


def test_packed_projections_where_both_ranks_hold_one_key_head(pool):
    for found in pool.run(differences, ["phi3"], {"num_key_value_heads": 1}):
        assert max(found.values()) < 2e-6, found


@torch.no_grad()
def compiled(rank, world_size, name):
    """Whether a prefill and a step keep their bits, and what was found and fused."""
    torch._dynamo.reset()
    tpfuse.clear_reports()
    config = ParallelConfig(world_size)
    model = parallelize(tiny(name, torch.bfloat16), config)
    prompt, token = tokens_of(rank, config, (2,), 5, 0), tokens_of(rank, config, (2,), 1, 1)
    expected = prefill_and_decode(model, prompt, token)
    fused = torch.compile(model, backend="tpfuse", options={"tpfuse.inner": "aot_eager"}, fullgraph=True)
    got = prefill_and_decode(fused, prompt, token)
    equal = all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    return equal, [(len(report.sites), len(report.fused)) for report in tpfuse.reports()]


COUNTS = {
    "exaone4": (5, 4),  # no norm before the first attention
    "glm4": (5, 5),
    "granite": (5, 5),
    "phi3": (5, 5),
    "qwen2_moe": (5, 5),
    "starcoder2": (5, 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_every_layer_fuses_both_reductions_and_keeps_its_bits(pool, name):
    if not known(name):
        pytest.skip(f"this transformers has no {name}")
    assert pool.run(compiled, name) == [(True, [COUNTS[name]] * 2)] * 2


def test_the_parts_of_a_packed_projection_are_cut_one_by_one(as_rank):
    as_rank(1, 2)
    whole = tiny("phi3", num_key_value_heads=2)
    packed = whole.model.layers[0].self_attn.qkv_proj.weight.detach().clone()
    gate_up = whole.model.layers[0].mlp.gate_up_proj.weight.detach().clone()
    layer = parallelize(whole, ParallelConfig(2)).model.layers[0]
    q, k, v = packed.split([64, 32, 32])  # four heads and two of keys and values, of 16 columns
    assert torch.equal(layer.self_attn.qkv_proj.weight, torch.cat([q[32:], k[16:], v[16:]]))
    assert torch.equal(layer.mlp.gate_up_proj.weight, torch.cat([gate_up[64:128], gate_up[192:]]))
    assert layer.self_attn.qkv_proj.out_features == 64
    own, config = layer.self_attn.config, whole.config
    assert (own.num_attention_heads, own.num_key_value_heads) == (2, 1)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    config._attn_implementation = "eager"
    assert own._attn_implementation == "eager"  # what is changed later counts as well
    assert copy.deepcopy(own).hidden_size == 64


def test_a_width_that_its_parts_do_not_make_up_is_named(as_rank):
    as_rank(0, 2)
    model = tiny("phi3")
    model.model.layers[1].self_attn.qkv_proj = torch.nn.Linear(64, 130, bias=False)
    with pytest.raises(
        ConfigError, match=r"layer 1: self_attn.qkv_proj.weight has a width of 130, which is not made of heads"
    ):
        parallelize(model, ParallelConfig(2))


@pytest.mark.parametrize("name", sorted(UNFIT))
def test_what_does_not_fit_says_why(name):
    assert name not in ARCHITECTURES
    model = torch.nn.Module()
    model.config = OwnHeads(type("Config", (), {"model_type": name})(), 1, 1)
    with pytest.raises(ConfigError) as raised:
        architecture_of(model)
    assert UNFIT[name] in str(raised.value) and "transformers' own tensor parallelism" in str(raised.value)


def test_every_name_is_run_by_some_test():
    from test_parallel_models import MODELS as others
    from test_parallel_qk_norms import WIDE

    further = {"gemma2", "gemma3_text", "mistral", "qwen2", "qwen3_moe", "mixtral"}
    assert set(ARCHITECTURES) == {*MORE, *others, *WIDE, *further}


def test_a_model_says_nothing_of_norms_over_all_heads_without_them(as_rank):
    as_rank(0, 2)
    assert layout_of(parallelize(tiny("exaone4"), ParallelConfig(2))).qk_norm == ""
