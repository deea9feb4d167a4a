"""The change from one state of a model to another, as an object and as a file."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_nrl._utils.atomic_files import replacing
from lightning_nrl._utils.checkpoint import load_mapping, read_state
from lightning_nrl._utils.preserve import loading_mode
from lightning_nrl._utils.state import State, hash_tensor, hash_tensors, saved_names, write
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.pipeline.patch_file import (
    PatchContents,
    TensorChange,
    read_patch,
    write_patch,
)
from lightning_nrl.report import RepairReport

PATCH_NAME = "repair.patch.safetensors"
"""Name of the patch file that a repair writes next to its checkpoint."""

Weights = TypeVar("Weights", bound=nn.Module | dict[str, Any])


@dataclass(frozen=True, eq=False)
class Patch(PatchContents):
    """The change from one state of a model to another.

    It is applied to the first state and reverted on the second. A patch may start from the result
    of an earlier patch. Then revert the later patch first.

    Attributes:
        changes: a `TensorChange` for each changed tensor, by name in the state dict. Tied tensors
            share one object.
        base: SHA-256 (`hash_tensors`) of the whole state before the change.
        result: SHA-256 of the whole state after the change.
        versions: versions of the software that made the patch, by name.
        report_json: the report of the repair as JSON, or an empty string.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> old = {name: value.clone() for name, value in model.state_dict().items()}
        >>> _ = torch.nn.init.zeros_(model.bias)
        >>> patch = Patch.between(old, model)
        >>> patch.names, patch.n_changed
        (('bias',), 2)
        >>> torch.equal(patch.revert(model).bias, old["bias"])
        True
    """

    @classmethod
    def between(
        cls,
        old: nn.Module | Mapping[str, Any] | str | Path,
        new: nn.Module | Mapping[str, Any] | str | Path,
        report: RepairReport | None = None,
    ) -> Patch:
        """Compares two states of a model and returns the change from `old` to `new`.

        Args:
            old: the state before the change: a module, a state dict, or the path of a checkpoint.
            new: the state of the same model after the change, in any of these forms.
            report: report of the repair, to be stored in the patch.

        Raises:
            ConfigurationError: the states are equal or of different models, or a checkpoint cannot
                be read.
        """
        before = _tensors(read_state("old", old))
        after = _tensors(read_state("new", new))
        if before.keys() != after.keys():
            name = min(before.keys() ^ after.keys())
            raise ConfigurationError(
                f"`{name}` is in only one of the states.", "give two states of the same model."
            )
        changes = {}
        shared: dict[tuple[str, str], TensorChange] = {}
        for name, value in before.items():
            change = TensorChange.between(name, value, after[name])
            if change is not None:
                changes[name] = shared.setdefault((change.sha256_old, change.sha256_new), change)
        if not changes:
            raise ConfigurationError(
                "`new` is the same as `old`, bit for bit.", "give the state after a change."
            )
        json = ""
        if report is not None:
            json = report.to_json()
        return cls(changes, hash_tensors(before), hash_tensors(after), report_json=json)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.changes)

    @property
    def n_changed(self) -> int:
        """Number of stored values (see `TensorChange.n_changed`). Tied tensors are counted once."""
        changes = {id(change): change for change in self.changes.values()}
        return sum(change.n_changed for change in changes.values())

    @property
    def report(self) -> RepairReport | None:
        """The stored report, or None.

        Raises a `ConfigurationError` if an incompatible version wrote it.
        """
        if not self.report_json:
            return None
        return RepairReport.from_json(self.report_json)

    def apply(self, to: Weights) -> Weights:
        """Writes the new values to a module and returns it, or returns a changed copy of a dict.

        Raises a `ConfigurationError`, before any change, if the patch was made for other weights.
        """
        return self._changed(to, undo=False)

    def revert(self, to: Weights) -> Weights:
        """Restores the old values bit for bit. Arguments and errors are those of `apply`."""
        return self._changed(to, undo=True)

    def save(self, path: str | Path) -> None:
        """Writes the patch to a safetensors file, atomically."""
        write_patch(path, self)

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Reads a file that `save` wrote.

        Raises a `ConfigurationError` if it is missing, damaged or no patch.
        """
        return cls(**vars(read_patch(path)))

    def _changed(self, to: Weights, undo: bool) -> Weights:
        if isinstance(to, nn.Module):
            _write(to, self._new_values(_tensors(to.state_dict()), undo))
            return to
        if not isinstance(to, dict):
            raise ConfigurationError(
                f"`to`: found a {type(to).__name__}, not a module or state dict.",
                "load the model first.",
            )
        copied = copy(to)  # with attributes such as `_metadata`
        copied.update(self._new_values(_tensors(to), undo))
        return copied

    def _new_values(self, state: Mapping[str, Tensor], undo: bool) -> dict[str, Tensor]:
        self._check_state(state, undo)
        values: dict[tuple[int, ...], Tensor] = {}
        new = {}
        for name, change in self.changes.items():
            # Tensors that share memory still share it afterwards.
            place = (id(change), state[name].data_ptr(), *state[name].stride())
            if place not in values:
                values[place] = change.applied(state[name], undo)
            new[name] = values[place]
        _, wanted = self._digests(undo)
        if hash_tensors({**state, **new}) != wanted:
            raise ConfigurationError(
                "`patch` yields other weights than its hash says.",
                "create the patch again; nothing was changed.",
            )
        return new

    def _digests(self, undo: bool) -> tuple[str, str]:
        """Returns the hashes of the state to change and of the state after it."""
        if undo:
            return self.result, self.base
        return self.base, self.result

    def _check_state(self, state: Mapping[str, Tensor], undo: bool) -> None:
        digest = hash_tensors(state)
        problem = self._difference(state, undo)
        before, after = self._digests(undo)
        if digest == before and not problem:
            return
        action, is_done = "applied", "already"
        hint = (
            "a patch fits only the weights that it was made for; "
            "apply patches in the order they were made."
        )
        if undo:
            action, is_done = "reverted", "do not"
            hint = "revert the later patches first."
        if digest == after:
            problem = f"the weights {is_done} contain this change"
            hint = "there is nothing to do."
        problem = (
            problem or "the tensors that it changes fit, but other tensors of the model differ"
        )
        raise ConfigurationError(f"`patch` cannot be {action}: {problem}.", hint)

    def _difference(self, state: Mapping[str, Tensor], undo: bool) -> str:
        """Describes why the tensors to change do not fit the patch; "" if they all fit."""
        wrong = []
        for name, change in self.changes.items():
            if name not in state:
                return f"the model has no tensor `{name}`"
            tensor = state[name]
            if tensor.dtype != change.old.dtype or tensor.shape != change.shape:
                return (
                    f"`{name}` is {tensor.dtype} {list(tensor.shape)} in the model "
                    f"and {change.old.dtype} {list(change.shape)} in the patch"
                )
            if hash_tensor(tensor) != change.sha256(after=undo):
                wrong.append(name)
        if not wrong:
            return ""
        return (
            f"{len(wrong)} of the {len(self.changes)} tensors that it changes have other values, "
            f"such as `{wrong[0]}`"
        )


def _write(model: nn.Module, new: State) -> None:
    live = saved_names(model)
    for name in new:
        if name not in live:
            raise ConfigurationError(
                f"`{name}` in the state dict of {type(model).__name__} "
                "is none of the module's own tensors.",
                "apply the patch to the state dict, and load that into the module.",
            )
    with loading_mode(model):
        write(model, {live[name]: value for name, value in new.items()})


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def patch_checkpoint(
    patch: Patch,
    checkpoint: str | Path,
    out: str | Path,
    *,
    undo: bool = False,
    weights_only: bool = True,
) -> None:
    """Applies a patch to a checkpoint and writes the result.

    Everything else in the checkpoint stays unchanged.

    Args:
        patch: the patch to apply.
        checkpoint: path of a Lightning checkpoint, or of a file with a state dict.
        out: path of the file to write, atomically. It may be `checkpoint`.
        undo: if True, reverts the patch instead.
        weights_only: if True, refuses a checkpoint with objects that could run code: all but
            tensors and plain values.

    Raises:
        ConfigurationError: the checkpoint cannot be read, or the patch was made for other weights.
    """
    hint = (
        "give a checkpoint of tensors and plain values, "
        "or say `weights_only=False` if you trust the file."
    )
    content: Any = load_mapping("checkpoint", checkpoint, hint, weights_only=weights_only)
    change = patch.apply
    if undo:
        change = patch.revert
    if isinstance(content.get("state_dict"), dict):
        content = {**content, "state_dict": change(content["state_dict"])}
    else:
        content = change(content)
    replacing(out, lambda part: torch.save(content, part))
