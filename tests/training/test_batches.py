import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.lookup import find
from pipeline.signals.counts import counted
from pipeline.signals.projection import Projected, States, meet, projected
from pipeline.signals.records import END, Tokens
from pipeline.signals.targets import with_realised
from pipeline.training.batches import Batch, made_ahead, make_batch
from tests.signals.dense import asked, student, targets_of, teacher
from tests.tiny import questions

STORED = [1.0, 2.0, 8.0]
RECORDS = [
    *(asked(row["question"], row["answer"]) for row in list(questions(48))[::16]),
    asked("Nothing?", ""),
    asked("What is 🙂?", "🙂 sign 123 of 100.", context="A context."),
]


def examples() -> tuple[list[Tokens], list[Projected]]:
    size = len(teacher().vocabulary)
    method = find("projections", "contextual")(teacher().vocabulary, student().vocabulary, student().encode, counted([], size))
    rendered, words = [], []
    for seed, record in enumerate(RECORDS):
        a, b = teacher().render(record), student().render(record)
        logits = np.random.default_rng(seed).normal(0, 2, (len(a) - 1, len(teacher().vocabulary)))
        targets = with_realised(targets_of(logits, a, np.arange(len(a) - 1, dtype=np.int32), 16, STORED), a.ids[1:], STORED)
        rendered.append(b)
        words.append(projected(targets, method.shares(meet(record.content, a, targets, b)), size))
    return rendered, words


def check(batch: Batch, records: list[Tokens]) -> None:
    """The rows are the answers' positions, and what follows them is what is realised there."""
    flat = batch.ids.flatten()
    expected = []
    for b, tokens in enumerate(records):
        assert batch.ids[b, : len(tokens)].tolist() == tokens.ids.tolist()
        expected += [(b, t) for t in range(len(tokens) - 1) if tokens.kind[t + 1] >= 2]
    assert [divmod(row, batch.ids.shape[1]) for row in batch.rows.tolist()] == expected
    assert batch.realised.tolist() == [int(flat[row + 1]) for row in batch.rows.tolist()]
    assert batch.record.tolist() == [b for b, _ in expected]


def test_rows_are_the_answers_positions_and_realised_is_what_follows():
    records, words = examples()
    batch = make_batch(records, words, [1.0] * len(records), STORED, 1.0)
    check(batch, records)
    assert batch.tokens == sum(len(tokens) for tokens in records)
    assert batch.ids.shape[1] >= max(len(tokens) for tokens in records)
    ends = batch.realised == student().vocabulary.end_ids[0]
    assert ends.sum() == len(records)


def test_control_rows_and_realised_shifted_by_one_are_caught():
    records, words = examples()
    batch = make_batch(records, words, [1.0] * len(records), STORED, 1.0)
    check(batch, records)
    for broken in (replace(batch, rows=batch.rows + 1), replace(batch, realised=batch.ids.flatten()[batch.rows]), replace(batch, rows=batch.rows - 1)):
        with pytest.raises(AssertionError):
            check(broken, records)


def test_the_targets_belong_to_the_rows_that_are_known():
    """At a known row the realised token is among the target's ids, as `project` puts it there; shifted it is not."""
    records, words = examples()
    batch = make_batch(records, words, [1.0] * len(records), STORED, 1.0)
    assert batch.teacher is not None
    assert len(batch.known) == len(batch.teacher.rest) == sum(len(word.position) for word in words)
    for n, row in enumerate(batch.known.tolist()):
        position = int(batch.rows[row]) % batch.ids.shape[1]
        assert position in words[int(batch.record[row])].position
        alone = make_batch([records[int(batch.record[row])]], [words[int(batch.record[row])]], [1.0], STORED, 1.0)
        index = words[int(batch.record[row])].position.tolist().index(position)
        assert alone.teacher.rest[index] == pytest.approx(float(batch.teacher.rest[n]), abs=1e-7)
        assert alone.teacher.top()[index] == batch.teacher.top()[n]

    def hits(known: torch.Tensor) -> float:
        return float((batch.teacher.ids == batch.realised[known][:, None]).any(-1).float().mean())

    assert hits(batch.known) > 0.85
    assert hits((batch.known + 1).clamp(max=len(batch.rows) - 1)) < 0.5


def test_records_without_a_teachers_word_have_no_known_rows():
    records, words = examples()
    some = make_batch(records, [words[0], None, words[2], None, None], [1.0] * 5, STORED, 1.0)
    assert set(some.record[some.known].tolist()) == {0, 2}
    none = make_batch(records, [None] * 5, [1.0] * 5, STORED, 1.0)
    assert none.teacher is None
    assert len(none.known) == 0
    check(none, records)


def test_every_row_has_its_records_weight():
    records, words = examples()
    weights = [0.5, 2.0, 1.0, 3.0, 0.0]
    batch = make_batch(records, words, weights, STORED, 1.0)
    assert batch.weights.tolist() == [weights[record] for record in batch.record.tolist()]


def test_the_teachers_states_and_kept_tokens_stay_with_their_rows():
    records, words = examples()
    rng = np.random.default_rng(0)
    with_states = []
    for word in words:
        count = len(word.position)
        kept = rng.integers(0, 4, count)
        with_states.append(replace(word, states=States(rng.integers(-9, 9, (count, 3)).astype(np.int8), rng.random(count).astype(np.float32), kept, rng.integers(0, 50, kept.sum()).astype(np.int32))))
    states = make_batch(records, with_states, [1.0] * len(records), STORED, 1.0).states
    assert states is not None
    at = 0
    for word in with_states:
        ends = np.cumsum(word.states.kept)
        for i in range(len(word.position)):
            assert states.hidden[at].tolist() == word.states.hidden[i].tolist()
            assert float(states.scale[at]) == float(word.states.scale[i])
            assert states.id[states.row == at].tolist() == word.states.ids[ends[i] - word.states.kept[i] : ends[i]].tolist()
            at += 1
    assert at == len(states.hidden)
    assert make_batch(records, words, [1.0] * len(records), STORED, 1.0).states is None


def test_an_empty_answer_has_one_row_which_is_its_end():
    tokens = student().render(asked("Nothing?", ""))
    batch = make_batch([tokens], [None], [1.0], STORED, 1.0)
    assert batch.realised.tolist() == tokens.ids[tokens.kind == END].tolist()


# --- made ahead ---


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_is_made_ahead_comes_in_order(workers: int):
    def slowest_first(item: int) -> int:
        time.sleep(0.004 * (5 - item % 5))
        return item * item

    assert list(made_ahead(slowest_first, range(20), workers)) == [n * n for n in range(20)]
    assert list(made_ahead(slowest_first, [], workers)) == []


def test_control_results_as_they_are_finished_come_in_another_order():
    with ThreadPoolExecutor(3) as pool:
        done = [future.result() for future in as_completed([pool.submit(lambda n: time.sleep(0.01 * (3 - n)) or n, n) for n in range(3)])]
    assert done != [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_exception_comes_where_its_item_would_have(workers: int):
    def fails_at_3(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    made = made_ahead(fails_at_3, range(10), workers)
    assert [next(made), next(made), next(made)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(made)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_no_more_is_made_ahead_than_there_are_workers(workers: int):
    begun, lock = [], threading.Lock()

    def counted(item: int) -> int:
        with lock:
            begun.append(item)
        return item

    for item in made_ahead(counted, range(30), workers):
        time.sleep(0.001)
        assert max(begun) <= item + workers


def test_what_is_no_longer_wanted_is_not_made():
    begun: list[int] = []
    made = made_ahead(lambda item: begun.append(item) or time.sleep(0.01), range(1000), 2)
    next(made)
    made.close()
    assert len(begun) < 10
