"""`OldModel`: the model that a new model replaces. `Reference`: knows which samples the old model
gets right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_nrl._utils.checkpoint import fitting, read_state
from lightning_nrl._utils.checks import is_class
from lightning_nrl._utils.device import is_out_of_memory
from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl._utils.state import State, device_of, hash_tensors
from lightning_nrl.data.adapters import adapter_hint, bind_adapter, describe
from lightning_nrl.data.batch import Adapter, Batch, Source
from lightning_nrl.errors import ConfigurationError, RepairError, check_kind
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_options import Keep
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.records import Role
from lightning_nrl.tasks import Multiclass, Task, class_logits
from lightning_nrl.updates.predictions import Predictions

Classes = Mapping[int, int] | tuple[Sequence[str], Sequence[str]]
"""`{old class number: new class number}`, or two lists in class order: the names of the old and of
the new classes.
"""


@runtime_checkable
class Reference(Protocol):
    """Knows which samples the old model gets right."""

    def answers(
        self, evaluator: Evaluator, sources: Sequence[Source], like: SampleResults
    ) -> SampleResults:
        """Returns the old model's results on the data of all ranks. `sources` are this rank's share
        of
        the data.

        `evaluator` holds the new model, its task and precision. `like` are the new model's results
        on the same data; the returned table has the same rows. Only its columns `prediction` and
        `passed` are used.
        """


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

        RegressionFreeRepair(reference=OldModel(old, classes=(["car", "bus"], ["bus", "car",
        "tram"])))
    """

    model: nn.Module | State | str | Path
    adapter: Adapter | None = None
    classes: Classes | None = None
    cache: str | Path | None = None

    def __post_init__(self) -> None:
        fits = isinstance(self.model, (nn.Module, Mapping, str, Path))
        check_kind(
            "reference", self.model, fits, "model", "OldModel(model), 'old.ckpt' or a state dict"
        )
        if isinstance(self.model, (str, Path)) and not Path(self.model).is_file():
            raise ConfigurationError(
                f"`reference={str(self.model)!r}` does not exist.", "give a checkpoint's path."
            )
        if isinstance(self.model, Mapping):
            state = read_state("reference", self.model).items()
            copied = {
                name: value.detach().clone() if isinstance(value, Tensor) else value
                for name, value in state
            }
            object.__setattr__(self, "model", copied)
        class_table(self.classes)

    def answers(
        self, evaluator: Evaluator, sources: Sequence[Source], like: SampleResults
    ) -> SampleResults:
        """Runs the old model over the data, or reads its predictions from the cache."""
        weights, task, collective = (
            self.weights(evaluator.model),
            evaluator.task,
            evaluator.collective,
        )
        table, known, key = class_table(self.classes, task), None, ""
        if self.cache is not None:
            adapter = getattr(self.adapter, "__qualname__", type(self.adapter).__name__)
            how = task, evaluator.precision, table, adapter, like.splits, like.sizes
            samples = {"samples.index": like.index, "samples.label": like.label}
            key = f"{hash_tensors({**weights, **samples})} {how!r}"
            known = Predictions.read(self.cache) if Path(self.cache).is_file() else None
            known = None if known is None or known != known.sealed(key) else known
        if not collective.any(known is None):
            assert known is not None
            return known.results(like)
        mapped = task if table is None else _MappedMulticlass(table)
        found = self._run(replace(evaluator, task=mapped), weights, sources)
        answer = replace(found, label=like.label, loss=(~found.passed).to(found.loss))
        if self.cache is not None and collective.rank == 0:
            Predictions.of(answer, weights).sealed(key).save(self.cache)
        return answer

    def weights(self, model: nn.Module) -> State:
        """Returns the old weights. If they are from a state dict or file, they get dtypes and
        device of `model`.
        """
        if isinstance(self.model, nn.Module):
            return self.model.state_dict()
        return fitting("reference", read_state("reference", self.model), model)

    def _run(
        self, evaluator: Evaluator, weights: State, sources: Sequence[Source]
    ) -> SampleResults:
        model = self.model if isinstance(self.model, nn.Module) else evaluator.model
        adapter = None if self.adapter is None else bind_adapter(self.adapter, model)
        seen = [source if adapter is None else _Adapted(source, adapter) for source in sources]
        here, home = device_of(evaluator.model), device_of(model)
        try:
            with preserve_state(model):
                evaluator = replace(evaluator, model=model.to(here))
                return (
                    evaluator.run(seen)
                    if model is self.model
                    else evaluator.run_with(weights, seen)
                )
        except Exception as error:
            if isinstance(error, RepairError) or is_out_of_memory(error):
                raise
            raw = next((batch.raw for source in sources for batch in source), None)
            raise ConfigurationError(
                f"`reference`: {type(model).__name__} raised {type(error).__name__}: {error}\n{describe(raw)}",
                adapter_hint(raw, "`reference=OldModel(old, adapter=f)`"),
            ) from error
        finally:
            model.to(home)


def parse_reference(reference: Any) -> Reference | None:
    """Parses a module, a state dict, or the path of a checkpoint or CSV file. None or a `Reference`
    stays unchanged.
    """
    if reference is None or (isinstance(reference, Reference) and not isinstance(reference, type)):
        return reference
    if isinstance(reference, (str, Path)) and Path(reference).suffix == ".csv":
        return Predictions.read(reference)
    return OldModel(reference)


@dataclass(frozen=True)
class _Adapted:
    source: Source
    adapter: Adapter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.source:
            args, kwargs, _ = self.adapter(batch.raw)
            yield replace(batch, args=args, kwargs=kwargs)


def class_table(classes: Classes | None, task: Task | None = None) -> dict[int, int] | None:
    """Converts `OldModel.classes` to `{old class: new class}`, without classes that only one model
    has.

    Returns None if `classes` is None. Raises a `ConfigurationError` if no class is left, if two old
    classes become the same new class, or if `task` is given and is no `Multiclass`.
    """
    if classes is None:
        return None
    if task is not None and not isinstance(task, Multiclass):
        raise ConfigurationError(
            f"`classes` needs Multiclass, not {type(task).__name__}.", "leave `classes` out."
        )
    if isinstance(classes, Mapping):
        table = dict(classes)
        whole = all(map(is_class, (*table, *table.values())))
    else:
        both = isinstance(classes, (tuple, list)) and len(classes) == 2
        whole = both and all(isinstance(names, (tuple, list)) for names in classes)
        table = (
            {i: classes[1].index(name) for i, name in enumerate(classes[0]) if name in classes[1]}
            if whole
            else {}
        )
    if not whole or not table or len(set(table.values())) < len(table):
        raise ConfigurationError(
            f"`classes={classes!r}` does not map old classes to new ones.",
            "write {old number: new number}, or (names of the old classes, names of the new ones) in order.",
        )
    return table


class _MappedMulticlass(Multiclass):
    def __init__(self, table: Mapping[int, int]) -> None:
        self.table = table

    def prediction(self, output: Tensor) -> Tensor:
        old = super().prediction(output)
        numbers = torch.full(
            (max(class_logits(output).shape[1], max(self.table) + 1),), -1, device=old.device
        )
        for was, now in self.table.items():
            numbers[was] = now
        return numbers[old]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (~self.passed(output, target)).float()

    def margin(self, output: Tensor, target: Tensor) -> Tensor:
        return torch.full(output.shape[:1], torch.nan, device=output.device)


@dataclass(frozen=True)
class Update:
    """Results of the old model by the role of the data: known, calibration or unseen."""

    answers: Mapping[Role, SampleResults]  # row i is the sample in row i of the new model's results

    def regressions(self, role: Role, new: SampleResults) -> SampleResults:
        """Returns the new model's results, in which a target stays targeted only if the old model
        gets it right.
        """
        return replace(new, targeted=new.targeted & self.answers[role].passed)

    def kept(self, new: SampleResults, keep: Keep) -> SampleResults:
        """Returns the known results `new`. If `keep` is `reference`, `passed` is True where both
        models are right.
        """
        return (
            new
            if keep == "both"
            else replace(new, passed=new.passed & self.answers["known"].passed)
        )


def evaluate_old(
    reference: Reference,
    evaluator: Evaluator,
    sources: Mapping[Role, Sequence[Source]],
    results: Mapping[Role, SampleResults],
) -> Update:
    """Evaluates the old model on this rank's share of all sources. `results` are the new model's
    results by role.
    """
    # One call evaluates all roles, since a cache is a single file. The names of splits are unique
    # over all roles.
    together = [source for own in sources.values() for source in own]
    found = reference.answers(
        evaluator, together, SampleResults.concat([results[role] for role in sources])
    )
    return Update({role: found.only(results[role].splits) for role in sources})
