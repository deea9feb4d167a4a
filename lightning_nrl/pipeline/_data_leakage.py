"""Held-out samples that are known too: counts on these data would be too good."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_nrl._utils.distributed import Collective
from lightning_nrl.data import Source
from lightning_nrl.data.batch import RecordingSource
from lightning_nrl.data.sample_identity import Identified, content_recorder, is_among
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.report import Role

__all__ = ["LeakCheck"]

MAX_LISTED_IDS = 10
"""Samples that a message names."""


class LeakCheck:
    """Looks for samples of held-out data that are known too, while the model runs over all data anyway.

    Samples are the same if they are one place of one data set, seen through subsets and unions, or if their inputs and
    truths are alike to the bit.
    """

    def __init__(self, known: Sequence[Source], held_out: Mapping[Role, Sequence[Source]]) -> None:
        watched = any(held_out.values())
        self.known: Sequence[Source] = [content_recorder(source) for source in known] if watched else known
        self.held_out: dict[Role, Sequence[Source]] = {
            role: [content_recorder(source) for source in sources] for role, sources in held_out.items()
        }

    def leaked(self, collective: Collective) -> dict[str, int]:
        """How many samples of each unseen split are known too, or calibrate; to be called after a pass over all data.

        Warns:
            DataWarning: there are some.

        Raises:
            ConfigurationError: calibration samples are known too. They say nothing of data to come.
        """
        found: dict[str, int] = {}
        others = [source for source in self.known if isinstance(source, RecordingSource)]
        for role in ("calibration", "unseen"):
            own = [source for source in self.held_out.get(role, ()) if isinstance(source, RecordingSource)]
            for source in own:
                again = _again(source, others, collective)
                if not again.any():
                    continue
                ids = source.index[again].tolist()
                some = f"{ids[:MAX_LISTED_IDS]}{' ...' if len(ids) > MAX_LISTED_IDS else ''}"
                what = f"{len(ids):,} of the {len(again):,} samples of `{source.split}` are"
                if role == "calibration":
                    raise ConfigurationError(
                        f"`calibration`: {what} known data too ({some}).",
                        "leave them out, from one or the other: a bound holds only of samples that nothing has read.",
                    )
                found[source.split] = len(ids)
                problem = f"`unseen`: {what} known or calibration data too ({some})."
                hint = "leave them out: the counts on unseen data are better than they would be on new data."
                warnings.warn(DataWarning(problem, hint), stacklevel=4)
            others += own
        return found


def _again(source: RecordingSource, others: Sequence[RecordingSource], collective: Collective) -> Tensor:
    """Which samples of a source are among those of others, `n` bool, the same on every rank."""
    keys = source.gathered(collective)
    again = is_among(keys, torch.cat([other.gathered(collective) for other in others]))
    identified = [other.source.identity for other in others if isinstance(other.source, Identified)]
    if isinstance(source.source, Identified) and identified:
        again |= is_among(source.source.identity, torch.cat(identified))
    return again
