"""The other implementations that the benchmarks compare with. Each returns a function that makes one call.

A contender that cannot run raises :class:`Unavailable` with the reason, which ends up in the table.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import compat
from tpfuse.ops import settings
from tpfuse.ops.experiment import Unavailable

Call = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """One shape to time: ``x`` is this rank's contribution, Llama's rounding order, bf16."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    eps: float
    rank: int
    world: int
    group_name: str
    shared: bool  # the ranks share one GPU

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def hidden(self) -> int:
        return self.x.shape[1]


def _eager_add_norm(y: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h = residual + y
    c = h.float()
    return weight * (c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype), h


@lru_cache(maxsize=1)
def _inductor_add_norm() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_eager_add_norm, dynamic=True)


_buffers: dict[str, Tensor] = {}


def reserve(group_name: str, values: int, dtype: torch.dtype, device: torch.device) -> None:
    """Allocate the symmetric buffer of torch's all-reduces for the largest size to come. Collective."""
    symm_mem = compat.symmetric_memory()

    if group_name not in _buffers or _buffers[group_name].numel() < values:
        buffer = symm_mem.empty(values, dtype=dtype, device=device)
        symm_mem.rendezvous(buffer, group_name)  # type: ignore[arg-type]
        _buffers[group_name] = buffer


def symmetric_buffer(group_name: str, values: int) -> Tensor:
    """The first ``values`` values of what :func:`reserve` allocated, flat."""
    return _buffers[group_name][:values]


def _symmetric(p: Problem) -> Tensor:
    reserve(p.group_name, p.rows * p.hidden, p.x.dtype, p.x.device)
    return symmetric_buffer(p.group_name, p.rows * p.hidden).view(p.rows, p.hidden)


def _room_on_a_shared_gpu(p: Problem, blocks: int, threads: int) -> None:
    """Torch's kernels wait without a watchdog, and one block's registers take a multiprocessor: with more blocks than those
    on one GPU they never end (seen at W = 8 with 20 blocks a rank)."""
    processors = torch.cuda.get_device_properties(p.x.device).multi_processor_count
    if p.shared and blocks * p.world > processors:
        raise Unavailable(
            f"its {blocks} blocks of {threads} threads a rank need a multiprocessor each, more than one GPU has, and it has "
            "no watchdog"
        )


def symm_one_shot(p: Problem) -> Call:
    """torch's one-shot all-reduce over symmetric memory, then Inductor's add and norm."""
    _room_on_a_shared_gpu(p, min(24, -(-p.rows * p.hidden // (512 * 8))), 512)
    buffer = _symmetric(p).view(-1)
    add_norm = _inductor_add_norm()

    def call() -> tuple[Tensor, Tensor]:
        y = torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, p.x.view(-1), "sum", p.group_name)
        return add_norm(y.view(p.rows, p.hidden), p.residual, p.weight, p.eps)

    return call


def symm_two_shot(p: Problem) -> Call:
    """torch's two-shot all-reduce over symmetric memory (which needs x copied into it), then Inductor's add and norm."""
    buffer = _symmetric(p)
    if p.rows * p.hidden * p.x.element_size() % (16 * p.world):
        raise Unavailable("torch's two-shot needs a size that is a multiple of 16 W bytes")
    _room_on_a_shared_gpu(p, 24, 1024)
    add_norm = _inductor_add_norm()

    def call() -> tuple[Tensor, Tensor]:
        buffer.copy_(p.x)
        torch.ops.symm_mem.two_shot_all_reduce_(buffer.view(-1), "sum", p.group_name)
        return add_norm(buffer, p.residual, p.weight, p.eps)

    return call


def nccl(p: Problem) -> Call:
    """The group's NCCL all-reduce, then Inductor's add and norm."""
    if p.shared:
        raise Unavailable("NCCL refuses two ranks on one GPU")
    add_norm = _inductor_add_norm()

    def call() -> tuple[Tensor, Tensor]:
        y = torch.ops._c10d_functional.all_reduce(p.x, "sum", p.group_name)
        return add_norm(torch.ops._c10d_functional.wait_tensor(y), p.residual, p.weight, p.eps)

    return call


_SHIM = r"""
#include <array>
#include <flashinfer/comm/trtllm_allreduce_fusion.cuh>
using namespace flashinfer::trtllm_allreduce_fusion;
template <int W>
static int go(AllReduceFusionParams<__nv_bfloat16> const& p, int pdl) {
  return allreduce_fusion_kernel_launcher<AllReduceFusionPattern::kARResidualRMSNorm, __nv_bfloat16, W, true>(p, pdl);
}
extern "C" int call(int world, int rank, int rows, int hidden, void** workspace, void* in, void* residual, void* h,
                    void* normed, void* gamma, float eps, int pdl, void* stream) {
  AllReduceFusionParams<__nv_bfloat16> p{};
  p.nranks = world; p.rank = rank; p.size = rows * hidden; p.hidden_dim = hidden; p.workspace = workspace;
  p.allreduce_in = in; p.residual_in = residual; p.residual_out = h; p.norm_out = normed; p.rms_gamma = gamma;
  p.rms_eps = eps; p.use_oneshot = true; p.stream = (cudaStream_t)stream;
  p.pattern = AllReduceFusionPattern::kARResidualRMSNorm; p.trigger_completion_at_end = true;
  switch (world) {
    case 2: return go<2>(p, pdl);
    case 4: return go<4>(p, pdl);
    case 8: return go<8>(p, pdl);
  }
  return -1;
}
"""

# FlashInfer's patterns that quantize to fp8, without a norm beside it, by what a scale is for: one static scale (values times
# 1 / scale), one scale a row, and one for 128 columns as a power of two, four of them in an int32.
_FP8_PATTERNS = {
    "tensor": "kARResidualRMSNormFP8Quant",
    "token": "kARResidualRMSNormDynamicFP8Quant",
    "group128": "kARResidualRMSNormPerTokenGroupFP8PackedQuant",
}


def _shim_of(granularity: str | None) -> str:
    """The source that calls FlashInfer's kernel: with fp8 output of that granularity, or with normed rows."""
    if granularity is None:
        return _SHIM
    scale = "p.scale_factor = (float*)scales;" if granularity == "tensor" else "p.scale_out = scales;"
    groups = (
        "p.block_quant_group_size = 128; p.tma_aligned_mn = (rows + 3) / 4 * 4;" if granularity == "group128" else ""
    )
    return (
        _SHIM.replace("kARResidualRMSNorm", _FP8_PATTERNS[granularity])
        .replace("void* gamma,", "void* gamma, void* quant_out, void* scales,")
        .replace("p.rms_eps = eps;", f"p.rms_eps = eps; p.quant_out = quant_out; {scale} {groups}")
    )


def private_folder() -> Path:
    """The folder for libraries that are built here and then loaded: this user's alone, or anybody could put code there.

    ``TPFUSE_BENCH_BUILD``, else ``tpfuse/build`` in the user's cache folder. Raises :class:`Unavailable` naming what is wrong.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = settings.BENCH_BUILD.value() or cache / "tpfuse" / "build"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows this user's home
        raise Unavailable(f"no folder to build in: {error}; name another with TPFUSE_BENCH_BUILD") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise Unavailable(
            f"{folder} is not a folder of this user alone (owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}); "
            "chmod 700 it, or name another with TPFUSE_BENCH_BUILD"
        )
    return folder


def library_name(source: str, version: str, arch: str) -> str:
    """Another name for another source, version of FlashInfer or architecture, so that none is loaded in place of another."""
    digest = hashlib.sha256("\0".join((source, version, arch)).encode()).hexdigest()[:16]
    return f"flashinfer-{version}-sm_{arch}-{digest}.so"


@lru_cache(maxsize=4)
def flashinfer_library(shim: str = _SHIM) -> Path:
    """Build FlashInfer's all-reduce fusion kernel from its installed package with nvcc; the path of the library.

    Only the package's headers are used, so none of its own requirements need to be there.
    """
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None:
        raise Unavailable("the package flashinfer-python is not installed")
    data = Path(spec.origin).parent / "data"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        raise Unavailable("no nvcc to build FlashInfer's kernel with")
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    folder = private_folder()
    try:
        version = metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError as error:  # a copy on the path that no installer knows
        raise Unavailable(f"the version of FlashInfer in {data.parent} is not known: {error}") from error
    target = folder / library_name(shim, version, arch)
    if not target.exists():
        source = folder / f"flashinfer_shim_{os.getpid()}.cu"
        source.write_text(shim)
        built = folder / f"shim_{os.getpid()}.so"
        command = [
            nvcc,
            "-O3",
            "-std=c++17",
            "--expt-relaxed-constexpr",
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            "-shared",
            "-Xcompiler",
            "-fPIC",
            "-DNDEBUG",
            f"-I{data / 'include'}",
            f"-I{data / 'spdlog' / 'include'}",
            str(source),
            "-o",
            str(built),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        if done.returncode:
            raise Unavailable(f"nvcc could not build FlashInfer's kernel: {done.stderr[-1500:]}")
        built.replace(target)
    return target


def _built_once(p: Problem, shim: str = _SHIM) -> Path:
    """Rank 0 builds, the others wait; all learn of a failure."""
    key = (p.group_name, shim)
    if key not in _built:
        said: list[str | None] = [None]
        if p.rank == 0:
            try:
                flashinfer_library(shim)
            except Unavailable as reason:
                said[0] = str(reason)
        dist.broadcast_object_list(said, src=0)
        _built[key] = said[0]
    if _built[key] is not None:
        raise Unavailable(str(_built[key]))
    return flashinfer_library(shim)


_built: dict[tuple[str, str], str | None] = {}


@dataclass(frozen=True)
class _Workspace:
    pointers: Tensor  # what the kernel reads: 3 W addresses and the address of its flags
    keep: tuple[object, ...]


_workspaces: dict[tuple[str, int], _Workspace] = {}


def _flashinfer_workspace(p: Problem, most_bytes: int) -> _Workspace:
    symm_mem = compat.symmetric_memory()

    key = (p.group_name, most_bytes)
    if key not in _workspaces:
        device = p.x.device
        keep: list[object] = []
        pointers: list[int] = []
        for size in (1 << 21, 1 << 21, 3 * p.world * most_bytes):
            buffer = symm_mem.empty(-(-size // (1 << 21)) * (1 << 21) // 4, dtype=torch.int32, device=device)
            handle = symm_mem.rendezvous(buffer, p.group_name)  # type: ignore[arg-type]
            buffer.fill_(-0x7FFF8000 if size > (1 << 21) else 0)  # -0.0 in both halves marks an empty Lamport word
            pointers += [handle.get_buffer(r, (1,), torch.int32).data_ptr() for r in range(p.world)]
            keep += [buffer, handle]
        flags = torch.tensor([0, 0, 0, p.world * most_bytes, 0], dtype=torch.int32, device=device)
        table = torch.tensor([*pointers, flags.data_ptr()], dtype=torch.int64, device=device)
        torch.cuda.synchronize()
        dist.barrier()
        _workspaces[key] = _Workspace(table, (*keep, flags))
    return _workspaces[key]


FLASHINFER_VALUES = 128 * 8192


def flashinfer(pdl: bool, fp8: str | None = None, scales: Tensor | None = None) -> Callable[[Problem], Call]:
    """FlashInfer's one-shot ``trtllm_allreduce_fusion`` (fp32 accumulation), with or without PDL.

    Args:
        fp8: ``"tensor"``, ``"token"`` or ``"group128"``: what a scale of the quantized rows is for. A call then returns
            (fp8, residual).
        scales: on the device, with ``fp8``: the static scale, or where a call writes scales: ``(rows, 1)`` fp32, or
            ``(rows, ceil(H / 512))`` int32, column-major, a column every ``ceil(rows / 4) * 4`` values.
    """

    def make(p: Problem) -> Call:
        if p.world not in (2, 4, 8):
            raise Unavailable("FlashInfer takes world sizes 2, 4, 8, 16")
        if p.rows * p.hidden > FLASHINFER_VALUES:
            raise Unavailable(f"its one-shot is measured up to {FLASHINFER_VALUES * 2 >> 10} KiB")
        if p.shared and not _fits(p):
            raise Unavailable("its grid of all ranks together would not fit on one GPU, and it has no watchdog")
        library = ctypes.CDLL(str(_built_once(p, _shim_of(fp8))))
        workspace = _flashinfer_workspace(p, 2 * FLASHINFER_VALUES)
        normed, h = torch.empty_like(p.x), torch.empty_like(p.x)
        quantized = [] if scales is None else [torch.empty_like(p.x, dtype=torch.float8_e4m3fn), scales]
        tensors = (workspace.pointers, p.x, p.residual, h, normed, p.weight, *quantized)

        def call() -> tuple[Tensor, Tensor]:
            pointers = [t.data_ptr() for t in tensors]
            error = library.call(
                p.world,
                p.rank,
                p.rows,
                p.hidden,
                *(ctypes.c_void_p(a) for a in pointers),
                ctypes.c_float(p.eps),
                int(pdl),
                ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            )
            if error:
                raise RuntimeError(f"FlashInfer's launch failed with CUDA error {error}")
            return quantized[0] if quantized else normed, h

        return call

    return make


def _fits(p: Problem) -> bool:
    """Whether the blocks of all ranks are resident together, by FlashInfer's own choice of grid and about 1024 threads an SM."""
    threads = p.hidden // 8
    cluster = 8
    while threads % cluster and cluster > 1:
        cluster //= 2
    block = threads // cluster
    while block < 128 and cluster >= 2:
        block, cluster = block * 2, cluster // 2
    processors = torch.cuda.get_device_properties(p.x.device).multi_processor_count
    while p.rows * cluster > processors and cluster > 1 and block <= 512:
        block, cluster = block * 2, cluster // 2
    blocks = min(processors, p.rows * cluster)
    return p.world * blocks * block <= processors * 896
