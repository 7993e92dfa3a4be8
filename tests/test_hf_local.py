"""Plain local parameters in the place of transformers' DTensors: the same results, the same checkpoints."""

import copy
import os
import warnings

import pytest
import torch
from models import MODELS, save, sharded, unsharded
from ranks import RankPool
from safetensors.torch import load_file
from torch import nn

import tpfuse
from tpfuse import hf
from tpfuse.unfused import FusionWarning

LAYERS = {"num_hidden_layers": 2, "initializer_range": 0.2}
# The fast ones between them have every style of transformers: embeddings, rows, columns, gathered and packed columns, experts,
# norms of single heads, latent attention. What stays for the nightly run differs in sizes and in the order of norms.
FAST = ("deepseek_v3", "llama", "phi3", "qwen3_moe")
ALL = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in sorted(MODELS)]
TOKENS = torch.arange(1, 9).view(2, 4)

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def alone():
    """One rank, whose sums are its own."""
    with RankPool(2, alone=True) as pool:
        yield pool


def dtensors(model):
    from torch.distributed.tensor import DTensor

    return [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]


def whole(state):
    """Whole tensors; this rank's share where parts are interleaved, which torch 2.11 cannot put together."""
    from torch.distributed.tensor import DTensor

    def of(value):
        if not isinstance(value, DTensor):
            return value
        plain = all(placement.is_shard() or placement.is_replicate() for placement in value.placements)
        return value.full_tensor() if plain else value.to_local()

    return {key: of(value).clone() for key, value in state.items()}


def localized(model):
    """What ``localize`` says on the way."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        hf.localize(model)
    return [str(one.message) for one in told if one.category is FusionWarning]


@torch.no_grad()
def logits_and_state(rank, world_size, folder):
    from torch.distributed.tensor import DTensor

    model = sharded(folder, world_size)
    wrapped, expected, before = dtensors(model), model(TOKENS).logits, model.state_dict()
    kinds, values = {key: type(value) for key, value in before.items()}, whole(before)
    told = localized(model)
    after = model.state_dict()
    return {
        "wrapped": len(wrapped),
        "left": dtensors(model),
        "told": told,
        "equal": torch.equal(model(TOKENS).logits, expected),
        "kinds": {key: type(value) for key, value in after.items()} == kinds,
        "layout": all(
            before[key].placements == after[key].placements and before[key].stride() == after[key].stride()
            for key in before
            if isinstance(before[key], DTensor)
        ),
        "values": all(torch.equal(value, values[key]) for key, value in whole(after).items()),
    }


@pytest.mark.parametrize("name", ALL)
def test_every_architecture_is_equal_bit_for_bit_without_a_wrapper(pool, tmp_path, name):
    save(name, str(tmp_path), **LAYERS)
    for found in pool.run(logits_and_state, str(tmp_path)):
        assert found.pop("wrapped") > 0
        assert found == {"left": [], "told": [], "equal": True, "kinds": True, "layout": True, "values": True}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),  # a row's bias is added once, after the sum
        ("llama", {"vocab_size": 127}),  # ranks hold different shares of embedding and head
        ("llama", {"tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_biases_uneven_shares_and_tied_weights(pool, tmp_path, name, changes):
    save(name, str(tmp_path), **LAYERS, **changes)
    for found in pool.run(logits_and_state, str(tmp_path)):
        assert found.pop("wrapped") > 0
        assert found == {"left": [], "told": [], "equal": True, "kinds": True, "layout": True, "values": True}


@torch.no_grad()
def saved_and_loaded(rank, world_size, folder, out):
    """Checkpoints of a model before and after; and what loads into it again."""
    from torch.distributed.tensor import DTensor

    model = sharded(folder, world_size)
    model.save_pretrained(os.path.join(out, "before"))
    expected, state = model(TOKENS).logits, model.state_dict()
    hf.localize(model)
    model.save_pretrained(os.path.join(out, "after"))
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    equal = []
    # As DTensors, as whole tensors, and as this rank's shares.
    shares = {k: (v.to_local() if isinstance(v, DTensor) else v).clone() for k, v in state.items()}
    for given in ({k: v.clone() for k, v in state.items()}, whole(state), shares):
        for parameter in model.parameters():
            parameter.zero_()
        model.load_state_dict(given)
        equal.append(torch.equal(model(TOKENS).logits, expected))
    return equal, dtensors(model), tied


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_are_the_ones_of_before(pool, tmp_path, tied):
    save("llama", str(tmp_path / "model"), **LAYERS, tie_word_embeddings=tied)
    for equal, left, shared in pool.run(saved_and_loaded, str(tmp_path / "model"), str(tmp_path)):
        assert equal == [True, True, True]
        assert left == []
        assert shared == tied
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@torch.no_grad()
def copied(rank, world_size, folder):
    model = sharded(folder, world_size)
    hf.localize(model)
    expected = model(TOKENS).logits
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    return torch.equal(other(TOKENS).logits, expected)


def test_a_copy_computes_with_its_own_weights(pool, tmp_path):
    save("llama", str(tmp_path), **LAYERS)
    assert pool.run(copied, str(tmp_path)) == [True, True]


@torch.no_grad()
def partly_known(rank, world_size, folder):
    """A style, a class and a wrapper that nobody knows, one each; the rest is converted."""
    from transformers.distributed.tensor_parallel import RowwiseParallel

    class OtherParallel(RowwiseParallel):
        pass

    class OtherLinear(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model = sharded(folder, world_size)
    first, second = model.model.layers
    held = first.mlp.down_proj.forward.__closure__
    style = next(cell for cell in held if isinstance(cell.cell_contents, RowwiseParallel))
    original, style.cell_contents = style.cell_contents, OtherParallel()
    style.cell_contents.__dict__.update(original.__dict__)
    second.mlp.up_proj.__class__ = OtherLinear
    wrapped = second.self_attn.o_proj.forward
    second.self_attn.o_proj.forward = lambda *args, **kwargs: wrapped(*args, **kwargs)
    expected = model(TOKENS).logits
    (told,) = localized(model)
    return told, dtensors(model), torch.equal(model(TOKENS).logits, expected)


def test_what_is_not_known_stays_and_is_named(pool, tmp_path):
    save("llama", str(tmp_path), **LAYERS)
    for told, left, equal in pool.run(partly_known, str(tmp_path)):
        assert equal
        assert left == [
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.1.self_attn.o_proj.weight",
            "model.layers.1.mlp.up_proj.weight",
        ]
        assert "model.layers.0.mlp.down_proj: the style OtherParallel is not known" in told
        assert "model.layers.1.self_attn.o_proj: its forward was replaced by partly_known.<locals>.<lambda>" in told
        assert "model.layers.1.mlp.up_proj: something else replaced its forward before the style did" in told


def in_training(rank, world_size, folder):
    model = sharded(folder, world_size).train()
    (told,) = localized(model)
    return told, len(dtensors(model))


def test_a_model_in_training_mode_stays(pool, tmp_path):
    save("llama", str(tmp_path), **LAYERS)
    for told, left in pool.run(in_training, str(tmp_path)):
        assert "training mode; call model.eval()" in told
        assert left > 0


@torch.no_grad()
def reported(rank, world_size, folder):
    """The notes of a graph with wrappers, and of one without."""
    model, notes = sharded(folder, world_size), []
    for _ in range(2):
        torch._dynamo.reset()
        tpfuse.clear_reports()
        torch.compile(model, backend="tpfuse", options={"tpfuse.inner": "aot_eager"})(TOKENS)
        (report,) = tpfuse.reports()
        notes.append((report.notes, len(report.fused), str(report)))
        hf.localize(model)
    return notes


def test_the_report_says_what_wrappers_cost(alone, tmp_path):
    save("llama", str(tmp_path), **{**LAYERS, "num_hidden_layers": 1})
    for (wrapped, fused, text), (plain, fused_plain, _) in alone.run(reported, str(tmp_path)):
        (note,) = wrapped
        assert note.startswith("9 inputs are DTensors, which are unwrapped on every call")
        assert "tpfuse.hf.compile(model)" in note
        assert note[:40] in text
        assert plain == []
        assert fused == fused_plain == 3


def test_a_model_without_wrappers_is_left_alone():
    model = unsharded("llama", **LAYERS)
    forwards = [module.forward for module in model.modules()]
    assert hf.localize(model) == 0
    assert [module.forward for module in model.modules()] == forwards
