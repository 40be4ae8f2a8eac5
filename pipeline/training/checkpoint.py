"""All that a training run is at the end of a step: parameters and optimizer moments in one safetensors file. No pickle."""

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
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value.detach().cpu().contiguous() for key, value in state.items()}
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
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters (tied ones once) and buffers, by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())
