"""Options of the backend: parsed once, checked by name, each with an environment twin.

``options={"tpfuse.policy": "all"}`` wins over ``TPFUSE_POLICY=all``, which wins over the default. Keys without the
``tpfuse.`` prefix belong to the inner compiler.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tpfuse import compat
from tpfuse.inner import INNERS
from tpfuse.ops import settings as variables
from tpfuse.ops.settings import hint
from tpfuse.passes.options import NUMERICS, POLICIES, PassOptions

PREFIX = "tpfuse."


class OptionError(ValueError):
    """An option or value that tpfuse does not know. The message names what is valid."""


@dataclass(frozen=True)
class Options:
    """All options of one compile.

    Attributes:
        inner: who compiles the rewritten graph.
        policy, numerics, verify, fuel: see :class:`tpfuse.passes.PassOptions`.
        dump: folder for before/after graphs and the report, or None.
        mode: of ``torch.compile``, for those who pass options too; None leaves Inductor's defaults.
        lower: with Inductor, leave fused sites to it where the op would have no kernel (:mod:`tpfuse.passes.lowering`).
        batch_invariant: True or False switches the mode of :mod:`tpfuse.ops.invariant` for the process; None leaves it.
        refused: see :class:`tpfuse.passes.PassOptions`; no option of a user, but what ranks disagreed about.
        inner_options: what goes to the inner compiler unchanged.
    """

    inner: str = "inductor"
    policy: str = "shared"
    numerics: str = "exact"
    dump: str | None = None
    verify: bool = False
    fuel: int | None = None
    mode: str | None = None
    lower: bool = True
    batch_invariant: bool | None = None
    refused: dict[tuple[int, ...], str] = field(default_factory=dict)
    inner_options: dict[str, Any] = field(default_factory=dict)

    def decisive(self) -> str:
        """The options that decide what is fused, as text."""
        return f"policy={self.policy} numerics={self.numerics} fuel={self.fuel} lower={self.lower}"

    def for_pass(self, fuel: int | None, lower: bool = False) -> PassOptions:
        """The pass's share, with what is left of the fuel; ``lower`` where Inductor compiles the graph and may do so."""
        return PassOptions(self.policy, self.numerics, fuel, self.verify, lower, self.refused)


def _by(read: Callable[[str, str], Any]) -> Callable[[str, Any], Any]:
    """A reader of variables as a reader of options."""

    def option(key: str, given: Any) -> Any:
        try:
            return read(key, given if isinstance(given, str) else str(given))
        except ValueError as error:
            raise OptionError(str(error)) from None

    return option


def _choice(valid: tuple[str, ...]) -> Callable[[str, Any], str]:
    return _by(variables.word(valid))


_flag = _by(variables.flag)


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


def _mode(key: str, given: Any) -> str | None:
    if given is None or (isinstance(given, str) and given.strip().lower() in ("", "none")):
        return None
    return _choice(compat.inductor_modes())(key, given)


READERS: dict[str, Callable[[str, Any], Any]] = {
    "inner": _choice(tuple(INNERS)),
    "policy": _choice(POLICIES),
    "numerics": _choice(NUMERICS),
    "dump": _folder,
    "verify": _flag,
    "fuel": _count,
    "mode": _mode,
    "lower": _flag,
    "batch_invariant": _flag,
}


MEANINGS = {
    "inner": "who compiles the rewritten graph",
    "policy": "which legal sites are rewritten",
    "numerics": "whether another rounding order is allowed",
    "dump": "folder for graphs and reports",
    "verify": "compare every rewrite with the original at compile time",
    "fuel": "stop after this many rewrites",
    "mode": "the mode of torch.compile, which takes none beside options",
    "lower": "where the op has no kernel (CPU), Inductor compiles what follows the all-reduce",
}


def twin(name: str) -> str:
    """The environment variable of an option."""
    return f"{variables.PREFIX}{name.upper()}"


for _name, _meaning in MEANINGS.items():
    variables.register(twin(_name), _meaning, getattr(Options, _name), READERS[_name])


# Not an option of a compile: it belongs to the process.
AGREEMENT_SECONDS = variables.register(
    "TPFUSE_AGREEMENT_SECONDS",
    "seconds that a rank waits for the others to compile the same graph",
    600.0,
    variables.number(0.001, most=variables.LONGEST),
)


def prefix_hint(names: Iterable[str]) -> str:
    """``". Did you mean 'tpfuse.policy'?"`` for options of the inner compiler that lack our prefix, else nothing."""
    close = [PREFIX + name for name in sorted(names) if name in READERS]
    return f". Did you mean {', '.join(map(repr, close))}?" if close else ""


def parse(options: Mapping[str, Any] | None, environment: Mapping[str, str] | None = None) -> Options:
    """Read options and environment. Raises :class:`OptionError` naming the key, the value and what is valid."""
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    for name, read in READERS.items():
        variable = twin(name)
        if environment.get(variable):
            values[name] = read(variable, environment[variable])
    inner_options: dict[str, Any] = {}
    for key, given in (options or {}).items():
        if not key.startswith(PREFIX):
            inner_options[key] = given
            continue
        name = key[len(PREFIX) :]
        if name not in READERS:
            valid = tuple(PREFIX + n for n in READERS)
            raise OptionError(f"unknown option {key!r}; valid options are {', '.join(valid)}{hint(key, valid)}")
        values[name] = READERS[name](key, given)
    return Options(**values, inner_options=inner_options)
