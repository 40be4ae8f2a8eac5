import math

import pytest

from pipeline.benchmarks._scores import Score
from pipeline.benchmarks.fidelity import fidelity
from pipeline.benchmarks.multiple_choice import multiple_choice
from pipeline.benchmarks.perplexity import perplexity
from pipeline.signals.records import Record, Segment


def question(n: int, right: int) -> Record:
    options = ("short", "a much longer option", "mid size")
    return Record(f"q{n}", (Segment("user", f"Q{n}?"), Segment("assistant", options[right])), options=options, answer_index=right)


QUESTIONS = [question(n, n % 3) for n in range(30)]


class Model:
    """Gives each answer the log-probability that `likes` says."""

    def __init__(self, likes):
        self._likes = likes

    def scores(self, records):
        return [Score(self._likes(record), 2, len(record.segments[-1].text.encode()), 0.5, 1, 2) for record in records]


def is_right(record: Record) -> bool:
    return record.choice_of is None


@pytest.mark.parametrize(
    ("likes", "accuracy"),
    [
        (lambda record: 0.0 if is_right(record) else -50.0, 1.0),  # an oracle
        (lambda record: -50.0 if is_right(record) else 0.0, 0.0),
        (lambda record: -0.1 * len(record.segments[-1].text) * (1 + (record.segments[-1].text != "mid size")), 1 / 3),  # always the same
    ],
)
def test_accuracy_of_an_oracle_its_opposite_and_a_constant(likes, accuracy):
    result = multiple_choice(Model(likes), QUESTIONS)
    assert result["accuracy"] == pytest.approx(accuracy)
    low, high = result["accuracy_interval"]
    assert low <= accuracy <= high
    assert result["questions"] == 30


def test_length_does_not_decide():
    """The same log-probability per byte everywhere but a little more on the right one; summed, the shortest would win."""
    per_byte = Model(lambda record: -(1.0 - 0.01 * is_right(record)) * len(record.segments[-1].text))
    assert multiple_choice(per_byte, QUESTIONS)["accuracy"] == 1.0


def test_bits_per_byte_and_perplexity_by_hand():
    records = QUESTIONS[:1]
    result = perplexity(Model(lambda record: -3.0), records)
    assert result["bits_per_byte"] == pytest.approx(3.0 / math.log(2) / 5)
    assert result["perplexity"] == pytest.approx(math.exp(1.5))
    assert fidelity(Model(lambda record: -3.0), records) == {"kl_to_teacher": 0.25, "top1_agreement": 0.5, "aligned_positions": 2}


def test_a_model_that_cannot_score_has_no_figures():
    class Silent:
        def scores(self, records):
            return None

    assert multiple_choice(Silent(), QUESTIONS)["accuracy"] is None
    assert perplexity(Silent(), QUESTIONS)["bits_per_byte"] is None
    assert fidelity(Silent(), QUESTIONS)["kl_to_teacher"] is None
