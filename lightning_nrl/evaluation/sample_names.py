"""Names of samples, such as file names, which reports show beside positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_nrl.data.batch import Source
from lightning_nrl.data.columns import find_column
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.slices import SliceRecorder

READ_AT_ONCE = 16  # small, since inputs are read with the names


def sample_names(
    sample_id: object, source: Source, ids: Sequence[int], evaluator: Evaluator
) -> list[str]:
    """Reads the samples at some data-set positions again and returns their names.

    An empty text stands for no name. The first sample is read in any case, so that a wrong column
    is found early.
    """
    column = find_column("sample_id", sample_id)
    recorder = SliceRecorder(source, column, evaluator.task, "sample_id")

    def read() -> dict[int, str]:
        names: dict[int, str] = {}
        is_wanted = torch.isin(source.index[source.positions], torch.tensor(ids, dtype=torch.int64))
        is_wanted[:1] = True
        positions = source.positions[is_wanted]
        for batch in source.draw(positions.split(READ_AT_ONCE) if len(positions) else ()):
            read_ids = source.index[batch.position].tolist()
            names |= zip(read_ids, recorder.names(batch), strict=True)
        return names

    ranks = evaluator.collective
    by_id: dict[int, str] = {}
    for names in ranks.gather_objects(
        ranks.all_or_none(read, "names of samples could not be read on another rank.")
    ):
        by_id |= names
    return [by_id[position] for position in ids]
