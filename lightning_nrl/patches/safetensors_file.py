"""Tensors and text in one safetensors file. Nothing in such a file can run code."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from lightning_nrl._utils.whole_files import replacing
from lightning_nrl.errors import ConfigurationError, RepairError

__all__ = ["read_tensors", "safetensors_installed", "write_tensors"]


def safetensors_installed() -> bool:
    """Whether patches can be written and read."""
    return find_spec("safetensors") is not None


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file whole or not at all."""
    _check_installed()
    from safetensors.torch import save_file

    replacing(path, lambda part: save_file(dict(tensors), part, dict(metadata)))


def read_tensors(argument: str, path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the text by name.

    Raises:
        ConfigurationError: there is no such file, or it cannot be read.
    """
    _check_installed()
    from safetensors import safe_open

    try:
        with safe_open(str(path), "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name).clone() for name in names}, dict(file.metadata() or {})
    except Exception as error:  # whatever comes of reading bytes that are no such file
        raise ConfigurationError(
            f"`{argument}={str(path)!r}` cannot be read ({type(error).__name__}: {error}).",
            "give a safetensors file that `Patch.save` has written.",
        ) from error


def _check_installed() -> None:
    if not safetensors_installed():
        raise RepairError(
            "patches are safetensors files, and `safetensors` is not installed.",
            "python -m pip install safetensors",
        )
