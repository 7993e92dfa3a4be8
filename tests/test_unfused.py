"""One warning, with the remedy, when a tensor-parallel model ends up with nothing fused and nobody asked for that."""

from __future__ import annotations

import warnings

import graphs
import pytest
import torch
import torch.distributed as dist
from models import unsharded
from told import heard, start_fresh
from torch import nn

import tpfuse
from tpfuse import backend, hf

H = 32
AOT = {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all"}


@pytest.fixture(autouse=True)
def fresh():
    start_fresh(4)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


class Block(nn.Module):
    """A row-parallel product, its reduction, dropout, the residual sum and a norm."""

    def __init__(self, requires_grad=False, dropout=0.0):
        super().__init__()
        self.proj = nn.Linear(H, H, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.RMSNorm(H, eps=1e-5)
        self.requires_grad_(requires_grad)

    def forward(self, x, residual):
        return self.norm(residual + self.dropout(graphs.all_reduce(self.proj(x))))


def inputs():
    return torch.randn(2, 3, H), torch.randn(2, 3, H)


def warned(run):
    """The texts of our warnings that ``run`` gives."""
    with heard() as texts:
        run()
    return texts


def compiled(module, **options):
    return torch.compile(module, backend="tpfuse", options={**AOT, **{f"tpfuse.{k}": v for k, v in options.items()}})


def test_a_forgotten_no_grad_is_told_once_with_the_remedy():
    first, second = Block(requires_grad=True), Block(requires_grad=True)
    (text,) = warned(lambda: (compiled(first)(*inputs()), compiled(second)(*inputs())))
    assert "none of the 1 reductions of graph-" in text and "training 1" in text
    assert "torch.no_grad() or torch.inference_mode()" in text


@torch.no_grad()
def test_a_compile_that_the_comparison_of_ranks_ends_leaves_no_report_of_what_it_fused(monkeypatch):
    def silent(*_):
        raise backend.comparison.AgreementError("rank 1 did not compile the graph", (1,))

    monkeypatch.setattr(backend.comparison, "compare", silent)
    with pytest.raises(Exception, match="rank 1 did not compile the graph"):
        compiled(Block())(*inputs())
    assert tpfuse.reports() == []


@torch.no_grad()
def test_train_mode_with_dropout_says_eval():
    (text,) = warned(lambda: compiled(Block(dropout=0.1).train())(*inputs()))
    assert "dropout 1" in text and "model.eval()" in text


@torch.no_grad()
def test_a_strict_policy_names_the_policy_that_would_fuse():
    (text,) = warned(lambda: compiled(Block(), policy="strict")(*inputs()))
    assert "policy 1" in text and "policy='all'" in text


@pytest.mark.parametrize("options", [{"policy": "off"}, {"fuel": 0}], ids=str)
@torch.no_grad()
def test_who_asked_for_nothing_is_not_warned(options):
    assert warned(lambda: compiled(Block(), **options)(*inputs())) == []


@torch.no_grad()
def test_a_fused_graph_gives_no_warning_and_neither_do_later_graphs():
    def run():
        compiled(Block())(*inputs())
        compiled(lambda x: graphs.all_reduce(x).relu())(inputs()[0])

    assert warned(run) == []
    assert [len(r.fused) for r in tpfuse.reports()] == [1, 0]


@torch.no_grad()
def test_one_rank_and_a_graph_without_collectives_give_no_warning():
    graphs.start_fake_group(1)
    assert warned(lambda: compiled(Block())(*inputs())) == []
    dist.destroy_process_group()
    assert warned(lambda: compiled(lambda x: x.relu() + 1)(torch.ones(3))) == []


def test_the_warning_has_a_category_of_its_own():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=tpfuse.FusionWarning)
        compiled(Block(requires_grad=True))(*inputs())


class SequenceParallelBlock(nn.Module):
    """What sequence parallelism makes of a block: rows are scattered after the product and gathered after the norm."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(H, H, bias=False)
        self.norm = nn.RMSNorm(H, eps=1e-5)
        self.requires_grad_(False)

    def forward(self, x, residual):
        import torch.distributed._functional_collectives as functional

        scattered = functional.reduce_scatter_tensor(self.proj(x), "sum", 0, dist.group.WORLD)
        return functional.all_gather_tensor(self.norm(residual + scattered), 0, dist.group.WORLD)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@torch.no_grad()
def test_sequence_parallelism_is_fused_and_counted(inner):
    x, residual = torch.randn(8, H), torch.randn(2, H)
    assert warned(lambda: compiled(SequenceParallelBlock(), inner=inner)(x, residual)) == []
    (report,) = tpfuse.reports()
    assert (report.reduce_scatters, report.all_gathers) == (1, 1)
    assert [(s.fused, s.pattern) for s in report.sites] == [(True, "reduce_scatter+add+rms_norm+all_gather")]
    fused = "1 fused (1 gathered)"
    assert report.summary().endswith(f"1 reductions, {fused}, 0 kept, 1 reduce-scatters, 1 all-gathers")
    assert "1 reduce-scatters" in str(report) and "1 reduce-scatters" in report._repr_html_()
    assert tpfuse.GraphReport.from_json(report.to_json()) == report


@torch.no_grad()
def test_a_report_from_before_these_counts_reads_as_not_counted():
    compiled(Block())(*inputs())
    data = tpfuse.reports()[0].to_dict()
    del data["reduce_scatters"], data["all_gathers"]
    old = tpfuse.GraphReport.from_dict(data)
    assert (old.reduce_scatters, old.all_gathers) == (None, None)
    assert "reduce-scatters" not in old.summary()


@pytest.mark.parametrize("inner", ["aot_eager", "eager", "inductor"])
@torch.no_grad()
def test_an_option_without_its_prefix_is_named_with_it(inner):
    options = {"tpfuse.inner": inner, "policy": "all"}
    with pytest.raises(Exception, match="Did you mean 'tpfuse.policy'"):
        torch.compile(Block(), backend="tpfuse", options=options)(*inputs())


# -- transformers -------------------------------------------------------------------------------------------------------

PROMPT = {"input_ids": torch.arange(1, 6)[None], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
SHORT = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}


def tiny():
    return unsharded("llama", num_hidden_layers=1)


def test_generate_without_a_static_cache_is_told_once():
    model = hf.compile(tiny(), options=AOT)
    (text,) = warned(lambda: [model.generate(**PROMPT, **SHORT) for _ in range(2)])
    assert "cache_implementation='static'" in text
    assert tpfuse.reports() == []


def test_a_pipeline_without_a_static_cache_is_told():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = Tokenizer(models.WordLevel({"a": 3, "b": 4, "c": 5}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a")
    model = hf.compile(tiny(), options=AOT)
    generate = pipeline("text-generation", model=model._orig_mod, tokenizer=tokenizer)
    (text,) = warned(lambda: generate("a b c", max_new_tokens=2, do_sample=False))
    assert "a pipeline uses too" in text


@pytest.mark.long
def test_generate_with_a_static_cache_is_compiled_and_not_told():
    model = hf.compile(tiny(), options={**AOT, "tpfuse.policy": "off"})
    assert warned(lambda: model.generate(**PROMPT, **SHORT, cache_implementation="static")) == []
    assert tpfuse.reports()


def test_a_compile_config_of_the_users_own_on_a_cpu_is_told():
    from transformers import CompileConfig

    model = hf.compile(tiny(), options=AOT)
    config = CompileConfig(backend="tpfuse", mode=None, options=AOT)
    static = {"cache_implementation": "static", "compile_config": config}
    (text,) = warned(lambda: model.generate(**PROMPT, **SHORT, **static))
    assert "transformers compiles on accelerators only" in text and "tpfuse.hf.compile(model)" in text
    assert tpfuse.reports() == []


def test_who_switched_compiling_off_is_not_warned():
    model = hf.compile(tiny(), options=AOT)
    assert warned(lambda: model.generate(**PROMPT, **SHORT, disable_compile=True)) == []


class WideNorm(nn.Module):
    """A norm of columns of which each rank has some."""

    def forward(self, x):
        mean = graphs.all_reduce(x.pow(2).sum(-1, keepdim=True)) / (4 * H)
        return x * torch.rsqrt(mean + 1e-6)


@torch.no_grad()
def test_numbers_that_ranks_add_up_for_a_norm_are_no_missed_fusion():
    assert warned(lambda: compiled(WideNorm())(torch.randn(2, 3, H))) == []
    assert [site.reason for report in tpfuse.reports() for site in report.sites] == ["norm-statistics"]


@pytest.mark.parametrize(
    ("line", "over_ranks"),
    [
        ("torch.distributed.all_reduce(x)", True),
        ("dist.reduce(x, 0)", True),
        ("return _reduce(ctx, x)", True),
        ("functools.reduce(operator.add, parts)", False),
        ("x.scatter_reduce(0, index, src, 'sum')", False),
        ("x.index_reduce(0, index, src, 'mean')", False),
    ],
)
def test_what_looks_like_a_reduction_over_ranks_at_a_graph_break(line, over_ranks):
    from tpfuse import breaks

    assert (breaks.REDUCES.search(line) is not None) == over_ranks
