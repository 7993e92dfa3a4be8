"""The inner compilers: each has the rewritten graph run. A new one is a file here and a line in :data:`INNERS`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

# Value of ``tpfuse.inner`` -> module with ``compile(gm, example_inputs, options, mode, training)``; the first is the default.
INNERS = {"inductor": "inductor", "aot_eager": "aot", "eager": "aot", "tensorrt": "tensorrt"}


def compiler(name: str) -> Callable[..., Callable[..., Any]]:
    """The ``compile`` of an inner compiler. Imported when it is asked for: some are extras."""
    from tpfuse import store  # tpfuse's options import this package

    compile = importlib.import_module(f"{__name__}.{INNERS[name]}").compile

    def run(*args: Any) -> Callable[..., Any]:
        with store.forgotten_on_failure():
            return compile(*args)

    return run
