"""Make the virtual environment that ``make demo`` and ``make test`` use. Needs only the Python that runs it.

On a machine with an NVIDIA GPU whose Python has torch, the environment uses that torch. Elsewhere it gets a CPU build of
torch, and never the CUDA packages, which take several gigabytes and cannot run there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints-cpu.txt"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
GPU_HAS_TORCH = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036  (run by whatever Python the user has)
        print(
            f"setup: this is Python {sys.version.split()[0]}; tpfuse needs 3.10 or newer. Use make PYTHON=...",
            file=sys.stderr,
        )
        return 2
    folder = Path(sys.argv[1])
    use_installed = (
        shutil.which("nvidia-smi") is not None and run([sys.executable, "-c", GPU_HAS_TORCH], check=False) == 0
    )
    print(f"setup: {folder} with {'the installed torch' if use_installed else 'a CPU build of torch'}", flush=True)
    # Links, as `python -m venv` makes them: a second run over the same folder then finds its own links and goes on.
    venv.EnvBuilder(with_pip=True, symlinks=True, system_site_packages=use_installed).create(folder)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not use_installed:
        torch = CONSTRAINTS.read_text().split()[-1]
        run([*pip, *cpu_source(pip, torch), torch])
        pip += ["--constraint", str(CONSTRAINTS)]
    run([*pip, "--editable", f"{ROOT}[dev]"])
    return 0


def cpu_source(pip: list[str], torch: str) -> list[str]:
    """Where pip finds a CPU build: nowhere special when its own indexes have one, else PyTorch's wheel index."""
    found = subprocess.run([*pip, "--dry-run", "--report", "-", torch], capture_output=True, text=True)
    if found.returncode == 0:
        names = [item["metadata"]["name"] for item in json.loads(found.stdout)["install"]]
        if not any(name.startswith(("nvidia", "cuda")) for name in names):
            return []
    return ["--index-url", CPU_WHEELS, "--extra-index-url", "https://pypi.org/simple"]


def run(command: list[str], check: bool = True) -> int:
    code = subprocess.run(command).returncode
    if check and code != 0:
        raise SystemExit(f"setup: {' '.join(command)} failed with exit code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
