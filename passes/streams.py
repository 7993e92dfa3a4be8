"""Hyper-connections, told apart from other patterns so that a report can name them: a residual of several streams.

A sublayer's sum is spread over the streams by weights of each row, and the next norm reads a mixture of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from tpfuse import compat

from . import values

REPEATS = values.overloads("repeat.default")
SPREADING = values.EXPANDS | REPEATS | values.overloads("mul.Tensor")


def spread(current: values.Aliases) -> tuple[Node, int] | None:
    """The reader that spreads a value, or the value cast to another dtype, over streams, and over how many."""
    for reader in current.readers:
        streams = _spread_by(reader, current.names)
        if streams:
            return reader, streams
        if reader.target not in values.CASTS:
            continue
        names = [reader]
        for name in names:
            names += [user for user in name.users if values.is_alias(user, name)]
        for later in dict.fromkeys(user for name in names for user in name.users if user not in names):
            streams = _spread_by(later, names)
            if streams:
                return later, streams
    return None


def _spread_by(reader: Node, names: Iterable[Node]) -> int:
    """By how much one dimension of a value grows in what reads it, where all others stay; 0 when that is not all."""
    new = values.value(reader) if reader.target in SPREADING else None
    if new is None:
        return 0
    for name in set(names) & set(reader.all_input_nodes):
        old = values.value(name)
        if old is None or new.dim() != old.dim() or new.dim() < 2:
            continue
        grown = [(m, n) for m, n in zip(old.shape, new.shape, strict=True) if not compat.statically_true(m == n)]
        if len(grown) != 1 or not all(isinstance(size, int) for size in grown[0]):
            continue
        before, after = grown[0]
        wider = not compat.statically_true(new.shape[-1] == old.shape[-1])
        if wider and reader.target in REPEATS and after % before == 0:
            return int(after // before)
        if not wider and before == 1:
            return int(after)
    return 0
