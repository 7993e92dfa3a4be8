"""Embedding and head, cut over the vocabulary among the ranks that hold the same rows."""

from __future__ import annotations

import copy

import pytest
import torch
from models import unsharded
from ranks import RankPool
from torch import nn

from tpfuse.parallel import ConfigError, ParallelConfig, gather_logits, layout_of, parallelize

LAYERS = {"num_hidden_layers": 1, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


@torch.no_grad()
def against_the_whole(rank, world_size, name, changes, config):
    """Embeddings and logits of the cut vocabulary beside those of the whole one under the same layout."""
    reference = unsharded(name, **{**LAYERS, **changes})
    whole = parallelize(copy.deepcopy(reference), config, vocabulary=False)
    cut = parallelize(copy.deepcopy(reference), config, vocabulary=True)
    part = parallelize(copy.deepcopy(reference), config, vocabulary=True, gather_logits=False)
    tokens = torch.arange(changes.get("vocab_size", 128)).view(2, -1) % reference.config.vocab_size
    wanted, got, local = whole(tokens, labels=tokens), cut(tokens, labels=tokens), part(tokens).logits
    own = layout_of(part).vocabulary.own
    prompt = {"input_ids": tokens[:, :3], "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    arguments = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    return {
        "embeddings": torch.equal(cut.model.embed_tokens(tokens), whole.model.embed_tokens(tokens)),
        "logits": ((got.logits - wanted.logits).abs().max() / wanted.logits.abs().max()).item(),
        "loss": abs(got.loss.item() - wanted.loss.item()),
        "local": torch.equal(local, got.logits[..., own.start : own.stop]),
        "gathered": torch.equal(gather_logits(part, local), got.logits),
        "tokens": cut.generate(**prompt, **arguments).tolist() == whole.generate(**prompt, **arguments).tolist(),
        "rows": cut.model.embed_tokens.weight.shape[0],
        "tied": cut.lm_head.weight is cut.model.embed_tokens.weight,
    }


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"vocab_size": 126, "tie_word_embeddings": True}),
        ("gemma3_text", {"tie_word_embeddings": True}),
        ("qwen3", {"vocab_size": 130}),
    ],
    ids=str,
)
def test_two_ranks_compute_what_one_does(pool, name, changes):
    size = changes.get("vocab_size", 128)
    for rank, found in enumerate(pool.run(against_the_whole, name, changes, ParallelConfig(2))):
        assert found["embeddings"]
        assert found["logits"] < 1e-6
        assert found["loss"] < 1e-5
        assert found["local"] and found["gathered"] and found["tokens"]
        assert found["rows"] == size // 2, rank
        assert found["tied"] == changes.get("tie_word_embeddings", False)


@torch.no_grad()
def odd_sizes(rank, world_size, size):
    """A vocabulary that does not divide: the last rank has less."""
    config = ParallelConfig(2)
    reference = unsharded("llama", vocab_size=size, **LAYERS)
    model = parallelize(copy.deepcopy(reference), config)
    tokens = torch.arange(size)[None]
    wanted = reference(tokens).logits
    shape = tuple(model.model.embed_tokens.weight.shape)
    return (
        shape,
        tuple(model(tokens).logits.shape),
        ((model(tokens).logits - wanted).abs().max() / wanted.abs().max()).item(),
    )


@pytest.mark.ranks
def test_a_vocabulary_that_does_not_divide(pool):
    results = pool.run(odd_sizes, 127)
    assert [shape for shape, _, _ in results] == [(64, 64), (63, 64)]
    for _, logits, difference in results:
        assert logits == (1, 127, 127)
        assert difference < 1e-5


@torch.no_grad()
def tokens_outside(rank, world_size):
    model = parallelize(unsharded("llama", **LAYERS), ParallelConfig(2))
    messages = []
    for token in (128, -1):
        with pytest.raises(IndexError) as raised:
            model.model.embed_tokens(torch.tensor([[token]]))
        messages.append(str(raised.value))
    return messages


@pytest.mark.ranks
def test_a_token_outside_the_vocabulary_is_an_error_on_every_rank(pool):
    assert pool.run(tokens_outside) == [["index out of range in self"] * 2] * 2


@pytest.mark.parametrize(
    ("layout", "ranks", "own"),
    [
        (ParallelConfig(4), (0, 1, 2, 3), range(96, 128)),
        (ParallelConfig(4, 2, 1, 2), (2, 3), range(64, 128)),
        (ParallelConfig(4, 2, 1, 4), (2, 3), range(64, 128)),  # the MLP spans replicas, the tokens do not
        (ParallelConfig(4, 4, 1, 1), (3,), range(128)),
    ],
    ids=str,
)
def test_it_is_cut_over_the_ranks_that_hold_the_same_rows(layout, ranks, own, as_rank):
    as_rank(3, 4)
    reference = unsharded("llama", **LAYERS)
    vocabulary = layout_of(parallelize(copy.deepcopy(reference), layout)).vocabulary
    assert (vocabulary.ranks, vocabulary.own, vocabulary.size) == (ranks, own, 128)
    assert bool(vocabulary.whole_because) == (len(ranks) == 1)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * x.shape[-1] ** -0.5


def renormalizing(model):
    model.model.embed_tokens.max_norm = 1.0


def another_head(model):
    model.lm_head = Scaled(64, 128, bias=False)


def longer_head(model):
    model.lm_head = nn.Linear(64, 130, bias=False)


def patched(model):
    model.model.embed_tokens.forward = lambda ids: torch.zeros(*ids.shape, 64)


def quantized(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (renormalizing, "the embedding renormalizes its rows"),
        (another_head, "the head is Scaled, not an nn.Linear"),
        (longer_head, "the embedding has 128 tokens and the head 130"),
        (patched, "the forward of Embedding was replaced"),
        (quantized, "the weight of Linear is torch.int8"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_where_it_would_change_a_result_it_stays_whole_and_says_why(change, reason, as_rank):
    as_rank(0, 2)
    model = unsharded("llama", **LAYERS)
    change(model)
    other = copy.deepcopy(model)
    embedding, head = model.model.embed_tokens.weight.clone(), model.lm_head.weight.clone()
    vocabulary = layout_of(parallelize(model, ParallelConfig(2))).vocabulary
    assert reason in vocabulary.whole_because
    assert torch.equal(model.model.embed_tokens.weight, embedding) and torch.equal(model.lm_head.weight, head)
    with pytest.raises(ConfigError, match=r"cannot be cut over attn_tp \[0, 1\]: .*pass vocabulary=None"):
        parallelize(other, ParallelConfig(2), vocabulary=True)
    assert other.model.layers[0].self_attn.q_proj.weight.shape == (64, 64), "an error leaves the model as it was"


def test_more_ranks_than_rows_of_the_vocabulary_leave_it_whole(as_rank):
    as_rank(3, 4)
    vocabulary = layout_of(parallelize(unsharded("llama", vocab_size=5, **LAYERS), ParallelConfig(4))).vocabulary
    assert vocabulary.whole_because == "5 tokens leave a rank of 4 without any"
