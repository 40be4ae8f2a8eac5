from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.options import Count, Positive, Rate
from pipeline.signals.counts import Counts
from pipeline.signals.fitting import BATCH, Batch, Layer, Places
from pipeline.signals.projection import REST, Form, Meeting, Projected
from pipeline.signals.vocabulary import Vocabulary


def low_rank(
    teacher: Vocabulary,
    student: Vocabulary,
    counts: Counts,
    trained: Callable[..., None],
    *,
    rank: Positive = 64,
    keep: Annotated[int, Field(ge=1, le=65535)] = 64,
    epochs: Count = 10,
    learning_rate: Rate = 0.003,
    seed: Count = 0,
) -> "LowRank":
    """The published layer (DistilLLM-Med): the teacher's probabilities through a bottleneck with ReLU to the student's logits.

    Knows nothing of the tokens' bytes: all of it is trained, on the likelihood of the student's tokens that are there. Of its
    word the `keep` most likely tokens are kept, and the mass of the others.
    """
    torch.manual_seed(seed)
    layer = Bottleneck(counts, len(teacher), len(student), rank)
    trained(layer, epochs=epochs, learning_rate=learning_rate, seed=seed)
    return LowRank(layer.eval(), keep, np.flatnonzero(counts.total), len(teacher))


class Bottleneck(Layer):
    """q = softmax(B relu(A p + a) + b) over the student's tokens; p: the kept tokens' probabilities."""

    def __init__(self, counts: Counts, teacher_size: int, student_size: int, rank: int) -> None:
        super().__init__()
        usual = np.bincount(counts.student_id, counts.count, student_size) + 1
        self.inner = nn.EmbeddingBag(teacher_size, rank, mode="sum", sparse=True)
        self.inner_bias = nn.Parameter(torch.zeros(rank))
        self.outer = nn.Parameter(torch.randn(student_size, rank) / rank**0.5)
        self.outer_bias = nn.Parameter(torch.from_numpy(np.log(usual / usual.sum()).astype(np.float32)))

    def forward(self, kept: Tensor, teacher_id: Tensor, p: Tensor) -> Tensor:
        """float32 [N, V_student] logits. kept: int64 [N]; teacher_id, p: [sum of kept]."""
        inner = self.inner(teacher_id, kept.cumsum(0) - kept, per_sample_weights=p)
        return (inner + self.inner_bias).relu() @ self.outer.T + self.outer_bias

    def nll(self, batch: Batch) -> Tensor:
        return cross_entropy(self(batch.kept, batch.teacher_id, batch.p), batch.student_id, reduction="none")


@dataclass(frozen=True)
class LowRank:
    form: ClassVar[Form] = "values"
    layer: Bottleneck
    keep: int
    seen: np.ndarray  # int64 [n] teacher tokens that stand in the training answers
    teacher_size: int

    @cached_property
    def student_id(self) -> np.ndarray:
        """int32 [V_teacher]: what it says if the teacher is sure of a token; of those that it has seen."""
        found = np.full(self.teacher_size, REST, dtype=np.int32)
        with torch.no_grad():
            parts = [self.layer(torch.ones_like(some), some, torch.ones(len(some))).argmax(-1) for some in torch.from_numpy(self.seen).split(BATCH)]
        found[self.seen] = torch.cat([*parts, torch.zeros(0, dtype=torch.int64)])
        return found

    def values(self, meeting: Meeting, temperatures: list[float]) -> Projected:
        """A target's temperature is here that of the student's distribution: what the layer says is no mass that could be tempered before."""
        places = Places.of(meeting)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        with torch.no_grad():
            for batch in places.batches(np.arange(len(places.kept))):
                log_q = self.layer(batch.kept, batch.teacher_id, batch.p).log_softmax(-1)
                top, ids = log_q.topk(min(self.keep, log_q.shape[1]), sorted=True)
                others = log_q.scatter(1, ids, -torch.inf)
                found.append((ids, top, torch.stack([(others / t).logsumexp(-1) for t in temperatures])))
        keep = found[0][0].shape[1] if found else 0
        count = len(places.kept)
        return Projected(
            position=meeting.at_student,
            entries=np.full(count, keep),
            student_id=torch.cat([ids.flatten() for ids, _, _ in found]).numpy().astype(np.int32) if found else np.zeros(0, dtype=np.int32),
            logprobs=torch.cat([top.flatten() for _, top, _ in found]).numpy() if found else np.zeros(0, dtype=np.float32),
            log_share=None,
            rests=torch.cat([rests for _, _, rests in found], 1).numpy() if found else np.zeros((len(temperatures), 0), dtype=np.float32),
            unkept=np.full(count, len(self.layer.outer) - keep),
            reliability=np.ones(count, dtype=np.float32),
            row=meeting.row,
        )
