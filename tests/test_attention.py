"""The stages with attention: captured without a change to anything else, trained on, gone on with, shown, left behind."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pipeline.models.attention
import stages.cache_teacher
from pipeline.cache.reader import Cache
from pipeline.models.attention import Attending
from pipeline.models.loading import load_student
from pipeline.signals.attention import attention_target, matched
from tests.conftest import CONFIG, Place
from tests.reporting.caches import rewritten, with_column
from tests.test_reliability import copied, same_files

KEPT = ("--set", "targets.attention={matched: 2, keys: 8}")
OBJECTIVE = ("--set", "training.objective=[{loss: forward_kl, weight: 0.7}, {loss: attention_match, weight: 2.0}]")
NO_CONTROL = ("--set", "evaluation.control=false")


@pytest.fixture(scope="module")
def looked(done: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The whole experiment with attention, beside the one without."""
    place = copied(done, tmp_path_factory.mktemp("looked") / "copy")
    for stage in ("cache-teacher", "fit-projection", "train-student", "evaluate"):
        shutil.rmtree(place.path / "runs" / stage)
    place.pipeline("run", CONFIG, *KEPT, *OBJECTIVE, *NO_CONTROL)
    return place


def test_the_teachers_word_is_the_same_to_the_byte(done: Place, looked: Place):
    with_it, without = looked.finished("cache-teacher"), done.finished("cache-teacher")
    names = [name for name in without.names() if name.endswith(".parquet")]
    assert [name for name in names if with_it.file(name).read_bytes() != without.file(name).read_bytes()] == []
    assert len(with_it.names("attention-")) == len(without.names("logits-"))
    assert Cache(with_it.file).about["attention"] == {"layers": [0, 1], "of": 2, "heads": 1}
    assert Cache(without.file).about["attention"] is None


def test_the_loss_falls_and_is_logged(looked: Place):
    path = looked.finished("train-student").path
    losses = [json.loads(line)["attention_match"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 12
    assert 0 < losses[-1] < losses[0]


def test_going_on_and_gradient_checkpointing_change_nothing(looked: Place, tmp_path: Path):
    """Cut off after a checkpoint and gone on with; and with gradient checkpointing, where each layer is computed once more."""
    other = copied(looked, tmp_path / "other")
    path = other.finished("train-student").path
    (path / "manifest.json").unlink()
    for name in ("commits/step-0000012.json", "checkpoints/step-0000012.safetensors"):
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(path / "student")
    other.pipeline("train-student", CONFIG, *KEPT, *OBJECTIVE)
    same_files(path, looked.finished("train-student").path)
    third = copied(looked, tmp_path / "third")
    shutil.rmtree(third.path / "runs" / "train-student")
    third.pipeline("train-student", CONFIG, *KEPT, *OBJECTIVE, "--set", "machine.gradient_checkpointing=true")
    same_files(third.finished("train-student").path, looked.finished("train-student").path)


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_the_teacher_as_its_own_student_loses_nothing_but_what_storing_costs(done: Place, tmp_path: Path, heads: str):
    place = copied(done, tmp_path / "copy")
    shutil.rmtree(place.path / "runs" / "cache-teacher")
    place.pipeline("cache-teacher", CONFIG, "--set", f"targets.attention={{layers: [0, 1], keys: 255, heads: {heads}}}")
    cache = Cache(place.finished("cache-teacher").file, ("attention",))
    model = load_student(str(place.path / "tiny" / "teacher"), None, None, torch.device("cpu")).eval()
    groups = 1 if heads == "mean" else model.config.num_attention_heads
    attending = Attending(model, "teacher", [0, 1])
    seen = 0
    for example in list(cache.examples("heldout"))[:5]:
        tokens = example.tokens
        assert example.targets.attention is not None
        records = [matched(example.targets.attention[layer], example.targets.position, tokens, tokens, groups) for layer in (0, 1)]
        targets = [attention_target([record], [tokens.answer_positions()], len(tokens), groups) for record in records]
        attending.to(targets)
        with torch.inference_mode():
            model(input_ids=torch.from_numpy(tokens.ids.astype(np.int64))[None], use_cache=False)
        for target, mass in zip(targets, attending.masses(), strict=True):
            step = (255 * target.weight.sqrt() + 0.5) / 255**2
            assert ((mass - target.weight).abs() <= step + 1e-5).all()
            rest = 1 - torch.zeros(len(target.rest)).index_add(0, target.cell_row, mass)
            assert (rest - target.rest).abs().max() < 1e-3
            seen += len(mass)
    assert seen > 200


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["targets.attention={keys: 4}"], "either layers or matched"),
        (["targets.attention={matched: 2, layers: [1]}"], "either layers or matched"),
        (["targets.attention={layers: [1, 0]}"], "must ascend"),
        (["targets.attention={matched: 2, keys: 256}"], "255"),
        (["training.objective=[{loss: attention_match}]"], "needs `targets.attention`"),
        (["targets.attention={layers: [1]}", "training.objective=[{loss: attention_match, layers: [[0, 0]]}]"], "the teacher's layer 0"),
        (["targets.attention={layers: [1]}", "training.objective=[{loss: attention_match, layers: [[0, 0, 1]]}]"], "layers"),
        (["targets.attention={layers: [1]}", "training.objective=[{loss: attention_match}, {loss: attention_match, form: kl}]"], "only one loss"),
        (["targets.attention={layers: [1]}", "training.objective=[{loss: attention_match, form: l2}]"], "'frobenius' or 'kl'"),
        (["targets.attention={layers: [1]}", "training.objective=[{loss: attention_match, tail: calibrated}]"], "tail has no effect"),
        (["targets.attention={matched: 3}"], "the teacher has 2"),
        (["targets.attention={layers: [7]}"], "layers 0 to 1"),
    ],
)
def test_what_cannot_be_is_told_before_the_teacher_has_read_anything(done: Place, tmp_path: Path, words: list[str], said: str):
    place = copied(done, tmp_path / "copy")
    told = place.pipeline("cache-teacher", CONFIG, *(part for word in words for part in ("--set", word)), status=2)
    assert said in told
    assert not list(place.path.glob("runs/cache-teacher/*/attention-*"))


@pytest.mark.parametrize(
    ("option", "said"),
    [("layers: [[1, 2]]", "layers 0 to 1"), ("heads: grouped", None), ("heads: same", "as many heads"), ("form: kl", None), ("layers: [[1, 0], [0, 0]]", None)],
)
def test_layers_and_heads_of_the_student(looked: Place, tmp_path: Path, option: str, said: str | None):
    place = copied(looked, tmp_path / "copy")
    words = ("train-student", CONFIG, *KEPT, "--set", f"training.objective=[{{loss: cross_entropy}}, {{loss: attention_match, {option}}}]")
    if said:
        assert said in place.pipeline(*words, status=2)
    else:
        place.pipeline(*words)


def test_the_cache_without_its_attention_still_trains_what_does_not_ask_for_it(looked: Place, tmp_path: Path):
    place = copied(looked, tmp_path / "copy")
    folder = place.finished("cache-teacher").path
    for file in folder.glob("attention-*"):
        file.unlink()
    assert "may be left behind" in place.pipeline("verify", str(folder), "--deep")
    assert "done" in place.pipeline("status", CONFIG, *KEPT, *OBJECTIVE)
    assert "already done" in place.pipeline("cache-teacher", CONFIG, *KEPT)
    place.pipeline("run", CONFIG, *KEPT, *OBJECTIVE, *NO_CONTROL)
    shutil.rmtree(place.path / "runs" / "train-student")
    assert "Copy them, too" in place.pipeline("train-student", CONFIG, *KEPT, *OBJECTIVE, status=1)
    place.pipeline("train-student", CONFIG, *KEPT)
    assert place.json("inspect", str(folder))["attention"] is None
    (folder / "attention-00001.parquet").write_bytes(b"x")
    told = place.invoke("verify", str(folder))
    assert told.exit_code == 1
    assert "attention-00000.parquet is missing" in told.stdout  # some of them: that is no copy without them


def test_rows_are_shown_as_text_and_drawn_beside_the_students(looked: Place, tmp_path: Path):
    folder, student = looked.finished("cache-teacher").path, looked.finished("train-student").path
    record = looked.json("inspect", str(folder), "--record", "r3")
    query = record["positions"][4]["position"]
    found = looked.json("inspect", str(folder), "--record", "r3", "--attention", f"1,{query}")
    [head] = found["heads"]
    assert sum(key["weight"] for key in head["keys"]) + head["rest"] == pytest.approx(1, abs=0.02)
    assert [key["weight"] for key in head["keys"]] == sorted((key["weight"] for key in head["keys"]), reverse=True)
    assert all(key["position"] <= query for key in head["keys"])
    text = looked.pipeline("inspect", str(folder), "--record", "r3", "--attention", f"1,{query}")
    assert head["keys"][0]["text"] in text
    for more in ([], ["--student", str(student)]):
        looked.pipeline("inspect", str(folder), "--record", "r3", "--attention", "0", "--png", str(tmp_path / "a.png"), *more)
        assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for words in (
        ["--record", "r3", "--attention", "1,²"],
        ["--attention", "1,2"],
        ["--record", "r3", "--attention", "1"],
        ["--record", "r3", "--attention", "x,2"],
        ["--record", "r3", "--attention", "1,1"],
        ["--student", str(student)],
    ):
        looked.pipeline("inspect", str(folder), *words, status=2)
    assert "of the layers [0, 1]" in looked.pipeline("inspect", str(folder), "--record", "r3", "--attention", f"5,{query}", status=2)


def test_the_teacher_is_asked_again_where_it_looks(looked: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = copied(looked, tmp_path / "copy")
    folder = str(place.finished("cache-teacher").path)
    assert "Everything" in place.pipeline("verify", folder, "--recompute", "7")
    real = pipeline.models.attention._kept
    monkeypatch.setattr(pipeline.models.attention, "_kept", lambda parts: replace(real(parts), rest=real(parts).rest * 0.9))
    told = place.invoke("verify", folder, "--recompute", "1")
    assert told.exit_code == 1
    assert "is not where the teacher looks now" in told.stdout
    assert "logits" not in told.stdout
    monkeypatch.setattr(stages.cache_teacher, "numerics_of", lambda device: {"device": "another"})
    assert "is not where the teacher looks now" in place.invoke("verify", folder, "--recompute", "1").stdout
    monkeypatch.setattr(pipeline.models.attention, "_kept", lambda parts: replace(real(parts), rest=real(parts).rest + 0.001))
    assert "Everything" in place.pipeline("verify", folder, "--recompute", "1")  # last bits may be others there


def test_attention_that_cannot_be_is_found(looked: Place, tmp_path: Path):
    place = copied(looked, tmp_path / "copy")
    folder = place.finished("cache-teacher").path
    rewritten(folder, "attention-00000.parquet", with_column("rest_1", lambda row: [(rest + 20_000) % 65536 for rest in row]))
    (folder / "commits" / "00000.json").unlink()
    told = place.invoke("verify", str(folder))
    assert told.exit_code & 1
    assert "do not sum to 1 in layer 1" in told.stdout
