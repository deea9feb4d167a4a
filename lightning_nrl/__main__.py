"""The script `lightning-nrl`, and `python -m lightning_nrl`."""

import sys


def main() -> int:
    """Runs the command that the shell gave; torch and Lightning are not imported to print versions."""
    if sys.argv[1:] == ["--version"]:
        from lightning_nrl.report import installed_versions

        print(", ".join(f"{name} {version}" for name, version in installed_versions().items()))
        return 0
    from lightning_nrl.entrypoints.command_line import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
