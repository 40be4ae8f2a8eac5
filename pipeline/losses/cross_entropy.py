import torch
from torch import Tensor


def cross_entropy(student: Tensor, realised: Tensor) -> Tensor:
    """-log p of the token that follows, nats, [N]. student: [N, V] logits; realised: int64 [N]."""
    return torch.nn.functional.cross_entropy(student.float(), realised, reduction="none")
