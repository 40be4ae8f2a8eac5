"""Finished evaluations as one page that needs nothing else: tables, plots, cost, settings and versions."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.benchmarks._records import HELDOUT
from pipeline.files import read_json_lines
from pipeline.reporting import report_plots as plots
from pipeline.reporting.comparison import CONTROL, DISTILLED, OF_HELDOUT, TEACHER, Kept, Row, variant_names
from pipeline.reporting.inspection_evaluations import Found
from pipeline.reporting.report_plots import Bar, Look
from pipeline.reporting.retention_table import retention_parts
from pipeline.reporting.tables import COLUMNS, COST, NOTHING, QUESTIONS, cost_cells, cost_note, figures_in, seen_note, title

SHARES = {
    "kl_to_teacher": ("closeness", "exp(−KL): the share of the teacher's probability that the model gives what the teacher expects, in the geometric mean"),
    "top1_agreement": ("agreement", "the top-1 agreement as it is: the teacher agrees with itself everywhere"),
    "bits_per_byte": ("compression", "the teacher's bits per byte over the model's"),
    "accuracy": ("accuracy", "the model's accuracy over the teacher's"),
}
"""How a figure becomes a share of the teacher's."""
SPECIALTIES = 30
"""Rows of the table; the smallest others are taken together."""
UNNAMED = "none given"
MARK = '<span class="swatch"'
NOT_LOSSES = {"step", "loss", "learning_rate", "temperature", "gradient_norm"}
STAGE_OF = {DISTILLED: "train-student", CONTROL: "train-control"}


def report(found: Sequence[Found], rows: Sequence[Row], told: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    """The page as HTML. rows: of `comparison.rows_of`; told: what `comparison.compared` says of them, in the order of the page."""
    by_name = {row.name: row for row in rows}
    ordered = [by_name[one["variant"]] for one in told]
    looks = dict(zip([row.name for row in ordered], plots.looks([(row.name, row.model) for row in ordered]), strict=True))
    shown = [(row, looks[row.name]) for row in ordered]
    sections = [
        ("results", "Results", _results(told, looks, [*notes, *_seen(found)])),
        ("benchmarks", "Figures with their intervals", _benchmarks(told, looks)),
        ("training", "Training", _training(found, shown)),
        ("retention", "What is kept of the teacher", _retention(told, looks) + _task_by_task(found)),
        ("questions", "Benchmarks of questions", _questions(shown, told)),
        ("fidelity", "Where the model is near its teacher", _fidelity(shown)),
        ("calibration", "Calibration", _calibration(shown)),
        ("specialties", "By specialty", _specialties(shown)),
        ("cost", "Cost", _cost(found, shown)),
        ("settings", "Settings that differ", _settings(found, looks)),
        ("versions", "Versions", _versions(found)),
        ("folders", "Made from", _folders(found)),
    ]
    heading = f"{', '.join(list(dict.fromkeys(variant_names([one.evaluated for one in found]).values()))[:3])}: evaluation"
    contents = " ".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in sections)
    body = "\n".join(f'<section id="{key}"><h2>{escape(name)}</h2>\n{text}\n</section>' for key, name, text in sections)
    page = files("pipeline.reporting").joinpath("report.html").read_text(encoding="utf-8")
    parts = {"title": escape(heading), "contents": contents, "body": body}
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], page)


def picture(told: Sequence[dict[str, Any]]) -> bytes:
    """The figures with their intervals, as a PNG on white."""
    looks = dict(zip([one["variant"] for one in told], plots.looks([(one["variant"], one["model"]) for one in told]), strict=True))
    drawn = BytesIO()
    with plots.style("bars"):
        plots.bars(_panels(told, looks)).savefig(drawn, dpi=130, format="png", facecolor="white")
    return drawn.getvalue()


# --- the sections ---


def _results(told: Sequence[dict[str, Any]], looks: dict[str, Look], notes: Sequence[str]) -> str:
    base = next(one["variant"] for one in told if one["baseline"])
    keys = figures_in(told)
    head = ["", "model", "seeds", *map(title, keys)]
    lines = [[_swatch(looks[one["variant"]]), escape(one["variant"]), str(one["seeds"]), *(_result(one[key]) for key in keys)] for one in told]
    legend = f"Mean and, below it, lowest to highest seed; 95 % interval in brackets; difference from {base} with its interval, bold where that excludes 0."
    return _table(head, lines, left=2) + _paragraphs([legend, *notes])


def _result(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return NOTHING
    lines = [f"<b>{figure['mean']:.3f}</b>"]
    if figure["lowest"] < figure["highest"]:
        lines.append(f"{figure['lowest']:.3f} to {figure['highest']:.3f}")
    if figure["interval"]:
        lines.append(f"[{figure['interval'][0]:.3f}, {figure['interval'][1]:.3f}]")
    difference = figure["difference"]
    if difference and difference["interval"]:
        text = f"{difference['mean']:+.3f} [{difference['interval'][0]:+.3f}, {difference['interval'][1]:+.3f}]"
        lines.append(f"<b>{text}</b>" if difference["excludes_zero"] else text)
    return lines[0] + "".join(f'<br><span class="fine">{line}</span>' for line in lines[1:])


def _panels(told: Sequence[dict[str, Any]], looks: dict[str, Look]) -> list[tuple[str, list[Bar]]]:
    """A panel a figure that some row has."""
    panels = []
    for key in figures_in(told):
        having = [one for one in told if one[key]]
        if having:
            panels.append((title(key), [Bar(looks[one["variant"]], one[key]["mean"], one[key]["interval"] and tuple(one[key]["interval"]), one[key]["values"]) for one in having]))
    return panels


def _benchmarks(told: Sequence[dict[str, Any]], looks: dict[str, Look]) -> str:
    with plots.style("bars"):
        drawn = _drawn(plots.bars(_panels(told, looks)), "bars", "Bars of each figure with 95 % intervals")
    return drawn + _paragraphs(["Lines: 95 % intervals. Circles: single seeds."]) + _differences(told, looks)


def _differences(told: Sequence[dict[str, Any]], looks: dict[str, Look]) -> str:
    """Of the trained students: beside an untrained one they would all look alike."""
    base = next(one for one in told if one["baseline"])
    panels = []
    for key in figures_in(told):
        found = [(looks[one["variant"]], one[key]["difference"]) for one in told if one["model"] in STAGE_OF and one[key] and (one[key]["difference"] or {}).get("interval")]
        if found:
            panels.append((title(key), [Bar(look, difference["mean"], tuple(difference["interval"]), []) for look, difference in found]))
    if not panels:
        return ""
    with plots.style("differences"):
        drawn = _drawn(plots.differences(panels), "differences", "Differences from the baseline with 95 % intervals")
    return f"<h3>Differences from {escape(base['variant'])}</h3>" + drawn + _paragraphs(["Full circles: the 95 % interval excludes 0."])


def _training(found: Sequence[Found], shown: Sequence[tuple[Row, Look]]) -> str:
    panels: dict[str, list[tuple[Look, list[tuple[np.ndarray, np.ndarray]]]]] = {}
    missing: list[Look] = []
    for row, look in shown:
        if row.model not in STAGE_OF:
            continue
        logs = [read_json_lines(run.file("metrics.jsonl")) for run in _runs(found, row)]
        if len(logs) < len(row.samples):
            missing.append(look)
        losses = dict.fromkeys(key for log in logs for line in log for key in line if key not in NOT_LOSSES and "/" not in key)
        for loss in losses:
            seeds = [_points(log, loss) for log in logs if any(loss in line for line in log)]
            panels.setdefault(loss, []).append((look, seeds))
    said = ["Each part of the objective, unweighted, and what `training.validation` measured; smoothed over a twentieth of the run. Lines: mean over seeds; bands: lowest to highest seed."]
    if missing:
        said.append(f"No training log of {', '.join(look.letter for look in missing)}, or not of every seed: the folders of train-student are not beside those of evaluate.")
    if not panels:
        return _paragraphs(said[1:])
    with plots.style("curves"):
        drawn = _drawn(plots.curves(list(panels.items())), "curves", "Training losses over the steps")
    return _key(list(dict.fromkeys(look for rows in panels.values() for look, _ in rows))) + drawn + _paragraphs(said)


def _points(log: list[dict[str, float]], loss: str) -> tuple[np.ndarray, np.ndarray]:
    steps, values = np.array([(line["step"], line[loss]) for line in log if loss in line]).T
    return steps.astype(int), values


def _retention(told: Sequence[dict[str, Any]], looks: dict[str, Look]) -> str:
    teacher = next((one for one in told if one["model"] == TEACHER), None)
    others = [one for one in told if one["model"] != TEACHER]
    if teacher is None or sum(one["model"] == TEACHER for one in told) > 1:
        return _paragraphs(["These evaluations have no one teacher, so there is nothing to take shares of."])
    keys = [key for key in SHARES if teacher[key] and (key not in ("accuracy",) or teacher[key]["mean"] > 0) and all(one[key] for one in others)]
    if not keys or not others:
        return _paragraphs(["No figure is known of the teacher and of all models."])
    shares = [(looks[one["variant"]], [_share(key, one[key]["mean"], teacher[key]["mean"]) for key in keys]) for one in others]
    with plots.style("radar"):
        drawn = _drawn(plots.radar([SHARES[key][0] for key in keys], shares), "radar", "Share of the teacher's figures that each model keeps")
    lines = [[_swatch(look), escape(look.name), *(f"{value:.1%}" for value in values)] for look, values in shares]
    said = [f"The teacher is at 100 %. {'; '.join(f'{SHARES[key][0]}: {SHARES[key][1]}' for key in keys)}."]
    return f'<div class="beside">{drawn}{_table(["", "model", *(SHARES[key][0] for key in keys)], lines, left=2)}</div>' + _paragraphs(said)


def _share(key: str, value: float, teacher: float) -> float:
    if key == "kl_to_teacher":
        return math.exp(-value)
    if key == "bits_per_byte":
        return teacher / value if value else 1.0
    return value / teacher


def _task_by_task(found: Sequence[Found]) -> str:
    """The table of each evaluation, the first one open."""
    names = variant_names([one.evaluated for one in found])
    tables: list[str] = []
    for one in found:
        if rows := one.results.get("retention"):
            table = retention_parts(rows, one.results.get("published"))
            seed = "" if one.evaluated.seed is None else f", seed {one.evaluated.seed}"
            cells = _table(table.titles, [[escape(cell) for cell in line] for line in table.lines]) + _paragraphs(table.notes)
            tables.append(f"<details{'' if tables else ' open'}><summary>{escape(names[one.evaluated.group])}{seed}</summary>{cells}</details>")
    return "<h3>Task by task</h3>" + ("".join(tables) or _paragraphs(["These evaluations are of a version that did not compare the models task by task."]))


def _questions(shown: Sequence[tuple[Row, Look]], told: Sequence[dict[str, Any]]) -> str:
    """A table a benchmark, and one of its subtasks where it has several."""
    by_name = {one["variant"]: one for one in told}
    parts = []
    for task in dict.fromkeys(task for row, _ in shown for sample in row.samples for task in sample.figures.get("tasks", {})):
        asked = [(row, look, [each for sample in row.samples if (each := sample.task(task)).get("accuracy") is not None]) for row, look in shown]
        asked = [(row, look, seeds) for row, look, seeds in asked if seeds]
        if not asked:
            continue
        lines = []
        for row, look, seeds in asked:
            key = "accuracy" if task == OF_HELDOUT else task
            interval = (by_name[row.name].get(key) or {}).get("interval") or (seeds[0]["accuracy_interval"] if len(seeds) == 1 else None)
            means = [_mean([each.get(figure) for each in seeds]) for figure in ("chance", "calibration_error", "brier")]
            means.append(_mean([each.get("abstaining", {}).get("0.5") for each in seeds]))
            accuracy = [_number(_mean([each["accuracy"] for each in seeds])), f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else NOTHING]
            lines.append([_swatch(look), escape(row.name), f"{seeds[0]['questions']:,}", *accuracy, *map(_number, means)])
        parts.append(f"<h3>{escape(task)}</h3>" + _table(["", "model", *QUESTIONS], lines, left=2) + _subtasks(asked))
    if not parts:
        return _paragraphs(["These evaluations asked none, or are of a version that had none."])
    said = ["Chance: one over the number of options. Calibration error and Brier score are of the chosen and of all options' probabilities; both are 0 at best."]
    said.append("The surer half: the questions whose chosen option the model gives the highest probability. Of several seeds the mean.")
    return "".join(parts) + _paragraphs(said)


def _subtasks(asked: Sequence[tuple[Row, Look, Sequence[dict[str, Any]]]]) -> str:
    """The accuracy on each, if there are several."""
    names = list(dict.fromkeys(name for _, _, seeds in asked for each in seeds for name in each.get("subtasks", {})))
    if len(names) < 2:
        return ""
    lines = []
    for name in names:
        found = [[each["subtasks"][name] for each in seeds if name in each.get("subtasks", {})] for _, _, seeds in asked]
        questions = next(of[0]["questions"] for of in found if of)
        lines.append([escape(name), f"{questions:,}", *(_number(_mean([each["accuracy"] for each in of])) for of in found)])
    means = [_number(_mean([each.get("mean_of_subtasks") for each in seeds])) for _, _, seeds in asked]
    lines.append(["<b>each counting the same</b>", "", *means])
    return _table(["subtask", "questions", *(look.letter for _, look, _ in asked)], lines)


def _fidelity(shown: Sequence[tuple[Row, Look]]) -> str:
    """By decile of the teacher's entropy and by position in the answer; the teacher itself has no line."""
    having = [(row, look, [sample.figures["fidelity"] for sample in row.samples if sample.figures.get("fidelity")]) for row, look in shown if row.model != TEACHER]
    having = [(row, look, seeds) for row, look, seeds in having if seeds]
    if not having:
        return _paragraphs(["These evaluations did not measure it: `evaluation.benchmarks` lacks `fidelity`, or they are of a version before it."])
    deciles = max(len(seed["by_entropy"]) for _, _, seeds in having for seed in seeds)
    begins = sorted({part["from"] for _, _, seeds in having for seed in seeds for part in seed["by_position"]})
    panels = []
    for below, places, at in (
        ("decile of the teacher's entropy, from sure to unsure", [str(decile + 1) for decile in range(deciles)], lambda seed: dict(enumerate(seed["by_entropy"]))),
        ("position in the answer", [f"{begin:,}" if not begin else f"{begin:,}–{2 * begin:,}" for begin in begins], lambda seed: {begins.index(part["from"]): part for part in seed["by_position"]}),
    ):
        for key in ("kl_to_teacher", "top1_agreement"):
            of_rows = [(look, [_mean([at(seed).get(place, {}).get(key) for seed in seeds]) for place in range(len(places))]) for _, look, seeds in having]
            panels.append((title(key), below, places, of_rows))
    with plots.style("fidelity"):
        drawn = _drawn(plots.lines(panels), "fidelity", "KL and agreement by the teacher's entropy and by the position in the answer")
    keys = ("total_variation", "top5_agreement", "confidence_correlation")
    lines = [[_swatch(look), escape(row.name), *(_number(_mean([sample.figures.get(key) for sample in row.samples])) for key in keys)] for row, look, _ in having]
    said = ["The first decile is the tenth of the held-out answers' positions at which the teacher is surest of what comes next. Of several seeds the mean."]
    said.append("Total variation: half the sum of what the probabilities differ by. Top-5: the share of the teacher's 5 most likely tokens that are among the model's.")
    said.append("Confidence: how the probabilities that the two give to what they hold to be the most likely go together (Pearson).")
    return _key([look for _, look, _ in having]) + drawn + _table(["", "model", "total variation", "top-5 agreement", "correlation of confidence"], lines, left=2) + _paragraphs(said)


def _calibration(shown: Sequence[tuple[Row, Look]]) -> str:
    rows = []
    for row, look in shown:
        bins = [np.array(sample.figures["calibration"]) for sample in row.samples if sample.figures.get("calibration")]
        if bins:
            rows.append((look, np.sum(bins, 0), _mean([sample.figures.get("calibration_error") for sample in row.samples]) or 0.0))
    if not rows:
        return _paragraphs(["These evaluations did not measure it: `evaluation.benchmarks` lacks `calibration`, or they are of a version before it."])
    with plots.style("reliability"):
        drawn = _drawn(plots.reliability(rows), "reliability", "Reliability diagrams")
    said = ["At the positions of the held-out answers: how often the most likely token is the one that follows, by its probability."]
    said.append("Below the dotted line a model is too sure. Bars: the share of positions in each bin. Error: the mean gap, weighted by positions (ECE); of several seeds the mean.")
    return _key([look for look, _, _ in rows]) + drawn + _paragraphs(said)


def _specialties(shown: Sequence[tuple[Row, Look]]) -> str:
    kept = [(row, look, [sample.kept.of({HELDOUT}) for sample in row.samples if sample.kept]) for row, look in shown if all(sample.kept for sample in row.samples)]
    if not kept:
        return _paragraphs(["These evaluations are of a version that kept no figures of single records."])
    counts = Counter(specialty or UNNAMED for specialty in kept[0][2][0].specialties)
    if len(counts) < 2:
        return _paragraphs(["The held-out records have no specialties."])
    named = sorted(counts, key=lambda name: (-counts[name], name))
    pooled = {name: name for name in named[:SPECIALTIES]} | {name: f"{len(named) - SPECIALTIES} others" for name in named[SPECIALTIES:]}
    parts = [_key([look for _, look, _ in kept])]
    for key in ("kl_to_teacher", "bits_per_byte", "accuracy"):
        columns = [(look, _by_specialty(seeds, key, pooled)) for row, look, seeds in kept if row.model != TEACHER or key != "kl_to_teacher"]
        columns = [(look, found) for look, found in columns if found]
        if columns:
            lines = []
            for name in dict.fromkeys(pooled.values()):
                if having := [found[name] for _, found in columns if name in found]:
                    lines.append([escape(name), str(having[0][0]), *(f"{found[name][1]:.3f}" if name in found else NOTHING for _, found in columns)])
            parts.append(f"<h3>{COLUMNS[key][0]}</h3>" + _table(["specialty", "questions" if key == "accuracy" else "records", *(look.letter for look, _ in columns)], lines))
    return "".join(parts) + _paragraphs(["Means over seeds. A specialty with few records says little."])


def _by_specialty(seeds: Sequence[Kept], key: str, pooled: dict[str, str]) -> dict[str, tuple[int, float]]:
    """Of each specialty how many records there are, and the mean over the seeds."""
    found: dict[str, list[tuple[int, float]]] = {}
    for kept in seeds:
        over, under = kept.sides(key)
        names = np.array([pooled.get(name or UNNAMED, "") for name in kept.specialties])
        there = np.isfinite(over) & np.isfinite(under)
        for name in np.unique(names[there]):
            mine = there & (names == name)
            if under[mine].sum():
                found.setdefault(str(name), []).append((int(mine.sum()), float(over[mine].sum() / under[mine].sum())))
    return {name: (values[0][0], float(np.mean([value for _, value in values]))) for name, values in found.items()}


def _cost(found: Sequence[Found], shown: Sequence[tuple[Row, Look]]) -> str:
    caches: dict[str, list[str]] = {}
    for one in found:
        cache, teacher = one.results.get("cache"), one.evaluated.models.get(TEACHER, {})
        if cache:
            speed = teacher.get("tokens_per_second")
            seconds = _duration(cache["tokens"] / speed) if speed else NOTHING
            there = one.upstream.get("cache-teacher")
            size = there.size() if there else cache["tokens"] * cache["bytes_per_token"]
            name = one.evaluated.runs.get("cache-teacher", "")
            caches.setdefault(
                name or repr(cache),
                [f"<code>{escape(name) or NOTHING}</code>", seconds, f"{cache['tokens']:,}", _bytes(size), f"{cache['bytes_per_token']:.0f}", _megabytes(teacher.get("peak_memory_mb"))],
            )
    lines, sittings = [], False
    for row, look in shown:
        if row.model not in STAGE_OF or not (runs := _runs(found, row)):
            continue
        worked = [run.summary.get("seconds") for run in runs]
        sittings |= any(value is None for value in worked)
        known = [float(run.manifest["machine"]["seconds"] if value is None else value) for run, value in zip(runs, worked, strict=True)]
        spread = f"{_duration(min(known))} to {_duration(max(known))}" if max(known) > min(known) else ""
        memory = max((run.summary["peak_memory_mb"] for run in runs if "peak_memory_mb" in run.summary), default=None)
        first = runs[0].summary
        lines.append(
            [
                _swatch(look),
                escape(row.name),
                str(len(runs)),
                f"{_duration(float(np.mean(known)))}<br><span class='fine'>{spread}</span>",
                f"{first.get('steps', 0):,}",
                f"{first.get('parameters', 0) / 1e6:.1f} M",
                _megabytes(memory),
            ]
        )
    parts = []
    if caches:
        parts.append("<h3>The teacher, once</h3>" + _table(["cache", "forward passes", "tokens", "size", "bytes per token", "peak memory"], caches.values()))
    if lines:
        parts.append("<h3>Each student</h3>" + _table(["", "model", "seeds", "training time", "steps", "parameters", "peak memory"], lines, left=2))
    if measured := [(row, look, cost) for row, look in shown if (cost := _mean_cost([sample.figures["cost"] for sample in row.samples if sample.figures.get("cost")]))]:
        parts.append("<h3>In use</h3>" + _table(["", "model", *COST], [[_swatch(look), escape(row.name), *cost_cells(cost)] for row, look, cost in measured], left=2))
        parts.append(_paragraphs([f"{cost_note(measured[0][2])} Of several seeds the mean."]))
    parts += _their_cost(found)
    said = ["The teacher's time is that of its forward passes, summed over shards and machines, without loading."]
    said.append("The students' is wall-clock time, over all sittings as far as checkpoints were kept.")
    if sittings:
        said.append("Students of an older version: the time of the last sitting.")
    return "".join(parts) + _paragraphs(said if parts else ["These folders say nothing of it."])


def _their_cost(found: Sequence[Found]) -> list[str]:
    """A table for each of those whose published figures stand beside ours."""
    parts = []
    theirs = {published["name"]: published for one in found if (published := one.results.get("published"))}
    for name, published in theirs.items():
        numbers = [[figure[model] for model in ("teacher", "baseline", "student")] for figure in published["cost"].values()]
        lines = [[escape(what), *(NOTHING if number is None else f"{number:,g}" for number in row)] for what, row in zip(published["cost"], numbers, strict=True)]
        if lines:
            parts.append(f"<h3>Theirs: {escape(name)}</h3>" + _table(["", "teacher", "baseline", "student"], lines) + _paragraphs([f"Published, not measured here. Source: {published['source']}."]))
    return parts


def _mean_cost(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Number by number; empty of none."""
    if not costs:
        return {}
    batches = {batch: {key: float(np.mean([cost["batches"][batch][key] for cost in costs])) for key in figures} for batch, figures in costs[0]["batches"].items()}
    return costs[0] | {key: float(np.mean([cost[key] for cost in costs])) for key in ("parameters", "weights_mb", "peak_memory_mb")} | {"batches": batches}


def _seen(found: Sequence[Found]) -> list[str]:
    """How many of the evaluated records the training records have, as sentences: one, or one a variant where these differ."""
    names = variant_names([one.evaluated for one in found])
    said: dict[str, list[str]] = {}
    for one in found:
        if "seen_in_training" in one.results:
            told = one.results["seen_in_training"]
            text = seen_note(told) if told else "Whether the training records have some of the evaluated ones is not known: the cache keeps no text."
            variants = said.setdefault(text, [])
            if (name := names[one.evaluated.group]) not in variants:
                variants.append(name)
    return list(said) if len(said) < 2 else [f"{', '.join(variants)}: {text}" for text, variants in said.items()]


def _settings(found: Sequence[Found], looks: dict[str, Look]) -> str:
    names = variant_names([one.evaluated for one in found])
    variants: dict[str, dict[str, str]] = {}
    for one in found:
        if one.evaluated.settings:
            variants.setdefault(names[one.evaluated.group], one.evaluated.settings)
    keys = sorted({key for settings in variants.values() for key in settings} - {"training.seed"})
    lines = []
    for key in keys:
        values: dict[str, list[str]] = {}
        for name, settings in variants.items():
            values.setdefault(settings.get(key, NOTHING), []).append(name)
        if len(values) > 1:
            cell = "".join(f'<div class="setting">{"".join(_swatch(looks[name]) for name in having)} <code>{escape(value)}</code></div>' for value, having in values.items())
            lines.append([f"<code>{escape(key)}</code>", cell])
    if len(variants) < 2:
        return _paragraphs(["There is one variant, or the folders say nothing of their settings."])
    if not lines:
        return _paragraphs(["None: the variants have the same settings."])
    return _key([looks[name] for name in variants]) + _table(["setting", "value"], lines, left=2)


def _versions(found: Sequence[Found]) -> str:
    runs: dict[str, dict[str, Any]] = {}
    for one in found:
        for stage, run in [*one.upstream.items(), *([("evaluate", one.finished)] if one.finished else [])]:
            runs.setdefault(stage, {})[str(run.path)] = run.manifest["machine"]
    if not runs:
        return _paragraphs(["These folders say nothing of them."])
    stages = [stage for stage in ("cache-teacher", "fit-projection", "train-student", "train-control", "evaluate-teacher", "evaluate") if stage in runs]
    what: dict[str, dict[str, list[str]]] = {}
    for stage in stages:
        for machine in runs[stage].values():
            for key, value in {**{key: machine.get(key) for key in ("python", "platform", "processors")}, **(machine.get("versions") or {})}.items():
                seen = what.setdefault(key, {}).setdefault(stage, [])
                if (text := NOTHING if value is None else str(value)) not in seen:
                    seen.append(text)
    lines = []
    for key, by_stage in what.items():
        if len({tuple(values) for values in by_stage.values()}) == 1:
            lines.append([escape(key), escape(", ".join(next(iter(by_stage.values())))) + ("" if len(by_stage) == len(stages) else f" ({', '.join(by_stage)})")])
        else:
            lines.append([escape(key), "<br>".join(f"{stage}: {escape(', '.join(values))}" for stage, values in by_stage.items())])
    return _table(["", "of all stages, where nothing else is said"], lines, left=2)


def _folders(found: Sequence[Found]) -> str:
    names = variant_names([one.evaluated for one in found])
    lines = []
    for one in found:
        seed = NOTHING if one.evaluated.seed is None else str(one.evaluated.seed)
        places = [one.finished.path] if one.finished else []
        places += [run.path for stage, run in one.upstream.items() if stage == "train-student"]
        lines.append([escape(names[one.evaluated.group]), seed, "<br>".join(f"<code>{escape(str(place))}</code>" for place in places) or NOTHING])
    return _table(["variant", "seed", "folders"], lines, left=3)


# --- what they are made of ---


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _runs(found: Sequence[Found], row: Row) -> list[Any]:
    """The finished trainings of a row, as far as they are here."""
    by_evaluation = {id(one.evaluated): one for one in found}
    upstream = [by_evaluation[id(sample.of)].upstream for sample in row.samples]
    return [runs[STAGE_OF[row.model]] for runs in upstream if STAGE_OF[row.model] in runs]


def _drawn(figure: Figure, name: str, what: str) -> str:
    return f'<figure aria-label="{escape(what)}">{plots.as_svg(figure, name)}</figure>'


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """Cells are HTML. left: so many columns hold text."""

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = ["mark" if cell.startswith(MARK) else "left" if number < left else "" for number, cell in enumerate(cells)]
        return "<tr>" + "".join(f"<{tag}{f' class={kind}' if kind else ''}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)) + "</tr>"

    return f'<div class="wide"><table><thead>{row([escape(cell) for cell in head], "th")}</thead><tbody>{"".join(row(line, "td") for line in lines)}</tbody></table></div>'


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _swatch(look: Look) -> str:
    return f'{MARK} style="background: {look.colour}" title="{escape(look.name)}">{look.letter}</span>'


def _key(shown: Sequence[Look]) -> str:
    return '<ul class="key">' + "".join(f"<li>{_swatch(look)} {escape(look.name)}</li>" for look in shown) + "</ul>"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _megabytes(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f} MB"
