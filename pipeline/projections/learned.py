from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.options import Count, Positive, Rate, Share
from pipeline.projections.first_token import first_token
from pipeline.signals.counts import Counts, Matrix
from pipeline.signals.first_tokens import Encode
from pipeline.signals.fitting import Batch, Layer
from pipeline.signals.projection import REST, Form, Meeting, Shares, at_meetings
from pipeline.signals.vocabulary import Vocabulary


def learned(
    teacher: Vocabulary,
    student: Vocabulary,
    encode: Encode,
    counts: Counts,
    trained: Callable[..., None],
    *,
    rank: Positive = 16,
    epochs: Count = 10,
    learning_rate: Rate = 0.01,
    least_count: Count = 5,
    least_share: Share = 0.001,
    seed: Count = 0,
) -> "Learned":
    """As `count_transport`, but how a token's mass is shared out depends on the teacher's token before, and the shares are trained.

    Begins as `count_transport`; where that knows one student token only there is nothing to learn. Trained on the likelihood
    of the student's tokens that are there. Shares below least_share go to the rest.
    """
    matrix = counts.matrix(first_token(teacher, student, encode).student_id, least_count, 0.0)
    torch.manual_seed(seed)
    layer = SharesGivenBefore(matrix, counts, len(teacher), len(student), rank)
    if (np.diff(matrix.begin) > 1).any():
        trained(layer, epochs=epochs, learning_rate=learning_rate, seed=seed)
    return Learned(layer.eval(), matrix, least_share)


class SharesGivenBefore(Layer):
    """share(s | t, before) = softmax over the student tokens s of t of w[t, s] + u[before] . v[s]."""

    def __init__(self, matrix: Matrix, counts: Counts, teacher_size: int, student_size: int, rank: int) -> None:
        super().__init__()
        self._begin = torch.from_numpy(matrix.begin)
        self._to = torch.from_numpy(np.where(matrix.student_id == REST, student_size, matrix.student_id).astype(np.int64))
        usual = np.bincount(counts.student_id, counts.count, student_size) + 1
        self._usual = torch.from_numpy((usual / usual.sum()).astype(np.float32))
        self.share = nn.Parameter(torch.from_numpy(matrix.log_share.copy()))
        self.before = nn.Embedding(teacher_size, rank, sparse=True)
        nn.init.normal_(self.before.weight, std=rank**-0.5)
        self.token = nn.Parameter(torch.zeros(student_size + 1, rank))  # 0: as counted; the last is for the rest

    def forward(self, teacher_id: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each teacher token after the one before it: which it is [E], the student token or V_student [E], log of the share [E]."""
        entries = self._begin[teacher_id + 1] - self._begin[teacher_id]
        owner = torch.repeat_interleave(entries)
        edge = torch.arange(len(owner)) - (entries.cumsum(0) - entries)[owner] + self._begin[teacher_id][owner]
        to = self._to[edge]
        logits = self.share[edge]
        open = (entries > 1)[owner].nonzero()[:, 0]
        logits = logits.index_add(0, open, (self.before(before[owner[open]]) * self.token[to[open]]).sum(-1))
        top = torch.full((len(teacher_id),), -torch.inf).scatter_reduce(0, owner, logits.detach(), "amax")
        logits = logits - top[owner]
        return owner, to, logits - torch.zeros(len(teacher_id)).index_add(0, owner, logits.exp()).log()[owner]

    def nll(self, batch: Batch) -> Tensor:
        """What has no place is any token as often as each occurs."""
        owner, to, log_share = self(batch.teacher_id, batch.before[batch.owner])
        place = batch.owner[owner]
        there = (to == batch.student_id[place]).nonzero()[:, 0]
        count = len(batch.kept)
        mass = torch.zeros(count).index_add(0, place[there], batch.p[owner[there]] * log_share[there].exp())
        known = torch.zeros(count).index_add(0, batch.owner, batch.p)
        return -(mass + (1 - known).clamp(min=1e-6) * self._usual[batch.student_id]).log()


@dataclass(frozen=True)
class Learned:
    form: ClassVar[Form] = "shares"
    layer: SharesGivenBefore
    matrix: Matrix
    least_share: float

    @cached_property
    def student_id(self) -> np.ndarray:
        """int32 [V_teacher]."""
        return self.matrix.largest()[0]

    def shares(self, meeting: Meeting) -> Shares:
        place, kept = meeting.kept(meeting.row)
        before = meeting.teacher.ids[meeting.targets.position[meeting.row]].astype(np.int64)
        with torch.no_grad():
            found = self.layer(torch.from_numpy(meeting.targets.ids[kept].astype(np.int64)), torch.from_numpy(before[place]))
        owner, to, log_share = (part.numpy() for part in found)
        faint = (to == self.layer.token.shape[0] - 1) | (np.exp(log_share) < self.least_share)
        # one share of the rest for each token that has any
        left = np.bincount(owner[faint], np.exp(log_share[faint].astype(np.float64)), len(kept))
        some = np.flatnonzero(left > 0)
        owner, to = np.concatenate([owner[~faint], some]), np.concatenate([to[~faint], np.full(len(some), REST)])
        log_share = np.concatenate([log_share[~faint], np.log(left[some])]).astype(np.float32)
        return at_meetings(meeting, place[owner], kept[owner], to.astype(np.int32), log_share)
