"""What a model that parallelize has cut refuses, and what a copy of it does."""

import copy
import os

import pytest
import torch
from models import unsharded
from ranks import RankPool

from tpfuse.parallel import ConfigError, ParallelConfig, build_groups, parallelize

pytestmark = pytest.mark.ranks
TOKENS = torch.tensor([[3, 4, 5]])


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


def cut(config=None, **kwargs):
    return parallelize(unsharded("llama", num_hidden_layers=1), config or ParallelConfig(2), **kwargs)


def _one_rank(folder, rank):
    """A layout of one rank cuts nothing. Both ranks make the group of each, in one order."""
    models = [
        cut(ParallelConfig(1), ranks=[member]) if member == rank else build_groups(ParallelConfig(1), [member])
        for member in (0, 1)
    ]
    models[rank].save_pretrained(os.path.join(folder, f"one{rank}"))


def said(call):
    try:
        call()
    except ConfigError as error:
        return str(error)
    return "nothing was raised"


@torch.no_grad()
def refusals(rank, world_size, folder):
    model = cut()
    model.save_pretrained(os.path.join(folder, f"own{rank}"), state_dict=dict(model.state_dict()))
    return {
        "save": said(lambda: model.save_pretrained(os.path.join(folder, f"whole{rank}"))),
        "resize": said(lambda: model.resize_token_embeddings(130)),
        "asks only": model.resize_token_embeddings() is model.get_input_embeddings(),
        "files": sorted(name for name in os.listdir(folder) if name.endswith(str(rank))),
        "whole vocabulary": cut(vocabulary=False).resize_token_embeddings(130).num_embeddings,
        "layer": said(lambda: model.model.layers[0](torch.zeros(1, 2, 64))),
        "one rank": said(lambda: _one_rank(folder, rank)),
    }


def test_what_would_take_a_part_for_the_whole_is_refused(pool, tmp_path):
    for rank, found in enumerate(pool.run(refusals, str(tmp_path))):
        assert "part of the weights of LlamaForCausalLM" in found["save"]
        assert "Resize before parallelize" in found["resize"]
        assert found["asks only"]
        assert found["files"] == [f"own{rank}"]  # nothing was written for the refused call
        assert found["whole vocabulary"] == 130
        assert "layer 0 was called by itself" in found["layer"]
        assert found["one rank"] == "nothing was raised"


def gradients(rank, world_size):
    model = cut()
    model.requires_grad_(True)
    loss = model(TOKENS, labels=TOKENS).loss  # a forward alone is as right as ever
    return float(loss.detach()), said(loss.backward)


def test_a_backward_pass_says_that_its_gradients_would_be_wrong(pool):
    whole = unsharded("llama", num_hidden_layers=1)
    for loss, text in pool.run(gradients):
        assert loss == pytest.approx(float(whole(TOKENS, labels=TOKENS).loss.detach()), rel=1e-5)
        assert "for inference" in text


@torch.no_grad()
def copied(rank, world_size):
    model = cut()
    other = copy.deepcopy(model)
    same = torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    for parameter in model.parameters():
        parameter.zero_()
    return same, bool(other(TOKENS).logits.any()), said(lambda: other.save_pretrained("nowhere"))


def test_a_copy_has_weights_of_its_own_and_refuses_the_same(pool):
    for same, own, text in pool.run(copied):
        assert same
        assert own
        assert "part of the weights" in text
