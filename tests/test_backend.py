"""The backend: how it is found, what its options say, and what it says about bad input."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import graphs
import pytest
import torch
import torch.distributed as dist
from commands import run_python
from graphs import all_reduce
from ranks import run_ranks
from torch import nn

import tpfuse

H = 32
AOT = {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all"}


@pytest.fixture(autouse=True)
def fresh(request):
    torch._dynamo.reset()
    tpfuse.clear_reports()
    if "group" in request.fixturenames or "no_group" in request.fixturenames:
        yield
    else:
        graphs.start_fake_group(4)
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


class Layer(nn.Module):
    """all_reduce + add + RMSNorm with an eps that Dynamo can make symbolic."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.randn(H), requires_grad=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = residual + all_reduce(x * 2)
        f = h.float()
        return self.weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + self.eps)).to(h.dtype), h


def inputs(rows=3):
    return torch.randn(2, rows, H), torch.randn(2, rows, H)


def compiled(module, **options):
    return torch.compile(module, backend="tpfuse", options={**AOT, **{f"tpfuse.{k}": v for k, v in options.items()}})


def in_new_process(code: str, **env: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=800,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# -- found by name --------------------------------------------------------------------------------------------------


FOUND = """
import torch._dynamo
assert "tpfuse" in torch._dynamo.list_backends()
f = torch.compile(lambda x: (x * 2).relu(), backend="tpfuse", options={"tpfuse.inner": "aot_eager"})
with torch.no_grad():
    print(f(torch.tensor([-1.0, 3.0])).tolist())
"""


@pytest.mark.long
def test_the_backend_is_found_without_an_import():
    assert in_new_process("import torch" + FOUND).strip() == "[0.0, 6.0]"


@pytest.mark.long
@pytest.mark.parametrize("first", ["import tpfuse, torch", "import tpfuse.backend, torch"])
def test_the_backend_is_found_with_an_import(first):
    done = run_python("-c", first + FOUND)
    assert (done.returncode, done.stdout.strip()) == (0, "[0.0, 6.0]"), done.stderr


# -- inner compilers and modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["aot_eager", "eager", "inductor"])
def test_every_inner_compiler_fuses_and_keeps_the_values(inner):
    layer, args = Layer(), inputs()
    with torch.no_grad(), tpfuse.expect(fused=1, found=1):
        out = compiled(layer, inner=inner)(*args)
    torch.testing.assert_close(out, layer(*args))
    (report,) = tpfuse.reports()
    assert report.inner == inner and report.sites[0].source.split(":")[0].endswith("graphs.py")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_are_accepted(mode):
    layer, args = Layer(), inputs()
    torch._dynamo.reset()
    f = torch.compile(layer, backend="tpfuse", mode=mode)
    import os

    os.environ["TPFUSE_POLICY"] = "all"
    try:
        with torch.no_grad(), tpfuse.expect(fused=1):
            out = f(*args)
    finally:
        del os.environ["TPFUSE_POLICY"]
    torch.testing.assert_close(out, layer(*args))


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_mode_beside_options_sets_what_the_mode_stands_for(by, monkeypatch):
    """torch.compile refuses mode= beside options=."""
    from tpfuse import compat

    seen = []
    plain = compat.compile_fx
    monkeypatch.setattr(
        compat, "compile_fx", lambda gm, inputs, patches: seen.append(patches) or plain(gm, inputs, patches)
    )
    options = {"tpfuse.policy": "all", "max_autotune": False}
    if by == "option":
        options["tpfuse.mode"] = "max-autotune-no-cudagraphs"
    else:
        monkeypatch.setenv("TPFUSE_MODE", "max-autotune-no-cudagraphs")
    with torch.no_grad(), tpfuse.expect(fused=1):
        torch.compile(Layer(), backend="tpfuse", options=options)(*inputs())
    assert seen[0]["coordinate_descent_tuning"] is True
    assert seen[0]["max_autotune"] is False, "the user's own setting wins"


def test_inductor_options_and_the_users_own_pre_pass_keep_working():
    seen = []

    def mine(graph):
        seen.append(sum(1 for n in graph.nodes if "all_reduce" in str(n.target)))

    layer, args = Layer(), inputs()
    options = {"tpfuse.policy": "all", "post_grad_custom_pre_pass": mine, "epilogue_fusion": False}
    with torch.no_grad(), tpfuse.expect(fused=1):
        torch.compile(layer, backend="tpfuse", options=options)(*args)
    assert seen == [1], "the user's pass did not run on the unfused graph"


def test_a_pre_pass_in_inductors_config_is_kept():
    from torch._inductor import config

    seen = []
    layer, args = Layer(), inputs()
    with (
        config.patch(post_grad_custom_pre_pass=lambda graph: seen.append(graph)),
        torch.no_grad(),
        tpfuse.expect(fused=1),
    ):
        compiled(layer, inner="inductor")(*args)
    assert len(seen) == 1


# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [True, None])
def test_dynamic_shapes_give_the_same_matches(dynamic):
    layer = Layer()
    f = torch.compile(layer, backend="tpfuse", options=AOT, dynamic=dynamic)
    with torch.no_grad():
        for rows in (3, 5, 7, 11, 2):
            args = inputs(rows)
            assert graphs.equal(f(*args), layer(*args))
    made = tpfuse.reports()
    assert all(len(r.fused) == 1 for r in made), [r.summary() for r in made]
    assert len(made) <= (1 if dynamic else 2), "more than one recompile for 2..N rows"


def test_marked_dims_give_the_same_matches():
    layer = Layer()
    f = torch.compile(layer, backend="tpfuse", options=AOT)
    for rows in (3, 5, 9):
        args = inputs(rows)
        for a in args:
            torch._dynamo.mark_dynamic(a, 1)
        with torch.no_grad():
            assert graphs.equal(f(*args), layer(*args))
    assert [len(r.fused) for r in tpfuse.reports()] == [1]


def test_a_changed_eps_recompiles_under_dynamic():
    layer, args = Layer(1e-5), inputs()
    f = torch.compile(layer, backend="tpfuse", options=AOT, dynamic=True)
    with torch.no_grad():
        first = f(*args)
        layer.eps = 0.5
        second = f(*args)
        assert graphs.equal(second, layer(*args)) and not torch.equal(first[0], second[0])
    assert [r.sites[0].eps for r in tpfuse.reports()] == [1e-5, 0.5]


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tpfuse.polcy": "all"}, r"unknown option 'tpfuse.polcy'.*Did you mean 'tpfuse.policy'"),
        ({"tpfuse.policy": "every"}, r"tpfuse.policy='every' .*shared, strict, all, off"),
        ({"tpfuse.numerics": "fast"}, r"valid values are exact, relaxed"),
        ({"tpfuse.inner": "xla"}, r"valid values are inductor, aot_eager, eager, tensorrt"),
        ({"tpfuse.verify": "maybe"}, r"valid values are true and false"),
        ({"tpfuse.fuel": -1}, r"expected none or a number of rewrites"),
        ({"tpfuse.fuel": "many"}, r"expected none or a number of rewrites"),
        ({"tpfuse.dump": 3}, r"expected none or a folder"),
        ({"tpfuse.mode": "reduce-overheat"}, r"valid values are .*Did you mean 'reduce-overhead'"),
        ({"tpfuse.mode": "lite"}, r"use_post_grad_passes is off in mode 'lite'"),
        ({"no_such_setting": 1}, r"'no_such_setting' is neither a tpfuse option"),
        (
            {"tpfuse.inner": "aot_eager", "epilogue_fusion": False},
            r"takes no options of its own; given epilogue_fusion",
        ),
    ],
)
def test_bad_options_name_what_is_valid(options, message):
    with torch.no_grad(), pytest.raises(Exception, match=message):
        torch.compile(Layer(), backend="tpfuse", options=options)(*inputs())


def test_environment_twins_and_their_errors(monkeypatch):
    monkeypatch.setenv("TPFUSE_POLICY", "off")
    monkeypatch.setenv("TPFUSE_INNER", "aot_eager")
    with torch.no_grad(), tpfuse.expect(fused=0, found=1):
        torch.compile(Layer(), backend="tpfuse")(*inputs())
    torch._dynamo.reset()
    with torch.no_grad(), tpfuse.expect(fused=1):  # an explicit option wins
        torch.compile(Layer(), backend="tpfuse", options={"tpfuse.policy": "all"})(*inputs())
    torch._dynamo.reset()
    monkeypatch.setenv("TPFUSE_NUMERICS", "exat")
    with torch.no_grad(), pytest.raises(Exception, match="TPFUSE_NUMERICS='exat'.*Did you mean 'exact'"):
        torch.compile(Layer(), backend="tpfuse")(*inputs())


def test_tensorrt_without_its_extra_names_the_extra():
    pytest.importorskip("tpfuse.inner.tensorrt")
    try:
        import torch_tensorrt  # noqa: F401
    except ImportError:
        with torch.no_grad(), pytest.raises(Exception, match=r"tpfuse\[tensorrt\]"):
            torch.compile(Layer(), backend="tpfuse", options={"tpfuse.inner": "tensorrt"})(*inputs())


# -- policy, fuel, verify, expect ---------------------------------------------------------------------------------------


def test_policies():
    for policy, fused, reason in (
        ("all", 1, None),
        ("shared", 1, None),
        ("strict", 0, "policy"),
        ("off", 0, "policy"),
    ):
        torch._dynamo.reset()
        tpfuse.clear_reports()
        with torch.no_grad(), tpfuse.expect(fused=fused):
            compiled(Layer(), policy=policy)(*inputs())
        site = tpfuse.reports()[0].sites[0]
        assert site.reason == reason
        assert reason is None or "'all' would fuse it" in site.detail


def test_fuel_counts_over_graphs():
    def chain(x, r):
        for _ in range(3):
            x, r = Layer.forward(layer, x, r)
        return x, r

    layer, args = Layer(), inputs()
    for fuel, expected in ((0, 0), (2, 2), (5, 3), (None, 3)):
        torch._dynamo.reset()
        tpfuse.clear_reports()
        with torch.no_grad(), tpfuse.expect(fused=expected, found=3):
            out = compiled(chain, fuel=fuel)(*args)
        assert graphs.equal(out, chain(*args))
        assert all(s.reason == "fuel" for r in tpfuse.reports() for s in r.kept)


def test_verify_stops_a_wrong_rewrite(monkeypatch):
    from tpfuse.ops import reference

    with torch.no_grad():
        compiled(Layer(), verify=True)(*inputs())
        torch._dynamo.reset()
        right = reference.add_rms_norm
        monkeypatch.setattr(reference, "add_rms_norm", lambda *a: (right(*a)[0] * 1.01, right(*a)[1]))
        with pytest.raises(Exception, match="tpfuse.verify: the rewrite of all_reduce.*is wrong: normed differs"):
            compiled(Layer(), verify=True)(*inputs())


def test_expect_lists_the_reasons():
    with torch.no_grad(), pytest.raises(tpfuse.FusionMismatch, match=r"(?s)expected 2 fused.*got 0 fused of 1.*policy"):
        with tpfuse.expect(fused=2):
            compiled(Layer(), policy="off")(*inputs())
    with pytest.raises(tpfuse.FusionMismatch, match="no graph was compiled"), tpfuse.expect(fused=1):
        pass


def test_reports_round_trip_and_survive_clear():
    with torch.no_grad():
        compiled(Layer())(*inputs())
    (report,) = tpfuse.reports()
    assert tpfuse.GraphReport.from_json(report.to_json()) == report
    assert report.summary().endswith("1 all-reduces, 1 fused, 0 kept")
    tpfuse.clear_reports()
    assert tpfuse.reports() == []


def test_a_compile_that_fails_leaves_no_report(monkeypatch):
    from tpfuse import compat

    args, layer = inputs(), Layer()
    with torch.no_grad(), monkeypatch.context() as broken:
        broken.setattr(compat, "boxed", lambda _: 1 / 0)  # behind the pass
        with pytest.raises(Exception, match="division by zero"):
            compiled(layer)(*args)
        assert tpfuse.reports() == []
        torch._dynamo.reset()
        with torch._dynamo.config.patch(suppress_errors=True):  # the model's own code runs: nothing of it is fused
            assert graphs.equal(compiled(layer)(*args), layer(*args))
        assert not any(report.fused for report in tpfuse.reports())
    torch._dynamo.reset()
    with torch.no_grad(), tpfuse.expect(fused=1):
        compiled(layer)(*args)


# -- graphs that must not be touched --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_training_graphs_are_reported_and_left_alone(inner):
    layer = Layer()
    layer.weight.requires_grad_(True)
    x, r = inputs()
    f = compiled(layer, inner=inner)
    try:
        out = f(x, r)[0]
    except Exception as error:  # functional collectives are not differentiable in every torch
        assert "tpfuse" not in str(error).split("raised:")[-1]
        pytest.skip(f"this torch cannot trace a training graph with an all-reduce: {error}")
    out.sum().backward()
    assert layer.weight.grad is not None
    sites = [s for report in tpfuse.reports() for s in report.sites]
    assert sites and all(s.reason == "training" for s in sites)


def test_world_size_one_is_refused_by_name():
    graphs.start_fake_group(1)
    with torch.no_grad(), tpfuse.expect(fused=0, found=1):
        compiled(Layer())(*inputs())
    assert tpfuse.reports()[0].sites[0].reason == "group-size"


class Twice(nn.Module):
    """The layer as a region that torch compiles once, and in a branch: graphs inside of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        region = torch.compiler.nested_compile_region(lambda x, r: self.layer(x, r))
        x, residual = region(x, residual)
        x, residual = region(x, residual)
        return torch.cond(residual.sum() > 0, self.layer.forward, lambda x, r: (x * 2, r + 1), (x, residual))


@pytest.mark.parametrize("inner", ["aot_eager", "eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_graphs_inside_of_the_graph_are_fused_too(inner):
    model, (x, residual) = Twice().eval(), inputs()
    options = {"tpfuse.inner": inner, "tpfuse.policy": "all"}
    with torch.no_grad():
        want = model(x, residual)
        got = torch.compile(model, backend="tpfuse", options=options)(x, residual)
    if inner == "inductor":
        torch.testing.assert_close(got, want)
    else:
        assert graphs.equal(got, want)
    assert sorted(len(r.sites) for r in tpfuse.reports() if r.sites) == [1, 1], "the region and the branch"
    assert all(site.fused for r in tpfuse.reports() for site in r.sites)


def test_a_graph_that_is_fused_by_hand_names_the_graphs_inside_of_it():
    layer = Layer()

    class Branches(nn.Module):
        def forward(self, x, r, w):
            return torch.cond(x.sum() > 0, lambda x, r: layer_of(x, r, w), lambda x, r: (x + 1, r + 1), (x, r))

    def layer_of(x, r, w):
        h = r + all_reduce(x * 2)
        return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)), h

    gm = torch.export.export(Branches(), (*inputs(), layer.weight)).run_decompositions().graph_module
    report = tpfuse.fuse(gm)
    assert not report.sites
    assert report.notes == ["graphs inside of this one reduce too, each with a report of its own: true_graph_0"]
    assert [s.fused for s in tpfuse.fuse(gm.true_graph_0).sites] == [True]


def test_a_graph_without_collectives_needs_no_process_group():
    dist.destroy_process_group()
    with torch.no_grad(), tpfuse.expect(fused=0, found=0):
        out = compiled(lambda x: x.relu() + 1)(torch.ones(3))
    assert out.tolist() == [2.0, 2.0, 2.0]


def test_without_a_process_group_the_all_reduce_is_unknown():
    gm = graphs.trace(lambda x, r: (r + all_reduce(x)).relu(), inputs())
    dist.destroy_process_group()
    _, report = graphs.fused_copy(gm)
    assert report.sites[0].reason == "unknown-group" and "cannot be resolved" in report.sites[0].detail


def test_a_destroyed_group_is_unknown():
    group = dist.new_group([0, 1])
    name = group.group_name

    def f(x, r):
        h = r + all_reduce(x, group=name)
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)

    gm = graphs.trace(f, inputs())
    dist.destroy_process_group(group)
    _, report = graphs.fused_copy(gm)
    assert report.sites[0].reason == "unknown-group", report.sites


def foreign_group(rank, world_size):
    import graphs as g
    from tpfuse.passes import PassOptions, fuse

    pair = dist.new_group([0, 1])
    if rank == 2:
        name = "not-mine"
    else:
        name = pair.group_name

    def f(x, r):
        h = r + g.all_reduce(x, group=dist.group.WORLD.group_name)
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)

    gm = g.trace(f, (torch.ones(2, H), torch.ones(2, H)))
    for node in gm.graph.nodes:
        if "all_reduce" in str(node.target):
            node.args = (node.args[0], node.args[1], name)
    report = fuse(gm, PassOptions(policy="all"))
    return report.sites[0].reason, report.sites[0].detail


@pytest.mark.ranks
def test_a_group_the_rank_is_not_in_is_refused_there():
    results = run_ranks(foreign_group, 3)
    assert [r[0] for r in results] == [None, None, "unknown-group"]


def test_register_collective_teaches_another_librarys_all_reduce():
    library = torch.library.Library("tpfuse_test_engine", "FRAGMENT")
    library.define("all_reduce(Tensor x, str group_name) -> Tensor")
    library.impl("all_reduce", lambda x, group_name: x.clone(), "CPU")
    torch.library.register_fake(
        "tpfuse_test_engine::all_reduce", lambda x, group_name: torch.empty_like(x), lib=library
    )

    def f(x, r):
        h = r + torch.ops.tpfuse_test_engine.all_reduce(x, "tp:0")
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5), h

    gm = graphs.trace(f, inputs())
    assert graphs.fused_copy(gm)[1].sites == []
    tpfuse.register_collective(torch.ops.tpfuse_test_engine.all_reduce, ranks=lambda name: (0, 1, 2, 3))
    try:
        new, report = graphs.fused_copy(gm)
        assert report.sites[0].fused and report.sites[0].group == (0, 1, 2, 3)
        args = inputs()
        assert graphs.equal(gm(*args), new(*args))
    finally:
        from tpfuse.passes import unregister_collective

        unregister_collective(torch.ops.tpfuse_test_engine.all_reduce)
    with pytest.raises(TypeError, match="expected an operator"):
        tpfuse.register_collective("all_reduce")


# -- the op -------------------------------------------------------------------------------------------------------------


def opcheck(rank, world_size):
    op = torch.ops.tpfuse.all_reduce_add_rms_norm.default
    name = dist.group.WORLD.group_name
    x, w = torch.randn(3, H), torch.randn(H)
    flavour = str(tpfuse.ops.LLAMA)
    args = [
        (x, torch.randn(3, H), w, None, 1e-5, 1.0, flavour, False, name),
        (x, None, w, None, 1e-5, 1.0, flavour, False, name),
        (x.view(1, 3, H), torch.randn(1, 3, H), w, torch.randn(H), 1e-5, 0.5, flavour, True, name),
        (x.bfloat16(), None, w, None, 1e-5, 1.0, flavour, False, name),
        (torch.randn(0, H), torch.randn(0, H), w, None, 1e-5, 1.0, flavour, False, name),
    ]
    for a in args:
        torch.library.opcheck(op, a)
    return True


@pytest.mark.ranks
def test_opcheck():
    assert run_ranks(opcheck, 2) == [True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.ones(3, H)}, "residual is"),
        ({"weight": torch.ones(H + 1)}, "weight has shape"),
        ({"weight": None}, "weight is None"),
        ({"bias": torch.ones(5)}, "bias is"),
        ({"x": torch.ones(2, H, dtype=torch.int64)}, "x has dtype"),
        ({"post_norm": True, "residual": None}, "post_norm=True needs a residual"),
        ({"flavour": "float32/mean"}, "has 2 fields; expected 7"),
        ({"flavour": "float32/mean/cube/input/weight/own/promoted"}, "root='cube' is not valid"),
    ],
)
def test_the_op_names_a_bad_argument(change, message):
    args = {"x": torch.ones(2, H), "residual": torch.ones(2, H), "weight": torch.ones(H), **change}
    with pytest.raises(ValueError, match=message):
        tpfuse.ops.all_reduce_add_rms_norm(**args)


def test_the_op_without_a_process_group_says_so():
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="no process group is initialized"):
        tpfuse.ops.all_reduce_add_rms_norm(torch.ones(2, H), None, torch.ones(H))
