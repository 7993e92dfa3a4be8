"""A line of the report from what was found, judged and proved about one all-reduce."""

from __future__ import annotations

from typing import Any

from tpfuse import compat

from . import sharing, values
from .candidate import Candidate, Found
from .report import LayerAudit, Site


def site_of(item: Found, spot: sharing.Place, audits: list[LayerAudit]) -> Site:
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
        exact = "" if norm.exact else " (relaxed: other bits than the model's)"
        quantization = outcome.quantization
        quantized = "" if quantization is None else f"; quantized: {quantization.words}"
        if quantization is not None and not quantization.exact:
            quantized += " (relaxed: for some inputs other bits than the model's)"
        note = f"; {outcome.note}" if outcome.note else ""
        return Site(
            fused=True,
            reason=None,
            detail=f"{norm.flavour.describe()}{exact}{quantized}{note}",
            pattern=outcome.pattern,
            nodes=[n.name for n in outcome.nodes],
            eps=norm.eps,
            flavour=str(norm.flavour),
            quantizer=None if quantization is None else str(quantization.quantizer),
            note=outcome.note,
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
        **common,
    )
