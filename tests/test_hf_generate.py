"""tpfuse.hf.generate: transformers' tokens from a loop that asks the device for nothing and makes no new graph."""

import warnings

import pytest
import torch
from models import cache_argument, unsharded
from torch.utils._python_dispatch import TorchDispatchMode

import tpfuse
from tpfuse import hf, hf_buffers, hf_generate, hf_loop, hf_step, hf_tokens, unfused

pytestmark = pytest.mark.long  # not on every save

CACHE = cache_argument()
LAYERS = {"num_hidden_layers": 2, "initializer_range": 0.2}
EAGER = {"tpfuse.inner": "eager"}
PADDED = {
    "input_ids": torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}
PLAIN = {"input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])}
COMMON = {"max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def compile_anew():
    torch._dynamo.reset()
    unfused.forget()


@pytest.fixture(scope="module")
def llama():
    return unsharded("llama", **LAYERS)


def reference(model, seed=3, **kwargs):
    """transformers' own tokens, from its own loop."""
    torch.manual_seed(seed)
    return type(model).generate(model, **{**COMMON, "do_sample": False, "disable_compile": True, **kwargs})


def ours(model, seed=3, **kwargs):
    torch.manual_seed(seed)
    return hf.generate(model, **{**COMMON, "do_sample": False, **kwargs})


def first_eos(model, row=0, step=4, **prompt):
    """A token that a row reaches after a few steps, to end on."""
    return reference(model, **prompt)[row, prompt["input_ids"].shape[1] + step].item()


WAYS = {
    "greedy": {},
    "sample": {"do_sample": True},
    "sample with warpers": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "min_p": {"do_sample": True, "top_k": None, "min_p": 0.05, "typical_p": 0.9},
    "reads the tokens": {"do_sample": True, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "least tokens": {"min_new_tokens": 6},
    "several of each": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("prompt", [PADDED, PLAIN], ids=["left padding", "no padding"])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_transformers_tokens(llama, prompt, way):
    end = {"eos_token_id": [first_eos(llama, **prompt), 126]}
    for more in ({}, end):
        expected, got = reference(llama, **prompt, **WAYS[way], **more), ours(llama, **prompt, **WAYS[way], **more)
        assert got.tolist() == expected.tolist()
        assert got.dtype == expected.dtype


def test_the_random_numbers_after_a_call_are_the_same(llama):
    drawn = {"do_sample": True, "eos_token_id": first_eos(llama, **PLAIN)}
    reference(llama, **PLAIN, **drawn)
    expected = torch.rand(1)
    ours(llama, **PLAIN, **drawn)
    assert torch.equal(torch.rand(1), expected)


def test_the_draw_is_multinomial():
    invalid = torch.zeros((), dtype=torch.bool)
    probabilities = torch.rand(8, 1000).softmax(-1)
    torch.manual_seed(1)
    expected = torch.multinomial(probabilities, 1).squeeze(1)
    torch.manual_seed(1)
    assert hf_tokens.draw(probabilities, invalid).tolist() == expected.tolist()
    assert hf_tokens.draws_like_multinomial(torch.device("cpu"))
    assert not invalid
    hf_tokens.draw(probabilities * float("nan"), invalid)
    assert invalid


def test_scores_that_nothing_can_be_drawn_from_are_an_error(llama):
    from transformers import LogitsProcessorList

    def spoil(ids, scores):
        return scores * float("nan")

    with pytest.raises(RuntimeError, match="inf.*nan"):
        reference(llama, **PLAIN, do_sample=True, logits_processor=LogitsProcessorList([spoil]))
    with pytest.raises(RuntimeError, match="inf.*nan"):
        ours(llama, **PLAIN, do_sample=True, logits_processor=LogitsProcessorList([spoil]))


class Seen:
    """A streamer that keeps what it was given."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("eos", [False, True])
def test_a_streamer_sees_the_same(llama, eos):
    prompt = {"input_ids": PLAIN["input_ids"][:1]}
    more = {"eos_token_id": first_eos(llama, **prompt)} if eos else {}
    seen = []
    for run in (reference, ours):
        streamer = Seen()
        run(llama, **prompt, **more, streamer=streamer)
        assert streamer.ended
        seen.append(streamer.parts)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("step", [0, 4, 8, 9])
@pytest.mark.parametrize("lag", [1, 2])
def test_a_late_look_at_the_end_changes_nothing(llama, monkeypatch, lag, step):
    """As on a GPU, where the host looks at a step while the next one runs: tokens, streamer and random numbers are the same."""
    monkeypatch.setitem(hf_loop.LAG, "cpu", lag)
    prompt = {"input_ids": PLAIN["input_ids"][:1]}
    for way in ({}, {"do_sample": True}):
        end = {"eos_token_id": reference(llama, **prompt, **way)[0, 4 + step].item()}
        for new in (9, 10):  # the end comes by itself in the last step, in the one before, or not
            seen = []
            for run in (reference, ours):
                streamer = Seen()
                tokens = run(llama, **prompt, **way, **end, max_new_tokens=new, streamer=streamer)
                seen.append((tokens.tolist(), streamer.parts, streamer.ended, torch.rand(1).item()))
            assert seen[0] == seen[1]
        both = [run(llama, **PLAIN, **way, **end).tolist() for run in (reference, ours)]
        assert both[0] == both[1]


def test_criteria_of_ones_own_and_time(llama):
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Long(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            lengths = torch.tensor([7, 9])
            return lengths <= ids.shape[1]

    for criteria in ({"stopping_criteria": StoppingCriteriaList([Long()])}, {"max_time": 1e-9}):
        expected, got = reference(llama, **PLAIN, **criteria), ours(llama, **PLAIN, **criteria)
        assert got.tolist() == expected.tolist()
        assert got.shape[1] < 14


def test_scores_logits_and_the_cache_come_back(llama):
    wanted = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "top_k": 9,
        "do_sample": True,
    }
    end = {"eos_token_id": first_eos(llama, **PADDED)}
    expected, got = reference(llama, **PADDED, **wanted, **end), ours(llama, **PADDED, **wanted, **end)
    assert type(got) is type(expected)
    assert got.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(got[name]) == len(expected[name])
        for one, other in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(one, other)
    length = got[CACHE].get_seq_length()
    kept = got[CACHE].layers[0].keys.clone()
    assert length == expected[CACHE].get_seq_length()
    ours(llama, **PADDED)
    assert torch.equal(got[CACHE].layers[0].keys, kept), "the next call wrote into a cache that was given away"


@pytest.mark.parametrize("name", ["gemma3_text", "mistral", "gpt_oss", "deepseek_v3"])
def test_windows_sinks_and_latent_attention(name):
    changes = {} if name == "deepseek_v3" else {"sliding_window": 6}
    model = unsharded(name, **LAYERS, **changes)
    for prompt in (PADDED, PLAIN):
        assert ours(model, **prompt).tolist() == reference(model, **prompt).tolist()
    assert getattr(model, hf_generate.DECODER).pool.kept, "it ran in transformers' own loop"


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Prefills are compiled, as where the op has a kernel."""
    monkeypatch.setattr(hf_step, "EAGER_PREFILL", ())


def test_prompts_and_lengths_of_all_kinds_need_two_graphs(as_on_a_gpu):
    """One for prefills of any length, one for the decode step. A prompt of one token is a decode step."""
    whole = unsharded("llama", num_hidden_layers=1, initializer_range=0.2, max_position_embeddings=4096)
    model = hf.compile(whole, options=EAGER, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    room = {"cache_implementation": "static", "max_cache_len": 4096}
    for length, new in ((5, 3), (1, 4), (2, 2), (64, 3), (7, 20), (777, 2), (4094, 2)):
        ids = torch.arange(length).remainder(100)[None] + 3
        got = model.generate(input_ids=ids, **{**COMMON, **room, "max_new_tokens": new}, do_sample=False)
        assert got.shape == (1, length + new)
        assert got.tolist() == reference(whole, input_ids=ids, max_new_tokens=new).tolist()
        assert graphs() <= 2
    assert graphs() == 2
    (buffers,) = getattr(whole, hf_generate.DECODER).pool.kept.values()
    assert buffers.capacity == 4096


@pytest.mark.parametrize("dynamic", [None, False])
def test_on_a_cpu_and_without_dynamic_sizes_the_first_call_compiles_what_transformers_compiles(request, dynamic):
    """The decode step, once: nothing for prompts, nothing for a second prompt or a new cache. ``make demo`` compares so."""
    if dynamic is False:
        request.getfixturevalue("as_on_a_gpu")
    from transformers import CompileConfig

    def compiled_by(call, model):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        answers = []
        for length, asked in ((5, {"return_dict_in_generate": True}), (9, {}), (2, {})):
            ids = torch.arange(length)[None] + 3
            got = call(model, input_ids=ids, **COMMON, do_sample=False, cache_implementation="static", **asked)
            answers.append(getattr(got, "sequences", got).tolist())
        return graphs(), answers

    alone = CompileConfig(backend="eager", mode=None)
    alone._compile_all_devices = True  # on a CPU too
    model = unsharded("llama", num_hidden_layers=1, initializer_range=0.2)
    model.generation_config.compile_config = alone
    theirs, expected = compiled_by(type(model).generate, model)
    hf.compile(model, options=EAGER, fullgraph=True, dynamic=dynamic)
    mine, answers = compiled_by(lambda model, **kwargs: model.generate(**kwargs), model)
    assert (mine, answers) == (1, expected)
    assert mine <= theirs


def test_who_asks_for_dynamic_sizes_gets_compiled_prompts_on_a_cpu_too():
    model = hf.compile(unsharded("llama", num_hidden_layers=1), options=EAGER, dynamic=True)
    torch._dynamo.utils.counters.clear()
    model.generate(input_ids=torch.arange(5)[None] + 3, **COMMON, do_sample=False, cache_implementation="static")
    assert graphs() == 2


def test_a_longer_call_needs_a_new_cache_and_shorter_ones_use_it(llama):
    pool = hf_buffers.Pool()
    first = pool.take(llama, CACHE, 2, 100)
    assert first.capacity == 256
    keys = first.cache.layers[0].keys
    assert pool.take(llama, CACHE, 2, 256) is first
    second = pool.take(llama, CACHE, 2, 257)
    assert second.capacity == 512
    assert pool.take(llama, CACHE, 2, 3) is second
    assert pool.take(llama, CACHE, 1, 3) is not second
    assert second.cache.layers[0].keys.data_ptr() != keys.data_ptr()
    for batch in range(3, 3 + hf_buffers.KEPT):
        pool.take(llama, CACHE, batch, 3)
    assert 2 not in pool.kept
    assert len(pool.kept) == hf_buffers.KEPT


class Reads(TorchDispatchMode):
    """Counts what is read back to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["greedy", "sample with warpers"])
def test_a_step_reads_nothing_back(llama, way):
    """As many reads for 3 tokens as for 20; transformers' loop reads at every step, which shows that reads are seen."""
    counts = {}
    for run in (ours, reference):
        for new in (3, 20):
            run(llama, **PLAIN, max_new_tokens=new)  # what happens once has happened
            with Reads() as reads:
                run(llama, **PLAIN, max_new_tokens=new, **WAYS[way])
            counts[run.__name__, new] = reads.count
    assert counts["ours", 20] == counts["ours", 3]
    assert counts["reference", 20] > counts["reference", 3]


def test_release_gives_the_caches_back(llama):
    import weakref

    ours(llama, **PLAIN)
    pool = getattr(llama, hf_generate.DECODER).pool
    keys = weakref.ref(pool.kept[2].cache.layers[0].keys)
    hf.release(llama)
    torch._dynamo.reset()
    assert not pool.kept
    assert keys() is None
    assert ours(llama, **PLAIN).tolist() == reference(llama, **PLAIN).tolist()


class Graph:
    """Stands in for a CUDA graph: a replay runs what was recorded, into the tensors of the recording."""

    made = 0

    def __init__(self, step, whole):
        Graph.made += 1
        self.step, self.whole, self.replays = step, whole, 0
        self.logits = self.scores = None

    def replay(self):
        self.replays += 1
        self.step._forward()
        if self.whole:
            self.step._choose(self.step.logits, 0)
        self.logits.copy_(self.step.logits)
        self.step.logits = self.logits


@pytest.fixture
def recorded(monkeypatch):
    """Steps that are recorded on a CPU. On a GPU: tests/gpu/test_hf_graph.py."""

    def capture(self, whole):
        graph = Graph(self, whole)
        graph.logits = torch.empty(self.buffers.batch, self.model.config.vocab_size)
        return graph, graph.logits, None

    monkeypatch.setattr(hf_step.Step, "_capture", capture)
    monkeypatch.setattr(Graph, "made", 0)
    run = hf_generate.run
    monkeypatch.setattr(
        hf_generate, "run", lambda model, pool, forward, call, graph: run(model, pool, forward, call, True)
    )


def test_one_graph_for_every_call_of_a_kind(recorded):
    model = unsharded("llama", **LAYERS)
    for new in (10, 4, 30):
        assert (
            ours(model, **PLAIN, max_new_tokens=new).tolist() == reference(model, **PLAIN, max_new_tokens=new).tolist()
        )
        assert Graph.made == 1
    (buffers,) = getattr(model, hf_generate.DECODER).pool.kept.values()
    (captured,) = buffers.graphs.values()
    assert captured[0].replays == 9 - hf_step.WARM + 3 + 29
    assert captured[0].whole
    # Another kind of step each: padding, processors in the graph, processors that read the tokens and stay outside.
    for number, kind in enumerate(
        (PADDED, {**PLAIN, "do_sample": True}, {**PLAIN, "repetition_penalty": 1.2}), start=2
    ):
        assert ours(model, **kind).tolist() == reference(model, **kind).tolist()
        assert Graph.made == number
    assert not list(buffers.graphs.values())[-1][0].whole


def test_graphs_of_weights_that_moved_are_forgotten(recorded):
    model = unsharded("llama", **LAYERS)
    ours(model, **PLAIN)
    assert Graph.made == 1
    weight = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(-weight.detach().clone())
    assert ours(model, **PLAIN).tolist() == reference(model, **PLAIN).tolist()
    assert Graph.made == 2


def test_under_inference_mode_and_outside(llama):
    with torch.inference_mode():
        first = ours(llama, **PLAIN)
    assert ours(llama, **PLAIN).tolist() == first.tolist() == reference(llama, **PLAIN).tolist()


REFUSED = {
    "the cache is not static": {"cache_implementation": "dynamic"},
    "attentions or hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "the prefill is in chunks": {"prefill_chunk_size": 2},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_the_loop_cannot_do_runs_in_transformers_own(why, recwarn):
    model = unsharded("llama", **LAYERS)
    got, expected = ours(model, **PLAIN, **REFUSED[why]), reference(model, **PLAIN, **REFUSED[why])
    get = lambda out: (out if isinstance(out, torch.Tensor) else out.sequences).tolist()  # noqa: E731
    assert get(got) == get(expected)
    assert any(why in str(one.message) for one in recwarn)
    assert not hasattr(model, hf_generate.DECODER)


def test_a_cache_of_ones_own_is_continued(llama):
    from transformers import StaticCache

    cache, text = StaticCache(config=llama.config, max_cache_len=64), PLAIN["input_ids"]
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tpfuse.FusionWarning)
            text = ours(llama, input_ids=text, **{CACHE: cache})
    assert text.tolist() == reference(llama, **PLAIN, max_new_tokens=20).tolist()


def test_stop_strings(llama):
    """They need the tokenizer, which transformers gives to its own loops only."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    # The criterion encodes "abcdef" to see how this tokenizer joins tokens.
    vocabulary = {"abcdef": 0, **{f"w{n}": n for n in range(1, 128)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w1"))
    words.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    end = {"stop_strings": [f"w{first_eos(llama, **PLAIN)}"], "tokenizer": tokenizer}
    expected, got = reference(llama, **PLAIN, **end), ours(llama, **PLAIN, **end)
    assert got.tolist() == expected.tolist()


def test_a_prompt_that_is_looked_up_gets_a_cache_that_gives_tokens_back(llama):
    prompt = {"input_ids": torch.tensor([[3, 4, 3, 4, 3, 4]])}
    assert ours(llama, **prompt, prompt_lookup_num_tokens=5).tolist() == reference(llama, **prompt).tolist()


def test_beams_and_flash_attention_are_transformers_business(llama):
    assert ours(llama, **PLAIN, num_beams=2).tolist() == reference(llama, **PLAIN, num_beams=2).tolist()
    config = llama.generation_config
    inputs = {CACHE: hf_buffers.static_cache(llama, 8), "use_cache": True}
    assert hf_generate.why_not(llama, PLAIN["input_ids"], config, inputs) is None
    llama.config._attn_implementation = "flash_attention_2"
    try:
        assert "flash_attention_2; load the model with" in hf_generate.why_not(
            llama, PLAIN["input_ids"], config, inputs
        )
    finally:
        llama.config._attn_implementation = "sdpa"


def test_modes_with_graphs_of_their_own_lose_them():
    settings = {"mode": "reduce-overhead", "options": None, "dynamic": None}
    assert hf_step.plain_mode(settings) == {"mode": None, "options": None, "dynamic": None}
    options = {"tpfuse.mode": "max-autotune", "triton.cudagraphs": True, "max_autotune": True}
    plain = hf_step.plain_mode({"mode": None, "options": options})
    assert plain["options"] == {"tpfuse.mode": "max-autotune-no-cudagraphs", "max_autotune": True}
    assert "triton.cudagraphs" in options


def test_a_compiled_model_generates_so_too_and_a_copy_has_graphs_of_its_own():
    import copy
    import pickle

    model = unsharded("llama", num_hidden_layers=1, initializer_range=0.2)
    expected = reference(model, **PLAIN).tolist()
    compiled = hf.compile(model, options=EAGER, fullgraph=True)
    static = {**COMMON, "do_sample": False, "cache_implementation": "static"}
    assert compiled.generate(PLAIN["input_ids"], **static).tolist() == expected
    assert getattr(model, hf_generate.DECODER).pool.kept
    other = copy.deepcopy(model)
    assert not getattr(other, hf_generate.DECODER).pool.kept
    with torch.no_grad():
        other.lm_head.weight.neg_()
    assert other.generate(PLAIN["input_ids"], **static).tolist() != expected
    assert pickle.loads(pickle.dumps(getattr(model, hf_generate.DECODER))).pool.kept == {}
    # Eager calls on the same model stay transformers' own.
    assert model.generate(PLAIN["input_ids"], **COMMON, do_sample=False, disable_compile=True).tolist() == expected


def test_continuous_batching_gives_the_tokens_and_says_that_nothing_fuses(recwarn):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = unsharded("llama", **LAYERS)
    hf.compile(model, options=EAGER)
    small = ContinuousBatchingConfig(num_blocks=16, page_size=32, max_batch_tokens=64)
    config = GenerationConfig(**{**COMMON, "max_new_tokens": 4}, do_sample=False)
    prompts = [[3, 4, 5, 6], [7, 8, 9]]
    found = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=small, progress_bar=False
    )
    for number, prompt in enumerate(prompts):
        expected = reference(model, input_ids=torch.tensor([prompt]), max_new_tokens=4)[0, len(prompt) :].tolist()
        assert found[f"req_{number}"].generated_tokens == expected
    assert any("nothing of it is fused" in str(one.message) for one in recwarn)
