"""train-student with each way of training: what changes the speed changes no loss, and what changes the losses goes on bit for bit."""

import json
from pathlib import Path

import pytest
import torch

import stages.train_student as stage
from pipeline.models.heads import RowLogits
from pipeline.models.loading import load_student
from tests.conftest import CONFIG, Place, link_inputs

CURRENT = ("training.specialty_weights=current_loss", "training.token_temperature={strength: 0.5}", "training.objective.0.tail=rest")
WAYS = {
    "weights that change": ("training.objective.0.weight={from: 1.0, to: 0.2}", "training.objective.1.weight={from: 0.0, to: 0.8, schedule: cosine}"),
    "specialties and tokens by loss": CURRENT,
    "the easiest first": ("training.curriculum={by: entropy, share: {from: 0.3, to: 1.0}}", "training.specialty_weights=inverse_frequency"),
    "specialty after specialty": ("training.curriculum={by: specialty, order: ascending}",),
}


def metrics(place: Place) -> list[dict]:
    return [json.loads(line) for line in place.finished("train-student").file("metrics.jsonl").read_text().splitlines()]


def trained(place: Place, done: Place, *settings: str, status: int = 0) -> Place:
    """From the finished cache and projection."""
    given = [word for before in ("cache-teacher", "fit-projection") for word in ("--use", f"{before}={done.path / done.finished(before).path}")]
    place.pipeline("train-student", CONFIG, *given, *(word for setting in settings for word in ("--set", setting)), status=status)
    return place


FASTER = {
    "packed": ("machine.packing=true",),
    "packed to a budget": ("machine.packing=true", "machine.student_micro_batch_tokens=150"),
    "a budget of tokens": ("machine.student_micro_batch_tokens=200",),
    "one token at a time": ("machine.student_micro_batch_tokens=1",),
    "all records at once": ("machine.student_micro_batch_records=99",),
}


@pytest.fixture(scope="module")
def plain(made: Path, done: Place, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return metrics(trained(link_inputs(made, tmp_path_factory.mktemp("plain") / "place"), done, *CURRENT))


@pytest.mark.parametrize("way", FASTER)
def test_what_is_only_faster_changes_no_loss(made: Path, done: Place, plain: list[dict], tmp_path: Path, way: str):
    found = metrics(trained(link_inputs(made, tmp_path / "place"), done, *CURRENT, *FASTER[way]))
    for one, other in zip(plain, found, strict=True):
        assert other == pytest.approx(one, rel=2e-3, abs=1e-5)


def test_logits_in_other_parts_change_no_loss(made: Path, done: Place, plain: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stage, "LOGITS_BYTES", {"cpu": 1})
    found = metrics(trained(link_inputs(made, tmp_path / "place"), done, *CURRENT))
    for one, other in zip(plain, found, strict=True):
        assert other == pytest.approx(one, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_goes_on_bit_for_bit_where_it_was_killed(made: Path, done: Place, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch):
    straight = trained(link_inputs(made, tmp_path / "straight"), done, *WAYS[way])
    write = stage.Log.write

    def dies(self: stage.Log, step: int, **values: float) -> None:
        write(self, step, **values)
        if step == 7:  # behind the checkpoint of step 4
            raise RuntimeError

    killed = link_inputs(made, tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(stage.Log, "write", dies)
        trained(killed, done, *WAYS[way], status=1)
    again = trained(killed, done, *WAYS[way])
    assert metrics(again) == metrics(straight)
    students = [each.finished("train-student").folder("student") / "model.safetensors" for each in (again, straight)]
    assert students[0].read_bytes() == students[1].read_bytes()


def test_what_changes_over_training_is_in_the_log(made: Path, done: Place, tmp_path: Path):
    rows = metrics(trained(link_inputs(made, tmp_path / "a"), done, *WAYS["weights that change"]))
    assert [rows[0]["weight/forward_kl"], rows[-1]["weight/forward_kl"]] == [1.0, pytest.approx(0.2)]
    assert rows[-1]["weight/cross_entropy"] == pytest.approx(0.8)
    row = rows[3]
    assert row["loss"] == pytest.approx(sum(row[f"weight/{name}"] * row[name] for name in ("forward_kl", "cross_entropy")), rel=1e-4)
    assert any(key.startswith("specialty/") for key in row)
    rows = metrics(trained(link_inputs(made, tmp_path / "b"), done, *CURRENT))
    weighed = [row for row in rows if any(key.startswith("specialty_weight/") for key in row)]
    assert len(weighed) == len(rows)
    assert len({value for row in rows for key, value in row.items() if key.startswith("specialty_weight/")}) > 2


def test_records_in_one_row_do_not_see_each_other_and_would_without_their_positions(made: Path):
    module = RowLogits(load_student(str(made / "tiny" / "student"), None, None, torch.device("cpu")).eval(), 100)
    module.check_packing("student")
    ids = torch.arange(1, 21)[None]
    other = ids.clone()
    other[0, :8] += 30
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with torch.no_grad():
        torch.testing.assert_close(module.hidden(ids, positions)[8:], module.hidden(other, positions)[8:], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(module.hidden(ids, positions)[8:], module.hidden(ids[:, 8:]), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(module.hidden(ids)[8:], module.hidden(other)[8:], atol=1e-3)


def test_packing_that_leaks_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch):
    module = RowLogits(load_student(str(made / "tiny" / "student"), None, None, torch.device("cpu")).eval(), 100)
    whole = RowLogits.hidden
    monkeypatch.setattr(RowLogits, "hidden", lambda self, ids, positions=None: whole(self, ids))
    with pytest.raises(Exception, match=r"Set machine\.packing to false"):
        module.check_packing("student")


def test_a_gradient_that_is_not_finite_reaches_no_weight_and_no_checkpoint(made: Path, done: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place, clip, calls = link_inputs(made, tmp_path / "place"), torch.nn.utils.clip_grad_norm_, []

    def broken(parameters: object, norm: float) -> torch.Tensor:
        calls.append(1)
        return torch.tensor(torch.nan) if len(calls) == 4 else clip(parameters, norm)  # a checkpoint is due behind it

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
        trained(place, done, status=1)
    assert not list(place.path.glob("runs/train-student/*/commits/*"))
    assert metrics(trained(place, done)) == metrics(trained(link_inputs(made, tmp_path / "straight"), done))


def test_a_pruned_student_with_dropout_can_be_packed(own: Place, done: Place):
    file = own.path / "tiny" / "student" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_dropout": 0.2}))
    assert len(metrics(trained(own, done, "machine.packing=true", "student.layers=[0, 2]", "training.steps=3"))) == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("training.specialty_weights={ear: 0.0}", "training.curriculum={by: specialty, epochs: [[ear]]}"), "every record that is trained on weighs 0"),
        (("training.specialty_weights={hart: 2.0}",), "'hart'; did you mean 'heart'?"),
    ],
)
def test_weights_of_specialties_that_leave_nothing_or_name_none_are_refused(made: Path, done: Place, tmp_path: Path, settings: tuple[str, ...], said: str):
    place = link_inputs(made, tmp_path / "place")
    given = [word for before in ("cache-teacher", "fit-projection") for word in ("--use", f"{before}={done.path / done.finished(before).path}")]
    assert said in place.pipeline("train-student", CONFIG, *given, *(word for setting in settings for word in ("--set", setting)), status=2)
