"""What every benchmark asks a model for, and a model answers: how likely are the answers of these records?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.signals.records import Record

BINS = 15
"""Of the probability of the most likely token, evenly from 0 to 1."""


@dataclass(frozen=True)
class Score:
    """A model's word on one record's answer."""

    logprob: float
    """Of the answer and its end, nats."""
    tokens: int
    """Of the answer and its end, in the model's own tokens."""
    answer_bytes: int
    kl: float = 0.0
    """KL(teacher || model) summed over the aligned positions, nats."""
    agreeing: int = 0
    """Aligned positions at which both hold the same token to be the most likely."""
    aligned: int = 0
    certainty: np.ndarray | None = None  # float64 [BINS, 3]
    """By the probability of the most likely token: how many of the answer's positions, the sum of these probabilities, and how
    often that token follows. None if it is not known."""


class Scorer(Protocol):
    """The teacher from its cache, or a student."""

    def scores(self, records: Sequence[Record]) -> list[Score] | None:
        """In the order of the records; None if this model cannot score them (a cache that does not hold them)."""
