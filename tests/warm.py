"""Processes that start in milliseconds: forked from a server that has imported torch, instead of importing it again.

    context = warm.context()                 # for ranks
    context = warm.context(interpret=True)   # Triton's interpreter is on
    context.Process(target=..., args=...)    # as of any multiprocessing context

A child starts as a spawned one does, with the environment of the process that starts it. But torch and transformers are
there, and torch has compiled something (``first_compile``): a variable that they read when they are imported (see SERVER) is
the same for all children. Ranks have all of tpfuse too, and so have those that interpret (``first_interpretation``); commands,
which are as a user runs them, have nothing of it:

    context = warm.context(tpfuse=False)
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from multiprocessing import connection, forkserver, popen_forkserver, resource_tracker
from multiprocessing import context as contexts
from typing import Any
from unittest.mock import patch

# What torch and transformers read when they are imported. A thread a process: two cores have enough to do.
SERVER = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TORCHINDUCTOR_VEC_ISA_OK": "0",  # see conftest.py
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
RANKS = (
    "pytest",
    "torch",
    "torch.distributed.tensor",
    "torch.distributed._functional_collectives",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch._inductor.codegen.cpp",
    "torch.testing._internal.distributed.fake_pg",
    "transformers",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.distributed",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "first_compile",
)
TPFUSE = (
    *(
        "tpfuse",
        "tpfuse.backend",
        "tpfuse.hf",
        "tpfuse.hf_generate",
        "tpfuse.hf_compat",
        "tpfuse.hf_local",
        "tpfuse.hf_loop",
    ),
    *(
        "tpfuse.inner.aot",
        "tpfuse.inner.inductor",
        "tpfuse.inner.lowered",
        "tpfuse.passes.fusion",
        "tpfuse.passes.symbolic",
    ),
    *(
        "tpfuse.parallel.agreement",
        "tpfuse.parallel.layers",
        "tpfuse.parallel.comparison",
        "tpfuse.inspect",
        "tpfuse.load",
    ),
)
INTERPRETER = (
    *("torch", "sympy", "torch.distributed", "torch._library.custom_ops", "torch._dynamo"),
    *("triton", "triton.language", "triton.runtime.interpreter", "triton.experimental.gluon"),
    "first_interpretation",
)


def collect_rarely() -> None:
    """Tracing makes many objects that live on; looking for cycles among them every 700 objects is a sixth of a run's time."""
    gc.set_threshold(200_000, 20, 20)


class _Server(forkserver.ForkServer):
    """Multiprocessing's fork server, which has one list of modules for a process; here each server has its own."""

    def __init__(self, modules: tuple[str, ...], variables: Mapping[str, str], shared: str = "") -> None:
        super().__init__()
        self.shared = shared
        self.modules = modules
        self.set_forkserver_preload(list(modules))
        self.variables = variables
        self.started_by = os.getpid()
        atexit.register(self.end)

    def ensure_running(self) -> None:
        if self.shared in os.environ:
            with self._lock:
                resource_tracker.ensure_running()
                if self._forkserver_address is None:
                    self._forkserver_address = os.environ[self.shared]
                    # Children hold it as they would hold the pipe of a server of this process.
                    self._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)
            return
        # The server finds the modules of the tests, its children get the path of the process that starts them.
        paths = [os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])]
        with environment({**self.variables, "PYTHONPATH": os.pathsep.join(paths)}):
            super().ensure_running()

    def share(self) -> None:
        """Start it, waiting for its first client, for all processes that this one starts; it ends with this one."""
        self.set_forkserver_preload(["first_client", *self.modules])
        self.ensure_running()
        os.environ[self.shared] = str(self._forkserver_address)

    def end(self) -> None:
        """Its processes have ended by now, or hang."""
        if self._forkserver_pid is not None and os.getpid() == self.started_by:
            os.kill(self._forkserver_pid, signal.SIGKILL)
            os.waitpid(self._forkserver_pid, 0)


class _RankServer(_Server):
    """A child of the server of commands, which imports tpfuse as well and is a server of its own."""

    process: Any = None
    folder = ""

    def ensure_running(self) -> None:
        with self._lock:
            resource_tracker.ensure_running()
            if self.process is not None and self.process.is_alive():
                return
            if self.process is not None:
                self.alive.close()
            self.folder = self.folder or tempfile.mkdtemp(prefix="server-")
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(os.path.join(tempfile.mkdtemp(dir=self.folder), "listener"))
            listener.listen()
            # It ends when nobody holds the other end any longer, however this process ends.
            alive, self.alive = multiprocessing.Pipe(duplex=False)
            self.process = _ServerProcess(target=_become_server, args=(listener, alive), daemon=True)
            self.process.start()
            self._forkserver_address, self._forkserver_alive_fd = listener.getsockname(), self.alive.fileno()
            listener.close()
            alive.close()

    def end(self) -> None:
        if self.process is not None and os.getpid() == self.started_by:
            self.process.kill()
            self.process.join()
            shutil.rmtree(self.folder, ignore_errors=True)


def _become_server(listener: socket.socket, alive: connection.Connection) -> None:
    for name in TPFUSE:
        importlib.import_module(name)
    gc.freeze()  # what is here already is no garbage of a rank
    forkserver.main(listener.detach(), alive.fileno(), [])


COMMAND_SERVER = _Server(RANKS, SERVER, "TESTS_COMMAND_SERVER")
# From Python 3.14 on a server and its clients share a key, which only multiprocessing's own way of starting one hands over.
RANK_SERVER = _RankServer((), SERVER) if sys.version_info < (3, 14) else _Server((*RANKS, *TPFUSE), SERVER)
INTERPRETER_SERVER = _Server(INTERPRETER, {**SERVER, "TRITON_INTERPRET": "1"}, "TESTS_INTERPRETER_SERVER")


class _Popen(popen_forkserver.Popen):
    def _launch(self, process_obj: Any) -> None:
        with patch.multiple(
            popen_forkserver.forkserver, connect_to_new_process=process_obj.server.connect_to_new_process
        ):
            super()._launch(process_obj)  # type: ignore[misc]


def _end_with_parent() -> None:
    """A rank waits at a queue that it could write to itself, and would do so for ever after its test was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _CommandProcess(contexts.SpawnProcess):
    server: _Server = COMMAND_SERVER
    ends_with_its_parent = True
    _Popen = staticmethod(_Popen)

    def start(self) -> None:
        self.variables = {**os.environ, **self.server.variables}
        super().start()

    def run(self) -> None:
        collect_rarely()
        os.environ.clear()
        os.environ.update(self.variables)
        if self.ends_with_its_parent:
            threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()


class _ServerProcess(_CommandProcess):
    ends_with_its_parent = False  # but when nobody holds its pipe; and it forks, which it must not do beside a thread


class _RankProcess(_CommandProcess):
    server = RANK_SERVER


class _InterpreterProcess(_CommandProcess):
    server = INTERPRETER_SERVER


class _CommandContext(contexts.SpawnContext):
    Process = _CommandProcess  # type: ignore[assignment]


class _RankContext(contexts.SpawnContext):
    Process = _RankProcess  # type: ignore[assignment]


class _InterpreterContext(contexts.SpawnContext):
    Process = _InterpreterProcess  # type: ignore[assignment]


def share() -> None:
    """The processes of pytest-xdist that this one starts take their ranks from the same servers: each has imported torch once."""
    if sys.version_info < (3, 14):
        for server in (COMMAND_SERVER, INTERPRETER_SERVER):
            server.share()


def context(interpret: bool = False, tpfuse: bool = True) -> Any:
    """A multiprocessing context whose processes have imported torch already, and tpfuse."""
    if not tpfuse:
        return _CommandContext()
    return _InterpreterContext() if interpret else _RankContext()


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables are set for a while: a process that starts inherits them."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
