"""Models under the plan equal one unsharded process: prefill and decode, equal, unequal and empty blocks of rows."""

import copy
from dataclasses import replace

import pytest
import torch
from models import unsharded
from ranks import RankPool

from tpfuse.parallel import (
    Architecture,
    ConfigError,
    PairingError,
    ParallelConfig,
    Projection,
    exchange_rows,
    layout_of,
    parallelize,
    plan,
)

pytestmark = pytest.mark.ranks

LAYERS = {"num_hidden_layers": 4, "initializer_range": 0.2}
MIXED = {**LAYERS, "first_k_dense_replace": 2}  # two dense and two MoE layers
MODELS = {"llama": LAYERS, "qwen3": LAYERS, "glm4_moe": MIXED, "deepseek_v3": MIXED}
TIED = {**LAYERS, "tie_word_embeddings": True}
SIZES = [(4, 1, 1, None), (4, 2, 1, 2), (4, 2, 1, 1), (4, 2, 1, 4), (4, 4, 1, 1)]


def batches(blocks):
    """Sequences of each block: equal, unequal, and none on the first or the last."""
    if blocks == 1:
        return [(2,), (1,)]
    return [(2,) * blocks, tuple(range(1, blocks + 1)), (0,) + (2,) * (blocks - 1), (2,) * (blocks - 1) + (0,)]


@pytest.fixture(scope="module")
def pool():
    with RankPool(4) as pool:
        yield pool


def tokens_of(rank, config, sequences, length, seed):
    block = rank // config.attn_tp_size
    generator = torch.Generator().manual_seed(100 * seed + block)
    return torch.randint(1, 128, (sequences[block], length), generator=generator)


def prefill_and_decode(model, *steps, arguments=lambda tokens: {}):
    """Logits of each step: of a prompt, and of more tokens behind it."""
    logits = []
    cache = None
    for tokens in steps:
        output = model(tokens, cache=cache, use_cache=True, **arguments(tokens))
        cache = output.cache
        logits.append(output.logits)
    return logits


def difference_from(reference, *steps_and_got):
    """Largest difference from the reference relative to its largest logit; 0 for a block without rows."""
    *steps, got = steps_and_got
    assert [tuple(g.shape[:2]) for g in got] == [tuple(tokens.shape) for tokens in steps]
    if steps[0].numel() == 0:
        return 0.0
    expected = prefill_and_decode(reference, *steps)
    return max(((g - e).abs().max() / e.abs().max()).item() for g, e in zip(got, expected, strict=True))


@torch.no_grad()
def eager_differences(rank, world_size, name, changes, sizes, ep_size):
    """Largest difference for each choice of rows, and the shape of what was compared."""
    config = ParallelConfig(*sizes, ep_size=ep_size)
    reference = unsharded(name, **changes)
    model = parallelize(copy.deepcopy(reference), config)
    differences = []
    for seed, sequences in enumerate(batches(config.row_blocks)):
        prompt = tokens_of(rank, config, sequences, 5, seed)
        token = tokens_of(rank, config, sequences, 1, seed + 50)
        differences.append(difference_from(reference, prompt, token, prefill_and_decode(model, prompt, token)))
    return differences


# Every layout with a dense model and with attention and experts of its own; the others share their code.
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param(name, sizes, marks=[] if name in ("llama", "deepseek_v3") or n == 1 else pytest.mark.slow)
        for name in MODELS
        for n, sizes in enumerate(SIZES)
    ],
    ids=str,
)
def test_logits_equal_one_unsharded_process(pool, name, sizes):
    for differences in pool.run(eager_differences, name, MODELS[name], sizes, 1):
        assert max(differences) < 1e-5, differences


@pytest.mark.parametrize(
    ("sizes", "ep_size"),
    [
        *(((4, 1, 1, None), 2), ((4, 2, 1, 2), 4), ((4, 4, 1, 1), 2)),
        *(
            pytest.param(sizes, ep_size, marks=pytest.mark.slow)
            for sizes, ep_size in (((4, 1, 1, None), 4), ((4, 2, 1, 2), 2), ((4, 4, 1, 1), 4))
        ),
    ],
    ids=str,
)
def test_experts_split_whole_and_in_width(pool, sizes, ep_size):
    for differences in pool.run(eager_differences, "deepseek_v3", MIXED, sizes, ep_size):
        assert max(differences) < 1e-5, differences


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *(("gemma2", sizes) for sizes in ((4, 2, 1, 2), (4, 2, 1, 1), (4, 2, 1, 4))),
        ("gemma3_text", (4, 2, 1, 4)),
        *(pytest.param("gemma3_text", sizes, marks=pytest.mark.slow) for sizes in ((4, 2, 1, 2), (4, 2, 1, 1))),
    ],
    ids=str,
)
def test_norms_after_a_sublayer_see_its_whole_sum(pool, name, sizes):
    for differences in pool.run(eager_differences, name, TIED, sizes, 1):
        assert max(differences) < 1e-5, differences


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3_moe", "mixtral"])
def test_further_models_with_the_same_names(pool, name):
    for differences in pool.run(eager_differences, name, LAYERS, (4, 2, 1, 2), 1):
        assert max(differences) < 1e-5, differences


def test_biases_are_added_once(pool):
    changes = {**LAYERS, "attention_bias": True, "mlp_bias": True}
    for differences in pool.run(biased_difference, changes):
        assert max(differences) < 1e-5, differences


@torch.no_grad()
def biased_difference(rank, world_size, changes):
    config = ParallelConfig(4, 2, 1, 2)
    reference = unsharded("llama", **changes)
    generator = torch.Generator().manual_seed(3)
    for name, value in reference.named_parameters():
        if name.endswith("bias"):
            value.copy_(torch.rand(value.shape, generator=generator))
    model = parallelize(copy.deepcopy(reference), config)
    prompt = tokens_of(rank, config, (2, 2), 5, 0)
    token = tokens_of(rank, config, (2, 2), 1, 1)
    return [difference_from(reference, prompt, token, prefill_and_decode(model, prompt, token))]


def sizes_of_weights(rank, world_size, sizes, ep_size):
    model = parallelize(unsharded("deepseek_v3", **MIXED), ParallelConfig(*sizes, ep_size=ep_size))
    dense, moe = model.model.layers[0], model.model.layers[2]
    return {
        "q_b_proj": tuple(dense.self_attn.q_b_proj.weight.shape),
        "kv_b_proj": tuple(dense.self_attn.kv_b_proj.weight.shape),
        "o_proj": tuple(dense.self_attn.o_proj.weight.shape),
        "down_proj": tuple(dense.mlp.down_proj.weight.shape),
        "experts": tuple(moe.mlp.experts.down_proj.shape),
        "shared": tuple(moe.mlp.shared_experts.down_proj.weight.shape),
        "bytes": dense.mlp.down_proj.weight.untyped_storage().nbytes(),
    }


def test_deepseek_attention_and_experts_are_cut(pool):
    for shapes in pool.run(sizes_of_weights, (4, 2, 1, 2), 2):
        assert shapes == {
            "q_b_proj": (2 * 24, 32),
            "kv_b_proj": (2 * 32, 32),
            "o_proj": (64, 2 * 16),
            "down_proj": (64, 64),
            "experts": (2, 64, 16),
            "shared": (64, 8),
            "bytes": 64 * 64 * 4,
        }


def changed(boundaries, change):
    """The plan with the steps of each boundary after the first layer's attention changed."""
    return replace(
        boundaries,
        boundaries=tuple(replace(b, steps=change(b.steps)) if b.layer > 0 else b for b in boundaries.boundaries),
    )


def mismatches(rank, world_size):
    """An MLP cut over the pair but reduced over all ranks; one that nobody reduces; a reduction of whole weights."""
    config = ParallelConfig(4, 2, 1, 2)
    right = plan(config, ["dense"] * 4)
    over_all = changed(
        right, lambda steps: tuple(replace(s, group="tp") if s.group == "dense_tp" else s for s in steps)
    )
    nowhere = changed(right, lambda steps: tuple(s for s in steps if s.group != "dense_tp"))
    no_names = Architecture(mlp_rows=(Projection("out_proj"),), mlp_columns=())
    messages = []
    for chosen, names in ((over_all, None), (nowhere, None), (right, no_names)):
        with pytest.raises(PairingError) as raised:
            parallelize(unsharded("llama", **LAYERS), config, plan=chosen, architecture=names)
        messages.append(str(raised.value))
    with pytest.raises(ConfigError) as raised:
        parallelize(unsharded("llama", **LAYERS), config, plan=plan(ParallelConfig(4, 2, 1, 4), ["dense"] * 4))
    return [*messages, str(raised.value)]


def test_a_weight_cut_over_other_ranks_than_it_is_reduced_over_is_refused(pool):
    for rank, (other, missing, whole, foreign) in enumerate(pool.run(mismatches)):
        pair = [0, 1] if rank < 2 else [2, 3]
        assert other.startswith(
            f"layer 0: mlp.gate_proj.weight is cut over dense_tp {pair}, but the mlp is reduced over [0, 1, 2, 3]: rows of "
            "different replicas would be summed"
        )
        assert f"is cut over dense_tp {pair}, but the mlp is not reduced" in missing
        assert f"layer 0: the mlp is reduced over {pair}, but none of its weights is cut" in whole
        assert (
            "the plan is for ParallelConfig(tp_size=4, attn_dp_size=2, attn_cp_size=1, moe_dense_tp_size=4" in foreign
        )


def refusals(rank, world_size):
    model = unsharded("llama")
    model.config.model_type = "of_my_own"
    cases = {
        "architecture": (model, ParallelConfig(4), {}),
        "parallel block": (unsharded("gpt_neox"), ParallelConfig(4), {}),
        "heads": (
            unsharded("llama", num_attention_heads=6, num_key_value_heads=6, hidden_size=48),
            ParallelConfig(4),
            {},
        ),
        "layers": (unsharded("llama"), ParallelConfig(4), {"architecture": Architecture(layers="decoder.blocks")}),
        "cp": (unsharded("llama"), ParallelConfig(4, 1, 2), {}),
        "pp": (unsharded("llama"), ParallelConfig(2, pp_size=2), {}),
    }
    messages = {}
    for name, (case, config, arguments) in cases.items():
        with pytest.raises(ConfigError) as raised:
            parallelize(case, config, **arguments)
        messages[name] = str(raised.value)
    twice = parallelize(unsharded("llama"), ParallelConfig(4))
    with pytest.raises(ConfigError) as raised:
        parallelize(twice, ParallelConfig(4))
    messages["twice"] = str(raised.value)
    return messages


def test_what_cannot_be_sharded_says_what_to_provide(pool):
    messages = pool.run(refusals)[0]
    assert (
        "no architecture is known for LlamaForCausalLM (model_type='of_my_own'); known are apertus"
        in messages["architecture"]
    )
    assert "pass architecture=tpfuse.parallel.Architecture(...)" in messages["architecture"]
    assert (
        "GPTNeoXForCausalLM (model_type='gpt_neox') cannot be parallelized: attention and MLP read one norm"
        in messages["parallel block"]
    )
    assert (
        "layer 0: self_attn.q_proj.weight has 6 heads, which do not split over the 4 ranks of attn_tp"
        in messages["heads"]
    )
    assert "has no 'decoder.blocks'; give the path of its decoder layers" in messages["layers"]
    assert "parallelize does not support attn_cp_size=2" in messages["cp"]
    assert "parallelize does not support pp_size=2" in messages["pp"]
    assert "is parallelized already" in messages["twice"]


def test_a_model_that_is_not_parallelized_has_no_layout():
    with pytest.raises(ConfigError, match="Linear is not parallelized"):
        layout_of(torch.nn.Linear(1, 1))


# -- compiled -------------------------------------------------------------------------------------------------------
# A rank takes seconds to compile a layer twice, for prefill and for decode. What has four layers is marked slow.


def with_layers(name, depth):
    """A model of ``depth`` layers; where it has experts, the first half of them is dense."""
    return {
        **MODELS[name],
        "num_hidden_layers": depth,
        **({"first_k_dense_replace": depth // 2} if mixed(name) else {}),
    }


def mixed(name):
    return "first_k_dense_replace" in MODELS[name]


@torch.no_grad()
def compiled_outcome(rank, world_size, name, sizes, sequences, depth=2, decode=True):
    """Difference from the unsharded model, the reports, and the all-reduces of the plan. ``decode``: a step behind the prompt."""
    import tpfuse

    torch._dynamo.reset()
    tpfuse.clear_reports()
    config = ParallelConfig(*sizes)
    reference = unsharded(name, **with_layers(name, depth))
    model = parallelize(copy.deepcopy(reference), config)
    steps = [tokens_of(rank, config, sequences, *of) for of in ((5, 0), (1, 1))][: 1 + decode]
    # fullgraph: a graph break is an error.
    compiled = torch.compile(model, backend="tpfuse", options={"tpfuse.inner": "aot_eager"}, fullgraph=True)
    got = prefill_and_decode(
        compiled, *steps, arguments=lambda tokens: {"largest_block": exchange_rows(model, tokens.numel())}
    )
    groups = layout_of(model).groups
    planned = [(r.layer, r.role, groups.ranks_of(r.group), r.fuses) for r in layout_of(model).plan.reductions()]
    return difference_from(reference, *steps, got), tpfuse.reports(), planned


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("llama", 1),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("llama", "deepseek_v3")),
        *(pytest.param(name, 4, marks=pytest.mark.slow) for name in MODELS),
    ],
)
def test_with_the_shared_group_every_dense_layer_fuses_both_reductions(pool, name, depth):
    decode = depth > 1  # of one layer, test_hf_generate_ranks.py has decode steps
    outcomes = pool.run(compiled_outcome, name, (4, 2, 1, 2), (1, 2), depth, decode)
    for rank, (difference, reports, planned) in enumerate(outcomes):
        pair = (0, 1) if rank < 2 else (2, 3)
        assert difference < 1e-5
        assert len(reports) == 1 + decode  # prefill and decode, one graph each
        for report in reports:
            seen = [(site.layer, site.role, site.group, site.fused) for site in report.sites]
            assert seen == [(None, "embedding", pair, True), *planned]
            dense = depth // 2 if mixed(name) else depth
            fused = {(site.layer, site.role) for site in report.sites if site.fused and site.group == pair}
            assert {(layer, role) for layer in range(dense) for role in ("attention", "mlp")} <= fused
            # The sum after the experts gives each replica its rows back.
            assert [audit.shared for audit in report.layers] == [True] * depth


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        pytest.param(
            "deepseek_v3", 2, marks=pytest.mark.slow
        ),  # the quick run has this boundary in test_rows_models.py
        *(pytest.param(name, 4, marks=pytest.mark.slow) for name in ("llama", "deepseek_v3")),
    ],
)
def test_an_mlp_over_all_ranks_gives_each_replica_its_rows(pool, name, depth):
    for rank, (difference, reports, planned) in enumerate(
        pool.run(compiled_outcome, name, (4, 2, 1, 4), (2, 1), depth)
    ):
        pair = (0, 1) if rank < 2 else (2, 3)
        assert difference < 1e-5
        for report in reports:
            seen = [(site.layer, site.role, site.group, site.fused) for site in report.sites]
            assert seen == [(None, "embedding", pair, True), *planned]
            assert all(site.fused for site in report.sites)
            assert [(a.attention, a.mlp, a.shared) for a in report.layers] == [(pair, pair, True)] * depth
            assert {site.pattern for site in report.sites if site.role == "mlp"} == {"all_reduce+rows/2+add+rms_norm"}


@pytest.mark.parametrize(
    ("sizes", "depth"),
    [
        ((4, 2, 1, 1), 2),
        *((sizes, 4) for sizes in ((4, 1, 1, None), (4, 2, 1, 1), (4, 4, 1, 1))),
    ],
    ids=str,
)
@pytest.mark.slow
def test_other_layouts_compile_to_one_graph_and_show_what_the_plan_says(pool, sizes, depth):
    blocks = sizes[1]
    for rank, (difference, reports, planned) in enumerate(
        pool.run(compiled_outcome, "deepseek_v3", sizes, tuple(range(1, blocks + 1)), depth)
    ):
        assert difference < 1e-5
        group = tuple(ParallelConfig(*sizes).group_of("attn_tp", rank))
        embedding = [(None, "embedding", group)] if len(group) > 1 else []
        for report in reports:
            seen = [(site.layer, site.role, site.group) for site in report.sites]
            assert seen == embedding + [p[:3] for p in planned]
            assert all(site.fused for site in report.sites)


@pytest.mark.slow
@pytest.mark.parametrize("sequences", [(0, 2), (2, 0)], ids=str)
def test_a_replica_without_rows_compiles_too(pool, sequences):
    for difference, _, _ in pool.run(compiled_outcome, "deepseek_v3", (4, 2, 1, 2), sequences):
        assert difference < 1e-5


@torch.no_grad()
def unannounced_rows(rank, world_size):
    torch._dynamo.reset()
    model = parallelize(unsharded("llama", **LAYERS), ParallelConfig(4, 2, 1, 4))
    compiled = torch.compile(model, backend="aot_eager")
    messages = []
    for arguments in ({}, {"largest_block": 5}):
        with pytest.raises(ConfigError) as raised:
            compiled(torch.ones(1, 7, dtype=torch.long), **arguments)
        messages.append(str(raised.value))
    return messages


def test_rows_that_the_blocks_did_not_agree_on_are_named(pool):
    for missing, too_small in pool.run(unannounced_rows):
        assert "call it with largest_block=tpfuse.parallel.exchange_rows(model, rows)" in missing
        assert "this forward has 1 * 7 rows, more than largest_block=5" in too_small
