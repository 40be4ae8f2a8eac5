"""Which training examples an optimizer step takes, as a function of the step: nothing to save, nothing to restore."""

import math
from collections.abc import Callable, Iterator, Set
from threading import Lock

from pipeline.cache.reader import Cache, Place
from pipeline.config import Curriculum
from pipeline.errors import InputError
from pipeline.lookup import nearest
from pipeline.training.schedules import value_at

BUCKETS = 10
"""Records are ordered by difficulty in so many equal parts, each in the cache's own order: a finer one would read every row group for every record."""
REMEMBERED = 64
"""Steps."""


class Order:
    """Pass after pass over the training records in a seeded order, batches running across their ends; a curriculum orders or chooses.

    A curriculum's `share` makes a step depend on those before it: they are counted through, which takes a second for a million
    records.
    """

    def __init__(self, cache: Cache, seed: int, batch_records: int, aside: Set[Place], curriculum: Curriculum | None = None) -> None:
        """aside: records that no step takes."""
        self._cache, self._seed, self._size = cache, seed, batch_records
        self._places = [place for place in cache.order("train", seed, 0) if place not in aside]
        self._there = set(self._places)
        self.count = len(self._places)
        self._curriculum = curriculum
        self._level = self._levels(curriculum) if curriculum else {}
        self._lengths = [sum(map(self._chosen(number), self._places)) for number in range(len(curriculum.epochs))] if curriculum and curriculum.epochs else [self.count]
        self._passes: dict[int, list[Place]] = {}
        self._steps: dict[int, list[Place]] = {}
        self._walk: Iterator[list[Place]] | None = None
        self._next = 0
        self._lock = Lock()

    def records_in(self, epochs: float) -> float:
        """How many records so many passes have."""
        whole = math.floor(epochs)
        return sum(self._length(n) for n in range(whole)) + (epochs - whole) * self._length(whole)

    def of_step(self, step: int, steps: int) -> list[Place]:
        """The records of a step of so many."""
        with self._lock:
            if self._curriculum and self._curriculum.share:
                return self._counted_through(step, steps)
            begin, number = step * self._size, 0
            if self._curriculum and self._curriculum.epochs:
                while begin >= self._length(number):
                    begin -= self._length(number)
                    number += 1
            else:
                number, begin = divmod(begin, self.count)
            taken: list[Place] = []
            while len(taken) < self._size:
                taken += self._pass(number)[begin : begin + self._size - len(taken)]
                number, begin = number + 1, 0
            return taken

    def _length(self, number: int) -> int:
        return self._lengths[min(number, len(self._lengths) - 1)]

    def _pass(self, number: int) -> list[Place]:
        if number not in self._passes:
            self._passes = {n: places for n, places in self._passes.items() if n >= number - 1}
            places = [place for place in self._cache.order("train", self._seed, number) if place in self._there]
            if self._curriculum and self._curriculum.order:
                places.sort(key=self._level.__getitem__, reverse=self._curriculum.order == "descending")
            self._passes[number] = [place for place in places if self._chosen(number)(place)]
        return self._passes[number]

    def _chosen(self, number: int) -> Callable[[Place], bool]:
        """Whether a record is in a pass."""
        if self._curriculum is None or self._curriculum.epochs is None:
            return lambda place: True
        names = self._curriculum.epochs[min(number, len(self._curriculum.epochs) - 1)]
        return lambda place: "all" in names or self._specialty[place] in names

    def _counted_through(self, step: int, steps: int) -> list[Place]:
        if self._walk is None or (step < self._next and step not in self._steps):
            self._walk, self._next, self._steps = self._sampled(steps), 0, {}
        while self._next <= step:
            self._steps[self._next] = next(self._walk)
            self._steps.pop(self._next - REMEMBERED, None)
            self._next += 1
        return self._steps[step]

    def _sampled(self, steps: int) -> Iterator[list[Place]]:
        """Through the passes, taking at each step only the easiest share of the records."""
        assert self._curriculum is not None
        assert self._curriculum.share is not None
        pace, easiest = self._curriculum.share, {place: rank for rank, place in enumerate(sorted(self._places, key=lambda place: (self._level[place], place)))}
        number = inside = 0
        for step in range(steps):
            share = min(value_at(step, steps, pace.start, pace.end, pace.schedule), 1.0)
            limit = max(1, math.ceil(share * self.count))
            taken: list[Place] = []
            while len(taken) < self._size:
                places = self._pass(number)
                if inside == len(places):
                    number, inside = number + 1, 0
                    continue
                if easiest[places[inside]] < limit:
                    taken.append(places[inside])
                inside += 1
            yield taken

    def _levels(self, curriculum: Curriculum) -> dict[Place, float]:
        """What records are ordered or chosen by: their bucket, their rank or their specialty's."""
        if curriculum.by == "specialty":
            self._specialty = self._cache.column("train", "specialty")
            there = sorted({self._specialty[place] for place in self._places})
            named = [name for names in curriculum.epochs or [] for name in names if name != "all"]
            if unknown := [name for name in named if name not in there]:
                raise InputError(f"training.curriculum: no training record of the cache has the specialty '{unknown[0]}'; {nearest(unknown[0], [name for name in there if name])}")
            return {place: float(there.index(self._specialty[place])) for place in self._places}
        difficulty = self._cache.difficulty("train", curriculum.by)
        ascending = sorted(self._places, key=lambda place: (difficulty[place], place))
        buckets = BUCKETS if curriculum.order else self.count
        return {place: float(rank * buckets // self.count) for rank, place in enumerate(ascending)}
