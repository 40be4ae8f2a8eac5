"""What a folder's name covers: everything that can change the result, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import Experiment, load_experiment
from pipeline.running.fingerprint import canonical, differing_keys, fingerprint
from pipeline.running.runner import Runner
from stages import STAGES
from tests import tiny
from tests.conftest import CONFIG


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny.make(tmp_path / "tiny", records=4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def keys(*changes: str) -> dict[str, str]:
    runner = Runner(STAGES, load_experiment(CONFIG, list(changes)), Path("runs"))
    return {stage.name: fingerprint(runner.identity(stage)) for stage in STAGES}


CHANGES = {
    "prepare-data": ["data.train.0.limit=3", "data.train.0.weight=2.0", "data.heldout.fraction=0.3", "data.train.0.incomplete=drop", "data.train.0.skip=1"],
    "cache-teacher": ["teacher.quantization=nf4", "teacher.dtype=bfloat16", "targets.logits.keep=8", "targets.logits.temperatures=[1.0, 4.0]", "targets.positions=all", "targets.text=omit"],
    "fit-projection": ["projection.method=first_token", "student.model=tiny/teacher"],
    "train-student": ["training.steps=13", "training.seed=1", "training.learning_rate=2.0e-3", "training.precision=bf16", "student.layers=[0]", "training.temperature=3.0"]
    + ["training.objective=[{loss: cross_entropy}]", "training.specialty_weights={eye: 2.0}", "training.weight_decay=0.1", "training.batch_records=4", "training.warmup_steps=1"],
    "evaluate": ["evaluation.benchmarks=[{benchmark: perplexity}]", "evaluation.control=false"],
}


@pytest.mark.parametrize(("stage", "change"), [(stage, change) for stage, changes in CHANGES.items() for change in changes])
def test_a_setting_changes_its_stage_and_what_is_built_on_it_and_nothing_before(here: Path, stage: str, change: str):
    before, after = keys(), keys(change)
    order = [s.name for s in STAGES if s.name != "train-control"]
    for name in order:
        assert (before[name] != after[name]) == (order.index(name) >= order.index(stage)), name


@pytest.mark.parametrize("change", ["machine.workers=5", "machine.checkpoint_steps=1", "machine.teacher_batch_records=2", "machine.gradient_checkpointing=true", "name=other"])
def test_what_only_changes_the_speed_changes_no_key(here: Path, change: str):
    assert keys() == keys(change)


def test_paths_order_and_the_way_numbers_are_written_change_no_key(here: Path, tmp_path: Path):
    before = keys()
    (tmp_path / "tiny").rename(tmp_path / "moved")
    changes = ["data.train.0.path=moved/train.jsonl", "teacher.model=moved/teacher", "student.model=moved/student", "training.learning_rate={to: 0.0001, schedule: cosine, from: 1e-3}"]
    assert keys(*changes) == before


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("train.jsonl", "prepare-data"),
        ("teacher/model.safetensors", "cache-teacher"),
        ("teacher/tokenizer.json", "cache-teacher"),
        ("student/tokenizer.json", "fit-projection"),
        ("student/config.json", "train-student"),
    ],
)
def test_one_changed_byte_of_what_is_named_changes_the_key(here: Path, file: str, stage: str):
    before = keys()
    path = here / "tiny" / file
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    after = keys()
    order = [s.name for s in STAGES]
    assert [name for name in order if before[name] != after[name]][0] == stage


def test_a_readme_in_a_model_folder_changes_no_key(here: Path):
    before = keys()
    (here / "tiny" / "teacher" / "README.md").write_text("hello")
    assert keys() == before


def test_keys_do_not_depend_on_the_process(here: Path):
    code = "from pathlib import Path; from tests.running.test_keys import keys; print(sorted(keys().items()))"
    root = Path(__file__).parents[2]
    found = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=here, env={"PYTHONHASHSEED": seed, "TZ": zone, "PYTHONPATH": str(root), "HOME": home, "PATH": ""}, capture_output=True, text=True, check=True
        ).stdout
        for seed, zone, home in (("0", "UTC", "/a"), ("1", "Asia/Tokyo", "/b"))
    }
    assert len(found) == 1


def test_every_setting_is_in_some_section_that_a_stage_reads():
    read = {section for stage in STAGES for section in stage.reads} | {"student_tokenizer"}
    assert set(Experiment.model_fields) - read == {"name", "machine"}


def test_the_differing_keys_are_named_through_the_upstream(here: Path):
    def identity(*changes: str) -> dict:
        runner = Runner(STAGES, load_experiment(CONFIG, list(changes)), Path("runs"))
        return runner.identity(next(stage for stage in STAGES if stage.name == "train-student"))

    assert differing_keys(identity(), identity("teacher.quantization=int8", "training.seed=3")) == ["teacher.quantization", "training.seed"]


def test_what_cannot_be_hashed_is_an_error():
    for value in (float("nan"), float("inf"), {1, 2}, object(), {1: 2}, b"x"):
        with pytest.raises(TypeError):
            canonical({"a": value})
    assert canonical({"b": 1, "a": 0.1}) == canonical({"a": 0.1, "b": 1})
    assert canonical(1) != canonical(1.0)
    assert canonical(-0.0) == canonical(0.0)
