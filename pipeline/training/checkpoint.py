"""All that a training run is at the end of a step: trained parameters and optimizer moments in one safetensors file. No pickle."""

import errno
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.errors import DamageError
from pipeline.files import appears_whole


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, others: dict[str, torch.Tensor] | None = None) -> None:
    """others: further tensors that training goes on from."""
    tensors = {f"model.{name}": tensor.detach().cpu().contiguous() for name, tensor in _state(model).items()}
    for index, state in _moments(optimizer).items():
        tensors |= {f"optimizer.{index}.{key}": _own(torch.as_tensor(value)) for key, value in state.items()}
    tensors |= {f"other.{name}": tensor.detach().cpu().contiguous() for name, tensor in (others or {}).items()}
    with appears_whole(path) as temporary:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:  # such as a full disk, which it tells in words only
            raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, f"The checkpoint could not be written ({error})", str(path)) from None


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, others: dict[str, torch.Tensor] | None = None) -> None:
    """Everything is copied into what is given."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise DamageError(f"The checkpoint {path} cannot be read: {error}. Remove it to go on from the one before.") from None
    with torch.no_grad():
        for name, tensor in _state(model).items():
            tensor.copy_(tensors[f"model.{name}"])
        for name, tensor in (others or {}).items():
            tensor.copy_(tensors[f"other.{name}"])
    whole = optimizer.state_dict()
    state: dict[int, dict[str, torch.Tensor | int]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = int(tensor) if tensor.dtype is torch.int64 else tensor
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that are trained (tied ones once) and buffers, by name; the others are an input, and the run is named after their hash."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad} | dict(model.named_buffers())


def _moments(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, torch.Tensor | int]]:
    """What the optimizer keeps of each parameter, by the parameter's number; bitsandbytes' `state_dict` has it wrapped."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {index: optimizer.state[parameter] for index, parameter in enumerate(parameters) if parameter in optimizer.state}


def _own(value: torch.Tensor) -> torch.Tensor:
    """On the CPU; not shared with others, as bitsandbytes' tables of 256 values are."""
    value = value.detach().cpu().contiguous()
    return value.clone() if value.numel() <= 256 else value
