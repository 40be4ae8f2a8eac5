from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pipeline.errors import DamageError
from pipeline.models.adapters import add_adapters
from pipeline.models.heads import RowLogits, row_logits
from pipeline.models.optimizers import optimizer_named
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from tests.models.test_heads import gemma, llama

WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""bitsandbytes keeps the moments of tensors below 4,096 elements in float32."""
LORA = {"rank": 4, "alpha": 8.0, "targets": "all-linear", "rslora": False}


def adapted(dropout: float = 0.1) -> PreTrainedModel:
    model = llama()
    add_adapters(model, "tiny", **LORA, dropout=dropout, seed=0)
    return model


MODELS = {"llama": llama, "llama, tied": lambda: llama(tie_word_embeddings=True), "gemma": gemma, "adamw_8bit": lambda: llama(**WIDE), "lora": adapted}
EACH = pytest.mark.parametrize("name", MODELS)


def training(name: str, seed: int) -> tuple[RowLogits, torch.optim.Optimizer]:
    """A model with weights of its own and an optimizer of two groups, as train-student has them."""
    module = row_logits(MODELS[name](), "tiny", 70).train()
    with torch.no_grad():
        for parameter in (each for each in module.parameters() if each.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.01)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices, others = ([parameter for parameter in trained if (parameter.ndim > 1) == wanted] for wanted in (True, False))
    optimizer = optimizer_named("adamw_8bit" if name == "adamw_8bit" else "adamw", [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    return module, optimizer


def step(module: RowLogits, optimizer: torch.optim.Optimizer, number: int) -> None:
    torch.manual_seed(number)
    ids = (torch.arange(24) * (number + 3) % 70)[None]
    loss = torch.nn.functional.cross_entropy(module(ids, torch.arange(23)), ids[0, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def states(module: RowLogits, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [optimizer.state[parameter] for parameter in module.parameters() if parameter in optimizer.state]
    return [*module.state_dict().values(), *(torch.as_tensor(state[key]) for state in moments for key in sorted(state))]


def identical(one, other) -> bool:
    a, b = states(*one), states(*other)
    return len(a) == len(b) and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@EACH
def test_training_goes_on_bit_for_bit_where_it_was_saved(name: str, tmp_path: Path):
    one, other = training(name, 0), training(name, 1)
    for number in range(3):
        step(*one, number)
    save_checkpoint(tmp_path / "c.safetensors", *one)
    assert not identical(one, other)
    load_checkpoint(tmp_path / "c.safetensors", *other)
    assert identical(one, other)
    for number in range(3, 6):
        step(*one, number)
        step(*other, number)
    assert identical(one, other)


@EACH
def test_control_a_checkpoint_without_the_optimizer_or_with_its_moments_mixed_up_is_caught(name: str, tmp_path: Path):
    one = training(name, 0)
    for number in range(3):
        step(*one, number)
    save_checkpoint(tmp_path / "c.safetensors", *one)
    tensors = load_file(tmp_path / "c.safetensors")
    first, second = ("state1", "state2") if name == "adamw_8bit" else ("exp_avg", "exp_avg_sq")
    swapped = tensors | {f"optimizer.0.{first}": tensors[f"optimizer.0.{second}"], f"optimizer.0.{second}": tensors[f"optimizer.0.{first}"]}
    forgotten = {key: value for key, value in tensors.items() if key.startswith("model.")}
    for broken in (swapped, forgotten):
        save_file(broken, tmp_path / "broken.safetensors")
        other = training(name, 1)
        load_checkpoint(tmp_path / "broken.safetensors", *other)
        assert not identical(one, other)


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path):
    one, other = training("llama, tied", 0), training("llama, tied", 1)
    step(*one, 0)
    save_checkpoint(tmp_path / "c.safetensors", *one)
    assert sum(value.shape == (70, 32) for key, value in load_file(tmp_path / "c.safetensors").items() if key.startswith("model.")) == 1
    load_checkpoint(tmp_path / "c.safetensors", *other)
    model = other[0].model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    step(*other, 1)
    assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_a_checkpoint_before_the_first_step_has_no_moments(tmp_path: Path):
    one, other = training("llama", 0), training("llama", 1)
    save_checkpoint(tmp_path / "c.safetensors", *one)
    load_checkpoint(tmp_path / "c.safetensors", *other)
    step(*one, 0)
    step(*other, 0)
    assert identical(one, other)


def test_the_optimizers_groups_stay_as_the_run_made_them(tmp_path: Path):
    one, other = training("llama", 0), training("llama", 1)
    step(*one, 0)
    save_checkpoint(tmp_path / "c.safetensors", *one)
    other[1].param_groups[0]["lr"] = 0.5
    load_checkpoint(tmp_path / "c.safetensors", *other)
    assert [group["weight_decay"] for group in other[1].param_groups] == [0.1, 0.0]
    assert other[1].param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\xff" * 20 + data[20:]])
def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path: Path, damage):
    one = training("llama", 0)
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, *one)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamageError, match=r"c\.safetensors"):
        load_checkpoint(path, *one)


def test_what_else_training_goes_on_from_comes_back_too(tmp_path: Path):
    one, other = training("llama", 0), training("llama", 1)
    save_checkpoint(tmp_path / "c.safetensors", *one, {"mean": torch.arange(5.0)})
    back = {"mean": torch.zeros(5)}
    load_checkpoint(tmp_path / "c.safetensors", *other, back)
    assert torch.equal(back["mean"], torch.arange(5.0))
    assert identical(one, other)


def test_moments_of_one_byte_come_back_as_they_were(tmp_path: Path):
    """With their scales, their tables of values and the number of steps, which is no tensor; small tensors have theirs in float32."""
    one, other = training("adamw_8bit", 0), training("adamw_8bit", 1)
    for number in range(3):
        step(*one, number)
    save_checkpoint(tmp_path / "c.safetensors", *one)
    load_checkpoint(tmp_path / "c.safetensors", *other)
    kinds = set()
    for ours, theirs in zip(one[0].parameters(), other[0].parameters(), strict=True):
        before, after = one[1].state[ours], other[1].state[theirs]
        assert before.keys() == after.keys()
        assert type(after["step"]) is int
        assert after["step"] == 3
        assert after["state1"].dtype == (torch.uint8 if ours.numel() >= 4096 else torch.float32)
        kinds.add((after["state1"].dtype, *sorted(after)))
    assert kinds == {(torch.uint8, "absmax1", "absmax2", "qmap1", "qmap2", "state1", "state2", "step"), (torch.float32, "state1", "state2", "step")}


def test_of_weights_that_are_left_as_they_are_nothing_is_saved(tmp_path: Path):
    whole, lora = training("llama", 0), training("lora", 0)
    for number, (module, optimizer) in enumerate((whole, lora)):
        step(module, optimizer, 0)
        save_checkpoint(tmp_path / f"{number}.safetensors", module, optimizer)
    names = load_file(tmp_path / "1.safetensors").keys()
    trained = {name for name, parameter in lora[0].named_parameters() if parameter.requires_grad}
    assert {name for name in names if name.startswith("model.")} == {f"model.{name}" for name in trained | dict(lora[0].named_buffers()).keys()}
    assert {name.split(".")[1] for name in names if name.startswith("optimizer.")} == {str(i) for i in range(len(trained))}
    sizes = [(tmp_path / f"{number}.safetensors").stat().st_size for number in (0, 1)]
    assert sizes[1] < 0.35 * sizes[0]
