"""Every ``TPFUSE_`` variable: its meaning, its default, and how its value is read. One place, so that a misspelling can be told.

The options of the backend register their variables too (``tpfuse/options.py``), for this package imports nothing above it.
"""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def warn_about_unknown() -> None:
    """Warn of misspelled variables: one that does nothing is worse than an error."""
    for sentence in unknown():
        warnings.warn(f"tpfuse: {sentence}", RuntimeWarning, stacklevel=3)


# Registered here and not where it is read: that module is imported by benchmarks only.
BENCH_BUILD = register(
    "TPFUSE_BENCH_BUILD", "folder for libraries that the benchmarks build, of this user alone", None, path
)
