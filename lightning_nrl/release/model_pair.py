"""`ModelPair`: results of the old and the new model on the same samples, for release rules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from lightning_nrl._utils.preserve import outside_inference_mode, preserve_state, random_state
from lightning_nrl.data import Batch, Source, Target
from lightning_nrl.data.sample_identity import gathered_keys, raw_recorder
from lightning_nrl.errors import ConfigurationError, TargetError
from lightning_nrl.evaluation import Evaluator, Flips, SampleResults
from lightning_nrl.evaluation.sample_names import sample_names
from lightning_nrl.evaluation.slices import (
    SliceRecorder,
    Slices,
    check_distinct,
    common_names,
)
from lightning_nrl.updates.old_model import Reference
from lightning_nrl.updates.predictions import Predictions, refuse_samples

# Of 100 independent samples or more, 1 to 20 % of the gaps are so small, and more of near copies.
COPY_GAP, COPY_SHARE, FEWEST_COPIES = 0.01, 0.3, 100


@dataclass(frozen=True)
class ModelPair:
    """Results of the old and the new model on the same `N` samples, in the same order.

    Attributes:
        before: results of the old model.
        after: results of the new model.
        slices: names of the slices.
        slice_number: `N` int64, index of each sample's slice in `slices`, or -1 if the sample is in
            no slice.
        marked: for each target in a rule, a mask, `N` bool, of the samples that the target selects,
            right or wrong.
        keys: key of each sample, which does not depend on the models; empty if unknown.
        broken_names: names of the broken samples of each split, if `sample_id` is given.
        flips: how each sample changed from the old to the new model.
    """

    before: SampleResults
    after: SampleResults
    slices: tuple[str, ...]
    slice_number: Tensor
    marked: Mapping[Target, Tensor] = field(default_factory=dict)
    keys: Sequence[str] = ()
    broken_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    flips: Flips = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "flips", Flips.between(self.before, self.after))

    @property
    def splits(self) -> tuple[str, ...]:
        return self.after.splits

    def rows(self, split: str) -> Tensor:
        mask = torch.zeros(len(self.after), dtype=torch.bool)
        mask[self.after.of(split)] = True
        return mask

    @property
    def unproven(self) -> tuple[str, ...]:
        """Caveat for copies of samples that `distinct` cannot find."""
        if self.keys and all(self.keys) and self.after.margin.isfinite().any():
            return ()
        kind = "near copies" if self.keys and all(self.keys) else "repeated samples"
        return (f"Nothing shows if the data have {kind}; each of them would count.",)

    @cached_property
    def distinct(self) -> Tensor:
        """`N` bool, True for one of the copies of a sample in a split: a broken one, if any broke.

        Copies have the same key, or look like copies (`near_copies`).
        """
        chosen: dict[tuple[str, str], int] = {}
        is_distinct = torch.ones(len(self.after), dtype=torch.bool)
        keys = near_copies(self.after) or self.keys
        for row, (key, (split, _)) in enumerate(zip(keys, self.after.samples, strict=False)):
            earlier = chosen.get((split, key))
            if key and earlier is not None:
                repeated = earlier if self.flips.broken[row] else row
                is_distinct[repeated] = False
            if is_distinct[row]:
                chosen[split, key] = row
        return is_distinct

    def slices_of(self, split: str) -> dict[str, Tensor]:
        """Returns by name the slices with samples in the split, as masks of these, `N` bool."""
        in_split = self.rows(split)
        masks = {}
        for number, name in enumerate(self.slices):
            mask = in_split & (self.slice_number == number)
            if mask.any():
                masks[name] = mask
        return masks


def near_copies(results: SampleResults) -> list[str]:
    """Returns keys that samples share if they look like copies of each other with a little noise.

    In the order of the margins, a gap between two samples of a class and split is seldom far below
    the mean of the gaps around it. Returns nothing if this is as seldom as by chance.
    """
    n = len(results)
    if n < FEWEST_COPIES:
        return []
    split = np.repeat(range(len(results.sizes)), results.sizes)
    margin, columns = results.margin.double().nan_to_num().numpy(), np.stack([results.label, split])
    order = np.lexsort((margin, *columns))
    is_apart = np.diff(columns[:, order]).any(0)
    gap = np.where(is_apart, 0, np.diff(margin[order]))
    width = 2 * min(10 + n // 100, 100) + 1
    around = np.convolve(gap, np.full(width, 1 / width), "same")
    # Between many copies of one sample, all gaps around are small.
    is_close = gap < COPY_GAP * around.clip(np.median(around))
    # Equal margins do not tell copies: they may be as large as the output can be.
    if (is_close & (gap > 0)).sum() < COPY_SHARE * n:
        return []
    number = np.zeros_like(order)
    number[order[1:]] = (is_apart | ~is_close).cumsum()
    return list(map(str, number))


def _evaluate_piece(
    old: Reference,
    new: Evaluator,
    data: Sequence[Source],
    slices: Slices | None,
    targets: Sequence[Target],
) -> ModelPair:
    key_recorders = list(map(raw_recorder, data))
    slice_recorders = [SliceRecorder(source, slices, new.task) for source in key_recorders]
    target_recorders = {}
    recorders = slice_recorders
    for target in targets:
        # Each recorder reads from the one before, so that a single pass records all targets.
        recorders = [SliceRecorder(source, target, new.task, "where") for source in recorders]
        target_recorders[target] = recorders
    with preserve_state(new.model):
        after = new.run(recorders)
        before = old.answers(new, data, after)
    names, slice_number = _gathered(slice_recorders, new)
    marked = {}
    for target, recorders in target_recorders.items():
        marked[target] = _gathered(recorders, new)[1] >= 0
    keys = gathered_keys(key_recorders, new.collective)
    return ModelPair(before, after, names, slice_number, marked, keys)


@random_state()
@outside_inference_mode()
def evaluate_pieces(
    old: Reference,
    new: Evaluator,
    pieces: Iterable[Sequence[Source]],
    *,
    slices: Slices | None = None,
    targets: Sequence[Target] = (),
    sample_id: object = None,
) -> ModelPair:
    """Runs each model over the data once, batch by batch. Leaves models and random states alone.

    `new` holds the new model, its task and precision. `pieces` are this rank's share of the splits,
    those of one split one after the other; every rank gets the results for all samples.
    `ModelPair.marked` gets a mask for each of the `targets`. Broken samples get the names that
    `sample_id` gives them.
    """
    pairs: list[ModelPair] = []
    names = defaultdict[str, list[str]](list)
    for piece in pieces:
        if sample_id is not None and not pairs:
            for source in piece:
                sample_names(sample_id, source, [], new)  # refuses a wrong column
        pair = _evaluate_piece(old, new, piece, slices, targets)
        pairs.append(pair)
        if sample_id is not None:
            broken = pair.after.ids(pair.flips.broken)
            for source in piece:
                names[source.split] += sample_names(sample_id, source, broken[source.split], new)
    if len(pairs) == 1:
        return replace(pairs[0], broken_names=names)
    slice_names, slice_number = common_names([(pair.slices, pair.slice_number) for pair in pairs])
    return ModelPair(
        SampleResults.concat([pair.before for pair in pairs]),
        SampleResults.concat([pair.after for pair in pairs]),
        slice_names,
        slice_number,
        {target: torch.cat([pair.marked[target] for pair in pairs]) for target in targets},
        list(chain.from_iterable(pair.keys for pair in pairs)),
        names,
    )


def _gathered(recorders: Sequence[SliceRecorder], new: Evaluator) -> tuple[tuple[str, ...], Tensor]:
    return common_names([recorder.named(new.collective) for recorder in recorders])


def pair_from_files(
    old: Predictions,
    new: Predictions,
    slices: Mapping[tuple[str, int], str] | None = None,
    targets: Sequence[Target] = (),
) -> ModelPair:
    """Pairs the predictions of two models on the samples in `new`. `old` may have more samples.

    `slices` maps (split, id) to the name of a sample's slice; an empty name means no slice.

    Raises:
        ConfigurationError: `old` lacks a sample or has another sample in its place, or a split in
            `slices` has other samples there than in `old`.
    """
    slices = slices or {}
    _check_sliced(slices, old)
    after = new.alone()
    keys = [new.keys.get(sample, "") for sample in after.samples]
    before = old.results(after, keys)
    is_same = (after.prediction >= 0) & (before.prediction == after.prediction)
    contradictory = is_same & (before.passed != after.passed)
    argument = old.argument
    problem = "have the same `prediction`, but not the same `passed`"
    refuse_samples(after, contradictory, problem, argument=argument)
    has_classes = (before.prediction >= 0) & (after.prediction >= 0)
    has_two_labels = has_classes & ~is_same & before.passed & after.passed
    hint = "predict the same data; if several classes are right, leave out the column `prediction`."
    problem = "are right by two different predictions"
    refuse_samples(after, has_two_labels, problem, hint, argument)
    names = sorted(filter(str.strip, set(slices.values())))
    check_distinct(names)
    numbers = dict(zip(names, range(len(names)), strict=True))
    slice_number = torch.full_like(after.index, -1)
    for row, sample in enumerate(after.samples):
        slice_number[row] = numbers.get(slices.get(sample, ""), -1)
    # A label is known only where a model is right.
    label = torch.where(after.passed, after.prediction, -1)
    label = torch.where(before.passed, before.prediction, label)
    before, after = (replace(results, label=label) for results in (before, after))
    marked = {target: _marked(target, before, after) for target in targets}
    return ModelPair(before, after, tuple(names), slice_number, marked, keys)


def _check_sliced(slices: Mapping[tuple[str, int], str], old: Predictions) -> None:
    sliced: dict[str, set[int]] = {}
    for split, at in slices:
        sliced.setdefault(split, set()).add(at)
    for split in sorted(sliced):
        apart = sorted(sliced[split] ^ old.splits.get(split, {}).keys())
        if apart:
            raise ConfigurationError(
                f"`slices`: {len(apart):,} samples of `{split}` are in only one of the files "
                f"`slices` and `old` ({', '.join(map(str, apart[:5]))}).",
                "give a line for each sample that `old` predicts; "
                "leave `slice` empty for a sample in no slice.",
            )


def _marked(target: Target, before: SampleResults, after: SampleResults) -> Tensor:
    """Selects the samples of a target."""
    label: Tensor | None = after.label
    if (before.prediction[before.passed] < 0).any():
        label = None  # the files have no classes
    try:
        return target.select(Batch((), None, torch.arange(len(after))), label, None)
    except TargetError as error:
        raise ConfigurationError(
            f"the rule `protected:{target}`: the files do not say which samples it protects "
            f"({error.problem})",
            "give the column `prediction`, which tells the classes, "
            "or a file of ids, `protected:ids.csv`.",
        ) from error


def check_splits(
    argument: str, asked: Sequence[str], known: Sequence[str], hint: str = "name one of these."
) -> tuple[str, ...]:
    """Returns `asked`, or `known` if `asked` is empty.

    Raises:
        ConfigurationError: an asked split is not known.
    """
    for name in asked:
        if name not in known:
            raise ConfigurationError(
                f"`{argument}` names the split {name!r}, but the data have {list(known)}.",
                hint,
            )
    return tuple(asked) or tuple(known)


def check_missing(
    old: Predictions, new: Predictions, allowed: Collection[str] = ()
) -> dict[str, int]:
    """Counts the samples that only `old` predicts, for each split that has such samples.

    Raises:
        ConfigurationError: `allowed` lacks such a split, or names a split that `old` lacks.
    """
    check_splits("allow_missing", tuple(allowed), tuple(old.splits))
    n_missing = {}
    for split, rows in old.splits.items():
        missing = sorted(rows.keys() - new.splits.get(split, {}).keys())
        if missing and split not in allowed:
            raise ConfigurationError(
                f"`new`: {len(missing):,} of {len(rows):,} samples of `{split}` that `old` "
                f"predicts are missing ({', '.join(map(str, missing[:5]))}), "
                "and any of them could be broken.",
                "predict them too; or delete their lines, or say that they may be missing: "
                f"`--allow_missing {split}`.",
            )
        if missing:
            n_missing[split] = len(missing)
    return n_missing
