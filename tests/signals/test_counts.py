import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.signals.counts import Counts, Matrix, counted, pairs_of
from pipeline.signals.projection import REST
from pipeline.signals.records import ANSWER, Tokens, lead_as_number
from tests.projections.made import RECORDS
from tests.signals.dense import asked, student, teacher, tokens_of

PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(1, 12)), max_size=30)


def counts_of(pairs: list[tuple[int, int, int]], size: int = 5) -> Counts:
    teacher_id, student_id, count = np.array(pairs, dtype=np.int64).reshape(-1, 3).T
    return Counts.of_pairs(teacher_id.astype(np.int32), student_id.astype(np.int32), count, size)


def times(pairs: list[tuple[int, int, int]], t: int, s: int) -> int:
    return sum(count for one, other, count in pairs if (one, other) == (t, s))


def shares_of(matrix: Matrix) -> list[dict[int, float]]:
    """Per teacher token: student token or REST -> share."""
    ends = zip(matrix.begin[:-1].tolist(), matrix.begin[1:].tolist(), strict=True)
    return [dict(zip(matrix.student_id[a:b].tolist(), np.exp(matrix.log_share[a:b].astype(np.float64)).tolist(), strict=True)) for a, b in ends]


def share(pairs: list[tuple[int, int, int]], t: int, first: int, least_count: int, least_share: float) -> dict[int, float]:
    """As the docstring of `matrix` says it."""
    total = sum(count for one, _, count in pairs if one == t)
    if first == REST and total < least_count:
        return {REST: 1.0}
    if total < least_count:
        return {first: 1.0}
    smoothed = {s: times(pairs, t, s) + (s == first) for s in range(7)}
    large = {s: n / sum(smoothed.values()) for s, n in smoothed.items() if n and n / sum(smoothed.values()) >= least_share}
    left = 1 - sum(large.values())
    return large | ({REST: left} if left > 1e-9 else {})


@settings(deadline=None, max_examples=200)
@given(pairs=PAIRS, first=st.lists(st.integers(REST, 6), min_size=5, max_size=5), least_count=st.integers(1, 20), least_share=st.sampled_from([0.0, 0.001, 0.1, 0.3, 0.6]))
def test_shares_are_those_of_a_plain_loop_and_sum_to_one(pairs, first, least_count, least_share):
    matrix = counts_of(pairs).matrix(np.array(first, dtype=np.int32), least_count, least_share)
    found = shares_of(matrix)
    for t in range(5):
        assert found[t] == pytest.approx(share(pairs, t, first[t], least_count, least_share), abs=1e-6)
        assert sum(found[t].values()) == pytest.approx(1, abs=1e-6)
    assert np.isfinite(matrix.log_share).all()
    assert matrix.student_id.dtype == np.int32


@pytest.mark.parametrize("wrong", [{"least_count": 9}, {"least_share": 0.2}, {"first": 3}])
def test_control_a_loop_that_differs_in_one_thing_does_not_agree(wrong):
    pairs = [(1, 2, 5), (1, 3, 2), (1, 4, 1)]
    right = {"first": 2, "least_count": 5, "least_share": 0.001}
    (found,) = shares_of(counts_of(pairs).matrix(np.array([REST, 2, REST, REST, REST], dtype=np.int32), 5, 0.001))[1:2]
    assert found == pytest.approx(share(pairs, 1, **right))
    assert found != pytest.approx(share(pairs, 1, **right | wrong))


def test_one_event_of_the_map_is_added_to_what_was_seen():
    shares = shares_of(counts_of([(1, 2, 6), (1, 3, 3)]).matrix(np.array([0, 3, 0, 0, 0], dtype=np.int32), 5, 0.001))
    assert shares[1] == pytest.approx({2: 0.6, 3: 0.4})
    shares = shares_of(counts_of([(1, 2, 6), (1, 3, 3)]).matrix(np.array([0, 5, 0, 0, 0], dtype=np.int32), 5, 0.001))
    assert shares[1] == pytest.approx({2: 0.6, 3: 0.3, 5: 0.1})


def test_tokens_that_were_not_seen_go_whole_where_the_map_sends_them():
    matrix = counts_of([(1, 2, 4), (2, 3, 9)]).matrix(np.array([6, 5, 4, REST, 0], dtype=np.int32), 5, 0.001)
    assert [shares_of(matrix)[t] for t in (0, 1, 3, 4)] == [{6: 1.0}, {5: 1.0}, {REST: 1.0}, {0: 1.0}]


def test_small_shares_are_pruned_to_the_rest():
    shares = shares_of(counts_of([(0, 1, 90), (0, 2, 8), (0, 3, 1)]).matrix(np.array([1, 0, 0, 0, 0], dtype=np.int32), 5, 0.05))
    assert shares[0] == pytest.approx({1: 0.91, 2: 0.08, REST: 0.01})


def test_of_a_token_all_of_whose_shares_are_small_nothing_is_placed():
    shares = counts_of([(0, s, 1) for s in range(6)]).matrix(np.array([0, 0, 0, 0, 0], dtype=np.int32), 1, 0.5)
    assert shares_of(shares)[0] == pytest.approx({REST: 1.0})
    to, top = shares.largest()
    assert (to[0], top[0]) == (REST, 0)


@settings(deadline=None, max_examples=60)
@given(pairs=PAIRS, first=st.lists(st.integers(REST, 6), min_size=5, max_size=5))
def test_the_largest_share_is_that_of_a_token(pairs, first):
    matrix = counts_of(pairs).matrix(np.array(first, dtype=np.int32), 3, 0.2)
    to, top = matrix.largest()
    for t, shares in enumerate(shares_of(matrix)):
        placed = {s: share for s, share in shares.items() if s != REST}
        assert top[t] == pytest.approx(max(placed.values(), default=0), abs=1e-6)
        assert to[t] == REST if not placed else placed[int(to[t])] == pytest.approx(top[t], abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(pairs=PAIRS, asked_for=st.lists(st.integers(0, 4), max_size=12))
def test_the_shares_of_some_tokens_are_their_rows_one_after_the_other(pairs, asked_for):
    matrix = counts_of(pairs).matrix(np.array([0, 1, 2, 3, REST], dtype=np.int32), 2, 0.1)
    which, index = matrix.of(np.array(asked_for, dtype=np.int64))
    rows: list[list[int]] = [[] for _ in asked_for]
    for owner, i in zip(which.tolist(), index.tolist(), strict=True):
        rows[owner].append(i)
    assert rows == [list(range(matrix.begin[t], matrix.begin[t + 1])) for t in asked_for]


# --- counting ---


@settings(deadline=None, max_examples=100)
@given(pairs=PAIRS, seed=st.integers(0, 99))
def test_equal_pairs_are_summed_in_whatever_order_they_come(pairs, seed):
    counts = counts_of(pairs)
    mixed = counts_of([pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))])
    for name in ("begin", "student_id", "count"):
        assert (getattr(counts, name) == getattr(mixed, name)).all()
    for t in range(5):
        row = slice(counts.begin[t], counts.begin[t + 1])
        assert dict(zip(counts.student_id[row].tolist(), counts.count[row].tolist(), strict=True)) == {s: n for s in range(7) if (n := times(pairs, t, s))}
    assert counts.total.tolist() == [sum(n for one, _, n in pairs if one == t) for t in range(5)]


def test_only_pairs_that_begin_at_the_same_byte_of_an_answer_are_counted():
    """`Q`, then the answer: `123` `4` against `1` `23` `4`; not the question, not the end."""
    ours = tokens_of([1, 4, 5], 1, ids=[9, 1, 2], end=3)
    theirs = tokens_of([1, 2, 4, 5], 1, ids=[9, 4, 5, 6], end=7)
    one, other = pairs_of(ours, theirs)
    assert (one.tolist(), other.tolist()) == ([1, 2], [4, 6])
    counts = counted([(ours, theirs), (ours, theirs)], 10)
    assert counts.total.tolist() == [0, 2, 2, *[0] * 7]
    assert counts.student_id.tolist() == [4, 6]


def test_an_answers_first_tokens_are_no_pair_if_the_template_begins_only_one():
    ours, theirs = tokens_of([1, 2], 0, ids=[1, 2], lead=lead_as_number(b" ")), tokens_of([1, 2], 0, ids=[3, 4])
    assert [ids.tolist() for ids in pairs_of(ours, theirs)] == [[2], [4]]


def test_nothing_is_counted_of_nothing():
    counts = counted([], 4)
    assert counts.total.tolist() == [0] * 4
    assert shares_of(counts.matrix(np.array([1, REST, 0, 3], dtype=np.int32), 5, 0.001)) == [{1: 1.0}, {REST: 1.0}, {0: 1.0}, {3: 1.0}]
    empty = tokens_of([1], 2, ids=[1])
    assert not counted([(empty, empty)], 4).total.any()


def test_counts_of_records_are_those_of_a_plain_loop():
    records = [(teacher().render(record), student().render(record)) for record in [*RECORDS, asked("Twice?", "12 12")]]
    seen: dict[tuple[int, int], int] = {}
    for ours, theirs in records:
        for i, begin, lead in texts_of(ours):
            for j, other_begin, other_lead in texts_of(theirs):
                if (begin, lead) == (other_begin, other_lead):
                    pair = int(ours.ids[i]), int(theirs.ids[j])
                    seen[pair] = seen.get(pair, 0) + 1
    counts = counted(iter(records), len(teacher().vocabulary))
    found = {(t, int(counts.student_id[i])): int(counts.count[i]) for t in range(len(teacher().vocabulary)) for i in range(counts.begin[t], counts.begin[t + 1])}
    assert found == seen
    assert max(seen.values()) > 5


def texts_of(tokens: Tokens) -> list[tuple[int, int, int]]:
    """Of an answer's tokens but its end: index, first byte, the template's bytes before."""
    return [(i, int(tokens.start[i]), int(tokens.lead[i])) for i in range(1, len(tokens)) if tokens.kind[i] == ANSWER]


def test_a_record_of_two_answers_is_counted_in_both():
    record = RECORDS[5]
    assert [segment.role for segment in record.segments].count("assistant") == 2
    one, _ = pairs_of(teacher().render(record), student().render(record))
    first, _ = pairs_of(*(side().render(asked("What is 12?", record.segments[1].text)) for side in (teacher, student)))
    assert len(one) > len(first) > 2
