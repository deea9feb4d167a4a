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

from lightning_nrl._utils.sharded import placed_like
from lightning_nrl._utils.state import State, live_tensors, saved_names
from lightning_nrl.errors import ConfigurationError, DataWarning, first_line

REFUSED_OBJECT = re.compile(r"Unsupported global: GLOBAL (\S+)")


def read_state(argument: str, weights: nn.Module | State | str | Path) -> Mapping[str, object]:
    """Returns the state dict of a module, a loaded checkpoint, or a file.

    A file is read with `weights_only=True`.
    """
    if isinstance(weights, nn.Module):
        return weights.state_dict()
    if not isinstance(weights, Mapping):
        weights = load_mapping(
            argument,
            weights,
            "give the path of a checkpoint that loads with `weights_only=True`, or the model "
            "itself.",
        )
    state = weights.get("state_dict")
    if isinstance(state, Mapping):
        return state
    return weights


def load_mapping(
    argument: str, path: str | Path, hint: str, *, weights_only: bool = True
) -> Mapping[str, Any]:
    """Loads a checkpoint or state dict from a file, onto the CPU.

    If the file is unreadable, the error shows `hint`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:
        raise ConfigurationError(
            f"`{argument}`: {str(path)!r} cannot be read ({reason(error)}).", hint
        ) from error
    if part := damaged_part(path):
        warnings.warn(
            DataWarning(
                f"`{argument}`: {str(path)!r} is damaged: the checksum of {part!r} is wrong.",
                "take another copy of the file.",
            ),
            stacklevel=2,
        )
    if not isinstance(content, Mapping):
        raise ConfigurationError(
            f"`{argument}`: {str(path)!r} holds a {type(content).__name__}.",
            "give a Lightning checkpoint or a file with a state dict.",
        )
    return content


def damaged_part(path: str | Path) -> str:
    """Returns a part of a zip file with a wrong checksum, which `torch.load` ignores, if any."""
    try:
        file = zipfile.ZipFile(path)
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, EOFError):
        return ""  # the file has another format
    with file:
        try:
            return file.testzip() or ""
        except Exception as error:  # the bytes are damaged
            return type(error).__name__


def reason(error: Exception) -> str:
    """Returns the class and first line of the error of reading a file, without torch's advice."""
    text = first_line(error).partition(". In PyTorch")[0]
    if refused := REFUSED_OBJECT.search(str(error)):
        text = f"it holds objects, such as a `{refused[1]}`"
    return f"{type(error).__name__}: {text}"


def read_fitting(
    argument: str, weights: nn.Module | State | str | Path, model: nn.Module
) -> dict[str, Tensor]:
    """Reads weights by `read_state` and matches them to a model by `fitting`."""
    return fitting(argument, read_state(argument, weights), model)


def fitting(argument: str, new: Mapping[str, object], model: nn.Module) -> dict[str, Tensor]:
    """Returns a state dict with the names, dtypes and devices of the model's `live_tensors`.

    Refuses a state dict in which a tensor is missing, is not in the model, or has another shape
    than in the model.
    """
    live = live_tensors(model)
    names = saved_names(model)
    unknown = {key: value for key, value in new.items() if isinstance(value, Tensor)}
    fitted = {}
    faults = []
    for key in model.state_dict():
        name = names.get(key, key)
        if name not in live:
            continue
        tensor = unknown.pop(key, None)
        old = live[name]
        if tensor is None:
            faults.append(f"lacks {key!r}")
        elif tensor.shape != old.shape:
            shapes = f"{list(tensor.shape)}, not {list(old.shape)}"
            faults.append(f"has {key!r} in the shape {shapes}")
        else:
            fitted[name] = placed_like(old, tensor.detach())
    faults += [f"has {key!r}, which is not in the model" for key in unknown]
    if not faults:
        return fitted
    message = f"`{argument}` {faults[0]}"
    if faults[1:]:
        message += f"; {len(faults) - 1} more tensors do not fit"
    raise ConfigurationError(
        f"{message}.",
        "give weights of the same architecture, or the module itself if the architecture may "
        "differ.",
    )
