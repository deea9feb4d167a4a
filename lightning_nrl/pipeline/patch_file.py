"""A patch as a safetensors file: values as tensors, all else as JSON in the metadata, and a hash to find damage by.

For a tensor `w` there are `old/w` and `new/w`, and `index/w` where only some of its values are kept. Complex numbers
are pairs. Metadata: `format`, `patch` (a `PatchHeader`), `report`, and `sha256` of all of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.atomic_files import replacing
from lightning_nrl._utils.json_records import Record, parse_json
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.errors import ConfigurationError, RepairError
from lightning_nrl.pipeline.tensor_change import TensorChange

PATCH_FORMAT = "lightning_nrl.patch.1"
PATCH_FILE_HINT = "give a file that `Patch.save` or a repair has written, or write it anew."


def safetensors_installed() -> bool:
    """Whether patches can be written and read."""
    return find_spec("safetensors") is not None


def _check_installed() -> None:
    if not safetensors_installed():
        problem = "patches are safetensors files, and `safetensors` is not installed."
        raise RepairError(problem, "python -m pip install safetensors")


@dataclass(frozen=True)
class ChangeRecord:
    """What a file says of one tensor: see `TensorChange`. One that is tied to another has the values of that one."""

    shape: tuple[int, ...]
    dtype: str
    sparse: bool
    sha256_old: str
    sha256_new: str
    values_of: str


@dataclass(frozen=True)
class PatchHeader(Record):
    """What a file says of a patch, beside the values."""

    base: str
    result: str
    versions: Mapping[str, str]
    tensors: Mapping[str, ChangeRecord]


def write_patch(
    path: str | Path,
    changes: Mapping[str, TensorChange],
    base: str,
    result: str,
    versions: Mapping[str, str],
    report_json: str,
) -> None:
    """Writes a patch, whole or not at all; arguments as of `Patch`."""
    _check_installed()
    from safetensors.torch import save_file

    records: dict[str, ChangeRecord] = {}
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name, change in changes.items():
        own = first.setdefault(id(change), name)
        dtype = str(change.old.dtype).removeprefix("torch.")
        sparse = change.index is not None
        records[name] = ChangeRecord(change.shape, dtype, sparse, change.sha256_old, change.sha256_new, own)
        tensors |= {f"old/{own}": _stored(change.old), f"new/{own}": _stored(change.new)}
        if change.index is not None:
            tensors[f"index/{own}"] = change.index
    header = PatchHeader(base, result, versions, records).to_json()
    texts = {"format": PATCH_FORMAT, "patch": header, "report": report_json}
    texts["sha256"] = _digest(header, report_json, tensors)
    replacing(path, lambda part: save_file(tensors, part, texts))


def read_patch(path: str | Path) -> dict[str, Any]:
    """Reads the arguments of a `Patch` that `write_patch` has written."""
    tensors, texts = _read_tensors(path)
    if texts.get("format") != PATCH_FORMAT:
        problem = f"`patch={str(path)!r}` has the format {texts.get('format', 'none')!r}, not {PATCH_FORMAT!r}."
        raise ConfigurationError(problem, "give a patch, and read it with the version of the package that wrote it.")
    try:
        return _parse(tensors, texts)
    except (ConfigurationError, KeyError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigurationError(f"`patch={str(path)!r}` is damaged: {reason}", PATCH_FILE_HINT) from error


def _read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _check_installed()
    from safetensors import safe_open

    try:
        with safe_open(str(path), "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name).clone() for name in names}, dict(file.metadata() or {})
    except Exception as error:  # whatever comes of reading bytes that are no such file
        raise ConfigurationError(
            f"`patch={str(path)!r}` cannot be read ({type(error).__name__}: {error}).",
            "give a safetensors file that `Patch.save` has written.",
        ) from error


def _parse(tensors: dict[str, Tensor], texts: dict[str, str]) -> dict[str, Any]:
    header, report = texts["patch"], texts["report"]
    if texts["sha256"] != _digest(header, report, tensors):
        raise ValueError("its content does not have the hash that it names.")
    read = PatchHeader.from_json(header)
    if report:
        parse_json(report)
    own = {name: _change(name, record, tensors) for name, record in read.tensors.items() if record.values_of == name}
    changes = {name: own[record.values_of] for name, record in read.tensors.items()}
    said = {"base": read.base, "result": read.result, "versions": read.versions, "report_json": report}
    return {"changes": changes, **said}


def _change(name: str, record: ChangeRecord, tensors: Mapping[str, Tensor]) -> TensorChange:
    index = tensors[f"index/{name}"] if record.sparse else None
    old, new = (_restored(tensors[f"{part}/{name}"], record.dtype) for part in ("old", "new"))
    shape = record.shape if index is None else (len(index),)
    if not tuple(old.shape) == tuple(new.shape) == tuple(shape) or old.dtype != new.dtype:
        raise ValueError(f"the values of `{name}` do not have its shape.")
    if index is not None and not 0 <= int(index.min()) <= int(index.max()) < math.prod(record.shape):
        raise ValueError(f"the positions in `{name}` are not ones of its values.")
    return TensorChange(record.shape, index, old, new, record.sha256_old, record.sha256_new)


def _stored(values: Tensor) -> Tensor:
    return torch.view_as_real(values).contiguous() if values.is_complex() else values


def _restored(values: Tensor, dtype: str) -> Tensor:
    return torch.view_as_complex(values) if dtype.startswith("complex") else values


def _digest(header: str, report: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256("\0".join((header, report, hash_tensors(tensors))).encode()).hexdigest()
