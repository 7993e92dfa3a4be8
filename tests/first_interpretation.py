"""What Triton's interpreter does with a kernel only once in a process, done before ranks are forked: half a second of each.

Imported by the fork server of ``warm`` whose processes interpret. It imports the kernels and has each function rewritten as the
interpreter wants it; none is called, and nothing that a test replaces is replaced here.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

from triton.language import standard
from triton.runtime.interpreter import InterpretedFunction


def rewrite_all() -> None:
    from tpfuse.ops import kernels

    names = [f"{kernels.__name__}.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)]
    for module in (standard, *map(importlib.import_module, names)):
        for function in list(vars(module).values()):
            if isinstance(function, InterpretedFunction):
                function.rewrite()


try:
    rewrite_all()
except Exception as error:  # ranks do without
    print(f"tests/first_interpretation.py: {type(error).__name__}: {error}", file=sys.stderr)
