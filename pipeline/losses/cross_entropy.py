import torch
from torch import Tensor

from pipeline.signals.outcomes import precise


def cross_entropy(student: Tensor, realised: Tensor) -> Tensor:
    """-log p of the token that follows, nats, [N]. student: [N, V] logits; realised: int64 [N]."""
    return torch.nn.functional.cross_entropy(precise(student), realised, reduction="none")
