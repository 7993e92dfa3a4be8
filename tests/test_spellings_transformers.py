"""Every RMSNorm class of the installed transformers, behind all_reduce + add: fused exactly, or refused by name."""

from __future__ import annotations

from collections import Counter

import graphs
import pytest
import spellings
import torch

pytestmark = pytest.mark.long  # not on every save

pytest.importorskip("transformers", reason="needs the extra tpfuse[hf]")


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(2)
    yield
    torch.distributed.destroy_process_group()


def region(module: torch.nn.Module):
    names = [n for n, _ in module.named_parameters()]

    def f(x, residual, *parameters):
        h = residual + graphs.all_reduce(x)
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (h,)), h

    return f, [p.detach() for p in module.parameters()]


def judge(norm: spellings.NormClass, dtype: torch.dtype) -> str:
    """What became of one class: ``fused``, ``refused: reason`` or ``not constructible``; wrong values raise."""
    module = spellings.build(norm)
    if module is None:
        return "not constructible"
    module = module.to(dtype)
    f, parameters = region(module)
    x = torch.randn(2, 3, spellings.HIDDEN).to(dtype)
    try:
        gm = graphs.trace(f, (x, torch.randn_like(x), *parameters))
    except Exception:
        return "not constructible"
    new, report = graphs.fused_copy(gm)
    assert len(report.sites) == 1, f"{norm}: expected one site, got {report.sites}"
    (site,) = report.sites
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        args = [(torch.randn(x.shape, generator=generator) * 3).to(dtype) for _ in range(2)]
        assert graphs.equal(gm(*args, *parameters), new(*args, *parameters)), f"{norm} in {dtype}: other bits"
    if site.fused:
        assert graphs.count(new) == 1 and graphs.all_reduces_left(new) == 0
        return "fused"
    return f"refused: {site.reason}"


@pytest.mark.parametrize(
    ("dtype", "every"),
    [
        (torch.bfloat16, 8),
        *(pytest.param(dtype, 1, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float32)),
    ],
    ids=str,
)
def test_every_rms_norm_class_fuses_exactly_or_is_refused_by_name(dtype, every, capsys):
    """All classes where slow tests run, else every eighth."""
    classes = spellings.all_classes()
    assert len(classes) >= 150, "transformers has lost most of its RMSNorm classes; is the search still right?"
    classes = list(classes)[::every]
    outcomes = {norm: judge(norm, dtype) for norm in classes}
    plain = {n: o for n, o in outcomes.items() if not n.gated and o != "not constructible"}
    fused = sum(o == "fused" for o in plain.values())
    with capsys.disabled():
        print(f"\n{len(classes)} RMSNorm classes, {dtype}: {dict(Counter(outcomes.values()))}")
        print(f"plain: {fused} of {len(plain)} fused exactly")
        for norm, outcome in outcomes.items():
            if outcome != "fused":
                print(f"  {norm}{' (gated)' if norm.gated else ''}: {outcome}")
    assert fused >= 0.95 * len(plain)
