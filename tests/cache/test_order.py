"""Which records a step takes: every pass each once, or as the curriculum says, and the same wherever one goes on."""

from collections import Counter
from itertools import count, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.order import BUCKETS, Order
from pipeline.cache.reader import Place
from pipeline.config import Curriculum
from pipeline.errors import InputError
from pipeline.training.schedules import value_at

GROUPS = {0: [7, 5], 1: [9], 2: [4, 4, 4]}
PLACES = [(shard, group, row) for shard, groups in GROUPS.items() for group, rows in enumerate(groups) for row in range(rows)]
NAMES = {place: ("eye", "heart", "")[place[2] % 3] for place in PLACES}


class Fake:
    """Of 33 records, the later ones the easier."""

    def order(self, split: str, seed: int, epoch: int) -> list[Place]:
        return sorted(PLACES, key=lambda place: hash((seed, epoch, place)))

    def column(self, split: str, name: str) -> dict[Place, str]:
        return NAMES

    def difficulty(self, split: str, by: str) -> dict[Place, float]:
        return {place: float(-n) for n, place in enumerate(PLACES)}


def order(batch: int = 4, aside: tuple[Place, ...] = (), **curriculum) -> Order:
    return Order(Fake(), 0, batch, set(aside), Curriculum.model_validate(curriculum) if curriculum else None)


WAYS = [
    {},
    {"by": "entropy", "order": "ascending"},
    {"by": "cross_entropy", "order": "descending"},
    {"by": "specialty", "order": "ascending"},
    {"by": "specialty", "epochs": [["eye"], ["heart", "eye"], ["all"]]},
    {"by": "entropy", "share": {"from": 0.2, "to": 1.0}},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@settings(deadline=None, max_examples=15)
@given(batch=st.integers(1, 70), entered=st.integers(0, 29), again=st.integers(0, 29))
def test_a_step_takes_the_same_records_wherever_one_goes_on(way: dict, batch: int, entered: int, again: int):
    whole = order(batch, **way)
    straight = [whole.of_step(step, 30) for step in range(30)]
    assert all(len(places) == batch for places in straight)
    other = order(batch, **way)
    assert [other.of_step(step, 30) for step in range(entered, 30)] == straight[entered:]
    assert other.of_step(again, 30) == straight[again]


@pytest.mark.parametrize("way", WAYS[:4], ids=str)
def test_every_pass_has_each_record_once_but_those_put_aside(way: dict):
    aside = (PLACES[3], PLACES[20])
    found = order(1, aside, **way)
    assert found.count == len(PLACES) - 2
    for number in range(3):
        taken = [found.of_step(step, 999)[0] for step in range(number * found.count, (number + 1) * found.count)]
        assert sorted(taken) == sorted(set(PLACES) - set(aside))


def test_a_pass_goes_from_the_easy_to_the_hard_in_tenths_and_back():
    easy = {place: (len(PLACES) - 1 - n) * BUCKETS // len(PLACES) for n, place in enumerate(PLACES)}
    for way, reverse in (("ascending", False), ("descending", True)):
        taken = [easy[place] for place in order(len(PLACES), by="entropy", order=way).of_step(1, 9)]
        assert taken == sorted(taken, reverse=reverse)
    taken = [NAMES[place] for place in order(len(PLACES), by="specialty", order="ascending").of_step(0, 9)]
    assert taken == sorted(taken)


def test_specialties_come_as_their_passes_say_and_the_last_stay():
    found = order(1, by="specialty", epochs=[["eye"], ["heart", "eye"]])
    sizes = Counter(NAMES.values())
    first, second = sizes["eye"], sizes["eye"] + sizes["heart"]
    taken = [NAMES[found.of_step(step, 999)[0]] for step in range(first + 2 * second)]
    assert Counter(taken[:first]) == {"eye": first}
    assert Counter(taken[first : first + second]) == Counter(taken[first + second :]) == {"eye": sizes["eye"], "heart": sizes["heart"]}
    assert found.records_in(1) == first
    assert found.records_in(2.5) == first + second * 1.5
    assert order(1).records_in(1.5) == 1.5 * len(PLACES)


def test_only_the_easiest_share_is_taken_and_all_of_it():
    steps, batch = 400, 2
    found = order(batch, by="entropy", share={"from": 0.1, "to": 1.0})
    hardest = [max(len(PLACES) - PLACES.index(place) for place in found.of_step(step, steps)) for step in range(steps)]
    for step, rank in enumerate(hardest):
        assert rank <= max(1, -(-value_at(step, steps, 0.1, 1.0, "linear") * len(PLACES) // 1))
    seen = Counter(place for step in range(steps) for place in found.of_step(step, steps))
    assert set(seen) == set(PLACES)
    assert seen[PLACES[-1]] > 3 * seen[PLACES[0]]


def test_a_share_of_all_is_no_curriculum():
    plain, all_of_it = order(5), order(5, by="entropy", share={"from": 1.0, "to": 1.0})
    assert [plain.of_step(step, 20) for step in range(20)] == [all_of_it.of_step(step, 20) for step in range(20)]


def test_an_unknown_specialty_is_named_with_the_nearest():
    with pytest.raises(InputError, match="'hart'; did you mean 'heart'"):
        order(by="specialty", epochs=[["hart"]])


@pytest.mark.parametrize(
    "wrong",
    [
        {"by": "entropy"},
        {"by": "entropy", "order": "ascending", "share": {"from": 0.1, "to": 1.0}},
        {"by": "entropy", "epochs": [["eye"]]},
        {"by": "specialty", "share": {"from": 0.1, "to": 1.0}},
        {"by": "entropy", "share": {"from": 0.1, "to": 1.5}},
        {"by": "entropy", "share": {"from": 0.1, "to": 0.0}},
        {"by": "specialty", "epochs": []},
    ],
    ids=str,
)
def test_a_curriculum_that_says_nothing_or_two_things_is_refused(wrong: dict):
    with pytest.raises(ValueError, match=r"give one of|epochs name|take order|share goes|at least 1"):
        Curriculum.model_validate(wrong)


def test_control_an_order_that_forgets_its_seed_is_caught():
    """hash() of ints and tuples of them is the same in every process."""
    orders = [Order(Fake(), seed, 33, set()).of_step(0, 9) for seed in islice(count(), 3)]
    assert orders[0] != orders[1] != orders[2]
