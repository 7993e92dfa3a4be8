"""tpfuse.hf: load, shard, compile and generate with Hugging Face models."""

import copy
import sys
import warnings

import pytest
import torch
from models import save, sharded, unsharded
from ranks import RankPool
from torch import nn

import tpfuse
from tpfuse import hf
from tpfuse.parallel import ConfigError, ParallelConfig, layout_of

LAYERS = {"num_hidden_layers": 2, "initializer_range": 0.2}
AOT = {"tpfuse.inner": "aot_eager"}


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


@torch.no_grad()
def loaded(rank, world_size, folder, config):
    """How the model was cut, and its logits against the whole model's."""
    reference = unsharded("llama", **LAYERS)
    model = hf.from_pretrained(folder, config, dtype=torch.float32)
    tokens = torch.arange(1, 7)[None]
    expected = reference(tokens).logits
    difference = ((model(tokens).logits - expected).abs().max() / expected.abs().max()).item()
    weight = model.model.layers[0].self_attn.o_proj.weight
    return difference, type(weight).__name__, tuple(weight.shape), any(p.requires_grad for p in model.parameters())


@pytest.mark.ranks
def test_one_shared_group_loads_with_transformers_own_sharding(pool, tmp_path):
    save("llama", str(tmp_path), **LAYERS)
    for difference, kind, _, grad in pool.run(loaded, str(tmp_path), ParallelConfig(2)):
        assert difference < 1e-5
        assert kind == "Parameter"  # a share of this rank, not a wrapper around it
        assert not grad


@pytest.mark.ranks
@pytest.mark.parametrize(
    "config", [ParallelConfig(2, 2, 1, 1), ParallelConfig(2, 2), ParallelConfig(2, 1, 1, 1)], ids=str
)
def test_every_other_layout_is_cut_by_the_plan(pool, tmp_path, config):
    save("llama", str(tmp_path), **LAYERS)
    for difference, kind, shape, grad in pool.run(loaded, str(tmp_path), config):
        assert difference < 1e-5
        assert kind == "Parameter"
        assert shape == (64, 64 // config.attn_tp_size)
        assert not grad


def told_of_sharded(rank, world_size, folder):
    """Twice: the second compile finds plain parameters, and what their modules were is all that tells."""
    model = sharded(folder, world_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hf.compile(hf.compile(model))
    return [str(w.message) for w in caught if issubclass(w.category, tpfuse.FusionWarning)]


@pytest.mark.ranks
def test_a_model_that_transformers_cut_is_not_told_to_be_whole(pool, tmp_path):
    save("llama", str(tmp_path), **LAYERS)
    assert pool.run(told_of_sharded, str(tmp_path)) == [[], []]


def loaded_deepseek(rank, world_size, folder):
    model = hf.from_pretrained(folder, ParallelConfig(2), dtype=torch.float32)
    return layout_of(model).plan.config.attn_tp_size, tuple(model.model.layers[0].self_attn.o_proj.weight.shape)


@pytest.mark.ranks
def test_an_attention_that_transformers_does_not_cut_is_cut_by_the_plan(pool, tmp_path):
    save("deepseek_v3", str(tmp_path), **LAYERS)
    assert pool.run(loaded_deepseek, str(tmp_path)) == [(2, (64, 32))] * 2


def generated(rank, world_size, folder, config, name):
    """Tokens from the compiled model, eager tokens, and what was fused on the way."""
    import tpfuse

    torch._dynamo.reset()
    tpfuse.clear_reports()
    prompt = {"input_ids": torch.arange(1, 6)[None], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    model = hf.from_pretrained(folder, config, dtype=torch.float32)
    eager = model.generate(**prompt, **arguments, disable_compile=True)
    compiled = hf.compile(model, options=AOT, fullgraph=True)
    tokens = compiled.generate(**prompt, **arguments)
    reports = tpfuse.reports()
    reference = unsharded(name, **LAYERS).generate(**prompt, **arguments, disable_compile=True)
    return tokens.tolist(), eager.tolist(), reference.tolist(), [(len(r.sites), len(r.fused)) for r in reports]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "config", "found"),
    [
        # The quick run has Llama's tokens in test_hf_generate_ranks.py; here the embedding is cut as well.
        pytest.param("llama", ParallelConfig(2), (5, 5), marks=pytest.mark.slow),
        pytest.param("deepseek_v3", ParallelConfig(2), (5, 5), marks=pytest.mark.slow),
        ("deepseek_v3", ParallelConfig(2, 2, 1, 1), (1, 1)),  # blocks meet in the one MoE layer
    ],
    ids=str,
)
def test_generate_with_a_static_cache_reaches_the_backend(pool, tmp_path, name, config, found):
    save(name, str(tmp_path), **LAYERS)
    for tokens, eager, reference, reports in pool.run(generated, str(tmp_path), config, name):
        assert tokens == eager == reference
        assert reports, "the decode step was not compiled with tpfuse"
        assert set(reports) == {found}


@torch.no_grad()
def changing_rows(rank, world_size):
    """Direct calls of a compiled model whose blocks meet; also with only one replica's rows changing."""
    import tpfuse

    torch._dynamo.reset()
    tpfuse.clear_reports()
    reference = unsharded("llama", **{**LAYERS, "num_hidden_layers": 1})
    model = hf.compile(hf.parallelize(copy.deepcopy(reference), ParallelConfig(2, 2)), options=AOT, fullgraph=True)
    differences = []
    for rows in (2, 3 + rank, 3 if rank else 4, 5, 7 if rank else 6):
        tokens = torch.arange(1, rows * 3 + 1).view(rows, 3)
        expected = reference(tokens).logits
        differences.append(((model(tokens).logits - expected).abs().max() / expected.abs().max()).item())
    return differences, len(tpfuse.reports())


@pytest.mark.ranks
def test_a_compiled_model_agrees_on_the_rows_of_every_call(pool):
    for differences, graphs in pool.run(changing_rows):
        assert max(differences) < 1e-5
        assert graphs <= 3  # static, then dynamic; once more where the own block was or was not the largest


def wrong_world(rank, world_size, folder):
    with pytest.raises(ConfigError) as raised:
        hf.from_pretrained(folder, ParallelConfig(4))
    return str(raised.value)


@pytest.mark.ranks
def test_another_number_of_processes_is_named(pool, tmp_path):
    save("llama", str(tmp_path), **LAYERS)
    for message in pool.run(wrong_world, str(tmp_path)):
        assert "spans all 2 ranks of the default group, but tp_size=4" in message


def test_without_a_process_group():
    with pytest.raises(ConfigError, match="no default process group for 2 ranks"):
        hf.from_pretrained("anywhere", ParallelConfig(2))


def test_one_rank_loads_the_whole_model(tmp_path):
    save("llama", str(tmp_path), **LAYERS)
    model = hf.from_pretrained(str(tmp_path), ParallelConfig(1))
    assert model.model.layers[0].self_attn.o_proj.weight.shape == (64, 64)


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"tpfuse.hf needs transformers.*pip install 'tpfuse\[hf\]'"):
        hf.compile(nn.Linear(1, 1))


def test_the_compile_config_of_generate_names_the_backend():
    model = unsharded("llama", **LAYERS)
    hf.compile(model, options={"tpfuse.policy": "all"}, dynamic=False)
    config = model.generation_config.compile_config
    assert config.to_dict() == {
        "backend": "tpfuse",
        "mode": None,
        "options": {"tpfuse.policy": "all"},
        "fullgraph": False,
        "dynamic": False,
    }
    assert config._compile_all_devices


def test_a_mode_beside_options_reaches_both_compiles():
    """torch.compile refuses mode= beside options=, and transformers passes a CompileConfig on to it."""
    model = unsharded("llama", **LAYERS)
    hf.compile(model, mode="reduce-overhead", options={"tpfuse.policy": "all"})
    arguments = model.generation_config.compile_config.to_dict()
    assert arguments["mode"] is None
    assert arguments["options"] == {"tpfuse.policy": "all", "tpfuse.mode": "reduce-overhead"}
    torch.compile(model, **arguments)


def test_a_compiled_model_may_have_a_graph_for_each_of_many_shapes():
    """A replica that alone passed Dynamo's limit of 8 would run eagerly, and the others would wait for it in their op."""
    model = nn.Linear(2, 2).eval()
    compiled = hf.compile(model, options=AOT, dynamic=False, fullgraph=True)
    for rows in range(2, 13):
        x = torch.rand(rows, 2)
        assert torch.equal(compiled(x), model(x))
    assert len(tpfuse.reports()) == 11


def test_transformers_own_loop_has_that_room_too(monkeypatch):
    model = unsharded("llama", **LAYERS)
    monkeypatch.setattr(
        type(model), "get_compiled_call", lambda self, _: lambda: (self, torch._dynamo.config.recompile_limit)
    )
    hf.compile(model)
    for one in (model, copy.deepcopy(model)):
        of, limit = one.get_compiled_call(None)()
        assert of is one
        assert limit >= 64


def test_compiled_inside_of_another_compiled_function_it_is_one_graph():
    compiled = hf.compile(nn.Linear(2, 2).eval(), options=AOT)
    outer = torch.compile(lambda x: compiled(x) + 1, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(outer(torch.ones(2, 2)), compiled(torch.ones(2, 2)) + 1)


class LigerRMSNorm(nn.Module):
    """Stands in for the class that Liger puts in place of a model's norm."""

    def forward(self, x):
        return x


LigerRMSNorm.__module__ = "liger_kernel.transformers.rms_norm"


def test_norms_that_a_graph_pass_cannot_see_are_warned_about():
    model = unsharded("llama", **LAYERS)
    assert hf.hidden_norms(model) == []
    model.model.norm = LigerRMSNorm()
    with pytest.warns(UserWarning, match="the model's norms come from liger_kernel"):
        hf.compile(model)
    model._use_kernels = True
    assert "use_kernels=True" in hf.hidden_norms(model)[0]


def test_a_model_that_is_compiled_again_takes_the_new_settings():
    one = {**LAYERS, "num_hidden_layers": 1}
    model = hf.compile(unsharded("llama", **one), options={"tpfuse.inner": "aot_eager"})
    again = hf.compile(model, options={"tpfuse.inner": "eager"})
    assert again._orig_mod is model._orig_mod
    assert again.generation_config.compile_config.options == {"tpfuse.inner": "eager"}
    tokens = torch.tensor([[3, 4]])
    assert torch.equal(again(tokens).logits, model._orig_mod(tokens).logits)
    kwargs = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    assert again.generate(tokens, **kwargs).tolist() == unsharded("llama", **one).generate(tokens, **kwargs).tolist()


@pytest.mark.parametrize(
    ("backends", "device"), [("cpu:gloo,cuda:nccl", "cuda:3"), ("cuda:nccl", "cuda:3"), ("cpu:gloo,cuda:gloo", None)]
)
def test_a_group_with_nccl_has_its_model_on_the_gpu_whatever_its_name(
    backends: str, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backends)
    assert tpfuse.hf._gpu() == device
