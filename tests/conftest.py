"""What every test starts from: no reports of earlier tests, and compile caches that only this run has filled."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shutil
import tempfile

import pytest
import scratch
import warm

warm.collect_rarely()

# Before torch reads it, and inherited by ranks and by processes that tests start. On a warm cache of an earlier run the
# pass would not run, and tests of what it does would see nothing.
CACHES = scratch.claim()
os.environ["TORCHINDUCTOR_CACHE_DIR"] = CACHES
# Inductor tries what vectors this CPU has by compiling and loading a program for each, in every process that has a cache of its
# own: several times the work of the kernels themselves. Here kernels have none.
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"
# Multiprocessing puts the sockets of its servers there, and the path of a socket has 107 characters at most.
if len(tempfile.gettempdir()) > 60:
    tempfile.tempdir = os.environ["TMPDIR"] = "/tmp"


# Before torch starts its threads. Tests are as many processes as there are cores, and models of tests are tiny: threads of one
# operation would spin for each other ten times as long as they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# What takes longest comes first, so that no process of pytest-xdist is left with it when the others have nothing to do.
LONG = (
    *("test_kernel_protocol", "test_programs", "test_models", "test_caches", "test_inner", "test_exact", "test_vllm"),
    *("test_export", "test_agreement_of_ranks", "test_e2e_benchmark", "test_kernel_aot", "test_parallel_models"),
    *("test_spellings_transformers", "test_examples", "test_cli", "test_snippets", "test_hf", "test_cli_explain"),
    *("test_hf_generate_ranks", "test_hf_generate"),
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    scratch.remove_stale()
    if config.getoption("numprocesses", None):
        warm.share()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # By now torch is imported. pytest listens to every logger that does not propagate, and where somebody listens to this one,
    # torch writes down each graph of a compile, as often as it changes.
    logging.getLogger("torch.__trace").propagate = True
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def pytest_unconfigure() -> None:
    # pytest goes on to look for lost exceptions in five collections of all that torch has made, which takes seconds.
    gc.freeze()
    atexit.register(gc.unfreeze)
    shutil.rmtree(CACHES, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_reports_of_other_tests():
    """``tpfuse.fuel`` counts over the reports of the process."""
    import tpfuse

    tpfuse.clear_reports()
    yield


@pytest.fixture
def as_rank():
    """Be one rank of a group without peers."""
    import torch.distributed as dist

    from tpfuse import compat

    def start(rank, world_size):
        if dist.is_initialized():
            dist.destroy_process_group()
        compat.start_fake_group(world_size, rank)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()
