"""What a record of the training says of the targets: which were never learnt, and which were learnt and forgotten."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_nrl.analysis.diagnosis.diagnosis_result import DoubtfulLabel
from lightning_nrl.evaluation import SampleResults
from lightning_nrl.localization import TrainingRecord

__all__ = ["history_notes"]

MOST_NAMED = 10
"""Samples that a sentence names."""


def history_notes(record: TrainingRecord, results: SampleResults, doubts: Sequence[DoubtfulLabel]) -> tuple[str, ...]:
    """Sentences for a diagnosis; one that says so where no target is in the record.

    A target that was never right at any point, and whose neighbours agree with the model rather than with its label,
    most likely has a wrong label: what is mislabelled is learnt last (Toneva et al. 2019; Pleiss et al. 2020).
    """
    seen, never, lost = 0, [], 0
    for split in results.splits:
        if split not in record.splits:
            continue
        found = record.splits[split]
        places = {index: i for i, index in enumerate(found.index.tolist())}
        never_learned, forgotten = found.never_learned.tolist(), found.forgotten.tolist()
        for index in results.index[results.of(split)][results.targeted[results.of(split)]].tolist():
            if (place := places.get(index)) is not None:
                seen += 1
                never += [(split, index)] if never_learned[place] else []
                lost += forgotten[place] > 0
    if not seen:
        names = " and ".join(record.splits)
        return (f"The history of the training has no target: it records {names}.",)
    points = len(record.points)
    notes = [
        f"In the history of the training, {points} points, {len(never):,} of {seen:,} targets were never right, and "
        f"{lost:,} were forgotten at least once."
    ]
    doubted = [(doubt.split, doubt.id) for doubt in doubts if (doubt.split, doubt.id) in set(never)]
    if doubted:
        named = ", ".join(f"{split} {index}" for split, index in doubted[:MOST_NAMED])
        more = f" and {len(doubted) - MOST_NAMED:,} more" if len(doubted) > MOST_NAMED else ""
        notes.append(
            f"Never right, and their neighbours agree with the model: look first at the labels of {named}{more}."
        )
    return tuple(notes)
