"""A compiled kernel and the cheapest way to start it."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor

from .geometry import THREADS_A_WARP


class Kernel:
    """A compiled kernel and the shortest way to launch it.

    Triton's own launch binds and specializes every argument on each call. Every argument here has one specialization
    for good (pointers are 16-byte aligned, integers are not specialized), so after the first launch the compiled kernel
    is started directly. Where Triton's private interface for that has changed, its public launch is used: same kernel, more
    time on the CPU.
    """

    def __init__(self, function: Any, lanes: int, constexprs: tuple[Any, ...], **options: Any) -> None:
        self.function = function
        self.num_warps = lanes // THREADS_A_WARP
        self.constexprs = constexprs
        self.options = options
        self._compiled: Any = None
        self._run: Callable[..., None] | None = None

    def compile(self, *args: Any) -> None:
        """Compile and load without launching, so that no rank compiles while another one already waits for it.

        Triton gets dtypes in place of tensors: all that it needs, and nothing that it could keep alive (compiling may happen
        while the caching allocator is in a CUDA graph's pool, which nothing may outlast).
        """
        types = [a.dtype if isinstance(a, Tensor) else a for a in args]
        compiled = self.function.warmup(
            *types, *self.constexprs, grid=(1,), num_warps=self.num_warps, enable_fp_fusion=False, **self.options
        )
        load = getattr(compiled, "_init_handles", None)
        if load is not None and direct_launch_is_known():
            load()
            self._run = compiled.run
        else:
            _warn_of_public_launch()
            if load is not None:
                with contextlib.suppress(
                    TypeError
                ):  # of other arguments; the first launch loads then, later than it should
                    load()
        self._compiled = compiled  # last: for another thread it is the sign that the kernel can be started

    @property
    def ready(self) -> bool:
        return self._compiled is not None

    @property
    def registers(self) -> int:
        return int(self._compiled.n_regs)

    def launch_publicly(self, programs: int, *args: Any) -> None:
        """Launch through Triton's own interface, on the current stream."""
        self.function[(programs,)](
            *args, *self.constexprs, num_warps=self.num_warps, enable_fp_fusion=False, **self.options
        )

    def __call__(self, programs: int, stream: int, *args: Any) -> None:
        compiled = self._compiled
        if self._run is None:
            self.launch_publicly(programs, *args)
            return
        self._run(
            programs,
            1,
            1,
            stream,
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *args,
            *self.constexprs,
        )


@lru_cache(maxsize=1)
def _warn_of_public_launch() -> None:
    warnings.warn(
        "tpfuse: this version of Triton starts kernels in another way than tpfuse knows, so calls go through its public launch "
        "and cost some 20 us more on the CPU; CUDA graphs are not affected. Use a Triton that docs/versions.md lists",
        RuntimeWarning,
        stacklevel=3,
    )


@lru_cache(maxsize=1)
def direct_launch_is_known() -> bool:
    """Whether this Triton starts a compiled kernel with the arguments that :class:`Kernel` gives it.

    Private: ``CompiledKernel.run`` has no documented signature. How Triton itself calls it is read from its source, since a wrong
    order would start the kernel with wrong pointers.
    """
    from triton.runtime.jit import JITFunction

    try:
        source = "".join(inspect.getsource(JITFunction.run).split())
    except (OSError, TypeError):
        return False
    return (
        "kernel.run(grid_0,grid_1,grid_2,stream,kernel.function,kernel.packed_metadata,launch_metadata,"
        "knobs.runtime.launch_enter_hook,knobs.runtime.launch_exit_hook,*bound_args.values())" in source
    )


def launch_plain(function: Any, programs: int, args: tuple[Any, ...], constexprs: tuple[Any, ...]) -> None:
    """Launch through Triton itself: the interpreter, and targets whose compiled kernels have another interface."""
    function[(programs,)](*args, *constexprs)
