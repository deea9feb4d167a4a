"""The script `lightning-nrl`: repairs, diagnoses and compares a project, decides on a release, applies patches.

In: arguments, YAML as LightningCLI writes it, files. Out: what is printed and written, and an exit status: 0 fine, 1
not accepted, 2 an error.
"""

from lightning_nrl.command_line.main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
