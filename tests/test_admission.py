"""Which rule lets the policy fuse a sum over some ranks: proved by a layer, not refuted by the graph, or neither."""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import tpfuse
from tpfuse.inspect import table

H = 16
ALL, LOW, COLUMN = (0, 1, 2, 3), (0, 1), (0, 2)


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(4)
    yield
    dist.destroy_process_group()


class Part(nn.Module):
    """An attention or an MLP as far as the pass sees it: a product and its sum over some ranks."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(H, H), requires_grad=False)
        self.group = graphs.world() if ranks == ALL else dist.new_group(list(ranks)).group_name

    def forward(self, x: Tensor) -> Tensor:
        return graphs.all_reduce(x @ self.weight, group=self.group)


class Layer(nn.Module):
    """``attention`` and ``mlp`` are the ranks of each part; None where it is not cut."""

    def __init__(self, attention: tuple[int, ...] | None, mlp: tuple[int, ...] | None) -> None:
        super().__init__()
        self.self_attn = nn.Identity() if attention is None else Part(attention)
        self.mlp = nn.Identity() if mlp is None else Part(mlp)
        self.norms = nn.ModuleList(nn.RMSNorm(H, eps=1e-6) for _ in range(2))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h + self.self_attn(x)
        x = self.norms[0](h)
        h = h + self.mlp(x)
        return self.norms[1](h), h


class Model(nn.Module):
    def __init__(self, *layers: tuple[tuple[int, ...] | None, tuple[int, ...] | None]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(*ranks) for ranks in layers)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.layers:
            x, h = layer(x, h)
        return x


def report_of(policy: str, *layers: tuple[tuple[int, ...] | None, tuple[int, ...] | None]) -> tpfuse.GraphReport:
    torch._dynamo.reset()
    tpfuse.clear_reports()
    options = {"tpfuse.inner": "aot_eager", "tpfuse.policy": policy, "tpfuse.verify": True}
    with torch.no_grad():
        torch.compile(Model(*layers), backend="tpfuse", options=options)(torch.randn(3, H))
    (report,) = tpfuse.reports()
    return report


def rules(policy: str, *layers: tuple[tuple[int, ...] | None, tuple[int, ...] | None]) -> list[str | None]:
    """For each sum the rule that admitted it, or the reason why it was kept."""
    return [site.admitted if site.fused else site.reason for site in report_of(policy, *layers).sites]


PROVED, FREE, REFUTED, KEPT = "shared-layer", "not-refuted", "group-mismatch", "policy"


@pytest.mark.parametrize(
    ("layers", "shared", "strict"),
    [
        ([(ALL, ALL)], [PROVED, PROVED], [PROVED, PROVED]),
        ([(None, ALL), (None, ALL)], [FREE, FREE], [KEPT, KEPT]),
        ([(LOW, None)], [FREE], [KEPT]),
        ([(LOW, ALL)], [REFUTED, REFUTED], [REFUTED, REFUTED]),
        ([(LOW, COLUMN)], [REFUTED, REFUTED], [REFUTED, REFUTED]),
        # One layer's proof holds for its list everywhere, in a layer that has another list for its MLP too.
        ([(LOW, LOW), (LOW, ALL)], [PROVED, PROVED, PROVED, REFUTED], [PROVED, PROVED, PROVED, REFUTED]),
        # What one layer refutes is refuted where only one of the two is cut.
        ([(LOW, ALL), (LOW, None)], [REFUTED, REFUTED, REFUTED], [REFUTED, REFUTED, KEPT]),
        # Hybrids: a layer has attention or an MLP.
        ([(ALL, None), (None, ALL)], [FREE, FREE], [KEPT, KEPT]),
        ([(LOW, None), (None, ALL)], [REFUTED, REFUTED], [KEPT, KEPT]),
    ],
    ids=str,
)
@torch.no_grad()
def test_what_the_graph_shows_decides(layers, shared, strict):
    assert rules("shared", *layers) == shared
    assert rules("strict", *layers) == strict
    assert rules("all", *layers) == ["policy-all"] * len(shared)


def test_a_refusal_says_which_layer_shows_the_difference():
    report = report_of("shared", (LOW, ALL), (LOW, None))
    assert {site.detail for site in report.sites} == {
        "attention of layer 0 reduces over [0, 1], the MLP over [0, 1, 2, 3]; tpfuse.policy='all' would fuse it"
    }


def test_the_table_says_what_is_fused_without_a_proof():
    shown = table.plain(report_of("shared", (None, ALL)))
    assert "not-refuted (1): nothing in the graph shows these ranks to be of attention or MLP alone (0-3)" in shown
    assert "not-refuted" not in table.plain(report_of("shared", (ALL, ALL)))


def test_a_report_of_an_earlier_version_names_no_rule():
    data = report_of("shared", (ALL, ALL)).to_dict()
    for site in data["sites"]:
        del site["admitted"]
    assert [site.admitted for site in tpfuse.GraphReport.from_dict(data).sites] == [None, None]
