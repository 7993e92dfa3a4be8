"""``python -m tpfuse``: the command line, also where torchrun starts one on each rank."""

from tpfuse.cli import main

if __name__ == "__main__":
    main()
