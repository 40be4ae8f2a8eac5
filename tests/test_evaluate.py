"""The stage evaluate as a user sees it: questions, generated answers, what was kept, kills, and what it refuses."""

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.benchmarks._records import Row, refuse_twice
from pipeline.errors import InputError, Mismatch
from pipeline.running.fingerprint import fingerprint
from pipeline.running.folder import FinishedFolder
from pipeline.running.runner import Inputs
from stages.evaluate import _answers
from tests.conftest import CONFIG, Place
from tests.golden import _without_measured
from tests.test_reliability import killed_after

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'distillation-pipeline[eval]'")
pytest.importorskip("sacrebleu")

SUBJECTS = ("anatomy", "virology")
LIVE = "evaluation.benchmarks=[{benchmark: perplexity}, {benchmark: fidelity}, {benchmark: calibration}, {benchmark: text_quality, max_tokens: 6}, {benchmark: mmlu_medical, path: questions.jsonl}]"


def asked(count: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(0)
    for n in range(count):
        options = [f"the {organ} {draw.randrange(100)}" for organ in draw.sample(["heart", "kidney", "liver", "lung", "eye", "skin"], 4)]
        yield {"question": f"Where is finding {n}?", "options": options, "answer_idx": draw.randrange(4), "specialty": SUBJECTS[n % 2], "split": "test"}


@pytest.fixture(scope="module")
def evaluated(done: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The finished tiny experiment with questions beside it, its teacher asked and then deleted, and evaluated with both. Not to be changed."""
    place = Place(tmp_path_factory.mktemp("evaluated") / "place")
    shutil.copytree(done.path, place.path, symlinks=True)
    (place.path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked(20)))
    (place.path / "tiny").unlink()
    shutil.copytree(done.path / "tiny", place.path / "tiny")
    shutil.rmtree(place.path / "runs" / "evaluate")
    place.pipeline("evaluate-teacher", CONFIG, "--set", LIVE)
    shutil.rmtree(place.path / "tiny" / "teacher")
    place.pipeline("evaluate", CONFIG, "--set", LIVE, "--set", "machine.measure_cost=true")
    return place


@pytest.fixture
def results(evaluated: Place) -> dict[str, Any]:
    return json.loads((evaluated.path / "runs" / "tiny" / "results.json").read_text())


def test_the_teacher_answers_without_being_there(results: dict[str, Any]):
    for name, figures in results["models"].items():
        mmlu = figures["tasks"]["mmlu_medical"]
        assert mmlu["questions"] == 20, name
        assert 0 <= mmlu["accuracy_interval"][0] <= mmlu["accuracy"] <= mmlu["accuracy_interval"][1] <= 1
        assert {part["questions"] for part in mmlu["subtasks"].values()} == {10}
        assert figures["text_quality"]["answers"] == results["heldout_records"]
        assert figures["rouge1"] is not None
    assert len({figures["tasks"]["mmlu_medical"]["prompts"] for figures in results["models"].values()}) == 1  # all were asked the same


def test_one_json_says_what_was_measured_with_what(results: dict[str, Any]):
    assert {"torch", "transformers", "lm-eval", "sacrebleu", "rouge-score", "distillation-pipeline"} <= {name for name, version in results["versions"].items() if version}
    assert results["seeds"]["train-student"] == 0
    assert results["seeds"]["resamples"] == 10_000
    mmlu = results["models"]["distilled"]["tasks"]["mmlu_medical"]
    assert mmlu["prompts"].startswith("sha256:")
    assert mmlu["seeds"]["fewshot"] == 1234
    assert mmlu["harness"]["version"]
    kept = {(entry["task"], entry["figure"]): entry for entry in results["retention"]}
    assert kept["mmlu_medical", "accuracy"]["records"] == 20
    assert kept["heldout", "rougeL"]["records"] == results["heldout_records"]
    assert kept["mmlu_medical", "accuracy"]["mcnemar"]["baseline"]["p"] <= 1
    cost = results["models"]["distilled"]["cost"]
    assert cost["batches"]["8"]["tokens_per_second"] > 0
    assert results["models"]["teacher"]["cost"] is None  # its cache was made with measure_cost: false


def test_what_is_kept_of_each_record_sums_to_the_figures(evaluated: Place, results: dict[str, Any]):
    rows = pq.read_table(evaluated.path / "runs" / "tiny" / "records.parquet").to_pylist()
    for name, figures in results["models"].items():
        mine = [row for row in rows if row["model"] == name]
        texts = [row for row in mine if row["task"] == "heldout"]
        questions = [row for row in mine if row["task"].startswith("mmlu_")]
        assert len(questions) == 20
        assert len(texts) == results["heldout_records"]
        assert sum(row["right"] for row in questions) / 20 == pytest.approx(figures["tasks"]["mmlu_medical"]["accuracy"])
        aligned = sum(row["aligned"] for row in texts)
        assert sum(row["total_variation"] for row in texts) / aligned == pytest.approx(figures["total_variation"])
        assert sum(row["top_agreeing"] for row in texts) / aligned == pytest.approx(figures["top5_agreement"])
        assert sum(row["followed"] for row in texts) / sum(row["tokens"] for row in texts) == pytest.approx(figures["token_accuracy"])
        assert sum(row["rougeL"] for row in texts) / len(texts) == pytest.approx(figures["rougeL"])


def test_the_table_has_a_row_of_each(evaluated: Place):
    table = (evaluated.path / "runs" / "tiny" / "table.md").read_text()
    for said in ("## Questions", "mmlu_medical | distilled", "## What was kept of the teacher", "| mmlu\\_anatomy |", "ROUGE-L", "## Cost", "| distilled |"):
        assert said in table, said


def test_the_harness_itself_says_the_same_of_the_students_folder(evaluated: Place, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from pipeline.benchmarks.mmlu_medical import mmlu_medical

    folder = next(manifest.parent / "student" for manifest in (evaluated.path / "runs" / "train-student").glob("*/manifest.json") if manifest.parent.name == runs_of(evaluated)["train-student"])
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)

    class Itself:
        def loglikelihoods(self, asked: list[tuple[str, str]]) -> list[tuple[float, bool]]:
            return theirs.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in asked], disable_tqdm=True)

    monkeypatch.chdir(evaluated.path)
    found = mmlu_medical(Itself(), [], path="questions.jsonl")
    mine = results["models"]["distilled"]["tasks"]["mmlu_medical"]
    assert found["tasks"]["mmlu_medical"]["prompts"] == mine["prompts"]
    assert found["tasks"]["mmlu_medical"]["accuracy"] == mine["accuracy"]
    assert found["tasks"]["mmlu_medical"]["brier"] == pytest.approx(mine["brier"], abs=1e-6)
    assert results["models"]["sft"]["tasks"]["mmlu_medical"]["brier"] != pytest.approx(mine["brier"], abs=1e-4)  # control: another model does not


def runs_of(place: Place) -> dict[str, str]:
    """By stage, the fingerprint of what the evaluation is built on."""
    (manifest,) = (place.path / "runs" / "evaluate").glob("*/manifest.json")
    return {stage: fingerprint(identity) for stage, identity in json.loads(manifest.read_text())["identity"]["needs"].items()}


def without_measured(place: Path) -> Any:
    return _without_measured(json.loads((place / "results.json").read_text()))


def test_killed_between_models_it_goes_on_and_ends_with_the_same(evaluated: Place, tmp_path: Path):
    place = Place(tmp_path / "place")
    shutil.copytree(evaluated.path, place.path, symlinks=True)
    (before,) = (place.path / "runs" / "evaluate").iterdir()
    wanted, rows = without_measured(before), hashlib.sha256((before / "records.parquet").read_bytes()).hexdigest()
    shutil.rmtree(before)
    for commits in (1, 4):
        folder = killed_after(place, commits, "evaluate", CONFIG, "--set", LIVE)
    assert (folder / "commits" / "figures-student_before-2.json").exists()
    assert place.json("status", CONFIG, "--set", LIVE)["stages"][-1]["state"].startswith("begun")
    place.pipeline("evaluate", CONFIG, "--set", LIVE)
    assert without_measured(folder) == wanted
    assert hashlib.sha256((folder / "records.parquet").read_bytes()).hexdigest() == rows
    assert not list(folder.glob("commits/*"))


def test_the_teacher_must_be_asked_first_or_left_out(evaluated: Place, tmp_path: Path):
    place = Place(tmp_path / "place")
    shutil.copytree(evaluated.path, place.path, symlinks=True)
    other = LIVE.replace("max_tokens: 6", "max_tokens: 7")
    said = place.pipeline("evaluate", CONFIG, "--set", other, status=2)
    assert "Run `pipeline evaluate-teacher` with the same file first" in said
    assert "evaluation.ask_teacher" in said
    place.pipeline("evaluate", CONFIG, "--set", other, "--set", "evaluation.ask_teacher=false", "--set", "evaluation.control=false")
    found = json.loads((place.path / "runs" / "tiny" / "results.json").read_text())
    assert found["models"]["teacher"]["tasks"]["mmlu_medical"]["accuracy"] is None
    assert found["models"]["teacher"]["rouge1"] is None
    assert found["models"]["teacher"]["kl_to_teacher"] == 0
    assert found["models"]["distilled"]["tasks"]["mmlu_medical"]["accuracy"] is not None
    assert next(entry for entry in found["retention"] if entry["task"] == "mmlu_medical")["teacher"] is None


def test_one_evaluation_has_one_teacher(evaluated: Place, made: Path, tmp_path: Path):
    place = Place(tmp_path / "place")
    shutil.copytree(evaluated.path, place.path, symlinks=True)
    shutil.copytree(made / "tiny" / "teacher", place.path / "tiny" / "teacher")
    cache, asked = (next((place.path / "runs" / stage).iterdir()) for stage in ("cache-teacher", "evaluate-teacher"))
    other = ["--set", LIVE, "--set", "teacher.dtype=bfloat16", "--set", "training.steps=1", "--set", "evaluation.control=false"]
    assert "not the one that the cache is of" in place.pipeline("evaluate-teacher", CONFIG, *other, "--use", f"cache-teacher={cache}", status=Mismatch.exit_status)
    for stage in ("prepare-data", "cache-teacher", "evaluate-teacher", "train-student"):
        place.pipeline(stage, CONFIG, *other)
    assert "the answers of another teacher" in place.pipeline("evaluate", CONFIG, *other, "--use", f"evaluate-teacher={asked}", status=Mismatch.exit_status)
    place.pipeline("evaluate", CONFIG, *other)  # control: with its own
    (place.path / "tiny" / "teacher").rename(place.path / "moved")  # the same model in another place is the same teacher
    place.pipeline("evaluate-teacher", CONFIG, "--set", LIVE.replace("max_tokens: 6", "max_tokens: 5"), "--set", "teacher.model=moved", "--use", f"cache-teacher={cache}")


def test_answers_to_another_template_are_refused(evaluated: Place, tmp_path: Path):
    place = Place(tmp_path / "place")
    shutil.copytree(evaluated.path, place.path, symlinks=True)
    (asked,) = (place.path / "runs" / "evaluate-teacher").iterdir()
    cache = next((place.path / "runs" / "cache-teacher").iterdir())
    with pytest.raises(Mismatch, match=r"another data\.template"):
        _answers(Inputs({"evaluate-teacher": FinishedFolder(asked), "cache-teacher": FinishedFolder(cache)}, place.path / "runs"), "chat")
    assert _answers(Inputs({"evaluate-teacher": FinishedFolder(asked), "cache-teacher": FinishedFolder(cache)}, place.path / "runs"), "plain")  # control


def test_what_the_training_records_have_is_flagged_and_scored_apart(own: Place):
    rows = [json.loads(line) for line in (own.path / "tiny" / "train.jsonl").read_text().splitlines()]
    told = "It is a very rare finding that is seen in one of a hundred people who live by the sea."
    heldout = [{"question": f"What else is no {n}?", "answer": told if n < 2 else f"A defect of the eye, {n}."} for n in range(5)]
    (own.path / "tiny" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "What is a rare finding?", "answer": f"Well. {told.upper()}"}]))
    (own.path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in heldout))
    (own.path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked(4)))
    words = ["--set", "data.heldout=[{dataset: jsonl, path: heldout.jsonl}]", "--set", "evaluation.control=false", "--set", "training.steps=1"]
    own.pipeline("run", CONFIG, *words)
    found = json.loads((own.path / "runs" / "tiny" / "results.json").read_text())
    assert found["seen_in_training"] == {"words": 13, "records": 2, "of": 5}
    bits = next(entry for entry in found["retention"] if entry["figure"] == "bits_per_byte")
    assert (bits["seen"]["records"], bits["not_seen"]["records"]) == (2, 3)
    kept = [row for row in pq.read_table(own.path / "runs" / "tiny" / "records.parquet").to_pylist() if row["model"] == "distilled"]
    assert [row["seen"] for row in sorted(kept, key=lambda row: row["record"])].count(True) == 2
    assert "in the training records" in (own.path / "runs" / "tiny" / "table.md").read_text()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("evaluation.benchmarks=[{benchmark: perplexity}, {benchmark: perplexity}]", "perplexity stands twice among the benchmarks"),
        ("evaluation.benchmarks=[{benchmark: medqa}, {benchmark: harness, tasks: [arc_easy, medqa]}]", "medqa stands twice among the benchmarks"),
        ("targets.text=omit", "has text_quality, which needs the text of the held-out records"),
        ("evaluation.published={path: nothing.json}", "No file is at nothing.json"),
        ("evaluation.ask_teacher=false", "ask_teacher has no effect without a benchmark"),
        ("evaluation.benchmarks={mmlu_medical: {pth: questions.jsonl}}", "mmlu_medical has no option 'pth'; did you mean 'path'?"),
        ("evaluation.benchmarks={mmlu_medicine: {}}", "did you mean 'mmlu_medical'?"),
    ],
)
def test_what_it_refuses(evaluated: Place, tmp_path: Path, setting: str, said: str):
    place = Place(tmp_path / "place")
    shutil.copytree(evaluated.path, place.path, symlinks=True)
    live = ["--set", LIVE] if setting.startswith("targets") else []
    assert said in place.pipeline("evaluate", CONFIG, *live, "--set", setting, status=2)


def test_benchmarks_are_a_list_or_by_name(evaluated: Place):
    by_name = "evaluation.benchmarks={perplexity: , fidelity: {}, calibration: , text_quality: {max_tokens: 6}, mmlu_medical: {path: questions.jsonl}}"
    assert evaluated.json("status", CONFIG, "--set", by_name)["stages"][-1]["state"] == "done"


def test_two_benchmarks_do_not_ask_the_same_task():
    one, other = Row("a", "0", None, "", {}, "medqa_4options"), Row("b", "1", None, "", {}, "medqa_4options")
    with pytest.raises(InputError, match="ask medqa_4options, and their questions would be mixed"):
        refuse_twice([one], [other])
    refuse_twice([one], [Row("b", "1", None, "", {}, "mmlu_anatomy")])
    refuse_twice([Row("a", "0", None, "", {})], [Row("a", "0", None, "", {})])  # of the held-out records every benchmark says something
