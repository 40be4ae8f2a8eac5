"""The whole pipeline on tiny models, as a user runs it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.models.loading import load_teacher
from pipeline.reporting.inspection import record
from pipeline.signals.codec import REST_STEP, logprob_error, step_table
from tests.conftest import CONFIG, ROOT, Place, link_inputs

MEASURED = {"bits_per_byte", "kl_to_teacher", "top1_agreement", "accuracy", "accuracy_interval", "tokens_per_second", "peak_memory_mb"}


def test_a_run_ends_in_results_a_table_curves_and_an_ordinary_model_folder(done: Place):
    results = json.loads((done.path / "runs" / "tiny" / "results.json").read_text())
    assert set(results["models"]) == {"teacher", "student_before", "sft", "distilled"}
    assert all(row.keys() >= MEASURED for row in results["models"].values())
    assert results["models"]["teacher"]["kl_to_teacher"] == 0
    assert results["models"]["distilled"]["kl_to_teacher"] < results["models"]["sft"]["kl_to_teacher"] < results["models"]["student_before"]["kl_to_teacher"]
    assert results["cache"].keys() >= {"tokens", "bytes_per_token"}
    assert (done.path / "runs" / "tiny" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    student = done.json("train-student", CONFIG)["folder"]
    model = AutoModelForCausalLM.from_pretrained(done.path / student / "student")
    tokenizer = AutoTokenizer.from_pretrained(done.path / student / "student")
    assert model.config.num_hidden_layers == 2
    assert model.generate(**tokenizer("Question:", return_tensors="pt"), max_new_tokens=3, do_sample=False).shape[1] > 3
    assert "tiny/teacher" in (done.path / student / "student" / "README.md").read_text()
    assert len((done.path / student / "metrics.jsonl").read_text().splitlines()) == 12
    assert not (done.path / student / "checkpoints").exists() or not list((done.path / student / "checkpoints").iterdir())


def test_a_second_run_does_nothing_and_imports_no_torch(done: Place):
    before = {file: file.stat().st_mtime_ns for file in (done.path / "runs").rglob("*") if file.is_file() and "runs/tiny/" not in str(file)}
    code = f"import sys; sys.argv = ['pipeline', 'run', {CONFIG!r}, '--json']\nfrom stages.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'pyarrow', 'transformers'} & set(sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=done.path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert {row["state"] for row in json.loads(found.stdout)["stages"]} == {"already done"}
    assert before == {file: file.stat().st_mtime_ns for file in before}


def records_of(place: Place) -> list[str]:
    import pyarrow.parquet as pq

    cache = place.finished("cache-teacher")
    return [id for name in cache.names("records-") for id in pq.read_table(cache.path / name)["id"].to_pylist()]


def largest_error(place: Place, model: torch.nn.Module, records: list[str], shift: int = 0) -> float:
    """Of the cached log-probabilities against a direct float32 log_softmax, as a share of the codec's stated error."""
    table = step_table(0.02, 0.5)
    folder = place.finished("cache-teacher").path
    vocabulary = len(AutoTokenizer.from_pretrained(place.path / "tiny" / "teacher"))
    worst = 0.0
    for id in records:
        shown = record(folder, id)
        with torch.inference_mode():
            logits = model(torch.tensor([shown["token_ids"]])).logits[0].float()
        direct = logits[:, :vocabulary].log_softmax(-1).double().numpy()
        for row in shown["positions"]:
            true = direct[min(row["position"] + shift, len(direct) - 1)]
            kept = np.array(row["kept_logprobs"])
            allowed = 1.5 * logprob_error(true[row["kept_ids"]], table) + 1e-3
            moved = max(allowed.max(), REST_STEP / 2)  # by what makes a position's sum 1
            worst = max(worst, float(np.max(np.abs(kept - true[row["kept_ids"]]) / (allowed + moved))))
            worst = max(worst, abs(row["realised_logprob"] - true[row["realised_id"]]) / 1e-3)
            others = np.delete(true, row["kept_ids"])
            worst = max(worst, abs(row["rest_logprob"] - np.logaddexp.reduce(others)) / (REST_STEP / 2 + moved))
            assert row["realised_id"] == shown["token_ids"][row["position"] + 1]
            assert shift or others.max() <= true[row["kept_ids"]].min() + 1e-5
    return worst


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_cache_holds_what_the_same_teacher_says_directly(place: Place, quantization: str):
    change = ["--set", f"teacher.quantization={quantization}", "--set", "data.records_per_shard=20", "--set", "data.train.0.limit=24"]
    place.pipeline("prepare-data", CONFIG, *change)
    place.pipeline("cache-teacher", CONFIG, *change)
    model = load_teacher(str(place.path / "tiny" / "teacher"), None, quantization, True, "float32", torch.device("cpu"))
    records = records_of(place)[:20]
    assert len(records) == 20
    assert largest_error(place, model, records) <= 1.0
    assert place.json("inspect", str(place.finished("cache-teacher").path), "--record", records[0]) == record(place.finished("cache-teacher").path, records[0])
    assert largest_error(place, model, records[:2], shift=1) > 10.0  # control: one position off


def test_a_student_that_is_the_teacher_has_nothing_to_learn(place: Place):
    same = ["--set", "student.model=tiny/teacher", "--set", "student.layers=null", "--set", "training.objective=[{loss: forward_kl}]", "--set", "evaluation.control=false"]
    same += ["--set", "training.steps=1", "--set", "training.temperature=1.0"]
    place.pipeline("run", CONFIG, *same)
    results = json.loads((place.path / "runs" / "tiny" / "results.json").read_text())
    assert place.finished("fit-projection").summary["method"] == "identity"
    assert abs(results["models"]["student_before"]["kl_to_teacher"]) < 1e-3  # what rounding to one byte makes
    assert results["models"]["student_before"]["top1_agreement"] > 0.99
    assert results["models"]["student_before"]["bits_per_byte"] == pytest.approx(results["models"]["teacher"]["bits_per_byte"], rel=1e-5)
    assert results["models"]["student_before"]["accuracy"] == results["models"]["teacher"]["accuracy"]
    mine, theirs = (np.array(results["models"][name]["calibration"]) for name in ("student_before", "teacher"))
    assert mine.sum(0) == pytest.approx(theirs.sum(0), rel=0.01)
    assert results["models"]["student_before"]["calibration_error"] == pytest.approx(results["models"]["teacher"]["calibration_error"], abs=0.01)
    norm = place.finished("train-student").summary["last"]["gradient_norm"]
    # control: another student has a gradient of another size
    other = ["student.model=tiny/student" if change == "student.model=tiny/teacher" else change for change in same]
    away = place.json("train-student", CONFIG, *other)["summary"]["last"]["gradient_norm"]
    assert norm < 0.02 * away


def test_the_cache_folder_alone_is_enough_for_students(done: Place, own: Place, tmp_path: Path):
    cache = tmp_path / "copied"
    shutil.copytree(done.finished("cache-teacher").path, cache)
    shutil.rmtree(own.path / "tiny" / "teacher")
    (own.path / "tiny" / "train.jsonl").unlink()
    use = ["--use", f"cache-teacher={cache}"]
    assert own.json("train-student", CONFIG, *use)["state"] == "done"
    own.pipeline("evaluate", CONFIG, *use)
    mine = json.loads((own.path / "runs" / "tiny" / "results.json").read_text())["models"]["distilled"]
    theirs = json.loads((done.path / "runs" / "tiny" / "results.json").read_text())["models"]["distilled"]
    assert {key: mine[key] for key in ("bits_per_byte", "kl_to_teacher", "accuracy")} == {key: theirs[key] for key in ("bits_per_byte", "kl_to_teacher", "accuracy")}
    assert own.json("status", CONFIG, *use)["stages"][0]["stage"] == "cache-teacher"


def test_a_finished_cache_is_found_after_the_teacher_and_the_data_are_gone(own: Place):
    own.pipeline("prepare-data", CONFIG)
    own.pipeline("cache-teacher", CONFIG)
    shutil.rmtree(own.path / "tiny" / "teacher")
    (own.path / "tiny" / "train.jsonl").unlink()
    assert own.json("cache-teacher", CONFIG)["state"] == "already done"
    message = own.pipeline("cache-teacher", CONFIG, "--set", "targets.logits.keep=3", status=2)
    assert "No model folder is at" in message


def test_text_can_be_left_out_for_students_with_the_teachers_tokenizer(place: Place):
    omit = ["--set", "targets.text=omit"]
    place.pipeline("prepare-data", CONFIG)
    place.pipeline("cache-teacher", CONFIG, *omit)
    cache = place.finished("cache-teacher")
    assert b"What is" not in b"".join((cache.path / name).read_bytes() for name in cache.names("records-"))
    same = ["--set", "student.model=tiny/teacher", "--set", "student.layers=null"]
    assert place.json("train-student", CONFIG, *omit, *same)["state"] == "done"
    assert "text: omit" in place.pipeline("train-student", CONFIG, *omit, status=2)


def test_a_finished_student_can_be_the_next_teacher(done: Place, made: Path, tmp_path: Path):
    place = link_inputs(made, tmp_path / "next")
    shutil.copytree(done.path / "runs", place.path / "runs")
    student = place.json("train-student", CONFIG)["fingerprint"]
    report = place.json("cache-teacher", CONFIG, "--set", f"teacher.model=run:train-student/{student}")
    assert report["state"] == "done"


def test_the_control_is_the_student_trained_without_the_teacher(done: Place):
    explicit = ["--set", "training.objective=[{loss: cross_entropy}]", "--set", "training.temperature=1.0"]
    control = done.json("train-control", CONFIG)
    assert done.json("train-student", CONFIG, *explicit) == control | {"stage": "train-student"}
    log = [json.loads(line) for line in (done.path / control["folder"] / "metrics.jsonl").read_text().splitlines()]
    assert all("forward_kl" not in row for row in log)


def test_the_seed_and_only_what_matters_changes_the_weights(done: Place, made: Path, tmp_path: Path):
    place = link_inputs(made, tmp_path / "again")
    shutil.copytree(done.path / "runs", place.path / "runs")
    first = done.path / done.json("train-student", CONFIG)["folder"]
    shutil.rmtree(place.path / first.relative_to(done.path))
    again = place.path / place.json("train-student", CONFIG, "--set", "machine.workers=3", "--set", "machine.checkpoint_steps=1")["folder"]
    assert again.name == first.name
    one, other = (load_file(folder / "student" / "model.safetensors") for folder in (first, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    seeded = place.path / place.json("train-student", CONFIG, "--set", "training.seed=1")["folder"]
    assert not torch.equal(load_file(seeded / "student" / "model.safetensors")["model.norm.weight"], one["model.norm.weight"])


def test_the_command_line_starts_at_once_and_without_torch(done: Place):
    import time

    for words in (["--help"], ["status", CONFIG]):
        seconds = []
        for _ in range(3):
            started = time.monotonic()
            subprocess.run([sys.executable, "-c", f"import sys; sys.argv = ['pipeline', *{words!r}]; from stages.cli import main; main()"], cwd=done.path, capture_output=True, check=True)
            seconds.append(time.monotonic() - started)
        assert min(seconds) < 0.6, f"{words}: {min(seconds):.2f} s"
    code = "import sys, stages.cli; assert not {'torch', 'numpy', 'pyarrow', 'transformers', 'rich', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
