"""Entry point of the script `lightning-nrl` and of `python -m lightning_nrl`."""

import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from platform import python_version


def main() -> int:
    """Runs the command line. `--version` does not import torch, which would take seconds."""
    if sys.argv[1:] == ["--version"]:
        with suppress(PackageNotFoundError):
            packages = ("lightning_nrl", "torch", "pytorch-lightning")
            versions = [f"{name} {version(name)}" for name in packages]
            print(", ".join([f"python {python_version()}", *versions]))
            return 0
    from lightning_nrl.entrypoints.command_line import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
