"""Students of which adapters are trained (LoRA, QLoRA), and optimizers in eight bits, through the stages."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import stages.train_student as stage
from pipeline.models.loading import keep_layers, load_student
from pipeline.running.folder import FinishedFolder
from tests.conftest import CONFIG, Place, link_inputs
from tests.test_attention import KEPT, NO_CONTROL, OBJECTIVE
from tests.test_reliability import copied

RATE = ("--set", "training.learning_rate=0.01")
LORA = ("--set", "student.lora={rank: 4, dropout: 0.1}", *RATE)
FP32 = ("--set", "training.precision=fp32")
QLORA = (*LORA, "--set", "student.quantization=nf4", "--set", "student.dtype=bfloat16")
INT8 = (*LORA, "--set", "student.quantization=int8")
EIGHT_BITS = ("--set", "training.optimizer=adamw_8bit")
VARIANTS = {"lora": LORA, "qlora": QLORA, "int8": INT8, "lora, adamw_8bit": (*LORA, *EIGHT_BITS), "whole, adamw_8bit": EIGHT_BITS}


@pytest.fixture
def place(done: Place, tmp_path: Path) -> Place:
    """A cache, and no student yet."""
    place = link_inputs(done.path, tmp_path / "place")
    shutil.copytree(done.path / "runs", place.path / "runs", symlinks=True)
    shutil.rmtree(place.path / "runs" / "train-student")
    return place


def trained(place: Place, *words: str) -> tuple[Path, dict[str, Any]]:
    report = place.json("train-student", CONFIG, *words)
    return place.path / report["folder"], report["summary"]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def pruned(place: Place) -> PreTrainedModel:
    """What the student of configs/tiny.yaml begins as."""
    return load_student(str(place.path / "tiny" / "student"), None, [0, 2], torch.device("cpu"))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(1, 31)[None], use_cache=False).logits.float()


def as_it_was_trained(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The logits of the student before its adapters are merged."""
    found: list[torch.Tensor] = []
    real = stage.merge_adapters

    def merge(model: PreTrainedModel) -> None:
        found.append(logits(model))
        real(model)

    monkeypatch.setattr(stage, "merge_adapters", merge)
    return found


def test_the_student_of_lora_is_an_ordinary_model_with_the_adapter_beside_it(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    wanted = as_it_was_trained(monkeypatch)
    folder, summary = trained(place, *LORA, *FP32)
    assert losses(folder)[-1] < 0.7 * losses(folder)[0]
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    torch.testing.assert_close(logits(student), wanted[0], rtol=1e-5, atol=1e-5)
    before, after = pruned(place).state_dict(), student.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("proj.weight")}
    assert all(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 4 for name in changed)
    assert (summary["parameters"], summary["trained_parameters"]) == (student.num_parameters(), 2 * 4 * (32 + 32 + 32 + 16 + 32 + 16 + 32 + 32 + 3 * (32 + 64)))
    there = PeftModel.from_pretrained(pruned(place), folder / "adapter")
    torch.testing.assert_close(logits(there), wanted[0], rtol=1e-5, atol=1e-5)
    assert FinishedFolder(folder).names("adapter/") == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    # an adapter of a model with other layers fits no model that has a name
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    whole, _ = trained(place, *LORA, *FP32, "--set", "student.layers=null")
    assert json.loads((whole / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny/student"


@pytest.mark.parametrize(("words", "near"), [(QLORA, 0.04), ((*QLORA, *FP32, "--set", "student.dtype=float32"), 1e-5), (INT8, 0.06)])
def test_a_quantized_student_learns_and_what_is_written_is_near_what_was_trained(place: Place, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], near: float):
    wanted = as_it_was_trained(monkeypatch)
    folder, _ = trained(place, *words)
    assert losses(folder)[-1] < 0.7 * losses(folder)[0]
    there = logits(AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32))
    assert (there - wanted[0]).norm() < near * wanted[0].norm()
    name = "model.layers.0.self_attn.q_proj.weight"
    written = load_file(folder / "student" / "model.safetensors")
    assert torch.linalg.matrix_rank(written[name].float() - pruned(place).state_dict()[name], rtol=1e-3) > 4, "it was not quantized"
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16 if words is QLORA else torch.float32}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_cut_off_ends_with_the_same_bits(place: Place, monkeypatch: pytest.MonkeyPatch, variant: str):
    words = (*VARIANTS[variant], "--set", "machine.checkpoint_steps=3")
    straight, _ = trained(place, *words)
    shutil.copytree(straight, place.path / "straight")
    shutil.rmtree(straight)
    stops, real = [3, 9], stage._checkpoint

    def checkpoint(out, step, *others):
        real(out, step, *others)
        if step in stops:
            stops.remove(step)
            raise KeyboardInterrupt

    monkeypatch.setattr(stage, "_checkpoint", checkpoint)
    for _ in list(stops):
        place.pipeline("train-student", CONFIG, *words, status=1)
    saved = load_file(straight / "checkpoints" / "step-0000009.safetensors")
    assert (saved["optimizer.0.state1"].dtype is torch.uint8) if variant == "whole, adamw_8bit" else ("optimizer.0.state1" in saved) == ("adamw_8bit" in variant)
    if not variant.startswith("whole"):
        assert {name.partition(".lora_")[2][:2] for name in saved if name.startswith("model.") and "inv_freq" not in name} == {"A.", "B."}
    folder, _ = trained(place, *words)
    same_results(folder, place.path / "straight")


def same_results(one: Path, other: Path) -> None:
    files = [FinishedFolder(folder).manifest["files"] for folder in (one, other)]
    assert files[0] == files[1]


def test_control_a_resume_that_forgets_where_adapters_were_is_caught(place: Place, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.checkpoint._state", lambda model: {})
        with pytest.raises(AssertionError):
            test_what_was_cut_off_ends_with_the_same_bits(place, monkeypatch, "lora")


@pytest.mark.parametrize("variant", ["lora", "qlora", "int8"])
def test_gradient_checkpointing_and_the_best_of_several_and_micro_batches(place: Place, variant: str):
    """What is computed twice is the same, dropout included; and the student of the best step is its adapter."""
    words = (*VARIANTS[variant], "--set", "training.validation={every: 2, records: 6}", "--set", "training.learning_rate={from: 0.01, to: 3.0, schedule: exponential}")
    folder, summary = trained(place, *words)
    assert summary["best_step"] < 12, "the test needs a student that gets worse"
    shutil.copytree(folder, place.path / "straight")
    shutil.rmtree(folder)
    again, _ = trained(place, *words, "--set", "machine.gradient_checkpointing=true", "--set", "machine.workers=2")
    assert again == folder
    same_results(folder, place.path / "straight")
    last, _ = trained(place, *words, "--set", "training.validation.keep=last")
    one, other = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (folder, last))
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("variant", ["lora", "qlora"])
def test_attention_is_watched_through_adapters(done: Place, tmp_path: Path, variant: str):
    place = copied(done, tmp_path / "copy")
    for name in ("cache-teacher", "fit-projection", "train-student", "evaluate"):
        shutil.rmtree(place.path / "runs" / name)
    place.pipeline("run", CONFIG, *KEPT, *OBJECTIVE, *NO_CONTROL, *VARIANTS[variant])
    folder = place.finished("train-student").path
    lines = [json.loads(line)["attention_match"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[-1] < lines[0]
    place.pipeline("inspect", str(place.finished("cache-teacher").path), "--record", "r3", "--attention", "0", "--png", str(tmp_path / "a.png"), "--student", str(folder))


def test_a_student_is_the_next_teacher(place: Place, tmp_path: Path):
    """Teacher -> pruned student of LoRA -> its cache -> a second student. Each is found by what it contains, not by its name."""
    folder, _ = trained(place, *LORA)
    second = ("--set", f"teacher.model=run:train-student/{folder.name}", "--set", "student.layers=[3, 1, 0]", *QLORA)
    cached = place.json("cache-teacher", CONFIG, *second)
    assert cached["state"] == "done"
    report = place.json("train-student", CONFIG, *second)
    student = AutoModelForCausalLM.from_pretrained(place.path / report["folder"] / "student", dtype=torch.float32)
    assert student.config.num_hidden_layers == 3
    assert place.json("evaluate", CONFIG, *second)["summary"]["models"]["distilled"]["kl_to_teacher"] < 1
    # the same bytes under another name
    shutil.copytree(folder / "student", place.path / "elsewhere")
    named = ("--set", "teacher.model=elsewhere", *second[2:])
    assert [row["state"] for row in place.json("status", CONFIG, *named)["stages"]] == ["done"] * 6
    # the same name with other bytes
    other, _ = trained(place, *LORA, "--set", "training.seed=1")
    shutil.rmtree(place.path / "elsewhere")
    shutil.copytree(other / "student", place.path / "elsewhere")
    rows = {row["stage"]: row for row in place.json("status", CONFIG, *named)["stages"]}
    assert rows["prepare-data"]["state"] == "done"
    assert {rows[name]["state"] for name in ("cache-teacher", "fit-projection", "train-student", "train-control", "evaluate")} == {"missing"}
    assert rows["cache-teacher"]["nearest"]["differs"] == ["teacher.model"]


def test_a_student_of_another_student_begins_where_that_ended(place: Place):
    folder, _ = trained(place, *LORA, *FP32)
    again = ("--set", f"student.model=run:train-student/{folder.name}", "--set", "student.layers=[1]", *LORA, *FP32, "--set", "training.learning_rate=1.0e-12")
    second, _ = trained(place, *again)
    there = AutoModelForCausalLM.from_pretrained(second / "student")
    torch.testing.assert_close(logits(there), logits(keep_layers(AutoModelForCausalLM.from_pretrained(folder / "student"), [1], "first")), rtol=1e-4, atol=1e-4)


def test_a_change_of_adapters_trains_the_student_and_its_control_and_nothing_else(done: Place):
    for words in (LORA, QLORA, EIGHT_BITS):
        states = {row["stage"]: row["state"] for row in done.json("status", CONFIG, *words)["stages"]}
        assert [stage for stage, state in states.items() if state == "done"] == ["prepare-data", "cache-teacher", "fit-projection"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("student.quantization=nf4",), ["student", "nothing that could be trained", "lora: {rank: 16}"]),
        (("student.dtype=bfloat16",), ["dtype: bfloat16", "leave dtype out"]),
        (("student.lora={rank: 4}", "student.double_quantization=false"), ["double_quantization has no effect"]),
        (("student.lora={rank: 4}", "student.dtype=float16"), ["student.dtype", "'bfloat16' or 'float32'"]),
        (("student.lora.rank=0",), ["student.lora.rank", "greater than or equal to 1"]),
        (("student.lora.dropout=1",), ["student.lora.dropout", "less than 1"]),
        (("student.lora.rnk=4",), ["student.lora.rnk", "did you mean 'rank'"]),
        (("student.lora.targets=all_linear",), ["student.lora.targets", "'all-linear'"]),
        (("student.lora.targets=[]",), ["student.lora.targets", "at least 1"]),
        (("student.lora={targets: [q_prj]}",), ["student.lora.targets: tiny/student", "'q_prj'", "did you mean 'q_proj'"]),
        (("student.lora={rank: 4}", "student.layers=[0, 9]", "student.quantization=nf4"), ["student.layers", "0 to 3"]),
        (("training.optimizer=sgd",), ["training.optimizer", "'adamw' or 'adamw_8bit'"]),
    ],
)
def test_what_cannot_be_is_told_with_the_way_out(done: Place, words: tuple[str, ...], said: list[str]):
    told = done.pipeline("train-student", CONFIG, *(part for word in words for part in ("--set", word)), status=2)
    assert all(part in told for part in said), told
