"""Changes of tensors, bit for bit, and the file format of patches.

A patch is a safetensors file. For a changed tensor `w` it holds `old/w` and `new/w`, and `index/w`
if only some values of `w` are stored. A complex number is stored as two numbers. The metadata are
`format`, `patch` (a `PatchHeader`), `report` and `sha256`, which is a hash of the header, the
report and the tensors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_nrl._utils.atomic_files import replacing
from lightning_nrl._utils.json_records import Record, parse_json
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.errors import ConfigurationError

WHOLE_TENSOR_SHARE = 1 / 3  # if a larger share of a tensor changed, all its values are stored
# Integer dtypes by size in bytes. Values are compared and copied as integers, so that NaN and -0.0
# are preserved.
WORD_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PATCH_FORMAT = "lightning_nrl.patch.1"
PATCH_FILE_HINT = "give a file that `Patch.save` or a repair wrote, or write it again."


@dataclass(frozen=True, eq=False)
class TensorChange:
    """The change of one tensor of the given `shape`. All attributes that are tensors are on the
    CPU.

    If `index` is None, `old` and `new` are the whole tensor before and after the change. Otherwise
    they are vectors of the values at the flat positions `index`, which ascend and are int32, or
    int64 for large tensors. The two hashes (`hash_tensor`) are of the whole tensor before and after
    the change.
    """

    shape: tuple[int, ...]
    index: Tensor | None
    old: Tensor
    new: Tensor
    sha256_old: str
    sha256_new: str

    @classmethod
    def between(cls, name: str, old: Tensor, new: Tensor) -> TensorChange | None:
        """Compares two tensors and returns the change from `old` to `new`, or None if they are
        bitwise
        equal.

        Raises a `ConfigurationError` if the tensors differ in shape or dtype, or are not plain
        dense tensors.
        """
        if old is new:
            return None
        for value in (old, new):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                found = f"{value.layout}, {value.dtype} on {value.device.type}"
                raise ConfigurationError(
                    f"`{name}` is no plain tensor ({found}).", "give dense tensors with values."
                )
        if old.shape != new.shape or old.dtype != new.dtype:
            pair = " and ".join(f"{value.dtype} {list(value.shape)}" for value in (old, new))
            raise ConfigurationError(f"`{name}` is {pair}.", "give two states of the same model.")
        old, new = (value.detach().resolve_conj().cpu().contiguous() for value in (old, new))
        differs = _words(old) != _words(new)
        at = (differs.any(1) if old.is_complex() else differs).nonzero().flatten()
        if not len(at):
            return None
        hashes = hash_tensor(old), hash_tensor(new)
        if len(at) > WHOLE_TENSOR_SHARE * old.numel():
            return cls(tuple(old.shape), None, old.clone(), new.clone(), *hashes)
        index = at.int() if old.numel() < 2**31 else at
        return cls(tuple(old.shape), index, _values(old, at), _values(new, at), *hashes)

    @property
    def n_changed(self) -> int:
        """Number of stored values: all values if more than a third of them changed, otherwise the
        changed values.
        """
        return self.old.numel()

    def applied(self, tensor: Tensor, undo: bool) -> Tensor:
        """Returns a copy of the tensor on its device, with the new values or, if `undo` is True,
        the old values.
        """
        values = self.old if undo else self.new
        if self.index is None:
            return values.clone().to(tensor.device)
        found = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        _words(found)[self.index.long()] = _words(values)
        return found.to(tensor.device)


def hash_tensor(tensor: Tensor) -> str:
    """Returns the SHA-256 of the dtype, shape and bytes of one tensor."""
    return hash_tensors({"": tensor})


def _values(tensor: Tensor, index: Tensor) -> Tensor:
    """Returns the values at flat positions of a contiguous tensor. Indexes bytes, since torch may
    not index float8.
    """
    return (
        tensor.reshape(-1)
        .view(torch.uint8)
        .view(-1, tensor.element_size())[index]
        .view(tensor.dtype)
        .flatten()
    )


def _words(tensor: Tensor) -> Tensor:
    """Returns a flat view of a contiguous tensor's bits as integers: one per real number, two per
    complex number.
    """
    flat = tensor.reshape(-1)
    flat = torch.view_as_real(flat) if flat.is_complex() else flat
    return flat.view(WORD_DTYPES[flat.element_size()])


@dataclass(frozen=True)
class ChangeRecord:
    """Metadata of a `TensorChange`. `sparse` is True if the change has an `index`.

    Tied tensors share their values in the file. `values_of` is the name under which the file has
    the values.
    """

    shape: tuple[int, ...]
    dtype: str
    sparse: bool
    sha256_old: str
    sha256_new: str
    values_of: str


@dataclass(frozen=True)
class PatchHeader(Record):
    """Metadata of a patch: attributes of `Patch`, and a `ChangeRecord` for each changed tensor."""

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
    """Writes a patch to a file, atomically. The other arguments are the attributes of `Patch`."""
    records: dict[str, ChangeRecord] = {}
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name, change in changes.items():
        own = first.setdefault(id(change), name)
        dtype = str(change.old.dtype).removeprefix("torch.")
        sparse = change.index is not None
        records[name] = ChangeRecord(
            change.shape, dtype, sparse, change.sha256_old, change.sha256_new, own
        )
        tensors |= {f"old/{own}": _stored(change.old), f"new/{own}": _stored(change.new)}
        if change.index is not None:
            tensors[f"index/{own}"] = change.index
    header = PatchHeader(base, result, versions, records).to_json()
    texts = {"format": PATCH_FORMAT, "patch": header, "report": report_json}
    texts["sha256"] = _digest(header, report_json, tensors)
    replacing(path, lambda part: save_file(tensors, part, texts))


def read_patch(path: str | Path) -> dict[str, Any]:
    """Reads the attributes of a `Patch` by name. Raises a `ConfigurationError` if the file is
    damaged or no patch.
    """
    tensors, texts = _read_tensors(path)
    if texts.get("format") != PATCH_FORMAT:
        problem = f"`patch={str(path)!r}` has the format {texts.get('format', 'none')!r}, not {PATCH_FORMAT!r}."
        raise ConfigurationError(
            problem, "give a patch, and read it with the version of the package that wrote it."
        )
    try:
        return _parse(tensors, texts)
    except (ConfigurationError, KeyError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigurationError(
            f"`patch={str(path)!r}` is damaged: {reason}", PATCH_FILE_HINT
        ) from error


def _read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name).clone() for name in names}, dict(
                file.metadata() or {}
            )
    except Exception as error:  # foreign bytes can raise anything
        raise ConfigurationError(
            f"`patch={str(path)!r}` cannot be read ({type(error).__name__}: {error}).",
            "give a safetensors file that `Patch.save` has written.",
        ) from error


def _parse(tensors: dict[str, Tensor], texts: dict[str, str]) -> dict[str, Any]:
    header, report = texts["patch"], texts["report"]
    if texts["sha256"] != _digest(header, report, tensors):
        raise ValueError("its content does not match its hash.")
    read = PatchHeader.from_json(header)
    if report:
        parse_json(report)
    own = {
        name: _change(name, record, tensors)
        for name, record in read.tensors.items()
        if record.values_of == name
    }
    changes = {name: own[record.values_of] for name, record in read.tensors.items()}
    rest = {
        "base": read.base,
        "result": read.result,
        "versions": read.versions,
        "report_json": report,
    }
    return {"changes": changes, **rest}


def _change(name: str, record: ChangeRecord, tensors: Mapping[str, Tensor]) -> TensorChange:
    index = tensors[f"index/{name}"] if record.sparse else None
    old, new = (_restored(tensors[f"{part}/{name}"], record.dtype) for part in ("old", "new"))
    shape = record.shape if index is None else (len(index),)
    if not tuple(old.shape) == tuple(new.shape) == tuple(shape) or old.dtype != new.dtype:
        raise ValueError(f"the values of `{name}` do not have its shape.")
    if index is not None and not 0 <= int(index.min()) <= int(index.max()) < math.prod(
        record.shape
    ):
        raise ValueError(f"`{name}` has positions out of range.")
    return TensorChange(record.shape, index, old, new, record.sha256_old, record.sha256_new)


def _stored(values: Tensor) -> Tensor:
    return torch.view_as_real(values).contiguous() if values.is_complex() else values


def _restored(values: Tensor, dtype: str) -> Tensor:
    return torch.view_as_complex(values) if dtype.startswith("complex") else values


def _digest(header: str, report: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256("\0".join((header, report, hash_tensors(tensors))).encode()).hexdigest()
