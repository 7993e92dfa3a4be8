"""What every test starts from: no reports of earlier tests, and compile caches that only this run has filled."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

# Before torch reads it, and inherited by ranks and by processes that tests start. On a warm cache of an earlier run the
# pass would not run, and tests of what it does would see nothing.
CACHES = tempfile.mkdtemp(prefix="tpfuse-tests-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = CACHES
# Inductor tries what vectors this CPU has by compiling and loading a program for each, in every process that has a cache of its
# own: several times the work of the kernels themselves. Here kernels have none.
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHES, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_reports_of_other_tests():
    """``tpfuse.fuel`` counts over the reports of the process."""
    import tpfuse

    tpfuse.clear_reports()
    yield
