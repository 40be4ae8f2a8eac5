"""How attention rows are stored, and how they come from one tokenizer's keys to another's."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError, Mismatch
from pipeline.signals.alignment import align
from pipeline.signals.attention import (
    Cells,
    Matched,
    Rows,
    attention_target,
    cells_of,
    decode_keys,
    decode_weight_rests,
    decode_weights,
    encode_keys,
    encode_weight_rests,
    encode_weights,
    head_groups,
    matched,
    matched_layers,
    proportional,
)
from pipeline.signals.records import Tokens
from tests.models import real
from tests.signals.dense import NASTY_TEXTS, asked, student, teacher, tokens_of
from tests.signals.test_alignment import two_segmentations


def some_rows(position: np.ndarray, heads: int, seed: int, keys: int = 5) -> Rows:
    """Random weights over the keys up to each position."""
    rng = np.random.default_rng(seed)
    kept, key, weight, rest = [], [], [], []
    for t in np.repeat(position, heads).tolist():
        there = np.sort(rng.choice(t + 1, min(keys, t + 1, rng.integers(0, keys + 1)), replace=False))[::-1]
        p = rng.dirichlet(np.ones(len(there) + 1))
        kept.append(len(there))
        key += there.tolist()
        weight += p[:-1].tolist()
        rest.append(p[-1])
    return Rows(np.array(kept, np.uint8), np.array(key, np.int32), np.array(weight, np.float32), np.array(rest, np.float32))


# --- storage ---


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1), max_size=40))
def test_weights_come_back_within_half_a_step(weights: list[float]):
    weight = np.array(weights, np.float32)
    found = decode_weights(encode_weights(weight))
    assert (np.abs(found - weight) <= (255 * np.sqrt(found) + 0.5) / 255**2 + 1e-6).all()
    assert (np.abs(decode_weight_rests(encode_weight_rests(weight)) - weight) <= 0.5 / 65535 + 1e-7).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(0, 12))
def test_keys_come_back(seed: int, heads: int, positions: int):
    position = np.sort(np.random.default_rng(seed).choice(100_000, positions, replace=False)).astype(np.int32)
    rows = some_rows(position, heads, seed)
    query = np.repeat(position, heads)
    assert decode_keys(encode_keys(rows.key, rows.kept, query), rows.kept, query).tolist() == rows.key.tolist()


@pytest.mark.parametrize("gaps", [[5, 1], [-1, 2], [0, 0], [1, -1]])
def test_keys_that_no_token_is_are_refused(gaps: list[int]):
    with pytest.raises(IndexError):
        decode_keys(np.array(gaps, np.int32), np.array([2], np.uint8), np.array([4]))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_rows_that_were_split_are_the_same_joined(seed: int, sizes: list[int]):
    rows = some_rows(np.arange(sum(sizes)), 1, seed)
    parts = rows.split(sizes)
    assert [len(part.rest) for part in parts] == sizes
    assert all(len(part.key) == part.kept.sum() == len(part.weight) for part in parts)
    back = Rows.joined(parts)
    assert back.key.tolist() == rows.key.tolist()
    assert back.rest.tolist() == rows.rest.tolist()


# --- layers and heads ---


def test_layers_are_spread_evenly_and_those_that_see_everything_come_first():
    gemma = [layer % 6 == 5 for layer in range(18)]
    assert matched_layers(3, gemma) == [5, 11, 17]
    assert matched_layers(4, gemma) == [5, 8, 11, 17]
    assert matched_layers(1, gemma) == [17]
    assert matched_layers(4, [True] * 32) == [7, 15, 23, 31]
    assert matched_layers(2, [False] * 5) in ([1, 4], [2, 4])
    for count in range(1, 9):
        assert matched_layers(count, [True] * count) == list(range(count))
    with pytest.raises(InputError, match="the teacher has 2"):
        matched_layers(3, [True, True])


def test_a_students_layer_is_at_the_same_depth():
    assert [proportional(layer, 18, 10) for layer in (5, 8, 11, 17)] == [2, 4, 6, 9]
    assert [proportional(layer, 4, 4) for layer in range(4)] == [0, 1, 2, 3]
    assert proportional(0, 80, 2) == 0
    assert proportional(79, 80, 2) == 1


def test_heads_are_grouped_where_that_is_possible():
    assert [head_groups("mean", 8, 3), head_groups("same", 4, 4), head_groups("grouped", 32, 8), head_groups("grouped", 1, 9)] == [1, 4, 8, 1]
    with pytest.raises(InputError, match="as many heads"):
        head_groups("same", 4, 8)
    with pytest.raises(InputError, match="multiple"):
        head_groups("grouped", 9, 4)


# --- cells ---


def oracle(teacher: Tokens, student: Tokens) -> dict[tuple[str, int], set[int]]:
    """Which tokens belong together, each token against every other: (side, index) -> number of its set."""
    sides = [("t", teacher), ("s", student)]
    of = {(side, i): n for n, (side, i) in enumerate((side, i) for side, tokens in sides for i in range(len(tokens)))}

    def join(one, other):
        a, b = of[one], of[other]
        of.update({key: b for key, value in of.items() if value == a})

    nodes = [(side, i, int(tokens.start[i]), int(tokens.end[i])) for side, tokens in sides for i in range(len(tokens))]
    sinks = [node for node in nodes if node[1] == 0]
    both = all(start == end for _, _, start, end in sinks)
    if both:
        join(("t", 0), ("s", 0))
    for side, i, start, end in nodes:
        for other, j, begin, finish in nodes:
            if both and (i == 0 or j == 0):
                continue
            if start == end and begin == finish:
                if start == begin:
                    join((side, i), (other, j))
            elif start < end and begin < finish and start < finish and begin < end:
                join((side, i), (other, j))
    return of


def alike(teacher: Tokens, student: Tokens) -> bool:
    """Token for token: then each is a cell of its own."""
    return np.array_equal(teacher.ids, student.ids) and np.array_equal(teacher.start, student.start)


def check_cells(teacher: Tokens, student: Tokens, cells: Cells) -> None:
    of = oracle(teacher, student)
    own = np.repeat(np.arange(len(cells.begin) - 1), np.diff(cells.begin))
    cell_of = {("s", int(token)): int(cell) for token, cell in zip(cells.token, own, strict=True)}
    assert len(cell_of) == len(student)
    cell_of |= {("t", i): int(cell) for i, cell in enumerate(cells.of_teacher)}
    for one in of:
        for other in of:
            if (one[0] == "s" and other[0] == "s") or (cell_of[one] >= 0 and cell_of[other] >= 0):
                assert (cell_of[one] == cell_of[other]) == (of[one] == of[other]), (one, other)
    for (side, i), cell in cell_of.items():
        if side == "t" and cell < 0:
            assert not any(of[key] == of["t", i] for key in of if key[0] == "s")


@settings(deadline=None, max_examples=60)
@given(two_segmentations())
def test_cells_are_what_overlaps_and_what_stands_between_the_same_bytes(sides):
    if not alike(*sides):
        check_cells(*sides, cells_of(*sides))


def test_tokens_with_themselves_are_a_cell_each():
    tokens = teacher().render(asked("What is 12345?", "A cyst of the heart."))
    cells = cells_of(tokens, tokens)
    assert cells.of_teacher.tolist() == cells.token.tolist() == list(range(len(tokens)))


def test_control_cells_by_index_are_caught():
    one, other = tokens_of([2, 5, 6, 9], 2), tokens_of([1, 2, 4, 5, 9], 2)
    check_cells(one, other, cells_of(one, other))
    every = np.arange(len(other))
    with pytest.raises(AssertionError):
        check_cells(one, other, Cells(np.minimum(np.arange(len(one)), len(other) - 1), np.arange(len(other) + 1), every))


# --- rows in another tokenizer's keys ---


def dense(found: Matched, groups: int) -> list[tuple[dict[frozenset[int], float], float]]:
    """Each row: what goes to which of the student's tokens, and the rest."""
    rows, cell, token = [], 0, 0
    for row in range(len(found.rest)):
        weights = {}
        for _ in range(int(found.cells[row])):
            n = int(found.keys[cell])
            weights[frozenset(found.key[token : token + n].tolist())] = float(found.weight[cell])
            cell, token = cell + 1, token + n
        rows.append((weights, float(found.rest[row])))
    return rows


def check_matched(rows: Rows, described: np.ndarray, one: Tokens, other: Tokens, groups: int, heads: int, found: Matched) -> None:
    at_teacher, at_student = align(one, other)
    known = np.isin(at_teacher, described)
    assert found.position.tolist() == at_student[known].tolist()
    of = {(side, i): i for side in "ts" for i in range(len(one))} if alike(one, other) else oracle(one, other)
    starts = np.concatenate([[0], np.cumsum(rows.kept, dtype=np.int64)])
    ours = dense(found, groups)
    for n, (t, s) in enumerate(zip(at_teacher[known].tolist(), at_student[known].tolist(), strict=True)):
        for group in range(groups):
            wanted: dict[frozenset[int], float] = {}
            rest = 0.0
            for head in range(group * heads // groups, (group + 1) * heads // groups):
                row = int(np.searchsorted(described, t)) * heads + head
                rest += float(rows.rest[row])
                for e in range(starts[row], starts[row + 1]):
                    tokens = frozenset(j for side, j in of if side == "s" and of["s", j] == of["t", int(rows.key[e])] and j <= s)
                    if tokens:
                        wanted[tokens] = wanted.get(tokens, 0.0) + float(rows.weight[e])
                    else:
                        rest += float(rows.weight[e])
            weights, found_rest = ours[n * groups + group]
            share = heads // groups
            assert weights.keys() == wanted.keys()
            for tokens, weight in wanted.items():
                assert weights[tokens] == pytest.approx(weight / share, abs=1e-6)
            assert found_rest == pytest.approx(rest / share, abs=1e-6)
            assert sum(weights.values()) + found_rest == pytest.approx(1, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(two_segmentations(), st.integers(0, 1000), st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1)]))
def test_rows_go_to_the_students_keys_and_no_weight_is_lost(sides, seed: int, heads: tuple[int, int]):
    one, other = sides
    described = one.answer_positions()
    rows = some_rows(described, heads[0], seed)
    check_matched(rows, described, one, other, heads[1], heads[0], matched(rows, described, one, other, heads[1]))


@pytest.mark.parametrize("title", NASTY_TEXTS)
def test_nasty_texts(title: str):
    record = asked("Read this: " + NASTY_TEXTS[title][:200], NASTY_TEXTS[title][:200])
    try:
        one, other = teacher().render(record), student().render(record)
    except InputError:
        pytest.skip("a tokenizer does not keep these bytes, and says so")
    described = np.arange(len(one) - 1, dtype=np.int32)
    rows = some_rows(described, 1, 3)
    check_matched(rows, described, one, other, 1, 1, matched(rows, described, one, other, 1))


@pytest.mark.parametrize(("one", "other"), list(permutations((real.GEMMA, real.SMOLLM, real.LLAMA3, real.QWEN3), 2)))
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_real_tokenizers(one: str, other: str, template: str):
    record = asked("A 67-year-old man (BMI 31.4 kg/m²) had an NT-proBNP of 12,345 pg/mL?", "He was given furosemide 40 mg i.v.; 咳嗽3天. 🙂")
    try:
        ours, theirs = real.tokenizer(one, template).render(record), real.tokenizer(other, template).render(record)
    except InputError as error:
        pytest.skip(str(error)[:100])
    described = ours.answer_positions()
    rows = some_rows(described, 1, 3, keys=9)
    check_matched(rows, described, ours, theirs, 1, 1, matched(rows, described, ours, theirs, 1))


def test_the_first_token_is_the_first_token_whatever_it_is():
    """The attention sink: a BOS on one side, the first word of the template on the other."""
    one, other, bare = tokens_of([2, 5, 9], 2, ids=None, bos=0), tokens_of([2, 4, 9], 2, bos=7), tokens_of([2, 4, 9], 2, bos=None)
    described = one.answer_positions()
    rows = Rows(np.ones(len(described), np.uint8), np.zeros(len(described), np.int32), np.full(len(described), 0.9, np.float32), np.full(len(described), 0.1, np.float32))
    found = matched(rows, described, one, other, 1)
    assert len(found.position)
    assert found.key.tolist() == [0] * len(found.position)
    assert found.weight == pytest.approx(0.9)
    # one that begins with content has nothing of the kind
    assert bare.end[0] > bare.start[0]
    assert matched(rows, described, one, bare, 1).rest == pytest.approx(1.0)


def test_a_record_without_described_positions_and_a_batch_that_lacks_a_row():
    tokens = tokens_of([2, 5, 9], 2)
    none = np.zeros(0, np.int32)
    nothing = matched(some_rows(none, 1, 0), none, tokens, tokens, 1)
    assert len(nothing.position) == len(nothing.rest) == len(nothing.key) == 0
    described = tokens.answer_positions()
    something = matched(some_rows(described, 2, 0), described, tokens, tokens, 2)
    target = attention_target([nothing, something], [described, described], 16, 2)
    assert target.query.tolist() == (16 + something.position).tolist()
    assert target.row.tolist() == [len(described) + i for i in range(len(described))]
    assert [int(b - a) for a, b in pairwise(target.begin)] == np.bincount(target.entry_row.numpy(), minlength=len(described)).tolist()
    with pytest.raises(Mismatch):
        attention_target([something], [described[1:]], 16, 2)
