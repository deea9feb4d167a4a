"""The release gate: may the new model replace the old one?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.data.batch import Source
from lightning_nrl.data.columns import find_column
from lightning_nrl.errors import ConfigurationError, check_kind
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.slices import Slices
from lightning_nrl.updates.model_pair import ModelPair, evaluate_pair
from lightning_nrl.updates.old_model import OldModel, Reference, parse_reference
from lightning_nrl.updates.predictions import Predictions
from lightning_nrl.updates.release_report import Identity, ReleaseReport, make_report
from lightning_nrl.updates.rule_parsing import parse_rules
from lightning_nrl.updates.rules import Rule


def release(
    new: nn.Module | Evaluator,
    old: Any,
    data: Source | Sequence[Source],
    rules: str | Rule | Sequence[str | Rule] = "instance",
    *,
    slices: str | int | Slices | None = None,
    seeds: Mapping[str, int] | None = None,
) -> ReleaseReport:
    """Judges whether a new model may replace the old one, by one pass of each over the data.

    The data are read batch by batch, so they may be larger than memory: a few numbers a sample are kept. Both models
    and the random states are left as found. Of the report: `accepted`, `reasons`, `exit_status` for `sys.exit`.

    Args:
        new: the new model, on its device. An `Evaluator` says what else there is to say of it: the task, mixed
            precision, the ranks that share the data. Each rank gets the same report.
        old: the model in use: a module, the path of its checkpoint, a CSV file of its predictions, or an `OldModel`.
        data: the splits, such as a `TensorSource`. Where a rule promises something of data to come, nothing may have
            looked at them before.
        rules: what must hold, one or several: `instance`, `accuracy`, `tolerance:3`, `nfr:1%`, `slice-nfr:5%`,
            `slices`, `slices:count`, `protected:ids.csv`, with ` in SPLIT` behind it if it is for one split; or objects
            of `lightning_nrl.updates`.
        slices: which slice each sample is in: a column of the raw batch by its key or place, a function of the batch
            that gives a name or a number for each sample, its address, or a `Target`, whose samples are the slice.
        seeds: what the data and the models depend on, to be noted in the report.

    Raises:
        ConfigurationError: an argument cannot be used, or a rule asks for what the data do not have.
        EvaluationError: a split's samples are not there exactly once.

    Example:
        >>> import torch
        >>> from lightning_nrl import TensorSource
        >>> old, new = torch.nn.Linear(1, 2), torch.nn.Linear(1, 2)
        >>> for model, bias in ((old, 0.0), (new, -1.5)):
        ...     _ = model.load_state_dict({"weight": torch.tensor([[0.0], [1.0]]), "bias": torch.tensor([0.0, bias])})
        >>> data = TensorSource(torch.tensor([[-1.0], [1.0], [2.0]]), torch.tensor([0, 1, 1]), split="test")
        >>> report = release(new, old, data, "instance")
        >>> report.reasons
        ('instance: test: 1 of 3 that were right broke; the gate allows none (accuracy 100.00 %, now 66.67 %).',)
        >>> report.exit_status, report.broken_ids
        (1, {'test': [1]})
    """
    check_kind("new", new, isinstance(new, (nn.Module, Evaluator)), "model", "new=model")
    sources = [data] if isinstance(data, Source) else data
    if not isinstance(sources, Sequence) or not sources or not all(isinstance(source, Source) for source in sources):
        raise ConfigurationError(
            f"`data`: found a {type(data).__name__}, not a list of sources.",
            "write `data=[TensorSource(inputs, targets, split='test')]`, or use the callback `ReleaseGate`.",
        )
    _, report = judge_pair(
        Evaluator.of(new),
        check_reference("old", old),
        sources,
        parse_rules(rules),
        slices=None if slices is None else find_column("slices", slices),
        seeds=dict(seeds or {}),
    )
    return report


def judge_pair(
    new: Evaluator,
    old: Reference,
    data: Sequence[Source],
    rules: Sequence[Rule],
    *,
    slices: Slices | None,
    seeds: Mapping[str, int],
    name: str = "",
) -> tuple[ModelPair, ReleaseReport]:
    """As `release`, with what both models do on each sample; `name` is what the new model is called in the report."""
    for rule in rules:
        rule.check_data([source.split for source in data], slices is not None)
    targets = [target for rule in rules for target in rule.targets]
    pair = evaluate_pair(new, old, data, slices=slices, targets=targets)
    report = make_report(
        pair,
        rules,
        new=Identity(name or type(new.model).__name__, hash_tensors(new.model.state_dict())),
        old=_identity(old, new.model),
        task=str(new.task),
        precision=str(new.precision),
        seeds=seeds,
    )
    return pair, report


def check_reference(argument: str, old: Any) -> Reference:
    """What was given as the old model; refuses nothing, and what cannot be one."""
    found = parse_reference(old)
    if found is None:
        hint = "give a checkpoint, a module, a CSV file of predictions or an OldModel."
        raise ConfigurationError(f"`{argument}=None`: there is nothing to compare with.", hint)
    return found


def _identity(old: Reference, new: nn.Module) -> Identity:
    if isinstance(old, OldModel):
        name = type(old.model).__name__ if isinstance(old.model, (nn.Module, Mapping)) else str(old.model)
        return Identity(name, hash_tensors(old.weights(new)))
    if isinstance(old, Predictions):
        return Identity("predictions", old.weights or "")
    return Identity(type(old).__name__)
