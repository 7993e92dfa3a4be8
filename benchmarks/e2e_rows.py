"""Contenders that are tpfuse without one of its parts, and collectives for ranks that share a GPU.

``tpfuse rows off`` is tpfuse as it was before it fused reduce-scatters and all-reduces of which a rank keeps its replica's rows,
``tpfuse gathers off`` as it was before it gathered normed rows (which ``tpfuse rows off`` does not do either),
``tpfuse quant off`` leaves the fp8 quantization behind a norm to Inductor.
Ranks that share a GPU have gloo, which no CUDA graph holds. There the collectives that a pass has left in the graph become
torch's one-shot all-reduce over symmetric memory: a gather is the sum of the ranks' rows, each at its place among zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx import Graph
from torch.utils._python_dispatch import TorchDispatchMode
from tpfuse.passes import fusion, gathers, quantization, rows
from tpfuse.passes.reasons import Reason, Refusal

from tpfuse import compat
from tpfuse.inner import inductor as tpfuse_inductor
from tpfuse.measure import other_libraries

ROWS_OFF = "tpfuse rows off"
GATHERS_OFF = "tpfuse gathers off"
QUANT_OFF = "tpfuse quant off"
c10d = torch.ops._c10d_functional

library = torch.library.Library("tpfuse_e2e", "FRAGMENT")
library.define("symm_sum(Tensor x, str group_name) -> Tensor")
library.define("symm_gather(Tensor x, int size, str group_name) -> Tensor")


def another_pass(name: str) -> AbstractContextManager[Any]:
    """Within, compile caches and kept reports see another pass than tpfuse's: its digest says ``name`` too."""
    digest = tpfuse_inductor.sources_digest()
    return patch.object(tpfuse_inductor, "sources_digest", lambda: f"{digest}, {name}")


@contextlib.contextmanager
def rows_off() -> Iterator[None]:
    """Within, the pass keeps every reduction of which a rank keeps some rows, and every gather."""
    kept, reduction = rows.kept, fusion.reduction
    left = Refusal(Reason.ROWS_MOVE, f"the contender is {ROWS_OFF!r}")

    def no_block(*args: Any) -> Any:
        found = kept(*args)
        return left if isinstance(found, tuple) else found

    def no_scatter(c: Any) -> Any:
        return left if c.kind == "reduce_scatter" else reduction(c)

    with (
        patch.object(rows, "kept", no_block),
        patch.object(fusion, "reduction", no_scatter),
        gathers_off(),
        another_pass(ROWS_OFF),
    ):
        yield


@contextlib.contextmanager
def gathers_off() -> Iterator[None]:
    """Within, the pass leaves every gather behind a norm outside."""
    with (
        patch.object(gathers, "find", lambda *args: (None, f"the contender is {GATHERS_OFF!r}")),
        another_pass(GATHERS_OFF),
    ):
        yield


@contextlib.contextmanager
def quant_off() -> Iterator[None]:
    """Within, the pass finds no quantization."""
    with (
        patch.object(quantization, "find", lambda *args: (None, f"the contender is {QUANT_OFF!r}")),
        another_pass(QUANT_OFF),
    ):
        yield


WITHOUT = {ROWS_OFF: rows_off, GATHERS_OFF: gathers_off, QUANT_OFF: quant_off}


def _sum(x: Tensor, group_name: str) -> Tensor:
    if x.device.type == "cpu":  # a rehearsal
        return c10d.wait_tensor(c10d.all_reduce(x, "sum", group_name))
    flat = x.contiguous().view(-1)
    flat = flat if flat.data_ptr() % 16 == 0 else flat.clone()
    buffer = other_libraries.symmetric_buffer(group_name, x.numel())
    return torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, flat, "sum", group_name).view(x.shape)


def _gather(x: Tensor, size: int, group_name: str) -> Tensor:
    whole = x.new_zeros(size, *x.shape)
    whole[compat.resolve_group(group_name).rank()] = x
    return _sum(whole, group_name).view(size * x.shape[0], *x.shape[1:])


library.impl("symm_sum", _sum, "CompositeExplicitAutograd")
library.impl("symm_gather", _gather, "CompositeExplicitAutograd")
torch.library.register_fake("tpfuse_e2e::symm_sum", lambda x, group_name: torch.empty_like(x), lib=library)
torch.library.register_fake(
    "tpfuse_e2e::symm_gather", lambda x, size, group_name: x.new_empty(size * x.shape[0], *x.shape[1:]), lib=library
)


SYMMETRIC = {
    c10d.all_reduce.default: torch.ops.tpfuse_e2e.symm_sum.default,
    c10d.all_gather_into_tensor.default: torch.ops.tpfuse_e2e.symm_gather.default,
}


def symmetric_arguments(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of ``all_reduce(x, "sum", group)`` and ``all_gather_into_tensor(x, size, group)``: what the other op takes."""
    return tuple(a for a in args if not isinstance(a, str) or a != "sum")


class SymmetricEagerly(TorchDispatchMode):
    """Within, eager collectives are those of ``SymmetricCollectives``: gloo's gather reads GPU memory as the host's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SYMMETRIC:
            return SYMMETRIC[func](*symmetric_arguments(args))
        return func(*args, **(kwargs or {}))


class SymmetricCollectives(compat.custom_graph_pass()):  # type: ignore[misc]
    """Puts torch's symmetric-memory all-reduce in the place of what is left of the group's own collectives."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.target is c10d.reduce_scatter_tensor.default:
                raise ValueError(
                    "a reduce-scatter is left, and there is none for ranks that share a GPU; give another --k"
                )
            if node.target not in SYMMETRIC:
                continue
            with graph.inserting_before(node):
                new = graph.call_function(SYMMETRIC[node.target], symmetric_arguments(node.args))
            new.meta["val"] = node.meta["val"]
            for wait in list(node.users):
                wait.replace_all_uses_with(new)
                graph.erase_node(wait)
            graph.erase_node(node)

    def uuid(self) -> Any:
        return "tpfuse-e2e-symmetric-collectives-1"
