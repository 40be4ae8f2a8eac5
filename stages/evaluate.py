"""Teacher, student before training, control and distilled student, on the held-out split."""

from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from pipeline.benchmarks._records import KEPT, as_table
from pipeline.benchmarks._scores import Scorer
from pipeline.cache.projected import StudentView
from pipeline.cache.reader import Cache
from pipeline.cache.schema import SHARD_FILES
from pipeline.config import Evaluation, Machine, Student
from pipeline.errors import InputError
from pipeline.files import as_json, read_json_lines
from pipeline.lookup import find
from pipeline.models.heads import row_logits, rows_that_are_tokens
from pipeline.models.loading import device_named, load_student
from pipeline.models.memory import PeakMemory
from pipeline.models.scoring import CachedTeacher, StudentScorer
from pipeline.models.tokenizers import load_tokenizer
from pipeline.reporting.plots import plot_curves
from pipeline.reporting.tables import results_table
from pipeline.running.folder import RunFolder
from pipeline.running.runner import Inputs
from pipeline.signals.records import Record


def run(student: Student, evaluation: Evaluation, machine: Machine, inputs: Inputs, out: RunFolder) -> dict[str, Any]:
    cached = inputs["cache-teacher"]
    cache = Cache(cached.file)
    refused = {id.partition("#choice")[0] for id in inputs["fit-projection"].summary.get("refused", {})}
    examples = [example for example in cache.examples("heldout") if (example.record.choice_of or example.record.id) not in refused]
    heldout = [example.record for example in examples if not example.record.choice_of]
    if not heldout:
        raise InputError("The cache has no held-out records to evaluate on. Give data.heldout, or a larger data.heldout.fraction.")
    models: dict[str, dict[str, Any]] = {}
    kept: dict[str, list[tuple[Record, dict[str, Any]]]] = {}

    teacher = CachedTeacher(examples)
    cost = {key: cached.summary[key] for key in ("tokens_per_second", "peak_memory_mb")}
    models["teacher"], kept["teacher"] = _benchmarked(teacher, evaluation, heldout)
    models["teacher"] |= cost

    device = device_named(machine.device)
    for name, source, revision, layers in _students(student, inputs):
        memory = PeakMemory(device)
        tokenizer = load_tokenizer(source, revision, cache.about["template"], name)
        view = StudentView(cache, inputs["fit-projection"].file, tokenizer.render, tokenizer.digest())
        model = load_student(source, revision, layers, device).eval()
        scorer = StudentScorer(row_logits(model, name, rows_that_are_tokens(model, name, tokenizer.vocabulary)), tokenizer.render, view, examples, machine.student_micro_batch_records)
        models[name], kept[name] = _benchmarked(scorer, evaluation, heldout)
        models[name] |= {"tokens_per_second": scorer.tokens / max(scorer.seconds, 1e-9), "peak_memory_mb": memory.megabytes()}
        del model, scorer

    tokens = sum(shard["tokens"] for shard in cache.about["shards"])
    results = {"models": models, "cache": {"tokens": tokens, "bytes_per_token": cached.size(SHARD_FILES) / tokens}, "heldout_records": len(heldout)}
    if refused:
        results["refused_records"] = len(refused)
    metrics = {name: read_json_lines(inputs[stage].file("metrics.jsonl")) for name, stage in (("distilled", "train-student"), ("sft", "train-control")) if stage in inputs}
    with out.result("results.json") as file:
        file.write_text(as_json(results), encoding="utf-8")
    with out.result("records.parquet") as file:
        pq.write_table(as_table(kept), file, compression="zstd", write_page_checksum=True)
    with out.result("table.md") as file:
        file.write_text(results_table(results), encoding="utf-8")
    with out.result("curves.png") as file:
        plot_curves(file, metrics, results)
    return results


def _students(student: Student, inputs: Inputs) -> Iterator[tuple[str, str, str | None, list[int] | None]]:
    """Name, folder or hub id, revision, layers to keep."""
    yield "student_before", inputs.model(student.model, student.revision), student.revision, student.layers
    if "train-control" in inputs:
        yield "sft", str(inputs["train-control"].folder("student")), None, None
    yield "distilled", str(inputs["train-student"].folder("student")), None, None


def _benchmarked(model: Scorer, evaluation: Evaluation, heldout: list[Record]) -> tuple[dict[str, Any], list[tuple[Record, dict[str, Any]]]]:
    """The figures, and what is to be kept of each record."""
    results: dict[str, Any] = {}
    kept: dict[str, list[tuple[Record, dict[str, Any]]]] = {}
    for entry in evaluation.benchmarks:
        figures = find("benchmarks", entry.benchmark)(model, heldout, **entry.options())
        kept[entry.benchmark] = figures.pop(KEPT, [])
        results |= figures
    return results, [row for rows in kept.values() for row in rows]
