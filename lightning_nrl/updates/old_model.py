"""`OldModel`, which a new model replaces, and `Reference`, which knows what it gets right."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_nrl._utils.checkpoint import read_fitting, read_state
from lightning_nrl._utils.checks import is_class
from lightning_nrl._utils.device import is_out_of_memory
from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl._utils.sharded import is_sharded
from lightning_nrl._utils.state import State, device_of, hash_tensors
from lightning_nrl.data.adapters import adapter_hint, bind_adapter, describe
from lightning_nrl.data.batch import Adapter, Batch, Source, WrappedSource
from lightning_nrl.errors import ConfigurationError, RepairError, check_kind
from lightning_nrl.evaluation import Evaluator, SampleResults
from lightning_nrl.evaluation.sample_options import Keep
from lightning_nrl.records import Role
from lightning_nrl.tasks import Multiclass, Task
from lightning_nrl.updates.predictions import Predictions

Classes = Mapping[int, int] | tuple[Sequence[str], Sequence[str]]
"""`{old class: new class}`, or the names of the old and of the new classes, in class order."""


@runtime_checkable
class Reference(Protocol):
    """Knows which samples the old model gets right."""

    def answers(
        self, evaluator: Evaluator, sources: Sequence[Source], like: SampleResults
    ) -> SampleResults:
        """Returns the old model's results on the data of all ranks.

        `evaluator` holds the new model, its task and precision. `sources` are this rank's share of
        the data. `like` are the new model's results on the same data; the returned table has the
        same rows. Only its columns `prediction`, `passed` and, in the rule `calibration`,
        `confidence` are used.
        """


AnyReference: TypeAlias = nn.Module | str | Path | State | Reference
"""A replaced model, as callbacks take it; see `parse_reference`."""


@dataclass(frozen=True, eq=False)
class OldModel:
    """The old model itself, which can run on any data.

    Attributes:
        model: a module of any architecture. If both models have the same architecture, it may also
            be a state dict, or the path of a checkpoint or saved state dict. A state dict is
            copied, since training would change it.
        adapter: makes `(args, kwargs, target)` from a raw batch; needed if the two models have
            different inputs.
        classes: needed if the models have different classes: `{old class: new class}`, or two lists
            of class names, first the old model's. A prediction of a class that the new model lacks
            counts as wrong.
        cache: CSV file for the old model's predictions. It is read instead of running the model if
            nobody edited it and weights, samples, labels, classes, task and precision have not
            changed since it was written; otherwise it is rewritten. Inputs are not compared: delete
            the file when the inputs change.

    Example::

        classes = (["car", "bus"], ["bus", "car", "tram"])
        RegressionFreeRepair(reference=OldModel(old, classes=classes))
    """

    model: nn.Module | State | str | Path
    adapter: Adapter | None = None
    classes: Classes | None = None
    cache: str | Path | None = None

    def __post_init__(self) -> None:
        fits = isinstance(self.model, (nn.Module, Mapping, str, Path))
        example = "OldModel(model), 'old.ckpt' or a state dict"
        check_kind("reference", self.model, fits, "model", example)
        if isinstance(self.model, (str, Path)) and not Path(self.model).is_file():
            raise ConfigurationError(
                f"`reference={str(self.model)!r}` does not exist.", "give a checkpoint's path."
            )
        if isinstance(self.model, Mapping):
            state = read_state("reference", self.model)
            tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
            object.__setattr__(self, "model", copy.deepcopy(tensors))
        class_table(self.classes)

    def answers(
        self, evaluator: Evaluator, sources: Sequence[Source], like: SampleResults
    ) -> SampleResults:
        """Runs the old model over the data, or reads its predictions from the cache."""
        weights = self.weights(evaluator.model)
        if self.cache is None:
            return self._run(evaluator, weights, sources, like)
        key, cached = self._cache_key(evaluator, weights, like), Predictions({})
        if Path(self.cache).is_file():
            cached = Predictions.read(self.cache)
        # The model runs on all ranks if one of them cannot use the file.
        if not evaluator.collective.any(cached != cached.sealed(key)):
            return cached.results(like)
        results = self._run(evaluator, weights, sources, like)
        weights_hash = hash_tensors(weights)  # on all ranks, as the weights may be split
        if evaluator.collective.rank == 0:
            Predictions.of(results, weights_hash).sealed(key).save(self.cache)
        return results

    def _cache_key(self, evaluator: Evaluator, weights: State, like: SampleResults) -> str:
        table = class_table(self.classes, evaluator.task)
        adapter = getattr(self.adapter, "__qualname__", type(self.adapter).__name__)
        settings = evaluator.task, evaluator.precision, table, adapter, like.splits, like.sizes
        samples = {"samples.index": like.index, "samples.label": like.label}
        return f"{hash_tensors({**weights, **samples})} {settings!r}"

    def weights(self, model: nn.Module) -> State:
        """Returns the old weights, from a state dict or file with dtypes and device of `model`."""
        if isinstance(self.model, nn.Module):
            return self.model.state_dict()
        return read_fitting("reference", self.model, model)

    def _run(
        self, evaluator: Evaluator, weights: State, sources: Sequence[Source], like: SampleResults
    ) -> SampleResults:
        table = class_table(self.classes, evaluator.task)
        if table is not None:
            evaluator = replace(evaluator, task=_MappedMulticlass(table))
        model = evaluator.model
        if isinstance(self.model, nn.Module):
            model, weights = self.model, {}
            if not is_sharded(model):
                evaluator = replace(evaluator, spare_batch=None)
        adapted = sources
        if self.adapter is not None:
            adapter = bind_adapter(self.adapter, model)
            adapted = [_Adapted(source, adapter) for source in sources]
        home, device = device_of(model), device_of(evaluator.model)
        try:
            with preserve_state(model):
                evaluator = replace(evaluator, model=model.to(device), argument="reference")
                results = evaluator.run_with(weights, adapted)
        finally:
            model.to(home)
        loss = (~results.right).to(results.loss)
        return replace(results, label=like.label, passed=results.right, loss=loss)


def parse_reference(reference: Any) -> Reference | None:
    """Parses a module, a state dict, or the path of a checkpoint or CSV file.

    None or a `Reference` stays unchanged.
    """
    if reference is None or (isinstance(reference, Reference) and not isinstance(reference, type)):
        return reference
    if isinstance(reference, (str, Path)) and Path(reference).suffix == ".csv":
        return Predictions.read(reference)
    return OldModel(reference)


def in_memory(reference: Reference) -> Reference:
    """Returns a reference for parts of the data: it has read its file, and writes no cache."""
    if not isinstance(reference, OldModel):
        return reference
    model = reference.model
    if isinstance(model, (str, Path)):
        model = cast(State, read_state("reference", model))
    return replace(reference, model=model, cache=None)


class _Adapted(WrappedSource):
    """Source whose batches have the inputs of the old model."""

    def __init__(self, source: Source, adapter: Adapter) -> None:
        super().__init__(source)
        self.adapter = adapter

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.source:
            try:
                args, kwargs, _ = self.adapter(batch.raw)
            except Exception as error:
                if isinstance(error, RepairError) or is_out_of_memory(error):
                    raise
                raise ConfigurationError(
                    f"`reference`: its `adapter` raised {type(error).__name__} on `{self.split}` "
                    f"data: {error}\n{describe(batch.raw)}",
                    adapter_hint(batch.raw, "`reference=OldModel(old, adapter=f)`"),
                ) from error
            yield replace(batch, args=args, kwargs=kwargs)


def class_table(classes: Classes | None, task: Task | None = None) -> dict[int, int] | None:
    """Converts `OldModel.classes` to `{old class: new class}`, for classes that both models have.

    Returns None if `classes` is None. Raises a `ConfigurationError` if no class is left, if two old
    classes become the same new class, or if `task` is given and is no `Multiclass`.
    """
    if classes is None:
        return None
    if task is not None and not isinstance(task, Multiclass):
        raise ConfigurationError(
            f"`classes` needs Multiclass, not {type(task).__name__}.", "leave `classes` out."
        )
    table = _table_of(classes)
    if not table or len(set(table.values())) < len(table):
        raise ConfigurationError(
            f"`classes={classes!r}` does not map old classes to new ones.",
            "write {old number: new number}, "
            "or (names of the old classes, names of the new ones) in order.",
        )
    return table


def _table_of(classes: Classes) -> dict[int, int]:
    """Returns an empty table if `classes` has a wrong form."""
    if isinstance(classes, Mapping):
        if all(map(is_class, (*classes, *classes.values()))):
            return dict(classes)
    elif isinstance(classes, (tuple, list)) and len(classes) == 2:
        old, new = classes
        if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)):
            return {i: new.index(name) for i, name in enumerate(old) if name in new}
    return {}


class _MappedMulticlass(Multiclass):
    """Task of an old model with other classes; predicts classes of the new model."""

    def __init__(self, table: Mapping[int, int]) -> None:
        self.table = table

    def prediction(self, output: Tensor) -> Tensor:
        old_class = super().prediction(output)
        new_class = torch.full_like(old_class, -1)
        for old, new in self.table.items():
            new_class[old_class == old] = new
        return new_class

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (~self.passed(output, target)).float()

    def margin(self, output: Tensor, target: Tensor) -> Tensor:
        return torch.full(output.shape[:1], torch.nan, device=output.device)


@dataclass(frozen=True)
class Update:
    """Results of the old model by the role of the data: known, calibration or unseen."""

    answers: Mapping[Role, SampleResults]  # row i is the sample in row i of the new model's results

    def regressions(self, role: Role, new: SampleResults) -> SampleResults:
        """Returns the new model's results, with the targets that the old model gets right."""
        return replace(new, targeted=new.targeted & self.answers[role].passed)

    def kept(self, new: SampleResults, keep: Keep) -> SampleResults:
        """Returns the known results `new`; `passed` marks the samples that must stay right.

        If `keep` is `reference`, these are the samples that both models get right.
        """
        if keep == "both":
            return new
        return replace(new, passed=new.passed & self.answers["known"].passed)


def evaluate_old(
    reference: Reference,
    evaluator: Evaluator,
    sources: Mapping[Role, Sequence[Source]],
    results: Mapping[Role, SampleResults],
) -> Update:
    """Evaluates the old model on this rank's share of all sources.

    `results` are the new model's results by role.
    """
    # One call evaluates all roles, since a cache is a single file. The names of splits are unique
    # over all roles.
    all_sources = list(chain.from_iterable(sources.values()))
    all_results = SampleResults.concat(list(results.values()))
    answers = reference.answers(evaluator, all_sources, all_results)
    by_role = {}
    for role, table in results.items():
        old = answers.only(table.splits)
        by_role[role] = replace(old, group=table.group, leaked=table.leaked)
    return Update(by_role)
