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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_nrl._utils.atomic_files import replacing
from lightning_nrl._utils.json_records import Record, parse_json
from lightning_nrl._utils.state import hash_tensor, hash_tensors, plain_copy
from lightning_nrl.errors import ConfigurationError, first_line
from lightning_nrl.records import installed_versions

WHOLE_TENSOR_SHARE = 1 / 3  # if a larger share of a tensor changed, all its values are stored
PATCH_FORMAT = "lightning_nrl.patch.1"
PATCH_FILE_HINT = "give a file that `Patch.save` or a repair wrote, or write it again."


@dataclass(frozen=True, eq=False)
class TensorChange:
    """The change of one tensor of the given `shape`. Its tensors are on the CPU.

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
        """Returns the change from `old` to `new`, or None if they are bitwise equal.

        Raises a `ConfigurationError` if the tensors differ in shape or dtype, or are not plain
        dense tensors.
        """
        if old is new:
            return None
        for value in (old, new):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                kind = f"{value.layout}, {value.dtype} on {value.device.type}"
                raise ConfigurationError(
                    f"`{name}` is no plain tensor ({kind}).", "give dense tensors with values."
                )
        if old.shape != new.shape or old.dtype != new.dtype:
            pair = " and ".join(f"{value.dtype} {list(value.shape)}" for value in (old, new))
            raise ConfigurationError(f"`{name}` is {pair}.", "give two states of the same model.")
        old, new = _plain(old), _plain(new)
        differs = (_bytes(old) != _bytes(new)).any(1)
        n_changed = int(differs.sum())
        if not n_changed:
            return None
        shape, hashes = tuple(old.shape), (hash_tensor(old), hash_tensor(new))
        if n_changed > WHOLE_TENSOR_SHARE * old.numel():
            return cls(shape, None, plain_copy(old), plain_copy(new), *hashes)
        index = differs.nonzero().flatten()
        old_values = _bytes(old)[index].view(old.dtype).flatten()
        new_values = _bytes(new)[index].view(new.dtype).flatten()
        if old.numel() < 2**31:
            index = index.int()
        return cls(shape, index, old_values, new_values, *hashes)

    @property
    def n_changed(self) -> int:
        """Number of stored values: the changed ones, or all if more than a third changed."""
        return self.old.numel()

    def sha256(self, after: bool) -> str:
        """Returns the hash of the whole tensor before or after the change."""
        if after:
            return self.sha256_new
        return self.sha256_old

    def applied(self, tensor: Tensor, undo: bool) -> Tensor:
        """Returns a copy of the tensor on its device with the new or, if `undo`, the old values."""
        values = self.new
        if undo:
            values = self.old
        if self.index is None:
            return values.clone().to(tensor.device)
        copied = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        _bytes(copied)[self.index.long()] = _bytes(values)
        return copied.to(tensor.device)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().cpu().contiguous()


def _bytes(tensor: Tensor) -> Tensor:
    """Returns a view of a contiguous tensor with the bytes of each value in a row.

    As bytes, NaN and -0.0 are compared and copied exactly.
    """
    return tensor.reshape(-1).view(torch.uint8).view(-1, tensor.element_size())


@dataclass(frozen=True, eq=False)
class PatchContents:
    """What a patch file holds; `Patch` explains the attributes."""

    changes: Mapping[str, TensorChange]
    base: str
    result: str
    versions: Mapping[str, str] = field(default_factory=installed_versions)
    report_json: str = ""


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


def write_patch(path: str | Path, patch: PatchContents) -> None:
    """Writes a patch to a file, atomically."""
    records = {}
    tensors = {}
    names: dict[int, str] = {}  # under which a change is stored
    for name, change in patch.changes.items():
        stored_name = names.setdefault(id(change), name)
        records[name] = ChangeRecord(
            change.shape,
            str(change.old.dtype).removeprefix("torch."),
            change.index is not None,
            change.sha256_old,
            change.sha256_new,
            stored_name,
        )
        tensors[f"old/{stored_name}"] = _stored(change.old)
        tensors[f"new/{stored_name}"] = _stored(change.new)
        if change.index is not None:
            tensors[f"index/{stored_name}"] = change.index
    header = PatchHeader(patch.base, patch.result, patch.versions, records).to_json()
    texts = {
        "format": PATCH_FORMAT,
        "patch": header,
        "report": patch.report_json,
        "sha256": _digest(header, patch.report_json, tensors),
    }
    replacing(path, lambda part: save_file(tensors, part, texts))


def read_patch(path: str | Path) -> PatchContents:
    """Reads a patch. Raises a `ConfigurationError` if the file is damaged or no patch."""
    tensors, texts = _read_tensors(path)
    file_format = texts.get("format", "none")
    if file_format != PATCH_FORMAT:
        raise ConfigurationError(
            f"`patch={str(path)!r}` has the format {file_format!r}, not {PATCH_FORMAT!r}.",
            "give a patch, and read it with the version of the package that wrote it.",
        )
    try:
        return _parse(tensors, texts)
    except (ConfigurationError, KeyError, RuntimeError, ValueError) as error:
        raise ConfigurationError(
            f"`patch={str(path)!r}` is damaged: {first_line(error)}", PATCH_FILE_HINT
        ) from error


def _read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except Exception as error:  # foreign bytes can raise anything
        raise ConfigurationError(
            f"`patch={str(path)!r}` cannot be read ({type(error).__name__}: {error}).",
            "give a safetensors file that `Patch.save` has written.",
        ) from error


def _parse(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> PatchContents:
    header = texts["patch"]
    report = texts["report"]
    if texts["sha256"] != _digest(header, report, tensors):
        raise ValueError("its content does not match its hash.")
    if report:
        parse_json(report)
    read = PatchHeader.from_json(header)
    changes: dict[str, TensorChange] = {}
    for name, record in read.tensors.items():
        # The first of several tied tensors has the values.
        if record.values_of == name:
            changes[name] = _change(name, record, tensors)
        else:
            changes[name] = changes[record.values_of]
    return PatchContents(changes, read.base, read.result, read.versions, report)


def _change(name: str, record: ChangeRecord, tensors: Mapping[str, Tensor]) -> TensorChange:
    old = _restored(tensors[f"old/{name}"], record.dtype)
    new = _restored(tensors[f"new/{name}"], record.dtype)
    index = None
    shape = record.shape
    if record.sparse:
        index = tensors[f"index/{name}"]
        shape = (len(index),)
        if not 0 <= int(index.min()) <= int(index.max()) < math.prod(record.shape):
            raise ValueError(f"`{name}` has positions out of range.")
    if not old.shape == new.shape == shape or old.dtype != new.dtype:
        raise ValueError(f"the values of `{name}` do not have its shape.")
    return TensorChange(record.shape, index, old, new, record.sha256_old, record.sha256_new)


def _stored(values: Tensor) -> Tensor:
    if values.is_complex():
        return torch.view_as_real(values).contiguous()
    return values


def _restored(values: Tensor, dtype: str) -> Tensor:
    if dtype.startswith("complex"):
        return torch.view_as_complex(values)
    return values


def _digest(header: str, report: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256("\0".join((header, report, hash_tensors(tensors))).encode()).hexdigest()
