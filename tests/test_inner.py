"""Inner compilers: every mode and setting a user may have on keeps the counts and the numbers."""

from __future__ import annotations

import os
import re
from typing import Any

import layers
import pytest
import torch
from ranks import RankPool

pytestmark = pytest.mark.ranks

FUSED = 2  # one layer, two reductions
ENV = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    # One folder for all: equal kernels are then built once.
    return {**ENV, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor"))}


@pytest.fixture(scope="module")
def pool(env):
    with RankPool(2, env=env) as pool:
        yield pool


@pytest.fixture(scope="module")
def alone(env):
    """For what settings of a compiler do to a graph: one rank, whose sums are its own."""
    with RankPool(2, env=env, alone=True) as pool:
        yield pool


def run(
    rank: int,
    world_size: int,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    lengths: tuple[int, ...] = (5,),
    marked: bool = False,
    **compile_kw: Any,
) -> dict[str, Any]:
    """Compile the decoder, run it on rows of each length, compare with eager."""
    import tpfuse

    torch._dynamo.reset()
    tpfuse.clear_reports()
    model = layers.Decoder(1, dtype=dtype)
    compiled = torch.compile(model, backend="tpfuse", options=options, **compile_kw)
    outputs, differences, equal = [], [], True
    with torch.no_grad():
        for length in lengths:
            tokens = layers.tokens(2, length)
            if marked:
                torch._dynamo.mark_dynamic(tokens, 1)
            want, got = model(tokens), compiled(tokens)
            outputs.append(got)
            differences.append((want - got).abs().max().item())
            equal = equal and torch.equal(want, got)
    reports = tpfuse.reports()
    return {
        "graphs": len(reports),
        "fused": sum(len(r.fused) for r in reports),
        "found": sum(len(r.sites) for r in reports),
        "reasons": sorted(str(s.reason) for r in reports for s in r.kept),
        "shapes": [s.shape for r in reports for s in r.sites],
        "error": max(differences),
        "equal": equal,
        "outputs": outputs,
    }


def run_keywords(rank: int, world_size: int, keywords: dict[str, Any]) -> dict[str, Any]:
    return run(rank, world_size, **keywords)


def run_with_overlap(rank: int, world_size: int, keywords: dict[str, Any]) -> dict[str, Any]:
    """torch's overlap scheduling asks the GPU for its memory bandwidth; here it is told one."""
    from torch.utils import _runtime_estimation as estimation

    asked = estimation.get_gpu_dram_gbps
    estimation.get_gpu_dram_gbps = lambda: 1000  # type: ignore[assignment]
    try:
        return run(rank, world_size, **keywords)
    finally:
        estimation.get_gpu_dram_gbps = asked


def check(results: list[dict[str, Any]], fused: int = FUSED, found: int = FUSED, graphs: int = 1) -> None:
    for result in results:
        assert (result["fused"], result["found"], result["graphs"]) == (fused, found, graphs), result["reasons"]
        assert result["error"] < 1e-5
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0]["outputs"], other["outputs"], strict=True))


@pytest.mark.parametrize(
    ("inner", "dtype"),
    [
        ("aot_eager", torch.bfloat16),
        ("eager", torch.float16),
        *(
            pytest.param(inner, dtype, marks=pytest.mark.slow)
            for inner, dtype in (
                ("eager", torch.bfloat16),
                ("aot_eager", torch.float16),
                ("aot_eager", torch.float32),
                ("eager", torch.float32),
            )
        ),
    ],
    ids=str,
)
def test_eager_inner_compilers_give_the_bits_of_eager(pool, inner, dtype):
    results = pool.run(run_keywords, {"options": {"tpfuse.inner": inner}, "dtype": dtype})
    check(results)
    assert all(r["equal"] for r in results)


INDUCTOR = {"default": {}, "freezing": {"freezing": True}}
# These work on what stands around the op; for the C++ wrapper the compiler takes ten seconds.
OTHERS = {
    "cpp wrapper": {"cpp_wrapper": True},
    "memory planning": {"memory_planning": True},
    "no pattern matcher": {"pattern_matcher": False},
}


@pytest.mark.parametrize(
    "settings",
    [
        *(pytest.param(settings, id=name) for name, settings in INDUCTOR.items()),
        *(pytest.param(settings, id=name, marks=pytest.mark.slow) for name, settings in OTHERS.items()),
    ],
)
def test_inductor_settings(alone, settings):
    check(alone.run(run_keywords, {"options": settings}))


@pytest.mark.slow  # the quick run has Inductor on two ranks in test_caches.py
def test_inductor_on_two_ranks(pool):
    check(pool.run(run_keywords, {"options": {}}))


@pytest.mark.parametrize(
    "mode",
    [
        "default",
        "reduce-overhead",
        *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("max-autotune-no-cudagraphs", "max-autotune")),
    ],
)
def test_inductor_modes(alone, mode):
    # torch.compile takes either mode= or options=, so the inner compiler is the default one.
    check(alone.run(run_keywords, {"options": None, "mode": mode}))


def test_a_mode_without_post_grad_passes_is_refused(pool):
    message = pool.run(refused, "lite")[0]
    assert "use_post_grad_passes" in message
    assert "tpfuse.inner" in message


def refused(rank: int, world_size: int, mode: str) -> str:
    torch._dynamo.reset()
    compiled = torch.compile(layers.Decoder(1), backend="tpfuse", mode=mode)
    try:
        with torch.no_grad():
            compiled(layers.tokens())
    except Exception as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("inner", "how"),
    [
        pytest.param("aot_eager", {"dynamic": True}, id="dynamic-aot_eager"),
        *(
            pytest.param(inner, how, id=f"{name}-{inner}", marks=pytest.mark.slow)
            for inner, name, how in (
                ("inductor", "marked", {"marked": True}),
                ("inductor", "dynamic", {"dynamic": True}),
                ("aot_eager", "marked", {"marked": True}),
                ("inductor", "full", {"dynamic": True, "fullgraph": True}),
                ("aot_eager", "full", {"dynamic": True, "fullgraph": True}),
            )
        ),
    ],
)
def test_dynamic_rows_compile_once(alone, inner, how):
    results = alone.run(run_keywords, {"options": {"tpfuse.inner": inner}, "lengths": (5, 7, 9), **how})
    check(results)
    assert any(isinstance(size, str) for shape in results[0]["shapes"] for size in shape)


OVERLAP = {
    "bucketing": {"bucket_all_reduces_fx": "all"},
    "reordering": {"reorder_for_compute_comm_overlap": True},
    "overlap scheduling": {
        "aten_distributed_optimizations.enable_overlap_scheduling": True,
        "aten_distributed_optimizations.collective_bucketing": True,
        # The other estimator runs each kernel on the GPU.
        "aten_distributed_optimizations.compute_estimator": "analytical",
    },
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[] if name == "overlap scheduling" else pytest.mark.slow)
        for name, settings in OVERLAP.items()
    ],
)
def test_torchs_own_collective_passes_work_on_what_is_left(alone, settings):
    results = alone.run(run_with_overlap, {"options": {**settings, "tpfuse.fuel": 1}})
    check(results, fused=1)
    assert results[0]["reasons"] == ["fuel"]


def with_users_passes(rank: int, world_size: int) -> dict[str, Any]:
    """The user's passes by option, by config and (where torch takes lists) as a list; each must run, before ours."""
    with pytest.MonkeyPatch.context() as patch:
        # A rank that finds in the cache what a faster one has compiled runs no passes.
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", os.path.join(os.environ["TORCHINDUCTOR_CACHE_DIR"], f"rank{rank}"))
        return _with_users_passes(rank, world_size)


def _with_users_passes(rank: int, world_size: int) -> dict[str, Any]:
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass, CustomInferenceAwareGraphPass

    seen: list[str] = []

    class Theirs(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            before = sum("all_reduce.default" in str(n.target) for n in graph.nodes)
            seen.append(f"pre saw {before} all-reduces")

        def uuid(self) -> str:
            return "theirs"

    class Aware(CustomInferenceAwareGraphPass):
        def __call__(self, graph: Any, is_inference: bool) -> None:
            seen.append(f"aware, inference {is_inference}")

        def uuid(self) -> str:
            return "aware"

    class After(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            fused = sum("tpfuse" in str(n.target) for n in graph.nodes)
            seen.append(f"post saw {fused} fused ops")

        def uuid(self) -> str:
            return "after"

    found = {}
    theirs = Theirs()
    found["option"] = run(
        rank,
        world_size,
        {"post_grad_custom_pre_pass": theirs, "post_grad_custom_post_pass": After(), "tpfuse.lower": False},
    )
    with config.patch(post_grad_custom_pre_pass=theirs):
        found["config"] = run(rank, world_size, {"tpfuse.policy": "all"})
        found["left in place"] = config.post_grad_custom_pre_pass is theirs
    found["list"] = run(rank, world_size, {"post_grad_custom_pre_pass": [theirs, Aware()]})
    found["plain function"] = run(
        rank, world_size, {"post_grad_custom_pre_pass": lambda graph: seen.append("function")}
    )
    found["seen"] = seen
    return found


def test_the_users_passes_run_before_ours_and_stay(alone):
    found = alone.run(with_users_passes)
    for name in ("option", "config", "list", "plain function"):
        check([result[name] for result in found])
    assert found[0]["left in place"]
    assert found[0]["seen"] == [
        "pre saw 2 all-reduces",
        "post saw 2 fused ops",
        "pre saw 2 all-reduces",
        "pre saw 2 all-reduces",
        "aware, inference True",
        "function",
    ]


def generated(rank: int, world_size: int, options: dict[str, Any]) -> str:
    """Inductor's code for the decoder with the op in it."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    model = layers.Decoder(1)
    compiled = torch.compile(
        model, backend="tpfuse", options={**options, "tpfuse.lower": False, "fx_graph_cache": False}
    )
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        _, codes = run_and_get_code(compiled, layers.tokens())
    return "\n".join(codes)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"memory_planning": True}, marks=pytest.mark.slow)], ids=["default", "memory planning"]
)
def test_the_partial_sum_is_not_copied(alone, options):
    """The op reads the buffer that the matrix multiplication wrote; no kernel stands between the two."""
    code = alone.run(generated, options)[0]
    calls = re.findall(r"tpfuse\.all_reduce_add_rms_norm\.default\((?:reinterpret_tensor\()?(\w+)", code)
    assert len(calls) == FUSED
    alias = dict(re.findall(r"(\w+) = (\w+); del \2\s+# reuse", code))
    for name in calls:
        assert re.search(rf"extern_kernels\.\w+\([^\n]*out=(?:reinterpret_tensor\()?{name}\b", code), (name, alias)
    assert "aten.clone" not in code


def layer_by_layer(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Each layer compiled alone: the residual crosses the graphs, and so does the last reduction of each layer."""
    import tpfuse

    torch._dynamo.reset()
    tpfuse.clear_reports()
    model = layers.Decoder(2, dtype=torch.float32)
    with torch.no_grad():
        want = model(layers.tokens())
        for index, layer in enumerate(model.layers):
            model.layers[index] = torch.compile(layer, backend="tpfuse", options=options)
        got = model(layers.tokens())
    sites = [s for r in tpfuse.reports() for s in r.sites]
    return {
        "sites": [(s.role, s.fused, s.reason) for s in sites],
        "remedies": [s.remedy for s in sites if not s.fused],
        "error": (want - got).abs().max().item(),
    }


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_compile_a_layer_fuses_the_reduction_inside_it(alone, inner):
    for result in alone.run(layer_by_layer, {"tpfuse.inner": inner}):
        one_layer = [("attention", True, None), ("mlp", False, "no-norm")]
        # Two layers of one class may share one graph; every compile shows the same two sites.
        assert result["sites"] in (one_layer, 2 * one_layer)
        assert all("compile the whole model" in remedy for remedy in result["remedies"])
        assert result["error"] < 1e-5


def broken_inside(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """A graph break between the attention's residual sum and the norm that reads it."""
    import tpfuse

    torch._dynamo.reset()
    tpfuse.clear_reports()
    model = layers.Decoder(2, dtype=torch.float32, break_inside=True)
    with torch.no_grad():
        want, got = model(layers.tokens()), torch.compile(model, backend="tpfuse", options=options)(layers.tokens())
    sites = [s for r in tpfuse.reports() for s in r.sites]
    return {"sites": [(s.role, s.fused, s.reason) for s in sites], "error": (want - got).abs().max().item()}


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", [pytest.param("strict", marks=pytest.mark.slow), "all"])
def test_a_graph_break_inside_a_layer_costs_only_what_it_cuts(alone, inner, policy):
    for result in alone.run(broken_inside, {"tpfuse.inner": inner, "tpfuse.policy": policy}):
        attention = [s for s in result["sites"] if s[0] == "attention"]
        mlp = [s for s in result["sites"] if s[0] == "mlp"]
        assert attention, result
        assert all(s[1:] == (False, "no-norm") for s in attention)
        assert len(mlp) >= 1
        assert result["error"] < 1e-5


def functions_only(h: torch.Tensor, weights: tuple[torch.Tensor, ...], act: Any) -> torch.Tensor:
    """Two layers without a module, so without names: roles come from what is computed alone."""
    up, down, out, norm = weights
    hidden = h.shape[-1]

    def add_norm(x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        reduce = torch.ops._c10d_functional
        name = torch.distributed.group.WORLD.group_name  # type: ignore[union-attr]
        h = h + reduce.wait_tensor(reduce.all_reduce(x, "sum", name))
        return norm * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)), h

    x = h
    for _ in range(2):
        q = x.view(1, 1, -1, hidden)
        x, h = add_norm(torch.nn.functional.scaled_dot_product_attention(q, q, q).view(-1, hidden) @ out, h)
        x, h = add_norm(act(x @ up) @ down, h)
    return x


def run_functions(rank: int, world_size: int, inner: str, act: str) -> tuple[int, list[str], float]:
    import tpfuse

    torch._dynamo.reset()
    tpfuse.clear_reports()
    function = getattr(torch.nn.functional, act)
    g = torch.Generator().manual_seed(0)
    h, *weights = (torch.randn(*s, generator=g) for s in ((5, 8), (8, 16), (16, 8), (8, 8), (8,)))
    compiled = torch.compile(functions_only, backend="tpfuse", options={"tpfuse.inner": inner})
    with torch.no_grad():
        error = (compiled(h, tuple(weights), function) - functions_only(h, tuple(weights), function)).abs().max().item()
    (report,) = tpfuse.reports()
    return len(report.fused), [s.role for s in report.sites], error


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "act", ["silu", "mish", *(pytest.param(act, marks=pytest.mark.slow) for act in ("gelu", "elu"))]
)
def test_an_mlp_without_module_names_is_known_by_its_activation(alone, inner, act):
    for fused, roles, error in alone.run(run_functions, inner, act):
        assert roles == ["attention", "mlp"] * 2
        assert fused == 4  # of two layers
        assert error < 1e-5
