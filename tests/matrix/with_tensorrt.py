"""Fetch the torch-tensorrt that fits the installed torch, without TensorRT, and run the TensorRT tests with a stand-in.

    python tests/matrix/with_tensorrt.py [--folder FOLDER]

Its compiled libraries need TensorRT's, so they are removed; what is left is its Python: lowering, partitioner, dry run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def fetch(folder: Path) -> None:
    """Install the package of the same minor version into ``folder`` and take its libraries out."""
    import torch

    version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    wanted = ["--no-deps", "--quiet", "--target", str(folder), f"torch-tensorrt=={version}.*", "dllist"]
    subprocess.run([sys.executable, "-m", "pip", "install", *wanted], check=True)
    for library in folder.rglob("*.so"):
        library.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the package is or goes; default is a temporary one")
    given = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        folder = given or Path(temporary)
        if not (folder / "torch_tensorrt").is_dir():
            fetch(folder)
        path = os.pathsep.join(p for p in (str(folder), os.environ.get("PYTHONPATH", "")) if p)
        command = [sys.executable, "-m", "pytest", "tests/test_inner_tensorrt.py", "-v"]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main())
