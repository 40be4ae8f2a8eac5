"""Specialties in training: their weights, given or balanced, and the student's loss on each."""

from collections import Counter
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

LEAST_SHARE = 0.02
"""Of a new step in a specialty's average loss, once there have been many."""


class Specialties:
    """The factors on records' weights by specialty. Balanced ones have a mean of 1 over the training records."""

    def __init__(self, records: Iterable[str], weights: Literal["inverse_frequency", "current_loss"] | dict[str, float], device: torch.device) -> None:
        """records: each training record's specialty, "" for none."""
        counts = Counter(records)
        self.names = sorted(counts)
        self.index = {name: n for n, name in enumerate(self.names)}
        frequency = torch.tensor([counts[name] for name in self.names], dtype=torch.float32, device=device)
        self._share = frequency / frequency.sum()
        if isinstance(weights, dict):
            self.constant = torch.tensor([weights.get(name, 1.0) for name in self.names], device=device)
            """float32 [S]: those that do not change; 1 where they follow the loss."""
        else:
            self.constant = 1 / (self._share * len(self.names)) if weights == "inverse_frequency" else torch.ones_like(self._share)
        self._by_loss = weights == "current_loss"
        self.state = {name: torch.zeros(len(self.names), device=device) for name in ("specialty_loss", "specialty_steps")} if self._by_loss else {}
        """What training goes on from."""

    def factors(self) -> Tensor:
        """float32 [S], of the next step: that of the steps before it, so that it does not depend on how the step is split."""
        if not self._by_loss:
            return self.constant
        loss, seen = self.state["specialty_loss"], self.state["specialty_steps"] > 0
        mean = (self._share * loss)[seen].sum() / self._share[seen].sum().clamp(min=1e-9)
        # one that was never seen counts as the average
        return torch.where(seen & (mean > 0), loss / mean.clamp(min=1e-9), 1.0)

    def step(self, sums: Tensor) -> dict[str, float]:
        """The step is over: the student's loss on each specialty that was in it. sums: float32 [parts, S, 2], see objective.loss_of, times the parts' weights."""
        value, rows = sums[..., 0], sums[..., 1]
        loss = (value / rows.clamp(min=1e-9)).sum(0)
        there = rows.sum(0) > 0
        if self._by_loss:
            steps = self.state["specialty_steps"]
            share = torch.clamp(1 / (steps + 1), min=LEAST_SHARE)
            self.state["specialty_loss"] += torch.where(there, share * (loss - self.state["specialty_loss"]), 0.0)
            steps += there
        return {name: value for name, value, seen in zip(self.names, loss.tolist(), there.tolist(), strict=True) if seen}
