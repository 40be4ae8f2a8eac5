import gzip
import json
import logging
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("lm_eval", reason="needs the extra [eval]")

from pipeline.benchmarks import _harness
from pipeline.benchmarks._records import RECORDS, as_table
from pipeline.benchmarks.mmlu_medical import SUBJECTS
from pipeline.errors import Disagreement, InputError, NumericsError
from pipeline.lookup import find

ASKED = {"mmlu_medical": "test", "medmcqa": "validation", "medqa": "test", "pubmedqa": "test"}
EXAMPLES = {"mmlu_medical": "dev", "medmcqa": "train", "medqa": "train", "pubmedqa": "train"}
TASKS = {"mmlu_medical": [f"mmlu_{subject}" for subject in SUBJECTS], "medmcqa": ["medmcqa"], "medqa": ["medqa_4options"], "pubmedqa": ["pubmedqa"]}
REPOSITORIES = {"cais/mmlu": "mmlu_medical", "openlifescienceai/medmcqa": "medmcqa", "GBaker/MedQA-USMLE-4-options-hf": "medqa", "bigbio/pubmed_qa": "pubmedqa"}
Row = dict[str, Any]
Likes = Callable[[str, str], float]


class Model:
    """Gives each (context, continuation) the log-probability that `likes` says, and keeps what it was asked."""

    def __init__(self, likes: Likes):
        self._likes = likes
        self.asked: list[tuple[str, str]] = []

    def loglikelihoods(self, asked):
        self.asked += asked
        return [(self._likes(*one), False) for one in asked]


def noise(context: str, continuation: str) -> float:
    return -random.Random(f"{context}{continuation}").uniform(0.1, 9.0)


def always(liked: str) -> Likes:
    return lambda context, continuation: -1.0 if continuation == f" {liked}" else -2.0


def oracle(rows: list[Row]) -> Likes:
    """Knows the right one of each question, whose texts no two have in common."""
    right = {row["question"].strip(): row["options"][row["answer_idx"]] if "yes" in row["options"] else "ABCD"[row["answer_idx"]] for row in rows}

    def likes(context: str, continuation: str) -> float:
        last = max(right, key=context.rfind)
        return -0.1 if continuation == f" {right[last]}" else -5.0

    return likes


def questions(name: str, count: int = 16, examples: int = 24, seed: int = 0) -> list[Row]:
    """Rows as a file has them; of mmlu_medical the eight subjects in turn."""
    draw = random.Random(seed)
    rows = []
    for n in range(count + examples):
        split = ASKED[name] if n < count else EXAMPLES[name]
        row = {"split": split, "question": f" What is é {n} of {split}? ", "specialty": SUBJECTS[n % 8] if name == "mmlu_medical" else draw.choice(["Surgery", "Skin"])}
        if name == "pubmedqa":
            rows.append(row | {"context": [f"First part {n}.", f"Second part {n}."], "options": ["yes", "no", "maybe"], "answer_idx": draw.randrange(3)})
        else:
            rows.append(row | {"context": None, "options": [f"{letter} {n}" for letter in "wxyz"], "answer_idx": draw.randrange(4)})
    return rows


def as_hub(name: str, row: Row) -> Row:
    """All of the columns that the hub's copy has."""
    of, right = row["options"], row["answer_idx"]
    if name == "mmlu_medical":
        return {"question": row["question"], "subject": row["specialty"], "choices": of, "answer": right}
    if name == "medmcqa":
        about = {"id": "x", "choice_type": "single", "exp": None, "subject_name": row["specialty"], "topic_name": None}
        return {"question": row["question"], "opa": of[0], "opb": of[1], "opc": of[2], "opd": of[3], "cop": right, **about}
    if name == "medqa":
        return {"id": "x", "sent1": row["question"], "sent2": "", **{f"ending{n}": option for n, option in enumerate(of)}, "label": right}
    about = {"LABELS": ["A"], "MESHES": ["m"], "YEAR": "2019", "reasoning_required_pred": "yes", "reasoning_free_pred": "yes", "LONG_ANSWER": "Long."}
    return {"QUESTION": row["question"], "CONTEXTS": row["context"], "final_decision": of[right], **about}


def fill_hub(monkeypatch: pytest.MonkeyPatch, rows: list[Row]) -> None:
    """A hub that has these rows; of MMLU the rows of the subject that is asked for, and of a subject that no row is of all of them."""

    def load(path, name=None, **_):
        benchmark = REPOSITORIES[path]
        of = [row for row in rows if row["specialty"] == name] if benchmark == "mmlu_medical" and name in SUBJECTS else rows
        splits = {split: datasets.Dataset.from_list([as_hub(benchmark, row) for row in of if row["split"] == split]) for split in (ASKED[benchmark], EXAMPLES[benchmark])}
        if answer := {"mmlu_medical": "answer", "medmcqa": "cop"}.get(benchmark):
            splits = {split: docs.cast_column(answer, datasets.ClassLabel(names=list("ABCD"))) for split, docs in splits.items()}
        return datasets.DatasetDict(splits)

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load)


def written(folder: Path, rows: list[Row]) -> str:
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def run(name: str, live: Any, **options: Any) -> dict[str, Any]:
    return find("benchmarks", name)(live, [], **options)


def figures(name: str, likes: Likes, folder: Path, rows: list[Row], **options: Any) -> dict[str, Any]:
    return run(name, Model(likes), path=written(folder, rows), **options)["tasks"][name]


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("name", list(ASKED))
def test_hub_and_file_ask_the_same_and_give_the_same_numbers(name, shots, tmp_path, monkeypatch):
    rows = questions(name)
    one, other = Model(noise), Model(noise)
    with monkeypatch.context() as patched:
        fill_hub(patched, rows)
        from_hub = run(name, one, shots=shots)
    from_file = run(name, other, path=written(tmp_path, rows), shots=shots)
    assert one.asked == other.asked
    assert len(one.asked) == 16 * (3 if name == "pubmedqa" else 4)
    assert all(context.count("Answer:") == shots + 1 for context, _ in one.asked)
    theirs, ours = from_hub["tasks"][name], from_file["tasks"][name]
    assert (theirs.pop("source"), ours.pop("source")) == ("hub", "file")
    assert theirs == ours
    assert (ours["shots"], ours["questions"], list(ours["subtasks"])) == (shots, 16, TASKS[name])
    kept = [[(row.task, row.record, row.digest, row.text, row.columns) for row in found["records"]] for found in (from_hub, from_file)]
    assert kept[0] == kept[1]
    assert len({row[:3] for row in kept[0]}) == 16


@pytest.mark.parametrize("name", list(ASKED))
def test_an_altered_option_changes_the_digests_of_its_question_and_of_the_prompts_only(name, tmp_path):
    rows = questions(name)
    before = run(name, Model(noise), path=written(tmp_path, rows))
    other = [dict(row) for row in rows]
    if name == "pubmedqa":  # its options are always the same
        other[3]["context"] = [*other[3]["context"], "And more."]
    else:
        other[3]["options"] = [*other[3]["options"][:3], "another"]
    after = run(name, Model(noise), path=written(tmp_path, other))
    assert before["tasks"][name]["prompts"].startswith("sha256:")
    assert before["tasks"][name]["prompts"] != after["tasks"][name]["prompts"]
    assert Counter(one.digest == two.digest for one, two in zip(before["records"], after["records"], strict=True)) == {True: 15, False: 1}
    assert run(name, Model(noise), path=written(tmp_path, rows)) == before


def test_the_right_answer_is_part_of_a_questions_digest(tmp_path):
    rows = questions("medqa", 2)
    before = run("medqa", Model(noise), path=written(tmp_path, rows))
    rows[0]["answer_idx"] = (rows[0]["answer_idx"] + 1) % 4
    after = run("medqa", Model(noise), path=written(tmp_path, rows))
    assert [one.digest == two.digest for one, two in zip(before["records"], after["records"], strict=True)] == [False, True]
    assert before["tasks"]["medqa"]["prompts"] == after["tasks"]["medqa"]["prompts"]


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("name", list(ASKED))
def test_an_oracle_is_always_right(name, shots, tmp_path):
    rows = questions(name)
    found = figures(name, oracle(rows), tmp_path, rows, shots=shots)
    assert (found["accuracy"], found["accuracy_interval"][1], found["mean_of_subtasks"]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("name", list(ASKED))
def test_a_constant_answer_is_right_as_often_as_that_is_the_answer(name, tmp_path):
    rows = questions(name, count=80)
    counts = Counter(row["answer_idx"] for row in rows if row["split"] == ASKED[name])
    ((majority, most),) = counts.most_common(1)
    for n, liked in enumerate(["yes", "no", "maybe"] if name == "pubmedqa" else "ABCD"):
        found = figures(name, always(liked), tmp_path, rows)
        assert found["accuracy"] == pytest.approx(counts[n] / 80)
        assert (found["accuracy"] == pytest.approx(most / 80)) or n != majority
        assert found.get("acc_norm") == (found["accuracy"] if name in ("medmcqa", "medqa") else None)  # letters are all as long


@pytest.mark.parametrize(("name", "chance"), [("medqa", 1 / 4), ("pubmedqa", 1 / 3)])
def test_guesses_are_within_their_interval_of_chance(name, chance, tmp_path):
    found = figures(name, noise, tmp_path, questions(name, count=400))
    low, high = found["accuracy_interval"]
    assert found["chance"] == pytest.approx(chance)
    assert low <= chance <= high
    assert low <= found["accuracy"] <= high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(chance * (1 - chance) / 400), rel=0.15)


def test_the_mean_of_the_subjects_weighs_each_the_same(tmp_path):
    rows = [row | {"answer_idx": 0 if row["specialty"] == "anatomy" else 1} for row in questions("mmlu_medical") if row["specialty"] in ("anatomy", "virology")]
    anatomy = next(row for row in rows if row["specialty"] == "anatomy")
    found = figures("mmlu_medical", always("A"), tmp_path, [*rows, *[anatomy] * 6])
    assert (found["accuracy"], found["mean_of_subtasks"]) == (8 / 10, 1 / 2)
    assert {name: (of["accuracy"], of["questions"]) for name, of in found["subtasks"].items()} == {"mmlu_anatomy": (1.0, 8), "mmlu_virology": (0.0, 2)}
    assert all("calibration" not in of and "accuracy_interval" in of for of in found["subtasks"].values())


def test_the_order_in_which_a_model_computes_is_nothing_to_the_result(tmp_path):
    class Shortest(Model):
        def loglikelihoods(self, asked):
            found: dict[int, tuple[float, bool]] = {}
            for n in sorted(range(len(asked)), key=lambda n: len(asked[n][0]) * 7 % 11):
                found[n] = (self._likes(*asked[n]), False)
            return [found[n] for n in range(len(asked))]

    path = written(tmp_path, questions("mmlu_medical"))
    assert run("mmlu_medical", Shortest(noise), path=path) == run("mmlu_medical", Model(noise), path=path)


def test_what_it_was_measured_with_is_kept(tmp_path):
    import lm_eval

    found = run("mmlu_medical", Model(noise), path=written(tmp_path, questions("mmlu_medical")), shots=1, limit=1)
    of = found["tasks"]["mmlu_medical"]
    assert of["harness"] == {"version": lm_eval.__version__, "task_versions": dict.fromkeys(TASKS["mmlu_medical"], 1.0)}
    assert (of["seeds"]["fewshot"], of["questions"], of["shots"]) == (1234, 8, 1)
    assert json.loads(json.dumps(of, allow_nan=False)) == of
    rows = as_table({"distilled": found["records"]}).to_pylist()
    assert [row["task"] for row in rows] == TASKS["mmlu_medical"]
    assert [row["specialty"] for row in rows] == list(SUBJECTS)
    assert as_table({"distilled": found["records"]}).schema.equals(RECORDS)


def test_a_model_that_nobody_asked_has_no_figures_but_a_number_of_questions(tmp_path):
    class Silent:
        def loglikelihoods(self, asked):
            return None

    nothing = {"accuracy": None, "accuracy_interval": None, "questions": 16}
    rows = [*questions("mmlu_medical"), questions("mmlu_medical")[0] | {"specialty": "astronomy"}]
    assert run("mmlu_medical", Silent(), path=written(tmp_path, rows)) == {"tasks": {"mmlu_medical": nothing}}


def test_jsonl_gz_and_parquet_are_read_alike(tmp_path):
    rows = questions("pubmedqa")
    plain = run("pubmedqa", Model(noise), path=written(tmp_path, rows), shots=1)
    with gzip.open(tmp_path / "questions.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "questions.parquet")
    for name in ("questions.jsonl.gz", "questions.parquet"):
        assert run("pubmedqa", Model(noise), path=str(tmp_path / name), shots=1) == plain


def test_another_split_is_asked_by_name_and_no_question_is_its_own_example(tmp_path):
    rows = questions("medmcqa", count=4, examples=4)
    model = Model(noise)
    found = run("medmcqa", model, path=written(tmp_path, rows), split="train", shots=3)["tasks"]["medmcqa"]
    assert found["questions"] == 4
    for context, _ in model.asked:
        assert len({part.partition("\nChoices")[0] for part in context.split("Question: ")[1:]}) == 4


def test_rows_without_a_split_are_asked_and_those_of_other_subjects_are_counted(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "split"} for row in questions("mmlu_medical", examples=0)]
    found = figures("mmlu_medical", noise, tmp_path, [*rows, *(row | {"specialty": "astronomy"} for row in rows[:3])])
    assert (found["questions"], found["ignored_questions"]) == (16, 3)


def test_nothing_is_said_and_nothing_else_is_drawn(tmp_path, capfd):
    path = written(tmp_path, questions("medqa"))
    random.seed(5)
    np.random.seed(5)
    wanted = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    level, bar = logging.getLogger("lm_eval").level, _harness.lm_eval.api.task.tqdm
    run("medqa", Model(noise), path=path, shots=2)
    assert (random.random(), np.random.rand()) == wanted
    assert (logging.getLogger("lm_eval").level, _harness.lm_eval.api.task.tqdm) == (level, bar)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def few_tasks(monkeypatch):
    """To look through all tasks of the harness takes seconds; these are of four folders."""
    manager = _harness.TaskManager(include_path=[str(Path(_harness.lm_eval.tasks.__file__).parent / folder) for folder in ("mmlu/default", "medqa", "wikitext", "truthfulqa")], include_defaults=False)
    monkeypatch.setattr(_harness, "_tasks_in", lambda folder: manager)


def test_any_task_and_group_of_the_harness_by_name(few_tasks, monkeypatch):
    fill_hub(monkeypatch, questions("mmlu_medical") + questions("medqa"))
    found = run("harness", Model(noise), tasks=["mmlu_stem", "medqa_4options", "mmlu_stem"], shots=1, limit=2)
    stem, medqa = found["tasks"].values()
    assert list(found["tasks"]) == ["mmlu_stem", "medqa_4options"]
    assert len(stem["subtasks"]) == 19
    assert stem["mean_of_subtasks"] == pytest.approx(np.mean([of["accuracy"] for of in stem["subtasks"].values()]))
    assert (stem["questions"], medqa["questions"], medqa["source"], medqa["shots"]) == (38, 2, "hub", 1)
    assert len(found["records"]) == 40
    assert len({(row.task, row.record) for row in found["records"]}) == 40
    assert run("harness", Model(noise), tasks=["medqa_4options"], limit=2)["tasks"]["medqa_4options"]["shots"] == 0


def test_a_benchmark_and_the_harness_task_that_it_is_give_the_same_accuracy(few_tasks, monkeypatch):
    fill_hub(monkeypatch, questions("medqa"))
    one = run("medqa", Model(noise))["tasks"]["medqa"]
    other = run("harness", Model(noise), tasks=["medqa_4options"])["tasks"]["medqa_4options"]
    assert one == other


def test_tasks_that_are_no_choice_are_refused(few_tasks, monkeypatch):
    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", lambda **_: datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list([{"page": "Text."}]))))
    with pytest.raises(InputError, match="wikitext is no multiple-choice task"):
        run("harness", Model(noise), tasks=["wikitext"])
    request = type("Request", (), {"task_name": "gsm8k"})()
    for method in ("generate_until", "loglikelihood_rolling"):
        with pytest.raises(InputError, match="gsm8k is no multiple-choice task"):
            getattr(_harness._Asked(Model(noise)), method)([request])


def test_tasks_that_score_in_a_way_of_their_own_are_refused_before_the_model_is_asked(few_tasks, monkeypatch):
    targets = {"choices": ["a", "b", "c"], "labels": [1, 1, 0]}
    docs = datasets.Dataset.from_list([{"question": "Q?", "mc1_targets": targets, "mc2_targets": targets}])
    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", lambda **_: datasets.DatasetDict({"validation": docs}))
    model = Model(noise)
    with pytest.raises(InputError, match="truthfulqa_mc2 has several right options"):
        run("harness", model, tasks=["truthfulqa_mc2"])
    assert not model.asked
    assert run("harness", model, tasks=["truthfulqa_mc1"])["tasks"]["truthfulqa_mc1"]["questions"] == 1


def test_a_name_that_the_harness_does_not_have(few_tasks):
    with pytest.raises(InputError, match="no task 'medqa_4option'; did you mean 'medqa_4options'"):
        run("harness", Model(noise), tasks=["medqa_4option"])


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach the Hub"), RuntimeError("Dataset scripts are no longer supported"), KeyError("trian")])
def test_a_hub_that_cannot_be_reached(error, monkeypatch):
    def load(**_):
        raise error

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load)
    with pytest.raises(InputError, match=r"medqa cannot be loaded from the hub: .*give `path`, a local file") as found:
        run("medqa", Model(noise))
    assert str(error) in str(found.value)


def test_the_harness_is_not_installed(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lm_eval") or name in ("pipeline.benchmarks._harness", "pipeline.benchmarks.medqa")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'distillation-pipeline\[eval\]'"):
        find("benchmarks", "medqa")


def changed(**fields: Any) -> Callable[[list[Row]], list[Row]]:
    """The second row with other fields; without those that are ..."""
    return lambda rows: [rows[0], {key: value for key, value in (rows[1] | fields).items() if value is not ...}, *rows[2:]]


@pytest.mark.parametrize(
    ("name", "change", "options", "says"),
    [
        ("medqa", lambda rows: rows, {"split": "validation"}, r"no row whose split is validation \(there are: test with 16 rows, train with 24 rows\)"),
        ("medqa", lambda rows: [], {}, "no row whose split is test .there are: no rows at all"),
        ("medqa", changed(options=["a", "b", "c"]), {}, "line 2 has 3 options, and this benchmark has four"),
        ("medmcqa", changed(options=["a", "b", "c", "d", "e"]), {}, "line 2 has 5 options"),
        ("mmlu_medical", changed(options=["a"]), {}, "line 2 has 1 options"),
        ("pubmedqa", changed(options=["yes", "no"]), {}, "line 2 has the options yes, no, and this benchmark has yes, no, maybe"),
        ("pubmedqa", changed(context=None), {}, "line 2 has no context"),
        ("medqa", changed(context="A text."), {}, "line 2 has a context, and this benchmark asks without one"),
        ("medqa", changed(answer_idx=4), {}, "line 2: answer_idx is 4, and there are 4 options"),
        ("medqa", changed(answer_idx=-1), {}, "line 2: answer_idx is -1"),
        ("medqa", changed(answer_idx="B"), {}, "line 2: answer_idx is 'B'"),
        ("medqa", changed(answer_idx=True), {}, "line 2: answer_idx is True"),
        ("medqa", changed(answer_idx=..., question=...), {}, "line 2 has no question and no answer_idx"),
        ("medqa", changed(question="  "), {}, "line 2 must have a text as its question"),
        ("medqa", changed(options="abcd"), {}, "a list of texts as its options"),
        ("medqa", changed(question="half \ud800"), {}, "line 2 must have a text"),
        ("mmlu_medical", lambda rows: [row | {"specialty": ["anatomy"]} for row in rows], {}, "no question of these specialties"),
        ("mmlu_medical", changed(specialty=...), {}, "line 2 has no specialty"),
        ("mmlu_medical", lambda rows: [row | {"specialty": "Anatomy"} for row in rows], {}, r"no question of these specialties: anatomy, .* \(there are: Anatomy with 16 rows\)"),
        ("mmlu_medical", lambda rows: rows, {"shots": 4}, "mmlu_anatomy has 3 examples in the split dev, and shots is 4"),
        ("mmlu_medical", lambda rows: rows, {"shots": 3, "split": "dev"}, "3 examples in the split dev, one of which is the question itself"),
        ("medqa", lambda rows: rows[:16], {"shots": 1}, "medqa_4options has 0 examples in the split train, and shots is 1"),
    ],
)
def test_a_file_that_is_wrong(name, change, options, says, tmp_path):
    with pytest.raises(InputError, match=says):
        figures(name, noise, tmp_path, change(questions(name)), **options)


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(InputError, match="No file is at"):
        run("medqa", Model(noise), path=str(tmp_path / "none.jsonl"))
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(InputError, match="line 1 is no JSON"):
        run("medqa", Model(noise), path=str(tmp_path / "broken.jsonl"))


def test_options_of_pubmedqa_in_another_order_are_the_same_questions(tmp_path):
    rows = questions("pubmedqa")
    turned = [row | {"options": row["options"][::-1], "answer_idx": 2 - row["answer_idx"]} for row in rows]
    assert figures("pubmedqa", noise, tmp_path, rows) == figures("pubmedqa", noise, tmp_path, turned)


def test_no_number_and_another_accuracy_than_the_harness_has_are_errors(tmp_path, monkeypatch):
    rows = questions("medqa")
    with pytest.raises(NumericsError, match="question 0 of medqa_4options is no number"):
        figures("medqa", lambda context, continuation: math.nan, tmp_path, rows)

    def other(**given):
        found = evaluate(**given)
        found["samples"]["medqa_4options"][2]["acc"] = 1.0 - found["samples"]["medqa_4options"][2]["acc"]
        return found

    evaluate = _harness.evaluate
    monkeypatch.setattr(_harness, "evaluate", other)
    with pytest.raises(Disagreement, match="medqa_4options: lm-evaluation-harness"):
        figures("medqa", noise, tmp_path, rows)


def test_a_commit_of_the_hub_is_what_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows, loaded = questions("medqa"), []
    fill_hub(monkeypatch, rows)
    inner = _harness.lm_eval.api.task.datasets.load_dataset

    def load(path, name=None, revision=None, **options):
        loaded.append(revision)
        return inner(path, name, **options)

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load)
    run("medqa", Model(noise), revision="a" * 40)
    run("medqa", Model(noise))
    assert loaded == ["a" * 40, None]
    with pytest.raises(InputError, match="Leave one of them out"):
        run("medqa", Model(noise), revision="a" * 40, path=written(tmp_path, rows))
