"""How likely a model finds answers: the teacher out of its cache, a student by its forward pass."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from pipeline.benchmarks._scores import BINS, Score
from pipeline.cache.projected import StudentView
from pipeline.cache.reader import Example
from pipeline.errors import NumericsError
from pipeline.lookup import find
from pipeline.models.heads import RowLogits
from pipeline.signals.records import Record, Tokens
from pipeline.training.batches import make_batch


class CachedTeacher:
    """The teacher, without loading it."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = {_key(example.record): example for example in examples}

    def scores(self, records: Sequence[Record]) -> list[Score] | None:
        found = [self._examples.get(_key(record)) for record in records]
        return [_cached(example) for example in found if example] if all(found) else None


def _key(record: Record) -> tuple[str, str]:
    """By id and content: another file's record may have the same id, and where the text is left out only ids tell records apart."""
    return record.id, record.digest()


def _cached(example: Example) -> Score:
    answer = np.isin(example.targets.position, example.tokens.answer_positions())
    logprobs = example.targets.realised_logprob[answer].tolist()
    # against itself: no divergence, full agreement, at all its positions
    return Score(sum(logprobs), len(logprobs), example.tokens.answer_bytes(), 0.0, len(logprobs), len(logprobs), _cached_certainty(example, answer))


def _cached_certainty(example: Example, answer: np.ndarray) -> np.ndarray | None:
    """None of what was drawn: the most likely token may not be there."""
    targets = example.targets
    if targets.counts is not None:
        return None
    begin = np.cumsum(targets.kept, dtype=np.int64) - targets.kept
    highest = np.maximum.reduceat(targets.logprobs, begin) if len(begin) else np.zeros(0)
    follows = example.tokens.ids[targets.position + 1]
    is_highest = (targets.ids == np.repeat(follows, targets.kept)) & (targets.logprobs == np.repeat(highest, targets.kept))
    followed = np.add.reduceat(is_highest, begin, dtype=np.int64) > 0 if len(begin) else np.zeros(0, dtype=bool)
    return _certainty(np.exp(highest[answer].astype(np.float64)), followed[answer], np.zeros(int(answer.sum()), dtype=np.int64), 1)[0]


def _certainty(probability: np.ndarray, followed: np.ndarray, owner: np.ndarray, records: int) -> np.ndarray:
    """float64 [records, BINS, 3], see Score."""
    place = owner * BINS + np.clip((probability * BINS).astype(np.int64), 0, BINS - 1)
    parts = [np.bincount(place, weights=weights, minlength=records * BINS) for weights in (np.ones(len(place)), probability, followed.astype(np.float64))]
    return np.stack(parts, 1).reshape(records, BINS, 3)


class StudentScorer:
    """A student. What the cache knows of a record is compared with; other records are only scored."""

    def __init__(self, module: RowLogits, render: Callable[[Record], Tokens], view: StudentView, examples: Sequence[Example], batch_records: int) -> None:
        self._module, self._render, self._view, self._batch = module, render, view, batch_records
        self._examples = {_key(example.record): example for example in examples}
        # a handful of draws is an unbiased target to train on, but the divergence from it is not the teacher's
        self._compared = view.cache.about["method"] != "sampled" and view.fitted.form != "ranks"
        self._known: dict[tuple[str, str], Score] = {}
        self.tokens = 0
        self.seconds = 0.0

    def scores(self, records: Sequence[Record]) -> list[Score]:
        new = [record for record in records if _key(record) not in self._known]
        rendered = {_key(record): self._tokens(record) for record in new}
        # like lengths together
        new.sort(key=lambda record: len(rendered[_key(record)]))
        for begin in range(0, len(new), self._batch):
            self._score(new[begin : begin + self._batch], rendered)
        return [self._known[_key(record)] for record in records]

    def _tokens(self, record: Record) -> Tokens:
        example = self._examples.get(_key(record))
        return self._view.tokens(example) if example else self._render(record)

    def _score(self, records: list[Record], rendered: dict[tuple[str, str], Tokens]) -> None:
        tokens = [rendered[_key(record)] for record in records]
        examples = [self._examples.get(_key(record)) for record in records]
        words = [self._view.projected(example, own, inside=False) if example and self._compared and not example.record.choice_of else None for example, own in zip(examples, tokens, strict=True)]
        device = next(self._module.parameters()).device
        batch = make_batch(tokens, words, [1.0] * len(records), self._view.cache.temperatures, 1.0).to(device)
        with torch.inference_mode():
            started = time.monotonic()
            logits = self._module(batch.ids, batch.rows).float()
            logprob = -find("losses", "cross_entropy")(logits, batch.realised).double().cpu()
            highest, likeliest = logits.max(-1)
            probability = (highest - logits.logsumexp(-1)).double().exp().cpu()
            followed = (likeliest == batch.realised).cpu()
            self.seconds += time.monotonic() - started
            self.tokens += batch.tokens
            if not torch.isfinite(logprob).all():
                wrong = records[int(batch.record[(~torch.isfinite(logprob)).nonzero()[0, 0]])]
                raise NumericsError(f"The student's log-probabilities on record {wrong.id} are not finite. Train it with a lower learning rate.")
            kl = torch.zeros_like(logprob)
            agrees = torch.zeros_like(logprob)
            aligned = torch.zeros_like(logprob)
            if batch.teacher is not None:
                known = batch.known.cpu()
                kl[known] = find("losses", "forward_kl")(logits[batch.known], batch.teacher).double().cpu()
                agrees[known] = (likeliest[batch.known] == batch.teacher.top()).double().cpu()
                aligned[known] = 1.0
        owner = batch.record.cpu()
        sums = [torch.zeros(len(records), dtype=torch.float64).index_add(0, owner, values) for values in (logprob, kl, agrees, aligned)]
        certainty = _certainty(probability.numpy(), followed.numpy(), owner.numpy(), len(records))
        for i, (record, own) in enumerate(zip(records, tokens, strict=True)):
            total, divergence, agreeing, compared = (float(values[i]) for values in sums)
            self._known[_key(record)] = Score(total, len(own.answer_positions()), own.answer_bytes(), divergence, int(agreeing), int(compared), certainty[i])
