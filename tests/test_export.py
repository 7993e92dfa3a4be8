"""Without torch.compile: the pass on an exported program, on a plain graph module, and an AOTInductor package."""

from __future__ import annotations

import os
from typing import Any

import layers
import pytest
import torch
from ranks import RankPool

pytestmark = pytest.mark.ranks

ENV = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    with RankPool(2, env={**ENV, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor"))}) as pool:
        yield pool


@pytest.fixture(scope="module")
def alone():
    """For what depends on the graph alone: one rank, whose sums are its own."""
    with RankPool(2, alone=True) as pool:
        yield pool


def exported(n_layers: int = 2, dynamic: bool = False, decomposed: bool = True, **kw: Any) -> tuple[Any, Any]:
    model = layers.Decoder(n_layers, **kw)
    shapes = ({1: torch.export.Dim("columns", min=2, max=64)},) if dynamic else None
    with torch.no_grad():
        program = torch.export.export(model, (layers.tokens(),), dynamic_shapes=shapes)
        return model, program.run_decompositions() if decomposed else program


def fuse_exported(rank: int, world_size: int, folder: str, dynamic: bool) -> dict[str, Any]:
    import tpfuse

    _, program = exported(1, dynamic=dynamic)
    inputs = [layers.tokens(1, n) for n in ((5, 9) if dynamic else (5,))]
    with torch.no_grad():
        want = [program.module()(x) for x in inputs]
        report = tpfuse.fuse(program.graph_module)
        program.validate()
        path = os.path.join(folder, f"rank{rank}.pt2")
        torch.export.save(program, path)
        loaded = torch.export.load(path)
        got = [program.module()(x) for x in inputs]
        again = [loaded.module()(x) for x in inputs]
    targets = [str(n.target) for n in program.graph.nodes]
    return {
        "fused": len(report.fused),
        "found": len(report.sites),
        "left": sum("c10d_functional" in t for t in targets),
        "ops": sum("tpfuse" in t for t in targets),
        "equal": all(torch.equal(a, b) for a, b in zip(want, got, strict=True)),
        "loaded equal": all(torch.equal(a, b) for a, b in zip(want, again, strict=True)),
        "sources": {s.source.rsplit("/", 1)[-1].split(":")[0] for s in report.sites},
    }


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True], ids=["static", "dynamic"])
def test_an_exported_program_is_fused_saved_and_loaded(alone, tmp_path, dynamic):
    for result in alone.run(fuse_exported, str(tmp_path), dynamic):
        assert (result["fused"], result["found"], result["left"], result["ops"]) == (2, 2, 0, 2)
        assert result["equal"]
        assert result["loaded equal"]
        assert result["sources"] == {"layers.py"}


def fuse_as_captured(rank: int, world_size: int) -> list[tuple[str | None, str]]:
    import tpfuse

    _, program = exported(1, decomposed=False)
    report = tpfuse.fuse(program.graph_module)
    return [(s.reason, s.detail) for s in report.sites]


def test_a_program_with_in_place_writes_says_how_to_remove_them(alone):
    for reason, detail in alone.run(fuse_as_captured)[0]:
        assert reason == "mutation"
        assert "run_decompositions()" in detail


def fuse_plain_module(rank: int, world_size: int) -> dict[str, Any]:
    """A graph module traced by make_fx, with nothing of torch.compile or torch.export around it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    import tpfuse

    group = torch.distributed.group.WORLD.group_name

    def f(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = residual + torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group))
        return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)), h

    args = torch.randn(3, layers.HIDDEN), torch.randn(3, layers.HIDDEN), torch.randn(layers.HIDDEN)
    with torch.no_grad():
        gm = make_fx(f, tracing_mode="fake")(*args)
        want = f(*args)
        report = tpfuse.fuse(gm, tpfuse.passes.PassOptions(policy="all"))
        got = gm(*args)
    return {"fused": len(report.fused), "equal": all(torch.equal(a, b) for a, b in zip(want, got, strict=True))}


def test_fuse_is_a_plain_function_on_a_graph_module(pool):
    assert pool.run(fuse_plain_module) == [{"fused": 1, "equal": True}] * 2


def package(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Each rank packages its own shard, for the package holds that rank's weights."""
    import tpfuse

    model, program = exported(1, dtype=torch.float32)
    report = tpfuse.fuse(program.graph_module)
    path = os.path.join(folder, f"rank{rank}.pt2")
    # The wrapper is compiled without optimization: here only its result counts.
    torch._inductor.aoti_compile_and_package(
        program, package_path=path, inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"}
    )
    with torch.no_grad():
        want, got = model(layers.tokens()), torch._inductor.aoti_load_package(path)(layers.tokens())
    return {"fused": len(report.fused), "error": (want - got).abs().max().item(), "output": got}


@pytest.mark.slow
def test_an_aotinductor_package_of_a_fused_model_loads_and_runs(pool, tmp_path):
    results = pool.run(package, str(tmp_path))
    assert [r["fused"] for r in results] == [2, 2]
    assert all(r["error"] < 1e-5 for r in results)
    assert torch.equal(results[0]["output"], results[1]["output"])
