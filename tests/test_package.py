"""The package: one set of import names from a wheel, an sdist, an editable install and the repository root."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.long  # not on every save

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("tpfuse", "tpfuse.passes", "tpfuse.passes.norms", "tpfuse.ops", "tpfuse.ops.kernels", "tpfuse.parallel")
IMPORT = f"import importlib; print([importlib.import_module(n).__name__ for n in {NAMES}])"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with a wheel and an sdist, built by the build backend itself."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    for what in ("build_wheel", "build_sdist"):  # setuptools keeps state between the two in one process
        code = f"import setuptools.build_meta as b, sys; b.{what}(sys.argv[1])"
        command = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


def run_in(folder: Path, path: str) -> str:
    env = {**os.environ, "PYTHONPATH": path}
    # -S -I would drop the editable install's finder; -P keeps the current folder out instead.
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=folder, capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_wheel_holds_every_package_and_data_file(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path)
    packages = {"tpfuse": "tpfuse", "passes": "tpfuse/passes", "ops": "tpfuse/ops"}
    for root, installed in packages.items():
        for path in (ROOT / root).rglob("*"):
            relative = path.relative_to(ROOT / root)
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                assert f"{installed}/{relative}" in names, f"{path} is not in the wheel"
    (entry_points,) = (n for n in names if n.endswith("entry_points.txt"))
    text = (tmp_path / entry_points).read_text()
    assert "[torch_dynamo_backends]\ntpfuse = tpfuse.backend:tpfuse" in text and "tpfuse = tpfuse.cli:main" in text
    assert "[vllm.general_plugins]\ntpfuse = tpfuse.engines.vllm:register" in text
    assert not any(n.startswith(("passes/", "ops/", "tests/")) for n in names)
    assert str(list(NAMES)) in run_in(tmp_path, str(tmp_path))


def test_sdist_can_build_again(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "tpfuse/backend.py", "passes/fusion.py", "ops/op.py"} <= names
    linked = {"CHANGELOG.md", "docs/op.md", "docs/images/fusion.svg", "examples/demo.py", "Makefile", "tools/setup.py"}
    assert linked | {"tests/ranks.py"} <= names


def test_repository_root_gives_the_same_names():
    assert str(list(NAMES)) in run_in(ROOT, "")


def test_import_is_light():
    """`import tpfuse` must not import what only some users need."""
    heavy = ("transformers", "rich", "typer", "jinja2", "torch_tensorrt", "tensorrt", "matplotlib")
    code = f"import sys, tpfuse; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
