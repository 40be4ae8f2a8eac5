"""What every benchmark asks a model for, and a model answers: how likely are the answers of these records?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.signals.records import Record


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


class Scorer(Protocol):
    """The teacher from its cache, or a student."""

    def scores(self, records: Sequence[Record]) -> list[Score] | None:
        """In the order of the records; None if this model cannot score them (a cache that does not hold them)."""
