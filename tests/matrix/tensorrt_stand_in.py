"""A stand-in for NVIDIA's ``tensorrt`` module, so that Torch-TensorRT's own partitioner runs where TensorRT is not installed.

It answers every attribute with a class that answers every attribute. Nothing can be built with it: what it allows is
everything up to the engines, that is lowering, partitioning and the dry run. Whatever is tested with it is a mock.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any


class _Any(type):
    """A class whose unknown attributes are further such classes."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Any(name, (), {"__module__": "tensorrt", "__init__": lambda self, *a, **k: None})
        setattr(cls, name, made)
        return made

    def __or__(cls, other: Any) -> Any:  # annotations such as `trt.ITensor | None`
        return cls

    def __ror__(cls, other: Any) -> Any:
        return cls

    def __iter__(cls) -> Any:
        return iter(())

    def __int__(cls) -> int:
        return 0

    __index__ = __int__

    def __lshift__(cls, other: Any) -> int:
        return 0

    def __rlshift__(cls, other: Any) -> int:
        return int(other)


class StandIn(ModuleType):
    """The module itself."""

    def __init__(self, version: str) -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.__path__: list[str] = []
        self.__file__ = __file__
        self.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None, is_package=True)
        self.tensorrt = self  # tensorrt.tensorrt.ITensor and tensorrt.ITensor are one class

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("tensorrt_rtx", "_package_name", "plugin"):
            raise AttributeError(name)
        made = _Any(name, (), {"__module__": "tensorrt", "__init__": lambda self, *a, **k: None})
        setattr(self, name, made)
        return made


def install(version: str = "10.15.0") -> None:
    """Make ``import tensorrt`` give the stand-in in this process. Does nothing where the real one is installed."""
    import importlib.util

    if "tensorrt" in sys.modules or importlib.util.find_spec("tensorrt") is not None:
        return
    sys.modules["tensorrt"] = StandIn(version)


def without_a_gpu() -> None:
    """Answer the two questions about the GPU that importing Torch-TensorRT asks even where there is none."""
    import torch

    if not torch.cuda.is_available():
        torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
        torch.cuda.get_device_name = lambda device=None: "stand-in"  # type: ignore[assignment]
        torch.cuda.current_device = lambda: 0  # type: ignore[assignment]
    if not hasattr(torch._C, "_CudaDeviceProperties"):  # a CPU build of torch
        torch._C._CudaDeviceProperties = object  # type: ignore[attr-defined]


def keep_on_the_cpu() -> None:
    """After the import: what Torch-TensorRT leaves in Torch it moves to the GPU; there is none."""
    import torch
    from torch_tensorrt.dynamo import _compiler

    if not torch.cuda.is_available():
        _compiler.to_torch_device = lambda device: torch.device("cpu")
