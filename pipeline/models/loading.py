"""Causal LMs from a folder or the hub: the teacher quantized, the student whole or with some of its layers."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pipeline.errors import InputError

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


def device_named(name: str) -> torch.device:
    """auto: CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("machine.device is cuda, and torch sees no CUDA device. Use `--set machine.device=auto`, or install a CUDA build of torch.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def numerics_of(device: torch.device) -> dict[str, Any]:
    """What the bits of a computation depend on besides its inputs, types and shapes: the kind of device, the threads, the library."""
    about = {"cuda": lambda: "sm_{}{}".format(*torch.cuda.get_device_capability(device)), "cpu": torch.backends.cpu.get_cpu_capability}
    return {"device": f"{device.type} {about[device.type]()}", "threads": torch.get_num_threads(), "torch": torch.__version__}


def load_teacher(source: str, revision: str | None, quantization: str, double_quantization: bool, dtype: str, device: torch.device) -> PreTrainedModel:
    """The model for inference: NF4 or int8 through bitsandbytes (which runs on CUDA and on CPU), or as it is."""
    model = _load(source, revision, **_placed(device, quantization, double_quantization, dtype))
    if dtype != "bfloat16":
        _without_fused_products(model)
    return model.eval().requires_grad_(False)


def load_student(
    source: str, revision: str | None, layers: list[int] | None, device: torch.device, dtype: str = "float32", quantization: str = "none", double_quantization: bool = True
) -> PreTrainedModel:
    """The model with only the decoder layers that are listed; its linear weights quantized, if they are to stay as they are."""
    if quantization == "none":
        model = _load(source, revision, dtype=getattr(torch, dtype))
        if layers is not None:
            model = keep_layers(model, layers, source)
        torch.nn.Module.to(model, device)
        return model
    options = _placed(device, quantization, double_quantization, dtype)
    if layers is None:
        model = _load(source, revision, **options)
    else:
        smaller = keep_layers(_load(source, revision, dtype=getattr(torch, dtype)), layers, source)
        model = type(smaller).from_pretrained(None, config=smaller.config, state_dict=smaller.state_dict(), **options)  # weights are quantized as they are read
        model.generation_config = smaller.generation_config
    _without_fused_products(model)
    return model


def _placed(device: torch.device, quantization: str, double_quantization: bool, dtype: str) -> dict[str, Any]:
    """How transformers is to load a model."""
    compute = getattr(torch, dtype)
    options: dict[str, Any] = {"dtype": compute, "device_map": {"": device}}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quantization, bnb_4bit_compute_dtype=compute)
    elif quantization == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return options


def _without_fused_products(model: PreTrainedModel) -> None:
    """bitsandbytes' fused product on CPUs computes in bfloat16, whatever type it is given, and once it has been used no gradient comes through."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def keep_layers(model: PreTrainedModel, layers: list[int], name: str) -> PreTrainedModel:
    """A model of the same architecture with the listed decoder layers, in that order, and everything else as it was."""
    text = model.config.get_text_config()
    if not layers or min(layers) < 0 or max(layers) >= text.num_hidden_layers:
        raise InputError(f"student.layers {layers}: {name} has the layers 0 to {text.num_hidden_layers - 1}. Name at least one of them.")
    config = AutoConfig.for_model(**model.config.to_dict())
    inner = config.get_text_config()
    inner.num_hidden_layers = len(layers)
    if getattr(text, "layer_types", None):
        inner.layer_types = [text.layer_types[layer] for layer in layers]
    smaller = AutoModelForCausalLM.from_config(config, dtype=model.dtype, trust_remote_code=False)
    blocks, new_blocks = decoder_layers(model, name), decoder_layers(smaller, name)
    for new, old in enumerate(layers):
        new_blocks[new].load_state_dict(blocks[old].state_dict())
    prefix = next(key for key, module in model.named_modules() if module is blocks) + "."
    others = {key: value for key, value in model.state_dict().items() if not key.startswith(prefix)}
    missing, unexpected = smaller.load_state_dict(others, strict=False)
    assert not unexpected
    assert all(key.startswith(prefix) for key in missing)
    smaller.generation_config = model.generation_config
    return smaller.eval()


def decoder_layers(model: PreTrainedModel, name: str) -> torch.nn.ModuleList:
    count = model.config.get_text_config().num_hidden_layers
    found = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count]
    if len(found) != 1:
        raise InputError(f"student.layers: the decoder layers of {name} ({type(model).__name__}) were not found. Leave `layers` out.")
    return found[0]


def _load(source: str, revision: str | None, **options: Any) -> PreTrainedModel:
    hint = "Check the name, `revision`, and that you are logged in to the hub." if revision else f"Is {Path(source)} a whole model folder with config.json and *.safetensors?"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, revision=revision, output_loading_info=True, trust_remote_code=False, use_safetensors=True, **options)
    except Exception as error:  # whatever it is that transformers finds wrong: it is the model that was named
        raise InputError(f"The model {source} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]} {hint}") from None
    model, found = loaded
    missing, surplus = sorted(found["missing_keys"]), sorted(key for key in found["unexpected_keys"] if ".layers." in key)
    if missing or surplus:
        which = (
            f"lacks {len(missing)} tensors that its config.json asks for, {missing[0]} for one"
            if missing
            else f"has {len(surplus)} tensors for layers that its config.json does not know, {surplus[0]} for one"
        )
        raise InputError(f"The model {source} {which}: they would be made up or left out. {hint}")
    return model
