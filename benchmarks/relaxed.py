"""What a changed rounding order costs and gains in accuracy: the error of each rewrite beside that of the model.

The rewrites are those of ``tpfuse.numerics="relaxed"``, and ``qk_norm="reduce"`` of ``tpfuse.parallel.parallelize``.

python benchmarks/relaxed.py [--hidden 4096] [--rows 256] [--dtype bfloat16]

Runs on a CPU in one process, in a second. Errors are those of the normed output against the same formula in fp64: the root mean
square of the error over that of the output. *Changed* is the share of elements with other bits than the model's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from tpfuse.ops import LLAMA
from tpfuse.passes import PassOptions, fuse

from tpfuse.inspect.fake import fake_world
from tpfuse.parallel.qk_norms import Steps, norm_by_mean, square_sums

EPS, SCALE = 1e-6, 45.25  # the scale is Gemma's for a hidden size of 2048, in bf16
TWO_SUMS = (
    "routed and shared experts",
    "attention and MLP with biases",
    "attention and MLP, added to the residual in turn",
)


@dataclass(frozen=True)
class Line:
    """One rewrite: its name, the error of the model's own order and of the rewritten one, the share of changed elements."""

    name: str
    model: float
    relaxed: float
    changed: float


def all_reduce(x: Tensor) -> Tensor:
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    reduce: Any = torch.ops._c10d_functional
    return reduce.wait_tensor(reduce.all_reduce(x, "sum", name))


def llama(h: Tensor, w: Tensor) -> Tensor:
    f = h.float()
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).to(h.dtype)


def squares_rounded(h: Tensor, w: Tensor) -> Tensor:
    return w * (h.float() * torch.rsqrt(h.pow(2).float().mean(-1, keepdim=True) + EPS)).to(h.dtype)


def mean_rounded(h: Tensor, w: Tensor) -> Tensor:
    mean = h.float().pow(2).mean(-1, keepdim=True).to(h.dtype)
    return w * (h.float() * torch.rsqrt(mean.float() + EPS)).to(h.dtype)


def root_rounded(h: Tensor, w: Tensor) -> Tensor:
    root = torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + EPS)
    return w * (h * root.to(h.dtype))


# Rounding orders that no flavour has; the pass takes the nearest one.
NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nearest rounding order: the model rounds the squares": squares_rounded,
    "nearest rounding order: the model rounds the mean": mean_rounded,
    "nearest rounding order: the model rounds the root": root_rounded,
}


def of_norm(name: str, norm: Callable[[Tensor, Tensor], Tensor], x: Tensor, r: Tensor, w: Tensor) -> Line | None:
    """A norm whose order the fused op does not repeat; None where relaxed refuses it as well."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return norm(r + all_reduce(x), w)

    exact, relaxed = (_rewritten(model, (x, r, w), numerics) for numerics in ("exact", "relaxed"))
    if exact is not None:
        raise SystemExit(f"{name}: exact numerics fuse it, so there is nothing to compare; remove it from this script")
    if relaxed is None:
        return None
    # The residual sum is rounded in both; the error is that of the norm alone.
    want = llama_fp64(r + x, w)
    return _line(name, model(x, r, w), relaxed(x, r, w), want)


def of_scale(contributors: int, x: Tensor, w: Tensor, ranks: int = 4) -> Line:
    """``norm(t * sum(x))`` for a scalar tensor t: relaxed computes ``norm(sum(t * x))``."""
    generator = torch.Generator().manual_seed(7)
    parts = [torch.randn(x.shape, generator=generator).to(x.dtype) for _ in range(contributors)]
    parts += [torch.zeros_like(x)] * (ranks - contributors)
    scale = torch.tensor(SCALE, dtype=x.dtype)

    def reduced(given: list[Tensor]) -> Tensor:
        return torch.stack(given).float().sum(0).to(x.dtype)

    model = llama(reduced(parts) * scale, w)
    relaxed = llama(reduced([part * scale for part in parts]), w)
    want = llama_fp64(torch.stack(parts).double().sum(0) * scale.double(), w)
    which = "one of 4 ranks gives each row, as in an embedding" if contributors == 1 else f"{contributors} ranks give"
    return _line(f"scale before the reduction: {which}", model, relaxed, want)


def of_two_sums(order: str, r: Tensor, w: Tensor, ranks: int = 4) -> Line:
    """Two sums that meet in one norm; relaxed adds what each rank gives to the two, and sums once."""
    generator = torch.Generator().manual_seed(8)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(r.dtype)

    first, second = ([random(*r.shape) for _ in range(ranks)] for _ in range(2))
    a, b = random(r.shape[-1]), random(r.shape[-1])

    def reduced(given: list[Tensor]) -> Tensor:
        return torch.stack(given).float().sum(0).to(r.dtype)

    together = reduced([x + y for x, y in zip(first, second, strict=True)])
    one, other = reduced(first), reduced(second)
    exact = torch.stack(first).double().sum(0) + torch.stack(second).double().sum(0) + r.double()
    if order == "routed and shared experts":
        return _line(
            f"one reduction for two: {order}", llama(r + (one + other), w), llama(r + together, w), llama_fp64(exact, w)
        )
    if order == "attention and MLP with biases":
        model, relaxed = (one + a) + (other + b) + r, (together + (a + b)) + r
        exact = exact + a.double() + b.double()
    else:
        model, relaxed = (r + one) + other, r + together
    norm = partial(torch.nn.functional.layer_norm, normalized_shape=(r.shape[-1],))
    want = norm(exact, weight=w.double())
    return _line(f"one reduction for two: {order}", norm(model, weight=w), norm(relaxed, weight=w), want)


def of_wide_norm(x: Tensor, w: Tensor, ranks: int = 4) -> Line:
    """A norm over the columns of all ranks, of which each has some: they add up their sums of squares."""
    steps = Steps(LLAMA, EPS)
    columns, weights = x.chunk(ranks, -1), w.chunk(ranks)
    total = torch.stack([square_sums([part]) for part in columns]).sum(0)
    normed = [norm_by_mean(part, total / x.shape[-1], own, steps) for part, own in zip(columns, weights, strict=True)]
    return _line(
        '`qk_norm="reduce"`: 4 ranks have a part of each row', llama(x, w), torch.cat(normed, -1), llama_fp64(x, w)
    )


def llama_fp64(h: Tensor, w: Tensor) -> Tensor:
    f = h.double()
    return w.double() * f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)


def _rewritten(model: Callable[..., Tensor], args: tuple[Tensor, ...], numerics: str) -> GraphModule | None:
    graph = make_fx(model, tracing_mode="fake")(*args)
    report = fuse(graph, PassOptions(policy="all", numerics=numerics))
    return graph if report.fused else None


def _line(name: str, model: Tensor, relaxed: Tensor, want: Tensor) -> Line:
    def error(got: Tensor) -> float:
        return ((got.double() - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt()).item()

    return Line(name, error(model), error(relaxed), (model != relaxed).float().mean().item())


@torch.no_grad()
def lines(hidden: int, rows: int, dtype: torch.dtype) -> list[Line]:
    """One line for each rewrite that rounds in another order than the model."""
    generator = torch.Generator().manual_seed(0)
    x, r = ((torch.randn(rows, hidden, generator=generator) * 2).to(dtype) for _ in range(2))
    w = (torch.rand(hidden, generator=generator) + 0.5).to(dtype)
    with fake_world(4):
        found = [of_norm(name, norm, x, r, w) for name, norm in NORMS.items()]
    found += [of_scale(n, x, w) for n in (1, 4)]
    found += [of_two_sums(order, r, w) for order in TWO_SUMS]
    found += [of_wide_norm(x, w)]
    return [line for line in found if line is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    given = parser.parse_args()
    print("| rewrite | error, model's order | error, relaxed | changed |")
    print("|---|---|---|---|")
    for line in lines(given.hidden, given.rows, getattr(torch, given.dtype)):
        print(f"| {line.name} | {line.model:.3e} | {line.relaxed:.3e} | {line.changed:.1%} |")


if __name__ == "__main__":
    main()
