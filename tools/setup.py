"""Make the virtual environment that ``make demo`` and ``make test`` use. Needs only the Python that runs it.

On a machine with an NVIDIA GPU whose Python has torch, the environment uses that torch. Elsewhere it gets a CPU build of
torch, and never the CUDA packages, which take several gigabytes and cannot run there.

    python tools/setup.py .venv                          the environment
    python tools/setup.py .venv FOLDER REQUIREMENT WHAT  one more package, unpacked into a folder

What pip prints goes to a log inside the environment; when it fails, the end of the log is shown.
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
SHOWN = 15  # lines of the log that a failure prints
GPU_HAS_TORCH = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036  (run by whatever Python the user has)
        print(
            f"setup: this is Python {sys.version.split()[0]}; tpfuse needs 3.10 or newer. Use make PYTHON=...",
            file=sys.stderr,
        )
        return 2
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if sys.argv[2:]:
        fetch(folder, *sys.argv[2:])
    else:
        make(folder, folder / "setup.log")
    return 0


def make(folder: Path, log: Path) -> None:
    """The virtual environment itself."""
    log.write_text("")
    probe = [sys.executable, "-c", GPU_HAS_TORCH]
    use_installed = shutil.which("nvidia-smi") is not None and run(probe, log, check=False) == 0
    kind = "the installed torch" if use_installed else "a CPU build of torch"
    print(f"Setting up {folder} with {kind} (about 2 minutes; log: {log})", flush=True)
    # Links, as `python -m venv` makes them: a second run over the same folder then finds its own links and goes on.
    builder = venv.EnvBuilder(with_pip=True, symlinks=True, system_site_packages=use_installed)
    try:
        builder.create(folder)
    except subprocess.CalledProcessError as error:
        log.write_bytes(error.output or b"")
        raise failed("this Python cannot make a virtual environment with pip (on Debian: python3-venv)", log) from None
    pip = installer(folder)
    if not use_installed:
        torch = CONSTRAINTS.read_text().split()[-1]
        run([*pip, *cpu_source(pip, torch, log), torch], log)
        pip += ["--constraint", str(CONSTRAINTS)]
    run([*pip, "--editable", f"{ROOT}[dev]"], log)


def fetch(folder: Path, target: str, requirement: str, what: str) -> None:
    """Unpack one package, without what it depends on, into a folder that is not on the path of the environment."""
    log = folder / "fetch.log"
    log.write_text("")
    print(f"Fetching {what} (log: {log})", flush=True)
    run([*installer(folder), "--no-deps", "--upgrade", "--target", target, requirement], log)


def installer(folder: Path) -> list[str]:
    return [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def cpu_source(pip: list[str], torch: str, log: Path) -> list[str]:
    """Where pip finds a CPU build: nowhere special when its own indexes have one, else PyTorch's wheel index."""
    with log.open("a") as file:
        found = subprocess.run(
            [*pip, "--dry-run", "--report", "-", torch], stdout=subprocess.PIPE, stderr=file, text=True
        )
    if found.returncode == 0:
        names = [item["metadata"]["name"] for item in json.loads(found.stdout)["install"]]
        if not any(name.startswith(("nvidia", "cuda")) for name in names):
            return []
    return ["--index-url", CPU_WHEELS, "--extra-index-url", "https://pypi.org/simple"]


def run(command: list[str], log: Path, check: bool = True) -> int:
    """Run a command whose output goes to the log; an installation that fails is an error that shows the end of it."""
    with log.open("a") as file:
        print("$", *command, file=file, flush=True)
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if check and code != 0:
        raise failed(f"installing {command[-1]} failed with exit code {code}; the log ends with", log)
    return code


def failed(what: str, log: Path) -> SystemExit:
    """The error that ends the setup: what happened, the end of the log, and where the rest is."""
    lines = log.read_text(errors="replace").splitlines()[-SHOWN:]
    return SystemExit("\n".join([f"setup: {what}", *(f"    {line}" for line in lines), f"The whole log: {log}"]))


if __name__ == "__main__":
    sys.exit(main())
