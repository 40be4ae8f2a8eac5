"""The optimizers that training.optimizer names."""

from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit


def optimizer_named(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW over groups of parameters, whose learning rates are yet to be set."""
    return AdamW8bit(groups, lr=0.0) if name == "adamw_8bit" else torch.optim.AdamW(groups, lr=0.0)
