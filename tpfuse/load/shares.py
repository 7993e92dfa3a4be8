"""Load a transformers model so that each rank reads what it keeps."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from tpfuse.parallel import ConfigError, layout_of

from . import transformers_compat as compat
from .checkpoint import open_files, size_of
from .conversion import plan_reading
from .pieces import Meter

ATTRIBUTE = "tpfuse_loading"
# What decides where weights lie, and is decided by the sizes here.
TAKEN = ("distributed_config", "device_mesh", "tp_plan", "tp_size")
# The quantization that transformers unpacks while it loads, one parameter at a time.
UNPACKED_BY_GROUPS = "fp8"


@dataclasses.dataclass(frozen=True)
class Loading:
    """How a model came into memory; ``loading_of(model)`` returns it.

    Attributes:
        read: bytes of the checkpoint that this rank read.
        total: bytes of the checkpoint's files; 0 where the whole model was loaded by transformers alone.
        seconds: from the call to the model.
        whole_because: why every rank loaded the whole model before it was cut; empty where each read its part.
    """

    read: int
    total: int
    seconds: float
    whole_because: str


def loading_of(model: Any) -> Loading:
    """How ``tpfuse.hf.from_pretrained`` loaded this model.

    Raises:
        ConfigError: it was loaded in another way.
    """
    found = getattr(model, ATTRIBUTE, None)
    if found is None:
        raise ConfigError(
            f"{type(model).__name__} was not read in slices: tpfuse.hf.from_pretrained does that in every layout but the one "
            "that transformers' own tensor parallelism loads"
        )
    return found


def load(
    auto_class: Any,
    path: Any,
    parallelize: Callable[[Any], Any],
    progress: bool | None,
    device: str | None,
    kwargs: dict[str, Any],
) -> Any:
    """A model under ``parallelize``, of which this rank has read its part.

    Where that is impossible (a quantized or GGUF checkpoint, an adapter, several devices in ``device_map``) the whole model is
    loaded and then cut, with a warning that says why.

    Args:
        auto_class: transformers class to load with.
        path: folder or Hub name.
        parallelize: cuts a model in place, whole weights or the meta device.
        progress: whether rank 0 shows a progress bar and the time; None leaves that to transformers' logging.
        device: where this rank's part is to lie, e.g. ``cuda:0``; None leaves that to ``device_map`` among ``kwargs``. Parts are
            read into it one by one; a whole model is cut in host memory first, for a device may have no room for it.
        kwargs: for the class's ``from_pretrained``.
    Raises:
        ConfigError: an argument that contradicts the sizes, a quantization whose weights cannot be cut, or what
            ``parallelize`` raises.
    """
    given = [name for name in TAKEN if kwargs.get(name) is not None]
    if given:
        raise ConfigError(f"{given[0]} contradicts the ParallelConfig, which says where weights lie; leave it out")
    start = time.perf_counter()
    task = _Task(parallelize)
    why = "it has an adapter, which is put into whole layers" if has_adapter(path, kwargs) else compat.missing()
    with progress_of_rank_0(progress) as shown:
        if not why:
            try:
                with compat.loading_through(task.load):
                    model = auto_class.from_pretrained(path, **kwargs, **_place(device))
            except _WholeOnly as error:
                why = str(error)
        if why:
            if _first():
                warnings.warn(
                    f"every rank loads the whole model into host memory before it is cut: {why}", stacklevel=3
                )
            model = parallelize(auto_class.from_pretrained(path, **kwargs))
    if device is not None:
        model.to(device)
    loading = Loading(task.meter.bytes, task.total, time.perf_counter() - start, why)
    setattr(model, ATTRIBUTE, loading)
    if shown and not why:
        print(_line(loading), file=sys.stderr, flush=True)
    return model


def _place(device: str | None) -> dict[str, Any]:
    from transformers.utils import is_accelerate_available

    # transformers takes a device_map with accelerate only; without it the part goes through host memory.
    return {"device_map": {"": device}} if device is not None and is_accelerate_available() else {}


class _WholeOnly(Exception):
    """This checkpoint cannot be read in slices; the message says why. Raised before anything is read or cut."""


class _Task:
    """One call of ``from_pretrained``, from the empty model to the full one."""

    def __init__(self, parallelize: Callable[[Any], Any]):
        self.parallelize = parallelize
        self.meter, self.total = Meter(), 0

    def load(
        self,
        original: Callable[..., Any],
        model: Any,
        state_dict: Any,
        checkpoint_files: Any,
        load_config: Any,
        *rest: Any,
    ) -> Any:
        """In place of transformers' own step: cut the empty model, then let transformers fill it with parts."""
        why = _obstacle(state_dict, checkpoint_files, load_config)
        if why:
            raise _WholeOnly(why)
        whole = dict(model.state_dict())
        self.parallelize(model)
        reading = plan_reading(
            open_files(checkpoint_files, load_config.weights_only),
            load_config.weight_mapping,
            model.base_model_prefix,
            whole,
            layout_of(model).cuts,
            self.meter,
        )
        self.total = size_of(checkpoint_files)
        load_config = dataclasses.replace(load_config, weight_mapping=reading.weight_mapping)
        return original(model, reading.state, None, load_config, *rest)


def _obstacle(state_dict: Any, files: Any, load_config: Any) -> str:
    """Why the checkpoint cannot be read in slices; empty where it can."""
    quantizer = load_config.hf_quantizer
    if quantizer is not None:
        method = getattr(quantizer.quantization_config, "quant_method", "an unknown method")
        method = getattr(method, "value", method)
        if not getattr(quantizer.quantization_config, "dequantize", False):
            raise ConfigError(
                f"quantization with {method} makes packed weights, which cannot be cut by rows and columns; load without it "
                "and quantize each rank's part after (docs/models.md), or unpack with dequantize=True where the method can"
            )
        if method != UNPACKED_BY_GROUPS:
            return f"its {method} weights are unpacked by transformers, whole"
    if state_dict is not None or not files:
        return "its weights were given as a state_dict"
    devices = set((load_config.device_map or {}).values())
    if len(devices) > 1 or "disk" in devices:
        return f"device_map spreads it over {len(devices)} places"
    return ""


def has_adapter(path: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a folder or repository holds an adapter of peft. transformers puts it into a model that has its weights."""
    from transformers.utils import find_adapter_config_file

    known = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
    return find_adapter_config_file(path, **{k: kwargs[k] for k in known if kwargs.get(k) is not None}) is not None


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@contextlib.contextmanager
def progress_of_rank_0(wanted: bool | None) -> Iterator[bool]:
    """Rank 0 shows transformers' progress bar, the others none; says whether this rank shows it."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    shown = _first() and (enabled if wanted is None else wanted)
    if shown != enabled:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield shown
    finally:
        if shown != enabled:
            (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()


def _line(loading: Loading) -> str:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return (
        f"tpfuse: rank 0 of {ranks} read {_size(loading.read)} of a checkpoint of {_size(loading.total)} in "
        f"{loading.seconds:.1f} s"
    )


def _size(count: int) -> str:
    size, unit = float(count), 0
    while size >= 1024 and unit < 4:
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
