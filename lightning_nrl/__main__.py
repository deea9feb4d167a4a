"""Entry point of the script `lightning-nrl` and of `python -m lightning_nrl`."""

import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from platform import python_version


def main() -> int:
    """Runs the command line. The option `--version` does not import torch, which would take
    seconds.
    """
    if sys.argv[1:] == ["--version"]:
        with suppress(PackageNotFoundError):
            found = [
                f"{name} {version(name)}"
                for name in ("lightning_nrl", "torch", "pytorch-lightning")
            ]
            print(", ".join([f"python {python_version()}", *found]))
            return 0
    from lightning_nrl.entrypoints.command_line import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
