"""LoRA: adapters inside a model, which stays the class it is; written beside it in peft's format, and merged into its weights."""

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import InputError
from pipeline.lookup import nearest

ADAPTER = "default"


def add_adapters(model: PreTrainedModel, name: str, *, rank: int, alpha: float, dropout: float, targets: str | list[str], rslora: bool, seed: int) -> None:
    """Put an adapter that changes nothing yet (its B is 0) on each module that is targeted, and leave nothing else trainable.

    InputError for a target that no linear module's name ends with.
    """
    head = model.get_output_embeddings()
    linear = [key for key, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D) and module is not head]
    for target in [] if isinstance(targets, str) else targets:
        if not any(f".{key}".endswith(f".{target}") for key in linear):
            known = sorted({key.rpartition(".")[2] for key in linear})
            raise InputError(f"student.lora.targets: {name} ({type(model).__name__}) has no linear module '{target}' below its head; {nearest(target, known)}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a factor, whole or not
        lora_dropout=dropout,
        target_modules=targets,
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    inject_adapter_in_model(config, model, ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft gives it the type of the weights beside it, in which small steps are lost


def sizes(model: PreTrainedModel) -> tuple[int, int]:
    """The parameters of the model, those of adapters left out; and how many are trained."""
    adapters = sum(parameter.numel() for key, parameter in model.named_parameters() if "lora_" in key)
    whole: int = model.num_parameters()  # of packed weights as many as they stand for
    return whole - adapters, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def save_adapter(model: PreTrainedModel, folder: Path, base: str | None, revision: str | None) -> None:
    """What `PeftModel.from_pretrained(base, folder)` reads. base: the model that it belongs on; None: one that has no name."""
    config: Any = model.peft_config[ADAPTER]
    config.target_modules = sorted(config.target_modules)  # a set has another order in each process
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tensors = {f"base_model.model.{key}": tensor.detach().cpu().contiguous() for key, tensor in get_peft_model_state_dict(model, adapter_name=ADAPTER).items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


@torch.no_grad()
def merge_adapters(model: PreTrainedModel) -> None:
    """Make it an ordinary model with W + (alpha / rank) * B A for weights, in its own type; quantized weights become what they were computed with."""
    dtype: Any = model.get_input_embeddings().weight.dtype
    adapted: dict[str, Any] = {key: module for key, module in model.named_modules() if isinstance(module, LoraLayer)}
    alone = {key: module for key, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt) and key.removesuffix(".base_layer") not in adapted}
    for key, layer in adapted.items():
        plain = _dequantized(layer.get_base_layer(), torch.float32)
        plain.weight.data = (plain.weight.float() + layer.get_delta_weight(ADAPTER).to(plain.weight.device)).to(dtype)
        model.set_submodule(key, plain)
    for key, module in alone.items():
        model.set_submodule(key, _dequantized(module, dtype))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    del model.peft_config
    if quantizer := getattr(model, "hf_quantizer", None):
        quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False  # type: ignore[assignment]


def _dequantized(module: torch.nn.Module, dtype: torch.dtype) -> Any:
    """Itself if it is not quantized; otherwise a plain layer, off the device, where there may be no room for it."""
    if not isinstance(module, Linear4bit | Linear8bitLt):
        return module
    weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None))  # type: ignore[arg-type]
    plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    plain.weight = torch.nn.Parameter(weight.to("cpu", dtype))
    if module.bias is not None:
        plain.bias = torch.nn.Parameter(module.bias.to("cpu", dtype))
    return plain
