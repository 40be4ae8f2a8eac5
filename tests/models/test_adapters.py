import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from pipeline.errors import InputError
from pipeline.models.adapters import add_adapters, merge_adapters, save_adapter, sizes
from pipeline.models.heads import row_logits
from pipeline.models.loading import keep_layers, load_student
from tests.models.test_heads import gemma, llama, phi

CPU = torch.device("cpu")
LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "rslora": False, "seed": 0}


def gpt2() -> PreTrainedModel:
    """Its matrices are transposed."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=70, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)).eval()


MODELS = {"llama": llama, "llama, tied": lambda: llama(tie_word_embeddings=True), "gemma": gemma, "phi, with a bias": phi, "gpt2": gpt2}
EACH = pytest.mark.parametrize("name", MODELS)
KINDS = [("none", "float32"), ("none", "bfloat16"), ("nf4", "float32"), ("nf4", "bfloat16"), ("int8", "float32"), ("int8", "bfloat16")]
EACH_KIND = pytest.mark.parametrize(("quantization", "dtype"), KINDS)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(1, 21)[None], use_cache=False).logits.float()


def adapters_of(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained(model: PreTrainedModel, size: float = 0.05) -> PreTrainedModel:
    """As if it had been: each adapter somewhere else."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters_of(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def loaded(folder: Path, quantization: str, dtype: str, name: str = "llama", **changes: Any) -> PreTrainedModel:
    MODELS[name]().save_pretrained(folder / "base")
    model = load_student(str(folder / "base"), None, None, CPU, dtype, quantization)
    add_adapters(model, name, **LORA | changes)
    return model


@EACH
def test_adapters_change_no_logit_before_training_and_nothing_of_the_models_shape(name: str):
    model = MODELS[name]()
    before, head, body = logits(model), model.get_output_embeddings(), model.base_model
    add_adapters(model, name, **LORA)
    assert torch.equal(logits(model), before)
    assert type(model) is type(MODELS[name]())
    assert model.get_output_embeddings() is head
    assert model.base_model is body
    ids = torch.arange(1, 21)[None]
    with torch.inference_mode():
        torch.testing.assert_close(row_logits(model, name, 70)(ids, torch.arange(20)), before[0], rtol=1e-4, atol=1e-4)


@EACH_KIND
def test_quantized_or_not_the_start_is_the_model_itself(tmp_path: Path, quantization: str, dtype: str):
    llama().save_pretrained(tmp_path)
    model = load_student(str(tmp_path), None, None, CPU, dtype, quantization)
    assert any(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules()) == (quantization != "none")
    before = logits(model)
    add_adapters(model, "llama", **LORA)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(trained(model)), before)


@EACH_KIND
def test_adapters_alone_are_trained_and_in_float32(tmp_path: Path, quantization: str, dtype: str):
    model = loaded(tmp_path, quantization, dtype)
    assert {parameter.dtype for parameter in adapters_of(model).values()} == {torch.float32}
    assert all("lora_" in name for name in adapters_of(model))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(adapters_of(model).values(), lr=0.01)
    for _ in range(2):
        model.train()(input_ids=torch.arange(1, 21)[None], labels=torch.arange(1, 21)[None]).loss.backward()
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == adapters_of(model).keys()


@EACH
@pytest.mark.parametrize(("rank", "alpha", "rslora", "factor"), [(4, 8.0, False, 2.0), (8, 2.0, False, 0.25), (4, 8.0, True, 4.0)])
def test_an_adapter_adds_alpha_over_rank_times_b_a(name: str, rank: int, alpha: float, rslora: bool, factor: float):
    model = MODELS[name]()
    dense = copy.deepcopy(model)
    add_adapters(model, name, **LORA | {"rank": rank, "alpha": alpha, "rslora": rslora})
    found = adapters_of(trained(model))
    assert all(rank in parameter.shape for parameter in found.values())
    with torch.no_grad():
        for key in {key.partition(".lora_")[0] for key in found}:
            delta = factor * found[f"{key}.lora_B.default.weight"] @ found[f"{key}.lora_A.default.weight"]
            weight = dense.get_submodule(key).weight
            weight.add_(delta.T if name == "gpt2" else delta)  # type: ignore[operator]
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)


@EACH
def test_the_folder_that_is_written_is_an_ordinary_model_with_the_trained_ones_logits(name: str, tmp_path: Path):
    model = trained(loaded(tmp_path, "none", "float32", name))
    wanted = logits(model)
    save_adapter(model, tmp_path / "adapter", "base", None)
    merge_adapters(model)
    assert not any("lora" in key for key in model.state_dict())
    model.save_pretrained(tmp_path / "student")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "student")), wanted, rtol=1e-5, atol=1e-5)
    assert {file.name for file in (tmp_path / "student").iterdir()} == {file.name for file in (tmp_path / "base").iterdir()}
    there = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(there), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("quantization", "dtype", "near"),
    # what is left is rounding; with int8 the products' left sides are quantized, too, while it is trained, and not afterwards
    [("nf4", "float32", 1e-5), ("nf4", "bfloat16", 0.04), ("none", "bfloat16", 0.04), ("int8", "float32", 0.06), ("int8", "bfloat16", 0.06)],
)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
@pytest.mark.parametrize("name", ["llama", "gemma", "phi, with a bias"])
def test_a_quantized_student_is_written_as_what_it_was_computed_with(tmp_path: Path, quantization: str, dtype: str, near: float, targets: Any, name: str):
    model = trained(loaded(tmp_path, quantization, dtype, name, targets=targets))
    wanted = logits(model)
    merge_adapters(model)
    model.save_pretrained(tmp_path / "student")
    assert "quantization_config" not in json.loads((tmp_path / "student" / "config.json").read_text())
    written = load_file(tmp_path / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, dtype)}
    assert written.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    there = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32))
    assert (there - wanted).norm() < near * wanted.norm()
    # control: the weights before they were quantized, or without the adapter, are further away
    model = loaded(tmp_path, "none", "float32", name, targets=targets)
    assert targets != "all-linear" or (logits(model) - wanted).norm() > 2 * (there - wanted).norm()
    if quantization == "nf4":
        assert (logits(trained(model)) - wanted).norm() > 2 * (there - wanted).norm()


@EACH_KIND
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_adapter_also_after_the_model_was_only_asked(tmp_path: Path, quantization: str, dtype: str, checkpointing: bool):
    model = trained(loaded(tmp_path, quantization, dtype))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module = row_logits(model, "llama", 70).train()  # asks without a graph: a CPU's fused product would come into use
    ids = torch.arange(1, 21)[None]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        torch.nn.functional.cross_entropy(module(ids, torch.arange(19)).float(), ids[0, 1:]).backward()
    gradients = {name: parameter.grad for name, parameter in adapters_of(model).items()}
    assert len(gradients) == 2 * 7 * 2
    assert all(gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 1e-6 for gradient in gradients.values())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in gradients)
    if not checkpointing and dtype == "float32" and quantization != "int8":
        merged = trained(loaded(tmp_path, quantization, dtype))
        merge_adapters(merged)
        merged.requires_grad_(True)
        torch.nn.functional.cross_entropy(merged(input_ids=ids).logits[0, :19], ids[0, 1:]).backward()
        key = "model.layers.0.self_attn.q_proj"
        factor = 2 * dict(model.named_parameters())[f"{key}.lora_B.default.weight"].T @ merged.get_submodule(key).weight.grad  # type: ignore[operator]
        torch.testing.assert_close(gradients[f"{key}.lora_A.default.weight"], factor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_layers_are_pruned_first(tmp_path: Path, quantization: str):
    """Pruned and then quantized is the same as a folder of the pruned model quantized; an adapter belongs to one layer even if that is there twice."""
    whole = llama(num_hidden_layers=4)
    whole.save_pretrained(tmp_path / "base")
    keep_layers(whole, [3, 1, 1], "tiny").save_pretrained(tmp_path / "pruned")
    model = load_student(str(tmp_path / "base"), None, [3, 1, 1], CPU, "float32", quantization)
    torch.testing.assert_close(logits(model), logits(load_student(str(tmp_path / "pruned"), None, None, CPU, "float32", quantization)), rtol=0, atol=0)
    add_adapters(model, "tiny", **LORA)
    assert len(adapters_of(model)) == 3 * 7 * 2
    wanted = logits(trained(model))
    merge_adapters(model)
    model.save_pretrained(tmp_path / "student")
    there = load_student(str(tmp_path / "student"), None, None, CPU)
    assert there.config.num_hidden_layers == 3
    assert (logits(there) - wanted).norm() < (0.06 if quantization == "int8" else 1e-5) * wanted.norm()


def test_double_quantization_is_what_it_says(tmp_path: Path):
    llama().save_pretrained(tmp_path)
    nested = {double: load_student(str(tmp_path), None, None, CPU, "float32", "nf4", double).model.layers[0].mlp.up_proj.weight.quant_state.nested for double in (True, False)}
    assert nested == {True: True, False: False}


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_parameters_are_counted_as_they_are_written(tmp_path: Path, quantization: str):
    model = loaded(tmp_path, quantization, "float32")
    whole, trained = sizes(model)
    assert whole == sum(tensor.numel() for tensor in load_file(tmp_path / "base" / "model.safetensors").values())
    assert trained == 2 * 4 * (32 + 32 + 32 + 16 + 32 + 16 + 32 + 32 + 3 * (32 + 64))


@pytest.mark.parametrize(("targets", "count"), [(["q_proj"], 2), (["q_proj", "mlp.up_proj"], 4), (["layers.1.self_attn.v_proj"], 1)])
def test_targets_are_ends_of_names(targets: list[str], count: int):
    model = llama()
    add_adapters(model, "tiny", **LORA | {"targets": targets})
    assert len(adapters_of(model)) == 2 * count
    assert all(any(target in name for target in targets) for name in adapters_of(model))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_projj"], "did you mean 'q_proj'"),
        (["q_proj", "wqkv"], "no linear module 'wqkv'.*there are: down_proj, gate_proj"),
        (["mlp"], "'mlp'"),
        (["lm_head"], "'lm_head'"),
        (["embed_tokens"], "'embed"),
    ],
)
def test_a_target_that_cannot_have_an_adapter_is_an_error_that_names_those_that_can(targets: list[str], said: str):
    with pytest.raises(InputError, match=said):
        add_adapters(llama(), "tiny", **LORA | {"targets": targets})


def test_the_seed_and_nothing_else_says_where_adapters_begin():
    models = [llama(), llama(), llama()]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(seed + 3)
        add_adapters(model, "tiny", **LORA | {"seed": seed})
    one, same, other = ([parameter for name, parameter in adapters_of(model).items() if "lora_A" in name] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_adapter_without_a_base_names_none_and_its_bytes_are_always_the_same(tmp_path: Path):
    for place in ("one", "other"):
        model = trained(loaded(tmp_path, "none", "float32"))
        save_adapter(model, tmp_path / place, None, None)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"], config["peft_type"]) == (None, 4, 8.0, "LORA")
    assert config["target_modules"] == sorted(config["target_modules"])
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
