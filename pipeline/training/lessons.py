"""Examples of caches to batches: in the student's tokens, with the words of all teachers."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from pipeline.cache.projected import StudentView
from pipeline.cache.reader import Example, Place
from pipeline.config import Machine, TeacherShare
from pipeline.signals.attention import Cells, Matched, cells_of, matched
from pipeline.signals.chunks import chunked
from pipeline.signals.projection import Projected
from pipeline.signals.records import Tokens
from pipeline.training.batches import Batch, Said, make_batch, micro_batches


class Another:
    """A further teacher: what its cache says of the same records."""

    def __init__(self, share: TeacherShare, view: StudentView) -> None:
        self._share, self.view = share, view
        self._places: dict[str, list[Place]] = {}
        for place, id in view.cache.column("train", "id").items():
            self._places.setdefault(id, []).append(place)

    def said(self, records: list[tuple[Tokens, Example]]) -> Said:
        """records: the student's tokens of each, and the example of the first teacher."""
        words = [self._word(example, tokens) for tokens, example in records]
        return Said(words, [self._share.of(example.record.specialty) for _, example in records], self.view.cache.temperatures)

    def _word(self, example: Example, tokens: Tokens) -> Projected | None:
        """None if it was not asked about this record: the same id with another text is another record."""
        for place in self._places.get(example.record.id, []):
            theirs = self.view.cache.example(place)
            if theirs.record.digest() == example.record.digest():
                return self.view.projected(theirs, tokens)
        return None


@dataclass
class Lessons:
    """What is asked for of each record."""

    view: StudentView
    """Of the first teacher's cache."""
    others: list[Another]
    own_teacher: TeacherShare
    compares: bool
    """Whether a loss compares tokens with a teacher's."""
    with_chunks: bool
    pairs: list[tuple[int, int]]
    """A teacher's and a student's layer, whose attention is compared,"""
    groups: int
    """with the heads in so many groups."""
    specialties: dict[str, int]
    """Their numbers."""
    specialty_of: dict[Place, str]
    begins_anew: torch.Tensor
    keeps_words: bool
    """Whether targets are made again, each row at a temperature of its own."""
    rows_at_once: int
    machine: Machine

    def batches(self, examples: Iterable[Example], temperature: float) -> list[Batch]:
        """Micro-batches, records of like length together."""
        rendered = sorted(((self.view.tokens(example), example) for example in examples), key=lambda pair: len(pair[0]))
        batches = []
        for those in micro_batches([len(tokens) for tokens, _ in rendered], self.machine.student_micro_batch_records, self.machine.student_micro_batch_tokens, self.machine.packing):
            micro = rendered[those]
            words = [self.view.projected(example, tokens) if self.compares else None for tokens, example in micro]
            chunks = [chunked(example.tokens, example.targets, tokens) for tokens, example in micro] if self.with_chunks else None
            cells = [cells_of(example.tokens, tokens) for tokens, example in micro] if self.pairs else []
            attention = [[_looked(example, tokens, layer, self.groups, cell) for (tokens, example), cell in zip(micro, cells, strict=True)] for layer, _ in self.pairs] if self.pairs else None
            weights = [example.record.weight for _, example in micro]
            of_specialty = [self.specialties[self.specialty_of[example.place]] for _, example in micro]
            more = [other.said(micro) for other in self.others]
            own_share = [self.own_teacher.of(example.record.specialty) for _, example in micro]
            batches.append(
                make_batch(
                    [tokens for tokens, _ in micro],
                    words,
                    weights,
                    self.view.cache.temperatures,
                    1.0 if self.keeps_words else temperature,
                    chunks=chunks,
                    begins_anew=self.begins_anew,
                    attention=attention,
                    groups=self.groups,
                    rows_at_once=self.rows_at_once,
                    specialties=of_specialty,
                    keep_words=self.keeps_words,
                    packed=self.machine.packing,
                    others=more,
                    own_share=own_share,
                )
            )
        return batches


def _looked(example: Example, tokens: Tokens, layer: int, groups: int, cells: Cells) -> Matched:
    """The teacher's rows of a record in the student's tokens."""
    assert example.targets.attention is not None
    return matched(example.targets.attention[layer], example.targets.position, example.tokens, tokens, groups, cells)
