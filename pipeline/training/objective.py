"""The weighted sum of the named losses. The one place that averages."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.lookup import find, parameters
from pipeline.signals.attention import Attended
from pipeline.training.batches import Batch, Word


@dataclass(frozen=True)
class Part:
    """A loss under the name it is logged with, its weight, and what it asks for by its parameters' names.

    student: logits; teacher: the target; values: the same, whatever its tokens are; realised: the tokens that follow; chunks;
    attention: where both look.
    """

    name: str
    weight: float
    function: Callable[..., Tensor]
    asks_for: tuple[str, ...]
    options: dict[str, object]
    tail: str = "rest"
    """How the teacher's unkept mass is shared out: rest (as the student does), calibrated or hidden."""

    @property
    def needs_teacher(self) -> bool:
        return self.where_known or self.looks or "chunks" in self.asks_for

    @property
    def looks(self) -> bool:
        """Whether it is about attention, not about logits."""
        return "attention" in self.asks_for

    @property
    def where_known(self) -> bool:
        """Whether it is over the rows with a target, not over all."""
        return "teacher" in self.asks_for or "values" in self.asks_for


def parts(objective: list[tuple[str, float, dict[str, object], str]]) -> list[Part]:
    """From (name, weight, options, tail); what weighs nothing is left out."""
    found: list[Part] = []
    for loss, weight, options, tail in objective:
        if weight > 0:
            again = sum(part.name.startswith(loss) for part in found)
            name = f"{loss}_{again + 1}" if again else loss
            found.append(Part(name, weight, find("losses", loss), parameters("losses", loss)[0], options, tail))
    return found


def mass(batch: Batch) -> Tensor:
    """float64 [3]: the summed weights of all rows, of what teachers say of rows, and of the rows with the teacher's attention; over these is averaged."""
    looked = batch.weights[batch.attention[0].row] if batch.attention else batch.weights[:0]
    said = [batch.known_weights, *(word.weights for word in batch.others)]
    return torch.stack([weights.double().sum() for weights in (batch.weights, torch.cat(said), looked)])


def loss_of(
    objective: list[Part], batch: Batch, logits: Tensor, total: Tensor, log_ratio: Tensor | None = None, log_tail: Tensor | None = None, by_specialty: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """This batch's share of the step's loss (a sum over batches gives the whole), and each part's share without its weight; without attention's.

    logits: [N, V] of batch.rows. total: `mass` summed over all batches of the step, on all devices. log_ratio and log_tail
    say how the teacher's rest is shared out for the parts whose tail is calibrated and hidden (see SparseTarget).
    by_specialty: float32 [parts, S, 2], to which each part's summed values and their summed sureness are added, without the records' weights.
    """
    shared_out: dict[str, dict[str, Any]] = {"rest": {}, "calibrated": {"log_ratio": log_ratio}, "hidden": {"log_tail": log_tail}}
    rows: dict[str, Any] = {"student": logits, "realised": batch.realised, "chunks": batch.chunks}
    said: list[tuple[Word, dict[str, Any]]] = []
    for word in batch.said():
        known = logits if len(word.known) == len(logits) else logits.index_select(0, word.known)
        said.append((word, {"student": known, "realised": batch.realised[word.known], "values": word.target}))
    shares: dict[str, Tensor] = {}
    whole = logits[:0].sum(dtype=torch.promote_types(logits.dtype, torch.float32))  # 0, but of the graph: a batch without any word of the teacher can be gone back through
    for number, part in enumerate(objective):
        if part.looks:
            continue
        if part.where_known:
            found = [(word.known, word.weights, word.sureness, given | {"teacher": replace(word.target, **shape) if (shape := shared_out[part.tail]) else word.target}) for word, given in said]
        else:
            found = [(torch.arange(len(batch.rows), device=logits.device), batch.weights, torch.ones_like(batch.weights), rows)]
        for which, weights, sure, given in found:
            values = part.function(*(given[name] for name in part.asks_for), **part.options)
            share = _mean(values, weights, total[int(part.where_known)])
            shares[part.name] = shares.get(part.name, 0) + share.detach()
            whole = whole + part.weight * share
            if by_specialty is not None and batch.specialty is not None:
                by_specialty[number].index_add_(0, batch.specialty[which], torch.stack([values.detach() * sure, sure], -1).float())
    return whole, shares


def attention_loss_of(objective: list[Part], batch: Batch, attended: Attended, total: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """As loss_of, of the part that compares attention."""
    part = next(part for part in objective if part.looks)
    share = _mean(part.function(attended, **part.options), batch.weights, total[2])
    return part.weight * share, {part.name: share.detach()}


def _mean(values: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    return (values * weights).sum() / total.clamp(min=1e-9).float()
