"""One canary for each private name of transformers that tpfuse touches: when a release moves one, its test names it."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from models import cache_argument, unsharded
from torch import nn

from tpfuse import hf_compat
from tpfuse.hf_styles import STYLES

CACHE = cache_argument()
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def llama():
    return unsharded("llama", num_hidden_layers=1)


class Mesh:
    """Stands in for a device mesh, which would need a process group."""


def test_hook_of():
    from transformers.distributed import tensor_parallel

    mesh = Mesh()
    linear = nn.Linear(2, 2)
    original = linear.forward
    assert hf_compat.hook_of(linear) is None
    style = tensor_parallel.RowwiseParallel()
    style.install_forward(linear, mesh)
    hook = hf_compat.hook_of(linear)
    assert (hook.style, hook.instance, hook.mesh, hook.known) == ("RowwiseParallel", style, mesh, True)
    assert hook.original.__func__ is original.__func__ is nn.Linear.forward
    norm = nn.LayerNorm(2)
    tensor_parallel.ReplicatedWithGradAllReduce().install_forward(norm, mesh)
    hook = hf_compat.hook_of(norm)
    assert (hook.style, hook.mesh, hook.known) == ("ReplicatedWithGradAllReduce", mesh, True)


def test_hook_of_something_else():
    linear = nn.Linear(2, 2)
    linear.forward = lambda x: x
    hook = hf_compat.hook_of(linear)
    assert not hook.known
    assert "lambda" in hook.style


def test_hooks_of_gradients_go_and_others_stay():
    """Transformers 5.17 puts one on the module, where Dynamo breaks the graph."""

    class Style:
        def install_forward(self, module):
            def _all_reduce_grads(module, grad_input, grad_output):
                raise AssertionError("the hook was dropped")

            _all_reduce_grads.__module__ = "transformers.distributed.tensor_parallel"
            module.register_full_backward_hook(_all_reduce_grads)

    linear, calls = nn.Linear(2, 2), []
    linear.register_full_backward_hook(lambda *_: calls.append("own"))
    Style().install_forward(linear)
    assert hf_compat.drop_gradient_hooks(linear) == 1
    linear(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert calls == ["own"]
    assert hf_compat.drop_gradient_hooks(linear) == 0


def test_styles():
    """Every style that is known here exists, with the fields that decide what it becomes; and those without an entry are few."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    registered = {name: ALL_PARALLEL_STYLES[name] for name in ALL_PARALLEL_STYLES}
    kinds = {type(style).__name__ for style in registered.values()}
    assert set(STYLES) - {"LocalParamsParallel"} <= kinds  # that one came with transformers 5.24
    # Rows cut along the sequence; a parameter that another style's module owns; expert parallelism, by transformers' release.
    others = {"SequenceParallel", "PackedRowwiseParallel", "MoEParamShard", "EpDispatchExpertsParallel"}
    before = {"EpRouterParallel", "RouterParallelMegaMoe", "MoeTensorParalellMegaMoeExperts"}
    assert kinds - set(STYLES) <= others | before
    for style in registered.values():
        if type(style).__name__ in ("ColwiseParallel", "RowwiseParallel"):
            assert {"input_layouts", "output_layouts", "use_local_output"} <= set(vars(style))
        if type(style).__name__ == "EmbeddingParallel":
            assert {"shard_dim", "use_local_output"} <= set(vars(style))


def test_cache_name():
    from transformers.generation.utils import GenerationMixin

    assert hf_compat.cache_name({"cache": 1}) == "cache"
    assert hf_compat.cache_name({"past_key_values": 1, "cache": None}) == "past_key_values"
    assert hf_compat.cache_name({}) is None
    names = set(inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters)
    assert names & {"cache", "past_key_values"}


def test_may_compile(llama):
    from transformers import CompileConfig, StaticCache

    config = type(llama.generation_config)(compile_config=CompileConfig())
    config.compile_config._compile_all_devices = True
    inputs = {CACHE: StaticCache(config=llama.config, max_cache_len=4)}
    assert hf_compat.may_compile(llama, inputs, config)
    config.disable_compile = True
    assert not hf_compat.may_compile(llama, inputs, config)


def test_for_decode(llama):
    with hf_compat.for_decode(llama):
        pass
    assert hasattr(llama, "_optimize_model_for_decode")


def test_completed(llama):
    def mode(**kwargs):
        return hf_compat.completed(llama, None, kwargs).get_generation_mode().value

    assert mode() == "greedy_search"
    assert mode(do_sample=True) == "sample"
    assert mode(num_beams=3) == "beam_search"
    assert mode(prompt_lookup_num_tokens=3) == "assisted_generation"
    config = hf_compat.completed(llama, None, {"stop_strings": ["x"]})
    assert config.stop_strings == ["x"]
    assert not config.token_healing


def test_own_decoding(llama):
    names = list(inspect.signature(hf_compat.own_decoding(llama)).parameters)
    assert names[:5] == ["self", "input_ids", "logits_processor", "stopping_criteria", "generation_config"]
    assert "streamer" in names


def test_pad_token(llama):
    config = llama.generation_config.__class__(pad_token_id=7)
    llama._prepare_special_tokens(config, True, device=torch.device("cpu"), batch_size=1)
    assert hf_compat.pad_token(config).item() == 7


def test_static_layers(llama):
    from transformers import StaticCache

    full, _ = hf_compat.static_layers()
    cache = StaticCache(config=llama.config, max_cache_len=4)
    assert [type(layer) for layer in cache.layers] == [full]
    assert isinstance(cache.layers[0].cumulative_length, torch.Tensor)


def test_attention_of(llama):
    assert hf_compat.attention_of(llama) == "sdpa"


def test_is_remote(llama):
    assert not hf_compat.is_remote(llama)


def test_the_seam_of_generate(llama):
    """What a callable is given. The streamer and the tokenizer are not: when they are, hf_generate.py can be simpler."""
    seen = {}

    def loop(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        *,
        streamer=None,
        tokenizer=None,
        **inputs,
    ):
        seen.update(inputs, tokenizer=tokenizer, streamer=streamer, criteria=stopping_criteria)
        return input_ids

    class Streamer:
        def put(self, value):
            seen["prompt"] = value.tolist()

    given = {"tokenizer": "it", "streamer": Streamer(), "max_new_tokens": 5, "cache_implementation": "static"}
    llama.generate(torch.tensor([[3, 4]]), custom_generate=loop, **given)
    assert seen["prompt"] == [[3, 4]]
    assert seen["tokenizer"] is None
    assert seen["streamer"] is None
    assert seen["criteria"].max_length == 7
    assert hf_compat.cache_name(seen) is not None
    assert {"position_ids", "attention_mask", "use_cache"} <= set(seen)


def test_private_names_of_transformers_are_in_one_file():
    """Outside of ``hf_compat.py`` nothing is imported from a private module, and nothing private is asked of a model."""
    allowed = {"_valid_auto_compile_criteria", "_compile_all_devices", "_is_expert_parallel", "_is_user_defined"}
    allowed |= {"_prefill", "_sample", "_update_model_kwargs_for_generation", "_orig_mod"}
    found = set()
    for path in (ROOT / "tpfuse").glob("hf_*.py"):
        if path.name == "hf_compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            on_self = (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("self", "torch")
            )
            if (
                isinstance(node, ast.Attribute)
                and node.attr.startswith("_")
                and not node.attr.startswith("__")
                and not on_self
            ):
                found.add((path.name, node.attr))
    assert {(name, attr) for name, attr in found if attr not in allowed} <= {("hf_styles.py", "_c10d_functional")}
