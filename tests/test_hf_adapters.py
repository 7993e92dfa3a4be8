"""LoRA adapters and quantized weights: cut, fused, and equal to what one process computes; or refused with the reason.

peft, torchao and bitsandbytes are no dependencies of tpfuse: what is not installed is skipped.
"""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from models import save, unsharded
from ranks import RankPool

pytest.importorskip("transformers", reason="needs the extra tpfuse[hf]")

from tpfuse import hf
from tpfuse.parallel import ConfigError, ParallelConfig

pytestmark = pytest.mark.ranks

LAYERS = {"num_hidden_layers": 2, "initializer_range": 0.2}
TOKENS = torch.arange(1, 9).view(2, 4)
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


@torch.no_grad()
def fused_and_equal(model):
    """(found, fused) of the compiled model, whether it equals the eager one bit for bit, and the eager logits."""
    import tpfuse

    torch._dynamo.reset()
    tpfuse.clear_reports()
    eager = model(TOKENS).logits
    got = hf.compile(model, options={"tpfuse.inner": "aot_eager"})(TOKENS).logits
    return [(len(r.sites), len(r.fused)) for r in tpfuse.reports()], torch.equal(got, eager), eager


@torch.no_grad()
def difference(got, wanted):
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


# -- LoRA ------------------------------------------------------------------------------------------------------------


def with_adapter(**changes):
    """A Llama whose adapter is far from zero, on projections of either kind."""
    from peft import LoraConfig, get_peft_model

    changes = {"target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"], **changes}
    model = unsharded("llama", attention_bias=True, mlp_bias=True, **LAYERS)
    torch.manual_seed(7)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **changes)).eval()


def lora(rank, world_size, merge):
    whole = with_adapter(lora_bias=True)
    if merge == "in place":
        whole.merge_adapter()
    elif merge:
        whole = whole.merge_and_unload()
    with torch.no_grad():
        wanted, plain = (
            whole(TOKENS).logits,
            unsharded("llama", attention_bias=True, mlp_bias=True, **LAYERS)(TOKENS).logits,
        )
    model = hf.parallelize(copy.deepcopy(whole), ParallelConfig(2))
    counts, equal, got = fused_and_equal(model)
    return counts, equal, difference(got, wanted), difference(plain, wanted)


@needs_peft
@pytest.mark.parametrize("merge", ["", "in place", "unloaded"])
def test_an_adapter_is_cut_with_its_layers(pool, merge):
    for counts, equal, error, without in pool.run(lora, merge):
        assert counts == [(5, 5)]
        assert equal
        assert error < 1e-5
        assert without > 0.05, "the adapter must matter for this test"


def lora_in_fp32(rank, world_size):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    chosen = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["o_proj", "down_proj"])
    whole = get_peft_model(unsharded("llama", torch.bfloat16, **LAYERS), chosen).eval()
    dtypes = {str(p.dtype) for name, p in whole.named_parameters() if "lora" in name}
    counts, equal, _ = fused_and_equal(hf.parallelize(whole, ParallelConfig(2)))
    return dtypes, counts, equal


@needs_peft
def test_adapters_in_fp32_beside_a_bf16_base_join_the_partial_sum(pool):
    """peft keeps adapters in fp32. The sum over both is rounded before it is reduced: nothing in fp32 meets the reduced sum."""
    assert pool.run(lora_in_fp32) == [({"torch.float32"}, [(5, 5)], True)] * 2


def lora_from_folder(rank, world_size, folder, config):
    from transformers import AutoModelForCausalLM

    from tpfuse.load import loading_of

    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = hf.from_pretrained(folder, config, progress=False, dtype=torch.float32)
    with torch.no_grad():
        return difference(model(TOKENS).logits, whole(TOKENS).logits), loading_of(model).whole_because


@needs_peft
@pytest.mark.parametrize("config", [ParallelConfig(2), ParallelConfig(2, 1, 1, 1)], ids=str)
def test_a_folder_with_an_adapter(pool, tmp_path, config):
    base = tmp_path / "base"
    save("llama", str(base), attention_bias=True, mlp_bias=True, **LAYERS)
    model = with_adapter()
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    for error, why in pool.run(lora_from_folder, str(tmp_path / "adapter"), config):
        assert error < 1e-5
        assert why == "it has an adapter, which is put into whole layers"


def refused_adapters(rank, world_size):
    from peft import LoHaConfig, get_peft_model

    messages = []
    other = get_peft_model(unsharded("llama", **LAYERS), LoHaConfig(r=4, target_modules=["q_proj"]))
    for model in (with_adapter(use_dora=True), other):
        with pytest.raises(ConfigError) as raised:
            hf.parallelize(model, ParallelConfig(2))
        messages.append(str(raised.value))
    return messages


@needs_peft
def test_adapters_whose_parts_cannot_be_summed_are_refused(pool):
    for dora, loha in pool.run(refused_adapters):
        assert (
            "layer 0: self_attn.q_proj has a LoRA variant (lora_magnitude_vector) that is not a sum of products" in dora
        )
        assert "self_attn.q_proj has an adapter of kind Linear; LoRA can be cut. Merge another one first" in loha


# -- quantized weights -----------------------------------------------------------------------------------------------


def quantizations():
    from torchao import quantization as ao
    from torchao.quantization.granularity import PerGroup

    return {
        "int8": ao.Int8WeightOnlyConfig(),
        "int4": ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        "float8": ao.Float8WeightOnlyConfig(),
    }


def torchao_after(rank, world_size, kind):
    from torchao.quantization import quantize_

    whole = unsharded("llama", torch.bfloat16, **LAYERS)
    model = hf.parallelize(copy.deepcopy(whole), ParallelConfig(2))
    quantize_(model, quantizations()[kind])
    quantize_(whole, quantizations()[kind])
    counts, equal, got = fused_and_equal(model)
    with torch.no_grad():
        error = difference(got.float(), whole(TOKENS).logits.float())
    return counts, equal, error, type(model.model.layers[0].mlp.down_proj.weight).__name__


@needs_torchao
@pytest.mark.parametrize(
    ("kind", "name"), [("int8", "Int8Tensor"), ("int4", "IntxUnpacked"), ("float8", "Float8Tensor")]
)
def test_torchao_quantizes_each_ranks_part(pool, kind, name):
    for counts, equal, error, held in pool.run(torchao_after, kind):
        assert held.startswith(name)
        assert counts == [(5, 5)]
        assert equal
        assert error < 0.2, (
            "row-cut weights have scales of their own, so equality with the whole quantized model is not due"
        )


def torchao_config(rank, world_size, folder):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    chosen = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "progress": False}
    counts, equal, _ = fused_and_equal(hf.from_pretrained(folder, ParallelConfig(2), **chosen))
    with pytest.raises(ConfigError) as sliced:
        hf.from_pretrained(folder, ParallelConfig(2, 1, 1, 1), **chosen)
    from torchao.quantization import quantize_

    whole = unsharded("llama", **LAYERS)
    quantize_(whole, Int8WeightOnlyConfig())
    with pytest.raises(ConfigError) as first:
        hf.parallelize(whole, ParallelConfig(2))
    return counts, equal, str(sliced.value), str(first.value)


@needs_torchao
def test_torchao_through_transformers_works_in_the_one_group_layout_alone(pool, tmp_path):
    save("llama", str(tmp_path), **LAYERS)
    for counts, equal, sliced, first in pool.run(torchao_config, str(tmp_path)):
        assert counts == [(5, 5)]
        assert equal
        assert "quantization with torchao makes packed weights, which cannot be cut" in sliced
        assert "layer 0: self_attn.q_proj is a Linear whose weight is Int8Tensor" in first
        assert "A quantized model is cut first and quantized after" in first


def bitsandbytes_after(rank, world_size):
    import bitsandbytes as bnb

    whole = unsharded("llama", torch.float16, **LAYERS)
    model = hf.parallelize(copy.deepcopy(whole), ParallelConfig(2))
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    sizes = (linear.in_features, linear.out_features)
                    packed = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                    packed.load_state_dict({"weight": linear.weight.data}, strict=False)
                    setattr(parent, name, packed.to("cpu").eval())
    counts, equal, got = fused_and_equal(model.requires_grad_(False))
    with torch.no_grad():
        return counts, equal, difference(got.float(), whole(TOKENS).logits.float())


@needs_bitsandbytes
def test_bitsandbytes_quantizes_each_ranks_part(pool):
    for counts, equal, error in pool.run(bitsandbytes_after):
        assert counts == [(5, 5)]
        assert equal
        assert error < 0.2


# -- dtypes and caches, which need no package ------------------------------------------------------------------------


def mixed_dtypes(rank, world_size):
    """Gemma computes its norms in float32 and rounds after: float32 norm weights beside a bf16 stream."""
    whole = unsharded("gemma2", torch.bfloat16, tie_word_embeddings=True, **{**LAYERS, "num_hidden_layers": 1})
    for name, value in whole.named_parameters():
        if "norm" in name:
            value.data = value.data.float()
    counts, equal, got = fused_and_equal(hf.parallelize(copy.deepcopy(whole), ParallelConfig(2)))
    with torch.no_grad():
        return counts, equal, difference(got.float(), whole(TOKENS).logits.float())


def test_float32_norms_beside_a_bf16_stream(pool):
    for counts, equal, error in pool.run(mixed_dtypes):
        assert counts == [(3, 3)]
        assert equal
        assert error < 0.05


def sliding(rank, world_size, name):
    import tpfuse

    torch._dynamo.reset()
    whole = unsharded(name, sliding_window=4, **LAYERS)
    model = hf.parallelize(copy.deepcopy(whole), ParallelConfig(2))
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    wanted = whole.generate(input_ids=TOKENS, **arguments, disable_compile=True)
    tpfuse.clear_reports()
    got = hf.compile(model, options={"tpfuse.inner": "aot_eager"}).generate(input_ids=TOKENS, **arguments)
    return torch.equal(got, wanted), {(len(r.sites), len(r.fused)) for r in tpfuse.reports()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_a_sliding_window_that_the_answer_outgrows(pool, name):
    for equal, counts in pool.run(sliding, name):
        assert equal
        assert counts == {(5, 5)}
