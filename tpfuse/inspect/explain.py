"""What tpfuse would do to a model under a parallel config, before any GPU or weights exist.

The model gets weights without memory, this process plays one rank of a fake world, and the model is sharded, compiled and
rewritten as in production. What is reported is therefore what the pass did, not a prediction.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

import tpfuse
from tpfuse import compat
from tpfuse.ops.topology import PARTIAL, PCIE, SHARED, UNKNOWN
from tpfuse.parallel import GROUP_NAMES, ParallelConfig, Plan
from tpfuse.parallel.architecture import architecture_of
from tpfuse.parallel.layout import Op
from tpfuse.parallel.model import Parallelized, exchange_rows, layout_of, parallelize
from tpfuse.passes.options import PassOptions
from tpfuse.passes.report import GraphReport

from . import estimate, load, metamodel, page, table, words
from .algorithm import algorithm_of
from .fake import fake_world

EXPLAIN_VERSION = 1
FIRST_CAPABILITY = 80  # of the GPUs that the kernels run on
LINKS = ("", PARTIAL, PCIE, UNKNOWN, SHARED)  # behind an architecture; none: NVLink between all GPUs
SEQUENCES = 8  # in the compiled decode step; the verdicts do not depend on it
Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Request:
    """What to explain.

    Attributes:
        model: a folder with a config, or a transformers model type.
        config: the sizes.
        rank: which rank to play.
        rows: row counts of a step to choose the algorithm for, per attention replica.
        architecture: of the GPUs, as :func:`tpfuse.ops.select` takes it.
        policy, numerics: as in the backend's options.
        dtype: of weights and activations.
    """

    model: str
    config: ParallelConfig
    rank: int = 0
    rows: tuple[int, ...] = (1, 32, 2048)
    architecture: str = "sm_90"
    policy: str = "shared"
    numerics: str = "exact"
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Step:
    """One row count.

    Attributes:
        rows: per attention replica.
        algorithms: algorithm by group of ranks, e.g. ``{"0-3": "one_shot"}``; see :func:`.algorithm.algorithm_of`.
        launches: saved per step.
        bytes: memory traffic saved per step and rank.
    """

    rows: int
    algorithms: dict[str, str]
    launches: int
    bytes: int


@dataclass(frozen=True)
class PlanRow:
    """Boundaries between sublayers that do the same. ``layers`` is in short form, or ``exit``."""

    layers: str
    into: str
    rows: str
    steps: str
    fuses: str


@dataclass(frozen=True)
class Explanation:
    """What would happen.

    Attributes:
        request: what was asked.
        model_type, layers, hidden: of the model.
        groups: this rank's group by name, groups of one rank left out.
        plan: what each boundary does.
        reports: of every graph of one decode step; one unless the model breaks the graph.
        steps: the row counts asked for.
        notes: where plan and graph differ; empty when they agree.
        html: the page, when asked for.
    """

    request: Request
    model_type: str
    layers: int
    hidden: int
    groups: dict[str, list[int]]
    plan: list[PlanRow]
    reports: list[GraphReport]
    steps: list[Step]
    notes: list[str] = field(default_factory=list)
    html: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; described in docs/inspecting.md."""
        asked = self.request
        return {
            "schema": EXPLAIN_VERSION,
            "model": asked.model,
            "model_type": self.model_type,
            "layers": self.layers,
            "hidden": self.hidden,
            "config": asdict(asked.config),
            "rank": asked.rank,
            "architecture": asked.architecture,
            "groups": self.groups,
            "dense_shares_attention": asked.config.dense_shares_attention,
            "plan": [asdict(row) for row in self.plan],
            "graphs": [report.to_dict() for report in self.reports],
            "steps": [asdict(step) for step in self.steps],
            "notes": self.notes,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def explain(request: Request, tick: Tick | None = None, html: bool = False) -> Explanation:
    """Build, shard, compile and rewrite the model on a fake world.

    Args:
        request: what to explain.
        tick: called with (stage, done, of) as it goes on.
        html: also make the page, which takes a little longer.
    Raises:
        ModelError: the model cannot be built.
        ConfigError: the model cannot be sharded like this, or the rank does not exist.
        ValueError: an unknown policy, numerics or architecture.
        WorldError: the process has a process group already.
    """
    tick = tick or (lambda stage, done, of: None)
    # What is wrong in the request is an error before the work.
    request.config.group_of("tp", request.rank)
    PassOptions(request.policy, request.numerics)
    _check_architecture(request.architecture)
    tick("reading the config", 0, 1)
    config = metamodel.config_of(request.model)
    with _quiet(), fake_world(request.config.world_size, request.rank), tempfile.TemporaryDirectory() as folder:
        tick("building the model", 0, 1)
        model = metamodel.build(config, request.dtype)
        tick("sharding", 0, 1)
        parallelize(model, request.config)
        reports = _compile(model, request, folder if html else None, tick)
        layout = layout_of(model)
        plan = layout.plan
        text_config = config.get_text_config()
        found = Explanation(
            request=request,
            model_type=config.model_type,
            layers=len(plan.layers),
            hidden=text_config.hidden_size,
            groups=_groups(request),
            plan=_plan_rows(plan, request.rank),
            reports=reports,
            steps=[_step(rows, reports, request) for rows in request.rows],
            notes=_notes(layout, reports, request),
        )
        if not html:
            return found
        return replace(found, html=_page(found, folder))


def text(found: Explanation) -> str:
    """The explanation for a terminal. Raises ``ImportError`` without rich."""
    from rich.console import Console

    console = Console(highlight=False)
    with console.capture() as capture:
        console.print(_heading(found), style="bold")
        for shown in tables(found):
            console.print(shown.title, style="bold")
            console.print(_rich_table(shown))
        console.print(f"One decode step of {SEQUENCES} sequences, compiled", style="bold")
        for report in found.reports:
            console.print(table.render(report))
        for note in found.notes:
            console.print(f"note: {note}", style="yellow")
    return capture.get().rstrip()


def tables(found: Explanation) -> list[page.Table]:
    """What is known beside the reports: groups, plan and row counts."""
    config = found.request.config
    shared = "shared" if config.dense_shares_attention else "not shared"
    groups = [(name, words.ranks(ranks), str(len(ranks))) for name, ranks in found.groups.items()]
    plan = [(row.layers, row.into, row.rows, row.steps, row.fuses) for row in found.plan]
    steps = [
        (
            str(step.rows),
            ", ".join(f"{algorithm} over {ranks}" for ranks, algorithm in step.algorithms.items()) or "-",
            str(step.launches),
            estimate.in_units(step.bytes),
        )
        for step in found.steps
    ]
    rank = found.request.rank
    return [
        page.Table(f"Groups of rank {rank}; dense MLP and attention: {shared}", ("group", "ranks", "size"), groups),
        page.Table("Plan", ("layers", "into", "rows", "steps", "fuses"), plan),
        page.Table(
            f"Per step on {found.request.architecture}, estimate",
            ("rows", "algorithm", "launches saved", "traffic saved per rank"),
            steps,
        ),
    ]


def _check_architecture(name: str) -> None:
    chip, _, links = name.partition("-")
    capability = re.fullmatch(r"sm_(\d+)", chip)
    if capability is None or int(capability[1]) < FIRST_CAPABILITY or links not in LINKS:
        ways = ", ".join(f"sm_90-{way}" for way in LINKS if way)
        raise ValueError(
            f"the architecture is {name!r}; give the compute capability of the GPUs, sm_{FIRST_CAPABILITY} or newer, for the "
            f"kernels run on no older ones. Alone, as sm_90, it means NVLink between all GPUs; other links are {ways}"
        )


# -- parts ----------------------------------------------------------------------------------------------------------


def _compile(model: Any, request: Request, folder: str | None, tick: Tick) -> list[GraphReport]:
    """One decode step through the backend. Returns its reports."""
    options: dict[str, Any] = {
        "tpfuse.inner": "aot_eager",
        "tpfuse.policy": request.policy,
        "tpfuse.numerics": request.numerics,
        "tpfuse.dump": folder,
        "tpfuse.fuel": None,
        "tpfuse.verify": False,
    }
    before = {id(report) for report in tpfuse.reports()}
    torch.compiler.reset()
    compiled = torch.compile(model, backend="tpfuse", options=options)
    tokens = torch.zeros(SEQUENCES, 1, dtype=torch.long, device="meta")
    with torch.no_grad(), _layers_counted(model, tick):
        compiled(input_ids=tokens, use_cache=False, largest_block=exchange_rows(model, SEQUENCES))
    return [report for report in tpfuse.reports() if id(report) not in before]


@dataclass
class _Traced:
    """How many decoder layers Dynamo has traced."""

    tick: Tick
    of: int
    done: int = 0


_traced: _Traced | None = None


def _layer_traced(_: object) -> None:
    # Dynamo calls this while it traces; only a plain function of a module may stand in its place.
    if _traced is not None:
        _traced.done += 1
        stage = "tracing" if _traced.done < _traced.of else "rewriting"
        _traced.tick(stage, min(_traced.done, _traced.of), _traced.of)


@contextmanager
def _layers_counted(model: Any, tick: Tick) -> Iterator[None]:
    """Make each decoder layer report when it is traced: the long part of a large model's compile."""
    global _traced  # noqa: PLW0603
    at_trace_time = compat.trace_time_call()
    layers = model.get_submodule(architecture_of(model).layers)
    # A hook, because a wrapped forward would change the module paths from which the pass reads roles.
    hooks = [layer.register_forward_pre_hook(lambda *_: at_trace_time(_layer_traced)) for layer in layers]
    _traced = _Traced(tick, len(layers))
    tick("tracing", 0, len(layers))
    try:
        yield
    finally:
        _traced = None
        for hook in hooks:
            hook.remove()


def _groups(request: Request) -> dict[str, list[int]]:
    found = {name: request.config.group_of(name, request.rank) for name in GROUP_NAMES}
    return {name: ranks for name, ranks in found.items() if len(ranks) > 1}


def _plan_rows(plan: Plan, rank: int) -> list[PlanRow]:
    """The plan with equal boundaries of several layers in one row."""
    alike: dict[tuple[str, str, str, str], list[int]] = {}
    for boundary in plan.boundaries:
        steps = []
        for step in boundary.steps:
            ranks = f"[{words.ranks(plan.config.group_of(step.group, rank))}]" if step.group else ""
            steps.append(f"{step.op}({step.group} {ranks})" if step.group else str(step.op))
        rows = " to ".join(dict.fromkeys(map(str, boundary.y)))
        key = (boundary.enters, rows, ", ".join(steps), boundary.fuses)
        alike.setdefault(key, []).append(boundary.layer)
    return [
        PlanRow("exit" if enters == "exit" else words.layers(layers), enters, rows, steps, fuses)
        for (enters, rows, steps, fuses), layers in alike.items()
    ]


def _step(rows: int, reports: Sequence[GraphReport], request: Request) -> Step:
    algorithms: dict[str, str] = {}
    saved = estimate.NOTHING
    for site in (site for report in reports for site in report.fused):
        algorithm = algorithm_of(site, rows, request.architecture)
        within = f" of {words.ranks(site.over)}" if site.over else ""
        algorithms[words.ranks(site.group) + within] = algorithm
        saved = saved + estimate.saving(site, rows, algorithm)
    return Step(rows, algorithms, saved.launches, saved.bytes or 0)


def _notes(layout: Parallelized, reports: Sequence[GraphReport], request: Request) -> list[str]:
    """Where the graph does not have the reductions that the plan says it should."""
    config, rank = request.config, request.rank
    vocabulary = layout.vocabulary.ranks
    planned: list[tuple[int | None, str, tuple[int, ...]]] = []
    if len(vocabulary) > 1:
        planned.append((None, "embedding", vocabulary))
    planned += [
        (r.layer, r.role, tuple(config.group_of(r.group, rank)))
        for r in layout.plan.reductions()
        if len(config.group_of(r.group, rank)) > 1
    ]
    found = [(s.layer, s.role, s.group) for report in reports for s in report.sites]
    notes = []
    if len(reports) != 1:
        notes.append(f"the model compiled to {len(reports)} graphs; sums that cross a graph break cannot fuse")
    missing = [item for item in planned if item not in found]
    extra = [item for item in found if item not in planned]
    for what, items in (("the plan has, the graph has not", missing), ("the graph has, the plan has not", extra)):
        if items:
            layer, role, group = items[0]
            where = role if layer is None else f"layer {layer} {role}"
            notes.append(f"{what}: {len(items)} reductions, first {where} over {words.ranks(group)}")
    return [*notes, *_gathers_outside(layout.plan, reports)]


def _gathers_outside(plan: Plan, reports: Sequence[GraphReport]) -> list[str]:
    """Of boundaries whose gather should be in the op, those whose op lacks it."""
    planned = {b.layer for b in plan.boundaries if b.fuses == "yes" and any(s.op is Op.GATHER_BLOCKS for s in b.steps)}
    attention = [site for report in reports for site in report.fused if site.role == "attention"]
    outside = [site for site in attention if site.layer in planned and not site.over]
    if not outside:
        return []
    why = outside[0].note or "the pass found none"
    return [f"the gather of {len(outside)} boundaries stays outside of the op, first layer {outside[0].layer}: {why}"]


def _page(found: Explanation, folder: str) -> str:
    title = f"explain {found.request.model}"
    notes = [page.Table("Notes", ("note",), [(note,) for note in found.notes])] if found.notes else []
    return page.page(load.read(folder), title, [*tables(found), *notes])


def _heading(found: Explanation) -> str:
    asked = found.request
    given = asdict(asked.config).items()
    sizes = ", ".join(f"{name}={value}" for name, value in given if value not in (None, 1) or name == "tp_size")
    return (
        f"{asked.model}: {found.model_type}, {found.layers} layers, hidden {found.hidden}; {sizes}; rank {asked.rank}"
    )


def _rich_table(found: page.Table) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )
    for column in found.columns:
        shown.add_column(column, overflow="fold")
    for row in found.rows:
        shown.add_row(*map(Text, row))
    return shown


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what transformers and torch say about weights without memory and fake groups: it is meant."""
    from transformers.utils import logging as transformers_logging

    verbosity, torch_log = transformers_logging.get_verbosity(), logging.getLogger("torch")
    level = torch_log.level
    transformers_logging.set_verbosity_error()
    torch_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        torch_log.setLevel(level)
