"""How likely a model finds answers: the teacher out of its cache, a student by its forward pass."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.benchmarks._scores import BINS, DECILES, OCTAVES, TOP, Compared, Score
from pipeline.cache.projected import StudentView
from pipeline.cache.reader import Example
from pipeline.errors import NumericsError
from pipeline.lookup import find
from pipeline.models.heads import RowLogits
from pipeline.signals.projection import Projected, SparseTarget
from pipeline.signals.records import Record, Tokens
from pipeline.training.batches import make_batch


class CachedTeacher:
    """The teacher, without loading it. examples: read with their `entropy`."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = {_key(example.record): example for example in examples}
        self._edges = entropy_edges(examples)

    def scores(self, records: Sequence[Record]) -> list[Score] | None:
        found = [self._examples.get(_key(record)) for record in records]
        return [_cached(example, self._edges) for example in found if example] if all(found) else None


def entropy_edges(examples: Sequence[Example]) -> np.ndarray:
    """float64 [DECILES - 1]: where the deciles of the teacher's entropy meet, over the positions of the held-out answers."""
    entropies = [_entropy(example)[_answer(example)] for example in examples if not example.record.choice_of]
    return np.quantile(np.concatenate([*entropies, np.zeros(int(not entropies))]).astype(np.float64), np.arange(1, DECILES) / DECILES)


def _key(record: Record) -> tuple[str, str]:
    """By id and content: another file's record may have the same id, and where the text is left out only ids tell records apart."""
    return record.id, record.digest()


def _answer(example: Example) -> np.ndarray:
    """bool [P]: the positions that are of the answer."""
    return np.isin(example.targets.position, example.tokens.answer_positions())


def _entropy(example: Example) -> np.ndarray:
    assert example.targets.entropy is not None, "read with extras=('entropy',)"
    return example.targets.entropy


def _cached(example: Example, edges: np.ndarray) -> Score:
    """Against itself: no divergence, full agreement, at all its positions."""
    answer, targets = _answer(example), example.targets
    logprobs = targets.realised_logprob[answer].tolist()
    count = len(logprobs)
    probability, followed = np.zeros(count), np.zeros(count, dtype=bool)
    certainty = None
    if targets.counts is None:  # of what was drawn the most likely token may not be there
        probability, followed = _strongest(example, answer)
        certainty = _certainty(probability, followed, np.zeros(count, dtype=np.int64), 1)[0]
    figures = np.stack([np.ones(count), np.zeros(count), np.zeros(count), np.ones(count), np.ones(count)], 1)
    compared = _compared(figures, _entropy(example)[answer], np.arange(count), probability, probability, np.zeros(count, dtype=np.int64), 1, edges)[0]
    return Score(sum(logprobs), count, example.tokens.answer_bytes(), compared, certainty)


def _strongest(example: Example, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each position of the answer the probability of the most likely token, and whether that token follows."""
    targets = example.targets
    begin = np.cumsum(targets.kept, dtype=np.int64) - targets.kept
    highest = np.maximum.reduceat(targets.logprobs, begin) if len(begin) else np.zeros(0)
    follows = example.tokens.ids[targets.position + 1]
    is_highest = (targets.ids == np.repeat(follows, targets.kept)) & (targets.logprobs == np.repeat(highest, targets.kept))
    followed = np.add.reduceat(is_highest, begin, dtype=np.int64) > 0 if len(begin) else np.zeros(0, dtype=bool)
    return np.exp(highest[answer].astype(np.float64)), followed[answer]


def _certainty(probability: np.ndarray, followed: np.ndarray, owner: np.ndarray, records: int) -> np.ndarray:
    """float64 [records, BINS, 4], see Score."""
    place = owner * BINS + np.clip((probability * BINS).astype(np.int64), 0, BINS - 1)
    return _sums(np.stack([np.ones(len(place)), probability, followed, (probability - followed) ** 2], 1), place, records * BINS).reshape(records, BINS, 4)


def _compared(figures: np.ndarray, entropy: np.ndarray, position: np.ndarray, x: np.ndarray, y: np.ndarray, owner: np.ndarray, records: int, edges: np.ndarray) -> list[Compared]:
    """One for each record. figures: float64 [M, 5], see Compared; entropy: the teacher's; position: in the answer; x, y: what both are certain of."""
    decile = np.searchsorted(edges, entropy, side="right")
    octave = np.minimum(np.log2(position + 1).astype(np.int64), OCTAVES - 1)
    by_entropy = _sums(figures, owner * DECILES + decile, records * DECILES).reshape(records, DECILES, 5)
    by_position = _sums(figures, owner * OCTAVES + octave, records * OCTAVES).reshape(records, OCTAVES, 5)
    certainty = _sums(np.stack([x, y, x * x, y * y, x * y], 1), owner, records)
    return [Compared(*parts) for parts in zip(by_entropy, by_position, certainty, strict=True)]


def _sums(values: np.ndarray, place: np.ndarray, places: int) -> np.ndarray:
    """float64 [places, F]: of the rows [M, F] that belong to each."""
    return np.stack([np.bincount(place, weights=column.astype(np.float64), minlength=places) for column in values.T], 1)


class StudentScorer:
    """A student. What the cache knows of a record is compared with; other records are only scored. examples: read with their `entropy`."""

    def __init__(self, module: RowLogits, render: Callable[[Record], Tokens], view: StudentView, examples: Sequence[Example], batch_records: int) -> None:
        self._module, self._render, self._view, self._batch = module, render, view, batch_records
        self._examples = {_key(example.record): example for example in examples}
        self._edges = entropy_edges(examples)
        # a handful of draws is an unbiased target to train on, but the divergence from it is not the teacher's
        self._comparable = view.cache.about["method"] != "sampled" and view.fitted.form != "ranks"
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
        words = [self._view.projected(example, own, inside=False) if example and self._comparable and not example.record.choice_of else None for example, own in zip(examples, tokens, strict=True)]
        device = next(self._module.parameters()).device
        batch = make_batch(tokens, words, [1.0] * len(records), self._view.cache.temperatures, 1.0).to(device)
        with torch.inference_mode():
            started = time.monotonic()
            logits = self._module(batch.ids, batch.rows).float()
            logprob = -find("losses", "cross_entropy")(logits, batch.realised).double().cpu()
            highest, likeliest = logits.max(-1)
            probability = (highest - logits.logsumexp(-1)).double().exp().cpu().numpy()
            followed = (likeliest == batch.realised).cpu().numpy()
            self.seconds += time.monotonic() - started
            self.tokens += batch.tokens
            if not torch.isfinite(logprob).all():
                wrong = records[int(batch.record[(~torch.isfinite(logprob)).nonzero()[0, 0]])]
                raise NumericsError(f"The student's log-probabilities on record {wrong.id} are not finite. Train it with a lower learning rate.")
            figures = None if batch.teacher is None else _beside(logits[batch.known], batch.teacher)
        owner = batch.record.cpu().numpy()
        sums = np.bincount(owner, weights=logprob.numpy(), minlength=len(records))
        certainty = _certainty(probability, followed, owner, len(records))
        compared: Sequence[Compared | None] = [None] * len(records)
        if figures is not None and batch.teacher is not None:
            known = batch.known.cpu().numpy()
            place = known - np.searchsorted(owner, owner[known])
            x = batch.teacher.probs.max(-1).values.double().cpu().numpy()
            compared = _compared(figures, _entropies(examples, words), place, x, probability[known], owner[known], len(records), self._edges)
        for i, (record, own) in enumerate(zip(records, tokens, strict=True)):
            self._known[_key(record)] = Score(float(sums[i]), len(own.answer_positions()), own.answer_bytes(), compared[i] if words[i] else None, certainty[i])


def _beside(logits: Tensor, teacher: SparseTarget) -> np.ndarray:
    """float64 [M, 5], see Compared. logits: [M, V]."""
    strongest = teacher.probs.topk(min(TOP, teacher.probs.shape[-1]))
    ids, there = teacher.ids.gather(-1, strongest.indices), strongest.values > 0
    own = logits.topk(min(TOP, logits.shape[-1])).indices
    among = ((ids[:, :, None] == own[:, None, :]).any(-1) & there).sum(-1) / there.sum(-1).clamp(min=1)
    agrees = own[:, 0] == teacher.top()
    figures = [torch.ones_like(among), find("losses", "forward_kl")(logits, teacher), find("losses", "total_variation")(logits, teacher), agrees, among]
    return torch.stack([figure.double() for figure in figures], 1).cpu().numpy()


def _entropies(examples: Sequence[Example | None], words: Sequence[Projected | None]) -> np.ndarray:
    """float [M]: the teacher's, at the positions that it speaks of."""
    return np.concatenate([_entropy(example)[word.row] for example, word in zip(examples, words, strict=True) if example and word is not None])
