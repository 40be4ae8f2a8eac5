"""Weights of a projection, trained on the tokens that are there: the likelihood that it gives them, and never a student's loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import InputError, NumericsError
from pipeline.signals.projection import Meeting
from pipeline.signals.ragged import runs

BATCH = 64
"""Places a step."""


@dataclass(frozen=True)
class Places:
    """Where both begin a token at the same byte, of several records: what the teacher says there, and the student's token that stands there."""

    kept: np.ndarray  # int64 [N] how many of the teacher's tokens
    teacher_id: np.ndarray  # int32 [sum of kept]
    logprob: np.ndarray  # float32 [sum of kept] at temperature 1
    before: np.ndarray  # int32 [N] the teacher's token before
    student_id: np.ndarray  # int32 [N]

    @classmethod
    def of(cls, meeting: Meeting) -> "Places":
        """Of one record; where an answer ends on both sides, too."""
        _, entry = meeting.kept(meeting.row)
        targets = meeting.targets
        before = meeting.teacher.ids[targets.position[meeting.row]]
        return cls(targets.kept[meeting.row].astype(np.int64), targets.ids[entry], targets.logprobs[entry], before, meeting.student.ids[meeting.at_student + 1])

    @classmethod
    def joined(cls, parts: Iterable["Places"]) -> "Places":
        parts = list(parts)
        columns = zip(*((part.kept, part.teacher_id, part.logprob, part.before, part.student_id) for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns)) if parts else cls(*(np.zeros(0, dtype=kind) for kind in (np.int64, np.int32, np.float32, np.int32, np.int32)))

    def batches(self, order: np.ndarray) -> Iterator["Batch"]:
        """order: which places, in which order."""
        begin = np.cumsum(self.kept) - self.kept
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            _, entry = runs(begin[chosen], self.kept[chosen])
            kept, teacher_id, before, student_id = (torch.from_numpy(part.astype(np.int64)) for part in (self.kept[chosen], self.teacher_id[entry], self.before[chosen], self.student_id[chosen]))
            yield Batch(kept, teacher_id, torch.from_numpy(np.exp(self.logprob[entry])), before, student_id)


@dataclass(frozen=True)
class Batch:
    """As in Places; `p` is the tokens' mass, and what is missing to 1 is that of all others."""

    kept: Tensor  # int64 [N]
    teacher_id: Tensor  # int64 [E]
    p: Tensor  # float32 [E]
    before: Tensor  # int64 [N]
    student_id: Tensor  # int64 [N]

    @property
    def owner(self) -> Tensor:
        """int64 [E]: which place each entry is of."""
        return torch.repeat_interleave(self.kept)


class Layer(nn.Module, ABC):
    """What gives each place's student token a probability. Tables of which a step needs few rows are nn.Embedding(Bag) with sparse=True."""

    @abstractmethod
    def nll(self, batch: Batch) -> Tensor:
        """float32 [N] nats."""


def fit(
    layer: Layer,
    places: Places,
    held_out: Places,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    begun: dict[str, Tensor] | None = None,
    after_epoch: Callable[[int, dict[str, Tensor]], None] = lambda epoch, tensors: None,
) -> dict[str, float]:
    """Train with Adam until the held-out places are given no more by another epoch; at most so many epochs.

    held_out: of records that neither the layer's start nor its training has seen. after_epoch: is given how many are done and
    tensors that another call goes on from as `begun`, as if it had not been interrupted. Gives the nats per held-out place
    before and after. Raises NumericsError if that is no number, and InputError if there is nothing to train on. A parameter
    that has no part in the likelihood would stay as it began: a RuntimeError.
    """
    count = len(places.kept)
    if not count or not len(held_out.kept):
        raise InputError(f"There are {count + len(held_out.kept)} places in the cache's training answers where both tokenizers begin a token: too few to train a projection on. Choose `contextual`.")
    tables = [module.weight for module in layer.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse]
    others = [parameter for parameter in layer.parameters() if all(parameter is not table for table in tables)]
    optimizers = [torch.optim.Adam(others, lr=learning_rate), *([torch.optim.SparseAdam(tables, lr=learning_rate)] if tables else [])]
    if begun:
        before, best, done = begun["nats"][0].item(), begun["nats"][1].item(), int(begun["epochs"])
        _restore(layer, optimizers, begun)
    else:
        before = best = _mean(layer, held_out)
        done = 0
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    random = np.random.default_rng(seed)
    for epoch in range(epochs):
        order = random.permutation(count)
        if epoch < done:
            continue
        for batch in places.batches(order):
            layer.zero_grad(set_to_none=True)
            layer.nll(batch).mean().backward()
            for optimizer in optimizers:
                optimizer.step()
        now = _mean(layer, held_out)
        if not np.isfinite(now):
            raise NumericsError(f"The projection's training gave {now} nats after {epoch + 1} epochs. Give a lower projection.learning_rate.")
        if apart := [name for name, value in layer.named_parameters() if value.grad is None]:
            raise RuntimeError(f"the projection's parameters {apart} have no part in the likelihood")
        if now >= best:
            break
        best, kept = now, {name: value.clone() for name, value in layer.state_dict().items()}
        after_epoch(epoch + 1, _state(layer, optimizers) | {"nats": torch.tensor([before, best], dtype=torch.float64), "epochs": torch.tensor(epoch + 1)})
    layer.load_state_dict(kept)
    return {"places": count, "held_out_places": len(held_out.kept), "nats_before": round(before, 4), "nats_after": round(best, 4)}


def _state(layer: Layer, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    tensors = {f"layer.{name}": value for name, value in layer.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return tensors


def _restore(layer: Layer, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    layer.load_state_dict({name.removeprefix("layer."): value for name, value in tensors.items() if name.startswith("layer.")})
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                index, key = name.split(".")[2:]
                # SparseAdam counts its steps in Python
                state.setdefault(int(index), {})[key] = int(value) if key == "step" and isinstance(optimizer, torch.optim.SparseAdam) else value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def _mean(layer: Layer, places: Places) -> float:
    count = len(places.kept)
    return float(sum(layer.nll(batch).double().sum() for batch in places.batches(np.arange(count))) / count)
