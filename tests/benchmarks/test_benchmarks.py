import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.benchmarks._questions import Answered, figures_of, wilson
from pipeline.benchmarks._records import RECORDS, as_table, row
from pipeline.benchmarks._scores import BINS, DECILES, OCTAVES, Compared, Score
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
        return [Score(self._likes(record), 2, len(record.segments[-1].text.encode()), COMPARED, certain((14, 1.0, 1.0), (3, 0.25, 0.0))) for record in records]


def compared(*positions: tuple[int, int, float, float, float, float]) -> Compared:
    """Positions: decile of the entropy, octave of the place, then what the five figures are but the count."""
    by_entropy, by_position = np.zeros((DECILES, 5)), np.zeros((OCTAVES, 5))
    for decile, octave, *figures in positions:
        by_entropy[decile] += 1, *figures
        by_position[octave] += 1, *figures
    return Compared(by_entropy, by_position, np.array([1.5, 1.0, 1.25, 0.68, 0.9]))


COMPARED = compared((0, 0, 0.1, 0.05, 1.0, 0.8), (9, 1, 0.4, 0.35, 0.0, 0.4))


def certain(*positions: tuple[int, float, float]) -> np.ndarray:
    """Positions: bin, probability, whether the token follows."""
    bins = np.zeros((BINS, 4))
    for place, probability, follows in positions:
        bins[place] += 1, probability, follows, (probability - follows) ** 2
    return bins


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
    kept = [one.columns for one in result["records"]]
    assert [one.record for one in result["records"]] == [question.id for question in QUESTIONS]
    assert all(one["right"] == (one["chosen"] == one["answer"] == record.answer_index) for record, one in zip(QUESTIONS, kept, strict=True))
    assert sum(one["right"] for one in kept) / 30 == pytest.approx(accuracy)
    assert result["tasks"]["multiple_choice"]["accuracy"] == result["accuracy"]
    assert result["tasks"]["multiple_choice"]["chance"] == pytest.approx(1 / 3)


def test_length_does_not_decide():
    """The same log-probability per byte everywhere but a little more on the right one; summed, the shortest would win."""
    per_byte = Model(lambda record: -(1.0 - 0.01 * is_right(record)) * len(record.segments[-1].text))
    assert multiple_choice(per_byte, QUESTIONS)["accuracy"] == 1.0


def test_bits_per_byte_and_perplexity_by_hand():
    records = QUESTIONS[:1]
    result = perplexity(Model(lambda record: -3.0), records)
    assert result["bits_per_byte"] == pytest.approx(3.0 / math.log(2) / 5)
    assert result["perplexity"] == pytest.approx(math.exp(1.5))
    assert result["token_accuracy"] == 0.5
    assert result["records"] == [row(records[0], logprob=-3.0, tokens=2, answer_bytes=5, followed=1)]


def test_fidelity_by_hand():
    found = fidelity(Model(lambda record: -3.0), [replace(QUESTIONS[0], specialty="eye"), QUESTIONS[1]])
    assert found["aligned_positions"] == 4
    figures = {"kl_to_teacher": 0.25, "total_variation": 0.2, "top1_agreement": 0.5, "top5_agreement": 0.6}
    assert {name: found[name] for name in figures} == pytest.approx(figures)
    parts = found["fidelity"]
    assert parts["by_specialty"].keys() == {"eye", ""}
    assert parts["by_specialty"]["eye"] == pytest.approx(figures | {"positions": 2})
    assert [part["positions"] for part in parts["by_entropy"]] == [2, *[0] * 8, 2]
    assert parts["by_entropy"][9]["kl_to_teacher"] == pytest.approx(0.4)
    assert parts["by_entropy"][5]["kl_to_teacher"] is None
    assert [(part["from"], part["positions"]) for part in parts["by_position"]] == [(0, 2), (1, 2)]
    assert parts["by_position"][1]["total_variation"] == pytest.approx(0.35)
    # the two positions of a record have certainties x and y with these sums
    assert found["confidence_correlation"] == pytest.approx(np.corrcoef([1.0, 0.5], [0.8, 0.2])[0, 1])
    kept = found["records"][0].columns
    assert kept == pytest.approx({"aligned": 2, "kl": 0.5, "total_variation": 0.4, "agreeing": 1, "top_agreeing": 1.2})


def test_a_model_that_cannot_score_has_no_figures():
    class Silent:
        def scores(self, records):
            return None

    assert multiple_choice(Silent(), QUESTIONS)["accuracy"] is None
    assert perplexity(Silent(), QUESTIONS)["bits_per_byte"] is None
    assert fidelity(Silent(), QUESTIONS)["kl_to_teacher"] is None
    assert calibration(Silent(), QUESTIONS) == {"calibration_error": None, "brier": None, "calibration": None}


def test_the_calibration_error_by_hand():
    class Sure:
        def scores(self, records):
            return [Score(-1.0, 2, 3, certainty=bins) for bins in (certain((14, 1.0, 1.0), (14, 1.0, 0.0)), certain((3, 0.25, 0.0), (3, 0.25, 1.0)))]

    found = calibration(Sure(), QUESTIONS[:2])
    assert found["calibration_error"] == pytest.approx((2 * 0.5 + 2 * 0.25) / 4)
    assert found["brier"] == pytest.approx((0.0 + 1.0 + 0.0625 + 0.5625) / 4)
    assert found["calibration"][14] == [2, 2.0, 1.0]
    assert found["calibration"][3] == [2, 0.5, 1.0]
    assert sum(part[0] for part in found["calibration"]) == 4


def answered(*confidences_and_right: tuple[float, bool]) -> list[Answered]:
    """Questions of two options, the first of which is chosen with this confidence."""
    return [Answered(f"q{n}", "", None, "", [math.log(sure), math.log1p(-sure)], 0, 0 if right else 1) for n, (sure, right) in enumerate(confidences_and_right)]


def test_what_a_model_knows_of_its_answers_by_hand():
    found = figures_of(answered((0.9, True), (0.8, True), (0.7, False), (0.6, False)))
    assert found["accuracy"] == 0.5
    assert found["chance"] == 0.5
    assert found["calibration_error"] == pytest.approx((0.1 + 0.2 + 0.7 + 0.6) / 4)
    assert found["brier"] == pytest.approx(2 * (0.01 + 0.04 + 0.49 + 0.36) / 4)
    assert found["abstaining"]["1"] == 0.5
    assert found["abstaining"]["0.5"] == 1.0
    assert found["abstaining"]["0.7"] == pytest.approx(2 / 2.8)
    assert sum(part[0] for part in found["calibration"]) == 4


def test_the_interval_of_a_share_has_a_width_at_its_ends():
    # Newcombe 1998, table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


def test_a_question_that_a_file_has_twice_counts_once(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "Q?", "options": ["short", "mid size"], "answer_idx": 0, "id": "%s"}\n' * 2 % ("a", "b"))
    found = multiple_choice(Model(lambda record: -1.0), [], path=str(tmp_path / "q.jsonl"), fields={"user": "question", "options": "options", "answer_index": "answer_idx", "id": "id"})
    assert found["questions"] == 1
    assert [one.task for one in found["records"]] == ["multiple_choice"]


def test_questions_that_a_model_is_equally_sure_of_are_left_out_alike():
    for order in ((True, False, True, False), (False, True, False, True)):
        assert figures_of(answered(*((0.75, right) for right in order)))["abstaining"]["0.5"] == 0.5


def test_an_option_that_is_out_of_the_question_takes_nothing_from_the_others():
    one = Answered("q", "", None, "", [-1.0, -1.0, -1e9], 0, 0)
    assert one.probabilities().tolist() == [0.5, 0.5, 0.0]


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
