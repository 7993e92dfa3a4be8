"""tpfuse.hf.from_pretrained: each rank reads its slices, and has bit for bit what it has when a whole model is cut."""

from __future__ import annotations

import json

import pytest
import torch
from models import unsharded

transformers = pytest.importorskip("transformers", reason="needs the extra tpfuse[hf]")

from tpfuse import hf  # noqa: E402
from tpfuse.load import loading_of, transformers_compat  # noqa: E402
from tpfuse.parallel import ConfigError, ParallelConfig, parallelize  # noqa: E402

pytestmark = pytest.mark.long  # not on every save

LAYERS = {"num_hidden_layers": 3, "initializer_range": 0.2}
TIED = {"gemma2": {"tie_word_embeddings": True}, "gemma3_text": {"tie_word_embeddings": True}}
NAMES = ("llama", "qwen3", "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gemma2", "gemma3_text")
LAYOUTS = (
    ParallelConfig(4, 2, 1, 2),
    ParallelConfig(4, 2, 1, 1),
    ParallelConfig(4, 4),
    ParallelConfig(4, ep_size=2, moe_dense_tp_size=1),
    ParallelConfig(4, 2, 1, 2, ep_size=4),
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> folder with a bf16 checkpoint in several files."""
    folders = {}

    def saved(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            model = unsharded(name, torch.bfloat16, **LAYERS, **TIED.get(name, {}))
            model.save_pretrained(folders[name], max_shard_size="60KB")
        return folders[name]

    return saved


def tensors(model):
    """Every parameter and every buffer, those that no checkpoint holds included."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {**named, **dict(model.named_buffers(remove_duplicate=False))}


def assert_equal(model, expected):
    got, wanted = tensors(model), tensors(expected)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].device == value.device, name
        assert torch.equal(got[name], value), name
        assert got[name].untyped_storage().nbytes() == value.numel() * value.element_size(), name
    assert {n for n, m in model.named_modules() if not m.training} == {n for n, _ in expected.named_modules()}
    sizes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert sizes == [(m.in_features, m.out_features) for m in expected.modules() if isinstance(m, torch.nn.Linear)]


# Every layout with a dense model and with attention and experts of its own, and every model with the last one.
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(
            name, layout, marks=[] if name in ("llama", "deepseek_v3") or layout is LAYOUTS[-1] else pytest.mark.slow
        )
        for name in NAMES
        for layout in LAYOUTS
    ],
    ids=str,
)
def test_every_rank_has_what_cutting_the_whole_model_gives(name, layout, checkpoints, as_rank):
    folder = checkpoints(name)
    assert len(list(folder.glob("*.safetensors"))) > 1
    for rank in range(layout.world_size):
        as_rank(rank, layout.world_size)
        whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model = hf.from_pretrained(folder, layout, progress=False)
        assert loading_of(model).whole_because == ""
        assert_equal(model, parallelize(whole, layout))
        tied = name in TIED
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_what_is_read_is_the_share(checkpoints, as_rank):
    layout = ParallelConfig(4, ep_size=4, moe_dense_tp_size=1)
    folder = checkpoints("qwen3_moe")
    as_rank(1, 4)
    model = hf.from_pretrained(folder, layout, progress=False)
    loading = loading_of(model)
    share = sum(p.nbytes for p in model.parameters())
    assert loading.read == share
    assert loading.total > 2.5 * share
    assert loading.seconds > 0


FLAGSHIP = ParallelConfig(4, 2, 1, 2)


def equal_on_two_ranks(folder, as_rank, layout=FLAGSHIP, read_in_slices=True, **kwargs):
    """Load and compare on a rank that is the first of its groups, and on one that is the last of other groups."""
    for rank in (0, 3):
        as_rank(rank, layout.world_size)
        whole = transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)
        model = hf.from_pretrained(folder, layout, progress=False, **kwargs)
        assert (loading_of(model).whole_because == "") == read_in_slices
        assert_equal(model, parallelize(whole, layout))
    return model


def rewrite(folder, change):
    """Replace a checkpoint by one file with other names or tensors."""
    from safetensors.torch import load_file, save_file

    held = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    save_file({k: v.contiguous() for k, v in change(held).items()}, folder / "model.safetensors", {"format": "pt"})


def test_a_dtype_is_honoured(checkpoints, as_rank):
    model = equal_on_two_ranks(checkpoints("llama"), as_rank, dtype=torch.float16)
    assert model.dtype == torch.float16


def test_a_pickled_checkpoint(tmp_path, as_rank):
    model = unsharded("llama", **LAYERS)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    equal_on_two_ranks(tmp_path, as_rank)


def test_the_checkpoint_of_a_model_without_its_head(tmp_path, as_rank):
    model = unsharded("llama", tie_word_embeddings=True, **LAYERS)
    model.save_pretrained(tmp_path)
    rewrite(
        tmp_path, lambda held: {k.removeprefix("model."): v for k, v in held.items() if not k.startswith("lm_head")}
    )
    equal_on_two_ranks(tmp_path, as_rank)


def test_experts_that_are_stacked_in_the_checkpoint(tmp_path, as_rank):
    unsharded("qwen3_moe", **LAYERS).save_pretrained(tmp_path)

    def stacked(held):
        assert any(".experts.3." in name for name in held), "transformers writes an expert a tensor"
        part = {k: v for k, v in held.items() if ".experts." not in k}
        for layer in range(3):
            prefix = f"model.layers.{layer}.mlp.experts"
            gate, up, down = (
                torch.stack([held[f"{prefix}.{e}.{name}.weight"] for e in range(4)])
                for name in ("gate_proj", "up_proj", "down_proj")
            )
            part.update({f"{prefix}.gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}.down_proj": down})
        return part

    rewrite(tmp_path, stacked)
    equal_on_two_ranks(tmp_path, as_rank, ParallelConfig(4, 2, 1, 2, ep_size=2))


@pytest.fixture
def fused_projections():
    """transformers learns that a checkpoint of Llama may hold q, k and v in one tensor, and gate and up in another."""
    from transformers import conversion_mapping as mapping
    from transformers.core_model_loading import Chunk, Split, WeightConverter

    fused = [
        WeightConverter("self_attn.qkv", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], [Split(dim=0)]),
        WeightConverter("mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)]),
    ]
    mapping.register_checkpoint_conversion_mapping("llama", fused)
    yield
    mapping.USER_REGISTERED_MAPPINGS.discard("llama")
    mapping._checkpoint_conversion_mapping_cache.pop("llama")


def test_a_conversion_that_slices_cannot_express_reads_whole_tensors(tmp_path, as_rank, fused_projections):
    unsharded("llama", **LAYERS).save_pretrained(tmp_path, save_original_format=False)

    def fused(held):
        part = {k: v for k, v in held.items() if "_proj.weight" not in k or "o_proj" in k or "down_proj" in k}
        for layer in range(3):
            attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            part[f"{attention}.qkv.weight"] = torch.cat([held[f"{attention}.{x}_proj.weight"] for x in "qkv"])
            part[f"{mlp}.gate_up.weight"] = torch.cat([held[f"{mlp}.{x}_proj.weight"] for x in ("gate", "up")])
        return part

    rewrite(tmp_path, fused)
    model = equal_on_two_ranks(tmp_path, as_rank)
    read, share = loading_of(model).read, sum(p.nbytes for p in model.parameters())
    layer = model.model.layers[0]
    whole_too = 3 * sum(getattr(layer.self_attn, f"{x}_proj").weight.nbytes for x in "qkv")
    whole_too += 3 * (layer.mlp.gate_proj.weight.nbytes + layer.mlp.up_proj.weight.nbytes)
    assert read == share + whole_too, "the fused tensors are read whole on each of two ranks, all others in parts"


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_an_fp8_checkpoint_is_unpacked_a_parameter_at_a_time(name, tmp_path, as_rank):
    """As DeepSeek-V3 is published: blocks of float8 with a scale each. Without a GPU for it transformers unpacks them."""
    unsharded(name, torch.bfloat16, **LAYERS).save_pretrained(tmp_path)

    def packed(held):
        part = {}
        for key, value in held.items():
            part[key] = value
            if "_proj" in key and value.dim() == 2:
                blocks = value.float().view(value.shape[0] // 8, 8, value.shape[1] // 8, 8)
                scale = blocks.abs().amax((1, 3)) / 448
                part[key] = (blocks / scale[:, None, :, None]).view(value.shape).to(torch.float8_e4m3fn)
                part[key.replace(".weight", ".weight_scale_inv")] = scale
        return part

    rewrite(tmp_path, packed)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = equal_on_two_ranks(tmp_path, as_rank, ParallelConfig(4, 2, 1, 2, ep_size=2))
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16


def test_a_name_on_the_hub_is_taken_from_its_cache(tmp_path, checkpoints, as_rank):
    commit = "0" * 40
    repository = tmp_path / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(checkpoints("llama"))
    equal_on_two_ranks("somebody/tiny", as_rank, cache_dir=str(tmp_path), local_files_only=True)


def test_one_device_for_all_is_read_in_slices(checkpoints, as_rank):
    equal_on_two_ranks(checkpoints("llama"), as_rank, device_map={"": "cpu"})


def test_a_missing_weight_is_initialized_and_reported_as_by_transformers(tmp_path, as_rank, monkeypatch):
    unsharded("llama", **LAYERS).save_pretrained(tmp_path)
    rewrite(
        tmp_path, lambda held: {k: v for k, v in held.items() if "layers.1.mlp.down_proj" not in k and "norm" not in k}
    )
    as_rank(3, 4)
    said = []
    logger = transformers.modeling_utils.logger
    monkeypatch.setattr(logger, "warning", lambda text, *_, **__: said.append(str(text)))
    model = hf.from_pretrained(tmp_path, FLAGSHIP, progress=False)
    assert any("layers.{0, 1, 2}.input_layernorm.weight" in text or "input_layernorm" in text for text in said)
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    assert model.model.layers[1].mlp.down_proj.weight.shape == (64, 64)


# -- what is loaded whole, and what is refused -----------------------------------------------------------------------


def assert_loaded_whole(folder, as_rank, reason, **kwargs):
    with pytest.warns(UserWarning, match=f"loads the whole model into host memory before it is cut: .*{reason}"):
        equal_on_two_ranks(folder, as_rank, read_in_slices=False, **kwargs)


def test_a_transformers_that_loads_in_another_way(checkpoints, as_rank, monkeypatch):
    folder = checkpoints("llama")
    monkeypatch.setattr(transformers_compat, "missing", lambda: "this transformers has no seam")
    assert_loaded_whole(folder, as_rank, "this transformers has no seam")


def test_several_devices(checkpoints, as_rank):
    as_rank(0, 4)
    places = {"model.embed_tokens": "cpu", "model.layers": "meta", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places["lm_head"] = "cpu"
    with pytest.warns(UserWarning, match="device_map spreads it over 2 places"):
        model = hf.from_pretrained(checkpoints("llama"), FLAGSHIP, progress=False, device_map=places)
    assert "2 places" in loading_of(model).whole_because


def test_arguments_that_contradict_the_sizes(checkpoints, as_rank):
    as_rank(0, 4)
    with pytest.raises(ConfigError, match="tp_plan contradicts the ParallelConfig, which says where weights lie"):
        hf.from_pretrained(checkpoints("llama"), FLAGSHIP, tp_plan="auto")


def test_packed_weights_are_refused_before_anything_is_read(checkpoints, as_rank, monkeypatch):
    from transformers import FineGrainedFP8Config
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)  # it asks for a GPU
    checkpoints("llama")
    as_rank(0, 4)
    with pytest.raises(
        ConfigError, match="quantization with fp8 makes packed weights, .* quantize each rank's part after"
    ):
        hf.from_pretrained(checkpoints("llama"), FLAGSHIP, quantization_config=FineGrainedFP8Config())


def test_an_unknown_architecture_is_refused_before_anything_is_read(tmp_path, as_rank):
    unsharded("phi", **LAYERS).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    as_rank(0, 4)
    with pytest.raises(ConfigError, match=r"PhiForCausalLM \(model_type='phi'\) cannot be parallelized"):
        hf.from_pretrained(tmp_path, FLAGSHIP)


def test_after_an_error_transformers_loads_as_before(tmp_path, checkpoints, as_rank):
    before = transformers.PreTrainedModel._load_pretrained_model
    as_rank(0, 4)
    with pytest.raises(OSError):
        hf.from_pretrained(tmp_path / "nowhere", FLAGSHIP)
    assert transformers.PreTrainedModel._load_pretrained_model is before
    whole = transformers.AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
    assert whole.model.layers[0].mlp.down_proj.weight.shape == (64, 128)


# -- what is shown ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "progress", "shown"), [(0, True, True), (0, False, False), (1, True, False)])
def test_rank_0_shows_progress_and_time(rank, progress, shown, checkpoints, as_rank, capfd):
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    folder = checkpoints("llama")
    as_rank(rank, 4)
    hf.from_pretrained(folder, FLAGSHIP, progress=progress)
    said = capfd.readouterr().err
    assert ("Loading weights" in said) == shown
    assert ("tpfuse: rank 0 of 4 read " in said) == shown
    assert logging.is_progress_bar_enabled() == enabled


def test_a_model_that_was_not_read_has_nothing_to_tell():
    with pytest.raises(ConfigError, match="LlamaForCausalLM was not read in slices"):
        loading_of(unsharded("llama"))
