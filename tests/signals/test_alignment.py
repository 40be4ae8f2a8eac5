from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import Mismatch
from pipeline.signals.alignment import align
from pipeline.signals.records import ANSWER, CONTENT, END, TEMPLATE, Record, Segment, Tokens, lead_as_number
from tests.models import real
from tests.signals.dense import NASTY_TEXTS, asked, student, teacher, tokens_of


def oracle(teacher: Tokens, student: Tokens) -> list[tuple[int, int]]:
    """Every token against every other."""
    pairs = []
    for i in range(1, len(teacher)):
        for j in range(1, len(student)):
            asked = teacher.kind[i] >= ANSWER and student.kind[j] >= ANSWER
            here = teacher.start[i] == student.start[j] and (teacher.kind[i] == END) == (student.kind[j] == END)
            if asked and here and teacher.lead[i] == student.lead[j]:
                pairs.append((i - 1, j - 1))
    return pairs


def pairs(teacher: Tokens, student: Tokens) -> list[tuple[int, int]]:
    at_teacher, at_student = align(teacher, student)
    assert at_teacher.dtype == at_student.dtype == np.int64
    return list(zip(at_teacher.tolist(), at_student.tolist(), strict=True))


def check(teacher: Tokens, student: Tokens, found: list[tuple[int, int]]) -> None:
    assert found == oracle(teacher, student)


@st.composite
def two_segmentations(draw) -> tuple[Tokens, Tokens]:
    """One content, cut by two tokenizers, both at the beginning of the answer; one side may lack the first or the last template token."""
    length = draw(st.integers(1, 30))
    answer_from = draw(st.integers(0, length - 1))
    sides = []
    for _ in range(2):
        cuts = {length, *draw(st.sets(st.integers(1, length)))} | ({answer_from} - {0})
        lead = draw(st.sampled_from([0, lead_as_number(b" "), lead_as_number(b"\n")]))
        sides.append(tokens_of(sorted(cuts), answer_from, lead=lead, end=draw(st.sampled_from([0, 0, None])), bos=draw(st.sampled_from([0, 0, None]))))
    return sides[0], sides[1]


@settings(deadline=None, max_examples=50)
@given(two_segmentations())
def test_the_pairs_are_those_of_a_comparison_of_all_with_all(sides):
    check(*sides, pairs(*sides))


@settings(deadline=None, max_examples=30)
@given(two_segmentations())
def test_aligning_the_other_way_round_gives_the_mirrored_pairs(sides):
    assert sorted(pairs(*sides)) == sorted((t, s) for s, t in pairs(sides[1], sides[0]))


@settings(deadline=None, max_examples=30)
@given(two_segmentations())
def test_tokens_with_themselves_are_all_one_to_one(sides):
    tokens = sides[0]
    assert pairs(tokens, tokens) == [(p, p) for p in tokens.answer_positions().tolist()]


def test_control_positions_shifted_by_one_and_lengths_compared_by_index_are_caught():
    one, other = tokens_of([2, 5, 6, 9], 2), tokens_of([1, 2, 4, 5, 9], 2)
    right = pairs(one, other)
    assert len(right) == 3
    check(one, other, right)
    by_index = list(zip(one.answer_positions().tolist(), other.answer_positions().tolist(), strict=False))
    for wrong in ([(t + 1, s + 1) for t, s in right], by_index):
        with pytest.raises(AssertionError):
            check(one, other, wrong)


def with_special_before(tokens: Tokens, index: int) -> Tokens:
    at = tokens.start[index]
    row = (99, at, at, TEMPLATE, 0)
    return Tokens(*(np.insert(column, index, value) for column, value in zip((tokens.ids, tokens.start, tokens.end, tokens.kind, tokens.lead), row, strict=True)))


def test_a_special_token_on_one_side_only_amid_the_answer_loses_no_later_token():
    one, other = tokens_of([2, 4, 6, 8], 2), tokens_of([2, 3, 4, 6, 8], 2)
    before = pairs(one, other)
    after = pairs(with_special_before(one, 4), other)
    assert [s for _, s in after] == [s for _, s in before]
    assert [t for t, _ in after] == [t + (t >= 3) for t, _ in before]


def test_a_beginning_of_text_on_one_side_only_loses_nothing():
    one, other = tokens_of([2, 4, 6], 2), tokens_of([2, 4, 6], 2, bos=None)
    assert [(t - 1, s) for t, s in pairs(one, other)] == pairs(other, other)


def test_first_answer_tokens_that_begin_with_different_template_bytes_are_no_pair():
    spaced, bare = (tokens_of([2, 4, 6], 2, lead=lead) for lead in (lead_as_number(b" "), 0))
    assert len(pairs(spaced, spaced)) == 3
    assert pairs(spaced, bare) == pairs(bare, bare)[1:]


def test_the_end_of_an_answer_pairs_with_the_end_and_not_with_the_next_answers_first_token():
    """Two answers with nothing of the content between them."""

    def two_answers(cuts: list[int]) -> Tokens:
        first, second = tokens_of([c for c in cuts if c <= 4], 0), tokens_of([c - 4 for c in cuts if c > 4], 0)
        second = replace(second, start=second.start + 4, end=second.end + 4)
        return Tokens(*(np.concatenate([getattr(first, name), getattr(second, name)]) for name in ("ids", "start", "end", "kind", "lead")))

    one, other = two_answers([2, 4, 6, 8]), two_answers([4, 8])
    found = pairs(one, other)
    check(one, other, found)
    assert [other.kind[s + 1] for _, s in found] == [ANSWER, END, ANSWER, END]


def test_tokens_of_different_records_are_a_mismatch():
    with pytest.raises(Mismatch, match="not of the same record"):
        align(tokens_of([2, 5], 2), tokens_of([2, 6], 2))


def test_a_record_without_an_answer_has_no_pairs():
    tokens = replace(tokens_of([2, 4], 0, end=None), kind=np.full(3, CONTENT, np.uint8))
    assert pairs(tokens, tokens) == []


@pytest.mark.parametrize("text", NASTY_TEXTS.values(), ids=NASTY_TEXTS)
@pytest.mark.parametrize("models", ["tiny", "real"])
def test_two_tokenizers_meet_where_the_same_bytes_have_been_read(models: str, text: str):
    one, other = (teacher(), student()) if models == "tiny" else (real.tokenizer(real.GEMMA), real.tokenizer(real.SMOLLM))
    record = asked("Of what?\n" + text, text + " Ever?", context=text)
    a, b = one.render(record), other.render(record)
    found = pairs(a, b)
    check(a, b, found)
    assert a.kind[found[-1][0] + 1] == b.kind[found[-1][1] + 1] == END
    assert len(found) > 1


def test_all_answers_of_several_turns_are_aligned():
    record = Record("r", (Segment("user", "a?"), Segment("assistant", "first kidney"), Segment("user", "b?"), Segment("assistant", "second heart 12345")))
    a, b = teacher().render(record), student().render(record)
    found = pairs(a, b)
    check(a, b, found)
    assert sum(b.kind[s + 1] == END for _, s in found) == 2


def test_answers_without_a_template_between_question_and_answer_are_aligned():
    """A base model's completion: the tokens may reach from the question into the answer, for one tokenizer and not the other."""
    template = "{% for message in messages %}{{ message.content }}{% endfor %}{{ eos_token }}"
    one, other = (type(side)(side.tokenizer, template, side.name) for side in (teacher(), student()))
    for question, answer in (("What is kid", "ney cyst"), ("the he", "art"), ("1234", "5 of 100"), ("a\n", "\nb")):
        record = asked(question, answer)
        a, b = one.render(record), other.render(record)
        check(a, b, pairs(a, b))


def test_two_empty_answers_at_one_byte_do_not_pair_on_one_side_only():
    record = Record("r", (Segment("user", "a"), Segment("assistant", ""), Segment("user", ""), Segment("assistant", "")))
    a, b = teacher().render(record), student().render(record)
    at_teacher, at_student = align(a, b)
    assert len(at_teacher) == len(at_student)
    assert (a.kind[at_teacher + 1] == END).all()
    assert (b.kind[at_student + 1] == END).all()


def test_leads_of_up_to_six_bytes_are_told_apart():
    leads = [b"", b" ", b"\n", b" \n", b"\n ", b"\0", b"\0\0", b"Answer"[:6], b"nswer ", b"      "]
    assert len({lead_as_number(lead) for lead in leads}) == len(leads)
