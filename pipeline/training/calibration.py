"""The running averages behind the calibrated tail."""

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.signals.projection import SparseTarget
from pipeline.signals.tail import log_ratio, means_at, student_sums

LEAST_SHARE = 0.02
"""Of a new step in the averages, once there have been many."""
FEW = 500
"""Positions behind an average at which its log ratios count half: from a hundred or so they would do more harm than good."""


class Calibration:
    """The student's average tail over the last steps, beside the teacher's at the same temperatures; the same on all devices.

    A step's ratio is that of the steps before it, so that it does not depend on how the step is split; the first has none.
    """

    def __init__(self, log_means: np.ndarray, stored: list[float], device: torch.device) -> None:
        self._log_means, self._stored = log_means, stored
        size = log_means.shape[1]
        self.state = {name: torch.zeros(length, device=device) for name, length in (("teacher", size), ("student", size), ("steps", 1), ("rows", 1))}
        self._sums = torch.zeros(size + 1, device=device)

    def log_ratio(self) -> Tensor:
        """float32 [V]."""
        if self.state["steps"] == 0:
            return torch.zeros_like(self.state["student"])
        positions = self.state["rows"] / self._share(self.state["steps"] - 1)  # that count in the averages
        return log_ratio(self.state["teacher"], self.state["student"]) * (positions / (positions + FEW))

    def add(self, student: Tensor, target: SparseTarget) -> None:
        """A micro-batch of the running step. student: [N, V] logits of the target's rows."""
        self._sums += torch.cat([student_sums(student.detach(), target), target.rest.new_full((1,), len(target.rest))])

    def step(self, temperature: float, accelerator: Accelerator) -> None:
        """The step is over."""
        sums = accelerator.reduce(self._sums, "sum")
        rows = sums[-1]
        if rows > 0:
            teacher = torch.from_numpy(np.exp(means_at(self._log_means, self._stored, temperature))).float().to(sums.device)
            share = self._share(self.state["steps"])
            self.state["teacher"] += share * (teacher - self.state["teacher"])
            self.state["student"] += share * (sums[:-1] / rows - self.state["student"])
            self.state["rows"] += share * (rows - self.state["rows"])
            self.state["steps"] += 1
        self._sums.zero_()

    @staticmethod
    def _share(steps: Tensor) -> Tensor:
        """Of the step after so many."""
        return torch.clamp(1 / (steps + 1), min=LEAST_SHARE)
