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
from . import load

USAGE = 2
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
                fail(command.__name__, f"{error}; pip install 'tpfuse[inspect]' has what the command line needs")

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
@one_line(doctoring.DoctorError)
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the other ranks under torchrun.")] = 60.0,
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
