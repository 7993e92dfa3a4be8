"""Every reason code can be produced, is documented with an example and a remedy, and reads well in a report."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import tpfuse.passes
from graphs import ALL, all_reduce, fused_copy, start_fake_group, trace, trace_as_written, world
from torch import Tensor, nn
from tpfuse.passes import GraphReport, PassOptions, Reason
from tpfuse.passes.reasons import REMEDIES

import tpfuse
from tpfuse.inspect import table

ROWS, HIDDEN = 3, 8
FUNCTIONAL = torch.ops._c10d_functional
WAIT = FUNCTIONAL.wait_tensor
DOCS = Path(__file__).parent.parent / "docs" / "troubleshooting.md"

Case = Callable[[], GraphReport]
CASES: dict[Reason, Case] = {}


def produces(reason: Reason) -> Callable[[Case], Case]:
    """Register the shortest program that is refused for this reason."""

    def register(case: Case) -> Case:
        CASES[reason] = case
        return case

    return register


def reported(f: Callable[..., object], *inputs: Tensor, options: PassOptions = ALL, **named: object) -> GraphReport:
    """The report for a function of tensors: x and residual of shape (2, 3, 8) and a weight, unless others are given."""
    given = inputs or (tensor(), tensor(), torch.rand(HIDDEN))
    return fused_copy(trace(f, given, named.pop("dynamic", ())), options, **named)[1]  # type: ignore[arg-type]


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (2, ROWS, HIDDEN))).to(dtype)


def norm(h: Tensor, weight: Tensor) -> Tensor:
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


def plain(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = r + all_reduce(x)
    return norm(h, w), h


def with_norm(odd: Callable[[Tensor, Tensor], Tensor], *inputs: Tensor) -> GraphReport:
    """The usual program with another norm."""
    return reported(lambda x, r, w: odd(r + all_reduce(x), w), *inputs)


@pytest.fixture(autouse=True, scope="module")
def group():
    start_fake_group(4)
    yield
    dist.destroy_process_group()


# -- what the reduction is ------------------------------------------------------------------------------------------


@produces(Reason.REDUCE_OP)
def _():
    return reported(lambda x, r, w: norm(r + all_reduce(x, "max"), w))


@produces(Reason.UNKNOWN_GROUP)
def _():
    gone = dist.new_group([0, 1])
    name = gone.group_name
    traced = trace(lambda x, r, w: norm(r + all_reduce(x, group=name), w), (tensor(), tensor(), torch.rand(HIDDEN)))
    dist.destroy_process_group(gone)
    return fused_copy(traced)[1]


@produces(Reason.GROUP_SIZE)
def _():
    alone = dist.new_group([0]).group_name
    return reported(lambda x, r, w: norm(r + all_reduce(x, group=alone), w))


@produces(Reason.DTYPE)
def _():
    return reported(plain, tensor(dtype=torch.bfloat16), tensor(dtype=torch.float64), torch.rand(HIDDEN))


@produces(Reason.TRAINING)
def _():
    return reported(plain, training=True)


# -- who reads the sum ----------------------------------------------------------------------------------------------


@produces(Reason.NO_NORM)
def _():
    return reported(lambda x, r, w: r + all_reduce(x) + w)


@produces(Reason.RETURNED)
def _():
    def f(x, r, w):
        y = all_reduce(x)
        return norm(r + y, w), y

    return reported(f)


@produces(Reason.EXTRA_READER)
def _():
    def f(x, r, w):
        y = all_reduce(x)
        return norm(r + y, w), y.abs().amax(-1)

    return reported(f)


@produces(Reason.ROWS_MOVE)
def _():
    return reported(lambda x, r, w: norm(r[:, -1:] + all_reduce(x)[:, -1:], w))


@produces(Reason.SPLIT_ALL_REDUCE)
def _():
    def f(x, r, w):
        rows = WAIT(FUNCTIONAL.reduce_scatter_tensor(x, "sum", 4, world()))
        return norm(r + WAIT(FUNCTIONAL.all_gather_into_tensor(rows, 4, world())), w)

    return reported(f, tensor(4, HIDDEN), tensor(4, HIDDEN), torch.rand(HIDDEN))


@produces(Reason.ROWS_SUMMED)
def _():
    """Llama4: what each expert gives to a token is reduced, and added up afterwards."""
    return reported(
        lambda x, r, w: norm(r + all_reduce(x * 2).view(2, -1, HIDDEN).sum(0), w),
        tensor(6, HIDDEN),
        tensor(3, HIDDEN),
        torch.rand(HIDDEN),
    )


@produces(Reason.SUM_OF_REDUCTIONS)
def _():
    return reported(lambda x, r, w: norm(r + (all_reduce(x) * r[..., :1] + all_reduce(x * 2)) * 0.5, w))


@produces(Reason.ADD_CHAIN)
def _():
    def f(x, r, a, b, w):
        return norm(((all_reduce(x) + a) + b) + r, w)

    return reported(f, tensor(), tensor(), tensor(), tensor(), torch.rand(HIDDEN))


@produces(Reason.RESIDUAL_SHAPE)
def _():
    return reported(plain, tensor(), tensor(1, ROWS, HIDDEN), torch.rand(HIDDEN))


@produces(Reason.RESIDUAL_DERIVED)
def _():
    def f(x, r, w):
        y = all_reduce(x)
        return norm(y + y, w)

    return reported(f)


@produces(Reason.MUTATION)
def _():
    def f(x, r, w):
        y = all_reduce(x)
        h = r + y
        n = norm(h, w)
        r.mul_(2.0)
        return n, r + h

    def g(x, r, w):
        y = all_reduce(x)
        y.mul_(2.0)
        return norm(r + y, w)

    given = (tensor(), tensor(), torch.rand(HIDDEN))
    found = [fused_copy(trace_as_written(program, given), ALL)[1] for program in (f, g)]
    return next((r for r in found if Reason.MUTATION in {s.reason for s in r.sites}), found[0])


@produces(Reason.ORDER)
def _():
    def f(x, r, w):
        y = all_reduce(x)
        other = all_reduce(torch.ones(4))
        return norm((r + other.sum()) + y, w)

    return reported(f)


# -- what the norm is -----------------------------------------------------------------------------------------------


@produces(Reason.UNKNOWN_NORM)
def _():
    return with_norm(lambda h, w: w * (h / (h.pow(4).mean(-1, keepdim=True) + 1e-6)))


@produces(Reason.LAYER_NORM)
def _():
    return with_norm(lambda h, w: w * (h - h.mean(-1, keepdim=True)) * torch.rsqrt(h.var(-1, keepdim=True) + 1e-6))


@produces(Reason.EPS_OUTSIDE_ROOT)
def _():
    return with_norm(lambda h, w: w * (h / (h.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)))


@produces(Reason.MEAN_DIM)
def _():
    return with_norm(lambda h, w: w * (h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-6)))


@produces(Reason.PARTIAL_WIDTH)
def _():
    return with_norm(lambda h, w: w * (h * torch.rsqrt(h[..., :4].pow(2).mean(-1, keepdim=True) + 1e-6)))


@produces(Reason.WEIGHT_INSIDE_MEAN)
def _():
    return with_norm(lambda h, w: h * torch.rsqrt((w * h).pow(2).mean(-1, keepdim=True) + 1e-6))


@produces(Reason.WEIGHT_SHAPE)
def _():
    return with_norm(norm, tensor(), tensor(), torch.rand(1, HIDDEN))


@produces(Reason.EPS_NOT_CONSTANT)
def _():
    def f(x, r, w, eps):
        h = r + all_reduce(x)
        return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps))

    return reported(f, tensor(), tensor(), torch.rand(HIDDEN), torch.tensor(1e-6))


@produces(Reason.SCALE_NOT_CONSTANT)
def _():
    def f(x, w, scale):
        return norm(all_reduce(x) * scale, w)

    return reported(f, tensor(), torch.rand(HIDDEN), torch.tensor(8.0, dtype=torch.float64))


@produces(Reason.STREAMS)
def _():
    def f(x, post, w):
        return norm((all_reduce(x).unsqueeze(-2) * post.unsqueeze(-1)).sum(-2), w)

    x = tensor()
    return reported(f, x, torch.rand(*x.shape[:-1], 4), torch.rand(HIDDEN))


@produces(Reason.NORM_STATISTICS)
def _():
    def f(q, k, w):
        squares = [x.pow(2).sum(-1, keepdim=True) for x in (q, k)]
        mean = all_reduce(torch.cat(squares, -1)) / (4 * HIDDEN)
        return w * (q * torch.rsqrt(mean[..., :1] + 1e-6)), w * (k * torch.rsqrt(mean[..., 1:] + 1e-6))

    return reported(f)


@produces(Reason.LAYOUT)
def _():
    def f(x, r, w):
        return norm(r.transpose(0, 1) + all_reduce(x.transpose(0, 1)), w)

    return reported(f)


@produces(Reason.DROPOUT)
def _():
    def f(x, r, w):
        return norm(r + nn.functional.dropout(all_reduce(x), 0.5, training=True), w)

    return reported(f)


@produces(Reason.RANKS_DISAGREE)
def _():
    return reported(plain, options=PassOptions(policy="all", refused={(0, 1, 2, 3): "rank 1 decided differently"}))


@produces(Reason.INTERNAL)
def _():
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.warns(RuntimeWarning, match="left the graph as it was: ValueError: odd"),
    ):
        patch.setattr("tpfuse.passes.norms.read", raises(ValueError("odd")))
        return reported(plain)


def raises(error: Exception) -> Callable[..., object]:
    def function(*_: object) -> object:
        raise error

    return function


@produces(Reason.UNKNOWN_FLAVOUR)
def _():
    def odd(h, w):
        mean = h.float().pow(2).mean(-1, keepdim=True).to(torch.float16).float()
        return w * (h.float() * torch.rsqrt(mean + 1e-6)).to(h.dtype)

    half = torch.bfloat16
    return with_norm(odd, tensor(dtype=half), tensor(dtype=half), torch.rand(HIDDEN).to(half))


@produces(Reason.DYNAMIC_WIDTH)
def _():
    def f(x, r):
        h = r + all_reduce(x)
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)

    return reported(f, tensor(), tensor(), dynamic=(2,))


# -- what the user asked for ----------------------------------------------------------------------------------------


class Reduced(nn.Module):
    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.proj, self.group = nn.Linear(HIDDEN, HIDDEN, bias=False), group

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        dist.all_reduce(y, group=self.group)
        return y


class Layer(nn.Module):
    """Attention reduces over one group, the MLP over another."""

    def __init__(self, attention: dist.ProcessGroup, mlp: dist.ProcessGroup) -> None:
        super().__init__()
        self.self_attn, self.mlp = Reduced(attention), Reduced(mlp)
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN, eps=1e-6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.self_attn(x)
        return self.norms[1](h + self.mlp(self.norms[0](h)))


class Model(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


@produces(Reason.GROUP_MISMATCH)
def _():
    model = Model(Layer(dist.new_group([0, 1]), dist.group.WORLD))
    with torch.no_grad():
        torch.compile(model, backend="tpfuse", options={"tpfuse.inner": "aot_eager"})(tensor())
    return tpfuse.reports()[-1]


@produces(Reason.POLICY)
def _():
    return reported(plain, options=PassOptions(policy="off"))


@produces(Reason.FUEL)
def _():
    return reported(plain, options=PassOptions(policy="all", fuel=0))


# -- the statements -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", list(Reason), ids=str)
def test_every_reason_can_be_produced(reason):
    assert reason in CASES, f"{reason}: no program here is refused for it; add one with @produces(Reason.{reason.name})"
    report = CASES[reason]()
    sites = [site for site in report.sites if site.reason == str(reason)]
    assert sites, f"expected {reason}, found {[(s.reason, s.detail) for s in report.sites]}"
    assert sites[0].detail
    shown = " ".join(table.plain(report).split())
    assert f"kept: {reason}" in shown
    assert sites[0].remedy in shown


def entries() -> dict[str, str]:
    """The text of each entry of the troubleshooting page by its heading."""
    parts = re.split(r"^### `([a-z-]+)`$", DOCS.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("reason", list(Reason), ids=str)
def test_every_reason_has_an_entry_with_an_example_and_its_remedy(reason):
    found = entries()
    assert str(reason) in found, f"docs/troubleshooting.md has no entry '### `{reason}`'"
    text = found[str(reason)]
    assert re.search(r"^```python\n.+?^```$", text, re.MULTILINE | re.DOTALL), f"{reason}: no example"
    remedy = f"**What to do.** {REMEDIES[reason]}"
    assert remedy in " ".join(text.split()), f"{reason}: the remedy differs from REMEDIES; expected: {remedy}"


def test_no_entry_is_left_over():
    assert set(entries()) == {str(reason) for reason in Reason}
