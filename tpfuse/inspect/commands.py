"""The commands ``tpfuse view | explain | doctor | bisect | bench``.

Each is a thin shell over one module. What a user can get wrong ends in one line on stderr and exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from . import bisect as bisecting
from . import doctor as doctoring
from . import load, progress
from .fake import WorldError

USAGE = 2
# The extra that brings a module which one command alone needs; all others are in ``inspect``.
EXTRAS = {"transformers": "hf", "accelerate": "hf", "safetensors": "hf", "matplotlib": "bench"}
_Command = TypeVar("_Command", bound=Callable[..., Any])

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="See what tpfuse fused, what it kept and why.",
)


def fail(command: str, message: object) -> NoReturn:
    """End with one line on stderr and exit code 2."""
    print(f"tpfuse {command}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(USAGE)


def one_line(*errors: type[Exception]) -> Callable[[_Command], _Command]:
    """Turn these errors, and a missing extra, into one line and exit code 2."""

    def decorate(command: _Command) -> _Command:
        @wraps(command)
        def run(*arguments: Any, **named: Any) -> Any:
            try:
                return command(*arguments, **named)
            except errors as error:
                fail(command.__name__, error)
            except ImportError as error:
                extra = EXTRAS.get(str(error.name).partition(".")[0], "inspect")
                fail(command.__name__, f"{error}; pip install 'tpfuse[{extra}]' has what this command needs")

        return run  # type: ignore[return-value]

    return decorate


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import tpfuse

        typer.echo(f"tpfuse {tpfuse.__version__}")
        raise typer.Exit


@app.command()
@one_line(load.DumpError)
def view(
    folder: Annotated[Path, typer.Argument(help="The folder that TPFUSE_DUMP or tpfuse.dump named.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: index.html in the folder.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Print tables instead of writing a page.")] = False,
    each: Annotated[bool, typer.Option("--each", help="With --table: one row per all-reduce.")] = False,
) -> None:
    """Write one self-contained HTML page for a dump."""
    dump = load.read(folder)
    if table:
        from . import table as tables

        for graph in dump.graphs:
            typer.echo(tables.text(graph.report, each) + "\n")
        return
    from . import page

    target = output or folder / "index.html"
    text = page.page(dump)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        fail("view", f"{target} cannot be written: {error.strerror}")
    typer.echo(str(target))


@app.command()
@one_line(ValueError, OSError, WorldError)
def explain(
    model: Annotated[str, typer.Argument(help="A folder with a config.json, or a model type of transformers.")],
    tp_size: Annotated[int, typer.Option(help="Ranks of one stage.")],
    attn_dp_size: Annotated[int, typer.Option(help="Replicas of attention.")] = 1,
    moe_dense_tp_size: Annotated[int | None, typer.Option(help="Ranks of one dense MLP; default is --tp-size.")] = None,
    ep_size: Annotated[int, typer.Option(help="Ranks with different experts.")] = 1,
    attn_cp_size: Annotated[int, typer.Option(help="Context-parallel ranks of one replica.")] = 1,
    moe_dp_size: Annotated[int, typer.Option(help="Replicas of the experts.")] = 1,
    pp_size: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    rank: Annotated[int, typer.Option(help="The rank to play.")] = 0,
    rows: Annotated[str, typer.Option(help="Row counts of a step, per replica.")] = "1,32,2048",
    arch: Annotated[
        str,
        typer.Option(help="Compute capability, and links other than NVLink: sm_90-pcie."),
    ] = "sm_90",
    policy: Annotated[str, typer.Option(help="shared, strict, all or off.")] = "shared",
    numerics: Annotated[str, typer.Option(help="exact or relaxed.")] = "exact",
    json: Annotated[Path | None, typer.Option("--json", help="Write JSON to this file; - is stdout.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the page to this file.")] = None,
) -> None:
    """Say what would fuse under a parallel config, before any GPU or weights exist."""
    from tpfuse.parallel import ParallelConfig

    from . import explain as explaining

    config = ParallelConfig(
        tp_size,
        attn_dp_size,
        attn_cp_size,
        moe_dense_tp_size,
        ep_size=ep_size,
        moe_dp_size=moe_dp_size,
        pp_size=pp_size,
    )
    request = explaining.Request(model, config, rank, _counts("--rows", rows), arch, policy, numerics)
    _check_folders(("--json", json), ("--html", html))
    with progress.bar() as tick:
        found = explaining.explain(request, tick, html=html is not None)
    if html is not None:
        html.write_text(found.html, encoding="utf-8")
    if json is not None and str(json) != "-":
        json.write_text(found.to_json() + "\n", encoding="utf-8")
    typer.echo(found.to_json() if str(json) == "-" else explaining.text(found))


def _check_folders(*targets: tuple[str, Path | None]) -> None:
    """Before the work, which may take minutes: the folders of these (option, file) must exist."""
    for option, file in targets:
        if file is not None and str(file) != "-" and not file.parent.is_dir():
            raise ValueError(
                f"{option} is {file}, but there is no folder {file.parent}; make it first, or name another file"
            )


def _counts(option: str, text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise ValueError(f"{option} is {text!r}; give whole numbers of at least 1, separated by commas, e.g. 1,32,2048")
    return counts


@app.command()
@one_line(ValueError, OSError, RuntimeError)
def bench(
    worlds: Annotated[str, typer.Option(help="World sizes.")] = "2,4,8",
    hidden: Annotated[str, typer.Option(help="Hidden sizes.")] = "4096,8192",
    rows: Annotated[str, typer.Option(help="Row counts.")] = "1,8,64",
    json: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Derive a selection table for this machine instead; --rows is not used.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="With --tune: write the table to this file, for TPFUSE_TABLE.")
    ] = None,
) -> None:
    """Measure the fused op against other ways of doing the same, on the GPUs of this machine."""
    import torch

    from tpfuse.measure import bench as benching
    from tpfuse.measure import tables

    if out is not None and not tune:
        fail("bench", "--out names the table that --tune derives; give --tune too, or --json for the results")
    sizes = _counts("--worlds", worlds), _counts("--hidden", hidden)
    counts = _counts("--rows", rows)
    _check_folders(("--json", json), ("--out", out))
    if not torch.cuda.is_available():
        fail("bench", "no GPU is visible; the figures of a CPU say nothing about the kernels")
    if tune:
        from tpfuse.measure import tune as tuning

        typer.echo(tuning.to_files(tuning.Sweep(worlds=sizes[0], hiddens=sizes[1]), out, json))
        return
    plan = benching.Survey(worlds=sizes[0], hiddens=sizes[1], rows=counts)
    results = benching.run(plan)
    if json is not None:
        tables.save(results, json, **tables.facts())
    typer.echo(tables.table(results))


@app.command()
@one_line(doctoring.DoctorError)
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the other ranks under torchrun.")] = 60.0,
) -> None:
    """Check this machine and say which path the fused op would take. Exit code 1 when something must be fixed."""
    raise typer.Exit(doctoring.run(as_json=as_json, timeout=timeout))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@one_line(bisecting.BisectError)
def bisect(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Hide the output of the command.")] = False,
) -> None:
    """Find the first rewrite that breaks a check: tpfuse bisect -- python check.py

    The command succeeds (exit code 0) when its result is right. It runs with TPFUSE_FUEL set, a few times more than
    the logarithm of the number of rewrites, with compile caches off. Exit code 0 when a rewrite was found, 1 when
    none is to blame.
    """
    raise typer.Exit(bisecting.run(context.args, quiet=quiet))
