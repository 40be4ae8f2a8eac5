from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.losses.forward_kl import forward_kl
from pipeline.models.tokenizers import RecordTokenizer
from pipeline.signals.alignment import align
from pipeline.signals.projection import REST, Projected, SparseTarget, TokenMap, as_it_is, at_temperature, meet
from pipeline.signals.records import END, Record, Tokens
from pipeline.signals.targets import Targets, with_realised
from tests.projections.made import (
    ACROSS,
    RECORDS,
    STATIC,
    TEMPERATURES,
    Said,
    build,
    check,
    check_sums,
    counts_of,
    dense,
    distributions,
    made,
    put,
    put_tokens,
    said,
    untrained,
    without_last,
)
from tests.signals.dense import NASTY_TEXTS, asked, log_softmax, student, targets_of, teacher, tokens_of

SIZES = len(teacher().vocabulary), len(student().vocabulary)


# --- against plain loops ---


@cache
def shared_out(method: str) -> list[dict[int, float]]:
    """Per teacher token: student token or REST -> share."""
    first = made("exact_bytes" if method == "exact_bytes" else "first_token").student_id.tolist()
    if method != "count_transport":
        return [{to: 1.0} for to in first]
    shares, counts = [], counts_of("tiny")
    for t, to in enumerate(first):
        seen = {int(counts.student_id[i]): int(counts.count[i]) for i in range(counts.begin[t], counts.begin[t + 1])}
        total = sum(seen.values())
        smoothed = {s: (seen.get(s, 0) + (s == to)) / (total + 1) for s in {*seen, to}} if total >= 5 else {to: 1.0}
        large = {s: share for s, share in smoothed.items() if share >= 0.001}
        shares.append(large | {REST: large.get(REST, 0.0) + 1 - sum(large.values())})
    return shares


def reference(method: str, word: Said, record: Record, temperature: float, power: float = 1.0) -> dict[int, np.ndarray]:
    """Student position -> its distribution over the student's tokens and, last, the rest; only where something is placed. power: of the shares."""
    a, b = teacher().render(record), student().render(record)
    row_of = {position: row for row, position in enumerate(word.targets.position.tolist())}
    rows, found = word.at(temperature), {}
    for at_a, at_b in zip(*(positions.tolist() for positions in align(a, b)), strict=True):
        if at_a not in row_of:
            continue
        kept, rest = rows[row_of[at_a]]
        q = np.zeros(SIZES[1] + 1)
        q[-1] = rest
        for id, mass in kept.items():
            for to, share in shared_out(method)[id].items():
                q[to if to != REST else -1] += mass * share**power
        if any(to != REST for id in kept for to in shared_out(method)[id]):
            found[at_b] = q
    return found


@settings(deadline=None, max_examples=40)
@given(
    record=st.sampled_from(RECORDS),
    method=st.sampled_from(STATIC),
    keep=st.sampled_from([1, 5, 64, 10000]),
    temperature=st.sampled_from(TEMPERATURES),
    everywhere=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_projected_target_is_that_of_plain_loops(record, method, keep, temperature, everywhere, seed):
    word = said(teacher(), record, keep, seed, everywhere=everywhere)
    check(put(made(method), teacher(), student(), record, word.targets), reference(method, word, record, temperature), temperature, SIZES[1])


@pytest.mark.parametrize("method", STATIC)
def test_control_positions_shifted_by_one_and_mass_tempered_after_projecting_are_caught(method):
    word = said(teacher(), RECORDS[0], 16, 1)
    found = put(made(method), teacher(), student(), RECORDS[0], word.targets)
    moved = put(made(method), teacher(), student(), RECORDS[0], without_last(replace(word.targets, position=word.targets.position + 1)))
    projected_first = {at: np.sqrt(q) / np.sqrt(q).sum() for at, q in reference(method, word, RECORDS[0], 1.0).items()}
    check(found, reference(method, word, RECORDS[0], 2.0), 2.0, SIZES[1])
    for wrong, wanted in ((moved, reference(method, word, RECORDS[0], 2.0)), (found, projected_first)):
        with pytest.raises(AssertionError):
            check(wrong, wanted, 2.0, SIZES[1])


def test_control_shares_that_are_tempered_too_are_caught():
    word = said(teacher(), RECORDS[0], 16, 1)
    wrong = {at: q / q.sum() for at, q in reference("count_transport", word, RECORDS[0], 2.0, power=0.5).items()}
    with pytest.raises(AssertionError):
        check(put(made("count_transport"), teacher(), student(), RECORDS[0], word.targets), wrong, 2.0, SIZES[1])


@settings(deadline=None, max_examples=40)
@given(
    records=st.lists(st.sampled_from([*RECORDS, *(asked("Nasty?", text) for text in NASTY_TEXTS.values())]), min_size=1, max_size=3),
    method=st.sampled_from(ACROSS),
    keep=st.integers(1, 80),
    temperature=st.floats(1, 12),
    seed=st.integers(0, 99),
)
def test_placed_and_rest_sum_to_one_at_every_position_and_temperature(records, method, keep, temperature, seed):
    words = [put(made(method), teacher(), student(), record, said(teacher(), record, keep, seed).targets) for record in records]
    if sum(len(word.position) for word in words):
        target = at_temperature(words, TEMPERATURES, temperature)
        check_sums(target)
        assert len(target.rest) == sum(len(word.position) for word in words)


@pytest.mark.parametrize("method", STATIC)
@pytest.mark.parametrize("text", NASTY_TEXTS.values(), ids=NASTY_TEXTS)
def test_nasty_texts_make_targets_that_are_distributions(method, text):
    record = asked(text, text)
    found = put(made(method), teacher(), student(), record, said(teacher(), record, 12, 0).targets)
    assert (np.diff(found.position) > 0).all()
    for temperature in (1.0, 3.3, 8.0):
        check_sums(at_temperature([found], TEMPERATURES, temperature))


@pytest.mark.parametrize("method", STATIC)
def test_static_methods_are_linear_in_the_teachers_word(method):
    record, alpha = RECORDS[0], 0.3
    tokens = teacher().render(record)
    position, random = tokens.answer_positions(), np.random.default_rng(0)
    p, other = (np.exp(log_softmax(random.normal(0, 2, (len(position), SIZES[0])))) for _ in range(2))
    q, of_other, of_both = (
        distributions(put(made(method), teacher(), student(), record, targets_of(np.log(word), tokens, position, SIZES[0], TEMPERATURES)), 1.0, SIZES[1])
        for word in (p, other, alpha * p + (1 - alpha) * other)
    )
    for at in of_both:
        np.testing.assert_allclose(of_both[at], alpha * q[at] + (1 - alpha) * of_other[at], atol=1e-6)


@pytest.mark.parametrize("method", ACROSS)
def test_what_ends_the_teachers_answer_ends_the_students_and_nothing_else_does(method):
    end, own_end = teacher().vocabulary.end_ids[0], student().vocabulary.end_ids[0]
    for record in RECORDS[:6]:
        word, b = said(teacher(), record, SIZES[0], 0), student().render(record)
        found = put(made(method), teacher(), student(), record, word.targets)
        q = distributions(found, 1.0, SIZES[1])
        assert {p for p in b.answer_positions().tolist() if b.kind[p + 1] == END} <= q.keys()
        meets = set(align(teacher().render(record), b)[1].tolist())
        for (position, distribution), row in zip(q.items(), found.row.tolist(), strict=True):
            share = distribution[own_end] / word.at(1.0)[row][0][end]
            # contextual leaves other things out
            assert share == pytest.approx(1 if position in meets else 0, abs=1e-3) or (share > 1 and position in meets and method == "contextual")


@pytest.mark.parametrize("method", ACROSS)
def test_an_empty_answer_has_its_end_alone_and_an_answer_of_one_token_both(method):
    for record, count in ((RECORDS[3], 1), (RECORDS[4], 2)):
        found = put(made(method), teacher(), student(), record, said(teacher(), record, 8, 0).targets)
        assert found.position.tolist() == student().render(record).answer_positions().tolist()
        assert len(found.position) == count


@pytest.mark.parametrize("method", ACROSS)
def test_each_answer_of_a_record_is_there(method):
    """A second answer is as it would be alone, where it is rendered so."""
    record = RECORDS[5]
    b, found = student().render(record), put(made(method), teacher(), student(), record, said(teacher(), record, 8, 0).targets)
    first_end = int(np.flatnonzero(b.kind == END)[0])
    assert (found.position < first_end).sum() > 3
    assert (found.position >= first_end).sum() > 3
    assert {int(b.kind[p + 1]) == END for p in found.position} == {True, False}


def test_records_together_are_the_same_as_each_alone():
    words = [put(made("contextual"), teacher(), student(), record, said(teacher(), record, 16, seed).targets) for seed, record in enumerate(RECORDS)]
    together = dense(at_temperature(words, TEMPERATURES, 3.0), SIZES[1])
    alone = np.concatenate([dense(at_temperature([word], TEMPERATURES, 3.0), SIZES[1]) for word in words])
    np.testing.assert_allclose(together, alone, atol=1e-7)


def test_records_that_are_shared_out_go_along_with_some_that_are_not():
    words = [put(made(method), teacher(), student(), RECORDS[0], said(teacher(), RECORDS[0], 16, 0).targets) for method in ("first_token", "count_transport")]
    assert [word.log_share is None for word in words] == [True, False]
    together = dense(at_temperature(words, TEMPERATURES, 3.0), SIZES[1])
    np.testing.assert_allclose(together, np.concatenate([dense(at_temperature([word], TEMPERATURES, 3.0), SIZES[1]) for word in words]), atol=1e-7)


@pytest.mark.parametrize("method", ACROSS)
def test_a_student_token_has_one_column_and_padding_repeats_one_of_a_row_with_no_mass(method):
    found = put(made(method), teacher(), student(), RECORDS[0], said(teacher(), RECORDS[0], 8, 0).targets)
    target = at_temperature([found], TEMPERATURES, 1.0)
    begins = np.cumsum(found.entries) - found.entries
    widths = set()
    for row, (begin, entries) in enumerate(zip(begins.tolist(), found.entries.tolist(), strict=True)):
        tokens = sorted(set(found.student_id[begin : begin + entries].tolist()) - {REST})
        ids = target.ids[row].tolist()
        assert ids[: len(tokens)] == tokens
        assert set(ids[len(tokens) :]) <= set(tokens)
        assert (target.probs[row, len(tokens) :] == 0).all()
        widths.add(len(tokens))
    assert len(widths) > 1


# --- one tokenizer on both sides ---


@pytest.mark.parametrize("side", [teacher, student])
@pytest.mark.parametrize("keep", [3, 10000])
def test_with_one_tokenizer_the_word_stays_as_it_is_bit_for_bit(side, keep):
    tokens, size = side().render(RECORDS[1]), len(side().vocabulary)
    targets = with_realised(said(side(), RECORDS[1], keep, 0, everywhere=False).targets, tokens.ids[tokens.answer_positions() + 1], TEMPERATURES)
    found = as_it_is(targets, size)
    for name, of_targets in {"position": "position", "entries": "kept", "student_id": "ids", "logprobs": "logprobs", "rests": "rests"}.items():
        assert (getattr(found, name) == getattr(targets, of_targets)).all()
    assert found.log_share is None
    assert (found.unkept == size - targets.kept.astype(np.int64)).all()
    identity = put(build("identity", side(), side()), side(), side(), RECORDS[1], targets)
    assert identity.position.tolist() == found.position.tolist()
    for temperature in TEMPERATURES:
        one, other = (dense(at_temperature([word], TEMPERATURES, temperature), size) for word in (found, identity))
        assert (one.astype(np.float32) == other.astype(np.float32)).all()


@settings(deadline=None, max_examples=30)
@given(record=st.sampled_from(RECORDS), keep=st.sampled_from([1, 5, 64, 10000]), temperature=st.sampled_from(TEMPERATURES), seed=st.integers(0, 99), side=st.sampled_from([teacher, student]))
def test_with_one_tokenizer_the_target_is_the_teachers_softmax_with_the_realised_token_added(record, keep, temperature, seed, side):
    tokens, size = side().render(record), len(side().vocabulary)
    word = said(side(), record, keep, seed, onto_realised=-2.0, everywhere=False)
    found = distributions(put(build("identity", side(), side()), side(), side(), record, word.targets), temperature, size)
    assert list(found) == tokens.answer_positions().tolist()
    for q, (kept, rest) in zip(found.values(), word.at(temperature), strict=True):
        np.testing.assert_allclose(q[list(kept)], list(kept.values()), rtol=1e-4, atol=1e-7)
        assert q[:-1].sum() == pytest.approx(sum(kept.values()), abs=1e-5)
        assert q[-1] == pytest.approx(rest, abs=1e-5)


def test_with_one_tokenizer_and_all_tokens_kept_the_loss_is_the_divergence_of_the_two_softmaxes():
    record, size = RECORDS[0], SIZES[1]
    tokens = student().render(record)
    position = tokens.answer_positions()
    logits = np.random.default_rng(0).normal(0, 2, (len(position), size))
    found = put(build("identity", student(), student()), student(), student(), record, targets_of(logits, tokens, position, size, TEMPERATURES))
    ours = torch.randn(len(position), size, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 2.0):
        true = torch.nn.functional.kl_div((ours.double() / temperature).log_softmax(-1), torch.from_numpy(log_softmax(logits, temperature)), reduction="none", log_target=True).sum(-1)
        torch.testing.assert_close(forward_kl(ours, at_temperature([found], TEMPERATURES, temperature)).double() / temperature**2, true, rtol=1e-4, atol=1e-5)


def test_one_tokenizer_with_two_templates_still_meets_in_the_answers():
    chatty = RecordTokenizer(student().tokenizer, "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}", "chatty")
    for record in RECORDS[:2]:
        b = chatty.render(record)
        found = put(build("identity", student(), chatty), student(), chatty, record, said(student(), record, 8, 0).targets)
        # the space of "Answer: " belongs to the first word's token in one template only; from the second word on they meet
        missed = set(b.answer_positions().tolist()) - set(found.position.tolist())
        first_word = record.segments[-1].text.split()[0]
        assert all(b.end[p + 1] <= len(b"".join(s.text.encode() for s in record.segments[:-1])) + len(first_word.encode()) for p in missed)
        assert len(missed) < len(b.answer_positions()) / 2


# --- the student's tokens ---


def renamed(side: RecordTokenizer, to: np.ndarray) -> SimpleNamespace:
    """The same tokenizer with other numbers for its tokens."""
    old = np.argsort(to)
    vocabulary = replace(
        side.vocabulary, token_bytes=[side.vocabulary.token_bytes[id] for id in old], special=side.vocabulary.special[old], end_ids=tuple(int(to[id]) for id in side.vocabulary.end_ids)
    )
    encode = lambda texts: [to[ids].tolist() for ids in side.encode(texts)]  # noqa: E731
    return SimpleNamespace(vocabulary=vocabulary, encode=encode, render=lambda record: replace(side.render(record), ids=to[side.render(record).ids]))


@pytest.mark.parametrize("method", ACROSS)
def test_permuting_the_students_ids_permutes_the_target_and_changes_the_loss(method):
    to = np.random.default_rng(0).permutation(SIZES[1]).astype(np.int32)
    other, counts = renamed(student(), to), counts_of("tiny")
    permuted = counts.of_pairs(np.repeat(np.arange(SIZES[0], dtype=np.int32), np.diff(counts.begin)), to[counts.student_id], counts.count, SIZES[0])
    targets = said(teacher(), RECORDS[0], 16, 0).targets
    one = at_temperature([put(build(method, teacher(), student(), counts, untrained), teacher(), student(), RECORDS[0], targets)], TEMPERATURES, 1.0)
    two = at_temperature([put(build(method, teacher(), other, permuted, untrained), teacher(), other, RECORDS[0], targets)], TEMPERATURES, 1.0)
    np.testing.assert_allclose(dense(two, SIZES[1])[:, [*to, SIZES[1]]], dense(one, SIZES[1]), atol=1e-7)
    logits = torch.randn(len(one.rest), SIZES[1], generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(forward_kl(logits, one), forward_kl(logits, two), atol=1e-2)

    def sorted_distance(target: SparseTarget) -> torch.Tensor:
        """ULD, the control: it knows values and no identities."""
        return (torch.from_numpy(np.sort(dense(target, SIZES[1])[:, :-1])) - logits.double().softmax(-1).sort().values).abs().sum(-1)

    assert torch.allclose(sorted_distance(one), sorted_distance(two))


def four() -> tuple[Targets, Tokens]:
    tokens = tokens_of([1, 2], 0, ids=[1, 2], end=0)
    return targets_of(np.zeros((3, 4)), tokens, tokens.answer_positions(), 2, TEMPERATURES), tokens


def test_teacher_tokens_of_one_student_token_are_summed():
    """Teacher ids 1 and 2 both become 5; 3 becomes nothing."""
    tokens = tokens_of([1, 2], 0, ids=[1, 3], end=0)
    ours = replace(tokens, ids=np.array([0, 5, 6, 0], np.int32))
    targets = targets_of(np.log(np.array([[0.1, 0.2, 0.3, 0.4]] * 3)), tokens, tokens.answer_positions(), 4, TEMPERATURES)
    target = at_temperature([put_tokens(TokenMap(np.array([REST, 5, 5, REST], np.int32)), tokens, ours, targets, 4)], TEMPERATURES, 1.0)
    found = dense(target, 7)
    assert found[0, 5] == pytest.approx(0.5, abs=1e-6)
    assert found[0, -1] == pytest.approx(0.5, abs=1e-6)
    assert target.top().tolist() == [5, 5, 5]


@pytest.mark.parametrize("method", ACROSS)
def test_teacher_tokens_of_the_same_bytes_are_summed(method):
    """A line break is a token of its own and <0x0A> besides: whichever of the two has the mass, the target is the same."""
    one, record = teacher(), asked("Lines?", "a\n12 b")
    twice = [ids for token in set(one.vocabulary.token_bytes) if token and len(ids := [id for id, other in enumerate(one.vocabulary.token_bytes) if other == token]) > 1]
    assert twice
    tokens = one.render(record)
    position = tokens.answer_positions()
    p = np.exp(log_softmax(np.random.default_rng(0).normal(0, 2, (len(position), SIZES[0]))))
    moved = p.copy()
    free = [ids for ids in twice if not set(ids) & set(tokens.ids.tolist())]
    for ids in free:
        moved[:, ids[0]] += moved[:, ids[1]] * 0.9
        moved[:, ids[1]] *= 0.1
    found = [distributions(put(build(method, one, student()), one, student(), record, targets_of(np.log(word), tokens, position, SIZES[0], TEMPERATURES)), 1.0, SIZES[1]) for word in (p, moved)]
    assert free
    for at in found[0]:
        np.testing.assert_allclose(found[0][at], found[1][at], atol=1e-6)


def test_a_position_of_which_nothing_can_be_placed_is_left_out():
    _, tokens = four()
    logits = np.log(np.array([[0.01, 0.9, 0.05, 0.04], [0.01, 0.04, 0.05, 0.9], [0.9, 0.04, 0.04, 0.02]]))
    targets = targets_of(logits, tokens, tokens.answer_positions(), 1, TEMPERATURES)
    found = put_tokens(TokenMap(np.array([REST, REST, 4, 5], np.int32)), tokens, tokens, targets, 4)
    assert found.position.tolist() == [1]
    assert found.row.tolist() == [1]
    assert dense(at_temperature([found], TEMPERATURES, 1.0), 6)[0] == pytest.approx([0, 0, 0, 0, 0.05, 0.9, 0.05], abs=1e-6)


def test_a_record_with_no_position_goes_along_with_others():
    targets, tokens = four()
    nothing = put_tokens(TokenMap(np.full(4, REST, np.int32)), tokens, tokens, targets, 4)
    something = put_tokens(TokenMap(np.arange(4, dtype=np.int32)), tokens, tokens, targets, 4)
    assert len(nothing.position) == 0
    assert len(at_temperature([nothing, something, nothing], TEMPERATURES, 1.0).rest) == 3


def test_as_many_are_unkept_as_the_vocabulary_has_beyond_the_kept_and_the_realised():
    tokens = tokens_of([1, 2], 0, ids=[1, 2], end=3)
    targets = targets_of(np.log(np.array([[0.4, 0.3, 0.2, 0.1]] * 3)), tokens, tokens.answer_positions(), 2, TEMPERATURES)
    found = put_tokens(TokenMap(np.arange(4, dtype=np.int32)), tokens, tokens, targets, 4)
    assert found.entries.tolist() == [2, 3, 3]
    assert found.unkept.tolist() == [2, 1, 1]


@pytest.mark.parametrize("method", ACROSS)
def test_a_realised_token_that_reached_the_cache_as_no_mass_is_no_nan(method):
    record = RECORDS[0]
    targets = said(teacher(), record, 4, 0, onto_realised=-60.0, near=0.0).targets
    for realised_logprob in (-np.inf, -1e30):
        lost = replace(targets, realised_logprob=np.full_like(targets.realised_logprob, realised_logprob))
        found = put(made(method), teacher(), student(), record, lost)
        for temperature in (1.0, 3.0):
            check_sums(at_temperature([found], TEMPERATURES, temperature))


@pytest.mark.parametrize("method", ACROSS)
def test_drawn_tokens_are_projected_as_they_are(method):
    """An unbiased estimate: the realised token is not added, and there is no rest."""
    record, random = RECORDS[0], np.random.default_rng(0)
    tokens = teacher().render(record)
    position = tokens.answer_positions()
    rows = [np.unique(random.integers(4, SIZES[0], 20), return_counts=True) for _ in position]
    targets = Targets(
        position=position,
        kept=np.array([len(ids) for ids, _ in rows], np.uint16),
        ids=np.concatenate([ids for ids, _ in rows]).astype(np.int32),
        logprobs=np.log(np.concatenate([counts for _, counts in rows]) / 20).astype(np.float32),
        rests=np.full((3, len(position)), -np.inf, np.float32),
        realised_logprob=np.full(len(position), -3, np.float32),
        counts=np.concatenate([counts for _, counts in rows]).astype(np.uint8),
    )
    found = put(made(method), teacher(), student(), record, targets)
    assert len(found.position) > 5
    check_sums(at_temperature([found], TEMPERATURES, 1.0))
    if method == "first_token":
        assert (found.entries == targets.kept[found.row]).all()


@pytest.mark.parametrize("method", ACROSS)
def test_of_each_kept_token_no_more_than_all_is_shared_out_and_by_a_static_map_all_of_it(method):
    for seed, record in enumerate(RECORDS):
        a, b = teacher().render(record), student().render(record)
        targets = with_realised(said(teacher(), record, 12, seed).targets, a.ids[1:], TEMPERATURES)
        shares = made(method).shares(meet(record.content, a, targets, b))
        part = np.ones(len(shares.kept)) if shares.log_share is None else np.exp(shares.log_share.astype(np.float64))
        _, which = np.unique(np.stack([shares.owner, shares.kept]), axis=1, return_inverse=True)
        total = np.bincount(which.ravel(), part)
        assert (total < 1 + 1e-6).all()
        assert method == "contextual" or (total > 1 - 1e-6).all()
        assert (np.diff(shares.position) > 0).all()


def test_positions_can_be_chosen():
    targets = with_realised(said(teacher(), RECORDS[0], 8, 0).targets, teacher().render(RECORDS[0]).ids[1:], TEMPERATURES)
    for method in ("first_token", "count_transport", "contextual"):
        shares = made(method).shares(meet(RECORDS[0].content, teacher().render(RECORDS[0]), targets, student().render(RECORDS[0])))
        wanted = np.arange(len(shares.position)) % 3 == 1
        some = shares.where(wanted)
        assert some.position.tolist() == shares.position[wanted].tolist()
        assert some.row.tolist() == shares.row[wanted].tolist()
        for n, position in enumerate(np.flatnonzero(wanted).tolist()):
            for name in ("kept", "student_id", "log_share"):
                if getattr(shares, name) is not None:
                    assert getattr(some, name)[some.owner == n].tolist() == getattr(shares, name)[shares.owner == position].tolist()


def test_hidden_states_stay_with_their_positions():
    targets, tokens = four()
    hidden = np.arange(6, dtype=np.int8).reshape(3, 2)
    with_states = replace(targets, hidden=hidden, hidden_scale=np.array([1, 2, 3], np.float32))
    found = put_tokens(TokenMap(np.array([REST, 1, REST, REST], np.int32)), tokens, tokens, with_states, 4)
    assert found.states is not None
    assert found.states.hidden.tolist() == hidden[found.row].tolist()
    assert found.states.scale.tolist() == (found.row + 1).tolist()
    kept, theirs = np.split(targets.ids, np.cumsum(targets.kept)[:-1]), np.split(found.states.ids, np.cumsum(found.states.kept)[:-1])
    for row, ids in zip(found.row.tolist(), theirs, strict=True):
        assert set(ids.tolist()) == {*kept[row].tolist(), int(tokens.ids[targets.position[row] + 1])}
    assert put_tokens(TokenMap(np.arange(4, dtype=np.int32)), tokens, tokens, targets, 4).states is None


@pytest.mark.parametrize("method", STATIC)
def test_where_both_begin_a_token_a_static_word_is_wholly_reliable(method):
    found: Projected = put(made(method), teacher(), student(), RECORDS[0], said(teacher(), RECORDS[0], 8, 0).targets)
    assert (found.reliability == 1).all()
    assert set(found.position.tolist()) <= set(align(teacher().render(RECORDS[0]), student().render(RECORDS[0]))[1].tolist())
