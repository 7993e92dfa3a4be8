"""One canary for each private name of transformers that loading touches: when a release moves one, its test names it.

Where one is missing, models are loaded whole and then cut (tests/test_load.py); here it is an error.
"""

from __future__ import annotations

import inspect
import threading

import models
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra tpfuse[hf]")

from tpfuse.load import transformers_compat as compat  # noqa: E402


def converter(sources, targets, *operations):
    from transformers.core_model_loading import WeightConverter

    return WeightConverter(sources, targets, list(operations))


def test_every_name_has_a_canary():
    functions = [name for name, value in vars(compat).items() if inspect.isfunction(value) and not name.startswith("_")]
    own = [name for name in functions if getattr(compat, name).__module__ == compat.__name__]
    assert len(own) >= 7
    assert [name for name in own if f"test_{name}" not in globals()] == []


def test_missing(monkeypatch):
    assert compat.missing() == ""
    monkeypatch.setattr(transformers.PreTrainedModel, "_load_pretrained_model", lambda model, files: None)
    assert "loads in another way (PreTrainedModel._load_pretrained_model)" in compat.missing()
    monkeypatch.undo()
    monkeypatch.setattr("transformers.core_model_loading.rename_source_key", lambda key: key)
    assert "renames in another way" in compat.missing()
    monkeypatch.undo()
    monkeypatch.delattr("transformers.core_model_loading.MergeModulelist")
    assert compat.missing().endswith("has no core_model_loading.MergeModulelist")


def test_loading_through(tmp_path):
    model = transformers.LlamaForCausalLM(models.config("llama"))
    model.save_pretrained(tmp_path)
    seen = []

    def load(original, model, state_dict, files, load_config, *rest):
        seen.append((next(model.parameters()).device.type, state_dict, len(files), load_config.dtype))
        assert {"hf_quantizer", "device_map", "weight_mapping", "weights_only"} <= set(vars(load_config))
        return original(model, state_dict, files, load_config, *rest)

    def from_pretrained(dtype):
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)

    with compat.loading_through(load):
        loaded = from_pretrained(torch.bfloat16)
        other = threading.Thread(target=from_pretrained, args=(torch.float16,))
        other.start()
        other.join()
    from_pretrained(torch.float32)
    assert seen == [("meta", None, 1, torch.bfloat16)], "one call, of this thread, with an empty model and its files"
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())


def test_converters_of():
    from transformers.core_model_loading import Chunk, WeightRenaming

    chunk = converter("qkv", ["q", "k"], Chunk(0))
    assert compat.converters_of([WeightRenaming("a", "b"), chunk]) == [chunk]
    assert compat.converters_of(None) == []


def test_targets():
    from transformers.core_model_loading import MergeModulelist, WeightRenaming

    mapping = [
        WeightRenaming(".block.", ".mlp."),
        converter("experts.*.w2.weight", "experts.down_proj", MergeModulelist(0)),
    ]
    keys = [f"layers.0.block.experts.{e}.w2.weight" for e in (10, 2)] + ["norm.weight", "nobody.knows"]
    found = list(
        compat.targets(
            keys, mapping, "model", dict.fromkeys(["model.layers.0.mlp.experts.down_proj", "model.norm.weight"], 0)
        )
    )
    experts = ("model.layers.0.mlp.experts.down_proj", "experts.*.w2.weight")
    assert [key for key, *_ in found] == [keys[1], keys[0], "norm.weight"], "experts come in the order of their numbers"
    assert [name for _, name, _ in found] == [experts[0]] * 2 + ["model.norm.weight"]
    assert [pattern for *_, pattern in found][2] is None


def test_merges_experts():
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    gate_up = (["e.*.gate", "e.*.up"], "e.gate_up")
    assert compat.merges_experts(converter(*gate_up, MergeModulelist(0), Concatenate(1)))
    assert compat.merges_experts(converter("e.*.down", "e.down", MergeModulelist(0)))
    assert not compat.merges_experts(converter(*gate_up, MergeModulelist(0), Concatenate(0)))
    assert not compat.merges_experts(converter("e.*.down", "e.down", MergeModulelist(0), Transpose(1, 2)))


def test_conversion_base():
    assert issubclass(compat.conversion_base(), object)
    assert {"convert"} <= set(compat.conversion_base().__abstractmethods__)


def test_whole_files(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "one.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "two.bin")
    tensors = compat.whole_files([str(tmp_path / "one.bin"), str(tmp_path / "two.bin")], weights_only=True)
    assert {name: value.tolist() for name, value in tensors.items()} == {"a": [1, 1, 1], "b": [0, 0]}
