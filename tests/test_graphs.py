"""The graphs that tests of the pass start from are AOTAutograd's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule, Node


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(2)
    yield
    dist.destroy_process_group()


def norm(h: Tensor, w: Tensor) -> Tensor:
    f = h.float()
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-5)).to(h.dtype)


def plain(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = r + graphs.all_reduce(x)
    return norm(h, w), h


def writes_inside(x: Tensor, r: Tensor, w: Tensor) -> dict[str, Any]:
    """In-place operations on values of its own, views, a dropout that drops nothing, and nested outputs."""
    y = torch.nn.functional.dropout(graphs.all_reduce(x * 2), 0.1, training=False)
    h = r.clone()
    h.view(-1, 8).add_(y.reshape(-1, 8))
    unused = h + 1
    unused.mul_(2)
    return {"normed": norm(h, w), "rest": [h.transpose(0, 1), (x.flatten(),)]}


def writes_into_an_argument(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    r.add_(1)
    return norm(r + graphs.all_reduce(x), w)


def spelled_out(gm: GraphModule) -> list[Any]:
    """The nodes without their names; and dtypes, shapes and strides."""
    place = {node: index for index, node in enumerate(gm.graph.nodes)}
    found = []
    for node in gm.graph.nodes:
        given = () if node.op == "placeholder" else torch.fx.node.map_arg((node.args, node.kwargs), place.__getitem__)
        if node.op == "output":
            given = [place[a] if isinstance(a, Node) else a for a in node.args[0]]
        of = node.meta.get("val")
        kind = (of.dtype, of.shape, of.stride()) if isinstance(of, Tensor) else None
        found.append((node.op, node.target if node.op == "call_function" else None, given, kind))
    return found


@pytest.mark.parametrize("f", [plain, writes_inside, writes_into_an_argument])
def test_a_graph_that_is_traced_at_once_is_the_one_of_aotautograd(f: Callable[..., Any]) -> None:
    args = [torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8)]
    at_once, wanted = graphs.traced_at_once(f, args), graphs.traced_by_aot(f, args)
    if f is writes_into_an_argument:
        assert at_once is None
        at_once = graphs.trace(f, args)
    assert spelled_out(at_once) == spelled_out(wanted)
    assert graphs.equal(graphs.run(at_once, *args), graphs.run(wanted, *args))
