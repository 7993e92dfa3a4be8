"""A line of the report from what was found, judged and proved about one all-reduce."""

from __future__ import annotations

from typing import Any

from tpfuse import compat

from . import sharing, values
from .candidate import Candidate, Found
from .report import LayerAudit, Site


def site_of(item: Found, spot: sharing.Place, audits: list[LayerAudit], within: Found | None = None) -> Site:
    """``within`` is the fused site whose reduction makes this sum too, if there is one."""
    c, outcome = item.collective, item.outcome
    tensor = values.value(c.value)
    layer = next((a for a in audits if a.layer == spot.layer), None)
    common: dict[str, Any] = {
        "role": spot.role,
        "layer": spot.layer,
        "group": c.ranks,
        "shared": None if layer is None or spot.role not in ("attention", "mlp") else layer.shared,
        "source": spot.source,
        "shape": () if tensor is None else tuple(compat.size_hint(n) for n in tensor.shape),
        "dtype": "" if tensor is None else str(tensor.dtype).removeprefix("torch."),
    }
    if isinstance(outcome, Candidate):
        norm = outcome.norm
        exact = (
            ""
            if norm.exact and outcome.factor is None and (outcome.merged is None or outcome.merged.exact)
            else " (relaxed: other bits than the model's)"
        )
        quantization = outcome.quantization
        quantized = "" if quantization is None else f"; quantized: {quantization.words}"
        if quantization is not None and not quantization.exact:
            quantized += " (relaxed: for some inputs other bits than the model's)"
        if outcome.gather is not None:
            whose = f"replicas, over {list(outcome.over)}" if outcome.over else "ranks"
            replaced = ", ".join(n.name for n in outcome.gather.starts)
            quantized += f"; the normed rows of all {whose}: it replaces {replaced}"
        if outcome.narrowed:
            quantized += f"; the fp32 sum is rounded once, to {outcome.dtype}, before anything is added"
        if outcome.merged is not None:
            quantized += f"; one op with {outcome.merged.collective.node.name}"
        note = f"; {outcome.note}" if outcome.note else ""
        return Site(
            fused=True,
            reason=None,
            detail=f"{norm.flavour.describe()}{exact}{quantized}{note}",
            pattern=outcome.pattern,
            nodes=[n.name for n in outcome.nodes],
            eps=norm.eps,
            flavour=str(norm.flavour),
            admitted=item.admitted,
            quantizer=None if quantization is None else str(quantization.quantizer),
            note=outcome.note,
            over=outcome.over,
            **common,
        )
    if within is not None:
        bytes_a_row = 0 if tensor is None else tensor.shape[-1] * tensor.dtype.itemsize
        assert isinstance(within.outcome, Candidate) and within.outcome.merged is not None
        if within.outcome.merged.exact:
            detail = f"one op with {within.collective.node.name}, which reduces both, each rounded as by itself"
        else:
            detail = (
                f"its partial sum is added to that of {within.collective.node.name}, and one reduction makes both (relaxed: "
                f"other bits than the model's); saves one {c.kind} of {bytes_a_row} bytes a row"
            )
        return Site(
            fused=True,
            reason=None,
            detail=detail,
            pattern=within.pattern,
            nodes=[n.name for n in dict.fromkeys([c.node, *c.waits])],
            admitted=within.admitted,
            over=within.outcome.over,
            **common,
        )
    names = dict.fromkeys([c.node.name, *(w.name for w in c.waits)])
    return Site(
        fused=False,
        reason=outcome.reason.value,
        detail=outcome.detail,
        pattern=item.pattern,
        nodes=list(names),
        matched=outcome.matched,
        over=item.over,
        **common,
    )
