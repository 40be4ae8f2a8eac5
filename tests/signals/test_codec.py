from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.signals.codec import (
    CODES,
    NO_REST,
    REST_STEP,
    count_table,
    decode_hidden,
    decode_ids,
    decode_logprobs,
    decode_rests,
    encode_hidden,
    encode_ids,
    encode_logprobs,
    encode_rests,
    logprob_error,
    positions_of,
    ranks,
    spans,
    step_table,
)
from tests.signals.dense import kept_of, log_softmax, log_sum

DEFAULT = (0.02, 0.5)
STEPS = [DEFAULT, (0.05, 0.5), (0.008, 0.5), (0.1, 0.1), (0.5, 0.2), (0.03, 2.0)]
KINDS = ("usual", "flat", "one hot", "ties", "two tied at the top", "faint tail", "scale 30", "holes")


def a_row(kind: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """Logits."""
    if kind == "flat":
        return np.zeros(size)
    if kind == "one hot":
        return np.where(np.arange(size) == rng.integers(size), 80.0, 0.0)
    if kind == "ties":
        return np.round(rng.normal(0, 2, size))
    if kind == "two tied at the top":
        return np.where(np.arange(size) % 5 == 1, 6.0, rng.normal(0, 2, size))
    if kind == "faint tail":
        return np.where(np.arange(size) < 2, rng.normal(0, 2, size), -69.0)  # exp(-69) is 1e-30
    if kind == "holes":
        return np.where(rng.random(size) < 0.5, rng.normal(0, 2, size), np.append(np.full(size - 1, -np.inf), 0.0))
    return rng.normal(0, 30 if kind == "scale 30" else 3, size)


@st.composite
def positions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kept log-probabilities (float32, flat), how many each position has, and the rests at temperature 1."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    logprobs, kept, rests = [], [], []
    for kind, size, most, threshold in draw(
        st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([3, 10, 64, 1000]), st.sampled_from([0, 1, 2, 3, 17, 128]), st.sampled_from([0.0, 0.002, 0.05])), max_size=6)
    ):
        row = a_row(kind, rng, size)
        ids = kept_of(row, threshold, 1, most)
        logprobs += log_softmax(row)[ids].tolist()
        kept.append(len(ids))
        rests.append(log_sum(np.delete(log_softmax(row), ids)))
    return np.array(logprobs, np.float32), np.array(kept, np.uint16), np.array(rests, np.float32)


def parts(values: np.ndarray, kept: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(kept.astype(np.int64)))[:-1]


# --- log-probabilities ---


@pytest.mark.parametrize(("narrow", "wide"), STEPS)
def test_the_code_table_falls_from_0_in_the_steps_that_are_asked_for(narrow: float, wide: float):
    table = step_table(narrow, wide)
    assert table.shape == (CODES,)
    assert table[0] == 0
    assert np.isfinite(table).all()
    assert (np.diff(table) < 0).all()
    # a step is min(wide, narrow * exp(-logprob / 2)) somewhere between its ends
    largest, smallest = (np.minimum(wide, narrow * np.exp(-end / 2)) for end in (table[1:], table[:-1]))
    assert (-np.diff(table) <= largest + 1e-9).all()
    assert (-np.diff(table) >= smallest - 1e-9).all()


def test_the_default_table_reaches_so_low_that_what_is_below_has_no_mass():
    table = step_table(*DEFAULT)
    assert -np.diff(table)[0] == pytest.approx(0.02, rel=0.01)
    assert table[-1] < -80
    assert (table > -6.4).sum() < 100


def check_codes(codes: np.ndarray, logprobs: np.ndarray, kept: np.ndarray, table: np.ndarray) -> None:
    """Each code is the nearest one, but that the first of a position's strongest tokens has its code for itself alone."""
    assert codes.dtype == np.uint8
    finite = np.maximum(logprobs.astype(np.float64), -1e4)
    distance = np.abs(table[codes] - finite)
    nearest = np.min(np.abs(table[None] - finite[:, None]), 1, initial=np.inf)
    inside = finite >= table[-1]
    assert (distance[inside] <= logprob_error(logprobs, table)[inside] + 1e-5).all()
    for code, logprob, off, best in zip(*(parts(values, kept) for values in (codes, logprobs, distance, nearest)), strict=True):
        if not len(code):
            continue
        strongest = int(np.argmax(logprob))  # the first of equal ones
        assert (np.delete(code, strongest) > code[strongest]).all()
        moved = off > best + 1e-5
        if moved.any():  # only where two would have had the same code
            assert (np.abs(code[moved].astype(int) - code[strongest]) <= 1).all()
        assert (np.diff(code[np.argsort(-logprob, kind="stable")].astype(int)) >= 0).all()


@settings(deadline=None, max_examples=300)
@given(positions=positions(), step=st.sampled_from([DEFAULT, (0.05, 0.5), (0.008, 0.5), (0.03, 2.0)]))
def test_each_log_probability_has_the_nearest_code_and_the_strongest_has_one_of_its_own(positions, step):
    logprobs, kept, _ = positions
    check_codes(encode_logprobs(logprobs, kept, step_table(*step)), logprobs, kept, step_table(*step))


@settings(deadline=None, max_examples=100)
@given(values=st.lists(st.floats(-100, 0, width=32), min_size=1, max_size=30), cuts=st.lists(st.integers(0, 30), max_size=4), step=st.sampled_from(STEPS))
def test_any_list_of_numbers_has_codes_with_the_strongest_alone_at_its_own(values, cuts, step):
    ends = np.array(sorted(min(cut, len(values)) for cut in cuts) + [len(values)])
    check_codes(encode_logprobs(np.array(values, np.float32), np.diff(ends, prepend=0), step_table(*step)), np.array(values, np.float32), np.diff(ends, prepend=0), step_table(*step))


def test_the_strongest_is_alone_at_its_code_even_at_the_last_one():
    """A step that is fine everywhere ends above what a flat distribution over many tokens has."""
    table = step_table(0.01, 0.01)
    for values in ([-9.0, -9.0, -9.0], [-9.0, -8.0, -20.0], [-9.0], [-np.inf, -np.inf]):
        codes = encode_logprobs(np.array(values, np.float32), np.array([len(values)]), table)
        assert codes.argmin() == np.argmax(values)
        assert (codes == codes.min()).sum() == 1


def test_exactly_equal_ones_are_told_apart_in_favour_of_the_first():
    table = step_table(*DEFAULT)
    codes = encode_logprobs(np.log(np.array([0.1, 0.3, 0.3, 0.3, 0.5, 0.5], np.float32)), np.array([4, 0, 2]), table)
    assert codes[1] + 1 == codes[2] == codes[3] < codes[0]
    assert codes[4] + 1 == codes[5]


def test_control_codes_that_are_one_off_or_shared_at_the_top_are_caught():
    table = step_table(*DEFAULT)
    logprobs, kept = np.log(np.array([0.3, 0.3, 0.2, 0.1], np.float32)), np.array([4])
    codes = encode_logprobs(logprobs, kept, table)
    check_codes(codes, logprobs, kept, table)
    for wrong in (codes + np.array([0, 0, 1, 0], np.uint8), codes - np.array([0, 1, 0, 0], np.uint8)):
        with pytest.raises(AssertionError):
            check_codes(wrong, logprobs, kept, table)


def there_and_back(logprobs: np.ndarray, kept: np.ndarray, rests: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return decode_logprobs(encode_logprobs(logprobs, kept, table), kept, table, decode_rests(encode_rests(rests)))


def mass(logprobs: np.ndarray, kept: np.ndarray, rests: np.ndarray) -> np.ndarray:
    return np.array([np.exp(part.astype(np.float64)).sum() + np.exp(np.float64(rest)) for part, rest in zip(parts(logprobs, kept), rests, strict=True)])


@settings(deadline=None, max_examples=300)
@given(positions=positions(), step=st.sampled_from([DEFAULT, (0.05, 0.5), (0.008, 0.5)]))
def test_what_comes_back_sums_to_1_at_every_position_and_is_off_by_the_stated_error_at_most(positions, step):
    logprobs, kept, rests = positions
    table = step_table(*step)
    found, rest = there_and_back(logprobs, kept, rests, table)
    assert found.dtype == rest.dtype == np.float32
    np.testing.assert_allclose(mass(found, kept, rest), np.ones(len(kept)), atol=1e-3)
    error = np.where(logprobs >= table[-1], logprob_error(logprobs, table), 0)
    for was, now, off, rest_was, rest_now in zip(*(parts(values, kept) for values in (logprobs, found, error)), rests, rest, strict=True):
        # dividing by the sum moves all outcomes by no more than the worst of them was off
        worst = max(off.max(initial=0), REST_STEP / 2) + 1e-4
        inside = was >= table[-1]
        assert (np.abs(now - was)[inside] <= (off + worst)[inside]).all()
        assert (np.exp(now[~inside]) < 1e-5).all()
        assert rest_was == rest_now if rest_was == -np.inf else abs(rest_now - rest_was) <= REST_STEP / 2 + worst or rest_was < -1600
        if len(was):
            assert now.argmax() == was.argmax()
            assert (now == now.max()).sum() == 1


def test_control_a_decoder_that_does_not_divide_by_the_sum_is_caught():
    row = log_softmax(np.zeros(1000)).astype(np.float32)
    logprobs, kept, rests, table = row[:128], np.array([128]), np.array([np.log(0.872)]), step_table(*DEFAULT)
    undivided = table[encode_logprobs(logprobs, kept, table)]
    assert abs(mass(undivided, kept, decode_rests(encode_rests(rests)))[0] - 1) > 1e-3
    assert abs(mass(*np.split(there_and_back(logprobs, kept, rests, table)[0], [128])[:1], kept, there_and_back(logprobs, kept, rests, table)[1])[0] - 1) < 1e-5


def test_a_position_that_keeps_nothing_is_all_rest_and_one_without_either_has_no_mass():
    table = step_table(*DEFAULT)
    found, rest = decode_logprobs(np.array([3], np.uint8), np.array([0, 1, 0]), table, np.array([-0.4, -np.inf, -np.inf], np.float32))
    assert found.tolist() == [0.0]
    assert rest.tolist() == [0.0, -np.inf, -np.inf]


def test_counts_come_back_as_the_shares_of_the_draws():
    counts, kept = np.array([50, 1, 49, 20, 20, 10], np.uint8), np.array([1, 2, 3])
    found, rest = decode_logprobs(counts, kept, count_table(50), np.full(3, -np.inf, np.float32))
    np.testing.assert_allclose(np.exp(found), counts / 50, rtol=1e-6)
    assert (rest == -np.inf).all()
    assert np.exp(count_table(255)[0]) == 0
    np.testing.assert_allclose(np.exp(count_table(255)[1:]), np.arange(1, 256) / 255)


# --- ids ---


@st.composite
def kept_ids(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """ids, flat, ascending inside a position, and how many each position has."""
    size = draw(st.sampled_from([1, 3, 300, 262144]))
    lists = draw(st.lists(st.sets(st.integers(0, size - 1), max_size=20), max_size=12))
    return np.array([id for ids in lists for id in sorted(ids)], np.int64), np.array([len(ids) for ids in lists], np.uint16)


@settings(deadline=None, max_examples=200)
@given(kept_ids())
def test_ranks_have_every_token_once_and_more_frequent_classes_first(flat_and_kept):
    ids, _ = flat_and_kept
    order = ranks(ids)
    assert order.dtype == np.int32
    counts = Counter(ids.tolist())
    # classes of doubled counts: 1, 2 and 3, 4 to 7, ...
    assert order.tolist() == sorted(counts, key=lambda id: (-counts[id].bit_length(), id))


def test_ranks_put_a_class_of_doubled_counts_in_ascending_order():
    assert ranks(np.repeat([5, 9, 2, 7, 1], [1, 3, 2, 8, 1])).tolist() == [7, 2, 9, 1, 5]


@settings(deadline=None, max_examples=200)
@given(flat_and_kept=kept_ids(), seed=st.integers(0, 99), other_order=st.booleans())
def test_ids_and_codes_come_back_exactly(flat_and_kept, seed, other_order):
    ids, kept = flat_and_kept
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, len(ids)).astype(np.uint8)
    order = rng.permutation(np.union1d(ids, [0, 70])).astype(np.int32) if other_order else ranks(ids)
    gaps, sorted_codes = encode_ids(ids, codes, kept, order)
    assert gaps.dtype == np.int32
    assert sorted_codes.dtype == np.uint8
    found = decode_ids(gaps, kept, order)
    assert found.dtype == np.int32
    place = {id: rank for rank, id in enumerate(order.tolist())}
    for gap, now, now_codes, was, was_codes in zip(*(parts(values, kept) for values in (gaps, found, sorted_codes, ids, codes)), strict=True):
        assert (gap >= np.minimum(np.arange(len(gap)), 1)).all()  # a rank, then gaps above 0
        assert dict(zip(now.tolist(), now_codes.tolist(), strict=True)) == dict(zip(was.tolist(), was_codes.tolist(), strict=True))
        assert now.tolist() == sorted(was.tolist(), key=place.__getitem__)


def test_so_many_positions_that_their_ranks_sum_up_to_more_than_32_bits_come_back():
    order = np.arange(262144, dtype=np.int32)
    ids = np.tile(np.array([262140, 262143], np.int32), 10000)
    kept = np.full(10000, 2, np.uint16)
    gaps, _ = encode_ids(ids, np.zeros(len(ids), np.uint8), kept, order)
    assert gaps.sum(dtype=np.int64) > 2**31
    assert (decode_ids(gaps, kept, order) == ids).all()


def test_a_rank_that_no_token_has_is_an_error():
    order = np.array([5, 9, 2], np.int32)
    assert decode_ids(np.array([0, 2], np.int32), np.array([2]), order).tolist() == [5, 2]
    for gaps in ([0, 3], [-1, 1], [3, 0]):
        with pytest.raises(IndexError):
            decode_ids(np.array(gaps, np.int32), np.array([2]), order)
    with pytest.raises(IndexError):
        decode_ids(np.array([0], np.int32), np.array([1]), np.zeros(0, np.int32))


# --- rests ---


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-1600, 100, width=32), max_size=40))
def test_a_rest_there_and_back_differs_by_half_a_step_at_most(values):
    rests = np.array(values, np.float32)
    stored = encode_rests(rests)
    assert stored.dtype == np.int16
    found = decode_rests(stored)
    assert found.dtype == np.float32
    assert (np.abs(found - rests) <= REST_STEP / 2 + 1e-4).all()


def test_no_rest_and_a_rest_too_low_for_its_column_come_back_as_none():
    stored = encode_rests(np.array([-np.inf, -1e30, -1639.0, -1638.39, -1638.3, 0.0, 1e30], np.float32))
    assert stored.tolist() == [NO_REST] * 4 + [-32766, 0, 32767]
    found = decode_rests(stored)
    assert (found[:4] == -np.inf).all()
    assert found[4] == pytest.approx(-1638.3, abs=0.01)


# --- hidden states ---


@settings(deadline=None, max_examples=100)
@given(rows=st.integers(0, 6), size=st.integers(1, 40), spread=st.sampled_from([1e-6, 1.0, 1e4]), seed=st.integers(0, 99))
def test_a_hidden_state_there_and_back_differs_by_half_its_scale_at_most(rows, size, spread, seed):
    hidden = (np.random.default_rng(seed).standard_t(2, (rows, size)) * spread).astype(np.float32)
    hidden[1::3] = 0
    stored, scale = encode_hidden(hidden)
    assert (stored.dtype, scale.dtype) == (np.int8, np.float32)
    found = decode_hidden(stored, scale)
    assert found.dtype == np.float32
    assert (np.abs(found - hidden) <= scale[:, None] * (0.5 + 1e-5)).all()
    assert (found[1::3] == 0).all()
    assert (np.abs(stored).max(-1, initial=0)[np.abs(hidden).max(-1, initial=0) > 0] == 127).all()


# --- spans ---


@settings(deadline=None, max_examples=200)
@given(st.sets(st.integers(0, 60)))
def test_positions_come_back_from_their_spans(numbers):
    positions = np.array(sorted(numbers), np.int32)
    first, lengths = spans(positions)
    assert first.dtype == lengths.dtype == positions_of(first, lengths).dtype == np.int32
    assert positions_of(first, lengths).tolist() == positions.tolist()
    assert (lengths > 0).all()
    assert (first[1:] > first[:-1] + lengths[:-1]).all()  # as few spans as there can be


def test_spans_of_several_records_come_back_together():
    records = [np.array(part, np.int32) for part in ([3, 4, 5, 9], [], [0], [1, 2, 7])]
    runs = [spans(part) for part in records]
    found = positions_of(np.concatenate([first for first, _ in runs]), np.concatenate([length for _, length in runs]))
    assert found.tolist() == np.concatenate(records).tolist()
