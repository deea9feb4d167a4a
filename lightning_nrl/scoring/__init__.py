"""Scoring of candidates: known data is recorded once and replayed from the repaired layer on, for many at once."""

from lightning_nrl.scoring.passes import SiteEdit
from lightning_nrl.scoring.recording import Chunk, Recording, record
from lightning_nrl.scoring.scorer import SampleScores, SwarmScorer, make_scorer
from lightning_nrl.scoring.scores import Scorer, Scores
from lightning_nrl.scoring.sparse import SiteChange, make_changes

__all__ = [
    "Chunk",
    "Recording",
    "SampleScores",
    "Scorer",
    "Scores",
    "SiteChange",
    "SiteEdit",
    "SwarmScorer",
    "make_changes",
    "make_scorer",
    "record",
]
