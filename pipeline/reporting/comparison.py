"""Several evaluations side by side: of each model the mean and the spread over seeds, 95 % intervals, and how far it is from one of them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.benchmarks._bootstrap import interval, over_seeds, resampled
from pipeline.benchmarks._records import FIGURES, HELDOUT
from pipeline.errors import InputError
from pipeline.lookup import nearest
from pipeline.reporting.tables import ABOUT, QUALITY, figures_in

DISTILLED, CONTROL, BEFORE, TEACHER = "distilled", "sft", "student_before", "teacher"
NAMES = {CONTROL: "without the teacher", BEFORE: "student before training", TEACHER: "teacher"}
FALLS = {"kl_to_teacher", "bits_per_byte"}
"""Figures of which the lower is the better."""
FURTHER = ("token_accuracy", "rougeL")
"""Figures of the held-out texts that are shown where some evaluation has them."""
OF_HELDOUT = "multiple_choice"
"""The benchmark of questions whose accuracy is one of QUALITY."""
Columns = Mapping[str, np.ndarray]
Id = tuple[str, str, str]
"""Task, record and digest: records are the same where all three agree."""


@dataclass(frozen=True)
class Kept:
    """What an evaluation has kept of each record, for one model."""

    ids: list[Id]
    specialties: list[str | None]
    columns: Columns  # float64 [records] each; NaN where there is nothing

    def of(self, tasks: Collection[str]) -> "Kept":
        """The records of these tasks alone."""
        rows = [row for row, (task, _, _) in enumerate(self.ids) if task in tasks]
        return Kept([self.ids[row] for row in rows], [self.specialties[row] for row in rows], {name: values[rows] for name, values in self.columns.items()})

    def sides(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """float64 [records] each: what stands above and below the line of one of FIGURES."""
        above, below, factor = FIGURES[key]
        return factor * self.columns[above], self.columns[below] if below else np.ones(len(self.ids))

    def sums(self, key: str) -> tuple[list[Id], np.ndarray, np.ndarray] | None:
        """The records that a figure is over, and of each the part that it adds to either side of the fraction; None if there are none."""
        over, under = self.sides(key)
        there = np.isfinite(over) & np.isfinite(under)
        if not under[there].sum():
            return None
        return [id for id, here in zip(self.ids, there, strict=True) if here], over[there], under[there]


PARTS = ("kl_to_teacher", "bits_per_byte", "top1_agreement", "accuracy", "token_accuracy", "rougeL")
"""Of FIGURES those that are compared."""


@dataclass(frozen=True)
class Evaluated:
    """One finished evaluation."""

    variant: str
    group: str
    """The same for all seeds of a variant, and for nothing else."""
    seed: int | None
    models: dict[str, dict[str, Any]]
    """The figures, as in results.json."""
    records: dict[str, Kept] | None
    """By model; None: the evaluation is of a version that kept none."""
    runs: dict[str, str] = field(default_factory=dict)
    """By stage, what tells a run from another: its fingerprint."""
    settings: dict[str, str] = field(default_factory=dict)
    """section.key -> value, of all stages."""


@dataclass(frozen=True)
class Sample:
    """One model with one seed."""

    of: Evaluated
    figures: dict[str, Any]
    kept: Kept | None

    @property
    def seed(self) -> int | None:
        return self.of.seed

    def figure(self, key: str) -> float | None:
        """One of PARTS over the held-out records; otherwise a benchmark's accuracy."""
        return self.figures.get(key) if key in PARTS else self.task(key).get("accuracy")

    def task(self, name: str) -> dict[str, Any]:
        """A benchmark's figures; empty if it was not asked."""
        return dict(self.figures.get("tasks", {}).get(name, {}))

    def sums(self, key: str) -> tuple[list[Id], np.ndarray, np.ndarray] | None:
        """As `Kept.sums`, of what `figure` is over; None where that is not known."""
        if self.kept is None or self.figure(key) is None:
            return None
        return self.kept.of({HELDOUT, OF_HELDOUT}).sums(key) if key in PARTS else self.kept.of(self.task(key).get("subtasks", {})).sums("accuracy")


@dataclass(frozen=True)
class Row:
    name: str
    model: str
    samples: list[Sample]


def rows_of(found: Sequence[Evaluated], models: Sequence[str] = (DISTILLED, CONTROL, BEFORE, TEACHER)) -> list[Row]:
    """A row for each variant, and one for each other model, whatever the variants that share it; the variants first, as they come."""
    names = variant_names(found)
    rows = []
    for model in models:
        having = [one for one in found if model in one.models]
        if not having:
            continue
        told = {id(one): _told_apart(model, one) for one in having}
        by_variant: dict[str, dict[str, Sample]] = {}
        for one in having:
            by_variant.setdefault(names[one.group], {}).setdefault(told[id(one)], Sample(one, one.models[model], one.records.get(model) if one.records else None))
        if model == DISTILLED:
            rows += [Row(name, model, _in_order(samples)) for name, samples in by_variant.items()]
            continue
        together = {which: sample for samples in by_variant.values() for which, sample in samples.items()}
        if len(together) == len({one.seed for one in having} if model == CONTROL else [None]):
            rows.append(Row(NAMES[model], model, _in_order(together)))
            continue
        sharing: dict[tuple[str, ...], list[str]] = {}
        for name, samples in by_variant.items():
            sharing.setdefault(tuple(sorted(samples)), []).append(name)
        rows += [Row(f"{_listed(variants)}, {NAMES[model]}", model, _in_order(by_variant[variants[0]])) for variants in sharing.values()]
    taken: set[str] = set()
    return [replace(row, name=_untaken(row.name, taken)) for row in rows]


def variant_names(found: Sequence[Evaluated]) -> dict[str, str]:
    """Group -> a name that no other group has."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for one in found:
        if one.group not in names:
            names[one.group] = _untaken(one.variant, taken)
    return names


def compared(rows: Sequence[Row], baseline: str | None = None, sort: str = "kl_to_teacher") -> list[dict[str, Any]]:
    """Of each row and figure mean, lowest, highest, deviation over seeds, interval, and the difference from the baseline; the best first.

    The figures are QUALITY, and behind them those of FURTHER and the benchmarks of questions that some row has. baseline: a row's
    name; None: the first. sort: a figure or `variant`.
    """
    keys = _keys(rows)
    if sort not in (*keys, "variant"):
        raise InputError(f"--sort {sort}: there is no such figure; {nearest(sort, [*keys, 'variant'])}")
    by_name = {row.name: row for row in rows}
    if baseline is not None and baseline not in by_name:
        raise InputError(f"--baseline {baseline}: no row has that name; {nearest(baseline, list(by_name))}")
    base = by_name[baseline] if baseline is not None else rows[0]
    told: list[dict[str, Any]] = [{"variant": row.name, "model": row.model, "seeds": len(row.samples), "baseline": row is base} for row in rows]
    for key in keys:
        drawn = _Draws(rows, key)
        for row, one in zip(rows, told, strict=True):
            one[key] = _figure(row, base, key, drawn)
    return sorted(told, key=lambda one: _place(one, sort))


def figures(row: Row, key: str) -> list[float]:
    """Over the seeds."""
    return [value for sample in row.samples if (value := sample.figure(key)) is not None]


def notes(found: Sequence[Evaluated], told: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader of the table has to know, as sentences."""
    said = []
    names = variant_names(found)
    if without := list(dict.fromkeys(names[one.group] for one in found if one.records is None)):
        said.append(f"No intervals for {_listed(without)}: these evaluations are of a version that kept no figures of single records. Run `pipeline evaluate` with their experiment file again.")
    for stage, what in (("cache-teacher", "caches"), ("fit-projection", "projections")):
        if len({one.runs[stage] for one in found if stage in one.runs}) > 1:
            said.append(f"The KL and the agreement are with the targets of different {what} here, and can differ by that alone. Bits per byte and accuracy cannot.")
            break
    keys = figures_in(told)
    for task in keys:
        if len({prompts for one in found for model in one.models.values() if (prompts := model.get("tasks", {}).get(task, {}).get("prompts"))}) > 1:
            said.append(f"{task} was not put in the same way everywhere: its prompts differ (other shots, other questions, or another version of the harness).")
    differing = [one[key]["difference"] for one in told for key in keys if one[key] and one[key]["difference"]]
    if any(difference["interval"] and not difference["paired"] for difference in differing):
        said.append("Where the records are not those of the baseline, a difference is not paired: its interval is wider than it would be on the same records.")
    most = max((one["seeds"] for one in told), default=0)
    if any(one[key] and one[key]["interval"] for one in told for key in keys):
        if most < 2:
            said.append("With one seed an interval says what other held-out records could have changed, and nothing of other seeds.")
        elif most < 5:
            said.append(f"{most} seeds tell little of all others: what the seed changes is understated in the intervals.")
    return said


class _Draws:
    """The resamples of a figure for all rows: the same draws for all that are over the same records."""

    def __init__(self, rows: Iterable[Row], key: str) -> None:
        self._drawn: dict[int, tuple[int, np.ndarray]] = {}
        sets: dict[frozenset[Id], list[tuple[int, list[Id], np.ndarray, np.ndarray]]] = {}
        for sample in [sample for row in rows for sample in row.samples]:
            if parts := sample.sums(key):
                sets.setdefault(frozenset(parts[0]), []).append((id(sample), *parts))
        for stream, members in enumerate(sets.values()):
            order = {record: place for place, record in enumerate(members[0][1])}
            over, under = np.zeros((2, len(order), len(members)))
            for column, (_, ids, above, below) in enumerate(members):
                places = [order[record] for record in ids]
                over[places, column], under[places, column] = above, below
            ratios = resampled(over, under, stream=stream)
            self._drawn |= {sample: (stream, ratios[:, column]) for column, (sample, *_) in enumerate(members)}

    def of(self, row: Row, apart: bool = False) -> tuple[set[int], np.ndarray] | None:
        """The records' streams, and the row's figure in each resample; None if a seed's records are not there. apart: draw other seeds."""
        found = [self._drawn[id(sample)] for sample in row.samples if id(sample) in self._drawn]
        if not found or len(found) < len(row.samples):
            return None
        return {stream for stream, _ in found}, over_seeds(np.stack([drawn for _, drawn in found], 1), apart)


def _figure(row: Row, base: Row, key: str, drawn: _Draws) -> dict[str, Any] | None:
    values = figures(row, key)
    if not values:
        return None
    mean, mine = float(np.mean(values)), drawn.of(row)
    told: dict[str, Any] = {"mean": mean, "lowest": min(values), "highest": max(values), "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None, "values": values}
    found = interval(mine[1]) if mine else None
    told |= {"interval": list(found) if found else None, "difference": None}
    if row is not base and (others := figures(base, key)):
        theirs = drawn.of(base, apart=[sample.seed for sample in row.samples] != [sample.seed for sample in base.samples])
        between = interval(mine[1] - theirs[1]) if mine and theirs else None
        told["difference"] = {
            "mean": mean - float(np.mean(others)),
            "interval": list(between) if between else None,
            "excludes_zero": not between[0] <= 0 <= between[1] if between else None,
            "paired": mine[0] == theirs[0] and len(mine[0]) == 1 if mine and theirs else None,
        }
    return told


def _untaken(name: str, taken: set[str]) -> str:
    """The name, with a number where it is taken; it is then."""
    free, number = name, 2
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    taken.add(free)
    return free


def _told_apart(model: str, one: Evaluated) -> str:
    """The same where the model is the same and was asked the same."""
    figures = one.models[model]
    asked = [f"{key} {figures.get('tasks', {}).get(key, {}).get('prompts', '')}" for key in _keys([Row("", model, [Sample(one, figures, None)])])[len(QUALITY) :]]
    stage = {DISTILLED: "train-student", CONTROL: "train-control"}.get(model)
    if stage in one.runs:
        return " ".join([one.runs[stage], *asked])
    said = [figures.get(key) for key in QUALITY]
    return " ".join(["" if value is None else f"{value:.4g}" for value in said] + asked)  # the last digits may be the device's


def _keys(rows: Sequence[Row]) -> list[str]:
    """The figures that these rows have."""
    samples = [sample for row in rows for sample in row.samples]
    tasks = dict.fromkeys(task for sample in samples for task in sample.figures.get("tasks", {}) if task not in {OF_HELDOUT, *ABOUT, *PARTS})
    return [*QUALITY, *(key for key in (*FURTHER, *tasks) if any(sample.figure(key) is not None for sample in samples))]


def _in_order(samples: dict[str, Sample]) -> list[Sample]:
    return sorted(samples.values(), key=lambda sample: -1 if sample.seed is None else sample.seed)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _place(one: dict[str, Any], sort: str) -> tuple[bool, float, str]:
    if sort == "variant":
        return False, 0.0, one["variant"]
    mean = one[sort]["mean"] if one[sort] else 0.0
    return one[sort] is None, mean if sort in FALLS else -mean, ""
