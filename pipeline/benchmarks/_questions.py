"""Questions with options: how often the right one was chosen, and whether the model knew when it did not know."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.benchmarks._records import HELDOUT, Row

Z = 1.959963984540054
"""Of the normal distribution 95 % lie between -Z and Z."""
BINS = 10
"""Of the confidence, evenly from 0 to 1."""
COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of the questions that are answered, the most confident first."""


@dataclass(frozen=True)
class Answered:
    """One question and what a model made of it."""

    record: str
    digest: str
    specialty: str | None
    text: str
    """The question, without its options."""
    logprobs: list[float]
    """Of each option, as far as they decide, nats."""
    chosen: int
    answer: int
    task: str = HELDOUT

    @property
    def right(self) -> bool:
        return self.chosen == self.answer

    def probabilities(self) -> np.ndarray:
        """float64 [options]: their likelihoods, made to sum to 1."""
        shifted = np.exp(np.array(self.logprobs) - max(self.logprobs))
        return shifted / shifted.sum()

    @property
    def confidence(self) -> float:
        """The chosen option's probability."""
        return float(self.probabilities()[self.chosen])


def figures_of(questions: Sequence[Answered]) -> dict[str, Any]:
    """Accuracy with its 95 % interval (Wilson) and the accuracy of chance; calibration error (ECE), Brier score (Brier 1950, summed
    over the options), and the accuracy on the questions that the model is most confident of. At least one question."""
    right = np.array([question.right for question in questions])
    confidence = np.array([question.confidence for question in questions])
    place = np.clip((confidence * BINS).astype(np.int64), 0, BINS - 1)
    bins = np.stack([np.bincount(place, weights=weights, minlength=BINS) for weights in (np.ones(len(place)), confidence, right.astype(np.float64))], 1)
    return {
        "accuracy": float(right.mean()),
        "accuracy_interval": list(wilson(int(right.sum()), len(right))),
        "questions": len(questions),
        "chance": float(np.mean([1 / len(question.logprobs) for question in questions])),
        "calibration_error": float(np.abs(bins[:, 1] - bins[:, 2]).sum() / len(right)),
        "calibration": bins.tolist(),
        "brier": float(np.mean([_brier(question) for question in questions])),
        "abstaining": {f"{coverage:g}": float(_of_the_surest(right, confidence, coverage)) for coverage in COVERAGES},
    }


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927), which has a width also where none or all are right."""
    z2 = Z * Z
    middle, half = (right + z2 / 2) / (of + z2), Z / (of + z2) * math.sqrt(right * (of - right) / of + z2 / 4)
    return (middle - half if right else 0.0), (middle + half if right < of else 1.0)


def rows_of(questions: Sequence[Answered]) -> list[Row]:
    return [
        Row(
            question.record,
            question.digest,
            question.specialty,
            question.text,
            {"chosen": question.chosen, "answer": question.answer, "right": question.right, "confidence": question.confidence},
            question.task,
        )
        for question in questions
    ]


def _brier(question: Answered) -> float:
    wanted = np.zeros(len(question.logprobs))
    wanted[question.answer] = 1.0
    return float(((question.probabilities() - wanted) ** 2).sum())


def _of_the_surest(right: np.ndarray, confidence: np.ndarray, coverage: float) -> float:
    """Ties are shared: each of the equally sure counts with the share of them that are still answered."""
    answered = coverage * len(right)
    weight = np.zeros(len(right))
    for level in np.unique(confidence)[::-1]:
        alike = confidence == level
        weight[alike] = min(1.0, max(answered - weight.sum(), 0.0) / alike.sum())
    return float((weight * right).sum() / weight.sum())
