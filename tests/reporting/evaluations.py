"""Finished evaluations with figures that are made up, in folders as `evaluate` and `train-student` leave them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.benchmarks._questions import Answered, figures_of, rows_of
from pipeline.benchmarks._records import RECORDS, as_table, key_of, row
from pipeline.benchmarks._retention import retention
from pipeline.files import as_json
from pipeline.running.fingerprint import fingerprint
from pipeline.running.folder import FinishedFolder, RunFolder
from pipeline.signals.records import Record, Segment

MACHINE = {"python": "3.11.7", "platform": "Linux", "processors": 2, "versions": {"torch": "2.13.0", "bitsandbytes": None}, "settings": {}, "seconds": 12.5}
TEACHER = {"teacher": 0.0, "student_before": 4.0}
"""Model -> its KL to the teacher."""
SUBJECTS = {"mmlu_anatomy": 12, "mmlu_virology": 8}
"""Task of the benchmark mmlu_medical -> its questions."""
FIRST = ("model", "record", "digest", "specialty", "logprob", "tokens", "answer_bytes", "kl", "agreeing", "aligned", "chosen", "answer", "right")
"""The columns of format 1."""


def evaluated(
    runs: Path,
    rate: float = 1e-3,
    seed: int = 0,
    kl: float = 2.0,
    control: float | None = 3.0,
    records: int = 40,
    specialties: Sequence[str | None] = ("heart", "lung", None),
    noise: float = 0.3,
    cache: str = "a",
    kept: bool = True,
    steps: int = 30,
    further: bool = False,
    published: dict[str, Any] | None = None,
    prompts: str = "sha256:0",
    subjects: dict[str, int] = SUBJECTS,
) -> Path:
    """The folder of one evaluation; those with the same records have the same difficulties.

    kept: each record's figures. further: as from format 2 on, with all that came with it (questions of `subjects`, what was
    generated, fidelity by place, cost, retention); otherwise format 1.
    """
    asked = [
        Record(f"r{i}", (Segment("user", f"{cache} {i}?"), Segment("assistant", "yes")), specialty=specialties[i % len(specialties)], options=("yes", "no"), answer_index=0) for i in range(records)
    ]
    training = {"learning_rate": rate, "seed": seed, "objective": [{"loss": "forward_kl", "weight": 0.7}]}
    needs = {"cache-teacher": _identity("cache-teacher", {"data": {"name": cache}}), "fit-projection": _identity("fit-projection", {"projection": {"method": "contextual"}})}
    students = {"train-student": _identity("train-student", {"student": {"layers": [0]}, "training": training}, needs)}
    if control is not None:
        students["train-control"] = _identity("train-student", {"student": {"layers": [0]}, "training": training | {"objective": [], "learning_rate": 0.0}}, needs)
    roots = {}
    for stage, identity in students.items():
        roots[stage] = _trained(runs, identity, seed + 100 * (stage == "train-control"), steps).root
    models, rows = {}, {}
    hard = np.random.default_rng(7).gamma(2, 0.5, records)
    for model, mean in (TEACHER | ({} if control is None else {"sft": control}) | {"distilled": kl}).items():
        own = np.random.default_rng([len(model), *([] if model in TEACHER else [seed, int(1e6 * rate) if model == "distilled" else 0])])
        aligned = np.random.default_rng(8).integers(5, 15, records)
        shares = np.maximum(mean * hard + own.normal(0, noise, records), 0) if mean else np.zeros(records)
        kls = shares * aligned
        agreeing = own.binomial(aligned, np.exp(-shares / 3))
        logprob = -np.log(2) * (1 + shares) * 3
        right = own.random(records) < 0.25 + 0.5 * np.exp(-shares)
        rows[model] = [
            row(
                record,
                logprob=logprob[i],
                tokens=4,
                answer_bytes=3,
                kl=kls[i],
                agreeing=int(agreeing[i]),
                aligned=int(aligned[i]),
                chosen=int(not right[i]),
                answer=0,
                right=bool(right[i]),
            )
            for i, record in enumerate(asked)
        ]
        bins = np.zeros((15, 3))
        bins[:, 0] = np.arange(15) + 1
        bins[:, 1] = bins[:, 0] * (np.arange(15) + 0.5) / 15
        bins[:, 2] = bins[:, 1] * (0.9 - 0.1 * mean)
        models[model] = {
            "bits_per_byte": float(-logprob.sum() / np.log(2) / (3 * records)),
            "kl_to_teacher": float(kls.sum() / aligned.sum()),
            "top1_agreement": float(agreeing.sum() / aligned.sum()),
            "accuracy": float(right.mean()),
            "accuracy_interval": [0.0, 1.0],
            "calibration_error": float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum()),
            "calibration": bins.tolist(),
            "tokens_per_second": 1000.0,
            "peak_memory_mb": 500.0,
        }
        if further:
            own = np.random.default_rng([99, len(model), seed, int(1000 * mean)])
            models[model] |= _further(rows[model], mean, own, prompts, subjects)
    identity = _identity("evaluate", {"student": {"layers": [0]}, "evaluation": {"control": control is not None}}, needs | students)
    results = {"models": models, "cache": {"tokens": 50_000, "bytes_per_token": 46.5}, "heldout_records": records}
    if further:
        seen = {key_of(one): number < 3 for number, one in enumerate(rows["distilled"])}
        results |= {"retention": retention(rows, {"mmlu_medical": list(subjects)}, seen), "published": published, "seen_in_training": {"words": 13, "records": 3, "of": len(seen)}}
    out = RunFolder(runs / "evaluate" / fingerprint(identity))
    with out.result("results.json") as file:
        file.write_text(as_json(results), encoding="utf-8")
    if kept:
        with out.result("records.parquet") as file:
            pq.write_table(as_table(rows, seen) if further else pa.table(as_table(rows).select(FIRST), pa.schema([RECORDS.field(name) for name in FIRST], {"format": "1"})), file)
    out.seal("evaluate", fingerprint(identity), identity, roots, results, MACHINE)
    out.close()
    return out.path


def _further(rows: list[Any], mean: float, own: np.random.Generator, prompts: str, subjects: dict[str, int]) -> dict[str, Any]:
    """The figures of a model, whose rows get what belongs to them."""
    heldout = list(rows)
    for one in heldout:
        one.columns.update(
            followed=int(own.integers(0, 5)), total_variation=1.0, top_agreeing=0.5, generated="one <b>", ended=True, rouge1=0.5, rouge2=0.25, rougeL=float(own.random()), confidence=0.75
        )
    answered = {
        task: [Answered(f"{task}/{n}", "d", task, f"{task} {n}?", np.log(own.dirichlet(np.ones(4))).tolist(), int(n % 4 != 0 and own.random() < 0.2 + 0.1 * mean), 0, task) for n in range(questions)]
        for task, questions in subjects.items()
    }
    every = [one for questions in answered.values() for one in questions]
    rows += rows_of(every)
    subtasks = {task: figures_of(questions) for task, questions in answered.items()}

    def near(place: int) -> dict[str, Any]:
        return {"kl_to_teacher": mean * (place + 1) / 5, "total_variation": 0.1 * mean, "top1_agreement": 1 / (1 + mean), "top5_agreement": 0.5, "positions": 40}

    batch = {"forward_seconds": 0.002, "first_token_seconds": 0.0125, "tokens_per_second": 1234.5 - 100 * mean}
    return {
        "token_accuracy": sum(one.columns["followed"] for one in heldout) / sum(one.columns["tokens"] for one in heldout),
        "rougeL": sum(one.columns["rougeL"] for one in heldout) / len(heldout),
        "total_variation": 0.1 * mean,
        "top5_agreement": 0.5,
        "confidence_correlation": None if mean else 1.0,
        "fidelity": {
            "by_specialty": {},
            "by_entropy": [near(decile) if decile else dict.fromkeys(near(0)) | {"positions": 0} for decile in range(10)],
            "by_position": [near(octave) | {"from": 2**octave - 1} for octave in range(5)],
        },
        "tasks": {
            "multiple_choice": figures_of([Answered("r", "d", None, "", [0.0, -1.0], int(not one.columns["right"]), 0) for one in heldout]),
            "mmlu_medical": figures_of(every) | {"mean_of_subtasks": float(np.mean([figures["accuracy"] for figures in subtasks.values()])), "subtasks": subtasks, "prompts": prompts},
        },
        "cost": {"parameters": 31_000_000, "weights_mb": 62.5, "peak_memory_mb": 700.0, "prompt_tokens": 128, "new_tokens": 32, "batches": {"1": batch, "8": batch}},
    }


def ablation(runs: Path, name: str, variants: dict[str, list[Path]]) -> Path:
    """The folder of an ablation with these evaluations, one a seed."""
    trials = []
    for variant, folders in variants.items():
        for folder in folders:
            finished = FinishedFolder(folder)
            needs = finished.identity["needs"]
            stages = {"evaluate": str(folder)} | {stage: str(runs / "train-student" / fingerprint(needs[stage])) for stage in ("train-student", "train-control") if stage in needs}
            trials.append({"variant": variant, "seed": needs["train-student"]["sections"]["training"]["seed"], "folders": stages, "models": finished.summary["models"]})
    place = runs / name
    place.mkdir(parents=True)
    (place / "ablation.json").write_text(json.dumps({"rows": [], "trials": trials}))
    return place


def _identity(stage: str, sections: dict[str, Any], needs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"stage": stage, "version": 1, "sections": sections, "needs": needs or {}}


def _trained(runs: Path, identity: dict[str, Any], seed: int, steps: int) -> FinishedFolder:
    folder = runs / "train-student" / fingerprint(identity)
    if not (folder / "manifest.json").exists():
        out = RunFolder(folder)
        noise = np.random.default_rng(seed).normal(0, 0.1, (2, steps))
        with out.result("metrics.jsonl") as file:
            lines = [
                {"step": step + 1, "loss": 1.0, "forward_kl": 9 * 0.9**step + 2 + noise[0, step], "cross_entropy": 9 * 0.93**step + 3 + noise[1, step], "learning_rate": 1e-3}
                | ({"specialty/rare": 1.0} if step % 2 == seed % 2 else {})  # another's steps
                for step in range(steps)
            ]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = {"steps": steps, "parameters": 1_500_000, "seconds": 100.0 + seed, "peak_memory_mb": 321.0}
        out.seal("train-student", fingerprint(identity), identity, {}, summary, MACHINE)
        out.close()
    return FinishedFolder(folder)
