from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.lookup import find
from pipeline.losses.forward_kl import forward_kl
from pipeline.models.tokenizers import RecordTokenizer
from pipeline.signals.alignment import align
from pipeline.signals.projection import REST, Projected, Projection, SparseTarget, at_temperature, project
from pipeline.signals.records import END, Record, Tokens
from pipeline.signals.targets import Targets
from tests.signals.dense import asked, log_softmax, order, student, targets_of, teacher, tokens_of
from tests.tiny import questions

TEMPERATURES = [1.0, 2.0, 8.0]
METHODS = ("first_token", "exact_bytes", "contextual")
RECORDS = [
    asked("What is it?", "thinning 12345 of the kidney 12 of 100."),
    asked("What is 🙂?", "🙂 sign \n\n\n fibrosé 👩‍👩‍👧 123456789   x\ty"),
    asked("And?", "a cyst of the heart, seen in 4 of 100.", context="A context."),
    asked("Nothing?", ""),
    *(asked(row["question"], row["answer"]) for row in list(questions(48))[5::20]),
]


@cache
def projection(method: str) -> Projection:
    return find("projections", method)(teacher().vocabulary, student().vocabulary, student().encode)


def said(tokens: Tokens, vocabulary: int, keep: int, seed: int, *, onto_realised: float = 2.0, everywhere: bool = True) -> tuple[Targets, np.ndarray]:
    """Made-up targets and the logits [P, V] behind them, with the realised token more likely than others."""
    position = np.arange(len(tokens) - 1, dtype=np.int32) if everywhere else tokens.answer_positions()
    logits = np.random.default_rng(seed).normal(0, 2, (len(position), vocabulary))
    logits[np.arange(len(position)), tokens.ids[position + 1]] += onto_realised
    return targets_of(logits, tokens, position, keep, TEMPERATURES), logits


def reference(projection: Projection, targets: Targets, logits: np.ndarray, keep: int, temperature: float, a: Tokens, b: Tokens, vocabulary: int) -> dict[int, np.ndarray]:
    """Student position -> its distribution over the student's tokens and, last, the rest; only where something is placed."""
    row_of = {position: row for row, position in enumerate(targets.position.tolist())}
    logprobs, tempered = log_softmax(logits), np.exp(log_softmax(logits, temperature))
    found = {}
    for at_a, at_b in zip(*(positions.tolist() for positions in align(a, b)), strict=True):
        if at_a not in row_of:
            continue
        row, realised = row_of[at_a], int(a.ids[at_a + 1])
        q, placed = np.zeros(vocabulary + 1), False
        for id in {*order(logits[row])[:keep], realised}:
            to, share = int(projection.student_id[id]), 1.0
            if projection.realised_path and id == realised:
                to, share = path(row_of, logprobs, a, b, at_a + 1, at_b + 1)
            if to != REST:
                q[to] += tempered[row, id] * share
                placed = True
        q[-1] = 1 - q.sum()
        if placed:
            found[at_b] = q
    return found


def path(row_of: dict[int, int], logprobs: np.ndarray, a: Tokens, b: Tokens, i: int, j: int) -> tuple[int, float]:
    """Where the realised teacher token i goes if student token j stands there, and the share that does."""
    if a.kind[i] == END or a.end[i] >= b.end[j]:
        return int(b.ids[j]), 1.0
    share = 1.0
    while a.end[i] < b.end[j]:
        i += 1
        if i - 1 not in row_of:
            return REST, 0.0
        share *= np.exp(logprobs[row_of[i - 1], a.ids[i]])
    return (int(b.ids[j]), share) if a.end[i] == b.end[j] else (REST, 0.0)


def dense(target: SparseTarget, vocabulary: int) -> np.ndarray:
    q = torch.zeros(len(target.rest), vocabulary + 1, dtype=torch.float64)
    q.scatter_add_(1, target.ids, target.probs.double())
    q[:, -1] = target.rest.double()
    return q.numpy()


def check(projected: Projected, wanted: dict[int, np.ndarray], temperature: float, vocabulary: int) -> None:
    assert projected.position.tolist() == list(wanted)
    if wanted:
        np.testing.assert_allclose(dense(at_temperature([projected], TEMPERATURES, temperature), vocabulary), np.stack(list(wanted.values())), rtol=1e-4, atol=3e-6)


@settings(deadline=None, max_examples=40)
@given(
    record=st.sampled_from(RECORDS),
    method=st.sampled_from(METHODS),
    keep=st.sampled_from([1, 5, 64, 10000]),
    temperature=st.sampled_from(TEMPERATURES),
    everywhere=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_projected_target_is_that_of_a_dense_reference(record, method, keep, temperature, everywhere, seed):
    a, b = teacher().render(record), student().render(record)
    targets, logits = said(a, len(teacher().vocabulary), keep, seed, everywhere=everywhere)
    projected = project(projection(method), targets, TEMPERATURES, logits.shape[1], a, b)
    check(projected, reference(projection(method), targets, logits, keep, temperature, a, b, len(student().vocabulary)), temperature, len(student().vocabulary))


def test_control_positions_shifted_by_one_and_mass_tempered_after_projecting_are_caught():
    record, keep, sizes = RECORDS[0], 16, (len(teacher().vocabulary), len(student().vocabulary))
    a, b = teacher().render(record), student().render(record)
    targets, logits = said(a, sizes[0], keep, 1)
    for temperature in (1.0, 2.0):
        wanted = reference(projection("contextual"), targets, logits, keep, temperature, a, b, sizes[1])
        check(project(projection("contextual"), targets, TEMPERATURES, sizes[0], a, b), wanted, temperature, sizes[1])
        moved = without_last(replace(targets, position=targets.position + 1))
        with pytest.raises(AssertionError):
            check(project(projection("contextual"), moved, TEMPERATURES, sizes[0], a, b), wanted, temperature, sizes[1])
    projected_first = {at: np.sqrt(q) / np.sqrt(q).sum() for at, q in reference(projection("contextual"), targets, logits, keep, 1.0, a, b, sizes[1]).items()}
    with pytest.raises(AssertionError):
        check(project(projection("contextual"), targets, TEMPERATURES, sizes[0], a, b), projected_first, 2.0, sizes[1])


def without_last(targets: Targets) -> Targets:
    entries = len(targets.ids) - int(targets.kept[-1])
    flat = {"ids": targets.ids[:entries], "logprobs": targets.logprobs[:entries], "rests": targets.rests[:, :-1]}
    return replace(targets, **flat, **{name: getattr(targets, name)[:-1] for name in ("position", "kept", "realised_logprob", "entropy")})


@settings(deadline=None, max_examples=30)
@given(records=st.lists(st.sampled_from(RECORDS), min_size=1, max_size=3), method=st.sampled_from(METHODS), keep=st.integers(1, 80), temperature=st.floats(1, 12), seed=st.integers(0, 99))
def test_placed_and_rest_sum_to_one_at_every_position_and_temperature(records, method, keep, temperature, seed):
    words = []
    for record in records:
        a, b = teacher().render(record), student().render(record)
        words.append(project(projection(method), said(a, len(teacher().vocabulary), keep, seed)[0], TEMPERATURES, len(teacher().vocabulary), a, b))
    target = at_temperature(words, TEMPERATURES, temperature)
    assert (target.probs >= 0).all()
    assert (target.rest >= 0).all()
    assert torch.allclose(target.probs.double().sum(-1) + target.rest.double(), torch.ones(len(target.rest), dtype=torch.float64), atol=1e-6)
    assert len(target.rest) == sum(len(word.position) for word in words)


def test_records_together_are_the_same_as_each_alone():
    words = []
    for seed, record in enumerate(RECORDS):
        a, b = teacher().render(record), student().render(record)
        words.append(project(projection("contextual"), said(a, len(teacher().vocabulary), 16, seed)[0], TEMPERATURES, len(teacher().vocabulary), a, b))
    size = len(student().vocabulary)
    together = dense(at_temperature(words, TEMPERATURES, 3.0), size)
    alone = np.concatenate([dense(at_temperature([word], TEMPERATURES, 3.0), size) for word in words])
    np.testing.assert_allclose(together, alone, atol=1e-7)


def test_padding_columns_repeat_a_token_of_their_row_with_no_mass():
    a, b = teacher().render(RECORDS[0]), student().render(RECORDS[0])
    projected = project(projection("exact_bytes"), said(a, len(teacher().vocabulary), 8, 0)[0], TEMPERATURES, len(teacher().vocabulary), a, b)
    target = at_temperature([projected], TEMPERATURES, 1.0)
    assert len(set(projected.columns.tolist())) > 1
    for row, count in enumerate(projected.columns.tolist()):
        ids = target.ids[row].tolist()
        assert ids[:count] == sorted(set(ids[:count]))
        assert set(ids[count:]) <= set(ids[:count])
        assert (target.probs[row, count:] == 0).all()


# --- one tokenizer on both sides ---


@settings(deadline=None, max_examples=30)
@given(record=st.sampled_from(RECORDS), keep=st.sampled_from([1, 5, 64, 10000]), temperature=st.sampled_from(TEMPERATURES), seed=st.integers(0, 99), side=st.sampled_from([teacher, student]))
def test_with_one_tokenizer_the_target_is_the_teachers_softmax_with_the_realised_token_added(record, keep, temperature, seed, side):
    tokens, size = side().render(record), len(side().vocabulary)
    targets, logits = said(tokens, size, keep, seed, onto_realised=-2.0, everywhere=False)
    same = find("projections", "identity")(side().vocabulary, side().vocabulary, side().encode)
    projected = project(same, targets, TEMPERATURES, size, tokens, tokens)
    assert projected.position.tolist() == tokens.answer_positions().tolist()
    found = dense(at_temperature([projected], TEMPERATURES, temperature), size)
    p = np.exp(log_softmax(logits, temperature))
    for row, position in enumerate(projected.position):
        kept = [*{*order(logits[row])[:keep], int(tokens.ids[position + 1])}]
        np.testing.assert_allclose(found[row, kept], p[row, kept], rtol=1e-4, atol=1e-7)
        assert found[row, :-1].sum() == pytest.approx(p[row, kept].sum(), abs=1e-5)
        assert found[row, -1] == pytest.approx(1 - p[row, kept].sum(), abs=1e-5)


def test_permuting_the_students_ids_permutes_the_target_and_changes_the_loss():
    a, b = teacher().render(RECORDS[0]), student().render(RECORDS[0])
    size = len(student().vocabulary)
    to = np.random.default_rng(0).permutation(size).astype(np.int32)
    once = projection("contextual")
    permuted = replace(once, student_id=np.where(once.student_id == REST, REST, to[once.student_id]).astype(np.int32))
    targets = said(a, len(teacher().vocabulary), 16, 0)[0]
    one = at_temperature([project(once, targets, TEMPERATURES, len(teacher().vocabulary), a, b)], TEMPERATURES, 1.0)
    other = at_temperature([project(permuted, targets, TEMPERATURES, len(teacher().vocabulary), a, replace(b, ids=to[b.ids]))], TEMPERATURES, 1.0)
    np.testing.assert_allclose(dense(other, size)[:, [*to, size]], dense(one, size), atol=1e-7)
    logits = torch.randn(len(one.rest), size, generator=torch.Generator().manual_seed(0))
    losses = forward_kl(logits, one), forward_kl(logits, other)
    assert not torch.allclose(*losses, atol=1e-2)

    def sorted_distance(target: SparseTarget) -> torch.Tensor:
        """ULD, the control: it knows values and no identities."""
        return (torch.from_numpy(np.sort(dense(target, size)[:, :-1])) - logits.double().softmax(-1).sort().values).abs().sum(-1)

    assert torch.allclose(sorted_distance(one), sorted_distance(other))


def test_teacher_tokens_of_one_student_token_are_summed():
    """Teacher ids 1 and 2 both become 5; 3 becomes nothing."""
    tokens = tokens_of([1, 2], 0, ids=[1, 3], end=0)
    ours = replace(tokens, ids=np.array([0, 5, 6, 0], np.int32))
    position = tokens.answer_positions()
    logits = np.log(np.array([[0.1, 0.2, 0.3, 0.4]] * 3))
    targets = targets_of(logits, tokens, position, 4, TEMPERATURES)
    target = at_temperature([project(Projection(np.array([REST, 5, 5, REST], np.int32)), targets, TEMPERATURES, 4, tokens, ours)], TEMPERATURES, 1.0)
    found = dense(target, 7)
    assert found[0, 5] == pytest.approx(0.5, abs=1e-6)
    assert found[0, -1] == pytest.approx(0.5, abs=1e-6)
    assert target.top().tolist() == [5, 5, 5]


def test_a_position_of_which_nothing_can_be_placed_is_left_out():
    tokens = tokens_of([1, 2], 0, ids=[1, 2], end=0)
    logits = np.log(np.array([[0.01, 0.9, 0.05, 0.04], [0.01, 0.04, 0.05, 0.9], [0.9, 0.04, 0.04, 0.02]]))
    targets = targets_of(logits, tokens, tokens.answer_positions(), 1, TEMPERATURES)
    projected = project(Projection(np.array([REST, REST, 4, 5], np.int32)), targets, TEMPERATURES, 4, tokens, tokens)
    assert projected.position.tolist() == [1]
    assert dense(at_temperature([projected], TEMPERATURES, 1.0), 6)[0] == pytest.approx([0, 0, 0, 0, 0.05, 0.9, 0.05], abs=1e-6)


def test_a_record_with_no_position_goes_along_with_others():
    nothing = project(Projection(np.full(4, REST, np.int32)), *_four(), TEMPERATURES, 4, *_two())
    something = project(Projection(np.arange(4, dtype=np.int32)), *_four(), TEMPERATURES, 4, *_two())
    assert len(nothing.position) == 0
    assert len(at_temperature([nothing, something, nothing], TEMPERATURES, 1.0).rest) == 3


def _two() -> tuple[Tokens, Tokens]:
    tokens = tokens_of([1, 2], 0, ids=[1, 2], end=0)
    return tokens, tokens


def _four() -> tuple[Targets]:
    tokens = _two()[0]
    return (targets_of(np.zeros((3, 4)), tokens, tokens.answer_positions(), 2, TEMPERATURES),)


# --- the realised path ---


def mass_on_realised(method: str, record: Record, sure: float = 60.0) -> tuple[np.ndarray, np.ndarray, Tokens, Tokens]:
    """Of a teacher that is sure of what follows: the mass on the student's next token, the positions, and the tokens."""
    a, b = teacher().render(record), student().render(record)
    targets, _ = said(a, len(teacher().vocabulary), 8, 0, onto_realised=sure)
    projected = project(projection(method), targets, TEMPERATURES, len(teacher().vocabulary), a, b)
    q = dense(at_temperature([projected], TEMPERATURES, 1.0), len(student().vocabulary))
    return q[np.arange(len(q)), b.ids[projected.position + 1]], projected.position, a, b


@pytest.mark.parametrize("record", [RECORDS[0], RECORDS[2], *RECORDS[4:]], ids=lambda record: record.segments[-1].text)
def test_a_teacher_sure_of_what_follows_makes_a_target_sure_of_it(record: Record):
    mass, position, a, b = mass_on_realised("contextual", record)
    ends = set(a.end.tolist())
    whole = [b.kind[p + 1] == END or b.end[p + 1] in ends for p in position.tolist()]
    assert sum(whole) > 5
    assert mass[whole] == pytest.approx(1.0, abs=1e-5)


def test_control_the_static_map_is_wrong_where_the_teachers_token_is_shorter():
    mass, position, a, b = mass_on_realised("first_token", RECORDS[0])
    first_teacher_end = {int(start): int(end) for start, end in zip(a.start, a.end, strict=True) if end > start}
    shorter = np.array([b.kind[p + 1] != END and first_teacher_end.get(int(b.start[p + 1]), 10**6) < b.end[p + 1] for p in position.tolist()])
    assert shorter.any()
    assert (mass[shorter] < 1e-3).all()
    assert (mass[~shorter] > 0.999).all()
    mass, *_ = mass_on_realised("contextual", RECORDS[0])
    meets = np.isin(b.end[position + 1], a.end)
    assert (shorter & meets).any()
    assert (mass[shorter & meets] > 0.999).all()


def test_a_students_token_that_ends_inside_a_teachers_later_token_takes_nothing_of_the_realised_path():
    a = tokens_of([1, 4], 0, ids=[1, 2], end=3)
    b = tokens_of([2, 4], 0, ids=[1, 2], end=3)
    logits = np.full((3, 4), -30.0)
    logits[np.arange(3), a.ids[1:]] = 0
    targets = targets_of(logits, a, a.answer_positions(), 2, TEMPERATURES)
    projected = project(Projection(np.arange(4, dtype=np.int32), realised_path=True), targets, TEMPERATURES, 4, a, b)
    found = dense(at_temperature([projected], TEMPERATURES, 1.0), 4)
    assert projected.position.tolist() == [0, 2]
    assert found[0, -1] == pytest.approx(1.0, abs=1e-6)
    assert found[1, 3] == pytest.approx(1.0, abs=1e-6)


def test_the_share_of_a_path_is_the_probability_of_the_teachers_further_tokens():
    """`1`, `2`, `3` on one side, `123` on the other."""
    a = tokens_of([1, 2, 3], 0, ids=[1, 2, 3], end=0)
    b = tokens_of([3], 0, ids=[4], end=0)
    logits = np.log(np.array([[0.1, 0.5, 0.2, 0.2], [0.1, 0.1, 0.6, 0.2], [0.1, 0.1, 0.1, 0.7], [0.97, 0.01, 0.01, 0.01]]))
    targets = targets_of(logits, a, a.answer_positions(), 4, TEMPERATURES)
    path = Projection(np.array([0, 1, 2, 3], np.int32), realised_path=True)
    found = dense(at_temperature([project(path, targets, TEMPERATURES, 4, a, b)], TEMPERATURES, 1.0), 5)
    assert found[0] == pytest.approx([0.1, 0, 0.2, 0.2, 0.5 * 0.6 * 0.7, 0.5 * (1 - 0.6 * 0.7)], abs=1e-6)


def test_a_path_through_a_position_that_the_cache_does_not_describe_is_not_known():
    a = tokens_of([1, 2, 3], 0, ids=[1, 2, 3], end=0)
    b = tokens_of([3], 0, ids=[4], end=0)
    logits = np.log(np.array([[0.1, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.7]]))
    targets = targets_of(logits, a, np.array([0, 2], np.int32), 4, TEMPERATURES)
    path = Projection(np.array([0, 1, 2, 3], np.int32), realised_path=True)
    found = dense(at_temperature([project(path, targets, TEMPERATURES, 4, a, b)], TEMPERATURES, 1.0), 5)
    assert found[0] == pytest.approx([0.1, 0, 0.2, 0.2, 0, 0.5], abs=1e-6)


def test_as_many_are_unkept_as_the_vocabulary_has_beyond_the_kept_and_the_realised():
    tokens = tokens_of([1, 2], 0, ids=[1, 2], end=3)
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]]))
    targets = targets_of(logits, tokens, tokens.answer_positions(), 2, TEMPERATURES)
    projected = project(Projection(np.arange(4, dtype=np.int32)), targets, TEMPERATURES, 4, tokens, tokens)
    assert projected.entries.tolist() == [2, 3, 3]
    assert projected.unkept.tolist() == [2, 1, 1]


def test_a_realised_token_that_reached_the_cache_as_no_mass_is_no_nan():
    a = tokens_of([1, 2], 0, ids=[1, 2], end=0)
    logits = np.array([[0.0, -np.inf, 0.0, 0.0]] * 3)
    targets = targets_of(logits, a, a.answer_positions(), 2, TEMPERATURES)
    for realised_logprob in (-np.inf, -1e30):
        lost = replace(targets, realised_logprob=np.where(np.isinf(targets.realised_logprob), np.float32(realised_logprob), targets.realised_logprob))
        for realised_path in (False, True):
            projected = project(Projection(np.arange(4, dtype=np.int32), realised_path), lost, TEMPERATURES, 4, a, a)
            for temperature in (1.0, 3.0):
                target = at_temperature([projected], TEMPERATURES, temperature)
                assert torch.isfinite(target.probs).all()
                assert torch.allclose(target.probs.sum(-1) + target.rest, torch.ones(len(target.rest)))


def test_one_tokenizer_with_two_templates_still_meets_in_the_answers():
    chatty = RecordTokenizer(student().tokenizer, "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}", "chatty")
    for record in RECORDS[:2]:
        a, b = student().render(record), chatty.render(record)
        targets = said(a, len(student().vocabulary), 8, 0)[0]
        same = Projection(np.arange(len(student().vocabulary), dtype=np.int32))
        projected = project(same, targets, TEMPERATURES, len(student().vocabulary), a, b)
        # the space of "Answer: " belongs to the first word's token in one template only; from the second word on they meet
        missed = set(b.answer_positions().tolist()) - set(projected.position.tolist())
        first_word = record.segments[-1].text.split()[0]
        assert all(b.end[p + 1] <= len(b"".join(s.text.encode() for s in record.segments[:-1])) + len(first_word.encode()) for p in missed)
        assert len(missed) < len(b.answer_positions()) / 2
