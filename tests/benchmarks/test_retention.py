"""What was kept of the teacher: by hand, against other implementations, and where there is little or nothing to compare."""

import json
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.benchmarks import _bootstrap
from pipeline.benchmarks._bootstrap import interval, resampled
from pipeline.benchmarks._records import HELDOUT, Row
from pipeline.benchmarks._retention import mcnemar, retention


def row(number: int, task: str = HELDOUT, digest: str = "d", **columns: Any) -> Row:
    return Row(f"r{number:04}", digest, None, "", columns, task)


def questions(right: Sequence[int], task: str = "anatomy", confidence: Sequence[float] | None = None) -> list[Row]:
    return [row(n, task, right=bool(value), confidence=confidence[n] if confidence else 0.5) for n, value in enumerate(right)]


def entry_of(found: list[dict], task: str, figure: str = "accuracy") -> dict:
    (entry,) = [one for one in found if (one["task"], one["figure"]) == (task, figure)]
    return entry


T = [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
S = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
B = [1, 1, 1, 0, 0, 0, 1, 0, 0, 0]
THREE = {"teacher": questions(T), "distilled": questions(S), "student_before": questions(B)}


def test_accuracies_by_hand():
    (entry,) = retention(THREE)
    assert (entry["task"], entry["figure"], entry["better"], entry["baseline_model"]) == ("anatomy", "accuracy", "higher", "student_before")
    assert (entry["records"], entry["left_out"]) == (10, 0)
    assert (entry["teacher"], entry["student"], entry["baseline"]) == (0.8, 0.6, 0.4)
    assert entry["student_minus_baseline"]["value"] == pytest.approx(0.2)
    assert entry["retention"]["value"] == pytest.approx(0.75)
    assert entry["baseline_retention"]["value"] == pytest.approx(0.5)
    assert entry["recovered"] is None  # the teacher is 0.4 above the baseline, [0.1, 0.7], but 4 questions to none are no proof
    (entry,) = retention({model: questions(right * 2) for model, right in (("teacher", T), ("distilled", S), ("student_before", B))})
    assert entry["recovered"] == pytest.approx(0.5)  # 8 to none are
    (entry,) = retention(THREE)
    assert entry["mcnemar"] == {"baseline": {"only_student": 3, "only_other": 1, "p": 0.625}, "teacher": {"only_student": 0, "only_other": 2, "p": 0.5}}
    assert entry["confidence_correlation"] is None  # all 0.5
    assert (entry["not_seen"], entry["seen"]) == (None, None)
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry


def test_the_intervals_are_those_of_the_plain_bootstrap():
    (entry,) = retention(THREE)
    generator = np.random.default_rng(0)
    teacher, student, baseline = map(np.array, (T, S, B))
    drawn = [generator.integers(0, 10, 10) for _ in range(_bootstrap.RESAMPLES)]
    ratios = np.array([student[of].sum() / teacher[of].sum() for of in drawn])
    assert entry["retention"]["interval"] == pytest.approx(np.percentile(ratios, [2.5, 97.5]), abs=1e-9)
    apart = np.array([(student[of] - baseline[of]).mean() for of in drawn])
    assert entry["student_minus_baseline"]["interval"] == pytest.approx(np.percentile(apart, [2.5, 97.5]), abs=1e-9)


def test_figures_of_texts_by_hand():
    def texts(rouge: Sequence[float], followed: Sequence[int], tokens: Sequence[int], bits: Sequence[float]) -> list[Row]:
        return [
            row(n, rouge1=r, rouge2=r / 2, rougeL=r / 4, followed=f, tokens=t, logprob=-b * math.log(2), answer_bytes=10)
            for n, (r, f, t, b) in enumerate(zip(rouge, followed, tokens, bits, strict=True))
        ]

    models = {
        "teacher": texts([0.5, 0.7], [8, 6], [10, 10], [5.0, 15.0]),
        "distilled": texts([0.3, 0.3], [2, 5], [4, 10], [20.0, 20.0]),
        "sft": texts([0.2, 0.2], [1, 1], [4, 10], [30.0, 30.0]),
        "student_before": texts([0.0, 0.0], [0, 0], [4, 10], [90.0, 90.0]),
    }
    found = retention(models)
    assert [(one["task"], one["figure"]) for one in found] == [(HELDOUT, figure) for figure in ("rouge1", "rouge2", "rougeL", "token_accuracy", "bits_per_byte")]
    for figure, share in (("rouge1", 1), ("rouge2", 2), ("rougeL", 4)):
        entry = entry_of(found, HELDOUT, figure)
        assert [entry[model] for model in ("teacher", "student", "baseline")] == pytest.approx([0.6 / share, 0.3 / share, 0.2 / share])
        assert entry["retention"]["value"] == pytest.approx(0.5)
        assert entry["baseline_model"] == "sft"
        assert entry["mcnemar"] is None
    followed = entry_of(found, HELDOUT, "token_accuracy")
    assert [followed[model] for model in ("teacher", "student", "baseline")] == pytest.approx([14 / 20, 7 / 14, 2 / 14])
    assert followed["retention"]["value"] == pytest.approx(5 / 7)
    bits = entry_of(found, HELDOUT, "bits_per_byte")
    assert [bits[model] for model in ("teacher", "student", "baseline")] == pytest.approx([1.0, 2.0, 3.0])
    assert bits["better"] == "lower"
    assert bits["retention"]["value"] == pytest.approx(0.5)  # teacher / student
    assert bits["baseline_retention"]["value"] == pytest.approx(1 / 3)
    assert bits["student_minus_baseline"]["value"] == pytest.approx(-1.0)
    assert bits["recovered"] == pytest.approx(0.5)
    low, high = bits["retention"]["interval"]
    assert (low, high) == pytest.approx((0.25, 0.75))  # twice the one record, twice the other


def some_models(seed: int, records: int = 40) -> dict[str, list[Row]]:
    generator = random.Random(seed)
    models = {}
    for model in ("teacher", "distilled", "sft"):
        rows = [row(n, task, right=generator.random() < 0.6, confidence=generator.random()) for task in ("anatomy", "virology") for n in range(records)]
        rows += [row(n, rouge1=generator.random(), followed=generator.randrange(9), tokens=9, logprob=-generator.random(), answer_bytes=generator.randrange(1, 20)) for n in range(records)]
        models[model] = rows
    return models


def test_the_order_of_the_rows_and_models_changes_nothing():
    models = some_models(0)
    groups = {"all": ["anatomy", "virology"]}
    generator = random.Random(1)
    mixed = {model: generator.sample(models[model], len(models[model])) for model in reversed(models)}
    assert retention(models, groups) == retention(mixed, {"all": ["virology", "anatomy"]})
    assert retention(models, groups) != retention(some_models(2), groups)  # control


def test_rows_of_several_benchmarks_on_a_record_are_one():
    apart = {model: [row(n, right=True, confidence=0.1 * n) for n in range(4)] + [row(n, rouge1=0.5) for n in range(4)] for model in ("teacher", "distilled")}
    together = {model: [row(n, right=True, confidence=0.1 * n, rouge1=0.5) for n in range(4)] for model in ("teacher", "distilled")}
    assert retention(apart) == retention(together)
    assert [one["figure"] for one in retention(apart)] == ["accuracy", "rouge1"]


def test_identical_models_keep_all_of_it_to_the_last_digit():
    models = some_models(3)
    same = {"teacher": models["teacher"], "distilled": list(models["teacher"]), "sft": list(models["teacher"])}
    for entry in retention(same, {"all": ["anatomy", "virology"]}):
        assert entry["retention"] == {"value": 1.0, "interval": [1.0, 1.0]}
        assert entry["student_minus_baseline"] == {"value": 0.0, "interval": [0.0, 0.0]}
        assert entry["recovered"] is None  # there is nothing between teacher and baseline
        if entry["figure"] == "accuracy":
            assert entry["mcnemar"]["baseline"] == {"only_student": 0, "only_other": 0, "p": 1.0}
            assert entry["confidence_correlation"] == pytest.approx(1.0)


def test_pairs_tell_what_control_unpaired_cannot():
    """Some questions are hard for all models: what they share falls out of the difference and the ratio."""
    generator = np.random.default_rng(4)
    hard = generator.random(200)
    right = {model: (hard + generator.normal(0, 0.05, 200) < level).astype(int) for model, level in (("teacher", 0.8), ("distilled", 0.6), ("student_before", 0.5))}
    (entry,) = retention({model: questions(of.tolist()) for model, of in right.items()})
    alone = [resampled(right[model][:, None], np.ones((200, 1)), stream=stream)[:, 0] for stream, model in enumerate(right, 1)]
    for paired, unpaired in ((entry["retention"]["interval"], interval(alone[1] / alone[0])), (entry["student_minus_baseline"]["interval"], interval(alone[1] - alone[2]))):
        assert unpaired
        assert paired[1] - paired[0] < 0.7 * (unpaired[1] - unpaired[0])


def test_19_of_20_intervals_of_the_retention_hold_what_is_true(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_bootstrap.resampled, "__defaults__", (400, 0))
    generator, held, runs = np.random.default_rng(5), 0, 300
    for _ in range(runs):
        hard = generator.random(150)
        rows = {"teacher": hard < 0.75, "distilled": np.where(generator.random(150) < 0.9, hard < 0.5, hard > 0.5)}
        (entry,) = retention({model: questions(right.tolist()) for model, right in rows.items()})
        low, high = entry["retention"]["interval"]
        held += low <= (0.9 * 0.5 + 0.1 * 0.5) / 0.75 <= high
    assert 0.91 <= held / runs <= 0.98


def test_a_student_that_is_better_wherever_they_differ():
    (entry,) = retention({"teacher": questions([1] * 12), "distilled": questions([1] * 12), "sft": questions([1] * 2 + [0] * 10)})
    assert entry["mcnemar"]["baseline"] == {"only_student": 10, "only_other": 0, "p": pytest.approx(2 / 2**10)}
    assert entry["recovered"] == 1.0


def test_a_teacher_that_gets_nothing_right_divides_nothing():
    (entry,) = retention({"teacher": questions([0] * 5), "distilled": questions([1, 0, 0, 0, 0]), "sft": questions([0] * 5)})
    assert (entry["teacher"], entry["retention"], entry["baseline_retention"], entry["recovered"]) == (0.0, None, None, None)
    assert entry["student_minus_baseline"]["value"] == pytest.approx(0.2)
    rarely = retention({"teacher": questions([1] + [0] * 9), "distilled": questions([1] * 10)})[0]["retention"]
    assert rarely == {"value": pytest.approx(10), "interval": None}  # in a third of the resamples there is no ratio
    json.dumps([entry, rarely], allow_nan=False)


def test_of_one_question_there_are_figures_and_no_intervals():
    (entry,) = retention({"teacher": questions([1]), "distilled": questions([1]), "sft": questions([0])})
    assert entry["retention"] == {"value": 1.0, "interval": None}
    assert entry["student_minus_baseline"] == {"value": 1.0, "interval": None}
    assert (entry["recovered"], entry["confidence_correlation"], entry["mcnemar"]["baseline"]["p"]) == (None, None, 1.0)


def test_only_records_that_all_have_count():
    models = {
        "teacher": [*questions(T), row(100, "anatomy", right=True), row(0, "anatomy", digest="another", right=True)],
        "distilled": [*questions(S), row(101, "anatomy", right=True), row(102, "anatomy", rouge1=0.5)],
        "sft": questions(B)[:-1],
    }
    entry = entry_of(retention(models), "anatomy")
    assert (entry["records"], entry["left_out"]) == (9, 4)
    assert (entry["teacher"], entry["student"], entry["baseline"]) == pytest.approx((8 / 9, 6 / 9, 4 / 9))


def test_records_that_none_shares_leave_a_row_without_figures():
    (entry,) = retention({"teacher": [row(1, "anatomy", right=True)], "distilled": [row(2, "anatomy", right=True)]})
    assert (entry["records"], entry["left_out"], entry["teacher"], entry["student"], entry["retention"]) == (0, 2, None, None, None)
    assert entry["mcnemar"] == {"baseline": None, "teacher": None}


def test_what_is_no_number_is_left_out_and_counted():
    columns = [{"logprob": -1.0, "answer_bytes": 4}, {"logprob": -math.inf, "answer_bytes": 4}, {"logprob": None, "answer_bytes": 4}]
    models = {"teacher": [row(n, logprob=-1.0, answer_bytes=4) for n in range(3)], "distilled": [row(n, **of) for n, of in enumerate(columns)]}
    (entry,) = retention(models)
    assert (entry["records"], entry["left_out"]) == (1, 2)


def test_without_the_teachers_rows_the_students_are_still_compared():
    both = {"distilled": questions(S), "sft": questions(B)}
    for models in (both, both | {"teacher": []}, both | {"teacher": [row(0, "virology", right=True)]}):
        (entry,) = retention(models)
        assert (entry["records"], entry["left_out"], entry["teacher"], entry["retention"], entry["recovered"], entry["confidence_correlation"]) == (10, 0, None, None, None, None)
        assert entry["student_minus_baseline"]["value"] == pytest.approx(0.2)
        assert entry["mcnemar"]["teacher"] is None
        assert entry["mcnemar"]["baseline"]["p"] == 0.625


def test_without_a_baseline_or_a_student():
    (entry,) = retention({"teacher": questions(T), "distilled": questions(S)})
    assert (entry["baseline_model"], entry["baseline"], entry["student_minus_baseline"], entry["baseline_retention"], entry["recovered"]) == (None,) * 5
    assert entry["mcnemar"]["baseline"] is None
    assert entry["retention"]["value"] == pytest.approx(0.75)
    assert retention({"teacher": questions(T), "sft": questions(B)}) == retention({}) == []


def test_a_group_is_all_questions_and_the_mean_of_its_tasks():
    models = {
        "teacher": questions([1] * 8 + [0] * 2, "big") + questions([1, 1], "small"),
        "distilled": questions([1] * 4 + [0] * 6, "big") + questions([1, 1], "small"),
    }
    found = retention(models, {"both": ["small", "big", "of which there is none"], "none": ["other"]})
    assert [one["task"] for one in found] == ["big", "small", "both"]
    both = found[-1]
    assert (both["records"], both["tasks"]) == (12, ["big", "small"])
    assert (both["teacher"], both["student"]) == pytest.approx((10 / 12, 6 / 12))
    assert both["retention"]["value"] == pytest.approx(0.6)
    assert both["mean_of_tasks"] == pytest.approx({"teacher": 0.9, "student": 0.7, "baseline": None, "retention": 0.7 / 0.9, "of_retentions": 0.75})
    assert "mean_of_tasks" not in found[0]


def test_seen_records_are_scored_apart():
    seen = {("anatomy", f"r{n:04}", "d"): n >= 6 for n in range(9)}  # of the last nothing is known
    (entry,) = retention(THREE, seen=seen)
    assert entry["not_seen"] == {"records": 6, "teacher": 1.0, "student": 1.0, "baseline": 0.5, "retention": 1.0}
    assert entry["seen"] == {"records": 3, "teacher": pytest.approx(2 / 3), "student": 0.0, "baseline": pytest.approx(1 / 3), "retention": 0.0}
    assert {key: value for key, value in entry.items() if "seen" not in key} == {key: value for key, value in retention(THREE)[0].items() if "seen" not in key}
    (clean,) = retention(THREE, seen=dict.fromkeys([*seen, ("anatomy", "r0009", "d")], False))
    assert clean["seen"] is None
    assert clean["not_seen"] == {"records": 10, "teacher": 0.8, "student": 0.6, "baseline": 0.4, "retention": pytest.approx(0.75)}
    (elsewhere,) = retention(THREE, seen={("virology", record, digest): True for _, record, digest in seen})
    assert (elsewhere["not_seen"], elsewhere["seen"]) == (None, None)


def test_whether_the_student_is_sure_where_its_teacher_is():
    teacher = [0.3, 0.9, 0.5, 0.7]

    def correlation(student: Sequence[float | None]) -> float | None:
        return retention({"teacher": questions([1] * 4, confidence=teacher), "distilled": questions([1] * 4, confidence=student)})[0]["confidence_correlation"]

    assert correlation([0.4, 0.7, 0.5, 0.6]) == pytest.approx(1.0)
    assert correlation([0.6, 0.3, 0.5, 0.4]) == pytest.approx(-1.0)
    assert correlation([0.4, 0.6, 0.9, 0.5]) == pytest.approx(np.corrcoef(teacher, [0.4, 0.6, 0.9, 0.5])[0, 1])
    assert correlation([0.4, None, None, 0.5]) == pytest.approx(1.0)
    assert correlation([0.1] * 4) is None
    assert correlation([None] * 4) is None


def p_of(b: int, c: int) -> float:
    return mcnemar(np.arange(b + c) < b, np.arange(b + c) >= b)["p"]


@pytest.mark.parametrize(("b", "c", "p"), [(0, 0, 1.0), (1, 0, 1.0), (0, 2, 0.5), (5, 0, 2 / 32), (1, 5, 2 * 7 / 64), (3, 3, 1.0), (2, 8, 2 * 56 / 1024)])
def test_mcnemar_by_hand(b: int, c: int, p: float):
    assert p_of(b, c) == p_of(c, b) == pytest.approx(p, rel=1e-14)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_binomial_test_to_the_last_digits(b: int, c: int):
    exact = min(2 * sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c), 1)
    assert p_of(b, c) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("b", "c"), [(0, 7), (12, 30), (480, 520), (4_900, 5_300), (50_000, 50_000), (49_500, 50_500), (47_000, 53_000)])
def test_mcnemar_is_that_of_scipy_and_fast(b: int, c: int):
    stats = pytest.importorskip("scipy.stats")
    begin = time.process_time()
    found = p_of(b, c)
    assert time.process_time() - begin < 5
    assert found == pytest.approx(stats.binomtest(b, b + c).pvalue, rel=1e-9)


def test_mcnemar_of_what_is_beyond_all_doubt():
    assert p_of(0, 100_000) == 0.0
    assert 0 < p_of(0, 1_000) < 1e-300


def test_mcnemar_is_right_about_nothing_no_more_often_than_it_says():
    """Two models that are equally good: of 20, at most one p is below 0.05."""
    generator = np.random.default_rng(6)
    found = [mcnemar(generator.random(60) < 0.5, generator.random(60) < 0.5)["p"] for _ in range(2000)]
    assert np.mean(np.array(found) < 0.05) < 0.055
    better = [mcnemar(generator.random(60) < 0.8, generator.random(60) < 0.4)["p"] for _ in range(200)]
    assert np.mean(np.array(better) < 0.05) > 0.9
