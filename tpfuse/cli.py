"""Entry point of the console script ``tpfuse``; the commands are in :mod:`tpfuse.inspect.commands`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. Without the extra it ends in one line and exit code 2."""
    try:
        from tpfuse.inspect.commands import app
    except ImportError as error:
        print(f"tpfuse: {error}; the command line needs: pip install 'tpfuse[inspect]'", file=sys.stderr)
        raise SystemExit(2) from None
    app(prog_name="tpfuse")


if __name__ == "__main__":
    main()
