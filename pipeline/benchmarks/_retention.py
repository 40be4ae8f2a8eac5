"""What the student kept of its teacher, task by task, and what of that the teacher's teaching brought."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.benchmarks._bootstrap import interval, resampled
from pipeline.benchmarks._records import FIGURES, Row, key_of

TEACHER, STUDENT, BASELINES = "teacher", "distilled", ("sft", "student_before")
ACCURACY = "accuracy"
LEVEL = 0.05
"""Of a test."""
LOWER_IS_BETTER = frozenset({"bits_per_byte"})
Key = tuple[str, str, str]
"""Task, record and digest: records are the same where all three agree."""
Kept = Mapping[Key, Mapping[str, Any]]
"""What benchmarks have said of each record, for one model."""

TOLD = ("accuracy", "rouge1", "rouge2", "rougeL", "token_accuracy", "bits_per_byte")
"""Of FIGURES, in the table's order; the others are about the teacher itself."""


def retention(models: Mapping[str, Sequence[Row]], groups: Mapping[str, Sequence[str]] = {}, seen: Mapping[Key, bool] | None = None) -> list[dict[str, Any]]:
    """Of each task and figure what teacher, baseline and distilled student reach on the same records, and the share of the teacher's that the student does.

    models: teacher, distilled, and sft or else student_before, the baseline. groups: name -> tasks whose questions are also taken
    together. seen: which records the training records have; those that are not in it count as neither. Accuracy first, by task in
    alphabetical order, then the groups, then the figures of texts. The keys are explained in `_entry`.
    """
    kept = {model: _merged(rows) for model, rows in models.items()}
    if not kept.get(STUDENT):
        return []
    baseline = next((model for model in BASELINES if kept.get(model)), None)
    compared = {TEACHER: kept.get(TEACHER, {}), STUDENT: kept[STUDENT], **({baseline: kept[baseline]} if baseline else {})}
    tasks = sorted({task for task, _, _ in kept[STUDENT]})
    assert not groups.keys() & set(tasks), groups
    asked = [(task, ACCURACY, [task]) for task in tasks]
    asked += [(name, ACCURACY, list(members)) for name, members in groups.items()]
    asked += [(task, figure, [task]) for task in tasks for figure in TOLD if figure != ACCURACY]
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for task, figure, members in asked:
        found = {model: _parts(of, figure, set(members)) for model, of in compared.items()}
        if not found[STUDENT]:
            continue
        entry = _entry(task, figure, found, compared, baseline, seen)
        if task in groups:
            there = sorted({key[0] for key in found[STUDENT]})
            entry |= {"tasks": there, "mean_of_tasks": _mean_of_tasks([entries[member, ACCURACY] for member in there])}
        entries[task, figure] = entry
    return list(entries.values())


def mcnemar(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Whether two models differ in how many of the same questions they get right: the exact test of McNemar (1947), two-sided.

    one, other: bool [questions]. Of the questions that only one of them gets right, as many should be the one's as the other's:
    binomial with 1/2. Exact, without the mid-p correction: it errs towards a larger p. 1 where they differ on no question.
    """
    b, c = int((one & ~other).sum()), int((other & ~one).sum())
    return {"only_student": b, "only_other": c, "p": _binomial(b, c)}


def _binomial(b: int, c: int) -> float:
    """min(1, 2 P(X <= min(b, c))), X binomial of b + c and 1/2: the largest term exactly, in whole numbers, and the others as shares of it."""
    few, of = min(b, c), b + c
    # down from the largest term of the sum: the terms only fall, so what is small is added last and can be left out
    share = term = 1.0
    for k in range(few, 0, -1):
        term *= k / (of - k + 1)
        share += term
        if term < share * 1e-17:
            break
    return min(1.0, 2 * (math.comb(of, few) / (1 << of)) * share)


def _merged(rows: Sequence[Row]) -> dict[Key, dict[str, Any]]:
    """Several benchmarks may say something of the same record."""
    merged: dict[Key, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(key_of(row), {}).update(row.columns)
    return merged


def _parts(kept: Kept, figure: str, tasks: set[str]) -> dict[Key, tuple[float, float]]:
    """The records that a figure is there of, with what each adds above and below the line."""
    above, below, factor = FIGURES[figure]
    parts = {}
    for key, columns in kept.items():
        over, under = (columns.get(above), columns.get(below) if below else 1) if key[0] in tasks else (None, None)
        if over is not None and under is not None and math.isfinite(over) and math.isfinite(under):
            parts[key] = (factor * float(over), float(under))
    return parts


@dataclass(frozen=True)
class _Drawn:
    """A figure of each model, and the same in each resample of the records: the same records for all."""

    values: dict[str, float | None]
    resamples: dict[str, np.ndarray] | None
    """None: there are fewer than two records, of which a resample says nothing."""

    def made(self, make: Callable[..., Any], *models: str | None) -> dict[str, Any] | None:
        """What is made of the figures of some models, with its 95 % interval; None where a figure is not there or is divided by 0."""
        there = [model for model in models if model is not None]
        values = [self.values.get(model) for model in there]
        if len(there) < len(models) or any(value is None for value in values):
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(make(*map(np.float64, values)))
            found = interval(make(*(self.resamples[model] for model in there))) if self.resamples else None
        return {"value": value, "interval": list(found) if found else None} if math.isfinite(value) else None


def _entry(task: str, figure: str, found: dict[str, dict[Key, tuple[float, float]]], kept: Mapping[str, Kept], baseline: str | None, seen: Mapping[Key, bool] | None) -> dict[str, Any]:
    """One row of the table, as JSON; None stands wherever something is not known.

    task, figure; better: higher or lower; baseline_model; records: those that all models of the comparison have, the only ones that count, and
    left_out: those that some have and others do not (a model without any is not in the comparison).
    teacher, student, baseline: the figure. student_minus_baseline, retention (student / teacher, or teacher / student where lower is better),
    baseline_retention: {value, interval}, the interval of 95 % by paired bootstrap, none of fewer than two records.
    recovered: (student - baseline) / (teacher - baseline), if the interval of what is divided by excludes 0 (and of questions, McNemar's test tells the two apart).
    Of questions: mcnemar {baseline, teacher}: the student against each; confidence_correlation: whether the student is sure where
    its teacher is (Pearson, of the chosen options' probabilities; None if either is the same everywhere).
    not_seen, seen: {records, teacher, student, baseline, retention} over the records that the training records do not have, and those
    that they have; None where there are none. Of groups: tasks, mean_of_tasks: each task counts the same.
    """
    there = {model: parts for model, parts in found.items() if parts}
    common = sorted(set.intersection(*map(set, there.values())))
    drawn = _draw({model: [parts[key] for key in common] for model, parts in there.items()})

    def share(one: Any, teacher: Any) -> Any:
        return teacher / one if figure in LOWER_IS_BETTER else one / teacher

    gap = drawn.made(lambda teacher, base: teacher - base, TEACHER, baseline)
    recovered = drawn.made(lambda one, base, teacher: (one - base) / (teacher - base), STUDENT, baseline, TEACHER)
    apart = bool(gap and gap["interval"] and not gap["interval"][0] <= 0 <= gap["interval"][1])
    right = {model: np.array([parts[key][0] > 0 for key in common], bool) for model, parts in there.items()} if figure == ACCURACY else {}
    if common and baseline in right and TEACHER in right:  # of few questions the bootstrap is too sure
        apart = apart and mcnemar(right[TEACHER], right[baseline])["p"] < LEVEL
    entry: dict[str, Any] = {
        "task": task,
        "figure": figure,
        "better": "lower" if figure in LOWER_IS_BETTER else "higher",
        "baseline_model": baseline,
        "records": len(common),
        "left_out": len(set.union(*map(set, there.values()))) - len(common),
        **_values(drawn, baseline),
        "student_minus_baseline": drawn.made(lambda one, base: one - base, STUDENT, baseline),
        "retention": drawn.made(share, STUDENT, TEACHER),
        "baseline_retention": drawn.made(share, baseline, TEACHER),
        "recovered": recovered["value"] + 0.0 if recovered and apart else None,
        "mcnemar": None,
        "confidence_correlation": None,
    }
    if figure == ACCURACY:
        entry["mcnemar"] = {name: mcnemar(right[STUDENT], right[model]) if model in right and common else None for name, model in (("baseline", baseline), ("teacher", TEACHER))}
        if TEACHER in there:
            entry["confidence_correlation"] = _correlation([(kept[TEACHER][key].get("confidence"), kept[STUDENT][key].get("confidence")) for key in common])
    for name, flag in (("not_seen", False), ("seen", True)):
        some = [key for key in common if seen is not None and seen.get(key) is flag]
        figures = _Drawn({model: _ratio([parts[key] for key in some]) for model, parts in there.items()}, None)
        kept_share = figures.made(share, STUDENT, TEACHER)
        entry[name] = {"records": len(some), **_values(figures, baseline), "retention": kept_share["value"] if kept_share else None} if some else None
    return entry


def _values(drawn: _Drawn, baseline: str | None) -> dict[str, float | None]:
    return {"teacher": drawn.values.get(TEACHER), "student": drawn.values.get(STUDENT), "baseline": drawn.values.get(baseline) if baseline else None}


def _ratio(parts: Sequence[tuple[float, float]]) -> float | None:
    under = math.fsum(below for _, below in parts)
    return math.fsum(above for above, _ in parts) / under if under else None


def _draw(parts: dict[str, list[tuple[float, float]]]) -> _Drawn:
    values = {model: _ratio(of) for model, of in parts.items()}
    both = np.array([*parts.values()], np.float64).reshape(len(parts), -1, 2)  # [models, records, above and below]
    if both.shape[1] < 2:
        return _Drawn(values, None)
    alike, which = np.unique(both, axis=0, return_inverse=True)  # models that are the same in every record are so to the last digit of every resample
    ratios = resampled(alike[:, :, 0].T, alike[:, :, 1].T)[:, which.ravel()]
    return _Drawn(values, dict(zip(parts, ratios.T, strict=True)))


def _correlation(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    known = np.array([pair for pair in pairs if None not in pair], np.float64).reshape(-1, 2)
    if len(known) < 2 or (np.ptp(known, axis=0) == 0).any():
        return None
    apart = known - known.mean(0)
    over = math.sqrt(float((apart[:, 0] ** 2).sum())) * math.sqrt(float((apart[:, 1] ** 2).sum()))
    return float(np.clip((apart[:, 0] * apart[:, 1]).sum() / over, -1, 1)) if over else None


def _mean_of_tasks(entries: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Each task's figure counts the same, however many questions it has; None where a task has none. retention: of the means; of_retentions: their mean."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return math.fsum(known) / len(known) if known and len(known) == len(values) else None

    means = {model: mean([entry[model] for entry in entries]) for model in ("teacher", "student", "baseline")}
    of_retentions = mean([entry["retention"]["value"] if entry["retention"] else None for entry in entries])
    return means | {"retention": means["student"] / means["teacher"] if means["student"] is not None and means["teacher"] else None, "of_retentions": of_retentions}
