"""tpfuse inside vLLM, loaded by vLLM itself: set ``TPFUSE_VLLM=1`` and start the engine as always.

vLLM calls :func:`register` in each of its processes (entry point group ``vllm.general_plugins``). Switched on, it adds the
pass to the config of every tensor-parallel engine, where vLLM takes custom passes, and switches vLLM's own all-reduce fusion
off. :func:`report` is what was fused, whole models and all ranks, in the process that made the engine.

    from tpfuse.engines.vllm import report
    print(report())

Whatever fails here is logged with its cause and leaves vLLM as it was.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

import tpfuse as package
from tpfuse import compat, report_cache
from tpfuse.inner.inductor import set_batch_invariant, sources_digest
from tpfuse.inner.run_pass import run_pass
from tpfuse.ops import settings
from tpfuse.options import Options, parse
from tpfuse.parallel.comparison import agree_on
from tpfuse.parallel.decision import AgreementError
from tpfuse.passes import GraphReport, collectives, quantizers

from . import vllm_compat as names
from . import vllm_norms as norms
from . import vllm_reports as files
from .vllm_reports import EngineReport

__all__ = ["EngineReport", "is_pass", "make_pass", "register", "report", "switch_on"]

_lock = threading.Lock()
_told: set[str] = set()


def register() -> None:
    """vLLM's entry point: switch on when ``TPFUSE_VLLM`` says so."""
    try:
        on = settings.VLLM.value()
    except ValueError as error:
        _warn("variable", str(error))
        return
    if on:
        switch_on()


def switch_on() -> None:
    """Add the pass to every config of this process that is checked from here on. Calling it again does nothing."""
    _guarded("the plugin could not be set up", names.on_config, _around_config)
    _watch()


def report(folder: str | Path | None = None) -> EngineReport:
    """What was fused in an engine of this process, or in the run whose folder is given.

    Without a folder: the engine that this process made last, else the last run on this machine.
    """
    if folder is None:
        folder = _last_run()
    return files.collect(Path(folder))


def make_pass(
    options: dict[str, Any] | None = None,
    ranks: Callable[[str], Sequence[int]] | None = None,
    previous: Any = None,
    folder: Path | None = None,
) -> Any:
    """The pass as vLLM's pass manager takes it, for those who write ``inductor_compile_config`` themselves.

    Args:
        options: tpfuse options. All legal sites are fused by default: vLLM reduces attention and MLP over one group, and its
            pieces of a model show only half of a layer each.
        ranks: global ranks of one of vLLM's group names, e.g. ``"tp:0"``; default asks vLLM. A copy in another process needs
            a function that pickle finds by name.
        previous: a pass that runs before this one.
        folder: of the run, for reports.
    """
    given = dict(options or {})
    environment = parse({})
    if f"{package.options.PREFIX}policy" not in given and environment.policy == Options.policy:
        given[f"{package.options.PREFIX}policy"] = "all"
    return _rebuild((parse(given), ranks, previous, folder))


def is_pass(value: Any) -> bool:
    """Whether a value is what :func:`make_pass` makes."""
    return isinstance(value, _Fusion)


class _Fusion:
    """The pass, without the base class that vLLM asks for: vLLM is imported when the first one is made."""

    options: Options
    ranks: Callable[[str], Sequence[int]] | None
    previous: Any
    folder: Path | None
    reports: list[GraphReport]

    def __call__(self, graph: Graph) -> None:
        if self.previous is not None:
            self.previous(graph)
        if not _guarded("vLLM's all-reduce could not be registered", self._know_the_collective):
            return
        opened: list[norms.Norm] = []
        try:
            unknown = norms.open_norms(graph, _is_reduction, names.norm_provider, opened)
            if unknown:
                _warn(
                    "provider",
                    f"vLLM computes norms with {', '.join(sorted(unknown))}, and where that rounds is not known: those norms "
                    "stay vLLM's. Leave ir_op_priority at its default, or start it with native or vllm_c",
                )
            run_pass(graph, self.options, False, self.reports)
            _recorder.fresh.append(self.reports[-1])
            _recorder.folder = self.folder
        except Exception as error:
            if self.options.verify:
                raise
            _warn("pass", f"a graph stays as it was: {type(error).__name__}: {error}", error)
        finally:
            norms.close_norms(graph, opened)
        _recorder.outside_a_model()

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        """vLLM asks this of every pass: the op is right, and chooses its algorithm, for any number of rows."""
        return True

    def uuid(self) -> str:
        """Equal for equal work in all processes of one start and the next; vLLM's compile caches are keyed by it.

        Groups are named in it as vLLM and torch name them in *this* process: the fused op holds torch's name as a constant,
        so ranks of different groups must not share a compiled graph. Ranks of one group have the same names.
        """
        _watch()  # an ahead-of-time cache asks for this before it looks, and may be all that this process calls
        p = self.options
        theirs = None if self.previous is None else str(_uuid(self.previous))
        parts = (sources_digest(), _own_digest(), torch.__version__, p.policy, p.numerics, p.verify, p.fuel, theirs)
        # Not the collectives: this pass registers vLLM's own once it runs.
        quantize = sorted(str(known) for known in quantizers.registered())
        return report_cache.key([*parts, *quantize, settings.batch_invariant(), *_torch_names(self.ranks)])

    def __reduce__(self) -> Any:
        return _rebuild, ((self.options, self.ranks, self.previous, self.folder),)

    def _know_the_collective(self) -> None:
        # Here, and not where the pass is made: a copy in a spawned worker was never made, it was unpickled.
        op = names.all_reduce()
        if not any(known.op is op.default for known in collectives.registered()):
            ranks: Any = self.ranks or names.group_ranks
            package.register_collective(op, group="group_name", ranks=ranks)


@functools.lru_cache(maxsize=1)
def _pass_class() -> type:
    return type("VllmPass", (_Fusion, names.pass_base()), {"__module__": __name__, "__doc__": _Fusion.__doc__})


def _rebuild(state: tuple[Any, ...]) -> Any:
    """A pass from its state: how pickle and copy make one, in any process."""
    new = _pass_class()()
    new.options, new.ranks, new.previous, new.folder = state
    new.reports = []
    set_batch_invariant(new.options)
    return new


def _is_reduction(node: Node) -> bool:
    return collectives.spelling_of(node) is not None or node.target is collectives.WAIT


def _uuid(other: Any) -> Any:
    uuid = getattr(other, "uuid", None)
    return uuid() if callable(uuid) else inspect.getsource(type(other))


@functools.lru_cache(maxsize=1)
def _own_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("vllm*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _torch_names(ranks: Callable[[str], Sequence[int]] | None) -> list[str]:
    """``vLLM's name = torch's name`` of each group of this process that a reduction may be over."""
    first: dict[tuple[int, ...], str] = {}
    for name, members in compat.known_groups():
        first.setdefault(members, name)
    found = []
    for name in names.group_names():
        try:
            found.append(f"{name}={first.get(tuple((ranks or names.group_ranks)(name)), '')}")
        except Exception:  # somebody else's callback, or a group that is going away
            found.append(f"{name}=?")
    return found


# -- the config -----------------------------------------------------------------------------------------------------------


def _around_config(original: Callable[..., Any], config: Any, *args: Any, **kwargs: Any) -> Any:
    _guarded("the pass could not be added to vLLM's config", _mount, config)
    return original(config, *args, **kwargs)


def _mount(config: Any) -> None:
    """Add the pass and switch vLLM's own fusion off, before vLLM derives its compile ranges from the latter."""
    if config.parallel_config.tensor_parallel_size < 2:
        return
    if not names.platform_can_fuse():
        _warn("platform", "the fused op needs CUDA: vLLM runs without it here")
        return
    compilation = config.compilation_config
    key = names.pass_key()
    held = compilation.inductor_compile_config.get(key)
    if not is_pass(held):
        held = make_pass(previous=held)
        compilation.inductor_compile_config[key] = held
    if held.folder is None:
        held.folder = files.new_run(names.cache_root() / "tpfuse")
    _recorder.last_run = held.folder
    passes = compilation.pass_config
    if passes.fuse_allreduce_rms is not False:
        passes.fuse_allreduce_rms = False
        _say("own-fusion", "vLLM's own all-reduce fusion (fuse_allreduce_rms) is off: tpfuse takes those reductions")


def _last_run() -> Path:
    if _recorder.last_run is not None:
        return _recorder.last_run
    root = names.cache_root() / "tpfuse"
    runs = sorted(root.glob("run-*"))
    return runs[-1] if runs else root


# -- reports of whole models ------------------------------------------------------------------------------------------------


@dataclass
class _Model:
    """A model that is being compiled."""

    name: str
    config: Any
    pieces: list[files.Piece] = field(default_factory=list)


@dataclass
class _Recorder:
    """What this process has compiled.

    Attributes:
        fresh: reports of graphs that the pass has run on and nobody has taken yet.
        models: those that are being compiled, innermost last.
        by_key: reports of pieces by the key of the artifact.
        beside: the file for a model's report beside its artifact in vLLM's ahead-of-time cache.
        published: reports of models that were put together in this process.
    """

    fresh: list[GraphReport] = field(default_factory=list)
    models: list[_Model] = field(default_factory=list)
    by_key: dict[str, GraphReport] = field(default_factory=dict)
    beside: Path | None = None
    folder: Path | None = None
    config: Any = None
    last_run: Path | None = None
    published: list[GraphReport] = field(default_factory=list)

    def outside_a_model(self) -> None:
        """Report a graph that vLLM does not compile piece by piece (its mode on a CPU)."""
        if self.models or not self.fresh:
            return
        model = _Model("model", self.config)
        model.pieces = [files.Piece("", index, made) for index, made in enumerate(self.fresh)]
        self.fresh = []
        self.finish(model)

    def finish(self, model: _Model) -> None:
        rank, size = names.place(model.config) if model.config is not None else (compat.rank(), 1)
        self.publish(files.merge(model.name, model.pieces, rank, size), model.config)

    def publish(self, reports: list[GraphReport], config: Any) -> None:
        if not reports:
            return
        # All ranks come here with a report of the same model, whichever cache has supplied it: ranks that fused different
        # reductions would wait for each other for ever.
        agree_on(reports, f"tpfuse {package.__version__}")
        self.published += reports
        if self.beside is not None:
            files.write(self.beside, reports)
            self.beside = None
        folder = self.folder or _folder_of(config)
        if folder is not None:
            files.publish(folder, reports)
        for made in reports:
            where = f"; tpfuse view {folder}" if folder is not None else ""
            cached = " (from a cache)" if made.from_cache else ""
            _log().info("tpfuse: rank %d: %s%s%s", made.rank, made.summary(), cached, where)
        if any(made.sites for made in reports) and not any(made.fused for made in reports):
            _warn("nothing", f"no all-reduce was fused: {files.reasons(reports)}")


_recorder = _Recorder()


def _watch() -> None:
    """See what vLLM compiles and what its caches supply. Without this, only reports are missing."""
    for hook, around in (
        (names.on_model, _around_model),
        (names.on_piece, _around_piece),
        (names.on_load, _around_load),
    ):
        _guarded("reports of whole models will be missing", hook, around)


def _around_model(original: Callable[..., Any], backend: Any, *args: Any, **kwargs: Any) -> Any:
    model = _Model(str(getattr(backend, "prefix", "") or "model"), getattr(backend, "vllm_config", None))
    _recorder.folder = _folder_of(model.config) or _recorder.folder
    _recorder.models.append(model)
    try:
        result = original(backend, *args, **kwargs)
    finally:
        _recorder.models.pop()
    if _folder_of(model.config) is not None:
        _guarded("the report of a model is missing", _recorder.finish, model)
    return result


def _around_piece(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    _recorder.fresh.clear()
    compiled = original(manager, *args, **kwargs)
    if _recorder.models:
        _guarded("the report of a piece is missing", _piece, original, manager, args, kwargs, compiled)
    return compiled


def _piece(original: Any, manager: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: Any) -> None:
    given = inspect.signature(original).bind(manager, *args, **kwargs).arguments
    compile_range = given["compile_range"]
    span = f"{compile_range.start}-{compile_range.end}"
    key = names.artifact_key(manager, compiled)
    made = files.merge("piece", [files.Piece(span, i, r) for i, r in enumerate(_recorder.fresh)], 0, 1)
    _recorder.fresh.clear()
    found = made[0] if made else None
    if key is not None:
        digest = report_cache.key(["vllm piece", key, span])
        if found is not None:
            files.keep_piece(digest, found)
        else:
            found = _recorder.by_key.get(digest) or files.kept_piece(digest)
        if found is not None:
            _recorder.by_key[digest] = found
    _recorder.models[-1].pieces.append(files.Piece(span, int(given.get("graph_index", 0)), found))


def _around_load(original: Callable[..., Any], model: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
    config = getattr(model, "vllm_config", None)
    folder = _folder_of(config)
    beside = Path(f"{path}.tpfuse.json")
    _recorder.folder, _recorder.config = folder, config
    before = len(_recorder.published)
    loaded = original(model, path, *args, **kwargs)
    if folder is None:
        return loaded
    if loaded is None:
        _recorder.beside = beside  # it will be compiled now, and saved to that path
    elif len(_recorder.published) == before:
        _guarded("the report of a model is missing", _from_artifact, beside, config)
    return loaded


def _from_artifact(beside: Path, config: Any) -> None:
    rank, size = names.place(config)
    kept = files.read(beside)
    if kept is None:
        kept = files.merge("model", [files.Piece("", 0, None)], rank, size)
    _recorder.publish([replace(r, rank=rank, world_size=size, from_cache=True) for r in kept], config)


def _folder_of(config: Any) -> Path | None:
    """The folder of the run, when the pass is part of the config."""
    compilation = getattr(config, "compilation_config", None)
    for held in getattr(compilation, "inductor_compile_config", {}).values():
        if is_pass(held):
            return held.folder
    return None


# -- what is said ------------------------------------------------------------------------------------------------------------


def _log() -> Any:
    return names.logger()


def _once(cause: str) -> bool:
    with _lock:
        new = cause not in _told
        _told.add(cause)
    return new


def _say(cause: str, message: str) -> None:
    if _once(cause):
        _log().info("tpfuse: %s", message)


def _warn(cause: str, message: str, error: BaseException | None = None) -> None:
    if _once(cause):
        _log().warning("tpfuse: %s", message, exc_info=error)


def _guarded(what: str, function: Callable[..., Any], *args: Any) -> bool:
    """Call a function of the plugin; what it raises is told once and goes no further. Returns whether it went well."""
    try:
        function(*args)
    except AgreementError:
        raise  # ranks that disagree would hang: an error now is the better end
    except Exception as error:
        _warn(what, f"{what} (vLLM {_version()}): {type(error).__name__}: {error}", error)
        return False
    return True


def _version() -> str:
    try:
        return names.version()
    except Exception:
        return "unknown"
