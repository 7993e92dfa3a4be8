"""Options of the backend: parsed once, checked by name, each with an environment twin.

``options={"tpfuse.policy": "all"}`` wins over ``TPFUSE_POLICY=all``, which wins over the default. Keys without the
``tpfuse.`` prefix belong to the inner compiler.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tpfuse.passes.options import NUMERICS, POLICIES, PassOptions

PREFIX = "tpfuse."
INNERS = ("inductor", "aot_eager", "eager", "tensorrt")


class OptionError(ValueError):
    """An option or value that tpfuse does not know. The message names what is valid."""


@dataclass(frozen=True)
class Options:
    """All options of one compile.

    Attributes:
        inner: who compiles the rewritten graph.
        policy, numerics, verify, fuel: see :class:`tpfuse.passes.PassOptions`.
        dump: folder for before/after graphs and the report, or None.
        batch_invariant: True or False switches the mode of :mod:`tpfuse.ops.invariant` for the process; None leaves it.
        inner_options: what goes to the inner compiler unchanged.
    """

    inner: str = "inductor"
    policy: str = "shared"
    numerics: str = "exact"
    dump: str | None = None
    verify: bool = False
    fuel: int | None = None
    batch_invariant: bool | None = None
    inner_options: dict[str, Any] = field(default_factory=dict)

    def decisive(self) -> str:
        """The options that decide what is fused, as text."""
        return f"policy={self.policy} numerics={self.numerics} fuel={self.fuel}"

    def for_pass(self, fuel: int | None) -> PassOptions:
        """The pass's share, with what is left of the fuel."""
        return PassOptions(self.policy, self.numerics, fuel, self.verify)


def _choice(valid: tuple[str, ...]) -> Callable[[str, Any], str]:
    def read(key: str, given: Any) -> str:
        if given not in valid:
            raise OptionError(f"{key} is {given!r}; valid values are {', '.join(valid)}{_hint(given, valid)}")
        return given

    return read


def _flag(key: str, given: Any) -> bool:
    if isinstance(given, bool):
        return given
    text = str(given).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off", ""):
        return False
    raise OptionError(f"{key} is {given!r}; valid values are true and false")


def _count(key: str, given: Any) -> int | None:
    if given is None or (isinstance(given, str) and given.strip().lower() in ("", "none")):
        return None
    try:
        number = int(given)
    except (TypeError, ValueError):
        number = -1
    if number < 0 or isinstance(given, bool):
        raise OptionError(f"{key} is {given!r}; expected none or a number of rewrites, 0 or more")
    return number


def _folder(key: str, given: Any) -> str | None:
    if given is None or (isinstance(given, str) and given.strip().lower() in ("", "none")):
        return None
    if not isinstance(given, str | os.PathLike):
        raise OptionError(f"{key} is {given!r}; expected none or a folder's path")
    return os.fspath(given)


READERS: dict[str, Callable[[str, Any], Any]] = {
    "inner": _choice(INNERS),
    "policy": _choice(POLICIES),
    "numerics": _choice(NUMERICS),
    "dump": _folder,
    "verify": _flag,
    "fuel": _count,
    "batch_invariant": _flag,
}


def _hint(given: Any, valid: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(given), valid, n=1)
    return f". Did you mean {close[0]!r}?" if close else ""


def parse(options: Mapping[str, Any] | None, environment: Mapping[str, str] | None = None) -> Options:
    """Read options and environment. Raises :class:`OptionError` naming the key, the value and what is valid."""
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    for name, read in READERS.items():
        twin = f"TPFUSE_{name.upper()}"
        if environment.get(twin):
            values[name] = read(twin, environment[twin])
    inner_options: dict[str, Any] = {}
    for key, given in (options or {}).items():
        if not key.startswith(PREFIX):
            inner_options[key] = given
            continue
        name = key[len(PREFIX) :]
        if name not in READERS:
            valid = tuple(PREFIX + n for n in READERS)
            raise OptionError(f"unknown option {key!r}; valid options are {', '.join(valid)}{_hint(key, valid)}")
        values[name] = READERS[name](key, given)
    return Options(**values, inner_options=inner_options)
