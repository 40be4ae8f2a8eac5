"""What the teacher itself says of the student's next token: its distribution with its likely tokens expanded one further."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline.cache.reader import Example
from pipeline.models.tokenizers import RecordTokenizer
from pipeline.signals.first_tokens import NONE, FirstTokens
from pipeline.signals.projection import SparseTarget, meet
from pipeline.signals.records import ANSWER, Tokens, number_as_lead
from pipeline.signals.vocabulary import Vocabulary

ENOUGH, MOST = 0.004, 16
"""The least probability of a token that is expanded, and at most how many are."""
NEXT = 64
"""Continuations of an expanded token that are read off; the others are taken to be like these."""
UNIFORM = 0.001
"""Share of the uniform distribution that a target is mixed with before it is compared: a KL is to be finite."""


@dataclass(frozen=True)
class Asked:
    """A position of the student's, and what the teacher says there."""

    example: Example
    tokens: Tokens
    position: int
    q: np.ndarray  # float64 [V_student]; sums to 1


def ask(model: PreTrainedModel, device: torch.device, teacher: Vocabulary, student: RecordTokenizer, examples: list[Example], count: int) -> Iterator[Asked]:
    """At so many positions of these examples at which both begin a token, drawn at random. model: the teacher that made their cache."""
    places = [(example, row, position) for example in examples for row, position in _starts(example, student)]
    reference = _Reference(model, device, teacher, student)
    for example, row, position in (places[i] for i in np.random.default_rng(0).permutation(len(places))[:count].tolist()):
        tokens = student.render(example.record)
        prefix = example.tokens.ids[: int(example.targets.position[row]) + 1]
        yield Asked(example, tokens, position, reference.at(prefix, _left(example, tokens, position)))


def compared(asked: Asked, target: SparseTarget, row: int) -> tuple[float, float, bool]:
    """Total variation and KL(teacher || target) over the target's tokens and one outcome for the others, and whether the strongest are one."""
    ids, probs = target.ids[row].numpy(), target.probs[row].double().numpy()
    there, first = np.unique(ids[probs > 0], return_index=True)
    q = np.append(probs[probs > 0][first], float(target.rest[row]))
    r = np.append(asked.q[there], max(1 - asked.q[there].sum(), 0.0))
    u = np.append(np.full(len(there), 1 / len(asked.q)), 1 - len(there) / len(asked.q))
    q = (1 - UNIFORM) * q / q.sum() + UNIFORM * u
    kl = float((r[r > 0] * np.log(r[r > 0] / q[r > 0])).sum())
    return 0.5 * float(np.abs(r - q).sum()), kl, bool(there[q[:-1].argmax()] == asked.q.argmax())


class _Reference:
    """Each likely token of the teacher is expanded with the teacher itself, and the student's tokens are read off by its own tokenizer.

    What that cannot read as beginning there is left out.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, teacher: Vocabulary, student: RecordTokenizer) -> None:
        self._model, self._device, self._teacher, self._student = model, device, teacher, student.vocabulary
        self._first = FirstTokens(student.vocabulary, student.encode)
        self._plain = np.array([bool(token) for token in teacher.token_bytes])

    def at(self, prefix: np.ndarray, left: bytes) -> np.ndarray:
        """float64 [V_student]; sums to 1. left: the bytes before, as far as they could matter."""
        after, memory = self._after(prefix[None])
        p = after[0]
        q = np.zeros(len(self._student))
        expanded = [id for id in np.argsort(-p, kind="stable")[:MOST].tolist() if p[id] >= ENOUGH and self._plain[id]]
        further = self._after(np.array(expanded)[:, None], memory)[0] if expanded else np.zeros((0, len(p)))
        for id, next_p in zip(expanded, further, strict=True):
            nexts = np.argsort(-next_p, kind="stable")[:NEXT]
            share = next_p[nexts] / next_p[nexts].sum()
            token = self._teacher.token_bytes[id]
            alone = self._first.of([(left, token)])[0]
            answers = self._first.of([(left, token + self._teacher.token_bytes[next]) for next in nexts.tolist()])
            answers = np.where(self._plain[nexts], answers, alone)
            np.add.at(q, answers[answers != NONE] >> 1, (p[id] * share)[answers != NONE])
        others = np.setdiff1d(np.flatnonzero(p > 1e-7), expanded)
        plain = others[self._plain[others]]
        answers = self._first.of([(left, self._teacher.token_bytes[id]) for id in plain.tolist()])
        np.add.at(q, answers[answers != NONE] >> 1, p[plain][answers != NONE])
        if self._student.end_ids:
            q[self._student.end_ids[0]] += p[list(self._teacher.end_ids)].sum()
        return q / q.sum()

    @torch.inference_mode()
    def _after(self, tokens: np.ndarray, memory: DynamicCache | None = None) -> tuple[np.ndarray, DynamicCache]:
        """float64 [n, V_teacher]: what the teacher says after these tokens [n, T], that follow what one row of `memory` is of."""
        if memory is not None:
            memory.batch_repeat_interleave(len(tokens))
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self._device)
        out = self._model(input_ids=ids, past_key_values=memory or DynamicCache(config=self._model.config), use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1, : len(self._teacher)]
        return logits.float().softmax(-1).double().cpu().numpy(), out.past_key_values


def _starts(example: Example, student: RecordTokenizer) -> list[tuple[int, int]]:
    """Where both begin a token that the cache describes: the row of its targets and the student's position."""
    meeting = meet(example.record.content, example.tokens, example.targets, student.render(example.record))
    return list(zip(meeting.row.tolist(), meeting.at_student.tolist(), strict=True))


def _left(example: Example, tokens: Tokens, position: int) -> bytes:
    """All of the answer before the position, with the template's bytes that its first token begins with."""
    begin = position + 1
    while begin > 0 and tokens.kind[begin - 1] == ANSWER:
        begin -= 1
    text = example.record.content[tokens.start[begin] : tokens.start[position + 1]]
    return number_as_lead(int(tokens.lead[begin])) + text if text else b""
