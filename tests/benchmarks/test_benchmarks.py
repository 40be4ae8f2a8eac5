import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.benchmarks._records import RECORDS, as_table
from pipeline.benchmarks._scores import BINS, Score
from pipeline.benchmarks.calibration import calibration
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
    assert [record for record, _ in result["records"]] == QUESTIONS
    assert all(kept["right"] == (kept["chosen"] == kept["answer"] == record.answer_index) for record, kept in result["records"])
    assert sum(kept["right"] for _, kept in result["records"]) / 30 == pytest.approx(accuracy)


def test_length_does_not_decide():
    """The same log-probability per byte everywhere but a little more on the right one; summed, the shortest would win."""
    per_byte = Model(lambda record: -(1.0 - 0.01 * is_right(record)) * len(record.segments[-1].text))
    assert multiple_choice(per_byte, QUESTIONS)["accuracy"] == 1.0


def test_bits_per_byte_and_perplexity_by_hand():
    records = QUESTIONS[:1]
    result = perplexity(Model(lambda record: -3.0), records)
    assert result["bits_per_byte"] == pytest.approx(3.0 / math.log(2) / 5)
    assert result["perplexity"] == pytest.approx(math.exp(1.5))
    assert result["records"] == [(records[0], {"logprob": -3.0, "tokens": 2, "answer_bytes": 5})]
    kept = [(records[0], {"kl": 0.5, "agreeing": 1, "aligned": 2})]
    assert fidelity(Model(lambda record: -3.0), records) == {"kl_to_teacher": 0.25, "top1_agreement": 0.5, "aligned_positions": 2, "records": kept}


def test_a_model_that_cannot_score_has_no_figures():
    class Silent:
        def scores(self, records):
            return None

    assert multiple_choice(Silent(), QUESTIONS)["accuracy"] is None
    assert perplexity(Silent(), QUESTIONS)["bits_per_byte"] is None
    assert fidelity(Silent(), QUESTIONS)["kl_to_teacher"] is None
    assert calibration(Silent(), QUESTIONS) == {"calibration_error": None, "calibration": None}


def certain(*positions: tuple[int, float, float]) -> Score:
    """Positions: bin, probability, whether the token follows."""
    bins = np.zeros((BINS, 3))
    for place, probability, follows in positions:
        bins[place] += 1, probability, follows
    return Score(-1.0, len(positions), 3, certainty=bins)


def test_the_calibration_error_by_hand():
    class Sure:
        def scores(self, records):
            return [certain((14, 1.0, 1.0), (14, 1.0, 0.0)), certain((3, 0.25, 0.0), (3, 0.25, 1.0))]

    found = calibration(Sure(), QUESTIONS[:2])
    assert found["calibration_error"] == pytest.approx((2 * 0.5 + 2 * 0.25) / 4)
    assert found["calibration"][14] == [2, 2.0, 1.0]
    assert found["calibration"][3] == [2, 0.5, 1.0]
    assert sum(part[0] for part in found["calibration"]) == 4


def test_what_benchmarks_keep_of_a_record_stands_in_one_row_and_another_text_of_its_id_in_another():
    like = Model(lambda record: -3.0)
    other = replace(QUESTIONS[0], segments=(Segment("user", "Another?"), Segment("assistant", "short")))
    kept = [*perplexity(like, QUESTIONS)["records"], *fidelity(like, QUESTIONS)["records"], *multiple_choice(like, [*QUESTIONS[:5], other])["records"]]
    table = as_table({"distilled": kept, "sft": kept[:30]})
    assert table.schema.equals(RECORDS, check_metadata=True)
    rows = table.to_pylist()
    assert len(rows) == 31 + 30
    assert [row["record"] for row in rows[:30]] == [record.id for record in QUESTIONS]
    assert rows[0]["kl"] == 0.5
    assert rows[0]["logprob"] == -3.0
    assert rows[0]["right"] is not None
    assert rows[5]["right"] is None
    assert rows[30]["record"] == "q0"
    assert rows[30]["digest"] != rows[0]["digest"]
    assert rows[30]["kl"] is None
