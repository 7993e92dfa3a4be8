"""What a user of tpfuse.hf, or of the pass alone, gets wrong is told at once, with what is valid and what to do."""

from __future__ import annotations

import warnings

import graphs
import pytest
import torch.distributed as dist
from models import save, unsharded

import tpfuse
from tpfuse import hf, unfused
from tpfuse.backend import graph_pass
from tpfuse.parallel import ParallelConfig, build_groups

ONE_LAYER = {"num_hidden_layers": 1}


def told(model, **kwargs) -> list[str]:
    """The texts of the warnings of ours that compiling gives."""
    unfused.forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hf.compile(model, **kwargs)
    return [str(w.message) for w in caught if issubclass(w.category, tpfuse.FusionWarning)]


@pytest.fixture
def four_ranks():
    graphs.start_fake_group(4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("config", [2, {"tp_size": 2}, None])
@pytest.mark.parametrize("call", [hf.from_pretrained, hf.parallelize, lambda _, config: build_groups(config)])
def test_sizes_of_another_kind(call, config):
    model = unsharded("llama", **ONE_LAYER) if call is hf.parallelize else "folder"
    with pytest.raises(TypeError, match=r"give a tpfuse.parallel.ParallelConfig, e.g. ParallelConfig\(tp_size=2\)"):
        call(model, config)


@pytest.mark.parametrize("path", ["/absent/model", "./absent", "~/absent", "absent/model/folder"])
def test_a_folder_that_is_not_there_is_no_question_to_the_hub(path):
    with pytest.raises(
        FileNotFoundError, match=f"{path} does not exist.*config.json and weights, or a name on the Hub"
    ):
        hf.from_pretrained(path, ParallelConfig(1))


@pytest.mark.parametrize("call", [hf.compile, lambda model: hf.parallelize(model, ParallelConfig(2))])
def test_a_name_instead_of_a_model(call):
    with pytest.raises(TypeError, match=r"the model is 'llama', of type str; give a transformers model"):
        call("llama")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"options": {"tpfuse.polcy": "all"}}, "Did you mean 'tpfuse.policy'"),
        ({"options": {"tpfuse.policy": "some"}}, "shared, strict, all, off"),
        ({"mode": "reduce_overhead"}, "mode='reduce_overhead' is not valid; .* Did you mean 'reduce-overhead'"),
    ],
)
def test_a_wrong_option_is_an_error_of_compile_and_not_of_the_first_call(arguments, said):
    with pytest.raises(tpfuse.OptionError, match=said):
        hf.compile(unsharded("llama", **ONE_LAYER), **arguments)


def test_a_model_that_nobody_cut_is_told_where_there_are_several_ranks(four_ranks):
    (text,) = told(unsharded("llama", **ONE_LAYER))
    assert "not cut over the 4 ranks" in text and "tpfuse.hf.from_pretrained(path, ParallelConfig(tp_size=...))" in text


def test_a_whole_model_that_was_asked_for_is_not_told(four_ranks, tmp_path):
    save("llama", str(tmp_path), **ONE_LAYER)
    assert told(hf.from_pretrained(str(tmp_path), ParallelConfig(1))) == []
    assert told(unsharded("llama", **ONE_LAYER), options={"tpfuse.policy": "off"}) == []


def test_a_cut_model_and_a_single_rank_are_not_told():
    assert told(unsharded("llama", **ONE_LAYER)) == []
    graphs.start_fake_group(2)
    try:
        assert told(hf.parallelize(unsharded("llama", **ONE_LAYER), ParallelConfig(2))) == []
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "all"}, r"takes tpfuse.\* keys only.*given policy. Did you mean 'tpfuse.policy'"),
        ({"tpfuse.polcy": "all"}, "unknown option 'tpfuse.polcy'"),
    ],
)
def test_the_pass_alone_refuses_options_that_nobody_would_read(options, said):
    with pytest.raises(tpfuse.OptionError, match=said):
        graph_pass(options)
