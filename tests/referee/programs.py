"""Random programs that look like transformer blocks, to run in eager and compiled.

Not drawn from the patterns that tpfuse knows: operands broadcast, reductions go over any dimensions with and without keepdim,
inputs may be square, views and in-place writes stand anywhere, widths are wrong, values are dead. A program is data (a tuple
of blocks), so a failing one prints as what it is; some raise in eager, and then say nothing about a compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """Something between an RMSNorm and its near misses."""

    fp32: bool
    square: str
    reduction: str
    dims: str
    keepdim: bool
    unsqueeze: bool
    denominator: str
    eps: str
    root: str
    weight: str
    cast: str
    part: bool


@dataclass(frozen=True)
class Block:
    reduce: str
    between: tuple[str, ...]
    residual: str
    norm: Norm
    second: Norm | None
    write: str
    outputs: tuple[str, ...]
    dead: bool
    use: str


@dataclass(frozen=True)
class Program:
    shape: tuple[int, ...]  # of the partial sums
    residual: tuple[int, ...]
    dtype: torch.dtype
    weight_dtype: torch.dtype | None
    blocks: tuple[Block, ...]
    seed: int


def mostly(usual: Any, *odd: Any) -> st.SearchStrategy[Any]:
    """The usual value nine times in ten: a program that is odd everywhere has no norm to fuse."""
    return st.sampled_from([*[usual] * (9 * len(odd)), *odd])


norms = st.builds(
    Norm,
    fp32=st.booleans(),
    square=st.sampled_from(["pow", "mul", "square"]),
    reduction=mostly("mean", "sum", "norm"),
    dims=mostly("last", "last, counted from the left", "first", "two", "all"),
    keepdim=mostly(True, False),
    unsqueeze=st.booleans(),
    denominator=mostly("width", "width + 1", "rows"),
    eps=mostly("number", "outside", "tensor", "none"),
    root=st.sampled_from(["rsqrt", "sqrt", "pow", "reciprocal"]),
    weight=mostly("after", "before", "none", "1 + w", "(1, H)", "(H, 1)", "inside"),
    cast=mostly("before the weight", "after the weight", "never"),
    part=mostly(False, True),
)
BETWEEN = (
    "flat", "unsqueeze", "squeeze", "clone", "bias (H,)", "bias (1, H)", "bias (1, 1, H)", "full", "scale", "scale by a tensor",
    "scale by a vector", "slice rows", "slice columns", "split and cat", "transpose", "expand", "relu", "view as square",
    "view of older buffer", "cast there and back",
)  # fmt: skip
blocks = st.builds(
    Block,
    reduce=mostly("functional", "in place", "in place with a view", "max", "in place, then written"),
    between=mostly((), *[(step,) for step in BETWEEN], *[("flat", step) for step in BETWEEN]),
    residual=mostly(
        "left", "right", "post", "post right", "none", "one row", "(1, H)", "number", "derived", "twice", "subtract", "alpha",
        "in place", "in fp32", "in fp32, rounded",
    ),
    norm=norms,
    second=st.one_of(st.none(), norms),
    write=mostly("nothing", "residual", "residual view", "sum", "weight", "h", "x", "normed"),
    outputs=mostly((), ("sum",), ("h",), ("normed", "row sums"), ("view",), ("h", "view")),
    dead=st.booleans(),
    use=st.sampled_from(["normed", "normed view", "first row", "residual"]),
)  # fmt: skip


@st.composite
def programs(draw: st.DrawFn) -> Program:
    hidden = draw(st.sampled_from([4, 8, 16]))
    rows = draw(st.lists(st.sampled_from([1, 2, 3, hidden]), min_size=1, max_size=3))
    shape = (*rows, hidden)
    trimmed = tuple(rows)
    while len(trimmed) > 1 and trimmed[0] == 1:
        trimmed = trimmed[1:]
    residual = draw(mostly(shape, (1, *shape), (*trimmed, hidden)))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float16]))
    weight_dtype = draw(st.sampled_from([None, None, torch.float32]))
    body = draw(st.lists(blocks, min_size=1, max_size=3).map(tuple))
    return Program(shape, residual, dtype, weight_dtype, body, draw(st.integers(0, 1 << 20)))


def inputs(program: Program, again: int = 0) -> tuple[Tensor, ...]:
    """x, residual, weight, bias: fresh random values for each ``again``."""
    g = torch.Generator().manual_seed(program.seed + 7919 * again)
    hidden = program.shape[-1]

    def random(*shape: int, dtype: torch.dtype = program.dtype) -> Tensor:
        return (torch.randn(shape, generator=g) * 2).to(dtype)

    weight = random(hidden, dtype=program.weight_dtype or program.dtype)
    return random(*program.shape), random(*program.residual), weight, random(hidden)


def function(program: Program, traced: bool = False) -> Callable[..., tuple[Tensor, ...]]:
    """The program as a function of :func:`inputs`.

    ``traced``: reduce in place by the operator that a graph may hold, for tracers that do not understand ``dist.all_reduce``.
    """
    reduce = _traced_in_place if traced else _in_place

    def run(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        for block in program.blocks:
            x, r = _block(block, reduce, x, r, w, b, outputs)
        return (*outputs, x, r)

    return run


def _in_place(y: Tensor) -> Tensor:
    dist.all_reduce(y, group=dist.group.WORLD)
    return y


def _traced_in_place(y: Tensor) -> Tensor:
    started = torch.ops._c10d_functional.all_reduce_(y, "sum", dist.group.WORLD.group_name)
    return torch.ops._c10d_functional.wait_tensor(started)


def _reduce(how: str, in_place: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, an older name of the buffer)"""
    group = dist.group.WORLD
    if how in ("functional", "max"):
        return funcol.all_reduce(x, "max" if how == "max" else "sum", group), x
    y = x * 2
    older = y.view(-1) if how == "in place with a view" else y
    total = in_place(y)
    if how == "in place, then written":
        y.mul_(0.5)
    return total, older


def _between(step: str, y: Tensor, b: Tensor, older: Tensor) -> Tensor:
    h = y.shape[-1]
    if step == "flat":
        return y.reshape(-1, h)
    if step == "unsqueeze":
        return y.unsqueeze(0)
    if step == "squeeze":
        return y.squeeze(0)
    if step == "clone":
        return y.clone()
    if step == "bias (H,)":
        return y + b
    if step == "bias (1, H)":
        return b.view(1, -1) + y
    if step == "bias (1, 1, H)":
        return y + b.view(1, 1, -1)
    if step == "full":
        return y + torch.ones_like(y) * 3
    if step == "scale":
        return y * 0.5
    if step == "scale by a tensor":
        return y * b[0]
    if step == "scale by a vector":
        return y * b
    if step == "slice rows":
        return y[:1]
    if step == "slice columns":
        return y[..., : h // 2]
    if step == "split and cat":
        one, two = y.chunk(2, -1)
        return torch.cat([two, one], -1)
    if step == "transpose":
        return y.transpose(0, 1)
    if step == "expand":
        return y.expand(2, *y.shape)
    if step == "relu":
        return y.relu()
    if step == "view as square":
        return y.reshape(h, -1)
    if step == "view of older buffer":
        return y + older.reshape(y.shape)
    assert step == "cast there and back"
    return y.float().to(y.dtype)


def _norm(n: Norm, h: Tensor, w: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or h.dtype
    f = h.float() if n.fp32 else h
    part = f[..., : max(1, f.shape[-1] // 2)] if n.part else f
    if n.weight == "inside":
        part = part * w[: part.shape[-1]]
    dims = {
        "last": -1, "last, counted from the left": f.dim() - 1, "first": 0, "two": (-2, -1), "all": tuple(range(f.dim())),
    }[n.dims]  # fmt: skip
    count = {"width": f.shape[-1], "width + 1": f.shape[-1] + 1, "rows": f.shape[0]}[n.denominator]
    squares = {"pow": lambda: part.pow(2), "mul": lambda: part * part, "square": lambda: part.square()}[n.square]()
    if n.reduction == "mean":
        v = squares.mean(dims, keepdim=n.keepdim)
    elif n.reduction == "sum":
        v = squares.sum(dims, keepdim=n.keepdim) / count
    else:
        v = torch.linalg.vector_norm(part, 2, dims, keepdim=n.keepdim).square() / count
    if not n.keepdim and n.unsqueeze:
        v = v.unsqueeze(-1)
    if n.eps == "number":
        v = v + 1e-5
    elif n.eps == "tensor":
        v = v + w[0].abs().float()
    if n.root == "rsqrt":
        out = f * torch.rsqrt(v)
    elif n.root == "sqrt":
        out = f / (torch.sqrt(v) + 1e-5 if n.eps == "outside" else torch.sqrt(v))
    elif n.root == "pow":
        out = torch.pow(v, -0.5) * f
    else:
        out = f * torch.sqrt(v).reciprocal()
    if n.cast == "before the weight":
        out = out.to(dtype)
    if n.weight in ("after", "before"):
        out = out * w if n.weight == "after" else w * out
    elif n.weight == "1 + w":
        out = out * (1.0 + w.float()) if n.fp32 else out * (1 + w)
    elif n.weight == "(1, H)":
        out = out * w.view(1, -1)
    elif n.weight == "(H, 1)":
        out = out * w.view(-1, 1)
    return out.to(dtype) if n.cast == "after the weight" else out


def _residual(how: str, y: Tensor, r: Tensor, b: Tensor) -> Tensor:
    if how in ("left", "in place"):
        return r.add_(y) if how == "in place" else r + y
    if how == "right":
        return y + r
    if how == "in fp32":
        return r.float() + y.float()
    if how == "in fp32, rounded":
        return (y.float() + r.float()).to(y.dtype)
    if how == "one row":
        return r[..., :1, :] + y
    if how == "(1, H)":
        return y + b.view(1, -1)
    if how == "number":
        return y + 1.0
    if how == "derived":
        return y + y.tanh()
    if how == "twice":
        return r + y + r
    if how == "subtract":
        return r - y
    if how == "alpha":
        return torch.add(r, y, alpha=2)
    return y


def _block(
    block: Block,
    in_place: Callable[[Tensor], Tensor],
    x: Tensor,
    r: Tensor,
    w: Tensor,
    b: Tensor,
    outputs: list[Tensor],
) -> tuple[Tensor, Tensor]:
    y, older = _reduce(block.reduce, in_place, x)
    total = y
    for step in block.between:
        y = _between(step, y, b, older)
    h = _residual(block.residual, y, r, b)
    n = _norm(block.norm, h, w, y.dtype)
    if block.residual == "in fp32":
        h = h.to(y.dtype)  # the norm has read it before that
    if block.write != "nothing":
        target = {"residual": r, "residual view": r.view(-1), "sum": total, "weight": w, "h": h, "x": x, "normed": n}
        target[block.write].add_(1)
    if block.residual == "post":
        h = r + n
    elif block.residual == "post right":
        h = n + r
    if block.second is not None:
        outputs.append(_norm(block.second, h, w))
    if block.dead:
        _ = h.exp() + total.sum()
    values = {"sum": total, "h": h, "normed": n, "row sums": h.sum(-1), "view": h.reshape(-1)}
    outputs.extend(values[name] for name in block.outputs)
    x = {"normed": n, "normed view": n.reshape(-1, n.shape[-1]), "first row": n[:1], "residual": h}[block.use]
    return x * 2, h
