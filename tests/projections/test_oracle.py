"""A source of three letters whose every text can be listed, read by two tokenizers: the true word is known, and so is what any method misses."""

import itertools
from collections import defaultdict
from functools import cache

import numpy as np
import pytest

from pipeline.signals.counts import Counts, pairs_of
from pipeline.signals.first_tokens import NONE, FirstTokens
from pipeline.signals.projection import Projection
from tests.projections.made import TEMPERATURES, Toy, answers, build, distributions, put
from tests.signals.dense import targets_of

LENGTH = 6
BEGIN = {"a": 0.4, "b": 0.3, "c": 0.3}
NEXT = {"a": {"a": 0.5, "b": 0.3, "c": 0.2}, "b": {"a": 0.2, "b": 0.3, "c": 0.5}, "c": {"a": 0.3, "b": 0.6, "c": 0.1}}
TEXTS = ["".join(letters) for letters in itertools.product("abc", repeat=LENGTH)]
TEACHER, STUDENT = Toy("abc", [("b", "c"), ("c", "a")]), Toy("abc", [("a", "b"), ("ab", "c"), ("b", "b")])
END = 0
Ids = tuple[int, ...]


def mass(text: str) -> float:
    return BEGIN[text[0]] * float(np.prod([NEXT[one][other] for one, other in itertools.pairwise(text)]))


@cache
def read(toy: Toy) -> list[Ids]:
    """Each text as the tokenizer reads it, with its end."""
    return [(*ids, END) for ids in toy.encode(TEXTS)]


@cache
def beginnings() -> dict[Ids, float]:
    """How likely the teacher's tokens begin so."""
    found: dict[Ids, float] = defaultdict(float)
    for text, ids in zip(TEXTS, read(TEACHER), strict=True):
        for n in range(len(ids) + 1):
            found[ids[:n]] += mass(text)
    return found


@cache
def says(so_far: Ids) -> dict[int, float]:
    """The teacher's exact word after these tokens."""
    return {id: beginnings()[(*so_far, id)] / beginnings()[so_far] for id in range(len(TEACHER.vocabulary)) if (*so_far, id) in beginnings()}


def bytes_of(toy: Toy, ids: Ids) -> bytes:
    return b"".join(toy.vocabulary.token_bytes[id] for id in ids)


@cache
def truth() -> dict[tuple[Ids, Ids], dict[int, float]]:
    """(The teacher's tokens so far, the student's of the same bytes) -> the student's next token -> how likely are texts that have all three."""
    found: dict[tuple[Ids, Ids], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for text, ours, theirs in zip(TEXTS, read(TEACHER), read(STUDENT), strict=True):
        begin = {len(bytes_of(TEACHER, ours[:n])): ours[:n] for n in range(len(ours))}
        for n in range(len(theirs)):
            if (byte := len(bytes_of(STUDENT, theirs[:n]))) in begin:
                found[begin[byte], theirs[:n]][theirs[n]] += mass(text)
    return found


def distance(one: dict[int, float], other: dict[int, float]) -> float:
    """Total variation, of both made to sum to 1; NONE is no part of them."""
    sums = [sum(weights[id] for id in weights if id != NONE) for weights in (one, other)]
    return sum(abs(one.get(id, 0) / sums[0] - other.get(id, 0) / sums[1]) for id in (one.keys() | other.keys()) - {NONE}) / 2


@cache
def first_tokens() -> FirstTokens:
    return FirstTokens(STUDENT.vocabulary, STUDENT.encode)


def expanded(so_far: Ids, before: bytes) -> dict[int, float]:
    """Every branch followed until the student's first token is sure; NONE has what the student cannot read as beginning there."""
    found: dict[int, float] = defaultdict(float)

    def follow(ids: Ids, new: bytes, share: float) -> None:
        for id, p in says(ids).items():
            longer = new + TEACHER.vocabulary.token_bytes[id]
            answer = int(first_tokens().of([(before, longer)])[0]) if longer else 2 * END
            if id != END and (answer == NONE or answer & 1):
                follow((*ids, id), longer, share * p)
            else:
                found[NONE if answer == NONE else answer >> 1] += share * p

    follow(so_far, b"", 1.0)
    return found


def test_following_every_branch_and_leaving_out_what_cannot_begin_there_is_exact():
    excluded = 0.0
    for (ours, theirs), true in truth().items():
        found = expanded(ours, bytes_of(STUDENT, theirs))
        assert distance(found, true) < 1e-9
        excluded = max(excluded, found[NONE])
    assert excluded > 0.2
    assert len(truth()) > 1000


def test_control_what_cannot_begin_there_is_not_to_be_kept():
    """As the token that its bytes alone begin with."""
    worst = 0.0
    for (ours, theirs), true in truth().items():
        found = expanded(ours, bytes_of(STUDENT, theirs))
        kept = expanded(ours, b"")
        worst = max(worst, distance(kept, true)) if found[NONE] else worst
    assert worst > 0.1


def unsure(ours: Ids, before: bytes, real: Ids) -> tuple[float, float]:
    """Of the mass: what may still become another token and is not there (so it is not followed), and what surely cannot begin there."""
    growing = excluded = 0.0
    share, new = 1.0, b""
    for n, id in enumerate(real):
        answers_of = {other: int(first_tokens().of([(before, new + TEACHER.vocabulary.token_bytes[other])])[0]) for other in says(ours + real[:n]) if other != END or new}
        for other, answer in answers_of.items():
            if other == END:
                excluded += share * says(ours + real[:n])[other] * (answer == NONE)
            elif other != id and (answer == NONE or answer & 1):
                growing += share * says(ours + real[:n])[other]
        if id == END or not (answers_of[id] == NONE or answers_of[id] & 1):
            return growing, excluded
        share, new = share * says(ours + real[:n])[id], new + TEACHER.vocabulary.token_bytes[id]
    raise AssertionError("a text ends with its end")


def targets_at(method: Projection, ours: Ids, theirs: Ids, text: str) -> dict[tuple[Ids, Ids], dict[int, float]]:
    """What a method makes of the teacher's exact word at each place of a text where both begin a token."""
    record, tokens = answers(text), TEACHER.render(answers(text))
    p = np.array([[says(ours[:n]).get(id, 1e-300) for id in range(len(TEACHER.vocabulary))] for n in range(len(ours))])
    targets = targets_of(np.log(p), tokens, np.arange(len(ours), dtype=np.int32), len(TEACHER.vocabulary), TEMPERATURES)
    begin = {len(bytes_of(TEACHER, ours[:n])): ours[:n] for n in range(len(ours))}
    found = distributions(put(method, TEACHER, STUDENT, record, targets), 1.0, len(STUDENT.vocabulary))
    return {(begin[byte], theirs[:n]): dict(enumerate(q.tolist())) for n, q in found.items() if (byte := len(bytes_of(STUDENT, theirs[:n]))) in begin}


SOME = list(zip(TEXTS, read(TEACHER), read(STUDENT), strict=True))[::7]


def test_contextual_is_exact_but_for_what_could_grow_and_is_not_there():
    method, exact, off = build("contextual", TEACHER, STUDENT, depth=LENGTH), 0, 0
    for text, ours, theirs in SOME:
        for place, q in targets_at(method, ours, theirs, text).items():
            growing, excluded = unsure(place[0], bytes_of(STUDENT, place[1]), ours[len(place[0]) :])
            away = distance(q, truth()[place])
            assert away <= growing / (1 - excluded) + 1e-6
            exact += growing == 0
            off += away > 0.05
    assert exact > 50
    assert off > 50


@cache
def counts() -> Counts:
    columns = []
    for text in TEXTS:
        ours, theirs = pairs_of(TEACHER.render(answers(text)), STUDENT.render(answers(text)))
        columns += [(one, other, round(1e6 * mass(text))) for one, other in zip(ours.tolist(), theirs.tolist(), strict=True)]
    one, other, count = np.array(columns).T
    return Counts.of_pairs(one, other, count, len(TEACHER.vocabulary))


@pytest.mark.parametrize(
    ("method", "given", "away"),
    [("exact_bytes", None, 0.29), ("first_token", None, 0.21), ("count_transport", counts, 0.165), ("contextual", None, 0.085), ("contextual", counts, 0.031)],
)
def test_how_far_each_method_is_from_the_truth(method, given, away):
    fitted, total, off = build(method, TEACHER, STUDENT, given() if given else None), 0.0, 0.0
    for text, ours, theirs in SOME:
        for place, q in targets_at(fitted, ours, theirs, text).items():
            total, off = total + mass(text), off + mass(text) * distance(q, truth()[place])
    assert off / total == pytest.approx(away, abs=0.01)
