"""Generation over tensor-parallel ranks: the tokens of transformers' eager sharding, fused, and no graph for a second call."""

import pytest
import torch
from models import save, sharded, unsharded
from ranks import RankPool

import tpfuse
from tpfuse import hf, hf_generate, hf_step
from tpfuse.parallel import ParallelConfig, layout_of

LAYERS = {"num_hidden_layers": 2, "initializer_range": 0.2}
ONE = {**LAYERS, "num_hidden_layers": 1}
PADDED = {
    "input_ids": torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}
PLAIN = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
WAYS = (
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.8, "top_k": 30},
    {"do_sample": True, "repetition_penalty": 1.3},
)
COMMON = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": 9, "cache_implementation": "static"}

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


def tokens(model, prompt, **kwargs):
    torch.manual_seed(5)
    return model.generate(**prompt, **{**COMMON, **kwargs}).tolist()


def both(rank, world_size, folder, inner):
    """Tokens of transformers' eager sharding and ours; graphs after a first call of each kind and after more of them.

    Prefills are compiled, as on a GPU.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_step, "EAGER_PREFILL", ())
        return both_compiled(rank, world_size, folder, inner)


def both_compiled(rank, world_size, folder, inner):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tpfuse.clear_reports()
    model = sharded(folder, world_size)
    calls = [(prompt, way) for prompt in (PADDED, PLAIN) for way in WAYS]
    expected = [tokens(model, prompt, **way, disable_compile=True) for prompt, way in calls]
    model = hf.compile(model, options={"tpfuse.inner": inner}, fullgraph=True)
    got = [tokens(model, prompt, **way) for prompt, way in calls]
    stats = torch._dynamo.utils.counters["stats"]
    first = stats["unique_graphs"]
    again = [tokens(model, prompt, **way) for prompt, way in calls]
    longer = tokens(model, PLAIN, **WAYS[0], max_new_tokens=9)
    pool = getattr(model, hf_generate.DECODER).pool
    fused = [(len(r.sites), len(r.fused)) for r in tpfuse.reports()]
    return expected, got, again, longer, (first, stats["unique_graphs"]), len(pool.kept), fused


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("llama", (3, 3)),  # the embedding is cut as well
        pytest.param("qwen2", (5, 5), marks=pytest.mark.slow),
        pytest.param("qwen3", (5, 5), marks=pytest.mark.slow),
        pytest.param("phi3", (5, 5), marks=pytest.mark.slow),
        pytest.param("mixtral", (5, 5), marks=pytest.mark.slow),
        pytest.param("qwen3_moe", (5, 5), marks=pytest.mark.slow),
        pytest.param("gemma2", None, marks=pytest.mark.slow),
        pytest.param("gemma3_text", None, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", None, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_transformers_own_sharding(pool, tmp_path, name, sites):
    save(name, str(tmp_path), **(ONE if name == "llama" else LAYERS))
    results = pool.run(both, str(tmp_path), "aot_eager")
    for expected, got, again, longer, graphs, kept, fused in results:
        assert got == expected
        assert again == expected
        assert longer[0][: len(expected[3][0])] == expected[3][0]
        assert kept == 2  # batches of two and of one
        assert graphs[0] == graphs[1] == 4  # for each, a prefill of any length and a step
        assert sites is None or set(fused) == {sites}
    assert results[0][1] == results[1][1]


@pytest.mark.slow
def test_tokens_with_inductor(pool, tmp_path):
    save("llama", str(tmp_path), **LAYERS)
    for expected, got, again, *_ in pool.run(both, str(tmp_path), "inductor"):
        assert got == again == expected


def layout_of_ours(rank, world_size, config):
    """A model that tpfuse cut, by the loop where that is possible."""
    torch._dynamo.reset()
    whole = unsharded("llama", **ONE)
    expected = tokens(whole, PLAIN, do_sample=False, disable_compile=True)
    model = hf.compile(hf.parallelize(whole, config), options={"tpfuse.inner": "aot_eager"})
    return tokens(model, PLAIN, do_sample=False) == expected, hasattr(model, hf_generate.DECODER)


@pytest.mark.parametrize(
    ("config", "loop"),
    [
        pytest.param(ParallelConfig(2), True, marks=pytest.mark.slow),
        pytest.param(ParallelConfig(2, 2, 1, 1), True, marks=pytest.mark.slow),
        (ParallelConfig(2, 2), False),  # blocks agree on their row counts before every step
    ],
    ids=str,
)
def test_models_that_tpfuse_cut(pool, config, loop):
    assert pool.run(layout_of_ours, config) == [(True, loop)] * 2


def differing(rank, world_size, folder):
    """What calls say whose ranks do not agree, and tokens of those that do."""
    torch._dynamo.reset()
    cut = hf.parallelize(unsharded("llama", **ONE), ParallelConfig(world_size))
    models = {
        "cut": cut,
        "transformers": hf.compile(sharded(folder, world_size), options={"tpfuse.inner": "aot_eager"}),
    }
    found = {}
    for name, model in models.items():
        for what, prompt, draws, seed in (
            ("prompts", torch.tensor([[3, 4, 5 + rank]]), False, 5),
            ("seeds", PLAIN["input_ids"], True, 5 + rank),
            ("settings", PLAIN["input_ids"], rank == 1, 5),
            ("greedy", PLAIN["input_ids"], False, 5 + rank),
            ("drawn", PLAIN["input_ids"], True, 5),
        ):
            torch.manual_seed(seed)
            try:
                found[name, what] = model.generate(prompt, **COMMON, do_sample=draws, disable_compile=True).tolist()
            except ValueError as error:
                found[name, what] = str(error)
    torch.manual_seed(rank)
    try:
        found["cut", "ours"] = hf.generate(cut, **PLAIN, do_sample=True, max_new_tokens=2)
    except ValueError as error:
        found["cut", "ours"] = str(error)
    return found


def test_ranks_that_would_choose_other_tokens_are_named_before_anything_runs(pool, tmp_path):
    save("llama", str(tmp_path), **ONE)
    one, two = pool.run(differing, str(tmp_path))
    assert one == two
    for name in ("cut", "transformers"):
        assert "the prompt on rank 1 is not that of rank 0" in one[name, "prompts"]
        assert "the state of the random number generator on rank 1" in one[name, "seeds"]
        assert "whether tokens are drawn on rank 1" in one[name, "settings"]
        assert isinstance(one[name, "greedy"], list)
        assert isinstance(one[name, "drawn"], list)
    assert "torch.manual_seed" in one["cut", "ours"]


def ending_apart(rank, world_size, compiled):
    """Replicas whose rows meet: one ends at its second token, the other goes on."""
    torch._dynamo.reset()
    whole = unsharded("llama", **ONE)
    prompt = {"input_ids": torch.tensor([[3 + rank, 4, 5, 6]])}
    plain = {"do_sample": False, "max_new_tokens": 6, "disable_compile": True}
    free = tokens(whole, prompt, **plain, eos_token_id=None)[0]
    own = {"eos_token_id": free[5] if rank == 0 else None}
    expected = tokens(whole, prompt, **plain, **own)
    model = hf.parallelize(whole, ParallelConfig(2, 2))
    assert layout_of(model).plan.gathers_blocks
    if compiled:
        model = hf.compile(model, options={"tpfuse.inner": "aot_eager"})
        plain.pop("disable_compile")
    # Twice: steps that one replica still had to take would meet those of the next call.
    return [tokens(model, prompt, **plain, **own) == expected for _ in range(2)], len(expected[0])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_replicas_that_end_apart_wait_for_each_other(pool, compiled):
    first, second = pool.run(ending_apart, compiled, timeout=120)
    assert first == ([True, True], 6)
    assert second[0] == [True, True] and second[1] > 6
