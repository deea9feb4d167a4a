"""A search in progress as plain values and records, and back: between two iterations it can go on from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.saved_values import record_fields
from lightning_nrl.search.scores import Scores
from lightning_nrl.search.search_log import SearchLog
from lightning_nrl.search.searcher import RandomStreams, SearchState


@dataclass
class SearchCourse:
    """All that changes while a search goes on.

    Attributes:
        state: of the searcher.
        streams: of random numbers.
        log: the history and the best candidates so far.
        before: scores of the original weights, `S x 1`.
        original_fitness: `S`, their fitness.
        seconds: that were spent on it in an earlier process.
    """

    state: Any
    streams: RandomStreams
    log: SearchLog
    before: Scores
    original_fitness: Tensor
    seconds: float = 0.0

    def saved(self, original: Tensor, seconds: float) -> dict[str, Any]:
        """What `restored` makes the same course of; `original` are the weights where it began."""
        return {
            "original": original,
            "state": record_fields(self.state),
            "streams": self.streams.state(),
            "log": self.log.saved(),
            "before": self.before,
            "original_fitness": self.original_fitness,
            "seconds": self.seconds + seconds,
        }

    @classmethod
    def restored(
        cls, left: Any, original: Tensor, first: SearchState, streams: RandomStreams, log: SearchLog
    ) -> SearchCourse | None:
        """A course that was saved, given its beginning; None where it began at other weights."""
        if left is None or not torch.equal(left["original"].to(original), original):
            return None
        streams.restore(left["streams"])
        log.restore(left["log"])
        state = type(first)(**left["state"])
        return cls(state, streams, log, left["before"], left["original_fitness"], left["seconds"])
