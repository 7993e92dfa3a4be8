"""What the pass may do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

POLICIES = ("shared", "strict", "all", "off")
NUMERICS = ("exact", "relaxed")


@dataclass(frozen=True)
class PassOptions:
    """Options of the pass alone; the backend has further ones.

    Attributes:
        policy: ``shared``: sites over ranks that nothing in the graph shows to be those of attention or of the MLP alone;
            ``strict``: only over ranks that some layer proves to be shared by attention and MLP; ``all``: every legal site;
            ``off``: report only.
        numerics: ``exact``: the model's own rounding order; ``relaxed``: the nearest order that the fused op knows, and a scale
            by a scalar tensor before the reduction instead of behind it, are allowed.
        fuel: stop after this many rewrites; None is no limit.
        verify: compare old and new region on random numbers at compile time.
        lower: leave fused sites to the compiler where :mod:`tpfuse.passes.lowering` says so; for Inductor.
        refused: ranks whose ops are left out because these ranks decided differently, each list with what was different.
    """

    policy: str = "shared"
    numerics: str = "exact"
    fuel: int | None = None
    verify: bool = False
    lower: bool = False
    refused: Mapping[tuple[int, ...], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}; valid values are {', '.join(POLICIES)}")
        if self.numerics not in NUMERICS:
            raise ValueError(f"numerics is {self.numerics!r}; valid values are {', '.join(NUMERICS)}")
        if self.fuel is not None and self.fuel < 0:
            raise ValueError(f"fuel is {self.fuel}; expected None or a number of rewrites, 0 or more")
