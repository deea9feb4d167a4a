"""Reads weights from a file or a module, and matches them to a model of the same architecture."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrl._utils.state import State, live_tensors, saved_names
from lightning_nrl.errors import ConfigurationError, DataWarning, first_line

REFUSED_OBJECT = re.compile(r"Unsupported global: GLOBAL (\S+)")


def read_state(argument: str, given: nn.Module | State | str | Path) -> Mapping[str, Any]:
    """Returns the state dict of a module, a loaded checkpoint, or a file (read with
    `weights_only=True`).
    """
    if isinstance(given, nn.Module):
        return given.state_dict()
    if isinstance(given, Mapping):
        return _state_in(given)
    hint = "give the path of a checkpoint that loads with `weights_only=True`, or the model itself."
    return _state_in(load_mapping(argument, given, hint))


def load_mapping(
    argument: str, path: str | Path, hint: str, *, weights_only: bool = True
) -> Mapping[str, Any]:
    """Loads a checkpoint or state dict from a file, onto the CPU. If the file is unreadable, the
    error shows `hint`.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:
        raise ConfigurationError(
            f"`{argument}`: {str(path)!r} cannot be read ({reason(error)}).", hint
        ) from error
    _check_sums(argument, path)
    if not isinstance(found, Mapping):
        hint = "give a Lightning checkpoint or a file with a state dict."
        raise ConfigurationError(
            f"`{argument}`: {str(path)!r} holds a {type(found).__name__}.", hint
        )
    return found


def _check_sums(argument: str, path: str | Path) -> None:
    # `torch.load` does not check the checksums of a zip file.
    try:
        file = zipfile.ZipFile(path)
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, EOFError):
        return  # the file has another format
    with file:
        try:
            damaged = file.testzip()
        except Exception as error:  # the bytes are damaged
            damaged = type(error).__name__
    if damaged is not None:
        problem = f"`{argument}`: {str(path)!r} is damaged: the checksum of {damaged!r} is wrong."
        warnings.warn(DataWarning(problem, "take another copy of the file."), stacklevel=3)


def reason(error: Exception) -> str:
    """Returns why a checkpoint cannot be read: class and first line of the error, without torch's
    advice.
    """
    text = first_line(error).partition(". In PyTorch")[0]
    if refused := REFUSED_OBJECT.search(str(error)):
        text = f"it holds objects, such as a `{refused[1]}`"
    return f"{type(error).__name__}: {text}"


def fitting(argument: str, new: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Returns a state dict with the names in `live_tensors`, and with the dtypes and devices of the
    model's tensors.

    Refuses a state dict in which a tensor is missing, is not in the model, or has another shape
    than in the model.
    """
    live, names = live_tensors(model), saved_names(model)
    own = {
        key: live[names.get(key, key)] for key in model.state_dict() if names.get(key, key) in live
    }
    given = {name: value for name, value in new.items() if isinstance(value, Tensor)}
    wrong = [name for name in own if name not in given or given[name].shape != own[name].shape]
    more = [name for name in given if name not in own]
    if wrong or more:
        name = (wrong or more)[0]
        if name in given and name in own:
            found = f"`{argument}` has {name!r} in the shape {list(given[name].shape)}, not {list(own[name].shape)}"
        else:
            found = (
                f"`{argument}` lacks {name!r}"
                if wrong
                else f"`{argument}` has {name!r}, which is not in the model"
            )
        others = len(wrong) + len(more) - 1
        hint = "give weights of the same architecture, or the module itself if the architecture may differ."
        raise ConfigurationError(
            f"{found}; {others} more tensors do not fit." if others else f"{found}.", hint
        )
    return {
        names.get(key, key): given[key].detach().to(x.device, x.dtype) for key, x in own.items()
    }


def _state_in(found: Mapping[str, Any]) -> Mapping[str, Any]:
    inside = found.get("state_dict")
    return inside if isinstance(inside, Mapping) else found
