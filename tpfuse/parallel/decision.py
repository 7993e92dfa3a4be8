"""What a rank decided about its reductions, as it tells the others, and the error of ranks that decided differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tpfuse.passes.report import Site


class AgreementError(RuntimeError):
    """Ranks decided differently, or did not report in time. ``ranks`` has their global ranks."""

    def __init__(self, message: str, ranks: Sequence[int]):
        super().__init__(message)
        self.ranks = tuple(ranks)


@dataclass(frozen=True)
class Decision:
    """What a rank decided about one all-reduce, without anything that may differ between ranks, like names and shapes."""

    graph: int
    role: str
    layer: int | None
    pattern: str
    flavour: str | None
    fused: bool
    reason: str | None
    ranks: tuple[int, ...]
    lowered: bool = False
    quantizer: str | None = None
    over: tuple[int, ...] = ()
    eps: float | None = None

    def __str__(self) -> str:
        place = self.role if self.layer is None else f"{self.role} of layer {self.layer}"
        what = ("lowered" if self.lowered else "fused") if self.fused else f"kept ({self.reason})"
        pattern = self.pattern if self.eps is None else f"{self.pattern} (eps {self.eps})"
        return f"{place}: {pattern} {what} over {list(self.over or self.ranks)}"


def decision_of(graph: int, site: Site) -> Decision:
    return Decision(
        graph,
        site.role,
        site.layer,
        site.pattern,
        site.flavour,
        site.fused,
        site.reason,
        tuple(site.group),
        site.lowered,
        site.quantizer,
        site.over,
        site.eps if site.fused else None,
    )


def read(data: dict[str, Any]) -> Decision:
    return Decision(**{**data, "ranks": tuple(data["ranks"]), "over": tuple(data["over"])})


def without_ranks(decision: Decision) -> tuple[Any, ...]:
    return tuple(value for name, value in vars(decision).items() if name not in ("ranks", "over"))


def first_difference(right: list[Decision], wrong: list[Decision], a: int, b: int) -> str:
    for number, (one, two) in enumerate(zip(right, wrong, strict=False)):
        if without_ranks(one) != without_ranks(two):
            return f"All-reduce {number} on rank {a}: {one}; on rank {b}: {two}"
    return f"Rank {a} found {len(right)} all-reduces, rank {b} found {len(wrong)}"


def ranks_in_words(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
