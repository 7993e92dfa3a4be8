"""Sizes and numbers that are symbols while a graph is traced."""

from __future__ import annotations

from typing import Any

import torch


def statically_true(condition: Any) -> bool:
    """Whether a possibly symbolic condition is known to hold, without adding a guard.

    Why semi-private: a plain ``bool()`` of a symbolic comparison would specialize the graph to the sizes of one call.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def follows_from_guards(condition: Any) -> bool:
    """:func:`statically_true`, or a comparison that a guard of the graph makes in other symbols.

    Why private: torch keeps what guards imply under the names that sizes had when the guard was made. Once a size is found to
    equal another one (two inputs are added, say), a question about the other one misses it.
    """
    if statically_true(condition):
        return True
    node = getattr(condition, "node", None)
    env = getattr(node, "shape_env", None)
    if node is None or env is None:
        return False
    from torch.fx.experimental.symbolic_shapes import canonicalize_bool_expr

    wanted = canonicalize_bool_expr(env.replace(node.expr))
    return any(canonicalize_bool_expr(env.replace(guard.expr)) == wanted for guard in env.guards)


def guarded(condition: Any) -> bool:
    """:func:`follows_from_guards`, or a condition that holds for the sizes of this trace and is a guard of the graph from now on.

    Why private: torch has no public way to guard on a comparison that must not raise where it has no example sizes.
    """
    if follows_from_guards(condition):
        return True
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(condition))


def number_of(size: Any) -> int | None:
    """A size that is one number, whatever the sizes of the inputs are; None for any other.

    Why private: sums of symbols may leave a number that is still a ``SymInt``, and only its node's expression tells.
    """
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else None


def known_at_run_time_only(size: Any) -> bool:
    """Whether a size is a symbol without a value at trace time (a count of non-zero elements, say).

    Why private: comparing such a size in Python raises; only its expression tells.
    """
    from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

    return not isinstance(size, int) and has_free_unbacked_symbols(size)


def size_hint(value: Any) -> int | str:
    """A size for reports: the number when it is known, else the symbol's text."""
    return int(value) if isinstance(value, int) else str(value)


def example_size(size: Any) -> int:
    """A number for a possibly symbolic size: the one it was traced with, or 2 where it never had one.

    Why private: only a ``SymInt``'s node holds the expression and its hint.
    """
    if isinstance(size, int):
        return size
    if size.node.hint is not None:
        return int(size.node.hint)
    expression = size.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, 2)))


def guarded_float(symbol: torch.SymFloat) -> float:
    """The value of a symbolic float, guarded. Why private: ``float()`` of it guards too, but names no place for logs."""
    return symbol.node.guard_float(__file__, 0)
