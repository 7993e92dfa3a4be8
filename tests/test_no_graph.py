"""Functions of which Dynamo makes no graph, and transforms of ``torch.func``: results are right, and users are told."""

from __future__ import annotations

import subprocess
import sys
import warnings

import graphs
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from told import heard, start_fresh
from torch import nn

import tpfuse
from tpfuse import no_graph

H = 32
AOT = {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all"}


@pytest.fixture
def fresh():
    start_fresh(2)
    no_graph.watch()  # a reset takes every hook away
    yield
    tpfuse.clear_reports()
    if dist.is_initialized():
        dist.destroy_process_group()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.norm = nn.Linear(H, H), nn.RMSNorm(H)
        self.requires_grad_(False)

    def forward(self, x, residual):
        return self.norm(residual + graphs.all_reduce(self.proj(x)))


def inputs():
    return torch.randn(3, 5, H), torch.randn(3, 5, H)


def told(run):
    with heard() as texts:
        run()
    return texts


def compiled(f, **kw):
    return torch.compile(f, backend="tpfuse", options=AOT, **kw)


def loop(x):
    """Dynamo breaks inside of the loop, cannot go on from there and leaves the function to eager."""
    for _ in range(2):
        torch._dynamo.graph_break()
        x = x.sin()
    return x


# -- no graph ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [lambda b: compiled(torch.vmap(b)), lambda b: torch.vmap(compiled(b))], ids=["in", "out"]
)
def test_a_module_under_vmap_is_told_at_once_with_its_name(fresh, how):
    """``torch.vmap`` asks a module for its ``repr``, which Dynamo cannot trace, and then calls the model from eager code."""
    (text,) = told(lambda: how(Block())(*inputs()))
    line = Block.forward.__code__.co_firstlineno
    assert f"forward ({__file__}:{line}) is called by a transform of torch.func" in text
    assert "the whole batch in one call" in text
    assert told(tpfuse.reports) == [], "it has been told"
    assert tpfuse.reports() == []


def test_who_made_the_warning_an_error_gets_it_with_the_reports(fresh):
    """Raised in Dynamo's hook it would leave Dynamo's own count of compiles wrong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=tpfuse.FusionWarning)
        compiled(torch.vmap(Block()))(*inputs())
        with pytest.raises(tpfuse.FusionWarning, match="called by a transform of torch.func"):
            tpfuse.reports()


def test_who_asks_for_reports_is_told_why_there_are_none(fresh):
    assert told(lambda: compiled(loop)(torch.ones(2))) == [], "another function may still get a graph"
    (text,) = told(tpfuse.reports)
    assert f"loop ({__file__}:" in text and "graph_break" in text and "fullgraph=True" in text
    assert told(tpfuse.reports) == []


def test_expect_says_what_dynamo_left_to_eager(fresh):
    with pytest.raises(tpfuse.FusionMismatch, match=r"Dynamo left to eager: loop \(.*test_no_graph.py:\d+\)"):
        with tpfuse.expect(fused=1):
            compiled(loop)(torch.ones(2))


@torch.no_grad()
def test_a_graph_that_comes_later_is_enough(fresh):
    def run():
        compiled(loop)(torch.ones(2))
        compiled(Block())(*inputs())
        assert len(tpfuse.reports()) == 1

    assert told(run) == []


def test_other_backends_and_errors_are_none_of_our_business(fresh):
    def run():
        torch.compile(loop, backend="eager")(torch.ones(2))
        torch._dynamo.reset()  # the loop is known as one that is left alone
        no_graph.watch()
        with pytest.raises(Exception, match="graph_break"):
            compiled(loop, fullgraph=True)(torch.ones(3))
        tpfuse.reports()

    assert told(run) == []


def test_one_process_is_not_told(fresh):
    graphs.start_fake_group(1)
    assert told(lambda: (compiled(loop)(torch.ones(2)), tpfuse.reports())) == []


def test_what_goes_wrong_in_the_hook_breaks_no_compile(fresh, monkeypatch):
    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(no_graph.compat, "given_up", broken)
    with torch.no_grad():
        compiled(Block())(*inputs())
    assert len(tpfuse.reports()) == 1


SCRIPT = """
import torch
from tpfuse import compat
compat.start_fake_group(2)
def loop(x):
    for _ in range(2):
        torch._dynamo.graph_break()
        x = x.sin()
    return x
torch.compile(loop, backend="tpfuse")(torch.ones(2))
torch.distributed.destroy_process_group()
"""


@pytest.mark.long
def test_a_program_that_never_asks_is_told_at_its_end():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("FusionWarning") == 1
    assert "Dynamo left to eager what torch.compile(backend='tpfuse') was given" in done.stderr


# -- transforms that Dynamo traces ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@torch.no_grad()
def test_vmap_of_a_function_reduces_each_example_and_is_told_so(fresh, inner):
    block = Block()
    step = torch.compile(
        lambda x, r: torch.vmap(lambda x, r: block(x, r))(x, r),
        backend="tpfuse",
        options={**AOT, "tpfuse.inner": inner},
    )
    (text,) = told(lambda: step(*inputs()))
    (report,) = tpfuse.reports()
    assert [site.reason for site in report.sites] == ["rows-move"] * 3
    assert "puts 3 sums side by side before they have been waited for" in text and "on the whole batch" in text


def transforms(rank, world_size):
    """(transform, equal to eager, fused sites) of each transform that is right in eager mode, over real ranks.

    ``torch.vmap`` is not: it copies a sum before it waits for it (torch 2.11, 2.13).
    """
    import tpfuse

    torch.manual_seed(rank)
    block = Block()
    torch.manual_seed(7)
    x, r = inputs()
    state = {name: p * 2 for name, p in block.named_parameters()}
    cases = {
        "functional_call": lambda x, r: torch.func.functional_call(block, state, (x, r)),
        "jvp": lambda x, r: torch.func.jvp(block, (x, r), (x * 2, r * 3)),
    }
    found = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, step in cases.items():
            torch._dynamo.reset()
            tpfuse.clear_reports()
            wanted, got = step(x, r), torch.compile(step, backend="tpfuse", options=AOT)(x, r)
            found.append((name, graphs.equal(wanted, got), sum(len(report.fused) for report in tpfuse.reports())))
    return found


@pytest.mark.ranks
def test_transforms_give_the_results_of_eager_mode_on_ranks():
    wanted = [("functional_call", True, 1), ("jvp", True, 1)]
    assert run_ranks(transforms, 2, timeout=200) == [wanted] * 2
