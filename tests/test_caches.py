"""Compile caches: a second process reuses what the first compiled, the report survives, and whatever changes misses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import layers
import pytest
import torch
from ranks import RankPool, run_ranks

pytestmark = pytest.mark.ranks

FUSED = 2  # one layer


def compile_once(
    rank: int,
    world_size: int,
    folders: list[str],
    options: dict[str, Any] | None = None,
    n_layers: int = 1,
    digest: str = "",
) -> dict[str, Any]:
    """Compile and run the decoder with this rank's cache folder; return counters, reports and the output."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folders[rank]
    import tpfuse
    from tpfuse.inner import inductor

    if digest:
        inductor.sources_digest = lambda: digest
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    tpfuse.clear_reports()
    model = layers.Decoder(n_layers, dtype=torch.float32)
    compiled = torch.compile(model, backend="tpfuse", options={"tpfuse.inner": "inductor", **(options or {})})
    with torch.no_grad():
        want, got = model(layers.tokens()), compiled(layers.tokens())
    return {
        "autograd_hit": counters["aot_autograd"]["autograd_cache_hit"],
        "autograd_miss": counters["aot_autograd"]["autograd_cache_miss"],
        "fx_hit": counters["inductor"]["fxgraph_cache_hit"],
        "fx_miss": counters["inductor"]["fxgraph_cache_miss"],
        "compiles": counters["aot_autograd"]["total"],
        "bypass": counters["aot_autograd"]["autograd_cache_bypass"] + counters["inductor"]["fxgraph_cache_bypass"],
        "reports": [r.to_dict() for r in tpfuse.reports()],
        "close": torch.allclose(want, got, rtol=1e-5, atol=1e-5),
        "output": got,
    }


def folders(tmp_path: Path, names: str) -> list[str]:
    """One cache folder a rank, e.g. ``"ab"``: rank 0 uses a, rank 1 uses b."""
    return [str(tmp_path / name) for name in names]


def numbers(result: dict[str, Any]) -> dict[str, int]:
    return {k: result[k] for k in ("autograd_hit", "autograd_miss", "fx_hit", "fx_miss", "bypass")}


def fused(result: dict[str, Any]) -> int:
    return sum(site["fused"] for report in result["reports"] for site in report["sites"])


def was_hit(result: dict[str, Any]) -> bool:
    """A hit in AOTAutograd's cache loads the FX graph with it, so nothing was compiled."""
    return bool(result["autograd_hit"] == 1 and result["autograd_miss"] == result["fx_miss"] == 0)


ENV = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def cold(root):
    """The first compile, in processes that have ended since; it fills the folders a and b."""
    return run_ranks(compile_once, 2, folders(root, "ab"), env=ENV)


@pytest.fixture(scope="module")
def pool(cold):
    with RankPool(2, env=ENV) as pool:
        yield pool


def test_a_second_process_hits_both_caches_and_has_the_report(root, cold, pool, capsys):
    warm = pool.run(compile_once, folders(root, "ab"))
    with capsys.disabled():
        print()
        for name, results in (("cold", cold), ("warm", warm)):
            for rank, result in enumerate(results):
                print(f"  {name} rank {rank}: {numbers(result)}, {fused(result)} fused")
    for first, second in zip(cold, warm, strict=True):
        assert first["fx_miss"] == 1
        assert first["compiles"] == second["compiles"] == 1
        assert first["bypass"] == second["bypass"] == 0
        assert was_hit(second)
        assert second["fx_hit"] == 1
        assert fused(first) == fused(second) == FUSED
        assert torch.equal(first["output"], second["output"])
        assert first["close"]
        assert [(s["role"], s["layer"]) for s in first["reports"][0]["sites"]] == [("attention", 0), ("mlp", 0)]
        assert first["reports"][0]["sites"] == second["reports"][0]["sites"]
        assert first["reports"][0]["layers"] == second["reports"][0]["layers"]
        assert [r["from_cache"] for r in second["reports"]] == [True]
        assert all(site["lowered"] for site in second["reports"][0]["sites"])  # on a CPU, in fp32


def test_warm_rank_0_with_cold_rank_1_does_not_hang(root, pool):
    warm, cold = pool.run(compile_once, folders(root, "ac"))
    assert was_hit(warm)
    assert cold["fx_miss"] == 1
    assert fused(warm) == fused(cold) == FUSED
    assert torch.equal(warm["output"], cold["output"])


@pytest.mark.parametrize("names", ["aa", "ba"], ids=["one folder", "the other's folder"])
def test_a_rank_reads_what_another_rank_of_the_same_group_compiled(root, pool, names):
    for rank, result in enumerate(pool.run(compile_once, folders(root, names))):
        assert was_hit(result)
        assert fused(result) == FUSED
        assert [(r["rank"], r["from_cache"]) for r in result["reports"]] == [(rank, True)]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        pytest.param({"tpfuse.policy": "off"}, 0, id="policy", marks=pytest.mark.slow),
        pytest.param({"tpfuse.fuel": 1}, 1, id="fuel", marks=pytest.mark.slow),
        pytest.param({"tpfuse.numerics": "relaxed"}, FUSED, id="numerics"),
    ],
)
def test_a_changed_option_misses(root, pool, options, count):
    for result in pool.run(compile_once, folders(root, "ab"), options):
        assert not was_hit(result)
        assert result["fx_miss"] == 1
        assert fused(result) == count


def test_a_changed_source_misses(root, pool):
    for result in pool.run(compile_once, folders(root, "ab"), None, 1, "changed"):
        assert not was_hit(result)
        assert result["fx_miss"] == 1
        assert fused(result) == FUSED


def test_the_digest_reads_every_module_that_decides():
    from tpfuse import ops, passes
    from tpfuse.inner import inductor

    inductor.sources_digest.cache_clear()
    read: list[Path] = []
    plain = Path.read_bytes

    def spy(path: Path) -> bytes:
        read.append(path.resolve())
        return plain(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", spy)
        inductor.sources_digest()
    names = {path.name for path in read}
    assert {"backend.py", "dynamo.py", "options.py", "norms.py", "collectives.py", "one_shot.py", "select.py"} <= names
    for part in (passes, ops):
        assert set(Path(str(part.__file__)).resolve().parent.glob("*.py")) <= set(read)


def test_a_hit_whose_report_is_gone_compiles_again(root, pool):
    for kept in root.rglob("tpfuse/*.json"):
        kept.unlink()
    for result in pool.run(compile_once, folders(root, "ab")):
        assert result["autograd_hit"] == 1
        assert result["compiles"] == 2  # the one hit, and the one without caches
        assert fused(result) == FUSED
        assert [r["from_cache"] for r in result["reports"]] == [False]
        assert result["close"]
    for result in pool.run(compile_once, folders(root, "ab")):
        assert was_hit(result)
        assert [r["from_cache"] for r in result["reports"]] == [True]


def compile_from_a_bundle(rank: int, world_size: int, before: list[str], after: list[str]) -> dict[str, Any]:
    """Compile with one folder, bundle what its caches gave, and compile with a folder that holds the bundle alone."""
    compile_once(rank, world_size, before)
    saved = torch.compiler.save_cache_artifacts()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = after[rank]
    torch.compiler.load_cache_artifacts(saved[0])
    return compile_once(rank, world_size, after)


def test_a_bundle_of_the_caches_carries_the_report(root, pool):
    for result in pool.run(compile_from_a_bundle, folders(root, "ab"), folders(root, "mn")):
        assert was_hit(result)
        assert fused(result) == FUSED
        assert [r["from_cache"] for r in result["reports"]] == [True]


def test_graph_ids_stay_unique_when_reports_come_from_disk(root, pool):
    ids = [pool.run(compile_once, folders(root, "ab"))[0]["reports"][0]["graph_id"] for _ in range(2)]
    assert len(set(ids)) == 2


def identities(rank: int, world_size: int) -> dict[str, Any]:
    """The cache identity of the pass where each rank is a member of another group."""
    import torch.distributed as dist
    from tpfuse.passes import unregister_collective

    from tpfuse import register_collective
    from tpfuse.inner import inductor
    from tpfuse.options import Options

    def identity() -> str:
        return inductor.InductorPass(Options(), False, None).uuid()

    alone = identity()
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    mine = pairs[rank // 2]
    split = identity()
    register_collective(torch.ops._c10d_functional.broadcast, group=2)
    registered = identity()
    by_place = inductor.InductorPass(Options(), False, None, by_place=True).uuid()
    unregister_collective(torch.ops._c10d_functional.broadcast)
    return {"alone": alone, "split": split, "registered": registered, "name": mine.group_name, "place": by_place}


def test_the_identity_knows_the_layout_and_no_rank():
    results = run_ranks(identities, 4)
    assert len({r["name"] for r in results}) > 1, "group names differ between ranks"
    for key in ("alone", "split", "registered"):
        assert len({r[key] for r in results}) == 1
    assert len({r["place"] for r in results}) == 4, "where the place in a group decides, ranks share nothing"
    first = results[0]
    assert len({first["alone"], first["split"], first["registered"]}) == 3


def kept_when_the_entry_is_there(rank: int, world_size: int, folder: str) -> list[int]:
    """What another rank would read as the report, at the moment when Inductor has put the graph into its caches."""
    from tpfuse import report_cache
    from tpfuse.inner import inductor

    seen: list[int] = []
    original, keys = inductor.compat.compile_fx, []

    def compile_fx(gm: Any, inputs: Any, patches: Any) -> Any:
        keys.append(patches[inductor.PRE_PASS].keep_as)
        compiled = original(gm, inputs, patches)
        found = report_cache.load(keys[-1])
        seen.append(-1 if found is None else sum(len(report.sites) for report in found))
        return compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inductor.compat, "compile_fx", compile_fx)
        compile_once(rank, world_size, [folder] * world_size)
    return seen


def test_the_report_is_there_before_the_entry(tmp_path):
    """Else a rank that finds the entry in between compiles once more, for a report."""
    assert run_ranks(kept_when_the_entry_is_there, 1, str(tmp_path)) == [[FUSED]]
