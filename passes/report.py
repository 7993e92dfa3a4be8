"""The report: one :class:`Site` per all-reduce, fused or not, and one :class:`GraphReport` per compiled graph.

The dump, the command line, the HTML page and ``tpfuse.reports()`` print these objects and nothing else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .reasons import REMEDIES, Reason

SCHEMA_VERSION = 1
# How a fused site runs where no op of tpfuse's stands in the compiled graph.
LOWERED = "library all-reduce, epilogue compiled by Inductor"
_LATER = ("reduce_scatters", "all_gathers")


class ReportFormatError(ValueError):
    """The text is not a report, or a newer version of tpfuse wrote it."""


@dataclass(frozen=True)
class Site:
    """What happened to one all-reduce or reduce-scatter.

    Attributes:
        fused: whether it was rewritten.
        reason: None when fused, else a code of :class:`tpfuse.passes.Reason`.
        detail: one sentence: what was seen here (for a fused site, what it became).
        pattern: e.g. ``all_reduce+add+rms_norm``, ``reduce_scatter+add+rms_norm``, or ``all_reduce+rows/2+add+rms_norm`` where
            this rank keeps the rows of one of two replicas; ``+all_gather`` at the end where the fused op gathers the normed rows
            as well; for an unfused site the part that was found.
        role: ``attention | mlp | embedding | other``.
        layer: index of the decoder layer, or None where the graph does not say.
        group: global ranks of the reduction, ascending as the group lists them; empty when unknown.
        shared: whether attention and MLP of this layer reduce over just these ranks; None where the graph does not say.
        source: ``file:line`` of the model code that issued the all-reduce; the path of the module, e.g.
            ``model.layers.3.mlp``, where the graph holds only lines of libraries; or ``""``.
        nodes: names of the graph nodes of the region, the all-reduce first.
        shape: of the sum; symbolic sizes are strings.
        dtype: of the sum, e.g. ``bfloat16``.
        eps: of the norm, or None.
        flavour: the norm's rounding order as ``str(Flavour)``, or None.
        matched: the steps that matched before the refusal, in order (the nearest miss).
        admitted: the rule by which the policy let a fused site be rewritten: ``shared-layer``: attention and MLP of some layer
            reduce over just these ranks; ``not-refuted``: nothing in the graph shows that they do not; ``rows-proved``: it is
            proved who keeps which rows; ``policy-all``. None for a site that was kept.
        replaced_by: name of the fused node, or None: not fused, or lowered.
        lowered: fused, and runs as :data:`LOWERED`: the graph keeps the model's own nodes.
        quantizer: how the fused op quantizes the norm, as ``str(tpfuse.ops.Quantizer)``, or None where it does not.
        note: what else is to know about a fused site: why a quantization or a gather behind its norm stays outside; or ``""``.
        over: global ranks of the fused op where they are more than ``group``: it gathers the normed rows of all replicas, block
            by block. So too of a site that such ranks disagree about. Empty for every other site.
    """

    fused: bool
    reason: str | None
    detail: str
    pattern: str
    role: str
    layer: int | None
    group: tuple[int, ...]
    shared: bool | None
    source: str
    nodes: list[str]
    shape: tuple[int | str, ...] = ()
    dtype: str = ""
    eps: float | None = None
    flavour: str | None = None
    matched: tuple[str, ...] = ()
    replaced_by: str | None = None
    admitted: str | None = None
    lowered: bool = False
    quantizer: str | None = None
    note: str = ""
    over: tuple[int, ...] = ()

    @property
    def callers(self) -> tuple[int, ...]:
        """Global ranks that call the fused op, all of which have to."""
        return self.over or self.group

    @property
    def remedy(self) -> str:
        """What to do about the reason; empty when fused."""
        return "" if self.reason is None else REMEDIES[Reason(self.reason)]


@dataclass(frozen=True)
class LayerAudit:
    """The sharing proof of one layer: the ranks its attention and its MLP reduce over.

    ``shared`` is True only when both are known, equal and larger than one; None when one is unknown.
    """

    layer: int
    attention: tuple[int, ...] | None
    mlp: tuple[int, ...] | None
    shared: bool | None
    detail: str = ""


@dataclass
class GraphReport:
    """What the pass did to one graph on one rank.

    Attributes:
        graph_id: stable name of the graph within the process, e.g. ``graph-0``.
        rank: global rank of this process (0 without a process group).
        world_size: of the default group (1 without one).
        sites: one per all-reduce and reduce-scatter, in graph order.
        layers: the sharing audit, one per layer that the graph shows.
        policy: the policy in force.
        numerics: ``exact`` or ``relaxed``.
        inner: the inner compiler.
        seconds: time the pass took.
        from_cache: True when a compile cache supplied the graph, so the pass did not run in this process.
        notes: warnings about the graph as a whole, e.g. norms hidden inside Hub kernels.
        reduce_scatters, all_gathers: how many of each the graph has, as sequence parallelism has in place of all-reduces;
            None where nobody counted (a report of an earlier version, or the pass called on its own).
    """

    graph_id: str
    rank: int
    world_size: int
    sites: list[Site]
    layers: list[LayerAudit] = field(default_factory=list)
    policy: str = "shared"
    numerics: str = "exact"
    inner: str = ""
    seconds: float = 0.0
    from_cache: bool = False
    notes: list[str] = field(default_factory=list)
    reduce_scatters: int | None = None
    all_gathers: int | None = None

    @property
    def fused(self) -> list[Site]:
        return [site for site in self.sites if site.fused]

    @property
    def kept(self) -> list[Site]:
        return [site for site in self.sites if not site.fused]

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA_VERSION, **asdict(self)}

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON; :meth:`from_json` reads it back equal."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GraphReport:
        version = data.get("schema") if isinstance(data, dict) else None
        if not isinstance(version, int):
            raise ReportFormatError("not a tpfuse report: it has no integer 'schema' field")
        if version > SCHEMA_VERSION:
            raise ReportFormatError(
                f"the report has schema {version}, this tpfuse reads up to {SCHEMA_VERSION}; upgrade tpfuse to read it"
            )
        try:
            # Fields that came later have defaults: a report that was written before them reads as well.
            values = {f.name: data[f.name] for f in fields(cls) if f.name in data or f.name not in _LATER}
            values["sites"] = [_site(s) for s in values["sites"]]
            values["layers"] = [_layer(a) for a in values["layers"]]
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ReportFormatError(f"not a tpfuse report of schema {version}: {error!r}") from error

    @classmethod
    def from_json(cls, text: str) -> GraphReport:
        """Read a report. Raises :class:`ReportFormatError` when it is none, or of a newer schema."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ReportFormatError(f"not a tpfuse report: not JSON ({error})") from error
        return cls.from_dict(data)

    def __str__(self) -> str:
        """The report as a table; plain text where rich is not installed."""
        from tpfuse.inspect.table import text

        return text(self)

    def _repr_html_(self) -> str:
        """The report as a notebook shows it."""
        from tpfuse.inspect.table import html

        return html(self)

    def summary(self) -> str:
        """One line, e.g. ``graph-0: 61 all-reduces, 60 fused, 1 kept (no-norm 1)``, or ``60 fused (60 quantized)``."""
        counts: dict[str, int] = {}
        for site in self.kept:
            counts[str(site.reason)] = counts.get(str(site.reason), 0) + 1
        why = ", ".join(f"{code} {n}" for code, n in sorted(counts.items()))
        kept = f"{len(self.kept)} kept" + (f" ({why})" if why else "")
        # All-gathers alone are common (the output head); with reduce-scatters they are sequence parallelism.
        others = (
            f", {self.reduce_scatters} reduce-scatters, {self.all_gathers} all-gathers" if self.reduce_scatters else ""
        )
        scattered = sum(site.pattern.startswith("reduce_scatter") for site in self.sites)
        what = "reductions" if scattered else "all-reduces"
        quantized = sum(site.quantizer is not None for site in self.fused)
        gathered = sum(site.pattern.endswith("all_gather") for site in self.fused)
        parts = [f"{n} {word}" for n, word in ((quantized, "quantized"), (gathered, "gathered")) if n]
        also = f" ({', '.join(parts)})" if parts else ""
        return f"{self.graph_id}: {len(self.sites)} {what}, {len(self.fused)} fused{also}, {kept}{others}"


def _site(data: dict[str, Any]) -> Site:
    return Site(
        **{
            **data,
            **{name: tuple(data[name]) for name in ("group", "shape", "matched")},
            "over": tuple(data.get("over", ())),
        }
    )


def _layer(data: dict[str, Any]) -> LayerAudit:
    ranks = {k: None if data[k] is None else tuple(data[k]) for k in ("attention", "mlp")}
    return LayerAudit(**{**data, **ranks})
