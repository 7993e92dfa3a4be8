"""Inductor as inner compiler: the pass is mounted in front of its own post-grad passes, with caches that stay right."""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule

import tpfuse as package
from tpfuse import compat, report_cache, store, wrappers
from tpfuse.ops.settings import batch_invariant
from tpfuse.options import OptionError, Options, parse, prefix_hint
from tpfuse.passes import GraphReport, collectives, next_graph_id, quantizers

from . import lowered
from .run_pass import run_pass

log = logging.getLogger("tpfuse")

PRE_PASS = "post_grad_custom_pre_pass"
POST_GRAD = "use_post_grad_passes"
GATHERS = re.compile("gather|redistribute|full_tensor|from_local")


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """A digest of tpfuse's own sources: a changed pass must not reuse what another version compiled."""
    digest = hashlib.sha256(package.__version__.encode())
    from tpfuse import inner, ops, passes

    files = sorted(Path(str(package.__file__)).parent.glob("*.py"))
    for part in (compat, inner, passes, ops):
        files += sorted(Path(str(part.__file__)).parent.rglob("*.py"))
    for path in files:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def group_shapes() -> list[tuple[int, int, tuple[int, ...]]]:
    """(size, index of the first group with the same ranks, steps from rank to rank) of this process's groups, oldest first.

    Enough to tell layouts apart that would be judged differently, without anything that differs between ranks: group names
    and rank numbers do. The steps tell neighbors from the ranks at one place of several replicas.
    """
    groups = compat.known_groups()
    first: dict[tuple[int, ...], int] = {}
    return [
        (len(ranks), first.setdefault(ranks, index), tuple(b - a for a, b in itertools.pairwise(ranks)))
        for index, (_, ranks) in enumerate(groups)
    ]


def _refused(parsed: Options) -> list[list[int]]:
    """The groups whose ops are left out because their ranks disagree, by their places in :func:`group_shapes`."""
    known = [ranks for _, ranks in compat.known_groups()]
    return sorted([n for n, ranks in enumerate(known) if ranks == refused] for refused in parsed.refused)


def places() -> list[int]:
    """This rank's place in each of the groups of :func:`group_shapes`; -1 in those that it is no member of."""
    rank = compat.rank()
    return [ranks.index(rank) if rank in ranks else -1 for _, ranks in compat.known_groups()]


def asks_for_the_place(gm: GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether the pass may decide by this rank's place in a group, so that ranks with equal graphs must not share a cache entry.

    It asks which rows of a sum are this rank's where a gather has put them together (:mod:`tpfuse.passes.rows`). A slice that is
    rank 0's block is in the same words on another rank, where it is not. Gathers of DTensors show only when they are traced.
    """
    if wrappers.dtensors(inputs):
        return True
    modules = [module for module in gm.modules() if isinstance(module, GraphModule)]
    return any(GATHERS.search(str(node.target)) for module in modules for node in module.graph.nodes)


def registered_spellings() -> list[str]:
    """The all-reduces and quantizers that users registered: with another set the pass finds other sites."""
    found = collectives.registered()
    names = [(str(s.op), s.input, s.group, s.reduce_op, getattr(s.ranks, "__qualname__", s.ranks)) for s in found]
    return sorted([*(str(name) for name in names), *(str(spelling) for spelling in quantizers.registered())])


class InductorPass(compat.custom_graph_pass()):  # type: ignore[misc]
    """Runs the user's own pre-passes, then ours, on Inductor's post-grad graph."""

    def __init__(
        self, parsed: Options, training: bool, previous: Any, lower: bool = False, by_place: bool = False
    ) -> None:
        """``by_place`` where this rank's place in its groups may decide something, see :func:`asks_for_the_place`."""
        super().__init__()
        self.parsed, self.training, self.lower, self.by_place = parsed, training, lower, by_place
        self.previous = compat.custom_passes(previous)
        self.reports: list[GraphReport] = []
        self.keep_as = ""  # the key under which reports are kept; empty while nobody asked for that
        self.identity = self._identity()

    def __call__(self, graph: Graph) -> None:
        for run in self.previous:
            run(graph, not self.training) if compat.wants_inference_flag(run) else run(graph)
        run_pass(graph, self.parsed, self.training, self.reports, self.lower)
        if self.keep_as:
            # Inductor puts the graph into its caches later: another rank that finds it there must find its report, too.
            report_cache.save(self.keep_as, self.reports, bundled=False)

    def uuid(self) -> Any:
        return self.identity

    def _identity(self) -> Any:
        """Equal for equal work on every rank: sources, options, versions, group shapes; no rank where none decides."""
        theirs = [uuid() if (uuid := getattr(run, "uuid", None)) is not None else None for run in self.previous]
        if None in theirs:
            return None  # one of their passes has no identity: Inductor then does not cache, as without us
        p = self.parsed
        left = store.fuel_left(p.fuel)
        parts = (
            sources_digest(),
            torch.__version__,
            p.policy,
            p.numerics,
            p.verify,
            left,
            self.training,
            self.lower,
            _refused(p),
            places() if self.by_place else (),
            theirs,
        )
        return report_cache.key([*parts, *registered_spellings(), *group_shapes()])


def graph_pass(options: dict[str, Any] | None = None) -> Any:
    """The pass as an Inductor ``CustomGraphPass``, for engines that have a hook of their own for graph passes.

    Args:
        options: the ``tpfuse.*`` keys of ``torch.compile``; ``tpfuse.inner`` and ``tpfuse.mode`` are ignored, for the engine
            compiles.
    Returns:
        An object to call with a post-grad graph; its ``uuid()`` keeps compile caches usable, ``reports`` is what it did.
    Raises:
        OptionError: an unknown option or value, or one for a compiler.
    """
    parsed = parse(options)
    if parsed.inner_options:
        given = ", ".join(sorted(parsed.inner_options))
        raise OptionError(
            f"graph_pass takes tpfuse.* keys only, for it compiles nothing; given {given}{prefix_hint(parsed.inner_options)}"
        )
    set_batch_invariant(parsed)
    return InductorPass(parsed, training=False, previous=None, by_place=True)


def set_batch_invariant(parsed: Options) -> None:
    """The mode belongs to the op and the process: whatever it is that calls the op, its bits must not change on the way."""
    if parsed.batch_invariant is not None:
        from tpfuse.ops import set_batch_invariant

        set_batch_invariant(parsed.batch_invariant)


def compile(
    gm: GraphModule, inputs: Sequence[Any], parsed: Options, mode: str | None, training: bool
) -> Callable[..., Any]:
    """Mounted as Inductor's ``post_grad_custom_pre_pass``, which runs before Inductor lowers the all-reduce itself."""
    patches = dict(compat.inductor_mode_options(mode))
    patches.update({key.replace("-", "_"): value for key, value in parsed.inner_options.items()})
    known = compat.inductor_settings()
    for name in patches:
        if name not in known:
            raise OptionError(
                f"{name!r} is neither a tpfuse option (those start with 'tpfuse.') nor a setting of torch._inductor.config"
                f"{prefix_hint([name])}"
            )
    if not patches.get(POST_GRAD, compat.inductor_config(POST_GRAD, True)):
        raise OptionError(
            f"{POST_GRAD} is off{f' in mode {mode!r}' if mode else ''}, so Inductor would never run tpfuse's pass; "
            "use another mode, or options={'tpfuse.inner': 'aot_eager'}"
        )
    previous = patches.get(PRE_PASS, compat.inductor_config(PRE_PASS))
    lower, by_place = parsed.lower and not batch_invariant(), asks_for_the_place(gm, inputs)
    mounted = InductorPass(parsed, training, previous, lower, by_place)
    patches[PRE_PASS] = mounted
    mounted.keep_as = digest = _report_key(gm, inputs, mounted.identity, patches)
    compiled = compat.compile_fx(gm, inputs, patches)
    if mounted.reports:
        report_cache.save(digest, mounted.reports)
        return lowered.guarded(compiled, mounted.reports)
    kept = report_cache.load(digest)
    if kept is not None:
        for report in kept:
            store.add(replace(report, graph_id=next_graph_id(), rank=compat.rank()))
        return lowered.guarded(compiled, kept)
    # A cache supplied the graph, but the report of the compile that filled it is gone: compile once more without caches.
    log.info("compile cache hit without a kept report; compiling again to make one")
    compat.forget_traced_regions()
    with compat.without_compile_caches():
        compiled = compat.compile_fx(gm, inputs, patches)
    report_cache.save(digest, mounted.reports)
    return lowered.guarded(compiled, mounted.reports)


def _report_key(gm: GraphModule, inputs: Sequence[Any], identity: Any, patches: dict[str, Any]) -> str:
    """What a report depends on: the graph, its inputs, our identity, and this rank's view of the groups.

    The rank itself is left out: ranks of one group that share a cache folder then share the report too.
    """
    shapes = [
        (tuple(str(n) for n in x.shape), str(x.dtype), str(x.device)) if isinstance(x, torch.Tensor) else str(type(x))
        for x in inputs
    ]
    settings = sorted((k, str(v)) for k, v in patches.items() if k != PRE_PASS)
    return report_cache.key([gm.code, shapes, identity, settings, compat.known_groups()])
