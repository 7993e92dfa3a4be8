"""The vLLM plugin, with stand-ins for vLLM's operators: no vLLM is installed where these tests run.

``tests/matrix/vllm_engine.py`` runs the real engine: ``make test-vllm``.
"""

from __future__ import annotations

import copy
import logging
import operator
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import layers
import pytest
import torch
import torch.distributed as dist
from commands import run_python
from graphs import start_fake_group
from ranks import RankPool
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from tpfuse.passes import quantizers
from vllm_operators import EPS, GROUP, define_operators, provider, provider_of, world

import tpfuse
from tpfuse import compat
from tpfuse.engines import vllm, vllm_compat, vllm_norms, vllm_reports
from tpfuse.inspect import load

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch):
    """What the plugin asks of vLLM, answered without it; and nothing left for the next test."""
    define_operators()
    monkeypatch.setattr(vllm_compat, "all_reduce", lambda: torch.ops.vllm.all_reduce)
    monkeypatch.setattr(vllm_compat, "norm_provider", provider_of)
    monkeypatch.setitem(provider, "now", "native")
    monkeypatch.setattr(vllm, "_told", set())
    monkeypatch.setattr(vllm, "_recorder", vllm._Recorder())
    monkeypatch.setattr(vllm, "_watch", lambda: None)
    yield
    tpfuse.passes.collectives.unregister_collective(torch.ops.vllm.all_reduce)


# -- in Inductor, on two ranks ------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """vLLM's layer structure: the residual is passed along beside the hidden states, each norm takes both."""

    def __init__(self, n_layers: int, ir: bool, weights: str, rank: int) -> None:
        super().__init__()
        same, own = torch.Generator().manual_seed(2), torch.Generator().manual_seed(10 + rank)
        self.ir, self.weights = ir, weights
        # Each rank's own slice of the row-parallel weights.
        self.rows = nn.ParameterList(
            torch.randn(layers.HIDDEN, layers.HIDDEN, generator=own) / 8 for _ in range(2 * n_layers)
        )
        self.norms = nn.ParameterList(torch.rand(layers.HIDDEN, generator=same) + 0.5 for _ in range(2 * n_layers + 1))
        self.to(torch.bfloat16).requires_grad_(False)

    def norm(self, x: Tensor, residual: Tensor | None, weight: Any) -> tuple[Tensor, Tensor]:
        weight = {"own": weight, "gemma": weight.float() + 1.0, "none": None}[self.weights]
        if residual is None:
            if self.ir:
                return torch.ops.vllm_ir.rms_norm(x, weight, EPS), x
            out = torch.empty_like(x)
            torch.ops._C.rms_norm(out, x, weight, EPS)
            return out, x
        if self.ir:
            return torch.ops.vllm_ir.fused_add_rms_norm(x, residual, weight, EPS)
        torch.ops._C.fused_add_rms_norm(x, residual, weight, EPS)
        return x, residual

    def forward(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        # The vocabulary is sharded: the embedding is a reduction too, and the first norm reads it.
        hidden, residual = torch.ops.vllm.all_reduce(embedded, GROUP), None
        for weight, row in zip(self.norms, self.rows, strict=False):
            hidden, residual = self.norm(hidden, residual, weight)
            hidden = torch.ops.vllm.all_reduce(F.linear(F.silu(hidden), row), GROUP)
        return self.norm(hidden, residual, self.norms[len(self.rows)])


def compile_as_vllm_does(
    rank: int, world_size: int, ir: bool, weights: str, lowered_to: str = "native", fuel: int | None = None
) -> dict[str, Any]:
    define_operators()
    from torch._inductor import config

    provider["now"] = lowered_to
    vllm_compat.all_reduce = lambda: torch.ops.vllm.all_reduce
    vllm_compat.norm_provider = provider_of
    vllm._watch = lambda: None
    tpfuse.passes.collectives.unregister_collective(torch.ops.vllm.all_reduce)
    tpfuse.clear_reports()  # fuel counts from here
    model = Model(1, ir, weights, rank)
    x = torch.randn(3, layers.HIDDEN, generator=torch.Generator().manual_seed(rank)).bfloat16()
    # What a worker gets: a copy that was never made here, in a process that has registered nothing.
    ours = pickle.loads(pickle.dumps(vllm.make_pass({"tpfuse.fuel": fuel}, ranks=world)))
    off = vllm.make_pass({"tpfuse.policy": "off"}, ranks=world)
    outputs = []
    for mounted in (off, ours):
        torch._dynamo.reset()
        # vLLM compiles with the first version of auto_functionalized, and mounts its passes as the post-grad post-pass.
        patches = {"enable_auto_functionalized_v2": False, "post_grad_custom_post_pass": mounted}
        patches["force_disable_caches"] = True  # a rank that finds the other's graph runs no pass
        with torch.no_grad(), config.patch(**patches), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compiled = torch.compile(model, backend="inductor", options={"emulate_precision_casts": True})
            outputs.append(compiled(x.clone()))
    (report,) = ours.reports
    return {
        "patterns": [s.pattern for s in report.fused],
        "unrounded": ["before it is rounded" in s.detail for s in report.fused],
        "found": len(report.sites),
        "groups": {s.group for s in report.sites},
        "reasons": [s.reason for s in report.kept],
        "equal": all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*outputs, strict=True)),
        "dtype": outputs[1][0].dtype,
        "outputs": outputs[1],
        "warnings": [str(w.message) for w in caught if "erase" in str(w.message)],
    }


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor")),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


@pytest.fixture(scope="module")
def pool(env):
    with RankPool(2, env=env) as pool:
        yield pool


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ir", "weights", "lowered_to"),
    [
        (True, "own", "native"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (True, "gemma", "native"),
                (False, "own", "native"),
                (True, "own", "vllm_c"),
                (True, "none", "native"),
            )
        ),
    ],
)
def test_every_reduction_is_fused_with_the_same_bits(pool, ir, weights, lowered_to):
    """Both of vLLM's spellings and ways to lower one; fp32 weights over a bf16 stream; no weights. In an unpickled copy."""
    results = pool.run(compile_as_vllm_does, ir, weights, lowered_to)
    for result in results:
        # vLLM's own arithmetic reads the sum before it is rounded, its CUDA kernel after.
        assert result["unrounded"] == [False] + 2 * [ir and lowered_to == "native"]
        assert result["patterns"] == ["all_reduce+rms_norm"] + 2 * ["all_reduce+add+rms_norm"], result["reasons"]
        assert result["found"] == 3
        assert result["groups"] == {(0, 1)}
        assert result["dtype"] == torch.bfloat16
        assert result["equal"]
        assert result["warnings"] == []
    assert all(torch.equal(a, b) for a, b in zip(results[0]["outputs"], results[1]["outputs"], strict=True))


@pytest.mark.slow  # of a single piece the quick run has it below
@pytest.mark.ranks
def test_what_is_not_fused_says_why_and_stays_right(env):
    with RankPool(2, env=env, alone=True) as alone:
        (result,) = alone.run(compile_as_vllm_does, True, "own", "native", 2)
    assert len(result["patterns"]) == 2
    assert result["reasons"] == ["fuel"]
    assert result["equal"]


# -- graphs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def group():
    start_fake_group(4)
    yield
    dist.destroy_process_group()


def piece(x: Tensor, residual: Tensor, weight: Tensor | None, variance_size: int | None = None) -> Any:
    summed = torch.ops.vllm.all_reduce(x, GROUP)
    return torch.ops.vllm_ir.fused_add_rms_norm(summed, residual, weight, EPS, variance_size)


def traced(f: Any, *args: Any) -> torch.fx.GraphModule:
    tensors = [a for a in args if a is not None]  # a missing weight is no input of a graph
    none = [None] * (len(args) - len(tensors))
    return make_fx(lambda *a: f(*a, *none), tracing_mode="fake")(*tensors)


def inputs(weight: torch.dtype | None = torch.bfloat16) -> tuple[Any, ...]:
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    return x, torch.randn_like(x), None if weight is None else torch.rand(64, dtype=weight)


def targets(gm: torch.fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]


def test_a_provider_whose_rounding_is_not_known_keeps_its_norms_and_is_named(group, monkeypatch, caplog):
    monkeypatch.setitem(provider, "now", "oink")
    gm = traced(piece, *inputs())
    before = targets(gm)
    with caplog.at_level(logging.WARNING, "vllm.tpfuse"):
        made = vllm.make_pass(ranks=world)
        made(gm.graph)
    assert targets(gm) == before
    assert [s.reason for s in made.reports[0].sites] == ["unknown-norm"]
    assert "vLLM computes norms with oink, and where that rounds is not known" in caplog.text


def test_a_provider_that_cannot_be_asked_for_leaves_the_graph(group, monkeypatch, caplog):
    def moved(node: Any) -> str:
        raise AttributeError("IrOp has no dispatch")

    monkeypatch.setattr(vllm_compat, "norm_provider", moved)
    gm = traced(piece, *inputs())
    before = targets(gm)
    with caplog.at_level(logging.WARNING, "vllm.tpfuse"):
        vllm.make_pass(ranks=world)(gm.graph)
    assert targets(gm) == before and "IrOp has no dispatch" in caplog.text


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32, None])
def test_a_piece_becomes_one_op_of_the_streams_dtype(group, weight):
    gm = traced(piece, *inputs(weight))
    made = vllm.make_pass(ranks=world)
    made(gm.graph)
    assert targets(gm) == ["tpfuse.all_reduce_add_rms_norm.default"]
    outputs = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    assert {n.meta["val"].dtype for n in outputs} == {torch.bfloat16}
    assert [len(r.fused) for r in made.reports] == [1]


@pytest.mark.parametrize("options", [{"tpfuse.policy": "off"}, {"tpfuse.fuel": 0}])
@pytest.mark.parametrize("bare", [False, True])
def test_a_norm_that_is_not_fused_stays_vllms_own(group, options, bare):
    def two(x, residual, weight):
        if bare:
            return torch.ops.vllm_ir.rms_norm(torch.ops.vllm.all_reduce(x, GROUP), weight, EPS)
        normed, summed = piece(x, residual, weight)
        return piece(normed, summed, weight)

    gm = traced(two, *inputs())
    before = targets(gm)
    vllm.make_pass(options, ranks=world)(gm.graph)
    gm.graph.lint()
    assert targets(gm) == before


def test_one_of_two_is_fused_and_the_other_put_back_on_what_it_gave(group):
    def two(x, residual, weight):
        normed, summed = piece(x, residual, weight)
        return piece(normed, summed, weight)

    tpfuse.clear_reports()
    gm = traced(two, *inputs())
    vllm.make_pass({"tpfuse.fuel": 1}, ranks=world)(gm.graph)
    gm.graph.lint()
    fused = "tpfuse.all_reduce_add_rms_norm.default"
    assert targets(gm) == [fused, "vllm.all_reduce.default", "vllm_ir.fused_add_rms_norm.default"]
    tpfuse.clear_reports()


def test_a_norm_of_a_part_of_the_row_is_not_opened(group):
    gm = traced(lambda *a: piece(*a, variance_size=32), *inputs())
    made = vllm.make_pass(ranks=world)
    made(gm.graph)
    assert "vllm_ir.fused_add_rms_norm.default" in targets(gm)
    assert [s.fused for s in made.reports[0].sites] == [False]


def test_a_norm_that_reads_no_reduction_is_not_opened(group):
    gm = traced(lambda x, r, w: torch.ops.vllm_ir.fused_add_rms_norm(x, r, w, EPS), *inputs())
    opened: list[Any] = []
    vllm_norms.open_norms(gm.graph, vllm._is_reduction, provider_of, opened)
    assert opened == []


def test_a_residual_that_is_added_outside_the_norm_is_found(group):
    def granite(x, residual, weight):
        summed = residual + torch.ops.vllm.all_reduce(x, GROUP) * 0.22
        return torch.ops.vllm_ir.rms_norm(summed, weight, EPS), summed

    gm = traced(granite, *inputs())
    vllm.make_pass(ranks=world)(gm.graph)
    assert targets(gm) == ["tpfuse.all_reduce_add_rms_norm.default"]


def test_a_failure_leaves_the_graph_and_says_why(group, monkeypatch, caplog):
    gm = traced(piece, *inputs())
    before = targets(gm)

    def broken(*a: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(vllm, "run_pass", broken)
    with caplog.at_level(logging.WARNING, "vllm.tpfuse"):
        made = vllm.make_pass(ranks=world)
        made(gm.graph)
        made(gm.graph)
    gm.graph.lint()
    assert targets(gm) == before
    assert caplog.text.count("a graph stays as it was: RuntimeError: no such thing") == 1


# -- identity --------------------------------------------------------------------------------------------------------------


def test_the_uuid_is_stable_and_follows_what_matters(group, monkeypatch):
    made = vllm.make_pass()
    same = [pickle.loads(pickle.dumps(made)), copy.deepcopy(made), vllm.make_pass(folder=Path("/elsewhere"))]
    assert {p.uuid() for p in same} == {made.uuid()}
    others = [
        vllm.make_pass({"tpfuse.policy": "shared"}),
        vllm.make_pass({"tpfuse.numerics": "relaxed"}),
        vllm.make_pass(previous=SimpleNamespace(uuid=lambda: "theirs")),
    ]
    monkeypatch.setattr(vllm_compat, "group_names", lambda: [GROUP])
    monkeypatch.setattr(vllm_compat, "group_ranks", lambda name: (0, 1, 2, 3))
    others.append(SimpleNamespace(uuid=made.uuid))  # the same pass beside a group of vLLM
    assert len({p.uuid() for p in others} | {same[1].uuid()}) == 4


def test_the_uuid_follows_registered_quantizers(monkeypatch):
    made = vllm.make_pass()
    before = made.uuid()
    monkeypatch.setattr(quantizers, "_registered", {**quantizers._registered, "my::quantize.default": "another one"})
    assert made.uuid() != before


def test_ranks_of_different_groups_have_different_uuids(monkeypatch):
    """The fused op holds torch's name of the group, and vLLM's name is the same on all ranks."""
    monkeypatch.setattr(compat, "known_groups", lambda: [("5", (0, 1)), ("6", (2, 3))])
    monkeypatch.setattr(vllm_compat, "group_names", lambda: [GROUP])
    made, found = vllm.make_pass(), []
    for ranks in ((0, 1), (2, 3)):
        monkeypatch.setattr(vllm_compat, "group_ranks", lambda name, ranks=ranks: ranks)
        found.append(made.uuid())
    assert found[0] != found[1]


@pytest.mark.long
def test_the_uuid_is_the_same_in_another_process():
    code = "from tpfuse.engines import vllm; vllm._watch = lambda: None; print(vllm.make_pass().uuid())"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT, check=True)
    assert done.stdout.strip() == vllm.make_pass().uuid()


# -- config ----------------------------------------------------------------------------------------------------------------


def config(size: int = 2, **compile_config: Any) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=size, world_size=size, rank=1, data_parallel_size=1),
        compilation_config=SimpleNamespace(
            inductor_compile_config=dict(compile_config), pass_config=SimpleNamespace(fuse_allreduce_rms=None)
        ),
    )


@pytest.fixture
def platform(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_compat, "pass_key", lambda: vllm_compat.POST_PASS)
    monkeypatch.setattr(vllm_compat, "platform_can_fuse", lambda: True)
    monkeypatch.setattr(vllm_compat, "cache_root", lambda: tmp_path)


def test_the_config_gets_the_pass_once_and_vllms_own_fusion_is_off(platform, caplog):
    given = config()
    calls = []
    with caplog.at_level(logging.INFO, "vllm.tpfuse"):
        for _ in range(2):
            vllm._around_config(calls.append, given)
    assert calls == [given, given]
    held = given.compilation_config.inductor_compile_config[vllm_compat.POST_PASS]
    assert vllm.is_pass(held) and held.previous is None and held.options.policy == "all"
    assert given.compilation_config.pass_config.fuse_allreduce_rms is False
    assert caplog.text.count("vLLM's own all-reduce fusion (fuse_allreduce_rms) is off") == 1


def test_a_pass_of_the_user_runs_before_ours(platform):
    theirs = SimpleNamespace(uuid=lambda: "theirs")
    given = config(**{vllm_compat.POST_PASS: theirs})
    vllm._mount(given)
    assert given.compilation_config.inductor_compile_config[vllm_compat.POST_PASS].previous is theirs


def test_one_rank_is_left_alone(platform):
    given = config(size=1)
    vllm._mount(given)
    assert given.compilation_config.inductor_compile_config == {}
    assert given.compilation_config.pass_config.fuse_allreduce_rms is None


def test_a_config_that_cannot_be_read_is_told_and_passed_on(caplog):
    calls: list[Any] = []
    with caplog.at_level(logging.WARNING, "vllm.tpfuse"):
        vllm._around_config(calls.append, SimpleNamespace())
    assert len(calls) == 1
    assert "the pass could not be added to vLLM's config" in caplog.text and "AttributeError" in caplog.text


@pytest.mark.parametrize(("value", "on"), [("", False), ("0", False), ("1", True), ("perhaps", False)])
def test_the_entry_point_asks_the_variable(value, on, monkeypatch, caplog):
    asked: list[str] = []
    monkeypatch.setattr(vllm, "switch_on", lambda: asked.append("on"))
    monkeypatch.setenv("TPFUSE_VLLM", value)
    with caplog.at_level(logging.WARNING, "vllm.tpfuse"):
        vllm.register()
    assert bool(asked) == on
    assert ("TPFUSE_VLLM='perhaps' is not valid" in caplog.text) == (value == "perhaps")


@pytest.mark.long
def test_vllm_finds_the_entry_point_and_importing_it_imports_no_vllm(monkeypatch):
    code = (
        "from importlib.metadata import entry_points\n"
        "(found,) = [e for e in entry_points(group='vllm.general_plugins') if e.name == 'tpfuse']\n"
        "import sys; found.load()(); print(found.value, 'vllm' in sys.modules)"
    )
    monkeypatch.delenv("TPFUSE_VLLM", raising=False)
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["tpfuse.engines.vllm:register", "False"]


def test_wrapping_twice_wraps_once():
    class Owner:
        def act(self) -> str:
            return "own"

    for _ in range(2):
        vllm_compat.wrap(Owner, "act", lambda original, self: f"around {original(self)}")
    assert Owner().act() == "around own"
    with pytest.raises(AttributeError):
        vllm_compat.wrap(Owner, "gone", lambda original, self: None)


# -- reports ---------------------------------------------------------------------------------------------------------------


def report_of(group: Any, sites: int = 1) -> tpfuse.GraphReport:
    gm = traced(piece, *inputs())
    made = vllm.make_pass(ranks=world)
    made(gm.graph)
    (report,) = made.reports
    vllm._recorder.published.clear()  # the pass ran outside a model of vLLM, which is a model of its own
    return replace(report, sites=report.sites * sites)


class Manager:
    """vLLM's compiler manager, as far as the plugin looks at it."""

    def __init__(self, makes: list[Any]) -> None:
        self.loaded_artifacts: dict[str, Any] = {}
        self.makes = makes

    def compile(self, graph: Any, inputs: Any, compile_range: Any, graph_index: int = 0) -> Any:
        key, report = self.makes.pop(0)
        if report is not None:
            vllm._recorder.fresh.append(report)
        return self.loaded_artifacts.setdefault(key, object())


def compile_model(given: Any, makes: list[Any], beside: Path | None = None) -> list[tpfuse.GraphReport]:
    """One rank compiles a model of the pieces in ``makes``: (key of the artifact, report if the pass ran)."""
    manager, span = Manager(list(makes)), SimpleNamespace(start=1, end=64)

    def whole(backend: Any) -> None:
        for index in range(len(makes)):
            vllm._around_piece(Manager.compile, manager, None, None, compile_range=span, graph_index=index)

    vllm._recorder.beside = beside
    vllm._around_model(whole, SimpleNamespace(prefix="backbone", vllm_config=given))
    return vllm._recorder.published


@pytest.fixture
def mounted(platform, group, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(vllm_reports, "PATIENCE", 0.0)
    given = config()
    vllm._mount(given)
    return given


def test_equal_pieces_count_as_often_as_the_model_has_them(mounted):
    one, two = report_of(group), replace(report_of(group, 2), graph_id="other")
    (made,) = compile_model(mounted, [("first", one), ("middle", two), ("middle", None), ("middle", None)])
    assert (len(made.sites), len(made.fused), made.rank, made.from_cache) == (7, 7, 1, False)
    assert made.graph_id == "backbone" and made.notes == []


def test_a_rank_that_shares_the_cache_of_inductor_reports_the_same(mounted, monkeypatch):
    two = report_of(group, 2)
    (cold,) = compile_model(mounted, [("shared", two), ("shared", None)])
    monkeypatch.setattr(vllm, "_recorder", vllm._Recorder())  # another rank: nothing of it is in memory
    (warm,) = compile_model(mounted, [("shared", None), ("shared", None)])
    assert [s.to_dict() if hasattr(s, "to_dict") else s for s in warm.sites] == list(cold.sites)
    assert warm.from_cache and not cold.from_cache


def test_a_piece_whose_report_is_gone_is_said(mounted):
    (made,) = compile_model(mounted, [("gone", None)])
    assert made.sites == [] and "1 of 1 pieces came from a compile cache whose report is gone" in made.notes[0]


def test_the_ahead_of_time_cache_keeps_the_report(mounted, tmp_path, monkeypatch):
    path, made = tmp_path / "aot" / "rank_0_0" / "model", report_of(group)
    model = SimpleNamespace(vllm_config=mounted)

    def compile_and_save(model: Any, path: Any) -> None:
        return None

    assert vllm._around_load(compile_and_save, model, path) is None
    (cold,) = compile_model(mounted, [("a", made)], vllm._recorder.beside)
    monkeypatch.setattr(vllm, "_recorder", vllm._Recorder(last_run=vllm._recorder.last_run))
    assert vllm._around_load(lambda model, path: "loaded", model, path) == "loaded"
    (warm,) = vllm._recorder.published
    assert warm.from_cache and len(warm.fused) == len(cold.fused) == 1
    seen = vllm.report()
    assert seen.ranks[1] == [warm] and seen.alike
    assert "1 all-reduces, 1 fused, 0 kept (from a cache)" in str(seen)


def test_view_reads_the_folder_of_a_run(mounted):
    compile_model(mounted, [("a", report_of(group)), ("b", report_of(group))])
    dump = load.read(vllm.report().folder)
    assert [(g.name, g.report.rank, len(g.report.sites)) for g in dump.graphs] == [("backbone", 1, 2)]


def test_ranks_that_differ_are_told_apart(tmp_path):
    base = tpfuse.GraphReport("backbone", 0, 2, [])
    site = tpfuse.Site(True, None, "", "all_reduce+rms_norm", "other", None, (0, 1), None, "", [])
    vllm_reports.publish(tmp_path, [replace(base, sites=[site])])
    vllm_reports.publish(tmp_path, [replace(base, rank=1)])
    seen = vllm.report(tmp_path)
    assert not seen.alike and "rank 0: backbone: 1" in str(seen) and "rank 1: backbone: 0" in str(seen)
    vllm_reports.publish(tmp_path, [replace(base, rank=1, sites=[site])])
    assert "ranks 0 to 1, each: backbone: 1 all-reduces, 1 fused" in str(vllm.report(tmp_path))


def test_a_run_without_reports_says_so(tmp_path):
    assert "no worker has reported yet" in str(vllm.report(tmp_path / "none"))


def test_old_runs_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_reports, "RUNS_KEPT", 2)
    for n in range(4):
        (tmp_path / f"run-{n}").mkdir()
    vllm_reports.new_run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run-2", "run-3"]


def test_a_file_of_reports_that_is_none_is_no_report(tmp_path):
    (tmp_path / "x").write_text("[{}]")
    assert vllm_reports.read(tmp_path / "x") is None and vllm_reports.read(tmp_path / "y") is None
