"""Every ``TPFUSE_`` variable: its meaning, its default, and how its value is read. One place, so that a misspelling can be told.

The options of the backend register their variables too (``tpfuse/options.py``), for this package imports nothing above it.
"""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import select as selection

PREFIX = "TPFUSE_"
# Variables that only this repository's tests read.
OURS = ("TPFUSE_TEST_", "TPFUSE_SCREENSHOTS")
# Seconds: some 30 years. What is longer overflows where a time is kept in nanoseconds or in torch's milliseconds.
LONGEST = 1e9


@dataclass(frozen=True)
class Variable:
    """One variable.

    Attributes:
        name: with the prefix.
        meaning: one line.
        default: the value when it is not set, or set to nothing.
        read: (name, text) -> value; raises ``ValueError`` naming both and what is valid.
    """

    name: str
    meaning: str
    default: Any
    read: Callable[[str, str], Any]

    def value(self, environment: Mapping[str, str] | None = None) -> Any:
        """The value in force."""
        text = (os.environ if environment is None else environment).get(self.name, "")
        return self.read(self.name, text) if text.strip() else self.default


REGISTRY: dict[str, Variable] = {}


def register(name: str, meaning: str, default: Any, read: Callable[[str, str], Any]) -> Variable:
    """Make a variable known. Registering it again replaces it."""
    REGISTRY[name] = variable = Variable(name, meaning, default, read)
    return variable


def path(name: str, text: str) -> Path:
    """A reader that takes a path."""
    return Path(text)


def word(valid: Sequence[str]) -> Callable[[str, str], str]:
    """A reader that takes one of ``valid``."""

    def read(name: str, text: str) -> str:
        if text not in valid:
            raise ValueError(f"{name}={text!r} is not valid; valid values are {', '.join(valid)}{hint(text, valid)}")
        return text

    return read


def number(least: float, kind: type = float, most: float = math.inf) -> Callable[[str, str], Any]:
    """A reader that takes a finite number of at least ``least`` and at most ``most``."""

    def read(name: str, text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most or math.isinf(value):
            what = "a whole number" if kind is int else "a number"
            limit = "" if math.isinf(most) else f" and at most {most:g}"
            raise ValueError(f"{name}={text!r} is not valid; expected {what} of at least {least:g}{limit}")
        return value

    return read


def flag(name: str, text: str) -> bool:
    """A reader that takes true and false, in the usual spellings."""
    lower = text.strip().lower()
    if lower in ("1", "true", "yes", "on"):
        return True
    if lower in ("0", "false", "no", "off", ""):
        return False
    raise ValueError(f"{name}={text!r} is not valid; valid values are true and false")


def hint(given: str, valid: Sequence[str]) -> str:
    """``". Did you mean 'x'?"`` where one of ``valid`` is close, else nothing."""
    close = difflib.get_close_matches(given, valid, n=1)
    return f". Did you mean {close[0]!r}?" if close else ""


def unknown(environment: Mapping[str, str] | None = None) -> list[str]:
    """One sentence for each set variable with our prefix that nothing reads."""
    given = os.environ if environment is None else environment
    names = sorted(n for n in given if n.startswith(PREFIX) and n not in REGISTRY and not n.startswith(OURS))
    return [f"{name} is not a variable of tpfuse, so it does nothing{hint(name, list(REGISTRY))}" for name in names]


def invalid(environment: Mapping[str, str] | None = None) -> list[str]:
    """One sentence for each variable whose value cannot be read."""
    found = []
    for variable in REGISTRY.values():
        try:
            variable.value(environment)
        except (ValueError, OSError) as error:
            found.append(str(error))
    return found


def warn_about_mistakes() -> None:
    """Warn of misspelled variables and of values that are not valid: one that does nothing is worse than an error.

    A value is read where it is needed, which on a CPU most are not. Where one is needed, it is an error there.
    """
    for sentence in (*unknown(), *invalid()):
        warnings.warn(f"tpfuse: {sentence}", RuntimeWarning, stacklevel=3)


# Read by the engine's plugin; registered here, because `import tpfuse` tells variables that nothing reads.
VLLM = register("TPFUSE_VLLM", "fuse the all-reduces of tensor-parallel models inside vLLM", False, flag)

BENCH_BUILD = register(
    "TPFUSE_BENCH_BUILD", "folder for libraries that the benchmarks build, of this user alone", None, path
)


WATCHDOG_SECONDS = 600.0  # torch's own limit for a collective
DEPENDENT_LAUNCH = ("off", "end", "early")
SHARED_GPU = ("spare", "packed")
BACKENDS = ("auto", "CUDA", "NCCL")

_ALGORITHM = register(
    "TPFUSE_ALGORITHM",
    "the algorithm of every call, or auto",
    "auto",
    word(("auto", *selection.ALGORITHMS)),
)
_TABLE = register(
    "TPFUSE_TABLE",
    "a selection table that `tpfuse bench --tune` wrote",
    selection.TABLE,
    lambda _, text: selection.load_table(Path(text)),
)
_WATCHDOG = register(
    "TPFUSE_WATCHDOG_SECONDS",
    "seconds that a kernel waits for a peer before it gives up",
    WATCHDOG_SECONDS,
    number(0.001, most=LONGEST),
)
_PDL = register("TPFUSE_PDL", "programmatic dependent launch on sm_90 and newer", "early", word(DEPENDENT_LAUNCH))
_PLANES = register("TPFUSE_CONCURRENT_PLANES", "planes of one process in use at the same time", 1, number(1, int))
_SHARED_GPU = register(
    "TPFUSE_SHARED_GPU", "what waiting kernels take of a GPU that ranks share", "spare", word(SHARED_GPU)
)
_BACKEND = register("TPFUSE_SYMM_MEM", "torch's symmetric-memory backend", "auto", word(BACKENDS))
_QUANT_ROWS = register(
    "TPFUSE_QUANT_ROWS",
    "rows up to which a call is quantized in the kernel that norms, instead of behind it",
    selection.QUANT_ROWS,
    number(0, int),
)

BATCH_INVARIANT = "TPFUSE_BATCH_INVARIANT"
_BATCH_INVARIANT = register(BATCH_INVARIANT, "the bits of a row depend on no other row of the call", False, flag)

SGLANG = register("TPFUSE_SGLANG", "fuse inside SGLang", False, flag)

asked: dict[str, bool] = {}  # "on": what set_batch_invariant was given last


def batch_invariant() -> bool:
    """Whether this process is in batch-invariant mode. Raises ``ValueError`` naming the variable when its value is not valid."""
    if asked:
        return asked["on"]
    return _BATCH_INVARIANT.value()


@dataclass(frozen=True)
class Settings:
    """What the environment asks for; equal on all ranks of a group or the group refuses to start.

    Attributes:
        algorithm: ``TPFUSE_ALGORITHM``: ``auto`` or an algorithm for every call.
        table: ``TPFUSE_TABLE``: a tuned selection table.
        watchdog_seconds: ``TPFUSE_WATCHDOG_SECONDS``: how long a poll waits for a peer.
        dependent_launch: ``TPFUSE_PDL``: programmatic dependent launch on sm_90 and newer. ``off``: the next kernel is
            launched when this one has ended; ``end``: after the last store of this one; ``early``: once the kernel
            before this one has ended. In all three the next kernel reads nothing before this one has ended.
        concurrent_planes: ``TPFUSE_CONCURRENT_PLANES``: how many planes of one process may be in use at the same time.
        shared_gpu: ``TPFUSE_SHARED_GPU``: what waiting kernels take of a GPU that ranks share. ``spare`` leaves
            half of the multiprocessors free, so that ordinary kernels of all ranks always run; ``packed`` fills it, for
            ranks that run nothing but these kernels, as benchmarks do.
        backend: ``TPFUSE_SYMM_MEM``: torch's symmetric-memory backend; ``auto`` is torch's own choice.
        quant_rows: ``TPFUSE_QUANT_ROWS``: see :data:`tpfuse.ops.select.QUANT_ROWS`.
        batch_invariant: ``TPFUSE_BATCH_INVARIANT`` or the option: see :mod:`tpfuse.ops.invariant`.
    """

    algorithm: str = "auto"
    table: tuple[selection.Entry, ...] = field(default=selection.TABLE, repr=False)
    watchdog_seconds: float = WATCHDOG_SECONDS
    dependent_launch: str = "early"
    concurrent_planes: int = 1
    shared_gpu: str = "spare"
    backend: str = "auto"
    quant_rows: int = selection.QUANT_ROWS
    batch_invariant: bool = False

    @classmethod
    def from_environment(cls) -> Settings:
        """Raises ``ValueError`` naming the variable, its value and the valid ones."""
        invariant = batch_invariant()
        algorithm = _ALGORITHM.value()
        if invariant and algorithm == "library":
            raise ValueError(
                "TPFUSE_ALGORITHM='library' is not valid with batch_invariant: an all-reduce of the library sums in an order "
                "that depends on the size of the call; valid are auto, one_shot, two_shot. Unset one of the two on all ranks"
            )
        return cls(
            algorithm=algorithm,
            table=_TABLE.value(),
            watchdog_seconds=_WATCHDOG.value(),
            dependent_launch=_PDL.value(),
            concurrent_planes=_PLANES.value(),
            shared_gpu=_SHARED_GPU.value(),
            backend=_BACKEND.value(),
            quant_rows=_QUANT_ROWS.value(),
            batch_invariant=invariant,
        )

    def fingerprint(self) -> str:
        return (
            f"algorithm={self.algorithm} table={selection.fingerprint(self.table)} "
            f"watchdog={self.watchdog_seconds} pdl={self.dependent_launch} planes={self.concurrent_planes} "
            f"shared_gpu={self.shared_gpu} backend={self.backend} quant_rows={self.quant_rows} "
            f"batch_invariant={self.batch_invariant}"
        )
