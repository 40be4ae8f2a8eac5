"""What benchmarks ask a model for, and a model answers.

A benchmark whose first parameter is `model` asks how likely the answers of records are, which the teacher's cache knows of the
held-out ones. One whose first parameter is `live` asks what no cache holds: the teacher answers it in `evaluate-teacher`.

It gives figures by name; what is under `tasks` is by task, each with at least `accuracy`, `accuracy_interval` and `questions`;
what is under `records` is a list of `_records.Row`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.signals.records import Record

BINS = 15
"""Of the probability of the most likely token, evenly from 0 to 1."""
DECILES = 10
"""Of the teacher's entropy, over the held-out answers' positions."""
OCTAVES = 16
"""Of the position in the answer: 0, 1 and 2, 3 to 6, 7 to 14, ..."""
TOP = 5
"""Tokens whose sets are compared by the top-k agreement."""


@dataclass(frozen=True)
class Compared:
    """A model beside the cached teacher, at the positions at which both begin a token at the same byte."""

    by_entropy: np.ndarray  # float64 [DECILES, 5]
    """Positions, and the sums over them of KL(teacher || model) in nats, of the total variation, of whether both hold the same
    token to be the most likely, and of the share of the teacher's TOP tokens that are among the model's."""
    by_position: np.ndarray  # float64 [OCTAVES, 5]
    """The same by the position in the answer."""
    certainty: np.ndarray  # float64 [5]
    """Sums of x, y, x^2, y^2 and xy: the probabilities that teacher and model give to what they hold to be the most likely."""

    @property
    def total(self) -> np.ndarray:
        """float64 [5]: over all positions."""
        return self.by_position.sum(0)


@dataclass(frozen=True)
class Score:
    """A model's word on one record's answer."""

    logprob: float
    """Of the answer and its end, nats."""
    tokens: int
    """Of the answer and its end, in the model's own tokens."""
    answer_bytes: int
    compared: Compared | None = None
    """None where there is nothing to compare."""
    certainty: np.ndarray | None = None  # float64 [BINS, 4]
    """By the probability of the most likely token: how many of the answer's positions, the sum of these probabilities, how
    often that token follows, and the sum of the squares of what the two differ by. None if it is not known."""


class Scorer(Protocol):
    """The teacher from its cache, or a student."""

    def scores(self, records: Sequence[Record]) -> list[Score] | None:
        """In the order of the records; None if this model cannot score them (a cache that does not hold them)."""


class Live(Protocol):
    """A model that can be asked anything, or what it was asked once."""

    cut: int
    """How many contexts were longer than it reads, and lost their beginning."""

    def loglikelihoods(self, asked: Sequence[tuple[str, str]]) -> list[tuple[float, bool]] | None:
        """Of each (context, continuation), in order: the continuation's log-probability in nats, and whether it is the most likely
        one token by token. None if nobody has asked this model."""

    def generations(self, records: Sequence[Record], max_tokens: int) -> Sequence[tuple[str, bool] | None] | None:
        """Of each record's question, in order: the answer, always the most likely token next, and whether it came to its end. None
        for a record that this model was not asked, or for all."""
