from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import Mismatch
from pipeline.lookup import find, names
from pipeline.signals.first_tokens import FirstTokens
from pipeline.signals.projection import REST, TokenMap, at_temperature
from pipeline.signals.vocabulary import Vocabulary
from tests.projections.made import ACROSS, RECORDS, STATIC, TEMPERATURES, build, counts_of, made, put, said, said_of_few, sides
from tests.signals.dense import student, teacher

PAIRS = pytest.mark.parametrize("pair", ["tiny", "gemma to smollm"])


def test_all_methods_that_there_are_are_tested_here():
    assert set(names("projections")) == {*ACROSS, "identity", "low_rank", "uld"}


@pytest.mark.parametrize("method", ACROSS)
def test_only_what_ends_an_answer_is_mapped_among_special_tokens_and_only_to_the_students_end(method):
    one, other = sides("tiny")
    student_id = made(method).student_id
    assert student_id.dtype == np.int32
    assert len(student_id) == len(one.vocabulary)
    for id in np.flatnonzero(one.vocabulary.special).tolist():
        assert student_id[id] == (other.vocabulary.end_ids[0] if id in one.vocabulary.end_ids else REST)
    to_special = [id for id, to in enumerate(student_id.tolist()) if to != REST and other.vocabulary.special[to]]
    assert to_special == sorted(one.vocabulary.end_ids)


@pytest.mark.parametrize("method", ACROSS)
def test_a_student_without_an_end_gives_the_end_to_the_rest(method):
    one, other = sides("tiny")
    endless = type("Endless", (), {"vocabulary": replace(other.vocabulary, end_ids=()), "encode": staticmethod(other.encode)})
    student_id = build(method, one, endless, counts_of("tiny")).student_id
    assert (student_id[np.flatnonzero(one.vocabulary.special)] == REST).all()


@pytest.mark.parametrize("method", ACROSS)
def test_every_token_goes_where_both_begin_with_the_same_bytes(method):
    one, other = sides("tiny")
    for id, to in enumerate(made(method).student_id.tolist()):
        if to != REST and one.vocabulary.token_bytes[id]:
            ours, theirs = one.vocabulary.token_bytes[id], other.vocabulary.token_bytes[to]
            assert theirs
            assert ours.startswith(theirs) or (method in ("count_transport", "learned") and theirs.startswith(ours))


# --- exact_bytes ---


@PAIRS
def test_exact_bytes_places_tokens_of_equal_bytes_and_no_others(pair):
    one, other = sides(pair)
    student_id = made("exact_bytes", pair).student_id
    available = set(other.vocabulary.token_bytes)
    for id, token in enumerate(one.vocabulary.token_bytes):
        if token:
            assert (student_id[id] != REST) == (token in available)
            assert student_id[id] == REST or other.vocabulary.token_bytes[student_id[id]] == token


def test_real_tokens_placed_by_their_bytes_are_as_many_as_were_measured():
    """Gemma 3 shares the bytes of most tokens of SmolLM and of Llama 3; by vocabulary strings they would share a third of that."""
    for pair, share in (("gemma to smollm", 0.939), ("gemma to llama", 0.674)):
        one, other = sides(pair)
        exact = made("exact_bytes", pair).student_id
        shared = len(set(exact[exact != REST].tolist())) / len(other.vocabulary)
        by_string = len(set(one.tokenizer.get_vocab()) & set(other.tokenizer.get_vocab())) / len(other.vocabulary)
        assert shared == pytest.approx(share, abs=0.005)
        assert by_string < 0.6 * shared


# --- first_token ---


@PAIRS
def test_first_token_places_every_token_on_one_that_its_bytes_begin_with(pair):
    one, other = sides(pair)
    student_id = made("first_token", pair).student_id
    bytes_of = other.vocabulary.token_bytes
    for id, token in enumerate(one.vocabulary.token_bytes):
        if not token:
            continue
        if student_id[id] == REST:
            assert not any(token[:n] in other.vocabulary.id_of_bytes for n in range(1, len(token) + 1))
        else:
            assert bytes_of[student_id[id]]
            assert token.startswith(bytes_of[student_id[id]])
    exact = made("exact_bytes", pair).student_id
    assert (student_id[exact != REST] == exact[exact != REST]).all()


def test_first_token_of_a_text_is_the_first_that_the_student_makes_of_it():
    one, other = sides("tiny")
    student_id, exact, seen = made("first_token").student_id, made("exact_bytes").student_id, 0
    for id, token in enumerate(one.vocabulary.token_bytes):
        if token and exact[id] == REST and not one.vocabulary.special[id] and token.isascii():
            assert student_id[id] == other.encode([token.decode()])[0][0]
            seen += 1
    assert seen > 20


def test_bytes_that_are_no_text_of_their_own_go_to_their_longest_prefix():
    one = Vocabulary([b"", b"ab\xf0\x9f", b"\xf0\x9f\x99", b"\xfe"], np.array([True, False, False, False]))
    other = Vocabulary([b"", b"a", b"ab", b"\xf0", b"\xf0\x9f"], np.array([True, False, False, False, False]))
    student_id = find("projections", "first_token")(one, other, lambda texts: [[1] for _ in texts]).student_id
    assert student_id.tolist() == [REST, 2, 4, REST]


def test_a_first_token_with_a_space_of_the_encoders_own_is_not_taken():
    """SentencePiece may put a space before a text."""
    one = Vocabulary([b"", b"abc"], np.array([True, False]))
    other = Vocabulary([b"", b" ", b" ab", b"a"], np.array([True, False, False, False]))
    student_id = find("projections", "first_token")(one, other, lambda texts: [[2, 3] for _ in texts]).student_id
    assert student_id.tolist() == [REST, 3]


# --- those that count ---


def test_count_transport_without_counts_is_first_token():
    one, other = sides("tiny")
    word = said(one, RECORDS[0], 20, 0).targets
    counted, first = (put(build(method, one, other), one, other, RECORDS[0], word) for method in ("count_transport", "first_token"))
    assert (counted.student_id == first.student_id).all()
    assert (counted.position == first.position).all()
    assert not counted.log_share.any()


def test_count_transport_reaches_tokens_that_no_map_of_single_tokens_does():
    """Those that the student makes of several of the teacher's."""
    one, other = sides("tiny")
    mapped = set(made("first_token").student_id.tolist())
    reached = set(made("count_transport").matrix.student_id.tolist()) - mapped
    assert len(reached) > 2
    assert all(other.vocabulary.token_bytes[id] not in one.vocabulary.token_bytes for id in reached)


def test_contextual_alone_places_a_token_where_the_students_tokenizer_does():
    one, other = sides("tiny")
    method = build("contextual", one, other)
    plain = [id for id, token in enumerate(one.vocabulary.token_bytes) if token]
    answers = FirstTokens(other.vocabulary, other.encode).of([(b"", one.vocabulary.token_bytes[id]) for id in plain])
    assert (method.student_id[plain] == answers >> 1).all()


@pytest.mark.parametrize("pair", ["gemma to smollm", "gemma to llama", "gemma to qwen"])
def test_targets_of_real_tokenizers_are_distributions(pair):
    one, other = sides(pair)
    for seed, record in enumerate(RECORDS[:6]):
        targets = said_of_few(one, record, 12, seed).targets
        for method in ("first_token", "contextual"):
            target = at_temperature([put(made(method, pair), one, other, record, targets)], TEMPERATURES, 3.3)
            np.testing.assert_allclose(target.probs.double().sum(-1) + target.rest.double(), 1, atol=1e-6)


# --- identity, and none ---


def test_identity_maps_every_token_to_itself_and_refuses_other_vocabularies():
    one, other = sides("tiny")
    same = build("identity", one, one)
    assert (same.student_id == np.arange(len(one.vocabulary))).all()
    assert same.is_identity
    with pytest.raises(Mismatch, match="contextual"):
        build("identity", one, other)


def test_identity_maps_the_end_of_one_template_to_that_of_the_other():
    one = student().vocabulary
    end, turn = one.token_bytes.index(b""), one.token_bytes.index(b"", 1)
    same = find("projections", "identity")(replace(one, end_ids=(turn, end)), replace(one, end_ids=(end,)))
    assert same.student_id[turn] == same.student_id[end] == end
    assert not same.is_identity


def test_identity_gives_no_mass_to_tokens_that_the_student_does_not_have():
    one = student().vocabulary
    longer = replace(one, token_bytes=[*one.token_bytes, b"", b""], special=np.append(one.special, [True, False]))
    assert find("projections", "identity")(longer, one).student_id.max() < len(one)


def test_a_map_that_moves_a_token_is_no_identity():
    assert TokenMap(np.arange(5, dtype=np.int32)).is_identity
    assert not TokenMap(np.array([0, 1, 3, 2], dtype=np.int32)).is_identity
    assert not TokenMap(np.array([0, 1, REST], dtype=np.int32)).is_identity


def test_uld_leaves_every_kept_token_a_token_of_its_own():
    word = said(teacher(), RECORDS[0], 9, 0).targets
    found = put(build("uld", teacher(), student()), teacher(), student(), RECORDS[0], word)
    static = put(made(STATIC[0]), teacher(), student(), RECORDS[0], word)
    assert found.position.tolist() == static.position.tolist()
    target = at_temperature([found], TEMPERATURES, 2.0)
    assert ((target.probs > 0).sum(-1).numpy() == found.entries).all()
