"""Norms of q and k over all heads, where a rank has some heads: models equal one process, with one collective a layer."""

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


@pytest.fixture(scope="module")
def alone():
    """One rank, whose sums are its own."""
    with RankPool(2, alone=True) as pool:
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


# -- compiled -------------------------------------------------------------------------------------------------------

TWO = {**LAYERS, "num_hidden_layers": 2}


@torch.no_grad()
def compiled(rank, world_size, name, mode, inner="aot_eager"):
    """Whether a prefill and a decode step equal the model in eager mode bit for bit, and the reports."""
    torch._dynamo.reset()
    tpfuse.clear_reports()
    config = ParallelConfig(world_size)
    model = parallelize(unsharded(name, torch.bfloat16, **TWO), config, qk_norm=mode)
    prompt, token = tokens_of(rank, config, (2,), 5, 0), tokens_of(rank, config, (2,), 1, 1)
    expected = prefill_and_decode(model, prompt, token)
    fused = torch.compile(model, backend="tpfuse", options={"tpfuse.inner": inner}, fullgraph=True)
    got = prefill_and_decode(fused, prompt, token)
    return [torch.equal(g, e) for g, e in zip(got, expected, strict=True)], tpfuse.reports()


@pytest.mark.parametrize("mode", MODES)
def test_both_reductions_of_every_layer_fuse_and_keep_their_bits_on_one_rank(alone, mode):
    check_outcomes(alone.run(compiled, "olmo2", mode), "olmo2", mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WIDE)
def test_both_reductions_of_every_layer_fuse_and_keep_their_bits(pool, name, mode):
    if not known(name):
        pytest.skip(f"this transformers has no {name}")
    check_outcomes(pool.run(compiled, name, mode), name, mode)


def check_outcomes(outcomes, name, mode):
    for equal, reports in outcomes:
        assert equal == [True, True]
        assert len(reports) == 2  # prefill and decode
        for report in reports:
            check_sites(report, name, mode)


def check_sites(report, name, mode):
    """Four sums of rows in two layers, and in each layer one gather of q and k or one sum of squares."""
    others = [site for site in report.sites if site.role == "other"]
    assert [(s.layer, s.reason, s.shape[-1]) for s in others] == [(n, "norm-statistics", 2) for n in range(2)] * (
        mode == "reduce"
    )
    assert report.all_gathers == 1 + 2 * (mode == "gather")  # one is that of the logits
    embedding, *rest = (site for site in report.sites if site not in others)
    # Without a norm before the first attention, the embedding's sum has nothing to fuse with.
    post = name in POST_NORM
    assert (embedding.role, embedding.fused, embedding.reason) == (
        "embedding",
        not post,
        "extra-reader" if post else None,
    )
    pattern = "all_reduce+rms_norm+add" if post else "all_reduce+add+rms_norm"
    seen = [(site.layer, site.role, site.pattern) for site in rest if site.fused]
    assert seen == [(layer, role, pattern) for layer in range(2) for role in ("attention", "mlp")]
    assert [audit.shared for audit in report.layers] == [True, True]


@pytest.mark.slow
def test_under_inductor_the_sums_of_squares_are_known_as_well(pool):
    for _, reports in pool.run(compiled, "olmo2", "reduce", "inductor"):
        for report in reports:
            check_sites(report, "olmo2", "reduce")


def generated(rank, world_size, name, mode):
    """Whether the tokens are those of one process."""
    from tpfuse import hf

    torch._dynamo.reset()
    whole = unsharded(name, **{**LAYERS, "num_hidden_layers": 1})
    how = {"max_new_tokens": 6, "pad_token_id": 0, "cache_implementation": "static", "do_sample": False}
    prompt = torch.tensor([[3, 4, 5, 6]])
    expected = whole.generate(prompt, disable_compile=True, **how).tolist()
    model = hf.compile(
        hf.parallelize(whole, ParallelConfig(world_size), qk_norm=mode), options={"tpfuse.inner": "aot_eager"}
    )
    return model.generate(prompt, **how).tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("olmo2", "gather"), *((name, "reduce") for name in WIDE)])
def test_generate_gives_the_tokens_of_one_process(pool, name, mode):
    if not known(name):
        pytest.skip(f"this transformers has no {name}")
    assert pool.run(generated, name, mode) == [True, True]


# -- attention data parallelism -------------------------------------------------------------------------------------


@torch.no_grad()
def replicas(rank, world_size, name, mode, sizes):
    """Difference from one process where each replica has rows of its own."""
    config = ParallelConfig(*sizes)
    reference = unsharded(name, **LAYERS)
    model = parallelize(copy.deepcopy(reference), config, qk_norm=mode)
    found = []
    for sequences in ((1, 2), (0, 2)):
        prompt, token = tokens_of(rank, config, sequences, 5, 0), tokens_of(rank, config, sequences, 1, 1)
        found.append(difference_from(reference, prompt, token, prefill_and_decode(model, prompt, token)))
    return found


@pytest.mark.slow
def test_replicas_norm_over_the_heads_of_their_own_ranks():
    with RankPool(4) as four:
        for name in WIDE:
            for mode in MODES:
                for sizes in ((4, 2, 1, 2), (4, 2, 1, 1), (4, 2, 1, 4)):
                    for found in four.run(replicas, name, mode, sizes):
                        assert max(found) < 1e-5, (name, mode, sizes, found)


# -- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, *MODES])
def test_each_rank_reads_its_heads_and_their_part_of_the_norms(mode, tmp_path, as_rank):
    """Also where all groups are one: transformers' own tensor parallelism would leave all heads on each rank."""
    import transformers

    from tpfuse import hf

    unsharded("olmo2", torch.bfloat16, **TWO).save_pretrained(tmp_path)
    config = ParallelConfig(2)
    given = {} if mode is None else {"qk_norm": mode}
    for rank in range(2):
        as_rank(rank, 2)
        whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        model = hf.from_pretrained(tmp_path, config, progress=False, **given)
        assert layout_of(model).qk_norm == (mode or "gather")
        wanted = dict(parallelize(whole, config, **given).named_parameters())
        got = dict(model.named_parameters())
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], value) for key, value in wanted.items())
        attention = model.model.layers[0].self_attn
        assert attention.q_norm.weight.shape == ((32,) if mode == "reduce" else (64,))
        assert (attention.q_proj.weight.shape, attention.k_proj.weight.shape) == ((32, 64), (16, 64))


# -- what cannot be done --------------------------------------------------------------------------------------------


def refused(model, **arguments):
    with pytest.raises(ConfigError) as raised:
        parallelize(model, ParallelConfig(2), **arguments)
    return str(raised.value)


def test_what_cannot_be_normed_over_ranks_says_why(as_rank):
    as_rank(0, 2)
    assert "qk_norm='sum' is not valid; valid are 'gather', 'reduce'" in refused(unsharded("olmo2"), qk_norm="sum")
    message = refused(unsharded("llama"), qk_norm="reduce")
    assert "qk_norm='reduce', but LlamaForCausalLM norms no q and k over all heads" in message
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}
    assert "k_proj.weight has 3 kv_heads, which do not split over the 2 ranks" in refused(unsharded("olmo2", **heads))


def test_a_norm_that_is_no_rms_norm_can_be_gathered_but_not_reduced(as_rank):
    as_rank(0, 2)

    def with_layer_norms():
        model = unsharded("olmo2")
        for layer in model.model.layers:
            layer.self_attn.q_norm = torch.nn.LayerNorm(64, bias=False)
        return model

    message = refused(with_layer_norms(), qk_norm="reduce")
    assert "layer 0: self_attn.q_norm is a LayerNorm, which cannot be computed from sums of squares" in message
    assert message.endswith("Use qk_norm='gather'")
    assert layout_of(parallelize(with_layer_norms(), ParallelConfig(2))).qk_norm == "gather"


def test_names_that_do_not_fit_are_named(as_rank):
    as_rank(0, 2)
    per_head = Architecture(qk_norms=(("q_proj", "q_norm"),))
    message = refused(unsharded("qwen3"), architecture=per_head)
    assert "layer 0: self_attn.q_norm has a weight of shape (16,), but q_proj puts out 64 columns" in message
    unlisted = Architecture(attention_columns=(Projection("k_proj", "kv_heads"),), qk_norms=(("q_proj", "q_norm"),))
    message = refused(unsharded("minimax_m2"), architecture=unlisted)
    assert "layer 0: self_attn.q_norm norms q_proj, which is none of the column projections ['k_proj']" in message
    model = unsharded("olmo2")
    attention = model.model.layers[1].self_attn
    attention.forward = lambda *args, **kwargs: None
    assert "layer 1: self_attn norms q and k over all heads, and its forward was replaced" in refused(model)
    assert attention.q_proj.weight.shape == (64, 64)  # after an error the model is as it was
