"""Teacher, student before training, control and distilled student, on the held-out split and on benchmarks."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow.parquet as pq

from pipeline.benchmarks._bootstrap import RESAMPLES
from pipeline.benchmarks._overlap import WORDS, seen
from pipeline.benchmarks._records import KEPT, Row, as_table, key_of, refuse_twice
from pipeline.benchmarks._retention import retention
from pipeline.benchmarks._scores import Live, Scorer
from pipeline.cache.projected import StudentView
from pipeline.cache.reader import Cache
from pipeline.cache.schema import SHARD_FILES
from pipeline.config import Evaluation, Machine, Student
from pipeline.errors import InputError, Mismatch
from pipeline.files import as_json, read_json, read_json_lines
from pipeline.lookup import find
from pipeline.models.cost import cost_of
from pipeline.models.heads import row_logits, rows_that_are_tokens
from pipeline.models.live import LiveModel, Remembered
from pipeline.models.loading import device_named, load_student
from pipeline.models.memory import PeakMemory
from pipeline.models.scoring import CachedTeacher, StudentScorer
from pipeline.models.tokenizers import load_tokenizer
from pipeline.reporting.plots import plot_curves
from pipeline.reporting.progress import Progress
from pipeline.reporting.published import published
from pipeline.reporting.retention_table import retention_table
from pipeline.reporting.tables import cost_table, results_table, tasks_table
from pipeline.running.answers import Answers
from pipeline.running.fingerprint import alike
from pipeline.running.folder import RunFolder
from pipeline.running.runner import Inputs
from pipeline.signals.records import Record

LIBRARIES = ("distillation-pipeline", "torch", "transformers", "tokenizers", "datasets", "lm-eval", "rouge-score", "sacrebleu")
Evaluated = tuple[dict[str, Any], list[Row]]
"""A model's figures, and what is to be kept of each record."""


def run(student: Student, evaluation: Evaluation, machine: Machine, inputs: Inputs, out: RunFolder) -> dict[str, Any]:
    cached = inputs["cache-teacher"]
    cache = Cache(cached.file, ("entropy",))
    refused = {id.partition("#choice")[0] for id in inputs["fit-projection"].summary.get("refused", {})}
    examples = [example for example in cache.examples("heldout") if (example.record.choice_of or example.record.id) not in refused]
    heldout = [example.record for example in examples if not example.record.choice_of]
    everyone = [record for record in cache.records("heldout") if not record.choice_of]
    if not heldout:
        raise InputError("The cache has no held-out records to evaluate on. Give data.heldout, or a larger data.heldout.fraction.")
    theirs = published(evaluation.published.path) if evaluation.published else None
    students = list(_students(student, inputs))
    out.plan("models", len(students) + 1)
    done = {name: (out.info(name)["figures"], [Row(**row) for row in out.info(name)["rows"]]) for name in out.committed() if name.startswith("figures-")}
    models: dict[str, Evaluated] = {}

    answers = _answers(inputs, cache.about["template"]) if "evaluate-teacher" in inputs else None
    cost = {key: cached.summary.get(key) for key in ("tokens_per_second", "peak_memory_mb", "cost")}
    models["teacher"] = _with(_benchmarked(CachedTeacher(examples), Remembered(answers, "The teacher"), evaluation, heldout, everyone), cost)
    device = device_named(machine.device)
    for number, (name, source, revision, layers) in enumerate(students, 2):
        piece = f"figures-{name}-{number}"
        if piece not in done:
            memory = PeakMemory(device)
            tokenizer = load_tokenizer(source, revision, cache.about["template"], name)
            view = StudentView(cache, inputs["fit-projection"].file, tokenizer.render, tokenizer.digest())
            model = load_student(source, revision, layers, device).eval()
            rows = rows_that_are_tokens(model, name, tokenizer.vocabulary)
            scorer = StudentScorer(row_logits(model, name, rows), tokenizer.render, view, examples, machine.student_micro_batch_records)
            live = LiveModel(model, tokenizer, name, machine.student_micro_batch_records, Answers(out, name, Progress))
            found = _benchmarked(scorer, live, evaluation, heldout, everyone)
            cost = {"tokens_per_second": scorer.tokens / max(scorer.seconds, 1e-9), "peak_memory_mb": memory.megabytes()}
            done[piece] = _with(found, cost | {"cost": cost_of(model, rows) if machine.measure_cost else None})
            out.commit(piece, {}, figures=done[piece][0], rows=[asdict(row) for row in done[piece][1]])
            del model, scorer, live
        models[name] = done[piece]

    flagged = _seen(cache, models)
    kept = {name: rows for name, (_, rows) in models.items()}
    tokens = sum(shard["tokens"] for shard in cache.about["shards"])
    results: dict[str, Any] = {
        "models": {name: figures for name, (figures, _) in models.items()},
        "retention": retention(kept, _groups(models), flagged),
        "published": theirs,
        "seen_in_training": None if flagged is None else {"words": WORDS, "records": sum(flagged.values()), "of": len(flagged)},
        "cache": {"tokens": tokens, "bytes_per_token": cached.size(SHARD_FILES) / tokens},
        "heldout_records": len(heldout),
        "heldout_digest": f"sha256:{hashlib.sha256(as_json([[record.id, record.digest()] for record in heldout]).encode()).hexdigest()}",
        "versions": {name: _version(name) for name in LIBRARIES},
        "seeds": {"train-student": _seed(inputs, "train-student"), "train-control": _seed(inputs, "train-control"), "bootstrap": 0, "resamples": RESAMPLES},
    }
    if refused:
        results["refused_records"] = len(refused)
    metrics = {name: read_json_lines(inputs[stage].file("metrics.jsonl")) for name, stage in (("distilled", "train-student"), ("sft", "train-control")) if stage in inputs}
    with out.result("results.json") as file:
        file.write_text(as_json(results), encoding="utf-8")
    with out.result("records.parquet") as file:
        pq.write_table(as_table(kept, flagged), file, compression="zstd", write_page_checksum=True)
    with out.result("table.md") as file:
        file.write_text(_tables(results), encoding="utf-8")
    with out.result("curves.png") as file:
        plot_curves(file, metrics, results)
    return results


def _answers(inputs: Inputs, template: str) -> dict[str, Any]:
    asked, cached = inputs["evaluate-teacher"], inputs["cache-teacher"]
    if asked.identity["needs"]["cache-teacher"]["sections"]["data"]["template"] != template:
        raise Mismatch(
            f"{asked.path} has the teacher's answers to prompts of another data.template than that of {cached.path}, in which the students are asked. "
            "Run `pipeline evaluate-teacher` with this cache, or set evaluation.ask_teacher to false."
        )
    if not alike(asked.identity["sections"]["teacher"], cached.identity["sections"]["teacher"]):
        raise Mismatch(
            f"{asked.path} has the answers of another teacher than the one that {cached.path} is of, or of the same with other settings. What was kept would be told of two teachers in one. "
            "Give the folder of that teacher with --use evaluate-teacher=FOLDER, or set evaluation.ask_teacher to false."
        )
    return dict(read_json(asked.file("answers.json")))


def _students(student: Student, inputs: Inputs) -> Iterator[tuple[str, str, str | None, list[int] | None]]:
    """Name, folder or hub id, revision, layers to keep."""
    yield "student_before", inputs.model(student.model, student.revision), student.revision, student.layers
    if "train-control" in inputs:
        yield "sft", str(inputs["train-control"].folder("student")), None, None
    yield "distilled", str(inputs["train-student"].folder("student")), None, None


def _benchmarked(model: Scorer, live: Live, evaluation: Evaluation, heldout: list[Record], everyone: list[Record]) -> Evaluated:
    """heldout: the records that the projection knows; everyone: those that it refused, too."""
    results: dict[str, Any] = {}
    kept: list[Row] = []
    for entry in evaluation.benchmarks:
        figures = find("benchmarks", entry.benchmark)(*((live, everyone) if entry.live else (model, heldout)), **entry.options())
        rows = figures.pop(KEPT, [])
        refuse_twice(kept, rows)
        kept += rows
        tasks = figures.pop("tasks", {})
        assert not tasks.keys() & results.get("tasks", {}).keys() | figures.keys() & results.keys(), "config refuses what is given twice"
        tasks = results.get("tasks", {}) | tasks
        results |= figures | ({"tasks": tasks} if tasks else {})
    return results | ({"cut_prompts": live.cut} if evaluation.live else {}), kept


def _with(found: Evaluated, more: dict[str, Any]) -> Evaluated:
    return found[0] | more, found[1]


def _tables(results: dict[str, Any]) -> str:
    models = results["models"]
    parts = {
        "": results_table(results),
        "Questions": tasks_table(models),
        "What was kept of the teacher": retention_table(results["retention"], results["published"]) if results["retention"] else "",
        "Cost": cost_table(models),
    }
    return "\n".join(f"{f'## {title}' + chr(10) * 2 if title else ''}{text}" for title, text in parts.items() if text)


def _groups(models: dict[str, Evaluated]) -> dict[str, list[str]]:
    """Benchmark -> the tasks that it is made of, where it is made of several."""
    return {name: list(figures["subtasks"]) for found, _ in models.values() for name, figures in found.get("tasks", {}).items() if len(figures.get("subtasks", ())) > 1}


def _seen(cache: Cache, models: dict[str, Evaluated]) -> dict[tuple[str, str, str], bool] | None:
    """Of each record that was evaluated whether the training records have a part of it; None where their text is not in the cache."""
    if cache.about["text"] != "keep":
        return None
    texts: dict[tuple[str, str, str], dict[str, None]] = {}
    for row in (row for _, rows in models.values() for row in rows):
        texts.setdefault(key_of(row), {})[row.text] = None
    training = (text for record in cache.records("train") for text in (*(segment.text for segment in record.segments), "\n".join(segment.text for segment in record.segments)))
    return dict(zip(texts, seen(["\n".join(parts) for parts in texts.values()], training), strict=True))


def _seed(inputs: Inputs, stage: str) -> int | None:
    return inputs[stage].identity["sections"]["training"]["seed"] if stage in inputs else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
