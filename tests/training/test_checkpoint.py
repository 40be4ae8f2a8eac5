from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import DamageError
from pipeline.models.heads import RowLogits, row_logits
from pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from tests.models.test_heads import gemma, llama

MODELS = {"llama": llama, "llama, tied": lambda: llama(tie_word_embeddings=True), "gemma": gemma}
EACH = pytest.mark.parametrize("name", MODELS)


def training(name: str, seed: int) -> tuple[RowLogits, torch.optim.Optimizer]:
    """A model with weights of its own and an optimizer of two groups, as train-student has them."""
    module = row_logits(MODELS[name](), "tiny", 70).train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.01)
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    return module, torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01)


def step(module: RowLogits, optimizer: torch.optim.Optimizer, number: int) -> None:
    ids = (torch.arange(24) * (number + 3) % 70)[None]
    loss = torch.nn.functional.cross_entropy(module(ids, torch.arange(23)), ids[0, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def states(module: RowLogits, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = optimizer.state_dict()["state"]
    return [*module.state_dict().values(), *(moments[index][key] for index in sorted(moments) for key in sorted(moments[index]))]


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
    swapped = tensors | {"optimizer.0.exp_avg": tensors["optimizer.0.exp_avg_sq"], "optimizer.0.exp_avg_sq": tensors["optimizer.0.exp_avg"].abs()}
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
